"""Diffusion of points in the plane: the whole algebra in seconds, with a plot.

    jaxgen train experiments/diffusion/toy2d.py
    jaxgen train experiments/diffusion/toy2d.py --data.shape checkerboard

samples/ in the run directory holds a plot of true points beside drawn ones.
"""

import dataclasses

from jaxgen.data.points import Points
from jaxgen.diffusion.paths import Flow
from jaxgen.diffusion.predictions import Velocity
from jaxgen.evaluation.points import PointCloud
from jaxgen.experiment import Experiment, Target
from jaxgen.models.mlp import MLP
from jaxgen.sampling.diffusion import Sampling
from jaxgen.sampling.solvers import Heun
from jaxgen.tasks.diffusion import Diffusion
from jaxgen.training.checkpoint import Checkpointing
from jaxgen.training.ema import Ema
from jaxgen.training.optimizers import AdamW
from jaxgen.training.schedules import Cosine

experiment = Experiment(
    name="toy2d",
    task=Diffusion(MLP(width=128, depth=3), path=Flow(), prediction=Velocity()),
    data=Points("spiral"),
    optimizer=AdamW(learning_rate=2e-3, schedule=Cosine(warmup=50)),
    batch_size=512,
    steps=3000,
    ema=Ema(0.995),
    evaluations=(PointCloud(every=1000, sampling=Sampling(Heun("straight"), steps=32)),),
    checkpoint=Checkpointing(every=1000),
    target=Target("eval/points/energy_distance", at_most=0.003),
    topology="v5e:2x2",
)

smoke = dataclasses.replace(
    experiment,
    name="toy2d-smoke",
    steps=400,
    evaluations=(PointCloud(n=1000, sampling=Sampling(Heun("straight"), steps=16)),),
    target=Target("eval/points/energy_distance", at_most=0.02),
)
