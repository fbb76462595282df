"""What is done to a picture before it is an example: small pure classes, array in, array out.

Pictures are uint8 (H, W, C), RGB or (C = 1) grey. All randomness comes from the generator that is passed; `apply` gives
each transform of a row its own. (No JAX in here: reading processes import it.)
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Bool, Int32, UInt8
from PIL import Image, ImageEnhance, ImageOps

from jaxgen.data.images import Picture
from jaxgen.errors import UserError

Filter = Literal["bilinear", "bicubic", "lanczos", "nearest"]
_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC,
            "lanczos": Image.Resampling.LANCZOS, "nearest": Image.Resampling.NEAREST}


class Transform(abc.ABC):
    """A frozen dataclass that is called with a picture and a generator; it writes into neither's past."""

    @abc.abstractmethod
    def __call__(self, image: Picture, rng: np.random.Generator) -> Picture:
        """The transformed picture, an array of its own or a view."""

    def least(self) -> int:
        """The shortest side that its input needs for nothing to be lost; 0: all there is."""
        return 0


def apply(transforms: Sequence[Transform], image: Picture, rng: np.random.Generator) -> Picture:
    """The transforms one after the other, each with a generator of its own: none changes what another draws."""
    for transform, own in zip(transforms, rng.spawn(len(transforms)), strict=True):
        image = transform(image, own)
    return image


def _pillow(image: Picture) -> Image.Image:
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def _array(image: Image.Image) -> Picture:
    array = np.asarray(image)
    return array[..., None] if array.ndim == 2 else array


# --- size ----------------------------------------------------------------------------------------------------------


def resize(image: Picture, height: int, width: int, filter: Filter = "bicubic") -> Picture:
    """The picture at another size; filters are widened when it shrinks, so that nothing aliases."""
    if image.shape[:2] == (height, width):
        return image
    return _array(_pillow(image).resize((width, height), _FILTERS[filter]))


@dataclasses.dataclass(frozen=True)
class Resize(Transform):
    """To a size in pixels.

    Attributes:
      size: pixels.
      mode: "shortest" makes the shorter side `size` and "fit" the longer one, both in the picture's own proportions;
        "exact" makes both sides `size`.
      filter: how pixels are interpolated.
    """

    size: int = 224
    mode: Literal["shortest", "exact", "fit"] = "shortest"
    filter: Filter = "bicubic"

    def __call__(self, image: Picture, rng: np.random.Generator) -> Picture:
        height, width = image.shape[:2]
        if self.mode == "exact":
            return resize(image, self.size, self.size, self.filter)
        scale = self.size / (min if self.mode == "shortest" else max)(height, width)
        return resize(image, max(1, round(height * scale)), max(1, round(width * scale)), self.filter)

    def least(self) -> int:
        return self.size


@dataclasses.dataclass(frozen=True)
class CenterCrop(Transform):
    """The middle `size` x `size` pixels; a smaller picture is enlarged first."""

    size: int = 224

    def __call__(self, image: Picture, rng: np.random.Generator) -> Picture:
        if min(image.shape[:2]) < self.size:
            image = Resize(self.size)(image, rng)
        top, left = ((side - self.size) // 2 for side in image.shape[:2])
        return image[top:top + self.size, left:left + self.size]


@dataclasses.dataclass(frozen=True)
class Pad(Transform):
    """Filled up to a square in one colour, the picture in the middle.

    Attributes:
      color: of the new pixels; for grey pictures its first value.
    """

    color: tuple[int, int, int] = (255, 255, 255)

    def __call__(self, image: Picture, rng: np.random.Generator) -> Picture:
        height, width, channels = image.shape
        side = max(height, width)
        if height == width:
            return image
        square = np.empty((side, side, channels), np.uint8)
        square[:] = self.color[:channels]
        top, left = (side - height) // 2, (side - width) // 2
        square[top:top + height, left:left + width] = image
        return square


@dataclasses.dataclass(frozen=True)
class RandomCrop(Transform):
    """`size` x `size` pixels at a random place, of the picture with `padding` pixels of `color` around it."""

    size: int = 32
    padding: int = 4
    color: tuple[int, int, int] = (0, 0, 0)

    def __call__(self, image: Picture, rng: np.random.Generator) -> Picture:
        height, width, channels = image.shape
        wide = np.empty((height + 2 * self.padding, width + 2 * self.padding, channels), np.uint8)
        wide[:] = self.color[:channels]
        wide[self.padding:self.padding + height, self.padding:self.padding + width] = image
        if min(wide.shape[:2]) < self.size:
            return CenterCrop(self.size)(wide, rng)
        top, left = (int(rng.integers(side - self.size + 1)) for side in wide.shape[:2])
        return wide[top:top + self.size, left:left + self.size]


@dataclasses.dataclass(frozen=True)
class RandomResizedCrop(Transform):
    """A random part of the picture, resized to `size` x `size` (Szegedy et al. 2014, "Inception" crop).

    Attributes:
      size: pixels of the result.
      scale: range of the part's share of the picture's area.
      ratio: range of its width over its height, even in the logarithm.
      filter: how pixels are interpolated.
    """

    size: int = 224
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    filter: Filter = "bicubic"

    def __post_init__(self):
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise UserError(f"the scale of a random resized crop is {self.scale}; it is two rising fractions above 0")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise UserError(f"the ratio of a random resized crop is {self.ratio}; it is two rising numbers above 0")

    def __call__(self, image: Picture, rng: np.random.Generator) -> Picture:
        top, left, height, width = self.box(image.shape[0], image.shape[1], rng)
        return resize(image[top:top + height, left:left + width], self.size, self.size, self.filter)

    def box(self, height: int, width: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
        """(top, left, height, width) of the part, of a picture of that size."""
        for _ in range(10):
            area = height * width * rng.uniform(*self.scale)
            ratio = math.exp(rng.uniform(math.log(self.ratio[0]), math.log(self.ratio[1])))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
        # A picture so long that hardly any part fits: its middle, as near to the range of ratios as it can be.
        w = min(width, max(1, round(height * self.ratio[1])))
        h = min(height, max(1, round(width / self.ratio[0])))
        return (height - h) // 2, (width - w) // 2, h, w

    def least(self) -> int:
        return math.ceil(self.size / math.sqrt(self.scale[0] * min(self.ratio[0], 1 / self.ratio[1])))


# --- colour and form -----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Flip(Transform):
    """Left and right exchanged, with probability `chance`."""

    chance: float = 0.5

    def __call__(self, image: Picture, rng: np.random.Generator) -> Picture:
        if rng.random() >= self.chance:
            return image
        return _array(_pillow(image).transpose(Image.Transpose.FLIP_LEFT_RIGHT))  # three times as fast as [:, ::-1]


@dataclasses.dataclass(frozen=True)
class ColorJitter(Transform):
    """Brightness, contrast, saturation and hue changed at random, in random order.

    Attributes:
      brightness: the factor is within 1 - brightness .. 1 + brightness; so for contrast and saturation.
      contrast: about the mean grey of the picture.
      saturation: about the grey picture.
      hue: largest turn of the colour circle, of 1, in either direction.
    """

    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1

    def __call__(self, image: Picture, rng: np.random.Generator) -> Picture:
        changed = _pillow(image)
        order, draws = rng.permutation(4), rng.uniform(-1, 1, 4)
        for k in order:
            if k == 3:
                if self.hue and changed.mode == "RGB":
                    changed = _turn_hue(changed, draws[3] * self.hue)
                continue
            strength = (self.brightness, self.contrast, self.saturation)[k]
            if strength and (k < 2 or changed.mode == "RGB"):
                enhance = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[k]
                changed = enhance(changed).enhance(max(0.0, 1 + draws[k] * strength))
        return _array(changed)


def _turn_hue(image: Image.Image, turn: float) -> Image.Image:
    hue, saturation, value = image.convert("HSV").split()
    hue = hue.point([(i + round(turn * 256)) % 256 for i in range(256)])
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


# RandAugment's operations (Cubuk et al. 2019, table 6): strength is 0..1 of the largest, sign is -1 or 1.
def _affine(a: float = 1, b: float = 0, c: float = 0, d: float = 0, e: float = 1,
            f: float = 0) -> Callable[[Image.Image, tuple[int, ...]], Image.Image]:
    return lambda image, fill: image.transform(image.size, Image.Transform.AFFINE, (a, b, c, d, e, f),
                                               Image.Resampling.BILINEAR, fillcolor=_fill(image, fill))


def _fill(image: Image.Image, color: tuple[int, ...]) -> tuple[int, ...] | int:
    return tuple(color) if image.mode == "RGB" else color[0]


def _enhanced(kind: type) -> Callable:
    return lambda image, strength, sign, fill: kind(image).enhance(1 + 0.9 * sign * strength)


_OPERATIONS: dict[str, Callable[[Image.Image, float, int, tuple[int, ...]], Image.Image]] = {
    "identity": lambda image, strength, sign, fill: image,
    "autocontrast": lambda image, strength, sign, fill: ImageOps.autocontrast(image),
    "equalize": lambda image, strength, sign, fill: ImageOps.equalize(image),
    "rotate": lambda image, strength, sign, fill: image.rotate(
        30 * sign * strength, Image.Resampling.BILINEAR, fillcolor=_fill(image, fill)),
    "solarize": lambda image, strength, sign, fill: ImageOps.solarize(image, round(256 * (1 - strength))),
    "posterize": lambda image, strength, sign, fill: ImageOps.posterize(image, 8 - round(4 * strength)),
    "color": _enhanced(ImageEnhance.Color),
    "contrast": _enhanced(ImageEnhance.Contrast),
    "brightness": _enhanced(ImageEnhance.Brightness),
    "sharpness": _enhanced(ImageEnhance.Sharpness),
    "shear_x": lambda image, strength, sign, fill: _affine(b=0.3 * sign * strength)(image, fill),
    "shear_y": lambda image, strength, sign, fill: _affine(d=0.3 * sign * strength)(image, fill),
    "translate_x": lambda image, strength, sign, fill: _affine(c=0.33 * sign * strength * image.width)(image, fill),
    "translate_y": lambda image, strength, sign, fill: _affine(f=0.33 * sign * strength * image.height)(image, fill),
}
_COLOURED = {"color"}  # does nothing to grey


@dataclasses.dataclass(frozen=True)
class RandAugment(Transform):
    """`layers` operations drawn at random, all of one strength (Cubuk et al. 2019).

    Attributes:
      layers: how many.
      magnitude: their strength, 0 to 10.
      color: what a turned or moved picture uncovers.
    """

    layers: int = 2
    magnitude: float = 9.0
    color: tuple[int, int, int] = (128, 128, 128)

    def __post_init__(self):
        if not 0 <= self.magnitude <= 10:
            raise UserError(f"the magnitude of RandAugment is {self.magnitude}; it is from 0 to 10")

    def __call__(self, image: Picture, rng: np.random.Generator) -> Picture:
        changed = _pillow(image)
        names = [name for name in _OPERATIONS if changed.mode == "RGB" or name not in _COLOURED]
        for _ in range(self.layers):
            operation, sign = _OPERATIONS[names[rng.integers(len(names))]], int(rng.choice((-1, 1)))
            changed = operation(changed, self.magnitude / 10, sign, self.color)
        return _array(changed)


@dataclasses.dataclass(frozen=True)
class RandomAffine(Transform):
    """Turned, scaled and moved a little, about the middle.

    Attributes:
      degrees: largest turn in either direction.
      shift: largest move, as a share of the side.
      scale: range of the factor.
      color: what is uncovered.
    """

    degrees: float = 10.0
    shift: float = 0.1
    scale: tuple[float, float] = (0.9, 1.1)
    color: tuple[int, int, int] = (0, 0, 0)

    def __call__(self, image: Picture, rng: np.random.Generator) -> Picture:
        pillow = _pillow(image)
        angle = math.radians(rng.uniform(-self.degrees, self.degrees))
        factor = rng.uniform(*self.scale)
        x, y = pillow.width / 2, pillow.height / 2
        right, down = rng.uniform(-self.shift, self.shift, 2) * (pillow.width, pillow.height)
        # From a place in the result to its place in the source.
        cos, sin = math.cos(angle) / factor, math.sin(angle) / factor
        turned = _affine(cos, sin, x - cos * (x + right) - sin * (y + down),
                         -sin, cos, y + sin * (x + right) - cos * (y + down))
        return _array(turned(pillow, self.color))


# --- patches -------------------------------------------------------------------------------------------------------


def patch_grid(height: int, width: int, patch: int, limit: int) -> tuple[int, int]:
    """(rows, columns) of the largest grid of at most `limit` patches nearly in the proportions height : width.

    As in NaFlex (Tschannen et al. 2025, SigLIP 2): the sides are scaled by one factor and rounded up to whole patches.
    """
    def grid(scale: float) -> tuple[int, int]:
        return max(1, math.ceil(height * scale / patch)), max(1, math.ceil(width * scale / patch))

    low, high = 0.0, max(patch * limit / min(height, width), 1.0) + 1
    while high - low > 1e-5 * high:
        middle = (low + high) / 2
        rows, columns = grid(middle)
        low, high = (middle, high) if rows * columns <= limit else (low, middle)
    return grid(low)


def patchify(image: Picture, patch: int, limit: int, filter: Filter = "bilinear") -> tuple[
        UInt8[np.ndarray, "limit P"], Int32[np.ndarray, "limit 2"], Bool[np.ndarray, " limit"]]:
    """The picture at its own proportions as at most `limit` patches, row by row, filled up with zeros.

    Args:
      patch: pixels of a patch's side.

    Returns:
      the patches, each (row, column, channel) in order; (row, column) of each; and which are real.
    """
    rows, columns = patch_grid(image.shape[0], image.shape[1], patch, limit)
    image = resize(image, rows * patch, columns * patch, filter)
    channels = image.shape[-1]
    cut = image.reshape(rows, patch, columns, patch, channels).swapaxes(1, 2).reshape(rows * columns, -1)
    patches = np.zeros((limit, cut.shape[1]), np.uint8)
    coordinates = np.zeros((limit, 2), np.int32)
    mask = np.zeros(limit, bool)
    patches[: len(cut)] = cut
    coordinates[: len(cut)] = np.indices((rows, columns)).reshape(2, -1).T
    mask[: len(cut)] = True
    return patches, coordinates, mask
