"""Photographs of five kinds of flowers at 64 pixels, by class.

    jaxgen train experiments/diffusion/flowers.py --data.root DIR     # DIR holds flowers128.tar
    jaxgen sample runs/flowers --class tulips --n 16

`flowers128.tar` holds 3,102 photographs of TensorFlow's flowers at 128 pixels, and a table `captions.tsv` with the
columns `file`, `label`, `caption` and `credit`. Without a folder the small form makes drawn shapes. Not run in full
yet.
"""

import dataclasses

from jaxgen.data.imagetext import LabelledImages
from jaxgen.data.transforms import Flip, RandomResizedCrop
from jaxgen.diffusion.paths import Flow
from jaxgen.diffusion.predictions import Velocity
from jaxgen.diffusion.weightings import LogitNormal
from jaxgen.evaluation.heldout import HeldOut
from jaxgen.evaluation.pictures import PicturePreview
from jaxgen.experiment import Experiment, Target
from jaxgen.models.unet import UNet
from jaxgen.sampling.diffusion import Sampling
from jaxgen.sampling.solvers import Heun
from jaxgen.tasks.diffusion import Diffusion
from jaxgen.training.checkpoint import Checkpointing
from jaxgen.training.ema import Ema
from jaxgen.training.optimizers import AdamW
from jaxgen.training.schedules import Cosine

SAMPLING = Sampling(Heun("straight"), steps=24, guidance=2.0)

experiment = Experiment(
    name="flowers",
    task=Diffusion(
        UNet(out=3, width=128, multipliers=(1, 2, 2, 2), blocks=2, attention=(2, 3), classes=5, dropout=0.1),
        path=Flow(shift=2.0),  # of 64 pixels where 32 want none
        prediction=Velocity(),
        times=LogitNormal(),
    ),
    data=LabelledImages(
        path="flowers128.tar",
        image="file",
        size=64,
        heldout=0.05,
        augment=(RandomResizedCrop(64, scale=(0.8, 1.0), ratio=(1.0, 1.0)), Flip()),
    ),
    optimizer=AdamW(learning_rate=3e-4, weight_decay=0.01, schedule=Cosine(warmup=1000)),
    batch_size=128,
    steps=60_000,
    ema=Ema(0.9995),
    evaluations=(HeldOut(every=5000), PicturePreview(every=5000, n=40, columns=5, sampling=SAMPLING)),
    checkpoint=Checkpointing(every=5000),
    topology="v5e:2x4",
)

smoke = dataclasses.replace(
    experiment,
    name="flowers-smoke",
    task=dataclasses.replace(
        experiment.task,
        network=experiment.task.network.clone(
            width=16, multipliers=(1, 2), blocks=1, attention=(1,), groups=8, head_dim=16, classes=24
        ),
    ),
    data=LabelledImages(size=32, heldout=0.05),
    optimizer=dataclasses.replace(experiment.optimizer, learning_rate=2e-3, schedule=Cosine(warmup=20)),
    batch_size=32,
    steps=150,
    ema=Ema(0.99),
    evaluations=(HeldOut(), PicturePreview(n=8, sampling=dataclasses.replace(SAMPLING, steps=8))),
    target=Target("eval/heldout/loss", at_most=0.5),
)
