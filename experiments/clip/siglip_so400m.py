"""SigLIP So400m/14 (Zhai et al. 2023): the sigmoid loss, with the shape of Alabdulmohsin et al. 2023.

    jaxgen train experiments/clip/siglip_so400m.py --data.path 'DIR/*.tar' --data.tokenizer.path MODEL

DIR holds pairs as webdataset shards, a `.jpg` and a `.txt` each; MODEL is a SentencePiece model of 32,000 entries. The
authors' data, WebLI, is not public; they report 82.2 % zero-shot on ImageNet at 224 pixels after 40 billion pairs
(github.com/google-research/big_vision, SigLIP's table). Not run in full yet. The small form learns drawn scenes.

Zero-shot accuracy is measured on CIFAR-10 (tfds:cifar10): of ImageNet's classes TFDS has WordNet's numbers, no names.
"""

import dataclasses

from jaxgen.data.imagetext import ImageText, LabelledImages
from jaxgen.data.tokenizers import SentencePiece, Words
from jaxgen.data.transforms import Resize
from jaxgen.evaluation.retrieval import Retrieval
from jaxgen.evaluation.zeroshot import PROMPTS, ZeroShot
from jaxgen.experiment import Experiment, Target
from jaxgen.models.text import TextTower
from jaxgen.models.vit import ViT
from jaxgen.sharding import Mesh
from jaxgen.tasks.contrastive import Contrastive
from jaxgen.training.checkpoint import Checkpointing
from jaxgen.training.optimizers import AdamW
from jaxgen.training.schedules import Cosine

experiment = Experiment(
    name="siglip_so400m",
    task=Contrastive(
        image=ViT.So400m(14, pool="attention", remat="full"),
        text=TextTower(
            vocab_size=32_000, width=1152, depth=27, heads=16, mlp_width=4304, max_length=64, mask="bidirectional",
            pool="final", out=1152, head_bias=True, norm_epsilon=1e-6, remat="full",
        ),
        objective="sigmoid",
    ),
    data=ImageText(
        path="data/pairs/*.tar",
        image="jpg",
        caption="caption",
        tokenizer=SentencePiece(vocab_size=32_000),
        length=64,
        size=224,
        augment=(Resize(224, mode="exact"),),
        fit=(Resize(224, mode="exact"),),
        heldout=0.0001,
        max_bad=0.05,
    ),
    optimizer=AdamW(
        learning_rate=1e-3, b2=0.95, weight_decay=0.1, moment_dtype="bfloat16",
        schedule=Cosine(warmup=20_000, final=0.0),
    ),
    batch_size=32_768,
    steps=1_220_000,
    mesh=Mesh(data=-1, fsdp=8),
    evaluations=(
        Retrieval(every=5000, among=1000),
        ZeroShot(
            every=5000,
            data=LabelledImages(path="tfds:cifar10#train", heldout_path="tfds:cifar10#test", size=224),
            templates=PROMPTS,
        ),
    ),
    checkpoint=Checkpointing(every=1000),
    topology="v5p:8x8x8",
)  # fmt: skip

smoke = dataclasses.replace(
    experiment,
    name="siglip_so400m-smoke",
    task=Contrastive(
        image=experiment.task.image.clone(patch=8, width=96, depth=3, heads=3, mlp_width=0, image_size=32),
        text=experiment.task.text.clone(vocab_size=128, width=96, depth=2, heads=3, mlp_width=0, max_length=24, out=96),
        objective="sigmoid",
    ),
    data=ImageText(
        tokenizer=Words(), length=24, size=32, augment=(Resize(32, mode="exact"),), fit=(Resize(32, mode="exact"),),
        heldout=0.05,
    ),
    optimizer=dataclasses.replace(experiment.optimizer, learning_rate=2e-3, schedule=Cosine(warmup=20, final=0.0)),
    batch_size=128,
    steps=200,
    mesh=Mesh(),
    evaluations=(Retrieval(among=128),),
    target=Target("eval/retrieval/image_to_text/recall@10", at_least=0.9),
)  # fmt: skip
