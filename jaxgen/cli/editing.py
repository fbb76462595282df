"""The pictures that a person gives to `jaxgen sample`: to begin with, to be edited, filled, extended or enlarged."""

import argparse
import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jaxgen.data import images
from jaxgen.errors import UserError
from jaxgen.sampling.diffusion import Edit
from jaxgen.tasks.beside import Beside, Masked, Smaller

OPTIONS = ("mask", "extend", "strength", "image_noise")
"""What only goes with an --image."""


@dataclasses.dataclass(frozen=True, eq=False)
class Given:
    """What is given of pictures, for one."""

    shape: tuple[int, ...]
    """(H, W, C) of what is drawn."""
    arrays: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    """For the task's `beside`, by name, with a batch dimension of 1."""
    pixels: np.ndarray | None = None
    """uint8 (1, H, W, C): what is begun with."""
    mask: np.ndarray | None = None
    """uint8 (H, W): where something new is wanted, if what is there is put back in each step."""
    strength: float = 1.0

    def edit(self, opened: Any, count: int) -> Edit | None:
        """The same as what the network knows, so many times."""
        if self.pixels is None:
            return None
        start = opened.experiment.task.values(opened.params, opened.state, {"image": self.pixels})
        start, mask = np.asarray(start, np.float32), None
        if self.mask is not None:  # of latents, a place is new where any of its pixels is
            high, wide = start.shape[1:3]
            covered = np.asarray(Image.fromarray(self.mask).resize((wide, high), Image.Resampling.BOX), np.float32)
            mask = (covered > (127 if high == self.shape[0] else 0)).astype(np.float32)
            mask = np.repeat(mask[None, ..., None], count, 0)
        return Edit(np.repeat(start, count, 0), self.strength, mask)


def given(arguments: argparse.Namespace, beside: Beside | None, shape: tuple[int, ...], run: Any) -> Given:
    """What is given for a run whose pictures are of a shape (H, W, C). UserError for what it is of no use for."""
    if not arguments.image:
        for name in OPTIONS:
            if getattr(arguments, name) is not None:
                raise UserError(f"--{name.replace('_', '-')} needs a picture to begin with: --image FILE")
        if beside is not None and not isinstance(beside, Masked):
            what = "enlarges" if isinstance(beside, Smaller) else "edits"
            raise UserError(f"{run} {what} pictures: give one with --image FILE")
        if beside is None:
            return Given(shape)
        all_new = {"before": np.zeros((1, *shape), np.uint8), "mask": np.ones((1, *shape[:2], 1), np.float32)}
        return Given(shape, all_new)
    picture = opened_picture(arguments.image).convert("L" if shape[2] == 1 else "RGB")
    if isinstance(beside, Smaller):
        return _to_enlarge(arguments, beside, picture, shape, run)
    if arguments.image_noise is not None:
        raise UserError(f"--image-noise is of no use here: {run} does not enlarge pictures")

    mask = None
    if arguments.mask:
        mask = opened_picture(arguments.mask).convert("L")
        if mask.size != picture.size:
            raise UserError(
                f"the mask {arguments.mask} is of {mask.width} x {mask.height} pixels, and the picture "
                f"{arguments.image} of {picture.width} x {picture.height}; they should be the same"
            )
    picture = np.asarray(picture.resize((shape[1], shape[0]), Image.Resampling.LANCZOS)).reshape(shape)
    if mask is not None:
        mask = np.asarray(mask.resize((shape[1], shape[0]), Image.Resampling.BOX))
        if not (mask > 127).any():
            raise UserError(f"the mask {arguments.mask} is black everywhere: white is what is to be made anew")
    if arguments.extend is not None:
        left, top, right, bottom = sides_of(arguments.extend)
        around = ((top, bottom), (left, right))
        picture = np.pad(picture, (*around, (0, 0)), "edge")
        known = np.zeros(shape[:2], np.uint8) if mask is None else mask
        mask = np.pad(known, around, constant_values=255)
    shape, pixels = picture.shape, picture[None]
    strength = arguments.strength if arguments.strength is not None else 0.6 if mask is None else 1.0
    if isinstance(beside, Masked):
        hole = np.full(shape[:2], 255, np.uint8) if mask is None else mask
        arrays = {"before": pixels, "mask": (hole > 127).astype(np.float32)[None, ..., None]}
        return Given(shape, arrays, pixels if strength < 1 else None, None, strength)
    if beside is None:
        return Given(shape, {}, pixels, mask, strength)
    if arguments.strength is None:
        strength = 1.0  # the picture is seen: nothing has to be left of it in the noise
    return Given(shape, {"before": pixels}, pixels if strength < 1 or mask is not None else None, mask, strength)


def _to_enlarge(
    arguments: argparse.Namespace, beside: Smaller, picture: Image.Image, shape: tuple[int, ...], run: Any
) -> Given:
    """The picture as it is, or with --size of the size that is enlarged to that."""
    for name in ("mask", "extend", "strength", "aspect"):
        if getattr(arguments, name) is not None:
            raise UserError(f"--{name} is of no use here: {run} enlarges pictures, {beside.factor} times")
    width, height = picture.size
    if arguments.size:
        if shape[0] % beside.factor or shape[1] % beside.factor:
            raise UserError(f"--size is {arguments.size}, which should be whole pixels times {beside.factor}")
        height, width = shape[0] // beside.factor, shape[1] // beside.factor
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    level = arguments.image_noise or 0.0
    if level > beside.noise:
        raise UserError(f"--image-noise is {level:g}, and {run} has learned up to {beside.noise:g}")
    pixels = np.asarray(picture).reshape(1, height, width, shape[2])
    shape = (height * beside.factor, width * beside.factor, shape[2])
    return Given(shape, {"small": pixels, "level": np.full(1, level, np.float32)})


def sides_of(text: str) -> tuple[int, int, int, int]:
    """Pixels at the left, top, right and bottom."""
    match = re.fullmatch(r"(\d{1,5}),(\d{1,5}),(\d{1,5}),(\d{1,5})", text)
    sides = tuple(map(int, match.groups())) if match else ()
    if not any(sides):
        raise UserError(
            f"--extend is {text!r}, which should be like 0,0,32,0: pixels at the left, top, right and bottom"
        )
    return sides


def opened_picture(file: str) -> Image.Image:
    """A picture file; UserError where it is none."""
    try:
        return images.read(Path(file).read_bytes())
    except images.BadImage as error:
        raise UserError(f"{file} cannot be read: {error}") from None
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
