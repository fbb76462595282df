import dataclasses

import numpy as np
import pytest
from PIL import Image

from jaxgen.data import transforms
from jaxgen.data.images import BadImage
from jaxgen.data.transforms import (
    CenterCrop,
    ColorJitter,
    Flip,
    Pad,
    RandAugment,
    RandomAffine,
    RandomCrop,
    RandomResizedCrop,
    Resize,
    apply,
    array,
    patch_grid,
    patchify,
    pillow,
)
from jaxgen.errors import UserError

RNG = np.random.default_rng(0)
PICTURE = np.asarray(Image.fromarray(RNG.integers(0, 256, (9, 7, 3), dtype=np.uint8)).resize((60, 40), 3))
GREY = PICTURE[..., :1]
ALL = [Resize(24), Resize(24, "exact"), Resize(24, "fit"), CenterCrop(24), Pad(), RandomCrop(24), RandomResizedCrop(24),
       Flip(), ColorJitter(), RandAugment(), RandomAffine()]


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize("picture", [PICTURE, GREY], ids=["colour", "grey"])
@pytest.mark.parametrize("transform", ALL, ids=lambda t: type(t).__name__)
def test_pure(transform, picture):
    """The same generator gives the same picture, what comes in is left alone, and channels stay."""
    before = picture.copy()
    results = [transform(picture, rng(seed)) for seed in (1, 1, 2, 3, 4, 5)]
    assert np.array_equal(picture, before)
    assert all(r.dtype == np.uint8 and r.shape[-1] == picture.shape[-1] for r in results)
    assert np.array_equal(results[0], results[1])
    random = isinstance(transform, Flip | ColorJitter | RandAugment | RandomAffine | RandomCrop | RandomResizedCrop)
    assert any(not np.array_equal(results[0], r) for r in results[2:]) == random
    assert dataclasses.replace(transform) == transform and hash(transform) == hash(dataclasses.replace(transform))


def test_each_transform_has_randomness_of_its_own():
    """A transform put before others, or drawing more, changes nothing of what the others draw."""
    drawn = []

    @dataclasses.dataclass(frozen=True)
    class Draw(transforms.Transform):
        count: int

        def transform(self, image, rng):
            drawn.append(rng.random(self.count)[-1] if self.count else None)
            return image

    for first in (1, 5, 0):
        apply((Draw(first), Draw(1), Draw(1)), pillow(PICTURE), rng(7))
    one, other = drawn[1:3], drawn[4:6]
    assert one == other == drawn[7:9] and one[0] != one[1] != drawn[0]


@pytest.mark.parametrize("transform", [Resize(224), CenterCrop(224), RandomCrop(224, padding=0), Pad()],
                         ids=lambda t: type(t).__name__)
def test_no_picture_grows_without_bounds(transform):
    for side in ((1, 10_000), (10_000, 1)):
        with pytest.raises(BadImage, match="pixels would become"):
            transform(np.zeros((*side, 3), np.uint8), rng())
    assert Resize(224, "fit")(np.zeros((1, 10_000, 3), np.uint8), rng()).shape == (1, 224, 3)


def test_sizes():
    assert Resize(20)(PICTURE, rng()).shape == (20, 30, 3)
    assert Resize(30, "fit")(PICTURE, rng()).shape == (20, 30, 3)
    assert Resize(30, "exact")(PICTURE, rng()).shape == (30, 30, 3)
    assert Resize(3, "fit")(np.zeros((1, 300, 3), np.uint8), rng()).shape == (1, 3, 3)
    assert np.array_equal(CenterCrop(20)(PICTURE, rng()), PICTURE[10:30, 20:40])
    assert CenterCrop(50)(PICTURE, rng()).shape == (50, 50, 3)
    assert RandomCrop(100)(PICTURE, rng()).shape == (100, 100, 3)
    padded = Pad((1, 2, 3))(PICTURE, rng())
    assert padded.shape == (60, 60, 3) and np.array_equal(padded[10:50], PICTURE)
    assert (padded[:10] == (1, 2, 3)).all() and (padded[50:] == (1, 2, 3)).all()


@pytest.mark.parametrize("filter", ["bilinear", "bicubic", "lanczos"])
def test_resizing_does_not_alias(filter):
    """Stripes that are finer than the target's pixels become their mean, not stripes of another width."""
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 200
    small = Resize(15, filter=filter)(stripes, rng()).astype(int)[2:-2, 2:-2]
    assert np.abs(small - 100).max() <= 4
    assert Resize(15, filter="nearest")(stripes, rng()).std() > 50


def test_resizing_is_the_triangle_filter():
    """Against the filter written out: weights 1 - |x| / scale around the middle of each target pixel."""
    line = RNG.integers(0, 256, (8, 40, 3), dtype=np.uint8)
    scale = 40 / 8
    middle = (np.arange(8) + 0.5) * scale
    weights = np.maximum(0, 1 - np.abs(np.arange(40) + 0.5 - middle[:, None]) / scale)
    expected = np.einsum("ow,hwc->hoc", weights / weights.sum(1, keepdims=True), line.astype(float))
    small = Resize(8, "exact", "bilinear")(line, rng())
    assert np.abs(small - expected).max() <= 1


def test_random_resized_crops_keep_to_their_ranges():
    crop = RandomResizedCrop(8, scale=(0.2, 0.6), ratio=(0.5, 2.0))
    boxes = np.array([crop.box(90, 60, rng(seed)) for seed in range(500)])
    left, top, right, bottom = boxes.T
    assert left.min() >= 0 and top.min() >= 0 and right.max() <= 90 and bottom.max() <= 60
    share = (right - left) * (bottom - top) / (90 * 60)
    ratio = (right - left) / (bottom - top)
    assert 0.19 < share.min() < 0.23 and 0.55 < share.max() < 0.62 and abs(share.mean() - 0.4) < 0.03
    assert 0.47 < ratio.min() < 0.6 and 1.7 < ratio.max() < 2.1
    assert abs(np.log(ratio).mean()) < 0.15 and len({tuple(b) for b in boxes}) > 450
    # Nothing fits in a picture so long: its middle.
    assert RandomResizedCrop(8).box(1000, 10, rng()) == (493, 0, 506, 10)
    assert np.array_equal(RandomResizedCrop(40, (1, 1), (1, 1))(PICTURE[:, :40], rng()), PICTURE[:, :40])


def test_how_small_a_picture_may_be_decoded():
    crop = RandomResizedCrop(32, scale=(0.25, 1.0))
    least = crop.least()
    for seed in range(200):
        left, top, right, bottom = crop.box(least, least * 2, rng(seed))
        assert min(right - left, bottom - top) >= 32 - 1
    assert Resize(32).least() == 32 and Flip().least() == CenterCrop().least() == 0


def test_flip():
    flipped = [Flip(0.3)(PICTURE, rng(seed)) for seed in range(300)]
    mirrored = [np.array_equal(f, PICTURE[:, ::-1]) for f in flipped]
    assert all(m or np.array_equal(f, PICTURE) for m, f in zip(mirrored, flipped, strict=True))
    assert 60 < sum(mirrored) < 120
    assert np.array_equal(Flip(1.0)(GREY, rng()), GREY[:, ::-1])


def test_colour_jitter():
    assert np.array_equal(ColorJitter(0, 0, 0, 0)(PICTURE, rng()), PICTURE)
    for seed in range(20):
        brighter = ColorJitter(0.5, 0, 0, 0)(PICTURE, rng(seed)).astype(float)
        factor = brighter[PICTURE.max(-1) < 150].sum() / PICTURE[PICTURE.max(-1) < 150].sum()
        assert 0.48 < factor < 1.52 and np.abs(brighter - np.clip(PICTURE * factor, 0, 255)).max() < 4
    turned = ColorJitter(0, 0, 0, 0.5)(np.full((2, 2, 3), (255, 0, 0), np.uint8), rng(3))
    assert turned.max() == 255 and turned.min() == 0 and turned[0, 0].tolist() != [255, 0, 0]  # another pure colour
    grey = ColorJitter(0, 0, 0.9, 0)(np.repeat(GREY, 3, -1), rng(1))
    assert np.abs(grey.astype(int) - GREY).max() <= 1  # saturation does nothing to grey


def test_rand_augment():
    names = list(transforms._OPERATIONS)
    assert len(names) == 14
    picture = PICTURE // 2 + 40  # of little contrast
    for name, operation in transforms._OPERATIONS.items():
        nothing = array(operation(pillow(picture), 0.0, 1, (0, 0, 0)))
        most = array(operation(pillow(picture), 1.0, 1, (0, 0, 0)))
        assert most.shape == picture.shape
        if name not in ("autocontrast", "equalize"):  # which know no strength
            assert np.abs(nothing.astype(int) - picture).max() <= 1, name
        assert (np.abs(most.astype(int) - picture).max() > 2) == (name != "identity"), name
    with pytest.raises(UserError, match="magnitude of RandAugment is 11"):
        RandAugment(magnitude=11)


def test_random_affine_moves_about_the_middle():
    dot = np.zeros((41, 41, 1), np.uint8)
    dot[18:23, 18:23] = 255
    still = RandomAffine(0, 0, (1, 1))(dot, rng())
    assert np.array_equal(still, dot)
    turned = RandomAffine(45, 0, (1, 1))(dot, rng(1))
    rows, columns = np.nonzero(turned[..., 0] > 100)
    assert abs(rows.mean() - 20) < 0.6 and abs(columns.mean() - 20) < 0.6
    larger = RandomAffine(0, 0, (2, 2))(dot, rng())
    assert abs(larger.sum() / dot.sum() - 4) < 0.1
    moved = [np.argwhere(RandomAffine(0, 0.25, (1, 1))(dot, rng(s))[..., 0] > 128).mean(0) - 20 for s in range(50)]
    assert np.abs(moved).max() < 10.8 and np.abs(moved).max() > 7


def test_errors():
    with pytest.raises(UserError, match="scale of a random resized crop is"):
        RandomResizedCrop(scale=(0.5, 1.5))
    with pytest.raises(UserError, match="ratio of a random resized crop is"):
        RandomResizedCrop(ratio=(2, 1))


# --- patches of any proportions --------------------------------------------------------------------------------------


@pytest.mark.parametrize("height, width", [(64, 64), (100, 300), (300, 100), (7, 900), (1, 1), (500, 333), (16, 4000)])
@pytest.mark.parametrize("limit", [1, 16, 100, 256])
def test_the_grid_is_as_large_as_it_may_be(height, width, limit):
    rows, columns = patch_grid(height, width, 16, limit)
    assert rows * columns <= limit
    # Every scale in a fine row of them, by the definition: none that keeps to the limit has more patches.
    scales = np.geomspace(1e-3, 1e3, 20001)
    grids = np.stack([np.maximum(1, np.ceil(side * scales / 16)) for side in (height, width)])
    best = grids.prod(0)[grids.prod(0) <= limit].max()
    assert rows * columns >= best
    if limit == 256 and max(height, width) < 4 * min(height, width):
        assert abs(np.log(rows / columns * width / height)) < 0.15  # the picture's proportions


def test_patchify():
    picture = RNG.integers(0, 256, (32, 48, 3), dtype=np.uint8)
    patches, coordinates, mask = patchify(pillow(picture), 16, 6)
    assert patches.shape == (6, 768) and mask.all()
    for patch, (row, column) in zip(patches, coordinates, strict=True):
        expected = picture[row * 16:row * 16 + 16, column * 16:column * 16 + 16]
        assert np.array_equal(patch.reshape(16, 16, 3), expected)
    assert coordinates.tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]
    patches, coordinates, mask = patchify(pillow(picture), 16, 7)
    assert mask.tolist() == [True] * 6 + [False] and not patches[6].any() and not coordinates[6].any()
    patches, coordinates, mask = patchify(pillow(picture[..., :1]), 8, 50)
    assert patches.shape == (50, 64) and mask.sum() == patch_grid(32, 48, 8, 50)[0] * patch_grid(32, 48, 8, 50)[1]
