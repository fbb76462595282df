"""The feed-forward layer of a transformer, plain or gated."""

from typing import Literal

import flax.linen as nn
import jax
from jaxtyping import Array, Float

from jaxgen import sharding
from jaxgen.nn.dtypes import DType
from jaxgen.nn.linear import Linear

Activation = Literal["gelu", "gelu_exact", "quick_gelu", "relu", "silu", "geglu", "geglu_exact", "swiglu"]

_FUNCTIONS = {
    "gelu": jax.nn.gelu,
    "gelu_exact": lambda x: jax.nn.gelu(x, approximate=False),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),  # CLIP's
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "geglu": jax.nn.gelu,
    "geglu_exact": lambda x: jax.nn.gelu(x, approximate=False),
    "swiglu": jax.nn.silu,
}


def is_gated(activation: Activation) -> bool:
    return activation in ("geglu", "geglu_exact", "swiglu")


class FeedForward(nn.Module):
    """act(x W1) W2, or gated: (act(x Wg) * x W1) W2 (Shazeer 2020, eq. 6)."""

    width: int
    activation: Activation = "gelu"
    bias: bool = True
    init_std: float = 0.02
    out_std: float = 0.02
    dtype: DType = "auto"

    @nn.compact
    def __call__(self, x: Float[Array, "B L E"]) -> Float[Array, "B L E"]:
        def up(name: str):
            return Linear((self.width,), (("embed",), ("mlp",)), self.bias, self.init_std, self.dtype, name=name)(x)

        # Backward computes the activation again, which is cheaper than to keep its parts.
        act = jax.checkpoint(_FUNCTIONS[self.activation])
        h = act(up("gate")) * up("up") if is_gated(self.activation) else act(up("up"))
        h = sharding.constrain(h, "batch", "length", "mlp")
        return Linear(
            (x.shape[-1],), (("mlp",), ("embed",)), self.bias, self.out_std, self.dtype, name="down"
        )(h)
