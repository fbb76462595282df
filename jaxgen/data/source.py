"""A Grain dataset of examples that are read at random."""

from collections.abc import Sequence
from typing import Any

import grain


class Source(grain.MapDataset):
    """`grain.MapDataset.source` without its statistics, which cost 50 microseconds an example."""

    def __init__(self, examples: Sequence[Any]):
        super().__init__()
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int | slice) -> Any:
        return self.slice(index) if isinstance(index, slice) else self._examples[index % len(self)]
