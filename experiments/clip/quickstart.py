"""A small CLIP (Radford et al. 2021) of drawn scenes and their captions; minutes on a laptop.

    jaxgen train experiments/clip/quickstart.py

Scenes of two groups of shapes are drawn as they are needed, so nothing is downloaded.
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
from jaxgen.training.optimizers import AdamW
from jaxgen.training.schedules import Cosine

experiment = Experiment(
    name="clip_quickstart",
    task=Contrastive(
        image=ViT(patch=4, width=128, depth=4, heads=4, image_size=32, pool="mean", out=128),
        text=TextTower(vocab_size=128, width=128, depth=3, heads=4, max_length=16, out=128),
    ),
    data=Scenes(level=2, size=32, length=16),
    optimizer=AdamW(learning_rate=2e-3, weight_decay=0.1, schedule=Cosine(warmup=50)),
    batch_size=256,
    steps=500,
    evaluations=(Retrieval(among=256), SceneFacts()),
    checkpoint=Checkpointing(every=500),
    log=Logging(every=10),
    target=Target("eval/retrieval/image_to_text/recall@1", at_least=0.5),
    topology="v5e:2x2",
)

smoke = dataclasses.replace(
    experiment,
    name="clip_quickstart-smoke",
    task=Contrastive(
        image=experiment.task.image.clone(width=96, depth=3, heads=3, out=96),
        text=experiment.task.text.clone(width=96, depth=2, heads=3, out=96),
    ),
    data=dataclasses.replace(experiment.data, heldout=256),
    batch_size=128,
    steps=100,
    evaluations=(Retrieval(among=256), SceneFacts(examples=128)),
    target=Target("eval/retrieval/image_to_text/recall@10", at_least=0.3),
)
