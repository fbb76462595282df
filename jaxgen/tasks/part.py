"""A part of a model, imported for others: what an experiment takes of it by `Pretrained`."""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp

from jaxgen.errors import UserError
from jaxgen.models.conditions import example
from jaxgen.models.text import TextTower
from jaxgen.tasks import vision
from jaxgen.tasks.base import Task


@dataclasses.dataclass(frozen=True)
class Part(Task):
    """A network of diffusion, or a text tower, that learns nothing here: it is exported again, or stands in another
    experiment as `Pretrained(directory)`."""

    model: nn.Module

    mean: ClassVar[tuple[float, ...]] = (0.5,)
    std: ClassVar[tuple[float, ...]] = (0.5,)

    def init(self, key):
        with vision.unsplit():
            model = vision.for_init(self.model)
            if isinstance(model, TextTower):
                inputs = jnp.zeros((1, 2), jnp.int32), jnp.ones((1,), jnp.int32)
            else:
                inputs = example(model)
            found = dict(model.init(key, *inputs))
        return {"model": found.pop("params")}, {"model": found} if found else {}

    def loss(self, params, batch, context):
        raise NotImplementedError("a part has no loss")

    def check_training(self, spec):
        raise UserError(
            f"A {type(self.model).__name__} alone learns nothing; it is for an experiment that holds Pretrained(DIR)."
        )
