"""A network to see a run's pictures with, where nobody names one."""

import contextlib
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from jaxgen import record
from jaxgen.cli.opened import Opened
from jaxgen.experiment import Experiment, trained
from jaxgen.models.text import TextTower
from jaxgen.models.vit import ViT
from jaxgen.pretrained import Pretrained
from jaxgen.tasks.base import Task
from jaxgen.tasks.classification import Classification
from jaxgen.tasks.contrastive import Contrastive
from jaxgen.training.optimizers import AdamW
from jaxgen.training.schedules import Cosine

BATCH, STEPS, TOKENS = 128, 400, 64


def own_network(opened: Opened, trust: Sequence[str | Path] = ()) -> Pretrained | None:
    """A small classifier of the run's own data, or a small CLIP of its captions, which is trained once; None where the
    data has neither."""
    spec, task = opened.program.spec, opened.experiment.task
    if "image" not in spec:
        return None
    height, width, channels = spec["image"].shape[1:]
    sides = (n for n in range(1, min(height, width) + 1) if height % n == width % n == 0)
    patch = next((n for n in sides if height * width <= TOKENS * n**2), None)
    classes = getattr(getattr(task, "network", None), "classes", 0)
    seen = ViT(patch=patch, channels=channels, width=128, depth=4, heads=4, positions="sincos", pool="mean", out=128,
               image_size=min(height, width), scan=False)  # fmt: skip
    how: Task
    if patch is None:
        return None
    if "label" in spec and classes:
        how = Classification(seen.clone(out=classes), label_smoothing=0.1)
    elif "tokens" in spec and getattr(task, "text", None) is not None:
        text = TextTower(vocab_size=task.text.vocab_size, width=128, depth=2, heads=4, scan=False,
                         max_length=spec["tokens"].shape[1], out=128)  # fmt: skip
        how = Contrastive(seen, text)
    else:
        return None
    data = record.from_record(record.stored(opened.directory).experiment, trust).data
    data = dataclasses.replace(data, aspect=1.0) if getattr(data, "aspect", 1.0) != 1.0 else data
    optimizer = AdamW(1e-3, weight_decay=0.1, schedule=Cosine(warmup=50))
    print("no network is named to see pictures with (--features): a small one is trained once on the run's own data",
          file=sys.stderr)  # fmt: skip
    experiment = Experiment(f"{opened.experiment.name}-features", how, data, optimizer, batch_size=BATCH, steps=STEPS)
    with contextlib.redirect_stdout(sys.stderr):  # what is measured has stdout for itself
        return Pretrained(str(trained(experiment, trust)), "task")
