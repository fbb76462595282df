"""Digits of 28 pixels with their labels: MNIST's files, or digits that are drawn here from stroke fonts."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from jaxgen.data import cache as caching
from jaxgen.data import glyphs
from jaxgen.data.base import Data, Progress
from jaxgen.data.batching import endless
from jaxgen.data.imagetext import View, Viewing
from jaxgen.data.pictures import idx_labels, read_idx
from jaxgen.errors import UserError

if TYPE_CHECKING:
    import grain
    import jax

VERSION = 1  # counts up when the same seed would give other digits
ORDER = 2  # counts up when the digits of a file would come in another order, or be divided otherwise
SIDE = 28
Digit = UInt8[np.ndarray, "28 28 1"]


@dataclasses.dataclass(frozen=True)
class Digits(Data):
    """Grey pictures of the digits 0 to 9, white on black.

    A batch has `image`, uint8 (B, 28, 28, 1), and `label`, int32 (B,). Held-out batches have `weights` too.

    Attributes:
      path: an IDX file of pictures, `.gz` or not, with its labels beside it (MNIST's `...images-idx3-ubyte.gz` and
        `...labels-idx1-ubyte.gz`); "" for digits drawn without end in the five fonts of `jaxgen.data.glyphs`, at any
        slant, thickness and noise.
      measure: "heldout" measures on a fixed tenth that is never trained on. "validation" leaves that tenth alone, takes
        another from what is trained on and measures there: for making choices.
      heldout: how many digits are held out when they are drawn.
      shift: augmentation: in x and in y by up to so many pixels ...
      rotation: ... turned by up to so many degrees ...
      scale: ... and larger or smaller, in x and in y, by up to this share.
    """

    path: str = ""
    measure: Literal["heldout", "validation"] = "heldout"
    heldout: int = 2000
    shift: float = 2.0
    rotation: float = 10.0
    scale: float = 0.1

    def __post_init__(self):
        if self.measure not in ("heldout", "validation"):
            raise UserError(f"data.measure is '{self.measure}'; it is 'heldout' or 'validation'")
        if self.heldout < 0:
            raise UserError(f"data.heldout is {self.heldout}; it is a number of digits, 0 or more")
        for name, most in (("shift", SIDE), ("rotation", 180), ("scale", 0.9)):
            if not 0 <= getattr(self, name) <= most:
                raise UserError(f"data.{name} is {getattr(self, name)}; it should be from 0 to {most}")

    def spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        import jax

        return {
            "image": jax.ShapeDtypeStruct((batch_size, SIDE, SIDE, 1), np.uint8),
            "label": jax.ShapeDtypeStruct((batch_size,), np.int32),
        }

    def prepare(self, cache: str | Path | None = None, progress: Progress | None = None) -> PreparedDigits:
        return PreparedDigits(self, _Files(self.path, self.measure) if self.path else None)


class _Files:
    """The digits of an IDX file, divided by a hash of their place: the first tenth is held out, the next validates."""

    def __init__(self, path: str, measure: str):
        labels = idx_labels(path)
        if not labels:
            raise UserError(f"data.path is {path}, and where its labels are cannot be told: its name should have "
                            "'images' in it, as MNIST's 'train-images-idx3-ubyte.gz' has")
        self.images, self.labels = read_idx(path), read_idx(labels).astype(np.int32)
        if self.images.shape[1:] != (SIDE, SIDE):
            raise UserError(f"{path} holds an array of shape {self.images.shape}; digits are (N, {SIDE}, {SIDE})")
        if self.labels.shape != self.images.shape[:1]:
            raise UserError(f"{labels} has {len(self.labels)} labels for the {len(self.images)} digits of {path}")
        if self.labels.max(initial=0) > 9:
            raise UserError(f"{labels} has labels up to {self.labels.max()}; digits are 0 to 9")
        tenth = np.asarray([_tenth(i) for i in range(len(self.labels))])
        measured = 0 if measure == "heldout" else 1
        self.heldout, self.train = np.flatnonzero(tenth == measured), np.flatnonzero(tenth > measured)
        if not len(self.train) or not len(self.heldout):
            raise UserError(f"{path} holds {len(self.labels)} digits, too few to train on some and measure on others")
        content = hashlib.sha256(self.images.tobytes() + self.labels.tobytes()).hexdigest()
        self.fingerprint = caching.key(ORDER, content)


def _tenth(place: int) -> int:
    """0 to 9, the same for a place for ever."""
    return int.from_bytes(hashlib.sha256(b"digit %d" % place).digest()[:4], "big") * 10 >> 32


class PreparedDigits(Viewing):
    """See `Prepared`.

    Attributes:
      classes: what the labels are called.
    """

    classes = tuple("0123456789")
    view = View(SIDE, channels=1)

    def __init__(self, data: Digits, files: _Files | None):
        self.data, self._files = data, files
        self.fingerprint = caching.key(VERSION, dataclasses.asdict(data) | {"path": files and files.fingerprint})
        self.facts = {"source": data.path or f"digits drawn in {len(glyphs.FONTS)} fonts", "classes": 10}
        if files:
            self.facts |= {"examples": len(files.train), "heldout_examples": len(files.heldout)}
        else:
            self.facts |= {"heldout_examples": data.heldout}
        self.facts["measured_on"] = data.measure

    def train(self, seed: int) -> grain.MapDataset:
        import grain

        if self._files is None:
            return grain.MapDataset.range(2**62).map(_Drawn(self.data, seed))
        files = self._files
        return endless(_Augmented(self.data, files.images, files.labels, files.train, seed), len(files.train), seed)

    def heldout(self) -> grain.MapDataset:
        import grain

        if self._files is None:
            stream = {"heldout": -1, "validation": -2}[self.data.measure]
            return grain.MapDataset.range(self.data.heldout).map(_Drawn(self.data, stream, measured=True))
        return grain.MapDataset.source(self._files.heldout).map(_Plain(self._files.images, self._files.labels))


@dataclasses.dataclass(frozen=True)
class _Plain:
    images: np.ndarray
    labels: np.ndarray

    def __call__(self, place: int) -> dict[str, np.ndarray]:
        return {"image": self.images[place][..., None], "label": self.labels[place], "weights": np.float32(1)}


@dataclasses.dataclass(frozen=True)
class _Augmented:
    data: Digits
    images: np.ndarray
    labels: np.ndarray
    places: np.ndarray
    seed: int

    def __call__(self, index: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng([0, self.seed % 2**64, index])
        place = self.places[index % len(self.places)]
        image = augment(self.images[place][..., None], rng, self.data.shift, self.data.rotation, self.data.scale)
        return {"image": image, "label": self.labels[place]}


@dataclasses.dataclass(frozen=True)
class _Drawn:
    data: Digits
    seed: int
    measured: bool = False

    def __call__(self, index: int) -> dict[str, np.ndarray]:
        # Seeds of training are streams of their own, whatever their sign.
        rng = np.random.default_rng([int(self.measured), self.seed % 2**64, index])
        label = int(rng.integers(10))
        image = draw(label, rng)
        if self.measured:
            return {"image": image, "label": np.int32(label), "weights": np.float32(1)}
        return {"image": augment(image, rng, self.data.shift, self.data.rotation, self.data.scale),
                "label": np.int32(label)}


def augment(image: Digit, rng: np.random.Generator, shift: float, rotation: float, scale: float) -> Digit:
    """Moved, turned and stretched by chance, about the middle; what comes in from outside is black."""
    if not (shift or rotation or scale):
        return image
    draws = rng.uniform(-1, 1, 5).tolist()
    angle = math.radians(rotation * draws[0])
    across, down = 1 / (1 + scale * draws[1]), 1 / (1 + scale * draws[2])
    c, s, middle = math.cos(angle), math.sin(angle), SIDE / 2
    # Pillow asks where each pixel comes from: x' = a x + b y + e, y' = d x + f y + g.
    a, b, d, f = c * across, s * across, -s * down, c * down
    e = middle - shift * draws[3] - (a + b) * middle
    g = middle - shift * draws[4] - (d + f) * middle
    picture = Image.fromarray(image[..., 0])
    moved = picture.transform(picture.size, Image.Transform.AFFINE, (a, b, e, d, f, g), Image.Resampling.BILINEAR)
    return np.asarray(moved)[..., None]


def draw(digit: int, rng: np.random.Generator) -> Digit:
    """A digit in one of the fonts with slant, size, a bend, thickness, brightness and noise by chance."""
    font = int(rng.integers(len(glyphs.FONTS)))
    slant, turn, bend_x, bend_y, x, y = rng.uniform(-1, 1, 6).tolist()
    wide, high, thick, bright, noise, phase = rng.random(6).tolist()
    half_width = 0.07 + 0.13 * thick  # in units of half the digit's height
    pieces = glyphs.segments(font, digit).reshape(-1, 2, 2).astype(np.float32)
    px, py = pieces[..., 0], pieces[..., 1]
    # Strokes by hand are never quite straight: a slow wave in each direction.
    px = px * (0.8 + 0.4 * wide) + 0.3 * slant * py + 0.08 * bend_x * np.sin(2 * py + 6 * phase)
    py = py + 0.08 * bend_y * np.sin(2.5 * px + 6 * phase)
    c, s = math.cos(0.15 * turn), math.sin(0.15 * turn)
    pieces = np.stack([c * px - s * py, s * px + c * py], -1).reshape(-1, 4)
    scale = SIDE * (0.32 + 0.07 * high)
    u = (np.arange(SIDE, dtype=np.float32) + 0.5 - SIDE / 2) / scale
    columns, rows = np.meshgrid(u - 0.05 * x, u - 0.05 * y)
    distance = np.sqrt(glyphs.squared_distance(pieces, columns.ravel(), rows.ravel())) - half_width
    ink = np.clip(0.5 - distance.reshape(SIDE, SIDE) * scale, 0, 1) * (180 + 75 * bright)
    ink += rng.standard_normal((SIDE, SIDE), np.float32) * (25 * noise)
    return np.clip(ink + 0.5, 0, 255).astype(np.uint8)[..., None]
