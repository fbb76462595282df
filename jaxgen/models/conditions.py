"""What a diffusion network is told besides the noisy picture and its time, how it takes it in, and what fits it."""

import typing

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxgen import sharding
from jaxgen.errors import UserError
from jaxgen.nn.attention import Mask
from jaxgen.nn.dtypes import DType
from jaxgen.nn.linear import Embedding, Linear


@typing.no_type_check  # as any tree, it may also hold shapes, shardings or axes
@flax.struct.dataclass
class Conditions:
    """Each may be missing; a network says which it takes. Examples come first."""

    classes: Int[Array, "B"] | None = None
    """Number of the class; the number of classes itself stands for none."""
    tokens: Float[Array, "B L E"] | None = None
    """Embedded text (or anything else) to attend to."""
    mask: Bool[Array, "B L"] | None = None
    """Which tokens are there; all by default."""
    pooled: Float[Array, "B P"] | None = None
    """One vector for the whole, such as a text's pooled embedding."""
    sizes: Float[Array, "B S"] | None = None
    """Numbers that tell of the picture: SDXL's height and width before resizing, top and left of the part cut out, and
    height and width wanted (Podell et al. 2023, section 2.2)."""
    image: Float[Array, "B H W K"] | None = None
    """A picture beside the noisy one: masks and what they leave, a picture to be edited, a smaller one."""


def example(network: nn.Module) -> tuple[Float[Array, "1 H W C"], Float[Array, "1"], Conditions]:
    """(a noisy picture, its label, all that it takes besides) to initialise a network with."""
    side, out = getattr(network, "multiple", 1), network.out
    channels = getattr(network, "channels", 0) or out
    shown = out if out <= channels else out // 2   # twice as many with a learned variance

    def told(name: str, *shape: int) -> Array | None:
        size = getattr(network, name, 0)
        return jnp.zeros((*shape, size)) if size else None

    beside = jnp.zeros((1, side, side, channels - shown)) if channels > shown else None
    conditions = Conditions(
        tokens=told("text", 1, 1), pooled=told("pooled", 1), sizes=told("sizes", 1), image=beside
    )
    return jnp.zeros((1, side, side, shown)), jnp.zeros((1,)), conditions


def check_levels(what: str, multiple: int, shape: tuple[int, ...]) -> None:
    """UserError where `what` cannot halve pictures of this shape (H, W, ...) as often as it does."""
    height, width = shape[:2]
    if height % multiple or width % multiple or not height * width:
        raise UserError(f"{what} takes pictures whose sides are multiples of {multiple}, and not {height} x {width}.")


def check_patches(patch: int, shape: tuple[int, ...]) -> None:
    """UserError where pictures of this shape (H, W, ...) cannot be cut into patches."""
    height, width = shape[:2]
    if height % patch or width % patch or not height * width:
        raise UserError(f"A picture of {height} x {width} is not made of whole patches of {patch}.")


def check_out(out: int, channels: int) -> None:
    """UserError where a result of `out` channels says nothing of a picture of `channels`."""
    if out not in (channels, 2 * channels):
        raise UserError(
            f"out = {out} is neither the picture's {channels} channels nor twice as many (for a learned variance)."
        )


def with_image(
    x: Float[Array, "B H W C"], conditions: Conditions, what: str = "", channels: int = 0
) -> Float[Array, "B H W D"]:
    """x and the picture beside it; UserError where these are not the `channels` that `what` takes (0: any)."""
    if conditions.image is not None:
        x = jnp.concatenate([x, conditions.image.astype(x.dtype)], -1)
    if channels and x.shape[-1] != channels:
        raise UserError(f"A picture of {x.shape[-1]} channels does not fit {what} of {channels}.")
    return x


def sinusoids(label: Float[Array, "*n"], width: int, shift: int = 0, longest: float = 1e4) -> Float[Array, "*n width"]:
    """Cosines and sines of the label, of periods from 2 pi to 2 pi `longest` (Vaswani et al. 2017, section 3.5). The
    longest itself is the first left out, or with `shift` = 1 the last."""
    half = width // 2
    frequencies = np.exp(-np.log(longest) * np.arange(half) / max(half - shift, 1)).astype(np.float32)
    angles = label.astype(jnp.float32)[..., None] * frequencies
    parts = [jnp.cos(angles), jnp.sin(angles)] + [jnp.zeros_like(angles[..., :1])] * (width % 2)
    return jnp.concatenate(parts, -1)


def seen_with(mask: Bool[Array, "B L"] | None, places: int, before: bool = True) -> Mask:
    """Who sees whom among L tokens of a text and `places` of a picture in one sequence, the text `before` or after it:
    all that are there see each other, and nobody sees padding (which sees itself)."""
    if mask is None:
        return Mask("bidirectional")
    around = ((0, 0), (0, places) if before else (places, 0))
    return Mask("bidirectional", query_segments=jnp.pad(mask, around, constant_values=True).astype(jnp.int32))


class Telling(nn.Module):
    """One vector of the time, the class, the pooled embedding and the sizes: the sum of what is made of each."""

    features: int
    periods: int
    """Cosines and sines of the time."""
    classes: int = 0
    pooled: int = 0
    """Size of the pooled embedding; 0 for none."""
    sizes: int = 0
    """How many sizes are told, each by `size_periods` cosines and sines beside the pooled embedding."""
    size_periods: int = 256
    period_shift: int = 0
    """Of the time's periods (see `sinusoids`)."""
    dtype: DType = "auto"

    @nn.compact
    def __call__(self, label: Float[Array, "B"], conditions: Conditions) -> Float[Array, "B F"]:
        def linear(name, x):
            layer = Linear((self.features,), (("embed",), ("mlp",)), dtype=self.dtype, name=name)
            # else XLA lays these out by the weights, and has been seen to mix examples up (jax 0.10.2)
            return sharding.constrain(layer(sharding.constrain(x, "batch", None)), "batch", None)

        def mlp(x, name):
            return linear(f"{name}_out", jax.nn.silu(linear(f"{name}_in", x)))

        found = mlp(sinusoids(label, self.periods, self.period_shift), "time")
        if self.classes:
            table = Embedding(self.classes + 1, self.features, (None, "embed"), dtype=self.dtype, name="classes")
            none = jnp.full(label.shape, self.classes, jnp.int32)
            found = found + table(none if conditions.classes is None else conditions.classes)
        told = []
        if self.pooled:
            told.append(_demand(conditions.pooled, "a pooled embedding").astype(jnp.float32))
        if self.sizes:
            waves = sinusoids(_demand(conditions.sizes, "sizes"), self.size_periods)
            told.append(waves.reshape(waves.shape[0], -1))
        if told:
            found = found + mlp(jnp.concatenate(told, -1), "pooled")
        return found

    def flops(self) -> float:
        """Operations of the forward pass for one example: matrix products alone, 2 per multiply-add."""
        told = self.pooled + self.sizes * self.size_periods
        return 2.0 * self.features * (self.periods + self.features + (told + self.features if told else 0))


def _demand(x: Array | None, what: str) -> Array:
    if x is None:
        raise ValueError(f"the network takes {what}, and the conditions have none")
    return x
