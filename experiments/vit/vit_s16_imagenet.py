"""ViT-S/16 on ImageNet-1k in 90 epochs (Beyer et al. 2022, "Better plain ViT baselines for ImageNet-1k").

    jaxgen train experiments/vit/vit_s16_imagenet.py                           # tfds:imagenet2012
    jaxgen train experiments/vit/vit_s16_imagenet.py --data.path DIR/train --data.heldout-path DIR/val

The paper reports 76.5 % top-1 after 90 epochs. TFDS makes its copy from ILSVRC2012's own archives, which image-net.org
gives to those who register; a folder holds one folder a class. Not run in full yet. The small form tells drawn
shapes and colours apart.
"""

import dataclasses

from jaxgen.data.imagetext import LabelledImages
from jaxgen.data.transforms import CenterCrop, Flip, RandAugment, RandomResizedCrop, Resize
from jaxgen.evaluation.calibration import Accuracy
from jaxgen.experiment import Experiment, Target
from jaxgen.models.vit import ViT
from jaxgen.tasks.classification import Classification
from jaxgen.tasks.mixing import Mixup
from jaxgen.training.checkpoint import Checkpointing
from jaxgen.training.optimizers import AdamW
from jaxgen.training.schedules import Cosine

experiment = Experiment(
    name="vit_s16_imagenet",
    task=Classification(ViT.S(16, positions="sincos", pool="mean", out=1000), mix=Mixup(0.2)),
    data=LabelledImages(
        path="tfds:imagenet2012#train",
        heldout_path="tfds:imagenet2012#validation",
        size=224,
        augment=(RandomResizedCrop(224, scale=(0.05, 1.0)), Flip(), RandAugment(2, 10)),
        fit=(Resize(256), CenterCrop(224)),
    ),
    # the paper decays by 1e-4 of the schedule alone, which is 0.1 of the learning rate
    optimizer=AdamW(learning_rate=1e-3, b2=0.999, weight_decay=0.1, schedule=Cosine(warmup=10_000, final=0.0)),
    batch_size=1024,
    steps=112_603,
    evaluations=(Accuracy(every=5000),),
    checkpoint=Checkpointing(every=2500),
    topology="v5e:4x4",
)

smoke = dataclasses.replace(
    experiment,
    name="vit_s16_imagenet-smoke",
    task=Classification(
        ViT(patch=8, width=96, depth=3, heads=3, image_size=32, positions="sincos", pool="mean", out=24), mix=Mixup(0.2)
    ),
    data=LabelledImages(
        size=32, augment=(RandomResizedCrop(32, scale=(0.8, 1.0)), Flip(), RandAugment(1, 3)), heldout=0.05
    ),
    optimizer=dataclasses.replace(experiment.optimizer, learning_rate=2e-3, schedule=Cosine(warmup=20, final=0.0)),
    batch_size=128,
    steps=250,
    evaluations=(Accuracy(),),
    target=Target("eval/accuracy/top1", at_least=0.5),
)
