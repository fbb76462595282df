"""Weights from elsewhere, as an experiment says it. A task's field may be `model: GPT | Pretrained`."""

import dataclasses
from typing import Any, Literal

from jaxgen.errors import UserError


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """Stands where an experiment holds a model: the module and the weights are those of another run."""

    source: str
    """A run directory, or an experiment file whose smoke form is trained first (and cached)."""
    part: str = "task.model"
    """The field of the source's experiment that holds the module."""
    weights: Literal["ema", "raw"] = "ema"
    """The averaged weights (the raw ones where the source keeps no average), or the raw ones."""
    step: str = "latest"
    """A step of the source: a number, latest or best."""
    like: Any = None
    """The module that is expected there; shapes (`jaxgen show`) are taken of it while the source is missing."""

    def __post_init__(self):
        if self.step not in ("latest", "best") and not self.step.isdecimal():
            raise UserError(f"the step of a Pretrained is {self.step!r}, which should be a number, latest or best")
