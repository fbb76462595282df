"""Pictures of texts: drawn scenes of two groups of shapes, made from their captions; half an hour on a laptop.

    jaxgen train experiments/diffusion/scenes.py
    jaxgen sample runs/scenes --prompt "two red rings above a blue square" --guidance 4 --n 16

A diffusion transformer reads the caption as tokens of its own sequence; the text encoder is trained with it. Held-out
captions combine facts that were never together in training, and every fact is read back from the pictures. What is
where is decided at high noise, so training and sampling spend most of their times there. Seen: of 256 such captions,
with 4 pictures each, 99.1 % of the facts are right; with unseen pairs of shape and colour 99.2 %; by chance 34 %.
"""

import dataclasses

from jaxgen.data.scenes import Scenes
from jaxgen.diffusion.paths import Flow
from jaxgen.diffusion.predictions import X0
from jaxgen.diffusion.weightings import LogitNormal, VelocityWeight
from jaxgen.evaluation.generated import FactsRight
from jaxgen.evaluation.heldout import HeldOut
from jaxgen.evaluation.pictures import PicturePreview
from jaxgen.experiment import Experiment, Target
from jaxgen.models.dit import DiT
from jaxgen.models.text import TextTower
from jaxgen.sampling.diffusion import Sampling
from jaxgen.sampling.grids import Shifted
from jaxgen.tasks.diffusion import Diffusion
from jaxgen.training.checkpoint import Checkpointing
from jaxgen.training.ema import Ema
from jaxgen.training.metrics import Logging
from jaxgen.training.optimizers import Muon
from jaxgen.training.schedules import Cosine

SAMPLING = Sampling(grid=Shifted(3.0), steps=16, guidance=2.5)

experiment = Experiment(
    name="scenes",
    task=Diffusion(
        DiT(out=3, patch=4, width=160, depth=6, heads=5, text=128, pooled=128, periods=64, scan=False),
        path=Flow(),
        prediction=X0(),
        weighting=VelocityWeight(),
        times=LogitNormal(0.8, 1.2),
        text=TextTower(
            vocab_size=128, width=128, depth=2, heads=4, max_length=16, out=128, mask="bidirectional", scan=False
        ),
    ),
    data=Scenes(level=2, size=32, length=16),
    optimizer=Muon(
        learning_rate=4e-3, adam_learning_rate=2e-3, rms=0.2, weight_decay=0.01, schedule=Cosine(warmup=50)
    ),
    batch_size=64,
    steps=1700,
    ema=Ema(0.998),
    evaluations=(PicturePreview(every=250, n=16, sampling=SAMPLING), FactsRight(n=64, sampling=SAMPLING)),
    checkpoint=Checkpointing(every=500),
    log=Logging(every=10),
    topology="v5e:2x2",
)

smoke = dataclasses.replace(
    experiment,
    name="scenes-smoke",
    task=dataclasses.replace(
        experiment.task,
        network=experiment.task.network.clone(width=96, depth=3, heads=3, text=64, pooled=64),
        text=experiment.task.text.clone(width=64, depth=1, heads=2, out=64),
    ),
    data=dataclasses.replace(experiment.data, heldout=256),
    steps=200,
    ema=Ema(0.98),
    evaluations=(HeldOut(), PicturePreview(n=8, sampling=dataclasses.replace(SAMPLING, steps=8))),
    target=Target("eval/heldout/error", at_most=0.2),
)
