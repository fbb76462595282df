"""DiT-XL/2 on ImageNet at 256 pixels, in latents (Peebles & Xie 2023, "Scalable Diffusion Models with Transformers").

    jaxgen import DIR/vae models/sd_vae                          # Stable Diffusion's autoencoder, as diffusers keeps it
    jaxgen train experiments/diffusion/dit_xl2_imagenet.py       # tfds:imagenet2012

The paper reports FID 2.27 with guidance 1.5 (250 steps, 50,000 pictures) after 7 million steps of 256 pictures. Latents
of each picture and of its mirror image are computed once and kept: 10 GB each. Not run in full yet. The small form
trains the small autoencoder of autoencoder.py first, and then makes drawn shapes.
"""

import dataclasses

from jaxgen.data.imagetext import LabelledImages
from jaxgen.data.transforms import CenterCrop, Flip, Resize
from jaxgen.diffusion.paths import Table
from jaxgen.diffusion.predictions import Epsilon
from jaxgen.diffusion.weightings import Steps
from jaxgen.evaluation.heldout import HeldOut
from jaxgen.evaluation.pictures import PicturePreview
from jaxgen.experiment import Experiment, Target
from jaxgen.models.autoencoder import Autoencoder
from jaxgen.models.dit import DiT
from jaxgen.pretrained import Pretrained
from jaxgen.sampling.diffusion import Sampling
from jaxgen.sampling.solvers import Ddpm
from jaxgen.tasks.diffusion import Diffusion
from jaxgen.training.checkpoint import Checkpointing
from jaxgen.training.ema import Ema
from jaxgen.training.optimizers import AdamW
from jaxgen.training.schedules import Constant

SAMPLING = Sampling(Ddpm("large"), steps=250, guidance=1.5)

experiment = Experiment(
    name="dit_xl2_imagenet",
    task=Diffusion(
        DiT.XL(2, out=8, classes=1000, remat="full"),
        path=Table.linear(),
        prediction=Epsilon(),
        times=Steps(1000),
        autoencoder=Pretrained("models/sd_vae", like=Autoencoder(scale=0.18215)),
        cached=True,
        learned_variance=True,
    ),
    data=LabelledImages(
        path="tfds:imagenet2012#train",
        heldout_path="tfds:imagenet2012#validation",
        size=256,
        augment=(Flip(),),
        fit=(Resize(256), CenterCrop(256)),
    ),
    optimizer=AdamW(learning_rate=1e-4, b2=0.999, weight_decay=0.0, schedule=Constant()),
    batch_size=256,
    steps=7_000_000,
    ema=Ema(0.9999),
    evaluations=(HeldOut(every=50_000), PicturePreview(every=50_000, n=32, sampling=SAMPLING)),
    checkpoint=Checkpointing(every=10_000),
    topology="v5p:4x4x4",
)

smoke = dataclasses.replace(
    experiment,
    name="dit_xl2_imagenet-smoke",
    task=dataclasses.replace(
        experiment.task,
        network=experiment.task.network.clone(width=64, depth=2, heads=2, classes=24),
        autoencoder=Pretrained("experiments/diffusion/autoencoder.py"),
    ),
    data=LabelledImages(size=32, heldout=0.05, augment=(Flip(),)),
    optimizer=dataclasses.replace(experiment.optimizer, learning_rate=2e-3, schedule=Constant(warmup=20)),
    batch_size=64,
    steps=150,
    ema=Ema(0.98),
    evaluations=(HeldOut(), PicturePreview(n=8, sampling=dataclasses.replace(SAMPLING, steps=50))),
    target=Target("eval/heldout/error", at_most=0.5),
)
