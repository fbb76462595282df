"""Pictures as files to pictures as arrays. (No JAX in here: reading processes import it.)"""

from __future__ import annotations

import contextlib
import functools
import io
import sys
import warnings

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image, ImageOps

# `_opened` refuses what is too large, and says so.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

Picture = UInt8[np.ndarray, "H W C"]

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".avif")
# What a stranger's file may be read as. The other formats of Pillow are rare, and some start other programs.
_FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
MAX_PIXELS = 1 << 26  # a picture of more pixels is taken for a decompression bomb


class BadImage(Exception):  # noqa: N818 (not an error of the program, but a fact about a file)
    """A picture that cannot be read; says why in a few words."""


def decode(data: bytes, background: tuple[int, int, int] = (255, 255, 255), max_pixels: int = MAX_PIXELS,
           size: int = 0) -> UInt8[np.ndarray, "H W 3"]:
    """The picture in a file's content, see `read`."""
    return np.asarray(read(data, background, max_pixels, size))


def read(data: bytes, background: tuple[int, int, int] = (255, 255, 255), max_pixels: int = MAX_PIXELS,
         size: int = 0) -> Image.Image:
    """The first frame of a PNG, JPEG, WebP, GIF, BMP, TIFF, PPM or AVIF file, turned as its EXIF orientation says.

    Palettes, grey, CMYK and 16 bits a channel become 8-bit RGB, mode "RGB"; what is transparent shows `background`.
    Colour profiles are ignored.

    Args:
      max_pixels: the most that width times height may be; it is compared before anything is unpacked.
      size: the shortest side that is wanted at least: a JPEG more than twice as large is decoded at a half, a quarter
        or an eighth of its size, still at least twice as large as wanted. 0 decodes in full.

    Raises:
      BadImage: the data is empty, cut off, damaged, of no known format, or of more than `max_pixels` pixels.
    """
    image = _opened(data, max_pixels)
    try:
        if size and image.format in ("JPEG", "MPO"):
            image.draft(None, (2 * size, 2 * size))
        image.load()
        return _rgb(_upright(image), background)
    except Exception as e:
        raise BadImage(f"it is damaged ({_why(e)})") from e


def size_of(data: bytes) -> tuple[int, int]:
    """(height, width) of the picture in a file's content, turned as its EXIF orientation says; unpacks no pixels.

    Raises:
      BadImage: the data is empty, of no known format, or damaged at its beginning.
    """
    image = _opened(data, sys.maxsize)
    width, height = image.size
    if image.format == "TIFF":  # whose size newer versions of Pillow have turned already
        width, height = image.tag_v2[256], image.tag_v2[257]
    with contextlib.suppress(Exception):  # damaged EXIF data says nothing
        if _may_be_turned(image) and image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8):
            return width, height
    return height, width


def _opened(data: bytes, max_pixels: int) -> Image.Image:
    """The picture with nothing unpacked yet."""
    if not data:
        raise BadImage("the file is empty")
    # Damaged files make Pillow raise nearly anything: OSError, SyntaxError, ValueError, struct.error, EOFError, ...
    try:
        image = Image.open(io.BytesIO(data), formats=_formats())
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as e:
        raise BadImage(f"it has more than {min(max_pixels, 2 * Image.MAX_IMAGE_PIXELS)} pixels") from e
    except Image.UnidentifiedImageError as e:
        raise BadImage("it is not a picture of a known format") from e
    except Exception as e:
        raise BadImage(f"it is damaged ({_why(e)})") from e
    width, height = image.size
    if width * height > max_pixels:
        raise BadImage(f"it has {width} x {height} pixels, more than {max_pixels}")
    if not width * height:
        raise BadImage("it has no pixels")
    return image


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)  # a Pillow may be built without some


def _why(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _may_be_turned(image: Image.Image) -> bool:
    named = {"exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp"}
    return bool(named & image.info.keys()) or image.format == "TIFF"


def _upright(image: Image.Image) -> Image.Image:
    if not _may_be_turned(image):
        return image
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF data says nothing, of a picture that is whole
        return image


def _rgb(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        clear, deep = image.info.get("transparency"), image
        image = _eight_bits(image)
        if isinstance(clear, int):  # a value of the deep one
            image.putalpha(Image.fromarray(np.where(np.asarray(deep) == clear, 0, 255).astype(np.uint8)))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        behind = Image.new("RGBA", image.size, (*background, 255))
        image = Image.alpha_composite(behind, image.convert("RGBA"))
    return image if image.mode == "RGB" else image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 or 32 bits or floating point; the high byte of 16 bits, as Pillow does for colour."""
    values = np.asarray(image)
    if image.mode == "F":
        values = values * 255 if np.nanmax(values) <= 1 else values
        return Image.fromarray(np.nan_to_num(values).clip(0, 255).astype(np.uint8))
    if image.mode == "I" and values.max() < 256:
        return Image.fromarray(values.clip(0, 255).astype(np.uint8))
    return Image.fromarray((values.clip(0, 65535) >> 8).astype(np.uint8))
