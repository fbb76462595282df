"""Contact sheets: where pictures and texts end up."""

import numpy as np
import pytest
from PIL import ImageFont

from jaxgen.data.sheets import COLOURS, GAP, sheet, unpatch, wrap

FONT = ImageFont.load_default(size=11)


def plain(colour, height=100, width=100):
    return np.full((height, width, 3), colour, np.uint8)


def cell(found, row, column, high, wide):
    return found[row * high : (row + 1) * high, column * wide : (column + 1) * wide]


def test_pictures_row_by_row():
    """Each in its cell, the last row not full; a wide one keeps its proportions, in the middle of its cell."""
    colours = (200, 0, 0), (0, 200, 0), (0, 0, 200)
    pictures = [plain(colours[0]), plain(colours[1]), plain(colours[2], 50, 100)]
    found = sheet(pictures, columns=2, size=100)
    side = 100 + 2 * GAP
    assert found.shape == (2 * side, 2 * side, 3) and found.dtype == np.uint8
    for (row, column), colour in zip([(0, 0), (0, 1), (1, 0)], colours, strict=True):
        inside = (cell(found, row, column, side, side) == colour).all(-1)
        rows, columns = np.nonzero(inside)
        assert (columns.min(), columns.max()) == (GAP, GAP + 99)
        assert (rows.min(), rows.max()) == ((GAP, GAP + 99) if row == 0 else (GAP + 25, GAP + 74))
        assert inside.sum() == 100 * (100 if row == 0 else 50)
    assert (cell(found, 1, 1, side, side) == 255).all()


def test_sizes():
    """Small pictures are enlarged to 96 pixels, sharp and grey ones grey; large ones shrink to 256."""
    tiny = np.zeros((4, 4, 1), np.uint8)
    tiny[:2] = 200
    found = sheet([tiny], 1)
    assert found.shape == (96 + 2 * GAP,) * 2 + (3,)
    inside = found[GAP : GAP + 96, GAP : GAP + 96]
    assert (inside[:48] == 200).all() and (inside[48:] == 0).all()
    assert sheet([plain(0, 900, 300)], 1).shape[0] == 256 + 2 * GAP
    assert sheet([], 3).ndim == 3


def test_labels_and_frames():
    """Text is below its picture, or fills a cell without one; a frame is around its own cell."""
    found = sheet([plain(90), None, plain(90)], 3, ["a black cat", "a white dog", ""], [None, "green", None])
    high, wide = found.shape[0], found.shape[1] // 3
    assert high > 100 + 2 * GAP   # a line of text
    below = [(cell(found, 0, c, high, wide)[100 + GAP :].max(-1) < 100).any() for c in range(3)]
    assert below == [True, False, False]
    assert (cell(found, 0, 1, high, wide)[20:80, 20:80] < 100).any()
    green = [(cell(found, 0, c, high, wide) == COLOURS["green"]).all(-1).any() for c in range(3)]
    assert green == [False, True, False]
    with pytest.raises(ValueError, match="at least one column"):
        sheet([None], 0)


@pytest.mark.parametrize("text", ["a black cat on a mat", "x" * 80, "one", "", "a/path/without/any/space/at/all.png b"])
@pytest.mark.parametrize("lines", [1, 2, 20])
def test_wrapped_text_fits(text, lines):
    found = wrap(text, 60, FONT, lines)
    assert len(found) <= lines and all(FONT.getlength(line) <= 60 for line in found)
    if lines == 20:
        assert "".join(found).replace(" ", "") == text.replace(" ", "")
    elif found and found[-1].endswith("…"):
        assert text.replace(" ", "").startswith("".join(found).replace(" ", "")[:-1])
    assert ("…" in "".join(found)) == (len(wrap(text, 60, FONT, 99)) > lines)


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_in_patches_are_put_together(channels):
    picture = np.random.default_rng(0).integers(0, 256, (24, 40, channels)).astype(np.uint8)
    places = np.random.default_rng(1).permutation([(r, c) for r in range(3) for c in range(5)])
    cut = [picture[8 * r : 8 * r + 8, 8 * c : 8 * c + 8].reshape(-1) for r, c in places]
    patches = np.concatenate([cut, np.full((5, 64 * channels), 77, np.uint8)])   # 5 of padding
    coordinates = np.concatenate([places, np.zeros((5, 2), int)])
    np.testing.assert_array_equal(unpatch(patches, coordinates, np.arange(20) < 15), picture)
