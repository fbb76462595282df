"""Small pictures enlarged four times by a second stage (Saharia et al. 2021, SR3; Ho et al. 2022, cascades).

    jaxgen train experiments/diffusion/scenes_upscale.py
    jaxgen sample runs/scenes_upscale --image small.png
    jaxgen sample runs/scenes_upscale --image drawn.png --image-noise 0.2    # one that a first stage has drawn

The network sees the enlarged small picture beside the noisy one, in training with noise of a strength that it is told.
Measured are PSNR and SSIM of held-out pictures beside those of bicubic interpolation.

Seen of the small form after 240 steps: 22.0 dB, still below the 25.5 of interpolation. Not run in full yet.
"""

import dataclasses

from jaxgen.data.scenes import Scenes
from jaxgen.diffusion.paths import Flow
from jaxgen.diffusion.predictions import X0
from jaxgen.diffusion.weightings import LogitNormal, VelocityWeight
from jaxgen.evaluation.editing import Restored
from jaxgen.evaluation.heldout import HeldOut
from jaxgen.evaluation.pictures import PicturePreview
from jaxgen.experiment import Experiment, Target
from jaxgen.models.dit import DiT
from jaxgen.sampling.diffusion import Sampling
from jaxgen.tasks.beside import Smaller
from jaxgen.tasks.diffusion import Diffusion
from jaxgen.training.checkpoint import Checkpointing
from jaxgen.training.ema import Ema
from jaxgen.training.metrics import Logging
from jaxgen.training.optimizers import Muon
from jaxgen.training.schedules import Cosine

SAMPLING = Sampling(steps=16)

experiment = Experiment(
    name="scenes_upscale",
    task=Diffusion(
        DiT(out=3, patch=4, width=160, depth=6, heads=5, periods=64, scan=False),
        path=Flow(),
        prediction=X0(),
        weighting=VelocityWeight(),
        times=LogitNormal(0.5, 1.2),
        beside=Smaller(factor=4),
    ),
    data=Scenes(level=3, size=64, length=16),
    optimizer=Muon(
        learning_rate=4e-3, adam_learning_rate=2e-3, rms=0.2, weight_decay=0.01, schedule=Cosine(warmup=50)
    ),
    batch_size=64,
    steps=2500,
    ema=Ema(0.998),
    evaluations=(PicturePreview(every=500, n=16, sampling=SAMPLING), Restored(every=500, sampling=SAMPLING)),
    checkpoint=Checkpointing(every=500),
    log=Logging(every=10),
    topology="v5e:2x2",
)

smoke = dataclasses.replace(
    experiment,
    name="scenes_upscale-smoke",
    task=dataclasses.replace(
        experiment.task,
        network=experiment.task.network.clone(width=64, depth=2, heads=2),
    ),
    data=dataclasses.replace(experiment.data, level=1, size=32, heldout=256),
    steps=240,
    ema=Ema(0.98),
    evaluations=(
        HeldOut(),
        Restored(n=64, sampling=dataclasses.replace(SAMPLING, steps=8)),
        PicturePreview(n=8, sampling=dataclasses.replace(SAMPLING, steps=8)),
    ),
    target=Target("eval/restored/psnr", at_least=20.0),
)
