"""The times that a solver goes through, from noise to data. Every number may be traced, the count of steps too."""

import dataclasses
from typing import Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxgen.diffusion.paths import Path
from jaxgen.errors import UserError


class Levels(NamedTuple):
    """The stations of a solver, the last of which (and all behind it) is the picture without noise."""

    t: Float[Array, "N"]
    alpha: Float[Array, "N"]
    sigma: Float[Array, "N"]


class Grid:
    """How steps are spread. A subclass is a frozen dataclass that gives `at`."""

    def at(self, path: Path, k: Float[Array, "N"], steps: Int[Array, ""] | int) -> Float[Array, "N"]:
        """The time of station k of 0 to steps - 1, falling."""
        raise NotImplementedError

    def levels(self, path: Path, steps: Int[Array, ""] | int, size: int) -> Levels:
        """`size` + 1 stations, of which `steps` are before the picture without noise."""
        k = jnp.arange(size + 1)
        noisy = k < steps
        t = self.at(path, jnp.minimum(k, steps - 1).astype(jnp.result_type(float)), steps)
        return Levels(
            jnp.where(noisy, t, 0.0), jnp.where(noisy, path.alpha(t), 1.0), jnp.where(noisy, path.sigma(t), 0.0)
        )


def _share(k, steps):
    """0 at the first station, 1 at the last noisy one."""
    return k / jnp.maximum(steps - 1, 1)


@dataclasses.dataclass(frozen=True)
class UniformGrid(Grid):
    """Equal steps of time from `high`. Spacings as Lin et al. 2024, table 2, name them: "trailing" begins at `high` and
    ends a step before 0; "linspace" ends at `low`; "leading", of `count` training steps, begins before `high` and ends
    at training step `offset`."""

    high: float = 1.0
    spacing: Literal["trailing", "linspace", "leading"] = "trailing"
    low: float = 0.001
    """The last noisy time of "linspace"."""
    count: int = 1000
    offset: int = 0

    def __post_init__(self):
        if not 0 < self.high <= 1 or not 0 < self.low < self.high:
            raise UserError(f"Times go from high to low within 0 and 1; here from {self.high:g} to {self.low:g}.")
        if self.count < 1 or self.offset < 0:
            raise UserError(f"A grid is of at least one training step, not {self.count}, and of no negative offset.")

    def at(self, path, k, steps):
        if self.spacing == "leading" and isinstance(steps, int) and steps > self.count:
            raise UserError(f"A grid of {self.count} training steps has no {steps} steps.")
        if self.spacing == "trailing":
            return self.high * (1 - k / steps)
        if self.spacing == "linspace":
            return self.high + _share(k, steps) * (self.low - self.high)
        found = ((steps - 1 - k) * (self.count // steps) + self.offset + 1) / self.count
        return jnp.where(steps == 1, self.high, found)  # a single step begins with noise, as every other grid's


@dataclasses.dataclass(frozen=True)
class OnLevels(Grid):
    """A grid over noise levels sigma / alpha, from `high` to `low`; 0 stands for the path's own at t = 1 and 0.001."""

    high: float = 0.0
    low: float = 0.0

    def __post_init__(self):
        if min(self.high, self.low) < 0 or self.high and self.low >= self.high:
            raise UserError(f"Noise levels go from high to low; here from {self.high:g} to {self.low:g}.")

    def _ends(self, path: Path):
        high, low = (path.level(jnp.asarray(t, jnp.result_type(float))) for t in (1.0, 0.001))
        # a path that ends in noise alone has no highest level: begin where 1 / 500 of the data is left
        return self.high or jnp.minimum(high, 500.0), self.low or low


@dataclasses.dataclass(frozen=True)
class Karras(OnLevels):
    """Equal steps of level^(1 / rho) (Karras et al. 2022, eq. 5)."""

    rho: float = 7.0

    def __post_init__(self):
        super().__post_init__()
        if not self.rho > 0:
            raise UserError(f"The rho of a grid is above 0, not {self.rho}.")

    def at(self, path, k, steps):
        high, low = (end ** (1 / self.rho) for end in self._ends(path))
        return path.time((high + _share(k, steps) * (low - high)) ** self.rho)


@dataclasses.dataclass(frozen=True)
class Exponential(OnLevels):
    """Equal steps of the logarithm of the noise level, which is half that of the signal-to-noise ratio."""

    def at(self, path, k, steps):
        high, low = map(jnp.log, self._ends(path))
        return path.time(jnp.exp(high + _share(k, steps) * (low - high)))


@dataclasses.dataclass(frozen=True)
class Shifted(Grid):
    """Equal steps, shifted to more noise: shift t / (1 + (shift - 1) t) (Esser et al. 2024, eq. 23)."""

    shift: float = 3.0

    def __post_init__(self):
        if not self.shift > 0:
            raise UserError(f"The shift of a grid is above 0, not {self.shift}.")

    def at(self, path, k, steps):
        t = 1 - k / steps
        return self.shift * t / (1 + (self.shift - 1) * t)


@dataclasses.dataclass(frozen=True)
class LevelTable(Grid):
    """Noise levels from a table, for other numbers of steps interpolated in their logarithm."""

    levels_of: tuple[float, ...]
    """Falling, all above 0."""

    def __post_init__(self):
        pairs = zip(self.levels_of, self.levels_of[1:], strict=False)
        if len(self.levels_of) < 2 or self.levels_of[-1] <= 0 or any(a <= b for a, b in pairs):
            raise UserError("A table of noise levels holds two or more that fall and are above 0.")

    @classmethod
    def stable_diffusion(cls) -> "LevelTable":
        """Of Stable Diffusion 1.5, optimised for 10 steps (Sabour et al. 2024, "Align Your Steps")."""
        return cls((14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029))

    @classmethod
    def stable_diffusion_xl(cls) -> "LevelTable":
        """Of Stable Diffusion XL, optimised for 10 steps (Sabour et al. 2024, "Align Your Steps")."""
        return cls((14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029))

    def at(self, path, k, steps):
        logs = jnp.log(jnp.asarray(self.levels_of, k.dtype))
        place = k / steps * (len(self.levels_of) - 1)  # the table's last level is where the steps end
        return path.time(jnp.exp(jnp.interp(place, jnp.arange(len(self.levels_of), dtype=k.dtype), logs)))
