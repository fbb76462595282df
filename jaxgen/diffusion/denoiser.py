"""The one thing that solvers and guidance see of a network: a function from a noisy picture to the picture."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxgen.diffusion.paths import Path, along
from jaxgen.diffusion.predictions import Prediction

Picture = Float[Array, "B ..."]
Denoise = Callable[[Picture, Float[Array, "B"], Any], Picture]
"""(x_t, t, condition) -> the expectation of x0. The condition is a tree of arrays, examples first."""
Network = Callable[[Picture, Float[Array, "B"], Any], Picture]
"""(c_in x_t, label of the time, condition) -> the network's output."""


@dataclasses.dataclass(frozen=True)
class Denoiser:
    """A network as a denoiser.

    One that has learned its variance gives twice the channels along the last axis; the second half v, between -1 and
    1, says how far the log of a step's variance lies from its least to its largest (Nichol & Dhariwal 2021, eq. 15).
    """

    network: Network
    path: Path
    prediction: Prediction

    def __call__(self, x: Picture, t: Float[Array, "B"], condition: Any = None) -> Picture:
        return self.both(x, t, condition)[0]

    def both(self, x: Picture, t: Float[Array, "B"], condition: Any = None) -> tuple[Picture, Picture | None]:
        """(x0, v); v is None for a network without a learned variance."""
        output, v = self.raw(x, t, condition)
        return self.prediction.denoised(output, x, self.path.alpha(t), self.path.sigma(t)), v

    def raw(self, x: Picture, t: Float[Array, "B"], condition: Any = None) -> tuple[Picture, Picture | None]:
        """(the network's output, v)."""
        scale = self.prediction.coefficients(self.path.alpha(t), self.path.sigma(t))[0]
        output = self.network(along(scale, x) * x, self.prediction.label(self.path, t), condition)
        if output.shape[-1] == 2 * x.shape[-1]:
            return tuple(jnp.split(output, 2, axis=-1))
        return output, None


@dataclasses.dataclass(frozen=True)
class Model:
    """A network with the path and the prediction that it is trained in."""

    network: Any
    """A Linen module: (c_in x_t, label of the time, condition) -> output."""
    path: Path
    prediction: Prediction

    def denoiser(self, params: Any, key: Array | None = None) -> Denoiser:
        """With parameters; a `key` turns dropout on."""

        def network(x, label, condition):
            return self.network.apply({"params": params}, x, label, condition, key)

        return Denoiser(network, self.path, self.prediction)


def noise_of(x0: Picture, x: Picture, alpha: Float[Array, "*B"], sigma: Float[Array, "*B"]) -> Picture:
    """The unit noise that x holds besides alpha x0; alpha and sigma are each example's, or one for all."""
    return (x - along(alpha, x) * x0) / along(sigma, x)
