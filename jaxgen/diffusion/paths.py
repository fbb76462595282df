"""Paths from data to noise: x_t = alpha(t) x0 + sigma(t) eps for t from 0 (data) to 1 (noise)."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxgen.errors import UserError

Time = Float[Array, "*n"]
Picture = Float[Array, "B ..."]


class Path:
    """What x_t is made of. A subclass is a frozen dataclass that gives `alpha`, `sigma` and `time`.

    All three work on arrays of any shape, in their dtype. The noise level of a time is sigma / alpha, which grows with
    t; two paths at the same noise level differ by a factor alone.
    """

    def alpha(self, t: Time) -> Time:
        """What x0 is multiplied by."""
        raise NotImplementedError

    def sigma(self, t: Time) -> Time:
        """What the unit noise is multiplied by."""
        raise NotImplementedError

    def time(self, level: Time) -> Time:
        """The time at which sigma / alpha is `level`."""
        raise NotImplementedError

    def label(self, t: Time) -> Time:
        """What a network is told of the time."""
        return 1000 * t

    def level(self, t: Time) -> Time:
        """The noise level sigma / alpha; infinite where nothing is left of the data."""
        return self.sigma(t) / self.alpha(t)

    def add(self, x0: Picture, noise: Picture, t: Float[Array, "B"]) -> Picture:
        """x_t of each example's own time, with unit noise."""
        return along(self.alpha(t), x0) * x0 + along(self.sigma(t), x0) * noise


def along(values: Float[Array, "*B"], x: Picture) -> Picture:
    """A number for each example, or one for all, in the shape that multiplies x."""
    return jnp.reshape(values, (*values.shape, *(1,) * (x.ndim - values.ndim)))


@dataclasses.dataclass(frozen=True)
class Linear(Path):
    """Variance preserving with beta(t) linear in t (Song et al. 2021, "VP SDE", eq. 32-33)."""

    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self):
        if not 0 <= self.beta_min < self.beta_max:
            raise UserError(
                f"beta_min is at least 0 and below beta_max; here they are {self.beta_min:g} and {self.beta_max:g}."
            )

    def _lost(self, t):
        """-2 log alpha."""
        return t * (self.beta_min + 0.5 * t * (self.beta_max - self.beta_min))

    def alpha(self, t):
        return jnp.exp(-0.5 * self._lost(t))

    def sigma(self, t):
        return jnp.sqrt(-jnp.expm1(-self._lost(t)))

    def level(self, t):
        return jnp.sqrt(jnp.expm1(self._lost(t)))

    def time(self, level):
        lost, rise = jnp.log1p(level**2), self.beta_max - self.beta_min
        return 2 * lost / (self.beta_min + jnp.sqrt(self.beta_min**2 + 2 * rise * lost))


@dataclasses.dataclass(frozen=True)
class Cosine(Path):
    """Variance preserving with alpha = cos(pi t / 2), in which time is the angle between data and noise: the continuous
    form of Nichol & Dhariwal 2021 (eq. 17, without its offset); see also Salimans & Ho 2022."""

    def alpha(self, t):
        return jnp.sin(0.5 * jnp.pi * (1 - t))  # the cosine, and exactly 0 at t = 1

    def sigma(self, t):
        return jnp.sin(0.5 * jnp.pi * t)

    def time(self, level):
        return jnp.arctan(level) * (2 / jnp.pi)


@dataclasses.dataclass(frozen=True)
class VarianceExploding(Path):
    """alpha = 1 and sigma geometric in t (Song et al. 2021, "VE SDE"); times beyond [0, 1] go on with the same law.

    With `Edm` prediction, the setting of Karras et al. 2022.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0

    def __post_init__(self):
        if not 0 < self.sigma_min < self.sigma_max:
            raise UserError(
                f"sigma_min is above 0 and below sigma_max; here they are {self.sigma_min:g} and {self.sigma_max:g}."
            )

    def alpha(self, t):
        return jnp.ones_like(t)

    def sigma(self, t):
        return self.sigma_min * jnp.exp(t * np.log(self.sigma_max / self.sigma_min))

    def time(self, level):
        return jnp.log(level / self.sigma_min) / np.log(self.sigma_max / self.sigma_min)


@dataclasses.dataclass(frozen=True)
class Flow(Path):
    """The straight line alpha = 1 - s, sigma = s of rectified flow (Liu et al. 2023; Lipman et al. 2023), with
    s = shift t / (1 + (shift - 1) t).

    Larger pictures want a larger shift (`for_size`): sqrt(m / n) for m pixels where n want none (Esser et al. 2024,
    eq. 23).
    """

    shift: float = 1.0

    def __post_init__(self):
        if self.shift <= 0:
            raise UserError(f"The shift of a flow is above 0, not {self.shift:g}.")

    def for_size(self, pixels: int, base: int) -> "Flow":
        """The path for pictures of so many pixels (or patches) where `base` have this one."""
        return Flow(self.shift * float(np.sqrt(pixels / base)))

    def sigma(self, t):
        return self.shift * t / (1 + (self.shift - 1) * t)

    def alpha(self, t):
        return (1 - t) / (1 + (self.shift - 1) * t)

    def time(self, level):
        return level / (level + self.shift)

    def label(self, t):
        return 1000 * self.sigma(t)


@dataclasses.dataclass(frozen=True)
class Table(Path):
    """The path of a table of betas, as DDPM's networks were trained on (Ho et al. 2020).

    Step i of N is t = (i + 1) / N, and `label` gives i. Between two steps log(sigma / alpha) is linear in t, and below
    the first sigma / alpha is.
    """

    betas: tuple[float, ...]

    def __post_init__(self):
        if not self.betas or not all(0 < b <= 1 for b in self.betas) or 1 in self.betas[:-1]:
            raise UserError("The betas of a path are above 0 and below 1; the last one alone may be 1.")

    @classmethod
    def linear(cls, steps: int = 1000, first: float = 1e-4, last: float = 0.02) -> "Table":
        """DDPM's (Ho et al. 2020, section 4)."""
        return cls(tuple(np.linspace(first, last, steps).tolist()))

    @classmethod
    def scaled_linear(cls, steps: int = 1000, first: float = 0.00085, last: float = 0.012) -> "Table":
        """Linear in sqrt(beta): Stable Diffusion's (Rombach et al. 2022)."""
        return cls(tuple((np.linspace(first**0.5, last**0.5, steps) ** 2).tolist()))

    @classmethod
    def cosine(cls, steps: int = 1000, offset: float = 0.008, largest: float = 0.999) -> "Table":
        """Nichol & Dhariwal 2021, eq. 17."""
        kept = np.cos((np.arange(steps + 1) / steps + offset) / (1 + offset) * np.pi / 2) ** 2
        return cls(tuple(np.minimum(1 - kept[1:] / kept[:-1], largest).tolist()))

    def zero_terminal_snr(self) -> "Table":
        """The same, rescaled so that nothing is left of the data at t = 1 (Lin et al. 2024, algorithm 1)."""
        root = np.sqrt(np.cumprod(1 - np.asarray(self.betas)))
        root = (root - root[-1]) * root[0] / (root[0] - root[-1])
        kept = root**2
        return Table((float(1 - kept[0]), *(1 - kept[1:] / kept[:-1]).tolist()))

    @functools.cached_property
    def _logs(self) -> np.ndarray:
        """log(sigma / alpha) of each step, in float64; infinite in a last step with nothing left of the data."""
        kept = np.cumprod(1 - np.asarray(self.betas))
        with np.errstate(divide="ignore"):
            return 0.5 * (np.log1p(-kept) - np.log(kept))

    def _log_level(self, t):
        steps, logs = len(self.betas), self._logs
        place = jnp.clip(t * steps - 1, -1, steps - 1)
        near = jnp.round(place)
        place = jnp.where(jnp.abs(place - near) < 1e-3, near, place)  # t is a rounded (i + 1) / N
        low = jnp.clip(jnp.floor(place), 0, max(steps - 2, 0)).astype(int)
        share = jnp.clip(place - low, 0, 1)
        table = jnp.asarray(logs, t.dtype)
        below, above = table[low], table[jnp.minimum(low + 1, steps - 1)]
        # an infinite end has no line to it: the level before it holds until there
        between = jnp.where(share == 1, above, below + jnp.where(jnp.isinf(above), 0, share * (above - below)))
        return jnp.where(place < 0, table[0] + jnp.log(jnp.maximum(place + 1, 0)), between)

    def alpha(self, t):
        return jnp.sqrt(jax.nn.sigmoid(-2 * self._log_level(t)))

    def sigma(self, t):
        return jnp.sqrt(jax.nn.sigmoid(2 * self._log_level(t)))

    def level(self, t):
        return jnp.exp(self._log_level(t))

    def time(self, level):
        steps, logs = len(self.betas), self._logs
        known = np.isfinite(logs)
        log = jnp.log(level)
        place = jnp.interp(log, jnp.asarray(logs[known], log.dtype), jnp.arange(known.sum(), dtype=log.dtype))
        place = jnp.where(log < logs[0], level / np.exp(logs[0]) - 1, place)
        return (jnp.where(jnp.isinf(level), steps - 1.0, place) + 1) / steps

    def label(self, t):
        place = jnp.clip(t * len(self.betas) - 1, 0)
        near = jnp.round(place)
        return jnp.where(jnp.abs(place - near) < 1e-3, near, place)


@dataclasses.dataclass(frozen=True)
class Interpolant(Path):
    """Any alpha and sigma by functions of your own (Albergo et al. 2023), with sigma / alpha growing in t.

    `time` is found by bisection, unless its function is given.
    """

    alpha_of: Callable[[Time], Time]
    sigma_of: Callable[[Time], Time]
    time_of: Callable[[Time], Time] | None = None

    def alpha(self, t):
        return self.alpha_of(t)

    def sigma(self, t):
        return self.sigma_of(t)

    def time(self, level):
        if self.time_of is not None:
            return self.time_of(level)

        def halve(_, ends):
            low, high = ends
            middle = 0.5 * (low + high)
            below = self.sigma(middle) < level * self.alpha(middle)
            return jnp.where(below, middle, low), jnp.where(below, high, middle)

        return jax.lax.fori_loop(0, 60, halve, (jnp.zeros_like(level), jnp.ones_like(level)))[1]
