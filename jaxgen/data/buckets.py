"""Aspect buckets: the few shapes that pictures of any proportions are brought to (Podell et al. 2023, section 2.3).

A batch is of one shape, so that a step is compiled once for each. (No JAX in here: reading processes import it.)
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from jaxgen.errors import UserError

Shape = tuple[int, int]  # height and width


def shapes(size: int, aspect: float, multiple: int) -> tuple[Shape, ...]:
    """All (H, W) of at most `size`^2 pixels in which neither side could be longer, lowest first.

    Args:
      aspect: the most that one side may be of the other.
      multiple: sides are multiples of it, as `size` is.
    """
    places, found = (size // multiple) ** 2, set()
    for long in range(size // multiple, places + 1):
        short = places // long
        if long > aspect * short:
            break
        if places // short == long:
            found |= {(short * multiple, long * multiple), (long * multiple, short * multiple)}
    return tuple(sorted(found))


def nearest(table: Sequence[Shape], height: Any, width: Any) -> Int[np.ndarray, ...]:
    """The place in the table of the shape whose proportions are nearest, in the logarithm, to each of some pictures'.

    Args:
      height: of the pictures, a number or an array; `width` likewise.
    """
    height, width = np.asarray(height, np.float64), np.asarray(width, np.float64)
    found, least = np.zeros(height.shape, np.int16), np.full(height.shape, np.inf)
    for k, (high, wide) in enumerate(table):
        a, b = height * wide, width * high
        times = np.maximum(a, b) / np.minimum(a, b)  # no logarithm, which machines round each in its own way
        found, least = np.where(times < least, np.int16(k), found), np.minimum(times, least)
    return found


@dataclasses.dataclass(frozen=True)
class Buckets:
    """Which shape of a table each picture is brought to. Pickles as a path.

    Attributes:
      table: of `shapes`.
      sizes: file with the pictures' heights and widths, (N, 2).
      batch: pictures of a batch: a shape that is nearest to fewer is not used.
    """

    table: tuple[Shape, ...]
    sizes: Path
    batch: int = 1

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    @functools.cached_property
    def nearest(self) -> Int[np.ndarray, " N"]:
        """The place in the table of the shape nearest to each picture."""
        return nearest(self.table, *np.load(self.sizes).T)

    @functools.cached_property
    def kinds(self) -> Int[np.ndarray, " N"]:
        """The same of the shapes that are used.

        Raises:
          UserError: no shape has the pictures of a batch.
        """
        counts = np.bincount(self.nearest, minlength=len(self.table))
        used = np.flatnonzero(counts >= self.batch)
        if not len(used):
            raise UserError(
                f"none of the {len(self.table)} shapes that data.aspect makes has the {self.batch} pictures of a "
                f"batch, {_words(self.table[counts.argmax()])} the most with {counts.max()}; a smaller batch_size or "
                "data.aspect, or a larger data.aspect_step, would do"
            )
        return used[nearest([self.table[k] for k in used], *np.load(self.sizes).T)].astype(np.int16)

    def told(self) -> str:
        """How many pictures each shape has, and which of them are nearer to one that is not used."""
        parts = []
        for k in np.unique(self.kinds):
            kinds, counts = np.unique(self.nearest[self.kinds == k], return_counts=True)
            others = [f"{n} of {_words(self.table[o])}" for o, n in zip(kinds, counts, strict=True) if o != k]
            more = f" (with {' and '.join(others)}, fewer than a batch)" if others else ""
            parts.append(f"{_words(self.table[k])} {counts.sum()}{more}")
        return "; ".join(parts)


def _words(shape: Shape) -> str:
    return f"{shape[0]}x{shape[1]}"


@dataclasses.dataclass(frozen=True, eq=False)
class Batches:
    """Examples of which n * size .. n * size + size - 1 are of one shape, without end.

    In each epoch the pictures of each shape are shuffled and cut into batches, and these shuffled. What is left over of
    a shape, less than a batch, is another part in each epoch. All is a function of (seed, epoch).

    Attributes:
      examples: has `len`, `kinds(size)`, the shape's number of each in batches of that size, and
        `train(epoch * len + place, kind, among)`, `among` being the places of that shape.
      size: examples of a batch.
    """

    examples: Any
    seed: int
    size: int = 1

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    @functools.cached_property
    def _members(self) -> list[tuple[int, Int[np.ndarray, " M"]]]:
        """Each shape's number and places, of those that have a batch."""
        kinds = self.examples.kinds(self.size)
        found = [(int(k), np.flatnonzero(kinds == k)) for k in np.unique(kinds)]
        found = [(k, places) for k, places in found if len(places) >= self.size]
        if not found:
            raise UserError(f"no shape has the {self.size} pictures of a batch that can be read")
        return found

    @functools.cached_property
    def _count(self) -> int:
        """Batches of an epoch."""
        return sum(len(places) // self.size for _, places in self._members)

    @functools.cached_property
    def _orders(self) -> Any:
        return functools.lru_cache(maxsize=2)(self._order)

    def _order(self, epoch: int) -> tuple[Int[np.ndarray, "batches size"], Int[np.ndarray, " batches"]]:
        """(places of each batch, and which of `_members` they are of)."""
        rng = np.random.default_rng([self.seed, epoch])
        cut = [
            rng.permutation(places)[: len(places) // self.size * self.size].reshape(-1, self.size)
            for _, places in self._members
        ]
        order = rng.permutation(self._count)
        return np.concatenate(cut)[order], np.repeat(np.arange(len(cut)), [len(part) for part in cut])[order]

    def __len__(self) -> int:
        return (1 << 62) // self.size

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        step, row = divmod(int(index), self.size)
        epoch, batch = divmod(step, self._count)
        places, of = self._orders(epoch)
        kind, among = self._members[of[batch]]
        return self.examples.train(epoch * len(self.examples) + int(places[batch, row]), kind, among)
