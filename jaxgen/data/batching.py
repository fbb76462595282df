"""The rows of a batch that one process reads. (No JAX in here: reading processes import it.)"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import grain


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
        first, size = step * self.batch_size, len(self.dataset)
        examples = [self.dataset[first + row] for row in self.rows if first + row < size]
        like = examples[0] if examples else self.dataset[0]
        missing = len(self.rows) - len(examples)
        blank = {name: np.zeros_like(value) for name, value in like.items()}
        return {name: np.stack([e[name] for e in examples + [blank] * missing]) for name in like}
