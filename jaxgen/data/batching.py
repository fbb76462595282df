"""The rows of a batch that one process reads. (No JAX in here: reading processes import it.)"""

from __future__ import annotations

import contextvars
import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import grain

_skipped: contextvars.ContextVar[dict[str, str] | None] = contextvars.ContextVar("skipped", default=None)


def skipped(name: str, reason: str) -> None:
    """Tells of an example that could not be read and was left out or replaced; called by reading code."""
    collected = _skipped.get()
    if collected is not None:
        collected[name] = reason


@dataclasses.dataclass(frozen=True)
class Rows:
    """Called with a step n: some rows of batch n, stacked; rows past the end of the dataset are zeros (weight 0).

    Attributes:
      dataset: examples as dicts of arrays; batch n is examples n * batch_size .. (n + 1) * batch_size - 1.
      rows: which rows of the batch, ascending.
      batch_size: rows of the whole batch.
    """

    dataset: grain.MapDataset
    rows: Sequence[int]
    batch_size: int

    def __call__(self, step: int) -> dict[str, np.ndarray]:
        return self.read(step)[0]

    def read(self, step: int) -> tuple[dict[str, np.ndarray], dict[str, str]]:
        """The rows, and the reason by name of all that was skipped while they were read (see `skipped`)."""
        first, size = step * self.batch_size, len(self.dataset)
        token = _skipped.set({})
        try:
            examples = [self.dataset[first + row] for row in self.rows if first + row < size]
            like = examples[0] if examples else self.dataset[0]
            told = _skipped.get()
        finally:
            _skipped.reset(token)
        missing = len(self.rows) - len(examples)
        blank = {name: np.zeros_like(value) for name, value in like.items()}
        return {name: np.stack([e[name] for e in examples + [blank] * missing]) for name in like}, told
