"""The discriminator that looks at patches (PatchGAN; Isola et al. 2017, section 3.2.2)."""

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxgen.errors import UserError
from jaxgen.nn.convolution import Conv, GroupNorm, batch_norm
from jaxgen.nn.dtypes import DType

STD = 0.02
"""Of the filters at first (Radford et al. 2016, section 3)."""


class Discriminator(nn.Module):
    """A logit for each of many overlapping patches: above 0 where a patch seems real.

    The defaults are the 70 x 70 discriminator of Isola et al. 2017, which VQGAN (Esser et al. 2021) has too: `depth`
    convolutions with stride 2 and two with stride 1, of 4 x 4. `norm="batch"` keeps running statistics in the
    collection "batch_stats", which a call with `train=True` changes.
    """

    channels: int = 3
    width: int = 64
    """Features of the first convolution; they double up to 8 times as many."""
    depth: int = 3
    """Convolutions with stride 2."""
    norm: Literal["batch", "group", "none"] = "batch"
    groups: int = 32
    """Of group norm."""
    momentum: float = 0.9
    """Share of the running statistics that a step keeps."""
    dtype: DType = "auto"

    def convolutions(self) -> tuple[Conv, ...]:
        """All, in order; the first and the last have no norm."""
        features = [self.width * min(2**i, 8) for i in range(self.depth + 1)] + [1]
        found = []
        for i, count in enumerate(features):
            normed = 0 < i < len(features) - 1
            found.append(Conv(
                count, 4, 2 if i < self.depth else 1, bias=not normed or self.norm != "batch", padding=(1, 1),
                scale=STD**2 * 16 * count,  # a fan-out's share: the standard deviation is STD
                axis="embed" if i else None, out_axis="mlp" if i < len(features) - 1 else None, dtype=self.dtype,
                parent=None,
            ))  # fmt: skip
        return tuple(found)

    def check(self, shape: tuple[int, ...]) -> None:
        """Raises UserError for pictures (H, W, C) too small to have a patch, or with other channels."""
        if self.channels != shape[2]:
            raise UserError(f"A picture of {shape[2]} channels does not fit a discriminator of {self.channels}.")
        if min(shape[:2]) // 2**self.depth < 3:
            raise UserError(
                f"Pictures of {shape[0]} x {shape[1]} are too small for a discriminator of depth {self.depth}; they "
                f"should have {3 * 2**self.depth} pixels each way, or it a smaller depth."
            )
        if self.norm == "group" and self.width * 2 % self.groups and self.depth:
            raise UserError(f"The width {self.width} of a discriminator does not divide into {self.groups} groups.")

    @nn.compact
    def __call__(self, image: Float[Array, "B H W C"], train: bool = False) -> Float[Array, "B h w"]:
        """The patches' logits, in float32, for pictures from -1 to 1. `train` normalises by the batch's own
        statistics."""
        x, (*body, last) = image, self.convolutions()
        for i, conv in enumerate(body):
            x = conv.copy(name=f"conv{i}")(x)
            if i and self.norm == "batch":
                x = batch_norm(train, self.momentum, 1e-5, self.dtype, f"norm{i}")(x)
            elif i and self.norm == "group":
                x = GroupNorm(self.groups, dtype=self.dtype, name=f"norm{i}")(x)
            x = jax.nn.leaky_relu(x, 0.2)
        return last.copy(name=f"conv{len(body)}")(x)[..., 0].astype(jnp.float32)

    def flops_per_example(self, shape: tuple[int, ...]) -> float:
        """Operations of the forward pass for a picture of this shape (H, W, C)."""
        height, width, channels = shape
        total = 0.0
        for conv in self.convolutions():
            total += conv.flops(channels, height, width)
            channels = conv.features
            height, width = (side // 2 if conv.stride == 2 else side - 1 for side in (height, width))
        return total
