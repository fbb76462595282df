"""What is done to a picture before it is an example: small pure classes, picture in, picture out.

Pictures are uint8 (H, W, C), RGB or (C = 1) grey. From one transform to the next they go as Pillow's images, since its
operations are the fastest at hand, and turning one form into the other costs as much as some of them. All randomness
comes from the generator that is passed; `apply` gives each transform of a row its own. (No JAX in here: reading
processes import it.)
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

from jaxgen.data.images import MAX_PIXELS, BadImage, Picture
from jaxgen.errors import UserError

Filter = Literal["bilinear", "bicubic", "lanczos", "nearest"]
FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC,
            "lanczos": Image.Resampling.LANCZOS, "nearest": Image.Resampling.NEAREST}


class Transform(abc.ABC):
    """A frozen dataclass that is called with a picture and a generator."""

    def __call__(self, image: Picture, rng: np.random.Generator) -> Picture:
        """The transformed picture, in an array of its own."""
        return array(self.transform(pillow(image), rng))

    @abc.abstractmethod
    def transform(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """The same of Pillow's images, of mode "RGB" or "L"; does not write into `image`.

        Raises:
          BadImage: the result would be too large, of a picture that is far longer than wide or wider than long.
        """

    def least(self) -> int:
        """The shortest side that its input needs for nothing to be lost; 0: all there is."""
        return 0


def apply(transforms: Sequence[Transform], image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """The transforms one after the other, each with random numbers of its own: none changes what another draws.

    Args:
      rng: of `np.random.default_rng`; transform k draws from number k * 2^64 on.
    """
    numbers = rng.bit_generator
    start = numbers.state if len(transforms) > 1 else None
    for k, transform in enumerate(transforms):
        if k:
            numbers.state = start  # in a third of the time of `rng.spawn`
            numbers.advance(k << 64)
        image = transform.transform(image, rng)
    return image


def pillow(image: Picture) -> Image.Image:
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def array(image: Image.Image) -> Picture:
    values = np.asarray(image)
    return values[..., None] if values.ndim == 2 else values


# --- size ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Resize(Transform):
    """To a size in pixels; filters are widened when the picture shrinks, so that nothing aliases.

    Attributes:
      size: pixels.
      mode: "shortest" makes the shorter side `size` and "fit" the longer one, both in the picture's own proportions;
        "exact" makes both sides `size`.
      filter: how pixels are interpolated.
    """

    size: int = 224
    mode: Literal["shortest", "exact", "fit"] = "shortest"
    filter: Filter = "bicubic"

    def transform(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        scale = self.size / (min if self.mode == "shortest" else max)(image.size)
        size = (self.size, self.size) if self.mode == "exact" else tuple(max(1, round(n * scale)) for n in image.size)
        _check_size(image, *size)
        return image if image.size == size else image.resize(size, FILTERS[self.filter])

    def least(self) -> int:
        return self.size


@dataclasses.dataclass(frozen=True)
class CenterCrop(Transform):
    """The middle `size` x `size` pixels; a smaller picture is enlarged first."""

    size: int = 224

    def transform(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        if min(image.size) < self.size:
            image = Resize(self.size).transform(image, rng)
        left, top = ((side - self.size) // 2 for side in image.size)
        return image.crop((left, top, left + self.size, top + self.size))


@dataclasses.dataclass(frozen=True)
class Cover(Transform):
    """To `height` x `width` in the picture's own proportions; what is too much on one axis is cut off on both sides."""

    height: int = 224
    width: int = 224
    filter: Filter = "bicubic"

    def transform(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        size = self.width, self.height
        if image.size == size:
            return image
        scale = max(new / old for new, old in zip(size, image.size, strict=True))
        left, top = (max(0.0, (old - new / scale) / 2) for new, old in zip(size, image.size, strict=True))
        return image.resize(size, FILTERS[self.filter], box=(left, top, image.width - left, image.height - top))

    def least(self) -> int:
        return max(self.height, self.width)


@dataclasses.dataclass(frozen=True)
class Pad(Transform):
    """Filled up to a square in one colour, the picture in the middle.

    Attributes:
      color: of the new pixels; for grey pictures its first value.
    """

    color: tuple[int, int, int] = (255, 255, 255)

    def transform(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        side = max(image.size)
        return _framed(image, side, side, self.color)


def _check_size(image: Image.Image, width: int, height: int) -> None:
    """Raises BadImage where a picture would grow beyond `MAX_PIXELS`."""
    if width * height > max(MAX_PIXELS, image.width * image.height):
        raise BadImage(f"its {image.width} x {image.height} pixels would become {width} x {height}")


def _framed(image: Image.Image, width: int, height: int, color: tuple[int, ...]) -> Image.Image:
    if image.size == (width, height):
        return image
    _check_size(image, width, height)
    frame = Image.new(image.mode, (width, height), _fill(image, color))
    frame.paste(image, ((width - image.width) // 2, (height - image.height) // 2))
    return frame


def _fill(image: Image.Image, color: tuple[int, ...]) -> tuple[int, ...] | int:
    return tuple(color) if image.mode == "RGB" else color[0]


@dataclasses.dataclass(frozen=True)
class RandomCrop(Transform):
    """`size` x `size` pixels at a random place, of the picture with `padding` pixels of `color` around it."""

    size: int = 32
    padding: int = 4
    color: tuple[int, int, int] = (0, 0, 0)

    def transform(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        wide = _framed(image, image.width + 2 * self.padding, image.height + 2 * self.padding, self.color)
        if min(wide.size) < self.size:
            wide = Resize(self.size).transform(wide, rng)
        left, top = (int(rng.integers(side - self.size + 1)) for side in wide.size)
        return wide.crop((left, top, left + self.size, top + self.size))


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

    def transform(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        return image.resize((self.size, self.size), FILTERS[self.filter], box=self.box(*image.size, rng))

    def box(self, width: int, height: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
        """(left, top, right, bottom) of the part, of a picture of that size."""
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        for _ in range(10):
            u = rng.random(4).tolist()
            area = height * width * (self.scale[0] + u[0] * (self.scale[1] - self.scale[0]))
            ratio = math.exp(low + u[1] * (high - low))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                left, top = int(u[2] * (width - w + 1)), int(u[3] * (height - h + 1))
                return left, top, left + w, top + h
        # A picture so long that hardly any part fits: its middle, as near to the range of ratios as it can be.
        w = min(width, max(1, round(height * self.ratio[1])))
        h = min(height, max(1, round(width / self.ratio[0])))
        left, top = (width - w) // 2, (height - h) // 2
        return left, top, left + w, top + h

    def least(self) -> int:
        return math.ceil(self.size / math.sqrt(self.scale[0] * min(self.ratio[0], 1 / self.ratio[1])))


# --- colour and form -----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Flip(Transform):
    """Left and right exchanged, with probability `chance`."""

    chance: float = 0.5

    def transform(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < self.chance else image


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

    def transform(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        changed = image
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
        return changed


def _turn_hue(image: Image.Image, turn: float) -> Image.Image:
    hue, saturation, value = image.convert("HSV").split()
    hue = hue.point([(i + round(turn * 256)) % 256 for i in range(256)])
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


# RandAugment's operations (Cubuk et al. 2019, table 6): strength is 0..1 of the largest, sign is -1 or 1.
def _affine(a: float = 1, b: float = 0, c: float = 0, d: float = 0, e: float = 1,
            f: float = 0) -> Callable[[Image.Image, tuple[int, ...]], Image.Image]:
    return lambda image, fill: image.transform(image.size, Image.Transform.AFFINE, (a, b, c, d, e, f),
                                               Image.Resampling.BILINEAR, fillcolor=_fill(image, fill))


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

    def transform(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        changed = image
        names = [name for name in _OPERATIONS if changed.mode == "RGB" or name not in _COLOURED]
        for _ in range(self.layers):
            operation, sign = _OPERATIONS[names[rng.integers(len(names))]], int(rng.choice((-1, 1)))
            changed = operation(changed, self.magnitude / 10, sign, self.color)
        return changed


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

    def transform(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        angle = math.radians(rng.uniform(-self.degrees, self.degrees))
        factor = rng.uniform(*self.scale)
        x, y = image.width / 2, image.height / 2
        right, down = rng.uniform(-self.shift, self.shift, 2) * (image.width, image.height)
        # From a place in the result to its place in the source.
        cos, sin = math.cos(angle) / factor, math.sin(angle) / factor
        turned = _affine(cos, sin, x - cos * (x + right) - sin * (y + down),
                         -sin, cos, y + sin * (x + right) - cos * (y + down))
        return turned(image, self.color)


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


def patchify(image: Image.Image, patch: int, limit: int, filter: Filter = "bilinear") -> tuple[
        UInt8[np.ndarray, "limit P"], Int32[np.ndarray, "limit 2"], Bool[np.ndarray, " limit"]]:
    """The picture at its own proportions as at most `limit` patches, row by row, filled up with zeros.

    Args:
      patch: pixels of a patch's side.

    Returns:
      the patches, each (row, column, channel) in order; (row, column) of each; and which are real.
    """
    rows, columns = patch_grid(image.height, image.width, patch, limit)
    size = columns * patch, rows * patch
    pixels = array(image if image.size == size else image.resize(size, FILTERS[filter]))
    cut = pixels.reshape(rows, patch, columns, patch, -1).swapaxes(1, 2).reshape(rows * columns, -1)
    patches = np.zeros((limit, cut.shape[1]), np.uint8)
    coordinates = np.zeros((limit, 2), np.int32)
    mask = np.zeros(limit, bool)
    patches[: len(cut)] = cut
    coordinates[: len(cut)] = np.indices((rows, columns)).reshape(2, -1).T
    mask[: len(cut)] = True
    return patches, coordinates, mask
