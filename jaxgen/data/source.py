"""Grain datasets of examples that are read at random."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import grain

from jaxgen.data.buckets import Batches


class Source(grain.MapDataset):
    """`grain.MapDataset.source` without its statistics, which cost 50 microseconds an example."""

    def __init__(self, examples: Sequence[Any]):
        super().__init__()
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int | slice) -> Any:
        return self.slice(index) if isinstance(index, slice) else self._examples[index % len(self)]


class Bucketed(grain.MapDataset):
    """Examples one by one; `batches_of` gives them, of several shapes, in an order in which each batch is of one."""

    def __init__(self, single: grain.MapDataset, batches: Batches):
        super().__init__()
        self._single, self._batches = single, batches

    def __len__(self) -> int:
        return len(self._single)

    def __getitem__(self, index: int | slice) -> Any:
        return self._single[index]

    def batches_of(self, size: int) -> Source:
        """The dataset whose examples n * size .. n * size + size - 1 are of one shape."""
        return Source(dataclasses.replace(self._batches, size=size))
