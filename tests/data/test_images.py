import io
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from jaxgen.data import images
from jaxgen.data.images import BadImage, decode

RNG = np.random.default_rng(0)
SMOOTH = np.asarray(Image.fromarray(RNG.integers(0, 256, (5, 6, 3), dtype=np.uint8)).resize((48, 40), 3))


def file(image, form="PNG", **options):
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "PPM", "GIF", "WEBP"])
def test_lossless_forms_come_as_they_were(form):
    picture = SMOOTH // 64 * 64 if form == "GIF" else SMOOTH  # GIF has 256 colours
    options = {"lossless": True} if form == "WEBP" else {}
    decoded = decode(file(picture, form, **options))
    assert decoded.dtype == np.uint8 and np.array_equal(decoded, picture)


@pytest.mark.parametrize("form", ["JPEG", "WEBP", "AVIF"])
def test_lossy_forms_come_near(form):
    if form not in images._formats():
        pytest.skip(f"Pillow without {form}")
    decoded = decode(file(SMOOTH, form, quality=95)).astype(int)
    assert decoded.shape == SMOOTH.shape and np.abs(decoded - SMOOTH).mean() < 4


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(orientation):
    # What EXIF's eight values mean: where row 0 and column 0 of the file are in the picture.
    turned = {1: lambda x: x, 2: np.fliplr, 3: lambda x: np.rot90(x, 2), 4: np.flipud,
              5: lambda x: x.swapaxes(0, 1), 6: lambda x: np.rot90(x, -1),
              7: lambda x: np.rot90(x, 2).swapaxes(0, 1), 8: lambda x: np.rot90(x, 1)}[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    for form in ("PNG", "TIFF"):
        assert np.array_equal(decode(file(SMOOTH, form, exif=exif)), turned(SMOOTH))
    jpeg = decode(file(SMOOTH, "JPEG", exif=exif, quality=95)).astype(int)
    assert np.abs(jpeg - turned(SMOOTH)).mean() < 4


def test_damaged_exif_says_nothing():
    data = file(SMOOTH, "JPEG", exif=b"Exif\0\0nonsense that is no TIFF header")
    assert decode(data).shape == SMOOTH.shape


def test_grey():
    grey = SMOOTH[..., 0]
    for form in ("PNG", "TIFF", "PPM"):
        assert np.array_equal(decode(file(grey, form)), np.repeat(grey[..., None], 3, -1))
    black_and_white = Image.fromarray(grey).convert("1")
    expected = np.asarray(black_and_white).astype(np.uint8) * 255
    assert np.array_equal(decode(file(black_and_white)), np.repeat(expected[..., None], 3, -1))


@pytest.mark.parametrize("background", [(255, 255, 255), (10, 20, 30)])
def test_alpha_shows_the_background(background):
    alpha = np.linspace(0, 255, SMOOTH.shape[0] * SMOOTH.shape[1]).reshape(SMOOTH.shape[:2]).astype(np.uint8)
    share = alpha[..., None] / 255.0
    expected = SMOOTH * share + np.array(background) * (1 - share)
    decoded = decode(file(np.dstack([SMOOTH, alpha])), background)
    assert np.abs(decoded - expected).max() <= 1
    grey_alpha = Image.fromarray(np.dstack([SMOOTH[..., 0], alpha]), "LA")
    expected = SMOOTH[..., :1] * share + np.array(background) * (1 - share)
    assert np.abs(decode(file(grey_alpha), background) - expected).max() <= 1


def test_palettes():
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [9, 8, 7]], np.uint8)
    index = RNG.integers(0, 4, (8, 9)).astype(np.uint8)
    image = Image.fromarray(index, "P")
    image.putpalette(colours.tobytes())
    assert np.array_equal(decode(file(image)), colours[index])
    # One palette entry transparent, and one half so.
    data = file(image, transparency=bytes([255, 0, 255, 128]))
    expected = colours.astype(float)
    expected[1], expected[3] = (10, 20, 30), (expected[3] * 128 + np.array([10, 20, 30]) * 127) / 255
    assert np.abs(decode(data, (10, 20, 30)) - expected[index]).max() <= 1
    # A colour of an RGB picture that stands for transparency.
    data = file(colours[index], transparency=(0, 0, 255))
    expected = colours.copy()
    expected[2] = (10, 20, 30)
    assert np.array_equal(decode(data, (10, 20, 30)), expected[index])


def test_sixteen_bits():
    values = RNG.integers(0, 65536, (7, 5)).astype(np.uint16)
    for form in ("PNG", "TIFF"):
        assert np.array_equal(decode(file(Image.fromarray(values), form))[..., 1], values >> 8)
    colour = RNG.integers(0, 65536, (7, 5, 3)).astype(np.uint16)
    assert np.array_equal(decode(png(colour)), colour >> 8)
    floats = Image.fromarray(np.linspace(0, 1, 35, dtype=np.float32).reshape(7, 5))
    assert np.abs(decode(file(floats, "TIFF"))[..., 0] - np.linspace(0, 255, 35).reshape(7, 5)).max() <= 1


def png(values):
    """A PNG of 16 bits a channel, which Pillow does not write: signature, header, rows of filter 0."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, _ = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_a_transparent_grey_of_sixteen_bits_shows_the_background():
    values = np.array([[0, 300, 40000]], np.uint16)
    data = io.BytesIO()
    Image.fromarray(values).save(data, "PNG", transparency=300)
    found = decode(data.getvalue(), background=(10, 20, 30))
    assert found.tolist() == [[[0, 0, 0], [10, 20, 30], [156, 156, 156]]]


def test_cmyk():
    ink = np.zeros((16, 16, 4), np.uint8)
    ink[:, :8, 0], ink[:, 8:, 3] = 255, 255  # cyan, black
    for form in ("TIFF", "JPEG"):
        decoded = decode(file(Image.fromarray(ink, "CMYK"), form, quality=95) if form == "JPEG" else
                         file(Image.fromarray(ink, "CMYK"), form)).astype(int)
        assert np.abs(decoded[:, :7] - [0, 255, 255]).max() < 12 and np.abs(decoded[:, 9:]).max() < 12


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_frame(form):
    frames = [Image.fromarray(np.full((12, 10, 3), value, np.uint8)) for value in (200, 100, 0)]
    options = {"lossless": True} if form == "WEBP" else {}
    data = file(frames[0], form, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert np.array_equal(decode(data), np.full((12, 10, 3), 200, np.uint8))


@pytest.mark.parametrize("data, reason", [
    (b"", "the file is empty"),
    (b"\0" * 1000, "not a picture"),
    (b"<html><body>404 Not Found</body></html>", "not a picture"),
    (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n", "not a picture"),  # which starts Ghostscript
    (file(SMOOTH)[:8], "not a picture|damaged"),
])
def test_what_is_no_picture(data, reason):
    with pytest.raises(BadImage, match=reason):
        decode(data)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.7])
def test_what_is_cut_off(form, share):
    noise = RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)  # of which nothing can be guessed
    data = file(noise, form)
    with pytest.raises(BadImage):
        decode(data[: int(len(data) * share)])


def test_flipped_bytes_give_a_picture_or_bad_image():
    """Whatever is damaged, nothing else is raised."""
    whole = {form: file(SMOOTH, form) for form in ("PNG", "JPEG", "WEBP", "GIF", "TIFF")}
    bad = 0
    for data in whole.values():
        for place in RNG.integers(0, len(data), 60):
            broken = bytearray(data)
            broken[place] ^= int(RNG.integers(1, 256))
            try:
                assert decode(bytes(broken), max_pixels=1 << 20).ndim == 3
            except BadImage as e:
                assert str(e)
                bad += 1
    assert bad > 30


def test_bombs():
    """The header promises more pixels than the file may have; nothing is unpacked."""
    def promising(width, height):
        data = bytearray(file(np.zeros((4, 4, 3), np.uint8)))
        data[16:24] = struct.pack(">II", width, height)
        data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
        return bytes(data)

    with pytest.raises(BadImage, match="9000 x 9000 pixels, more than 67108864"):
        decode(promising(9000, 9000))
    with pytest.raises(BadImage, match="more than"):
        decode(promising(60000, 60000))  # which Pillow itself refuses
    code = "import sys, jaxgen.data.images as i; i.decode(sys.stdin.buffer.read())"
    told = subprocess.run([sys.executable, "-c", code], input=promising(10000, 10000), capture_output=True).stderr
    assert b"more than 67108864" in told and b"Warning" not in told, "of such a size Pillow warns"
    with pytest.raises(BadImage, match="48 x 40 pixels, more than 1000"):
        decode(file(SMOOTH), max_pixels=1000)
    assert decode(file(SMOOTH), max_pixels=48 * 40).shape == (40, 48, 3)


def test_a_large_jpeg_is_decoded_smaller_but_not_too_small():
    large = np.asarray(Image.fromarray(SMOOTH).resize((800, 600), 3))
    data = file(large, "JPEG", quality=95)
    assert decode(data).shape == (600, 800, 3)
    for size, shape in ((600, (600, 800)), (151, (600, 800)), (150, (300, 400)), (75, (150, 200)), (20, (75, 100))):
        assert decode(data, size=size).shape[:2] == shape
        assert min(decode(data, size=size).shape[:2]) >= min(2 * size, 600)
    small = np.asarray(Image.fromarray(decode(data, size=64)).resize((80, 60), Image.Resampling.BICUBIC)).astype(int)
    full = np.asarray(Image.fromarray(decode(data)).resize((80, 60), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(small - full).mean() < 1
    assert decode(file(large), size=20).shape == (600, 800, 3)  # of other forms there is one size
