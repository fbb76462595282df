"""Matrix products and tables of vectors, with logical axis names on their parameters."""

import functools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxgen import sharding
from jaxgen.nn.dtypes import DType, platform, resolve

Names = tuple[str | None, ...]


class Linear(nn.Module):
    """y = x W + b over the trailing axes of x: (..., *inputs) to (..., *features)."""

    features: tuple[int, ...]
    axes: tuple[Names, Names]
    """Logical names of the input and of the output axes."""
    bias: bool = True
    init_std: float = 0.02
    dtype: DType = "auto"

    @nn.compact
    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        dtype = resolve(self.dtype)
        ins, outs = self.axes
        lead, inputs = x.shape[: x.ndim - len(ins)], x.shape[x.ndim - len(ins) :]
        kernel = self.param(
            "kernel",
            nn.with_logical_partitioning(nn.initializers.normal(self.init_std), ins + outs),
            inputs + self.features,
        )
        flat = kernel.astype(dtype).reshape(math.prod(inputs), -1)
        y = matmul(x.astype(dtype).reshape(*lead, -1), flat).reshape(*lead, *self.features)
        if self.bias:
            bias = self.param("bias", nn.with_logical_partitioning(nn.initializers.zeros, outs), self.features)
            y = y + rows(bias.astype(dtype), y.shape)
        return y


def matmul(x: Float[Array, "*lead K"], w: Float[Array, "K N"]) -> Float[Array, "*lead N"]:
    """x @ w as one flat matrix product (1.3 times as fast on CPU), unless the sequence is split over devices, where
    flattening batch and length together would have to gather it."""
    if x.ndim <= 2 or sharding.is_split("length"):
        return x @ w
    product = _narrowing if platform() == "cpu" and x.shape[-1] > w.shape[-1] else jnp.matmul
    return product(x.reshape(-1, x.shape[-1]), w).reshape(*x.shape[:-1], w.shape[-1])


@jax.custom_jvp
def _narrowing(x: Float[Array, "M K"], w: Float[Array, "K N"]) -> Float[Array, "M N"]:
    """x @ w whose gradient for a high w is computed lying down: up to twice as fast on CPU."""
    return x @ w


@_narrowing.defjvp
def _(primals, tangents):
    (x, w), (dx, dw) = primals, tangents
    return x @ w, dx @ w + x @ jax.lax.optimization_barrier(dw.T).T  # without it XLA turns the product upright again


def rows(v: Float[Array, "*n"], shape: tuple[int, ...]) -> Float[Array, "..."]:
    """v broadcast to `shape`. Its gradient, a sum over the leading axes, is a product with ones on CPU: XLA's own sum
    is several times slower inside of loops."""
    if platform() != "cpu" or sharding.is_split("length"):
        return jnp.broadcast_to(v, shape)
    return _rows(v, shape)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _rows(v, shape):
    return jnp.broadcast_to(v, shape)


@_rows.defjvp
def _(shape, primals, tangents):
    (v,), (dv,) = primals, tangents
    ones = jax.lax.optimization_barrier(jnp.ones((math.prod(shape[: len(shape) - v.ndim]), 1), v.dtype))
    return jnp.broadcast_to(v, shape), (ones @ dv.reshape(1, -1)).reshape(shape)


class Embedding(nn.Module):
    """A table of `rows` vectors of `width`."""

    rows: int
    width: int
    axes: Names = ("vocab", "embed")
    init: Callable = nn.initializers.normal(0.02)
    dtype: DType = "auto"

    def setup(self):
        self.embedding = self.param(
            "embedding", nn.with_logical_partitioning(self.init, self.axes), (self.rows, self.width)
        )

    def __call__(self, index: Int[Array, "*n"]) -> Float[Array, "*n D"]:
        """The rows of the table at `index`."""
        return jnp.take(self.embedding, index, axis=0).astype(resolve(self.dtype))

    def attend(self, x: Float[Array, "*n D"]) -> Float[Array, "*n V"]:
        """Inner products of x with every row: the logits of a tied head."""
        dtype = resolve(self.dtype)
        return matmul(x.astype(dtype), self.embedding.astype(dtype).T)


class Norm(nn.Module):
    """LayerNorm (Ba et al. 2016) or RMSNorm (Zhang & Sennrich 2019, eq. 4) over the last axis, computed in float32."""

    kind: str = "layernorm"
    bias: bool = True
    epsilon: float = 1e-5
    dtype: DType = "auto"

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        width = (x.shape[-1],)
        scale = self.param("scale", nn.with_logical_partitioning(nn.initializers.ones, ("norm",)), width)
        bias = None
        if self.bias and self.kind == "layernorm":
            bias = self.param("bias", nn.with_logical_partitioning(nn.initializers.zeros, ("norm",)), width)

        @jax.checkpoint  # backward computes it again, which is cheaper than to keep its parts
        def normalise(x, scale, bias):
            h = x.astype(jnp.float32)
            if self.kind == "layernorm":
                h = h - h.mean(-1, keepdims=True)
            h = h * jax.lax.rsqrt(jnp.square(h).mean(-1, keepdims=True) + self.epsilon) * rows(scale, x.shape)
            return (h if bias is None else h + rows(bias, x.shape)).astype(resolve(self.dtype))

        return normalise(x, scale, bias)
