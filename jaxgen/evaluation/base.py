"""What a run is measured by: objects that the loop holds and calls at their intervals."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from jaxgen.errors import UserError
from jaxgen.sharding import Sharding
from jaxgen.tasks.base import Task


@dataclasses.dataclass(frozen=True, eq=False)
class Setting:
    """What an evaluation is built for."""

    task: Task
    data: Any
    """The prepared data."""
    sharding: Sharding
    spec: Mapping[str, jax.ShapeDtypeStruct]
    """Shapes of a training batch."""
    seed: int = 0
    told: Callable[[str, str], None] | None = None
    """Called with the name of a held-out example that cannot be read, and why."""


@dataclasses.dataclass(frozen=True)
class Report:
    """What an evaluation found: numbers by name, and texts and pictures to keep."""

    metrics: dict[str, float]
    texts: dict[str, str] = dataclasses.field(default_factory=dict)
    """Written to samples/STEP-NAME.txt in the run directory."""
    images: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    """uint8 (H, W, 3), written to samples/STEP-NAME.png."""


Measure = Callable[[dict[str, Any], Any, int], Report]
"""(parameters by part, task state, step) -> report. Every process calls it."""


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Something to measure every so many steps, and at the end."""

    every: int = 0
    """Steps between two evaluations; 0 for the end of the run alone."""
    name: str = "evaluation"
    """Metrics are named eval/NAME/..."""

    def __post_init__(self):
        if not re.fullmatch(r"[\w.+-]+", self.name):
            raise UserError(f"An evaluation's name is {self.name!r}, which should be usable as a file's name.")
        for field in ("every", "batch_size"):
            if getattr(self, field, 0) < 0:
                raise UserError(f"{field} of the evaluation {self.name} is less than 0.")

    def build(self, setting: Setting) -> Measure:
        """Compile what is needed, once a run."""
        raise NotImplementedError


def constant_key() -> Array:
    """The key of evaluations: a measurement does not depend on the step it is made at."""
    return jax.random.key(0)
