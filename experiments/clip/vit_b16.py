"""CLIP ViT-B/16 (Radford et al. 2021) on 400 million pairs, by OpenCLIP's recipe.

    jaxgen train experiments/clip/vit_b16.py --data.path 'DIR/*.tar' --data.tokenizer.path MODEL

DIR holds LAION-400M (Schuhmann et al. 2021, laion.ai) or data of its kind as webdataset shards, in img2dataset's form
them: a `.jpg` and a `.txt` a pair. MODEL is a SentencePiece model of 32,768 entries (`jaxgen tokenizer train`).
OpenCLIP (Ilharco et al. 2021, github.com/mlfoundations/open_clip) reports 67.1 % zero-shot on ImageNet after 32
epochs with batches of 33,792; with 13 billion pairs of DataComp-1B the same model reaches 73.5 %. Not run in full
yet. The small form learns drawn scenes.

Zero-shot accuracy is measured on CIFAR-10 (tfds:cifar10): of ImageNet's classes TFDS has WordNet's numbers, no names.
"""

import dataclasses

from jaxgen.data.imagetext import ImageText, LabelledImages
from jaxgen.data.tokenizers import SentencePiece, Words
from jaxgen.data.transforms import RandomResizedCrop
from jaxgen.evaluation.retrieval import Retrieval
from jaxgen.evaluation.zeroshot import PROMPTS, ZeroShot
from jaxgen.experiment import Experiment, Target
from jaxgen.models.text import TextTower
from jaxgen.models.vit import ViT
from jaxgen.tasks.contrastive import Contrastive
from jaxgen.training.checkpoint import Checkpointing
from jaxgen.training.optimizers import AdamW
from jaxgen.training.schedules import Cosine

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of CLIP's own pictures

experiment = Experiment(
    name="clip_vit_b16",
    task=Contrastive(
        image=ViT.B(16, pre_norm=True, patch_bias=False, head_bias=False, norm_epsilon=1e-5, out=512, remat="full"),
        text=TextTower(vocab_size=32_768, width=512, depth=12, heads=8, max_length=77, out=512, remat="full"),
        mean=MEAN,
        std=STD,
    ),
    data=ImageText(
        path="data/laion400m/*.tar",
        image="jpg",
        caption="caption",
        tokenizer=SentencePiece(vocab_size=32_768),
        length=77,
        size=224,
        augment=(RandomResizedCrop(224, scale=(0.9, 1.0)),),
        heldout=0.0001,
        max_bad=0.05,
    ),
    optimizer=AdamW(
        learning_rate=5e-4, b2=0.98, eps=1e-6, weight_decay=0.2, schedule=Cosine(warmup=2000, final=0.0)
    ),
    batch_size=33_792,
    steps=379_000,
    evaluations=(
        Retrieval(every=5000, among=1000),
        ZeroShot(
            every=5000,
            data=LabelledImages(path="tfds:cifar10#train", heldout_path="tfds:cifar10#test", size=224),
            templates=PROMPTS,
        ),
    ),
    checkpoint=Checkpointing(every=1000),
    topology="v5p:4x4x4",
)

smoke = dataclasses.replace(
    experiment,
    name="clip_vit_b16-smoke",
    task=Contrastive(
        image=experiment.task.image.clone(patch=8, width=96, depth=3, heads=3, image_size=32, out=96),
        text=TextTower(vocab_size=128, width=96, depth=2, heads=3, max_length=24, out=96, remat="full"),
        mean=MEAN,
        std=STD,
    ),
    data=ImageText(
        tokenizer=Words(), length=24, size=32, augment=(RandomResizedCrop(32, scale=(0.9, 1.0)),), heldout=0.05
    ),
    optimizer=dataclasses.replace(experiment.optimizer, learning_rate=2e-3, schedule=Cosine(warmup=20, final=0.0)),
    batch_size=128,
    steps=200,
    evaluations=(Retrieval(among=128),),
    target=Target("eval/retrieval/image_to_text/recall@10", at_least=0.9),
)
