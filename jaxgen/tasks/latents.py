"""Latents of a data set's pictures, computed once and kept in the cache."""

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array

from jaxgen.data import cache as caching
from jaxgen.data.base import Prepared, Progress
from jaxgen.data.batching import fold
from jaxgen.data.buckets import Buckets, Shape
from jaxgen.data.imagetext import shuffled
from jaxgen.data.loader import heldout_batches
from jaxgen.data.source import Source
from jaxgen.data.transforms import Flip
from jaxgen.errors import UserError
from jaxgen.sharding import RULES, Mesh, Sharding

VERSION = 1  # counts up when the same pictures would give other files
AT_ONCE = 64
"""Pictures that are encoded together."""


class Latents(Prepared):
    """Training examples of pictures with `latents` (h, w, 2 L) in the place of `image`: float16 means and logarithms of
    variances. Held-out examples, and all else, are the data's own."""

    def __init__(self, data: Prepared, directory: Path, chance: float):
        self._data, self._directory, self._chance = data, directory, chance
        self.tokenizer, self.facts, self.heldout_bytes = data.tokenizer, data.facts, data.heldout_bytes
        self.fingerprint = caching.key(data.fingerprint, directory.name)

    def train(self, seed: int):
        return shuffled(_Examples(self._data.readers("train", fold(seed)), self._directory, self._chance, seed), seed)

    def heldout(self):
        return self._data.heldout()


@dataclasses.dataclass(frozen=True)
class _Examples:
    reader: Any
    directory: Path
    chance: float
    seed: int

    @property
    def buckets(self) -> Buckets | None:
        return self.reader.buckets

    @functools.cached_property
    def _places(self) -> np.ndarray:
        """Of the pictures that could be read: in order, or by shape where there are several."""
        return np.load(self.directory / "places.npy")

    @functools.cached_property
    def _kinds(self) -> np.ndarray:
        return self.buckets.kinds[self._places]

    @functools.cached_property
    def _files(self) -> dict[int | None, tuple[int, np.ndarray]]:
        """By the number of the shape, the first of its examples and the latents of all."""
        if self.buckets is None:
            return {None: (0, self._read(None))}
        kinds, first = np.unique(self._kinds, return_index=True)
        table = self.buckets.table
        return {k: (i, self._read(table[k])) for k, i in zip(kinds.tolist(), first.tolist(), strict=True)}

    def _read(self, shape: Shape | None) -> np.ndarray:
        return np.load(self.directory / _file(shape), mmap_mode="r")

    def __len__(self) -> int:
        return len(self._places)

    def kinds(self, batch: int) -> np.ndarray:
        """The shapes that the latents were made for, in batches of any size."""
        return self._kinds

    def train(self, index: int, kind: int | None = None, among: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Example `index`, which counts on through the epochs; a function of it and the seed alone."""
        row, rng = index % len(self), np.random.default_rng([self.seed, index])
        view = int(rng.random() < self.chance)
        if kind is None and self.buckets is not None:
            kind = int(self._kinds[row])
        first, latents = self._files[kind]
        return {"latents": np.array(latents[view, row - first])} | self.reader.about(int(self._places[row]), rng)


@dataclasses.dataclass(frozen=True)
class _OfShape:
    """Pictures of some places, as a `Reader` gives them in a shape."""

    reader: Any
    places: np.ndarray
    shape: Shape | None

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return self.reader.plain(int(self.places[index]), self.shape)


def _file(shape: Shape | None) -> str:
    return "latents.npy" if shape is None else f"latents-{shape[0]}x{shape[1]}.npy"


def stored(
    data: Prepared, encode: Callable[[Any, Array], Array], variables: Any, progress: Progress | None = None
) -> Latents:
    """The data with the latents of its training pictures, from the cache or computed here.

    Pictures are taken as they are, in the shapes that the data trains on; where it flips them in training, both ways.

    Args:
      encode: (variables, uint8 pictures (B, H, W, C)) -> latents' moments (B, h, w, 2 L). Pure.
      variables: host arrays; by them, and the data's fingerprint, the cache knows the latents.

    Raises:
      UserError: for data without end or with other augmentation, whose latents are never the same.
    """
    if not hasattr(data, "readers"):
        raise UserError("task.cached keeps the latents of a data set's pictures, and this data is drawn without end.")
    reader = data.readers("train", 0)
    if any(not isinstance(step, Flip) for step in reader.augment) or len(reader.augment) > 1:
        raise UserError(
            "task.cached keeps the latents of pictures as they are: data.augment may hold Flip and nothing else, not "
            f"{', '.join(type(step).__name__ for step in reader.augment)}."
        )
    chance = reader.augment[0].chance if reader.augment else 0.0
    shapes = [] if reader.buckets is None else [hashlib.sha256(reader.buckets.kinds.tobytes()).hexdigest()]
    key = caching.key(VERSION, data.fingerprint, _digest(variables), chance > 0, *shapes)
    make = functools.partial(_write, reader, encode, variables, 1 + (chance > 0), progress)
    return Latents(data, caching.build(caching.root() / "latents" / key, make), chance)


def on_host(tree: Any) -> Any:
    """Arrays that are laid out over any mesh, whole in this process's memory. Every process calls it."""
    return multihost_utils.process_allgather(tree, tiled=True)


def _digest(variables: Any) -> str:
    found = hashlib.sha256()
    for path, leaf in jax.tree.leaves_with_path(variables):
        found.update(jax.tree_util.keystr(path).encode())
        found.update(np.ascontiguousarray(leaf).tobytes())
    return found.hexdigest()


def _write(
    reader: Any, encode: Callable, variables: Any, views: int, progress: Progress | None, directory: Path
) -> None:
    """All pictures that can be read, by this process's own devices: others may wait for the files, or write their
    own."""
    devices = jax.local_devices()
    sharding = Sharding(Mesh().build(devices), RULES)
    rows = sharding.named(("batch",))
    size = -(-AT_ONCE // len(devices)) * len(devices)

    @jax.jit
    def encoded(variables, image):
        with sharding.use():
            found = [encode(variables, x) for x in (image, image[:, :, ::-1])[:views]]
        return jnp.stack(found).astype(jnp.float16)

    variables = jax.device_put(variables, sharding.replicated)
    every, done = [], 0
    for shape, wanted in _by_shape(reader):
        latents, places, at = None, [], 0
        for batch in heldout_batches(Source(_OfShape(reader, wanted, shape)), rows, size):
            real = np.asarray(batch["weights"]) > 0
            found = np.asarray(encoded(variables, batch["image"]))
            if latents is None:
                sizes = (views, len(wanted), *found.shape[2:])
                latents = np.lib.format.open_memmap(directory / _file(shape), "w+", np.float16, sizes)
            latents[:, len(places) : len(places) + real.sum()] = found[:, real]
            places += list(itertools.compress(wanted[at : at + size], real))
            at += size
            if progress is not None:
                progress("latents", done + min(at, len(wanted)), len(reader))
        latents.flush()
        every += places
        done += len(wanted)
    np.save(directory / "places.npy", np.asarray(every, np.int64))


def _by_shape(reader: Any) -> list[tuple[Shape | None, np.ndarray]]:
    """The places of the pictures of each shape; None stands for the one that all have."""
    if reader.buckets is None:
        return [(None, np.arange(len(reader)))]
    kinds = reader.buckets.kinds
    return [(reader.buckets.table[k], np.flatnonzero(kinds == k)) for k in np.unique(kinds)]
