"""ResNet: with batch norm (v1.5), and BiT's form with group norm and weight standardisation."""

from collections.abc import Iterator
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxgen import sharding
from jaxgen.errors import UserError
from jaxgen.nn.convolution import Conv, GroupNorm, batch_norm, halved
from jaxgen.nn.dtypes import DType
from jaxgen.nn.linear import Linear

Form = Literal["batch", "bit"]

STAGES = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
"""Blocks of each stage by depth."""


class Residual(nn.Module):
    """relu(shortcut(x) + f(x)) with f = norm(conv(relu(norm(conv(...))))) (He et al. 2016a), or in BiT's form
    pre-activated: shortcut(x) + f(x) with f = conv(relu(norm(...))) (He et al. 2016b). The stride is that of the
    3 x 3 convolution ("v1.5")."""

    features: int
    bottleneck: bool
    stride: int
    form: Form
    groups: int
    momentum: float
    epsilon: float
    dtype: DType

    def convolutions(self) -> tuple[Conv, ...]:
        """Those of the branch."""
        ws = self.form == "bit"
        if self.bottleneck:
            inner = self.features // 4
            shapes = ((inner, 1, 1), (inner, 3, self.stride), (self.features, 1, 1))
        else:
            shapes = ((self.features, 3, self.stride), (self.features, 3, 1))
        return tuple(Conv(*shape, ws, dtype=self.dtype, parent=None) for shape in shapes)

    def shortcut(self, channels: int) -> Conv | None:
        """The projection of an input of so many channels, where it has another shape than the output."""
        if self.stride == 1 and channels == self.features:
            return None
        return Conv(self.features, 1, self.stride, self.form == "bit", dtype=self.dtype, parent=None)

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], train: bool = False) -> Float[Array, "B h w F"]:
        convolutions, project = self.convolutions(), self.shortcut(x.shape[-1])

        def norm(name: str, start: float = 1.0):
            if self.form == "bit":
                return GroupNorm(self.groups, self.epsilon, dtype=self.dtype, name=name)
            return batch_norm(train, self.momentum, self.epsilon, self.dtype, name, start)

        if self.form == "bit":
            h = jax.nn.relu(norm("norm1")(x))
            if project is not None:
                x = project.copy(name="shortcut")(h)
            for i, conv in enumerate(convolutions, 1):
                h = h if i == 1 else jax.nn.relu(norm(f"norm{i}")(h))
                h = conv.copy(name=f"conv{i}")(h)
            return sharding.constrain(x + h, "batch", None, None, None)
        h = x
        for i, conv in enumerate(convolutions, 1):
            last = i == len(convolutions)
            # the last norm starts at 0, so that the block starts as the identity (Goyal et al. 2017)
            h = norm(f"norm{i}", 0.0 if last else 1.0)(conv.copy(name=f"conv{i}")(h))
            h = h if last else jax.nn.relu(h)
        if project is not None:
            x = norm("shortcut_norm")(project.copy(name="shortcut")(x))
        return sharding.constrain(jax.nn.relu(x + h), "batch", None, None, None)


class ResNet(nn.Module):
    """A residual network (He et al. 2016), by default ResNet-50 in the form "v1.5" of torchvision.

    `form="batch"` keeps running statistics in the collection "batch_stats" {..: {mean, var}}, which a call with
    `train=True` changes (`mutable=["batch_stats"]`). `form="bit"` has none (Kolesnikov et al. 2020); its width 64 k is
    that of R50xk.
    """

    depth: Literal[18, 34, 50, 101, 152] = 50
    form: Form = "batch"
    width: int = 64
    """Channels of the stem, and of the first stage's inner convolutions."""
    out: int = 1000
    """Size of the result: classes, or of a shared embedding; 0 for the pooled features as they are."""
    small: bool = False
    """A stem for small pictures (32 pixels): 3 x 3 with stride 1, and no pooling."""
    head_bias: bool = True
    channels: int = 3
    groups: int = 32
    """Of group norm."""
    momentum: float = 0.9
    """Share of the running statistics that a step keeps."""
    norm_epsilon: float = 1e-5
    dtype: DType = "auto"
    """Format of the computation; parameters are float32."""

    def check(self) -> None:
        """Raises UserError for sizes that do not fit together."""
        if self.depth not in STAGES:
            raise UserError(f"A ResNet of depth {self.depth} is not known; there are {', '.join(map(str, STAGES))}.")
        if self.width < 1 or self.channels < 1:
            raise UserError("width and channels of a ResNet are at least 1.")
        if self.form == "bit" and self.width % self.groups:
            raise UserError(f"The width {self.width} is not a multiple of the {self.groups} groups.")

    @property
    def bottleneck(self) -> bool:
        return self.depth >= 50

    @property
    def feature_width(self) -> int:
        """Channels of the last stage."""
        return self.width * 8 * (4 if self.bottleneck else 1)

    @property
    def embed_dim(self) -> int:
        """Size of the result."""
        return self.out or self.feature_width

    @property
    def stem(self) -> Conv:
        size, stride = (3, 1) if self.small else (7, 2)
        return Conv(self.width, size, stride, self.form == "bit", axis=None, dtype=self.dtype, parent=None)

    def residuals(self) -> Iterator[tuple[str, Residual]]:
        """The blocks in order, by name."""
        for stage, blocks in enumerate(STAGES[self.depth], 1):
            features = self.width * 2 ** (stage - 1) * (4 if self.bottleneck else 1)
            for block in range(1, blocks + 1):
                stride = 2 if block == 1 and stage > 1 else 1
                yield f"stage{stage}_block{block}", Residual(
                    features, self.bottleneck, stride, self.form, self.groups, self.momentum, self.norm_epsilon,
                    self.dtype, parent=None,
                )  # fmt: skip

    def __call__(
        self, image: Float[Array, "B H W C"], train: bool = False, key: Array | None = None
    ) -> Float[Array, "B D"]:
        """The result for each picture. `train` normalises by the batch's own statistics and updates the running ones;
        `key` changes nothing (it is there for models with patch dropout)."""
        return self._run(image, train)[1]

    def features(self, image: Float[Array, "B H W C"], train: bool = False) -> Float[Array, "B F"]:
        """The pooled features, before the head."""
        return self._run(image, train)[0].mean((1, 2))

    def tokens(self, image: Float[Array, "B H W C"], train: bool = False) -> Float[Array, "B N F"]:
        """The last stage's features at each place."""
        x = self._run(image, train)[0]
        return x.reshape(x.shape[0], -1, x.shape[-1])

    @nn.compact
    def _run(self, image, train: bool):
        """(the last stage's features, the result)."""
        self.check()
        if image.shape[-1] != self.channels:
            raise UserError(f"A picture of {image.shape[-1]} channels does not fit a ResNet of {self.channels}.")
        x = self.stem.copy(name="stem")(image)
        if self.form == "batch":
            x = jax.nn.relu(batch_norm(train, self.momentum, self.norm_epsilon, self.dtype, "stem_norm")(x))
        if not self.small:
            if self.form == "bit":  # whose pooling sees zeros at the border, and may take them
                x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
                x = nn.max_pool(x, (3, 3), (2, 2))
            else:
                x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        x = sharding.constrain(x, "batch", None, None, None)
        for name, block in self.residuals():
            x = block.copy(name=name)(x, train)
        if self.form == "bit":
            x = jax.nn.relu(GroupNorm(self.groups, self.norm_epsilon, dtype=self.dtype, name="final_norm")(x))
        pooled = x.mean((1, 2))
        if not self.out:
            return x, pooled
        head = Linear((self.out,), (("embed",), (None,)), self.head_bias, 0.01, self.dtype, name="head")
        return x, head(pooled)

    def flops_per_example(self, shape: tuple[int, ...], train: bool = False) -> float:
        """Operations of the forward pass for a picture of this shape (H, W, C): of convolutions and the head alone, 2
        per multiply-add, with none for padding (the customary count has them: 2 x 4.1e9 for ResNet-50). The same in
        training."""
        height, width, channels = shape
        total, channels = self.stem.flops(channels, height, width), self.width
        stem = 1 if self.small else 4
        height, width = halved(height, stem), halved(width, stem)
        for _, block in self.residuals():
            project = block.shortcut(channels)
            total += project.flops(channels, height, width) if project is not None else 0
            for conv in block.convolutions():
                total += conv.flops(channels, height, width)
                channels, height, width = conv.features, halved(height, conv.stride), halved(width, conv.stride)
        return total + 2.0 * self.feature_width * self.out
