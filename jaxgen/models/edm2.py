"""EDM2's U-Net: every layer keeps the size of its activations, and of its weights (Karras et al. 2024, "Analyzing and
Improving the Training Dynamics of Diffusion Models", configuration G)."""

import functools
import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from jaxgen import sharding
from jaxgen.errors import UserError
from jaxgen.models.conditions import Conditions, check_levels, check_out, with_image
from jaxgen.nn import convolution
from jaxgen.nn.attention import Mask, attention
from jaxgen.nn.convolution import Conv
from jaxgen.nn.dtypes import DType, resolve
from jaxgen.nn.kernels import Kernel
from jaxgen.nn.linear import matmul

Map = Float[Array, "B H W C"]

EPSILON = 1e-4
LARGEST = 256.0
"""Bound of the activations after a block, for the sake of half precision."""


# ---- operations that keep magnitudes: unit variance in, unit variance out (section 2.3 and appendix B) ----


def unit(x: Float[Array, "..."], axis: int | tuple[int, ...]) -> Float[Array, "..."]:
    """x divided by its root mean square along `axis`, in float32."""
    x = x.astype(jnp.float32)
    return x / (jnp.sqrt(jnp.square(x).mean(axis, keepdims=True)) + EPSILON)


def silu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """SiLU over the root mean square that it has of a unit Gaussian (eq. 81)."""
    return convolution.silu(x) / 0.596


def mix(a: Float[Array, "..."], b: Float[Array, "..."], share: float) -> Float[Array, "..."]:
    """(1 - share) a + share b, scaled as independent a and b need it (eq. 88)."""
    return ((1 - share) * a + share * b) / math.sqrt((1 - share) ** 2 + share**2)


def beside(a: Float[Array, "B H W C"], b: Float[Array, "B H W D"], share: float) -> Float[Array, "B H W E"]:
    """a and b as channels of one, of which b gives `share` of what the next layer sums, whatever their channels (eq.
    103)."""
    first, second = a.shape[-1], b.shape[-1]
    scale = math.sqrt((first + second) / ((1 - share) ** 2 + share**2))
    return jnp.concatenate([a * (scale * (1 - share) / math.sqrt(first)), b * (scale * share / math.sqrt(second))], -1)


def fourier(label: Float[Array, "B"], features: int) -> Float[Array, "B F"]:
    """sqrt(2) cos(2 pi (f label + p)) with frequencies f of a unit Gaussian and phases p of [0, 1), drawn once for all
    (eq. 75)."""
    random = np.random.RandomState(0)  # whose numbers never change
    frequencies = random.standard_normal(features).astype(np.float32)
    phases = random.random_sample(features).astype(np.float32)
    return math.sqrt(2) * jnp.cos(2 * math.pi * (label.astype(jnp.float32)[:, None] * frequencies + phases))


def normalised(params: PyTree) -> PyTree:
    """The parameters with every weight ("kernel") divided by its root mean square over all that makes one output
    feature: forced weight normalisation (eq. 66). The network computes the same with both.

    To be taken after each update: else weights grow, and the effective learning rate with that decays.
    """

    def one(path, leaf):
        weight = leaf is not None and getattr(path[-1], "key", None) == "kernel"
        return unit(leaf, tuple(range(leaf.ndim - 1))).astype(leaf.dtype) if weight else leaf

    return jax.tree_util.tree_map_with_path(one, params, is_leaf=lambda x: x is None)


class Weight(nn.Module):
    """A linear map without bias, of vectors or of the `size` x `size` surroundings of each place of a map: weights of
    unit variance, normalised in use (eq. 47), times `gain`."""

    features: int
    size: int = 1
    dtype: DType = "auto"
    axes: tuple[str | None, str | None] = ("embed", "mlp")
    """Logical names of the input and of the output features."""

    @nn.compact
    def __call__(self, x: Float[Array, "..."], gain: float | Float[Array, ""] = 1.0) -> Float[Array, "..."]:
        dtype, flat = resolve(self.dtype), x.ndim == 2
        around = () if flat else (self.size, self.size)
        shape, axes = (*around, x.shape[-1], self.features), (*(None for _ in around), *self.axes)
        kernel = self.param("kernel", nn.with_logical_partitioning(nn.initializers.normal(1.0), axes), shape)
        kernel = unit(kernel, tuple(range(kernel.ndim - 1))) * (gain / math.sqrt(math.prod(shape[:-1])))
        if flat:
            return matmul(x.astype(dtype), kernel.astype(dtype))
        # Whole in use: see `jaxgen.nn.convolution.Conv`.
        kernel = sharding.constrain(kernel.astype(dtype), None, None, None, None)
        x = sharding.constrain(x.astype(dtype), "batch", None, None, None)
        if self.size == 1:
            return matmul(x, kernel[0, 0])
        pad = ((self.size // 2,) * 2,) * 2
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), pad, dimension_numbers=("NHWC", "HWIO", "NHWC"))


class Step(NamedTuple):
    """One block of the network, as the plan lists it."""

    name: str
    way: Literal["down", "up"]
    level: int
    features: int
    resample: Literal["", "half", "double"]
    attends: bool
    joins: bool
    """It takes in what the way down left."""


class Block(nn.Module):
    """A residual block of the way down or up, with cosine attention by choice (section 2.3)."""

    features: int
    way: Literal["down", "up"]
    resample: Literal["", "half", "double"]
    heads: int
    """0: it does not attend."""
    dropout: float
    share: float
    """Of a branch in the sum with what goes by it."""
    kernel: Kernel
    dtype: DType

    @nn.compact
    def __call__(
        self, x: Map, told: Float[Array, "B E"], key: Array | None = None
    ) -> Float[Array, "B h w F"]:
        weight = functools.partial(Weight, dtype=self.dtype)
        dtype = resolve(self.dtype)
        if self.resample == "half":
            x = x.reshape(x.shape[0], x.shape[1] // 2, 2, x.shape[2] // 2, 2, -1).mean((2, 4))
        elif self.resample == "double":
            x = jnp.repeat(jnp.repeat(x, 2, 1), 2, 2)
        if self.way == "down":
            x = x if x.shape[-1] == self.features else weight(self.features, name="skip")(x)
            x = unit(x, -1).astype(dtype)

        gain = self.param("gain", nn.with_logical_partitioning(nn.initializers.zeros, ()), ())
        scale = weight(self.features, name="told")(told, gain) + 1
        h = weight(self.features, 3, name="conv1")(silu(x))
        h = silu(h * scale[:, None, None].astype(h.dtype))
        if key is not None and self.dropout:
            h = jnp.where(jax.random.bernoulli(key, 1 - self.dropout, h.shape), h / (1 - self.dropout), 0)
        h = weight(self.features, 3, name="conv2")(h)
        if self.way == "up" and x.shape[-1] != self.features:
            x = weight(self.features, name="skip")(x)
        x = mix(x, h, self.share)

        if self.heads:
            x = mix(x, self._attend(x, weight), self.share)
        return jnp.clip(x, -LARGEST, LARGEST)

    def _attend(self, x, weight):
        """Cosine attention: queries, keys and values of one length each."""
        batch, height, width, features = x.shape

        def heads(name):
            h = weight(features, name=name)(x).reshape(batch, height * width, self.heads, -1)
            return sharding.constrain(unit(h, -1).astype(x.dtype), "batch", None, "heads", None)

        found = attention(heads("query"), heads("key"), heads("value"), Mask("bidirectional"), self.kernel)
        return weight(features, name="out")(found.reshape(x.shape))


class EDM2(nn.Module):
    """EDM2's U-Net. The defaults are those of its size S for latents of 64 x 64 pixels.

    The time is told by numbers around 1, such as `predictions.Edm` gives (log sigma / 4). Conditions taken: `classes`,
    `pooled`, `image` (beside the picture). Weights have unit variance at first, and keep it if `normalised` is taken
    after each update.
    """

    out: int = 4
    """Channels of the result; twice the picture's for a learned variance."""
    width: int = 192
    """Features at the full resolution ..."""
    multipliers: tuple[int, ...] = (1, 2, 3, 4)
    """... and how many times as many each level has, each at half the resolution of the one before."""
    blocks: int = 3
    """Residual blocks a level (one more on the way up)."""
    attention: tuple[int, ...] = (2, 3)
    """Levels at which positions attend to each other."""
    head_dim: int = 64
    classes: int = 0
    """Classes; number `classes` stands for none of them. 0: the network takes no class."""
    pooled: int = 0
    """Size of the pooled embedding; 0: the network takes none."""
    label_scale: float = 1.0
    """What the label of the time is multiplied by: 0.001 for labels up to 1,000."""
    dropout: float = 0.0
    residual_share: float = 0.3
    """Of each branch in the sum with what goes by it."""
    told_share: float = 0.5
    """Of the class and the pooled embedding in the sum with the time."""
    skip_share: float = 0.5
    """Of what the way down left, beside what comes up."""
    kernel: Kernel = "auto"
    dtype: DType = "auto"
    """Format of the computation; parameters are float32."""

    # The paper's FID on ImageNet at 512 pixels without guidance.

    @classmethod
    def XS(cls, **fields) -> "EDM2":  # noqa: N802
        return cls(**{"width": 128} | fields)  # 3.53

    @classmethod
    def S(cls, **fields) -> "EDM2":  # noqa: N802
        return cls(**{"width": 192} | fields)  # 2.56

    @classmethod
    def M(cls, **fields) -> "EDM2":  # noqa: N802
        return cls(**{"width": 256, "dropout": 0.1} | fields)  # 2.25

    @classmethod
    def L(cls, **fields) -> "EDM2":  # noqa: N802
        return cls(**{"width": 320, "dropout": 0.1} | fields)  # 2.06

    @classmethod
    def XL(cls, **fields) -> "EDM2":  # noqa: N802
        return cls(**{"width": 384, "dropout": 0.1} | fields)  # 1.96

    @classmethod
    def XXL(cls, **fields) -> "EDM2":  # noqa: N802
        return cls(**{"width": 448, "dropout": 0.1} | fields)  # 1.91

    def check(self, shape: tuple[int, int, int]) -> None:
        """Raises UserError for sizes that do not fit together, or not pictures of this shape (H, W, C)."""
        if min(self.out, self.width, self.blocks, self.head_dim, *self.multipliers, len(self.multipliers)) < 1:
            raise UserError("out, width, blocks, head_dim and the multipliers of an EDM2 are at least 1.")
        last = len(self.multipliers) - 1
        check_levels(f"An EDM2 of {last + 1} levels", self.multiple, shape)
        check_out(self.out, shape[2])
        for level in self.attention:
            if not 0 <= level <= last:
                raise UserError(f"There is no level {level}; the levels are 0 to {last}.")
        for step in self.plan():
            if step.attends and step.features % self.head_dim:
                raise UserError(f"Level {step.level} has {step.features} features, no multiple of head_dim = "
                                f"{self.head_dim}.")  # fmt: skip

    @property
    def multiple(self) -> int:
        """Of which a picture's sides are multiples."""
        return 2 ** (len(self.multipliers) - 1)

    def plan(self) -> Iterator[Step]:
        """The blocks in the order in which they run."""
        last = len(self.multipliers) - 1
        sizes = [self.width * times for times in self.multipliers]
        for level, features in enumerate(sizes):
            attends = level in self.attention
            if level:
                yield Step(f"down_{level}_half", "down", level, sizes[level - 1], "half", False, False)
            for i in range(self.blocks):
                yield Step(f"down_{level}_{i}", "down", level, features, "", attends, False)
        yield Step("middle_0", "up", last, sizes[last], "", True, False)
        yield Step("middle_1", "up", last, sizes[last], "", False, False)
        for level in reversed(range(last + 1)):
            if level < last:
                yield Step(f"up_{level}_double", "up", level, sizes[level + 1], "double", False, False)
            for i in range(self.blocks + 1):
                yield Step(f"up_{level}_{i}", "up", level, sizes[level], "", level in self.attention, True)

    @nn.compact
    def __call__(
        self,
        x: Map,
        label: Float[Array, "B"],
        conditions: Conditions = Conditions(),
        key: Array | None = None,
    ) -> Float[Array, "B H W D"]:
        """The output for noisy pictures. `label` tells of the time; `key` turns dropout on. Without `classes` the class
        is none; the pooled embedding has to be there where the network takes it."""
        self.check(x.shape[1:])
        dtype, plan = resolve(self.dtype), list(self.plan())
        x = with_image(x, conditions)
        told = silu(self._told(label, conditions)).astype(dtype)
        keys = iter(jax.random.split(key, len(plan)) if key is not None else [None] * len(plan))

        x = jnp.concatenate([x, jnp.ones_like(x[..., :1])], -1)  # the ones are in place of biases
        x = Weight(self.width, 3, self.dtype, (None, "mlp"), name="in")(x)
        kept = [x]
        for step in plan:
            block = Block(
                step.features, step.way, step.resample, step.features // self.head_dim if step.attends else 0,
                self.dropout, self.residual_share, self.kernel, self.dtype, name=step.name,
            )  # fmt: skip
            if step.joins:
                x = beside(x, kept.pop(), self.skip_share)
            x = block(x, told, next(keys))
            if step.way == "down":
                kept.append(x)
        gain = self.param("gain", nn.with_logical_partitioning(nn.initializers.zeros, ()), ())
        return Weight(self.out, 3, self.dtype, ("embed", None), name="out")(x, gain).astype(jnp.float32)

    def _told(self, label, conditions: Conditions) -> Float[Array, "B E"]:
        """The time, mixed with the class and the pooled embedding."""
        features = self.width * max(self.multipliers)
        time = fourier(self.label_scale * label, self.width)
        found, others = Weight(features, dtype=self.dtype, name="time")(time), []
        if self.classes:
            init = nn.with_logical_partitioning(nn.initializers.normal(1.0), (None, "mlp"))
            kernel = self.param("classes", lambda k: {"kernel": init(k, (self.classes + 1, features))})["kernel"]
            none = jnp.full(label.shape, self.classes, jnp.int32)
            # one-hot vectors of unit variance times normalised weights are rows of these
            others.append(jnp.take(unit(kernel, 0), none if conditions.classes is None else conditions.classes, axis=0))
        if self.pooled:
            if conditions.pooled is None:
                raise ValueError("the network takes a pooled embedding, and the conditions have none")
            pooled = Weight(features, dtype=self.dtype, axes=(None, "mlp"), name="pooled")
            others.append(pooled(unit(conditions.pooled, -1)))
        if not others:
            return found
        return mix(found, sum(others) / math.sqrt(len(others)), self.told_share)

    def flops_per_example(self, shape: tuple[int, int, int], length: int = 0) -> float:
        """Operations of the forward pass for a picture of this shape (H, W, C), a picture beside it counted among its
        channels: convolutions and matrix products, 2 per multiply-add. It reads no text."""
        told = self.width * max(self.multipliers)
        total = 2.0 * told * (self.width + self.pooled)
        total += _conv(self.width, shape[2] + 1, *shape[:2]) + _conv(self.out, self.width, *shape[:2])
        kept, channels = [self.width], self.width
        for step in self.plan():
            height, width = (side >> step.level for side in shape[:2])
            if step.joins:
                channels += kept.pop()
            features = step.features
            first = features if step.way == "down" else channels
            total += _conv(features, first, height, width) + _conv(features, features, height, width)
            total += 2.0 * (told * features + (height * width * channels * features if channels != features else 0))
            if step.attends:
                places = height * width
                total += 2.0 * (4 * places * features**2 + 2 * places**2 * features)
            channels = features
            if step.way == "down":
                kept.append(channels)
        return total


def _conv(features: int, channels: int, height: int, width: int) -> float:
    """Operations of a convolution of 3 x 3."""
    return Conv(features, parent=None).flops(channels, height, width)
