"""Pictures beside the noisy one: a hole to be filled, a picture to be edited, a small one to be enlarged.

The network sees their channels after those of the noisy picture (`Conditions.image`). In training they are made of the
data; a person gives them to be drawn for, under the same names of a batch's arrays.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from jaxgen.diffusion.paths import along
from jaxgen.errors import UserError
from jaxgen.tasks.base import Batch, Spec

Pictures = Float[Array, "B H W C"]
CORNERS = 4  # of a stroke
SIDES, WIDTHS = (0.15, 0.6), (0.04, 0.1)
"""Of boxes and strokes, in units of the picture's sides."""


class Beside:
    """What stands beside the noisy picture. A subclass is a frozen dataclass."""

    picture: ClassVar[str] = "before"
    """Which of the given arrays is the picture, (B, H, W, C) of 0 to 255."""
    wanted: ClassVar[tuple[str, ...]] = ("image",)
    """Arrays of the data that it is made of."""
    drop: ClassVar[float] = 0.0
    """Share of examples whose picture is left out in training: zeros in its place."""
    both: ClassVar[float] = 0.0
    """Share of examples that lose it together with their class or caption; the rest lose one of the two."""

    def channels(self, channels: int) -> int:
        """How many it has for data of so many (latents' channels with an autoencoder)."""
        return channels

    def given(self, batch: Batch, keys: Array, train: bool = False) -> dict[str, Array]:
        """What a person gives, by name: of the batch where it is there, else made of its `image`, of keys (B,)."""
        raise NotImplementedError

    def shape(self, given: Mapping[str, Array]) -> tuple[int, ...]:
        """(H, W, C) of what is drawn for what is given."""
        return given[self.picture].shape[1:]

    def seen(
        self, x: Pictures, given: Mapping[str, Array], keys: Array, encode: Callable[[Pictures], Pictures]
    ) -> Pictures:
        """The channels beside the noisy picture.

        Args:
          x: the given picture, of -1 to 1.
          encode: pictures as the network knows them (latents with an autoencoder).
        """
        return encode(x)

    def finished(self, drawn: UInt8[Array, "B H W C"], given: Mapping[str, Array]) -> UInt8[Array, "B H W C"]:
        """Drawn pictures, with what is known of them."""
        return drawn

    def check(self, spec: Spec, drop: float) -> None:
        """Raises UserError for batches of which it cannot be made. `drop` is the share of dropped captions."""
        if missing := [name for name in self.wanted if name not in spec]:
            raise UserError(
                f"The data has {', '.join(spec)}, and task.beside, {type(self).__name__}, needs {' and '.join(missing)}"
                " too."
            )


@dataclass(frozen=True)
class Masked(Beside):
    """The mask (1 where something new is wanted) and the picture without what it hides (Rombach et al. 2022, section
    4.5): as a person gives them by `before` and `mask`.

    Training hides random boxes, strokes, both, or all outside a box, each example's by its own key.
    """

    whole: float = 0.1
    """Share of pictures of which everything is hidden, so that the network draws without any, too."""
    boxes: int = 2
    """At most so many of them in a picture ..."""
    strokes: int = 2
    """... and so many strokes."""

    def __post_init__(self):
        if not 0 <= self.whole <= 1:
            raise UserError(f"task.beside.whole is a share from 0 to 1, not {self.whole}.")
        if self.boxes < 1 or self.strokes < 1:
            raise UserError("task.beside.boxes and task.beside.strokes are at least 1.")

    def channels(self, channels):
        return channels + 1

    def given(self, batch, keys, train=False):
        if "mask" in batch:
            return {"before": batch["before"] if "before" in batch else batch["image"], "mask": batch["mask"]}
        return {"before": batch["image"], "mask": self.masks(keys, *batch["image"].shape[1:3])}

    def seen(self, x, given, keys, encode):
        mask = given["mask"].astype(jnp.float32)
        hidden = encode(x * (1 - mask))
        high, wide = (a // b for a, b in zip(x.shape[1:3], hidden.shape[1:3], strict=True))
        # of latents, a place is new where any of its pixels is
        mask = mask.reshape(len(mask), hidden.shape[1], high, hidden.shape[2], wide, 1).max((2, 4))
        return jnp.concatenate([mask, hidden], -1)

    def finished(self, drawn, given):
        return jnp.where(given["mask"] > 0.5, drawn, jnp.asarray(given["before"], drawn.dtype))

    def masks(self, keys: Array, height: int, width: int) -> Float[Array, "B H W 1"]:
        """One of each key."""
        y = ((jnp.arange(height) + 0.5) / height)[:, None]
        x = ((jnp.arange(width) + 0.5) / width)[None]
        least = 1 / min(height, width)  # a stroke that is thinner may hide no pixel

        def between(key, low, high, shape=()):
            return jax.random.uniform(key, shape, minval=low, maxval=high)

        def box(key):
            """Its middle is in the picture, whose edges cut it."""
            keys = jax.random.split(key)
            (down, across), (tall, wide) = between(keys[0], 0.0, 1.0, (2,)), between(keys[1], *SIDES, (2,))
            tall, wide = jnp.maximum(tall, least), jnp.maximum(wide, least)
            return (jnp.abs(y - down) <= tall / 2) & (jnp.abs(x - across) <= wide / 2)

        def stroke(key):
            """All that is near a line through a few corners."""
            keys = jax.random.split(key)
            corners = between(keys[0], 0.0, 1.0, (CORNERS, 2))
            radius = jnp.maximum(between(keys[1], *WIDTHS), least)

            def near(a, b):
                along = b - a
                share = ((y - a[0]) * along[0] + (x - a[1]) * along[1]) / jnp.maximum(jnp.sum(along**2), 1e-6)
                share = jnp.clip(share, 0, 1)
                return jnp.hypot(y - a[0] - share * along[0], x - a[1] - share * along[1]) <= radius

            return jax.vmap(near)(corners[:-1], corners[1:]).any(0)

        def some(key, kind, most):
            keys = jax.random.split(key)
            count = jax.random.randint(keys[0], (), 1, most + 1)
            return (jax.vmap(kind)(jax.random.split(keys[1], most)) & (jnp.arange(most) < count)[:, None, None]).any(0)

        def one(key):
            keys = jax.random.split(key, 4)
            boxes, strokes = some(keys[0], box, self.boxes), some(keys[1], stroke, self.strokes)
            outside = ~some(keys[0], box, 1)
            kinds = jnp.stack([boxes, strokes, boxes | strokes, outside])
            mask = kinds[jax.random.randint(keys[2], (), 0, len(kinds))]
            return (mask | (jax.random.uniform(keys[3]) < self.whole))[..., None].astype(jnp.float32)

        return jax.vmap(one)(keys)


@dataclass(frozen=True)
class Before(Beside):
    """The picture before an edit that a text asks for (Brooks et al. 2023, InstructPix2Pix): `before`, of the data."""

    wanted = ("image", "before")
    drop: float = 0.1
    """Share of examples whose picture is left out in training, so that the network can be guided by it."""
    both: float = 0.05
    """Share of those that lose their text, too; with task.drop, a twentieth each lose the text, the picture and both
    (section 3.2.1)."""

    def __post_init__(self):
        if not 0 <= self.both <= self.drop < 1:
            raise UserError(
                f"task.beside.drop is at least 0 and below 1, and task.beside.both from 0 to that, not {self.drop} and "
                f"{self.both}."
            )

    def given(self, batch, keys, train=False):
        if "before" not in batch:
            raise UserError("The pictures to be edited are missing: the conditions have no before.")
        return {"before": batch["before"]}

    def check(self, spec, drop):
        super().check(spec, drop)
        if spec["before"].shape != spec["image"].shape:
            before, image = (" x ".join(map(str, spec[name].shape[1:])) for name in ("before", "image"))
            raise UserError(f"The data's before is of {before} and its image of {image}; they should be the same.")
        if self.both > drop or drop - self.both + self.drop > 1:
            raise UserError(
                f"task.beside.both is at most task.drop, and all that is dropped together at most 1; they are "
                f"{self.both} and {drop}, and task.beside.drop is {self.drop}."
            )


@dataclass(frozen=True)
class Smaller(Beside):
    """A picture of 1 / factor of the sides, enlarged: `small` (Saharia et al. 2021, SR3, section 2).

    Training adds noise to it, of a strength that one further channel tells, so that what a first stage has drawn does
    as well (Ho et al. 2022, Cascaded Diffusion Models, section 4.2). `level` (B,) is that strength, 0 where none is
    given.
    """

    picture = "small"
    factor: int = 4
    noise: float = 0.5
    """The greatest share s of noise e: sqrt(1 - s^2) small + s e."""

    def __post_init__(self):
        if self.factor < 2:
            raise UserError(f"task.beside.factor is at least 2, not {self.factor}.")
        if not 0 <= self.noise < 1:
            raise UserError(f"task.beside.noise is at least 0 and below 1, not {self.noise}.")

    def channels(self, channels):
        return channels + 1

    def given(self, batch, keys, train=False):
        small = batch["small"] if "small" in batch else reduced(batch["image"], self.factor)
        level = batch.get("level")
        if level is None:
            level = jnp.zeros(len(keys))
            if train:
                level = self.noise * jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 1)))(keys)
        return {"small": small, "level": level}

    def shape(self, given):
        height, width, channels = given["small"].shape[1:]
        return height * self.factor, width * self.factor, channels

    def seen(self, x, given, keys, encode):
        level = along(jnp.asarray(given["level"], jnp.float32), x)
        noise = jax.vmap(lambda key: jax.random.normal(key, x.shape[1:]))(keys)
        found = encode(enlarged(jnp.sqrt(1 - level**2) * x + level * noise, self.factor))
        return jnp.concatenate([found, jnp.broadcast_to(level, (*found.shape[:-1], 1))], -1)

    def check(self, spec, drop):
        super().check(spec, drop)
        height, width = spec["image"].shape[1:3]
        if height % self.factor or width % self.factor:
            raise UserError(
                f"Pictures of {height} x {width} cannot be reduced by task.beside.factor, {self.factor}; it should "
                "divide both sides."
            )


def reduced(image: Array, factor: int) -> Pictures:
    """The means of squares of so many pixels a side."""
    batch, height, width, channels = image.shape
    parts = jnp.asarray(image, jnp.float32).reshape(batch, height // factor, factor, width // factor, factor, channels)
    return parts.mean((2, 4))


def enlarged(image: Array, factor: int) -> Pictures:
    """By bicubic interpolation."""
    batch, height, width, channels = image.shape
    image = jnp.asarray(image, jnp.float32)
    return jax.image.resize(image, (batch, height * factor, width * factor, channels), "cubic")
