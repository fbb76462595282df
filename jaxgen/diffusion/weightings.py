"""How much each time counts in training: which times are drawn, and what the error at a time weighs."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtri
from jaxtyping import Array, Float, Int

from jaxgen.diffusion.paths import Path
from jaxgen.errors import UserError

Number = Float[Array, "B"]


# ---- what an error weighs ----


class Weighting:
    """The weight of the squared error of x0 at a time. A subclass gives `of_x0`, or `of_output`."""

    def of_x0(self, alpha: Number, sigma: Number) -> Number:
        """What |x0 - its estimate|^2 is multiplied by."""
        raise NotImplementedError

    def of_output(self, out: Number, alpha: Number, sigma: Number) -> Number:
        """The same for the squared error of the network's output, of which x0 holds `out` times as much (c_out)."""
        return self.of_x0(alpha, sigma) * out**2


@dataclasses.dataclass(frozen=True)
class Uniform(Weighting):
    """1 for the network's own output, whatever it stands for: for epsilon Ho et al. 2020's "simple" loss (eq. 14)."""

    def of_output(self, out, alpha, sigma):
        return jnp.ones_like(alpha)


@dataclasses.dataclass(frozen=True)
class Snr(Weighting):
    """max(alpha^2 / sigma^2, least) for x0 (Salimans & Ho 2022, section 4): with 0 their SNR weighting, which is
    epsilon's simple loss, and with 1 their truncated SNR."""

    least: float = 0.0

    def of_x0(self, alpha, sigma):
        return jnp.maximum((alpha / sigma) ** 2, self.least)


@dataclasses.dataclass(frozen=True)
class VelocityWeight(Weighting):
    """((alpha + sigma) / max(sigma, least))^2 for x0: the squared error of the straight path's velocity, whatever the
    network predicts (Li & He 2025, section 3)."""

    least: float = 0.05

    def of_x0(self, alpha, sigma):
        return ((alpha + sigma) / jnp.maximum(sigma, self.least)) ** 2


@dataclasses.dataclass(frozen=True)
class MinSnr(Weighting):
    """min(alpha^2 / sigma^2, gamma) for x0 (Hang et al. 2023, eq. 8)."""

    gamma: float = 5.0

    def __post_init__(self):
        _positive(gamma=self.gamma)

    def of_x0(self, alpha, sigma):
        return jnp.minimum((alpha / sigma) ** 2, self.gamma)


@dataclasses.dataclass(frozen=True)
class P2(Weighting):
    """1 / (k + SNR)^gamma for epsilon (Choi et al. 2022, eq. 6)."""

    k: float = 1.0
    gamma: float = 1.0

    def of_x0(self, alpha, sigma):
        snr = (alpha / sigma) ** 2
        return snr / (self.k + snr) ** self.gamma


@dataclasses.dataclass(frozen=True)
class EdmWeight(Weighting):
    """1 / c_out^2 = SNR + 1 / sigma_data^2 for x0 (Karras et al. 2022, table 1)."""

    sigma_data: float = 0.5

    def __post_init__(self):
        _positive(sigma_data=self.sigma_data)

    def of_x0(self, alpha, sigma):
        return (alpha / sigma) ** 2 + self.sigma_data**-2


# ---- which times ----


class Times:
    """How the times of training are drawn: `at` turns numbers that are uniform between 0 and 1 into times."""

    def at(self, uniform: Number, path: Path) -> Number:
        """The quantiles: grows with `uniform`."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class UniformTimes(Times):
    """Uniform between `low` and `high`."""

    low: float = 1e-4
    high: float = 1.0

    def __post_init__(self):
        if not 0 < self.low < self.high <= 1:
            raise UserError(f"Times go from low to high within 0 and 1; here from {self.low:g} to {self.high:g}.")

    def at(self, uniform, path):
        return self.low + (self.high - self.low) * uniform


@dataclasses.dataclass(frozen=True)
class Steps(Times):
    """One of so many equally spaced times, the last of which is 1: those of a table of as many betas."""

    count: int = 1000

    def __post_init__(self):
        _positive(count=self.count)

    def at(self, uniform, path):
        return (jnp.clip(jnp.floor(uniform * self.count), 0, self.count - 1) + 1) / self.count


@dataclasses.dataclass(frozen=True)
class LogitNormal(Times):
    """log(t / (1 - t)) is normal (Esser et al. 2024, section 3.1): the middle of the path comes more often."""

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self):
        _positive(std=self.std)

    def at(self, uniform, path):
        return jax.nn.sigmoid(self.mean + self.std * _normal(uniform))


@dataclasses.dataclass(frozen=True)
class LogNormal(Times):
    """log(sigma / alpha) is normal (Karras et al. 2022, table 1)."""

    mean: float = -1.2
    std: float = 1.2

    def __post_init__(self):
        _positive(std=self.std)

    def at(self, uniform, path):
        return path.time(jnp.exp(self.mean + self.std * _normal(uniform)))


def _positive(**values: float) -> None:
    for name, value in values.items():
        if not 0 < value < float("inf"):
            raise UserError(f"The {name} of times and weightings is above 0, not {value}.")


def _normal(uniform: Number) -> Number:
    return ndtri(jnp.clip(uniform, 1e-6, 1 - 1e-6))


def uniforms(key: Array, index: Int[Array, "B"], size: int) -> Number:
    """One number between 0 and 1 for each example, spread evenly over a whole batch of `size`: u + index / size modulo
    1 with one u of the key (Kingma et al. 2021, appendix I.1). Each on its own is uniform."""
    return jnp.mod(jax.random.uniform(key) + index / size, 1.0)
