"""Points in the plane, of shapes on which a diffusion can be seen to work."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from jaxtyping import Float32

from jaxgen.data import cache as caching
from jaxgen.data.base import Data, Prepared, Progress
from jaxgen.errors import UserError

if TYPE_CHECKING:
    import grain
    import jax

VERSION = 1  # counts up when the same seed would give other points
SHAPES = ("spiral", "moons", "checkerboard", "rings")


@dataclasses.dataclass(frozen=True)
class Points(Data):
    """Endless points of a shape, within about -1 and 1. A batch has `points`, float32 (B, 2).

    Attributes:
      shape: which.
      noise: standard deviation of what is added to each point.
      heldout: how many points are held out.
    """

    shape: Literal["spiral", "moons", "checkerboard", "rings"] = "spiral"
    noise: float = 0.02
    heldout: int = 2000

    def __post_init__(self):
        if self.shape not in SHAPES:
            raise UserError(f"data.shape is '{self.shape}'; it is one of {', '.join(SHAPES)}")
        if self.noise < 0 or self.heldout < 0:
            raise UserError("data.noise and data.heldout are 0 or more")

    def spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        import jax

        return {"points": jax.ShapeDtypeStruct((batch_size, 2), np.float32)}

    def prepare(self, cache: str | Path | None = None, progress: Progress | None = None) -> PreparedPoints:
        return PreparedPoints(self)


class PreparedPoints(Prepared):
    """See `Prepared`."""

    def __init__(self, data: Points):
        self.data = data
        self.fingerprint = caching.key(VERSION, dataclasses.asdict(data))
        self.facts = {"source": f"points of a {data.shape}", "heldout_examples": data.heldout}

    def train(self, seed: int) -> grain.MapDataset:
        import grain

        return grain.MapDataset.range(2**62).map(_Drawn(self.data, (0, seed % 2**64)))

    def heldout(self) -> grain.MapDataset:
        import grain

        return grain.MapDataset.range(self.data.heldout).map(_Drawn(self.data, (1, 0), measured=True))


@dataclasses.dataclass(frozen=True)
class _Drawn:
    data: Points
    stream: tuple[int, int]
    measured: bool = False

    def __call__(self, index: int) -> dict[str, np.ndarray]:
        point = draw(self.data, np.random.default_rng([*self.stream, index]))
        return {"points": point} | ({"weights": np.float32(1)} if self.measured else {})


def draw(data: Points, rng: np.random.Generator) -> Float32[np.ndarray, " D"]:
    """One point."""
    u, side = rng.random(), int(rng.integers(2))
    if data.shape == "spiral":
        angle = 3 * np.pi * np.sqrt(u)
        point = np.sqrt(u) * np.array([np.cos(angle + np.pi * side), np.sin(angle + np.pi * side)])
    elif data.shape == "moons":
        point = (0.6 - 1.2 * side) * np.array([np.cos(np.pi * u) - 0.5, np.sin(np.pi * u) - 0.25])
    elif data.shape == "rings":
        point = (0.45 + 0.45 * side) * np.array([np.cos(2 * np.pi * u), np.sin(2 * np.pi * u)])
    else:
        column, row = int(rng.integers(4)), 2 * int(rng.integers(2))
        point = (np.array([column, row + column % 2]) + rng.random(2)) / 2 - 1
    return (point + data.noise * rng.standard_normal(2)).astype(np.float32)
