"""Convolutions over pictures (B, H, W, C), and the norms that go with them."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxgen import sharding
from jaxgen.nn.dtypes import DType, resolve
from jaxgen.nn.linear import matmul


class Conv(nn.Module):
    """A convolution without bias, padded by half its size on each side."""

    features: int
    size: int = 3
    stride: int = 1
    standardize: bool = False
    """Weight standardisation: each filter has mean 0 and variance 1 (Qiao et al. 2019)."""
    axis: str | None = "embed"
    """Logical name of the input channels."""
    dtype: DType = "auto"

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w F"]:
        dtype = resolve(self.dtype)
        fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "normal")  # He et al. 2015
        kernel = self.param(
            "kernel",
            nn.with_logical_partitioning(fan_out, (None, None, self.axis, "mlp")),
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
            return matmul(x[:, :: self.stride, :: self.stride], kernel[0, 0])
        pad = ((self.size - 1) // 2,) * 2
        return jax.lax.conv_general_dilated(
            x, kernel, (self.stride, self.stride), (pad, pad), dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    def flops(self, channels: int, height: int, width: int) -> float:
        """Operations of the forward pass for one picture of this shape, 2 per multiply-add, with none for padding."""

        def taps(length: int) -> int:
            starts = range(-((self.size - 1) // 2), length + (self.size - 1) // 2 - self.size + 1, self.stride)
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


def group_norm(groups: int, epsilon: float, dtype: DType, name: str) -> nn.Module:
    """Group normalisation (Wu & He 2018)."""
    return nn.GroupNorm(
        num_groups=groups, epsilon=epsilon, dtype=resolve(dtype), name=name, use_fast_variance=False,
        scale_init=nn.with_logical_partitioning(nn.initializers.ones, ("norm",)),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ("norm",)),
    )  # fmt: skip
