"""What a vector that is told does to the tokens of its example: it scales and shifts norms, and gates branches (adaLN;
Peebles & Xie 2023, section 3.2)."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxgen import sharding
from jaxgen.nn.dtypes import DType, platform, resolve
from jaxgen.nn.linear import Linear


class Modulation(Linear):
    """A layer of vectors for examples, whose result every device has whole for its own examples. (Left to itself XLA
    lays it out by the weights, and has been seen to mix examples up on a mesh of three axes, jax 0.10.2.)"""

    def __call__(self, told: Float[Array, "B E"]) -> Float[Array, "B ..."]:
        found = super().__call__(sharding.constrain(told, "batch", None))
        return sharding.constrain(found, "batch", *(None,) * (found.ndim - 1))


def modulation(parts: int, width: int, dtype: DType, name: str | None = None, **fields) -> Modulation:
    """The layer from silu(what is told) (B, E) to `parts` vectors (B, parts, width), all zeros at first."""
    return Modulation((parts, width), (("embed",), (None, "mlp")), init_std=0.0, dtype=dtype, name=name, **fields)


def modulated(
    x: Float[Array, "B L E"],
    shift: Float[Array, "B E"],
    scale: Float[Array, "B E"],
    kind: Literal["layernorm", "rmsnorm"] = "layernorm",
    epsilon: float = 1e-6,
    dtype: DType = "auto",
) -> Float[Array, "B L E"]:
    """norm(x) (1 + scale) + shift, with a norm without parameters of its own; computed in float32."""

    @jax.checkpoint  # backward computes it again, which is cheaper than to keep its parts
    def run(x, shift, scale):
        h, length = x.astype(jnp.float32), x.shape[1]
        shift, scale = shift.astype(jnp.float32), scale.astype(jnp.float32)
        if kind == "layernorm":
            h = h - h.mean(-1, keepdims=True)
        h = h * jax.lax.rsqrt(jnp.square(h).mean(-1, keepdims=True) + epsilon)
        return (h * spread(1 + scale, length) + spread(shift, length)).astype(resolve(dtype))

    return run(x, shift, scale)


def gated(x: Float[Array, "B L E"], gate: Float[Array, "B E"], branch: Float[Array, "B L E"]) -> Float[Array, "B L E"]:
    """x + gate branch."""
    return x + spread(gate, x.shape[1]).astype(branch.dtype) * branch


def spread(v: Float[Array, "B E"], length: int) -> Float[Array, "B L E"]:
    """v at every token. Its gradient, a sum over the tokens, is a product with ones on CPU: XLA's own sum is several
    times slower inside of loops."""
    if platform() != "cpu" or sharding.is_split("length"):
        return jnp.broadcast_to(v[:, None], (v.shape[0], length, v.shape[1]))
    return _spread(v, length)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _spread(v, length):
    return jnp.broadcast_to(v[:, None], (v.shape[0], length, v.shape[1]))


@_spread.defjvp
def _(length, primals, tangents):
    (v,), (dv,) = primals, tangents
    return _spread(v, length), jax.lax.optimization_barrier(jnp.ones((length, 1), v.dtype)) @ dv[:, None]
