"""What a diffusion network's output stands for.

Each kind is linear, x0 = c_skip x_t + c_out F(c_in x_t), with three numbers that alpha and sigma alone decide, so any
kind goes with any path, and one is turned into another through x0.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxgen.diffusion.paths import Path, Time, along
from jaxgen.errors import UserError

Picture = Float[Array, "B ..."]
Number = Float[Array, "B"]
HIGHEST = 1e6  # noise level that a network is told of where nothing is left of the data


class Prediction:
    """The meaning of F. A subclass gives `coefficients`."""

    needs_signal = False
    """Undefined where alpha = 0."""

    def coefficients(self, alpha: Number, sigma: Number) -> tuple[Number, Number, Number]:
        """(c_in, c_skip, c_out)."""
        raise NotImplementedError

    def label(self, path: Path, t: Time) -> Time:
        """What the network is told of the time: by default what the path says."""
        return path.label(t)

    def check(self, path: Path) -> None:
        """UserError where the prediction says nothing at the path's noise end."""
        if self.needs_signal and float(path.alpha(jnp.ones(()))) <= 0:
            raise UserError(
                f"{type(path).__name__} leaves nothing of the data at t = 1, where {type(self).__name__} determines no "
                "picture; take V(), X0(), Velocity() or Edm()."
            )

    def denoised(self, output: Picture, x: Picture, alpha: Number, sigma: Number) -> Picture:
        """The x0 that the network's output stands for."""
        _, skip, out = self.coefficients(alpha, sigma)
        return along(skip, x) * x + along(out, x) * output

    def output(self, x0: Picture, x: Picture, alpha: Number, sigma: Number) -> Picture:
        """The output that stands for this x0: what the network should give for noisy x, and the way from one kind of
        prediction to another. Not finite where sigma = 0 leaves no choice of x0."""
        _, skip, out = self.coefficients(alpha, sigma)
        return (x0 - along(skip, x) * x) / along(out, x)

    def target(self, x0: Picture, noise: Picture, alpha: Number, sigma: Number) -> Picture:
        """`output` of the true x0 for x = alpha x0 + sigma noise; finite wherever the kind is."""
        return self.output(x0, along(alpha, x0) * x0 + along(sigma, x0) * noise, alpha, sigma)


@dataclasses.dataclass(frozen=True)
class Epsilon(Prediction):
    """F is the noise (Ho et al. 2020)."""

    needs_signal = True

    def coefficients(self, alpha, sigma):
        return jnp.ones_like(alpha), 1 / alpha, -sigma / alpha

    def target(self, x0, noise, alpha, sigma):
        return noise


@dataclasses.dataclass(frozen=True)
class X0(Prediction):
    """F is the picture without noise."""

    def coefficients(self, alpha, sigma):
        return jnp.ones_like(alpha), jnp.zeros_like(alpha), jnp.ones_like(alpha)

    def target(self, x0, noise, alpha, sigma):
        return x0


@dataclasses.dataclass(frozen=True)
class V(Prediction):
    """F = alpha eps - sigma x0 (Salimans & Ho 2022, appendix D)."""

    def coefficients(self, alpha, sigma):
        square = alpha**2 + sigma**2
        return jnp.ones_like(alpha), alpha / square, -sigma / square

    def target(self, x0, noise, alpha, sigma):
        return along(alpha, x0) * noise - along(sigma, x0) * x0


@dataclasses.dataclass(frozen=True)
class Velocity(Prediction):
    """F = eps - x0, the velocity of the straight path (Liu et al. 2023), on any path."""

    def coefficients(self, alpha, sigma):
        return jnp.ones_like(alpha), 1 / (alpha + sigma), -sigma / (alpha + sigma)

    def target(self, x0, noise, alpha, sigma):
        return noise - x0


@dataclasses.dataclass(frozen=True)
class Score(Prediction):
    """F = -eps / sigma, the gradient of log p(x_t | x0), whose mean is that of log p(x_t) (Song et al. 2021)."""

    needs_signal = True

    def coefficients(self, alpha, sigma):
        return jnp.ones_like(alpha), 1 / alpha, sigma**2 / alpha

    def target(self, x0, noise, alpha, sigma):
        return -noise / along(sigma, x0)


@dataclasses.dataclass(frozen=True)
class Edm(Prediction):
    """Inputs and targets of unit variance (Karras et al. 2022, table 1); on another path than theirs, by x / alpha and
    sigma / alpha."""

    sigma_data: float = 0.5
    """Standard deviation of the data."""

    def __post_init__(self):
        if not self.sigma_data > 0:
            raise UserError(f"The sigma_data of Edm is above 0, not {self.sigma_data}.")

    def coefficients(self, alpha, sigma):
        data = self.sigma_data
        square = sigma**2 + (data * alpha) ** 2
        return 1 / jnp.sqrt(square), data**2 * alpha / square, sigma * data / jnp.sqrt(square)

    def target(self, x0, noise, alpha, sigma):
        # (x0 - c_skip x) / c_out without what cancels
        data, root = self.sigma_data, jnp.sqrt(sigma**2 + (self.sigma_data * alpha) ** 2)
        return along(sigma / (data * root), x0) * x0 - along(data * alpha / root, x0) * noise

    def label(self, path, t):
        return 0.25 * jnp.log(jnp.minimum(path.level(t), HIGHEST))
