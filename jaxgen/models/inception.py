"""InceptionV3 as FID uses it: the graph of December 2015 with its quirks, whose features FID and its kin compare."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from jaxgen import sharding
from jaxgen.errors import UserError
from jaxgen.nn.convolution import batch_norm
from jaxgen.nn.dtypes import DType, resolve

SIDE = 299
EPSILON = 1e-3
"""Of the batch norms."""
DIVISORS = (1, 2, 4, 8, 16)

Size = tuple[int, int]


class Unit(nn.Module):
    """relu(norm(conv(x))) with running statistics; of the size of the input with stride 1, unless `padded` is False."""

    features: int
    size: Size = (1, 1)
    stride: int = 1
    padded: bool = True
    dtype: DType = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w F"]:
        dtype = resolve(self.dtype)
        axis = None if x.shape[-1] == 3 else "embed"   # colours are not split
        init = nn.with_logical_partitioning(nn.initializers.he_normal(), (None, None, axis, "mlp"))
        kernel = self.param("kernel", init, (*self.size, x.shape[-1], self.features))
        kernel = sharding.constrain(kernel.astype(dtype), None, None, None, None)  # as in nn.convolution.Conv
        x = sharding.constrain(x.astype(dtype), "batch", None, None, None)
        pads = [((n - 1) // 2,) * 2 if self.padded else (0, 0) for n in self.size]
        x = jax.lax.conv_general_dilated(
            x, kernel, (self.stride, self.stride), pads, dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision="highest",
        )  # fmt: skip
        return jax.nn.relu(batch_norm(False, 0.9, EPSILON, self.dtype, "norm")(x))


class Block(nn.Module):
    """What the mixed layers share: branches side by side, and their names for the parts (those of the ports to
    PyTorch, after which weights are called)."""

    width_divisor: int
    dtype: DType

    def unit(self, x: Array, name: str, features: int, size: int | Size = 1, stride: int = 1) -> Array:
        """One convolution; those with a stride are not padded."""
        shape = (size, size) if isinstance(size, int) else size
        return Unit(features // self.width_divisor, shape, stride, stride == 1, self.dtype, name=name)(x)

    def averaged(self, x: Array, features: int) -> Array:
        """The mean over 3 x 3 pixels, of those that are there: padding is not counted."""
        return self.unit(nn.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False), "branch_pool", features)


class MixedA(Block):
    """35 x 35: 1 x 1, 5 x 5 and two 3 x 3 (Szegedy et al. 2016, figure 5)."""

    pooled: int

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W F"]:
        one = self.unit(x, "branch1x1", 64)
        five = self.unit(self.unit(x, "branch5x5_1", 48), "branch5x5_2", 64, 5)
        three = self.unit(self.unit(x, "branch3x3dbl_1", 64), "branch3x3dbl_2", 96, 3)
        three = self.unit(three, "branch3x3dbl_3", 96, 3)
        return jnp.concatenate([one, five, three, self.averaged(x, self.pooled)], -1)


class MixedB(Block):
    """35 x 35 to 17 x 17 (figure 10)."""

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w F"]:
        three = self.unit(x, "branch3x3", 384, 3, 2)
        double = self.unit(self.unit(x, "branch3x3dbl_1", 64), "branch3x3dbl_2", 96, 3)
        double = self.unit(double, "branch3x3dbl_3", 96, 3, 2)
        return jnp.concatenate([three, double, nn.max_pool(x, (3, 3), (2, 2))], -1)


class MixedC(Block):
    """17 x 17: 7 x 7 as rows and columns (figure 6)."""

    inner: int

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W F"]:
        inner, row, column = self.inner, (1, 7), (7, 1)
        one = self.unit(x, "branch1x1", 192)
        seven = self.unit(self.unit(x, "branch7x7_1", inner), "branch7x7_2", inner, row)
        seven = self.unit(seven, "branch7x7_3", 192, column)
        double = self.unit(self.unit(x, "branch7x7dbl_1", inner), "branch7x7dbl_2", inner, column)
        double = self.unit(self.unit(double, "branch7x7dbl_3", inner, row), "branch7x7dbl_4", inner, column)
        double = self.unit(double, "branch7x7dbl_5", 192, row)
        return jnp.concatenate([one, seven, double, self.averaged(x, 192)], -1)


class MixedD(Block):
    """17 x 17 to 8 x 8."""

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w F"]:
        three = self.unit(self.unit(x, "branch3x3_1", 192), "branch3x3_2", 320, 3, 2)
        seven = self.unit(self.unit(x, "branch7x7x3_1", 192), "branch7x7x3_2", 192, (1, 7))
        seven = self.unit(self.unit(seven, "branch7x7x3_3", 192, (7, 1)), "branch7x7x3_4", 192, 3, 2)
        return jnp.concatenate([three, seven, nn.max_pool(x, (3, 3), (2, 2))], -1)


class MixedE(Block):
    """8 x 8: rows and columns side by side (figure 7). The last one of the graph pools by the maximum."""

    last: bool

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W F"]:
        one = self.unit(x, "branch1x1", 320)
        three = self.unit(x, "branch3x3_1", 384)
        double = self.unit(self.unit(x, "branch3x3dbl_1", 448), "branch3x3dbl_2", 384, 3)
        parts = [one]
        for h, name in ((three, "branch3x3_2"), (double, "branch3x3dbl_3")):
            parts += [self.unit(h, f"{name}a", 384, (1, 3)), self.unit(h, f"{name}b", 384, (3, 1))]
        if self.last:
            pooled = self.unit(nn.max_pool(x, (3, 3), (1, 1), "SAME"), "branch_pool", 192)
        else:
            pooled = self.averaged(x, 192)
        return jnp.concatenate([*parts, pooled], -1)


class InceptionV3(nn.Module):
    """The network of FID and of the Inception score (Szegedy et al. 2016; Heusel et al. 2017), for evaluation alone.

    It is the graph "2015-12-05", which differs from later ones: average pools do not count padding, the last block
    pools by the maximum, there are 1008 logits, and pictures are made and scaled as `prepared` does. Weights come from
    a file, see `interop.inception`.
    """

    out: int = 1008
    width_divisor: int = 1
    """Of all numbers of channels: a small one for tests."""
    dtype: DType = "float32"
    """Distances between features want float32 on every device."""

    def check(self) -> None:
        """Raises UserError for sizes that do not fit together."""
        if self.width_divisor not in DIVISORS:
            raise UserError(f"The width_divisor of an InceptionV3 is one of {DIVISORS}, not {self.width_divisor}.")

    @property
    def feature_width(self) -> int:
        """Size of the features: 2048."""
        return 2048 // self.width_divisor

    @nn.compact
    def __call__(self, x: Float[Array, "B H W 3"]) -> tuple[Float[Array, "B D"], Float[Array, "B K"]]:
        """(the features before the last layer, logits without their bias), of `prepared` pictures.

        The Inception score was defined without the bias (Salimans et al. 2016's program leaves it out).
        """
        self.check()
        divisor, dtype = self.width_divisor, self.dtype

        def unit(x, name, features, size=1, stride=1, padded=False):
            return Unit(features // divisor, (size, size), stride, padded, dtype, name=name)(x)

        x = unit(x, "Conv2d_1a_3x3", 32, 3, 2)
        x = unit(x, "Conv2d_2a_3x3", 32, 3)
        x = unit(x, "Conv2d_2b_3x3", 64, 3, padded=True)
        x = nn.max_pool(x, (3, 3), (2, 2))
        x = unit(x, "Conv2d_3b_1x1", 80)
        x = unit(x, "Conv2d_4a_3x3", 192, 3)
        x = nn.max_pool(x, (3, 3), (2, 2))
        for name, pooled in (("Mixed_5b", 32), ("Mixed_5c", 64), ("Mixed_5d", 64)):
            x = MixedA(divisor, dtype, pooled, name=name)(x)
        x = MixedB(divisor, dtype, name="Mixed_6a")(x)
        for name, inner in (("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160), ("Mixed_6e", 192)):
            x = MixedC(divisor, dtype, inner, name=name)(x)
        x = MixedD(divisor, dtype, name="Mixed_7a")(x)
        for name, last in (("Mixed_7b", False), ("Mixed_7c", True)):
            x = MixedE(divisor, dtype, last, name=name)(x)
        x = sharding.constrain(x, "batch", None, None, None)
        features = x.mean((1, 2))
        return features, Unbiased(self.out, name="fc")(features)


class Unbiased(nn.Module):
    """A linear layer whose bias is kept, so that the weights are whole, and is not added."""

    out: int

    @nn.compact
    def __call__(self, x: Float[Array, "B D"]) -> Float[Array, "B K"]:
        init = nn.with_logical_partitioning(nn.initializers.normal(0.02), ("embed", None))
        kernel = self.param("kernel", init, (x.shape[-1], self.out))
        self.param("bias", nn.with_logical_partitioning(nn.initializers.zeros, (None,)), (self.out,))
        return jnp.matmul(x, kernel.astype(x.dtype), precision="highest")


def prepared(images: UInt8[Array, "B H W C"], side: int = SIDE) -> Float[Array, "B side side 3"]:
    """Pictures of any size, of one channel or three, as the network takes them: (x - 128) / 128."""
    x = resized(images.astype(jnp.float32), side)
    return (jnp.broadcast_to(x, (*x.shape[:3], 3)) - 128) / 128


def resized(x: Float[Array, "B H W C"], side: int = SIDE) -> Float[Array, "B side side C"]:
    """Bilinear, as TensorFlow 1 does it by default: pixel i is read at i * size / side, the corners' pixels are not
    centred, and nothing is smoothed when pictures become smaller."""
    for axis in (2, 1):
        size = x.shape[axis]
        place = np.arange(side, dtype=np.float32) * np.float32(size / side)
        low = np.floor(place).astype(np.int32)
        shape = [side if i == axis else 1 for i in range(4)]
        share = (place - low).reshape(shape)
        first, second = (jnp.take(x, np.minimum(low + i, size - 1), axis) for i in (0, 1))
        x = first + (second - first) * share
    return x
