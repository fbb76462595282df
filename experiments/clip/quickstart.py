"""A small CLIP (Radford et al. 2021) of drawn scenes and their captions; minutes on a laptop.

    jaxgen train experiments/clip/quickstart.py

Scenes of two groups of shapes are drawn as they are needed, so nothing is downloaded. Seen in three minutes on two
cores, on scenes whose facts were never together in training: recall@1 among 256 of 0.88 and 0.89, and of captions with
one fact replaced, the true one wins for 99 % of shapes, 100 % of colours, 93 % of counts and 49 % of relations.
"""

import dataclasses

from jaxgen.data.scenes import Scenes
from jaxgen.evaluation.retrieval import Retrieval
from jaxgen.evaluation.scenes import SceneFacts
from jaxgen.experiment import Experiment, Target
from jaxgen.models.text import TextTower
from jaxgen.models.vit import ViT
from jaxgen.tasks.contrastive import Contrastive
from jaxgen.training.checkpoint import Checkpointing
from jaxgen.training.metrics import Logging
from jaxgen.training.optimizers import Muon
from jaxgen.training.schedules import Cosine

experiment = Experiment(
    name="clip_quickstart",
    task=Contrastive(
        image=ViT(patch=4, width=128, depth=3, heads=4, image_size=32, pool="mean", out=128, scan=False),
        text=TextTower(vocab_size=128, width=128, depth=2, heads=4, max_length=16, out=128, scan=False),
    ),
    data=Scenes(level=2, size=32, length=16),
    optimizer=Muon(
        learning_rate=4e-3, adam_learning_rate=3e-3, rms=0.2, weight_decay=0.1, schedule=Cosine(warmup=30)
    ),
    batch_size=128,
    steps=300,
    evaluations=(Retrieval(among=256), SceneFacts()),
    checkpoint=Checkpointing(every=300),
    log=Logging(every=10),
    target=Target("eval/retrieval/image_to_text/recall@1", at_least=0.8),
    topology="v5e:2x2",
)

smoke = dataclasses.replace(
    experiment,
    name="clip_quickstart-smoke",
    task=Contrastive(
        image=experiment.task.image.clone(width=96, heads=3, out=96),
        text=experiment.task.text.clone(width=96, heads=3, out=96),
    ),
    data=dataclasses.replace(experiment.data, heldout=256),
    steps=100,
    evaluations=(Retrieval(among=256), SceneFacts(examples=128)),
    target=Target("eval/retrieval/image_to_text/recall@10", at_least=0.9),
)
