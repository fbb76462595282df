"""Mixtures of two pictures and of their labels."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from jaxgen.errors import UserError


@dataclasses.dataclass(frozen=True)
class Mixing:
    """Each example of a batch is mixed with a partner, the batch read backwards, by a random key of its own."""

    alpha: float = 1.0
    """The share that stays is drawn from Beta(alpha, alpha)."""

    def __post_init__(self):
        if not self.alpha > 0:
            raise UserError(f"the alpha of {type(self).__name__} is above 0, not {self.alpha}")

    def __call__(
        self, image: UInt8[Array, "B H W C"], target: Float[Array, "B K"], keys: Array
    ) -> tuple[UInt8[Array, "B H W C"], Float[Array, "B K"]]:
        """Mixed pictures, and probabilities of the classes; `keys` is (B,)."""
        image, stays = jax.vmap(self.mix)(image, image[::-1], keys)
        stays = stays[:, None]
        return image, stays * target + (1 - stays) * target[::-1]

    def mix(
        self, image: UInt8[Array, "H W C"], other: UInt8[Array, "H W C"], key: Array
    ) -> tuple[UInt8[Array, "H W C"], Float[Array, ""]]:
        """(a picture with its partner in it, the share of the first)."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Mixup(Mixing):
    """A weighted mean of both (Zhang et al. 2018, arXiv:1710.09412)."""

    alpha: float = 0.2

    def mix(self, image, other, key):
        stays = jax.random.beta(key, self.alpha, self.alpha)
        mixed = stays * image.astype(jnp.float32) + (1 - stays) * other.astype(jnp.float32)
        return jnp.round(mixed).astype(image.dtype), stays


@dataclasses.dataclass(frozen=True)
class CutMix(Mixing):
    """A rectangle of the one in the other, in the picture's proportions and at a random place, where what is outside is
    cut off and does not count (Yun et al. 2019, arXiv:1905.04899)."""

    def mix(self, image, other, key):
        size_key, place_key = jax.random.split(key)
        sides = jnp.asarray(image.shape[:2])
        half = sides * jnp.sqrt(1 - jax.random.beta(size_key, self.alpha, self.alpha)) / 2
        centre = sides * jax.random.uniform(place_key, (2,))
        low, high = jnp.round(centre - half), jnp.round(centre + half)
        row, column = (
            (jnp.arange(n) >= low[axis]) & (jnp.arange(n) < high[axis]) for axis, n in enumerate(image.shape[:2])
        )
        inside = row[:, None] & column
        return jnp.where(inside[..., None], other, image), 1 - inside.mean()
