"""A network of fully connected layers for diffusion in few dimensions."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxgen.errors import UserError
from jaxgen.models.conditions import Conditions, Telling
from jaxgen.nn.dtypes import DType
from jaxgen.nn.linear import Linear


class MLP(nn.Module):
    """Residual layers x + W2 silu(W1 x + time) over a point. Conditions taken: `classes`."""

    out: int = 2
    """Numbers of a point."""
    width: int = 128
    depth: int = 3
    classes: int = 0
    dtype: DType = "auto"

    def check(self, shape: tuple[int, ...]) -> None:
        """Raises UserError for what is no point of `out` numbers."""
        if shape != (self.out,):
            raise UserError(f"The network takes points of {self.out} numbers, and the data has {shape}.")

    def example(self) -> Float[Array, "1 D"]:
        """A point to initialise with."""
        return jnp.zeros((1, self.out))

    @property
    def telling(self) -> Telling:
        return Telling(self.width, 64, self.classes, dtype=self.dtype, parent=None)

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B D"],
        label: Float[Array, "B"],
        conditions: Conditions = Conditions(),
        key: Array | None = None,
    ) -> Float[Array, "B D"]:
        def linear(name: str, x, size: int, std: float):
            return Linear((size,), (("embed",), ("mlp",)), True, std, self.dtype, name=name)(x)

        told = self.telling.copy(name="told")(label, conditions)
        waves = jnp.concatenate([x, *(f(k * jnp.pi * x) for k in (1, 2, 4) for f in (jnp.sin, jnp.cos))], -1)
        h = linear("in", waves, self.width, waves.shape[-1] ** -0.5)
        for i in range(self.depth):
            inner = linear(f"up_{i}", jax.nn.silu(h), 2 * self.width, self.width**-0.5)
            inner = jax.nn.silu(inner + linear(f"told_{i}", jax.nn.silu(told), 2 * self.width, self.width**-0.5))
            h = h + linear(f"down_{i}", inner, self.width, 0.5 * (2 * self.width) ** -0.5)
        return linear("out", jax.nn.silu(h), self.out, 0.0).astype(jnp.float32)

    def flops_per_example(self, shape: tuple[int, ...], length: int = 0) -> float:
        """Operations of the forward pass for a point: matrix products alone, 2 per multiply-add."""
        width, size = self.width, shape[0]
        layers = self.depth * (2 * 2 * width * width + 2 * width * width)
        return 2.0 * (7 * size * width + layers + width * self.out) + self.telling.flops()
