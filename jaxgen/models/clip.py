"""CLIP and SigLIP: a picture's tower and a text's tower into one space."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxgen.errors import UserError
from jaxgen.models.text import TextTower
from jaxgen.nn.patches import Patches


class Temperature(nn.Module):
    """What turns inner products into logits: `scale`, the log of the inverse temperature, and SigLIP's `bias`."""

    bias: bool = False
    max_scale: float = 100.0

    @nn.compact
    def __call__(self) -> tuple[Float[Array, ""], Float[Array, ""] | None]:
        start = math.log(10) if self.bias else math.log(1 / 0.07)
        scale = self.param("scale", nn.initializers.constant(start), ())
        if not self.bias:
            return jnp.exp(_at_most(scale, math.log(self.max_scale)) if self.max_scale else scale), None
        return jnp.exp(scale), self.param("bias", nn.initializers.constant(-10.0), ())


@jax.custom_vjp
def _at_most(x, bound):
    """min(x, bound), whose gradient is x's unless a step against it would lead further out: a plain minimum has no
    gradient beyond the bound, and what once was there would stay."""
    return jnp.minimum(x, bound)


_at_most.defvjp(
    lambda x, bound: (jnp.minimum(x, bound), x >= bound), lambda at, g: (jnp.where(at & (g < 0), 0.0, g), None)
)


class CLIP(nn.Module):
    """Two towers and a temperature (Radford et al. 2021); with `bias` SigLIP's (Zhai et al. 2023).

    `image` is a model with `__call__(image, key=None, train=False) -> (B, D)`: `ViT` or `ResNet`.
    """

    image: nn.Module
    text: TextTower
    bias: bool = False
    """SigLIP's bias of the logits, and its other starting temperature."""
    max_scale: float = 100.0
    """The inverse temperature stays below this, where there is no bias (Radford et al. 2021, 2.5); 0 for no bound."""

    def check(self) -> None:
        """Raises UserError for towers that do not fit together."""
        self.image.check()
        self.text.check()
        if self.image.embed_dim != self.text.embed_dim:
            raise UserError(
                f"The picture's tower gives {self.image.embed_dim} numbers and the text's {self.text.embed_dim}; "
                "`out` of both should be the same."
            )

    def setup(self):
        self.check()
        self.temperature = Temperature(self.bias, self.max_scale)

    def __call__(
        self,
        image: Float[Array, "B H W C"] | Patches,
        tokens: Int[Array, "b L"],
        lengths: Int[Array, "b"],
        key: Array | None = None,
        train: bool = False,
    ) -> tuple[Float[Array, "B D"], Float[Array, "b D"], Float[Array, ""], Float[Array, ""] | None]:
        """(unit vectors of pictures, unit vectors of texts, inverse temperature, bias or None)."""
        return self.embed_image(image, key, train), self.embed_text(tokens, lengths), *self.temperature()

    def embed_image(
        self, image: Float[Array, "B H W C"] | Patches, key: Array | None = None, train: bool = False
    ) -> Float[Array, "B D"]:
        """Unit vectors, in float32. `key` (B,) and `train` are as the picture's tower takes them."""
        return _unit(self.image(image, key=key, train=train))

    def embed_text(self, tokens: Int[Array, "B L"], lengths: Int[Array, "B"]) -> Float[Array, "B D"]:
        """Unit vectors, in float32."""
        return _unit(self.text(tokens, lengths))

    def scale(self) -> tuple[Float[Array, ""], Float[Array, ""] | None]:
        """(inverse temperature, bias or None): a logit is scale * image . text + bias."""
        return self.temperature()

    def flops_per_example(self, image: tuple[int, ...], text: tuple[int, ...], train: bool = False) -> float:
        """Operations of the forward pass of both towers for a picture and a caption of these shapes."""
        return self.image.flops_per_example(image, train) + self.text.flops_per_example(text, train)


def _unit(x: Float[Array, "B D"]) -> Float[Array, "B D"]:
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-12))
