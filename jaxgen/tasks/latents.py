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
from jaxgen.data.batching import endless, fold
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
        examples = _Examples(self._data.readers("train", fold(seed)), self._directory, self._chance, seed)
        return endless(examples.train, len(examples), seed)

    def heldout(self):
        return self._data.heldout()


@dataclasses.dataclass(frozen=True)
class _Examples:
    reader: Any
    directory: Path
    chance: float
    seed: int

    @functools.cached_property
    def _places(self) -> np.ndarray:
        return np.load(self.directory / "places.npy")

    @functools.cached_property
    def _latents(self) -> np.ndarray:
        return np.load(self.directory / "latents.npy", mmap_mode="r")

    def __len__(self) -> int:
        return len(self._places)

    def train(self, index: int) -> dict[str, np.ndarray]:
        """Example `index`, which counts on through the epochs; a function of it and the seed alone."""
        row, rng = index % len(self), np.random.default_rng([self.seed, index])
        view = int(rng.random() < self.chance)
        return {"latents": np.array(self._latents[view, row])} | self.reader.about(int(self._places[row]), rng)


def stored(
    data: Prepared, encode: Callable[[Any, Array], Array], variables: Any, progress: Progress | None = None
) -> Latents:
    """The data with the latents of its training pictures, from the cache or computed here.

    Pictures are taken as they are; where the data flips them in training, both ways.

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
    key = caching.key(VERSION, data.fingerprint, _digest(variables), chance > 0)
    make = functools.partial(_write, Source(reader), encode, variables, 1 + (chance > 0), progress)
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
    pictures: Source, encode: Callable, variables: Any, views: int, progress: Progress | None, directory: Path
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
    latents, places, done = None, [], 0
    for batch in heldout_batches(pictures, rows, size):
        real = np.asarray(batch["weights"]) > 0
        found = np.asarray(encoded(variables, batch["image"]))
        if latents is None:
            shape = (views, len(pictures), *found.shape[2:])
            latents = np.lib.format.open_memmap(directory / "latents.npy", "w+", np.float16, shape)
        latents[:, len(places) : len(places) + real.sum()] = found[:, real]
        places += list(itertools.compress(range(done, done + size), real))
        done += size
        if progress is not None:
            progress("latents", min(done, len(pictures)), len(pictures))
    latents.flush()
    np.save(directory / "places.npy", np.asarray(places, np.int64))
