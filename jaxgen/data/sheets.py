"""Contact sheets: pictures in rows and columns, with what there is to say of them."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

GAP, LINE, LINES = 6, 14, 3   # pixels between cells; pixels of a line of text; lines below a picture
COLOURS = {"green": (30, 160, 60), "red": (200, 40, 40)}


def png(image: np.ndarray, text: Mapping[str, str] | None = None) -> bytes:
    """A picture, uint8 (H, W, 1 or 3), as a PNG file's content, with texts that it is to carry by name."""
    content, info = io.BytesIO(), PngInfo()
    for name, value in (text or {}).items():
        info.add_itxt(name, value)
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(content, "PNG", pnginfo=info)
    return content.getvalue()


def sheet(
    images: Sequence[np.ndarray | None],
    columns: int,
    labels: Sequence[str] = (),
    frames: Sequence[str | None] = (),
    size: int = 0,
) -> np.ndarray:
    """A contact sheet, uint8 (H, W, 3).

    Args:
      images: uint8 (h, w, 1 or 3), row by row; None for a cell of text alone.
      columns: cells of a row.
      labels: the text of each cell, cut to what fits; below its picture.
      frames: the colour of each cell's frame: green, red or None.
      size: pixels of a cell's side; 0 for the largest picture's, at least 96 and at most 256.
    """
    if columns < 1:
        raise ValueError(f"a sheet has at least one column, not {columns}")
    largest = max((max(i.shape[:2]) for i in images if i is not None), default=0)
    size = size or min(max(largest, 96), 256)
    labels = [*labels, *[""] * (len(images) - len(labels))]
    frames = [*frames, *[None] * (len(images) - len(frames))]
    font = ImageFont.load_default(size=11)
    wrapped = [
        wrap(text, size, font, LINES) if image is not None else wrap(text, size - GAP, font, max(size // LINE, 1))
        for image, text in zip(images, labels, strict=True)
    ]
    below = LINE * max((len(t) for t, i in zip(wrapped, images, strict=True) if i is not None), default=0)
    wide, high = size + 2 * GAP, size + below + 2 * GAP
    rows = -(-len(images) // columns)
    canvas = Image.new("RGB", (max(columns * wide, 1), max(rows * high, 1)), "white")
    draw = ImageDraw.Draw(canvas)
    for n, (image, lines, frame) in enumerate(zip(images, wrapped, frames, strict=True)):
        left, top = n % columns * wide + GAP, n // columns * high + GAP
        if image is not None:
            picture = fitted(image, size)
            canvas.paste(picture, (left + (size - picture.width) // 2, top + (size - picture.height) // 2))
        if frame:
            draw.rectangle((left - 3, top - 3, left + size + 2, top + size + 2), outline=COLOURS[frame], width=3)
        start = top + (size if image is not None else (size - LINE * len(lines)) // 2)
        for k, line in enumerate(lines):
            draw.text((left if image is not None else left + GAP // 2, start + k * LINE), line, fill="black", font=font)
    return np.asarray(canvas)


def fitted(image: np.ndarray, size: int) -> Image.Image:
    """The picture with its longer side `size`; small ones are enlarged without smoothing."""
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).convert("RGB")
    scale = size / max(picture.size)
    shape = tuple(max(1, round(side * scale)) for side in picture.size)
    return picture.resize(shape, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)


def wrap(text: str, width: int, font: ImageFont.ImageFont, lines: int) -> list[str]:
    """The text in at most so many lines of `width` pixels; an ellipsis stands for what does not fit."""
    made: list[str] = []
    words = text.split()
    while words:
        line = words.pop(0)
        while words and font.getlength(f"{line} {words[0]}") <= width:
            line += " " + words.pop(0)
        kept = next((n for n in range(len(line), 1, -1) if font.getlength(line[:n]) <= width), 1)
        if kept < len(line):   # one long word, such as a path
            words.insert(0, line[kept:])
            line = line[:kept]
        if len(made) + 1 == lines and words:
            while line and font.getlength(line + "…") > width:
                line = line[:-1]
            return [*made, line + "…"]
        made.append(line)
    return made


def unpatch(patches: np.ndarray, coordinates: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The picture that was cut into patches, uint8 (H, W, C).

    Args:
      patches: uint8 (N, P * P * C), each patch row by row; C is 1 or 3.
      coordinates: (N, 2), the row and column of each patch in the grid.
      mask: bool (N,), which patches are real.
    """
    channels = 1 if round(patches.shape[1] ** 0.5) ** 2 == patches.shape[1] else 3
    side = round((patches.shape[1] / channels) ** 0.5)
    places = coordinates[mask]
    high, wide = places.max(0) + 1
    grid = np.zeros((high, wide, side, side, channels), np.uint8)
    grid[places[:, 0], places[:, 1]] = patches[mask].reshape(-1, side, side, channels)
    return grid.transpose(0, 2, 1, 3, 4).reshape(high * side, wide * side, channels)
