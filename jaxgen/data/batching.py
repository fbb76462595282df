"""The rows of a batch that one process reads. (No JAX in here: reading processes import it.)"""

from __future__ import annotations

import contextvars
import dataclasses
import functools
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from jaxgen.errors import UserError

if TYPE_CHECKING:
    import grain

HANDFUL = 5  # so many different examples must have been skipped before their share is asked for


class Skipped(NamedTuple):
    """An example that could not be read.

    Attributes:
      name: of the example, or of the file.
      reason: why, in a few words.
      allowed: the share of all examples that may be skipped.
    """

    name: str
    reason: str
    allowed: float


_collecting: contextvars.ContextVar[list[Skipped] | None] = contextvars.ContextVar("collecting", default=None)


def skipped(name: str, reason: str, allowed: float = 0.01) -> None:
    """Tells of an example that is left out or replaced, see `Skipped`; called by reading code, in `Rows.read`."""
    collected = _collecting.get()
    if collected is not None:
        collected.append(Skipped(name, reason, allowed))


def check_skipped(reasons: Mapping[str, str], count: int, total: int, allowed: float, drawn: bool = False) -> None:
    """Raises UserError once more than a share `allowed` was skipped, and more than a handful.

    Args:
      reasons: why, by name.
      count: how often an example was skipped, of `total`.
      drawn: those are the ones drawn so far: a share that is allowed leaves room for chance, three standard deviations.
    """
    most = allowed * total
    if len(reasons) >= HANDFUL and count > most + (3 * math.sqrt(most) if drawn else 0):
        name, reason = next(iter(reasons.items()))
        raise UserError(f"{count} of {total} examples cannot be used, for example {name}: {reason}; "
                        f"data.max_bad allows a share of {allowed:g}")


def endless(example: Callable[[int], dict[str, np.ndarray]], size: int, seed: int) -> grain.MapDataset:
    """Examples in shuffled order, epoch after epoch, each in an order of its own.

    Args:
      example: called with epoch * size + place.
    """
    import grain

    from jaxgen.data.source import Source

    if size < 1 << 16:  # Grain's shuffle takes the longer the smaller the set is, up to half a millisecond an example
        return Source(_Shuffled(example, size, fold(seed)))
    # Grain's shuffle hands down epoch * size + place; it seeds epoch e with seed + e, so that neighbouring seeds would
    # share epochs but for `fold`.
    return grain.MapDataset.range(size).map_with_index(At(example)).shuffle(fold(seed)).repeat()


@dataclasses.dataclass(frozen=True)
class _Shuffled:
    """The same from a table of each epoch's order."""

    example: Callable[[int], dict[str, np.ndarray]]
    size: int
    seed: int

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        epoch, place = divmod(int(index), self.size)
        return self.example(epoch * self.size + int(_order(self.seed, epoch, self.size)[place]))


@functools.lru_cache(maxsize=64)
def _order(seed: int, epoch: int, size: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(size)


@dataclasses.dataclass(frozen=True)
class At:
    """The example at an index that counts on through the epochs (a Grain source would see it within its epoch only)."""

    example: Callable[[int], dict[str, np.ndarray]]

    def __call__(self, index: int, _: int) -> dict[str, np.ndarray]:
        return self.example(int(index))


def fold(*seeds: int) -> int:
    """A 32-bit seed, unrelated for neighbouring seeds."""
    return int(np.random.SeedSequence([s % 2**64 for s in seeds]).generate_state(1)[0])


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

    def read(self, step: int) -> tuple[dict[str, np.ndarray], list[Skipped]]:
        """The rows, and what was skipped while they were read."""
        first, size = step * self.batch_size, len(self.dataset)
        batch: dict[str, np.ndarray] = {}
        told: list[Skipped] = []
        token = _collecting.set(told)
        try:
            for place, row in enumerate(self.rows):
                if first + row >= size:
                    batch = batch or self._empty(self.dataset[0])
                    for values in batch.values():
                        values[place:] = 0
                    break
                example = self.dataset[first + row]
                batch = batch or self._empty(example)
                for name, value in example.items():  # at once, while the example is in the processor's cache
                    batch[name][place] = value
        finally:
            _collecting.reset(token)
        return batch, told

    def _empty(self, example: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {name: _aligned((len(self.rows), *value.shape), value.dtype) for name, value in example.items()}


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Memory that begins where XLA wants it to on CPU, which then takes it as it is; else it would copy the batch."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + 63, np.uint8)
    begin = -memory.ctypes.data % 64
    return memory[begin:begin + size].view(dtype).reshape(shape)
