"""Convolutions over pictures (B, H, W, C), and the norms that go with them."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxgen import sharding
from jaxgen.nn.dtypes import DType, resolve
from jaxgen.nn.linear import matmul, rows


class Conv(nn.Module):
    """A convolution, by default padded by half its size on each side."""

    features: int
    size: int = 3
    stride: int = 1
    standardize: bool = False
    """Weight standardisation: each filter has mean 0 and variance 1 (Qiao et al. 2019)."""
    bias: bool = False
    scale: float = 2.0
    """Of the filters' initial variance, times the fan-out (He et al. 2015); 0 for filters of zeros."""
    padding: tuple[int, int] | None = None
    """Zeros before and after, in both directions; None for half its size on each side."""
    axis: str | None = "embed"
    """Logical name of the input channels."""
    out_axis: str | None = "mlp"
    """Logical name of the output channels."""
    dtype: DType = "auto"

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w F"]:
        dtype = resolve(self.dtype)
        fan_out = nn.initializers.variance_scaling(self.scale, "fan_out", "normal")
        init = fan_out if self.scale else nn.initializers.zeros
        kernel = self.param(
            "kernel",
            nn.with_logical_partitioning(init, (None, None, self.axis, self.out_axis)),
            (self.size, self.size, x.shape[-1], self.features),
        )
        if self.standardize:
            kernel = kernel - kernel.mean((0, 1, 2))
            kernel = kernel * jax.lax.rsqrt(jnp.square(kernel).mean((0, 1, 2)) + 1e-8)
        # Split in memory, whole in use: XLA's partitioning of convolutions with channels split both ways gives wrong
        # gradients (jax 0.10.2), and channels are too few to be worth it.
        kernel = sharding.constrain(kernel.astype(dtype), None, None, None, None)
        x = sharding.constrain(x.astype(dtype), "batch", None, None, None)
        if self.size == 1:  # one flat matrix product
            x = matmul(x[:, :: self.stride, :: self.stride], kernel[0, 0])
        else:
            x = jax.lax.conv_general_dilated(
                x, kernel, (self.stride,) * 2, (self.padded,) * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
        if self.bias:
            zeros = nn.with_logical_partitioning(nn.initializers.zeros, (self.out_axis,))
            bias = self.param("bias", zeros, (self.features,))
            x = x + rows(bias.astype(dtype), x.shape)
        return x

    @property
    def padded(self) -> tuple[int, int]:
        """Zeros before and after."""
        return self.padding or ((self.size - 1) // 2,) * 2

    def flops(self, channels: int, height: int, width: int) -> float:
        """Operations of the forward pass for one picture of this shape, 2 per multiply-add, with none for padding."""

        def taps(length: int) -> int:
            before, after = self.padded
            starts = range(-before, length + after - self.size + 1, self.stride)
            return sum(min(at + self.size, length) - max(at, 0) for at in starts)

        return 2.0 * channels * self.features * taps(height) * taps(width)


def halved(length: int, stride: int) -> int:
    """Size after a padded convolution or pooling with this stride."""
    return math.ceil(length / stride)


def batch_norm(train: bool, momentum: float, epsilon: float, dtype: DType, name: str, start: float = 1.0) -> nn.Module:
    """Batch normalisation (Ioffe & Szegedy 2015) over the whole batch, on however many devices it lies. Running
    statistics are the collection "batch_stats"."""
    return nn.BatchNorm(
        use_running_average=not train, momentum=momentum, epsilon=epsilon, dtype=resolve(dtype), name=name,
        scale_init=nn.with_logical_partitioning(nn.initializers.constant(start), ("norm",)),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ("norm",)),
    )  # fmt: skip


class GroupNorm(nn.Module):
    """Group normalisation (Wu & He 2018) and what follows it: a scale and a shift that are told (Dhariwal & Nichol
    2021, eq. 8), and silu. Computed in float32."""

    groups: int
    epsilon: float = 1e-5
    silu: bool = False
    dtype: DType = "auto"

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B H W C"],
        scale: Float[Array, "B C"] | None = None,
        shift: Float[Array, "B C"] | None = None,
    ) -> Float[Array, "B H W C"]:
        width = (x.shape[-1],)
        gain = self.param("scale", nn.with_logical_partitioning(nn.initializers.ones, ("norm",)), width)
        bias = self.param("bias", nn.with_logical_partitioning(nn.initializers.zeros, ("norm",)), width)

        @jax.checkpoint  # backward computes it again, which is cheaper than to keep its parts
        def run(x, gain, bias, scale, shift):
            batch, height, wide, channels = x.shape
            h = x.astype(jnp.float32).reshape(batch, height * wide, channels)

            def mean(h):
                """Of each group, at each of its channels."""
                by_group = h.mean(1).reshape(batch, self.groups, -1).mean(-1, keepdims=True)
                return jnp.broadcast_to(by_group, (batch, self.groups, channels // self.groups)).reshape(batch, -1)

            h = h - mean(h)[:, None]
            gain = gain * jax.lax.rsqrt(mean(jnp.square(h)) + self.epsilon)
            bias = jnp.broadcast_to(bias, gain.shape)
            if scale is not None:
                gain, bias = gain * (1 + scale.astype(jnp.float32)), bias * (1 + scale.astype(jnp.float32))
            if shift is not None:
                bias = bias + shift.astype(jnp.float32)
            h = h * gain[:, None] + bias[:, None]
            h = silu(h) if self.silu else h
            return h.reshape(x.shape).astype(resolve(self.dtype))

        return run(x, gain, bias, scale, shift)


@jax.custom_jvp
def silu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """x sigmoid(x), ending in a division: XLA on CPU computes that once, where it computes a last product again in the
    loops that transpose it for the filters' gradient (a tenth of a U-Net's step)."""
    return x / (1 + jnp.exp(-x))


@silu.defjvp
def _(at, moves):
    (x,), (dx,) = at, moves
    sigmoid = jax.nn.sigmoid(x)
    return silu(x), dx * (sigmoid * (1 + x * (1 - sigmoid)))  # a quotient's own derivative overflows


def doubled(x: Float[Array, "B H W C"]) -> Float[Array, "B h w C"]:
    """Twice as high and wide, each pixel four times."""
    batch, height, width, channels = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None], (batch, height, 2, width, 2, channels))
    return x.reshape(batch, 2 * height, 2 * width, channels)
