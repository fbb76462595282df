"""Digits: MNIST's files divided for ever, drawn ones without end, and the fonts they are drawn in."""

import gzip
import itertools
import pickle
import struct

import numpy as np
import pytest

from jaxgen.data import glyphs
from jaxgen.data.digits import Digits, augment, draw
from jaxgen.errors import UserError


def write_idx(path, array):
    data = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """500 digits whose first pixels say which they are."""
    folder = tmp_path_factory.mktemp("images")  # the folder's name has "images" in it too
    images = np.zeros((500, 28, 28), np.uint8)
    images[:, 0, 0], images[:, 0, 1] = np.arange(500) % 256, np.arange(500) // 256
    write_idx(folder / "train-labels-idx1-ubyte.gz", np.arange(500) % 10)
    return write_idx(folder / "train-images-idx3-ubyte.gz", images)


PLAIN = {"shift": 0, "rotation": 0, "scale": 0}


def number(example):
    return int(example["image"][0, 0, 0]) + 256 * int(example["image"][0, 1, 0])


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("path", ["", "files"])
@pytest.mark.parametrize("measure", ["heldout", "validation"])
def test_batches(path, measure, files):
    data = Digits(path=path and files, measure=measure, heldout=20)
    prepared, spec = data.prepare(), data.spec(5)
    for dataset, more in ((prepared.train(0), set()), (prepared.heldout(), {"weights"})):
        example = dataset[7]
        assert set(example) == set(spec) | more
        for name, s in spec.items():
            assert (5, *example[name].shape) == s.shape and example[name].dtype == s.dtype
    assert prepared.classes == tuple("0123456789") and prepared.facts["measured_on"] == measure
    assert prepared.facts["heldout_examples"] == len(prepared.heldout())


def test_files_are_divided_in_three(files):
    final, choices = (Digits(path=files, measure=m, **PLAIN).prepare() for m in ("heldout", "validation"))
    held, validation = ({number(e) for e in p.heldout()} for p in (final, choices))
    train, train_less = final.train(0), choices.train(0)
    trained = [number(train[i]) for i in range(final.facts["examples"])]
    trained_less = [number(train_less[i]) for i in range(choices.facts["examples"])]
    assert 30 < len(held) < 70 and 30 < len(validation) < 70 and not held & validation
    assert set(trained) == set(range(500)) - held and len(trained) == len(set(trained))  # an epoch, each once
    assert set(trained_less) == set(range(500)) - held - validation and len(trained_less) == len(set(trained_less))
    assert trained != sorted(trained)
    second = [number(train[len(trained) + i]) for i in range(len(trained))]
    assert sorted(second) == sorted(trained) and second != trained
    both = [number(e) for e in (final.train(1)[i] for i in range(2 * len(trained)))]
    assert both[len(trained):] != trained and both[:len(trained)] != second  # neighbouring seeds share no epoch
    for dataset in (train, train_less, final.heldout(), choices.heldout()):
        assert all(e["label"] == number(e) % 10 for e in (dataset[i] for i in range(30)))
    assert sorted(held)[:5] == [0, 12, 15, 17, 22]  # the tenth that is used once: the same for ever


def test_files_are_shuffled_without_grains_slow_shuffle(files, monkeypatch):
    monkeypatch.setattr("grain.MapDataset.shuffle", lambda *_, **__: pytest.fail("shuffled by Grain"))
    train = Digits(path=files, **PLAIN).prepare().train(0)
    assert len({train[i]["image"].tobytes() for i in range(20)}) == 20


@pytest.mark.parametrize("path", ["", "files"])
def test_example_is_a_function_of_seed_and_index(path, files):
    prepared = Digits(path=path and files).prepare()
    one, two, other = prepared.train(3), Digits(path=path and files).prepare().train(3), prepared.train(4)
    again = pickle.loads(pickle.dumps(one))
    for i in (0, 5, 10**9):
        assert same(one[i], two[i]) and same(one[i], again[i])
    assert sum(same(one[i], other[i]) for i in range(20)) < 3
    assert len(one) > 1e18 and prepared.train(-1)[0].keys() == one[0].keys()


def test_the_files_content_is_the_fingerprint(files, tmp_path):
    images = np.zeros((500, 28, 28), np.uint8)
    images[0, 5, 5] = 1
    write_idx(tmp_path / "a-labels-idx1-ubyte", np.zeros(500))
    other = Digits(path=write_idx(tmp_path / "a-images-idx3-ubyte", images)).prepare()
    prints = [Digits(path=files).prepare().fingerprint, Digits(path=files, shift=1).prepare().fingerprint,
              Digits().prepare().fingerprint, other.fingerprint]  # fmt: skip
    assert len(set(prints)) == 4 and Digits(path=files).prepare().fingerprint == prints[0]


# --- drawing -------------------------------------------------------------------------------------------------------


def test_five_fonts_in_their_box():
    assert len(glyphs.FONTS) >= 5
    for font in range(len(glyphs.FONTS)):
        for digit in range(10):
            points = glyphs.segments(font, digit).reshape(-1, 2)
            assert np.abs(points[:, 0]).max() <= 0.62 and np.abs(points[:, 1]).max() <= 1.0


def test_no_two_glyphs_are_alike():
    side = np.linspace(-1.2, 1.2, 32, dtype=np.float32)
    ink = {
        (font, digit): np.clip(0.5 - 13 * glyphs.distance(font, digit, side[None], side[:, None]), 0, 1)
        for font in range(len(glyphs.FONTS)) for digit in range(10)
    }  # fmt: skip

    def different(a, b):
        return np.abs(ink[a] - ink[b]).sum() / min(ink[a].sum(), ink[b].sum())

    for a, b in itertools.combinations(ink, 2):
        if a[1] != b[1]:
            assert different(a, b) > 0.1, (a, b)  # one stroke of the seven segments, at least
    for one, two in itertools.combinations(range(len(glyphs.FONTS)), 2):
        assert np.mean([different((one, digit), (two, digit)) for digit in range(10)]) > 0.35, (one, two)


def test_distance_by_hand():
    pieces = np.asarray([[0, 0, 2, 0], [5, 5, 5, 5]], np.float32)
    x, y = np.asarray([1, -3, 2, 5], np.float32), np.asarray([2, 4, 0, 6], np.float32)
    np.testing.assert_allclose(glyphs.squared_distance(pieces, x, y), [4, 25, 0, 1], atol=1e-5)


def test_drawn_digits_differ_and_fill_the_picture():
    rng = np.random.default_rng(0)
    drawn = np.stack([draw(i % 10, rng)[..., 0] for i in range(300)]).astype(float)
    ink = drawn > 90
    assert np.all(ink.sum((1, 2)) > 20) and np.all(ink.sum((1, 2)) < 350)
    assert ink[:, 1:-1, 1:-1].sum() > 0.995 * ink.sum()  # nearly nothing is cut off
    threes = drawn[3::10]
    assert all(np.abs(a - b).mean() > 3 for a, b in itertools.combinations(threes, 2))
    train = Digits().prepare().train(0)
    labels = [int(train[i]["label"]) for i in range(400)]
    assert set(labels) == set(range(10)) and max(np.bincount(labels)) < 70


def test_drawn_digits_can_be_told_by_their_neighbours():
    """A nearest neighbour among training digits is right far more often than by chance: labels are of their digits."""
    prepared = Digits(heldout=100, **PLAIN).prepare()
    train = prepared.train(0)
    trained = [train[i] for i in range(1500)]
    known = np.stack([e["image"].ravel() for e in trained]).astype(np.float32) / 255
    labels = np.asarray([e["label"] for e in trained])
    asked = [(e["image"].ravel() / 255, e["label"]) for e in prepared.heldout()]
    assert np.mean([labels[((known - x) ** 2).sum(1).argmin()] == label for x, label in asked]) > 0.75


def test_held_out_draws_are_none_of_training():
    prepared, choices = Digits(heldout=50).prepare(), Digits(heldout=50, measure="validation").prepare()
    sets = [{e["image"].tobytes() for e in p.heldout()} for p in (prepared, choices)]
    for seed in (0, -1, -2, 2**64 - 1):
        train = Digits(heldout=50, **PLAIN).prepare().train(seed)  # not augmented, as what is held out
        sets.append({train[i]["image"].tobytes() for i in range(50)})
    assert all(len(s) == 50 for s in sets)
    assert all(not a & b for a, b in itertools.combinations(sets[:-1], 2)) and sets[-1] == sets[3]  # seeds are mod 2^64


# --- augmentation --------------------------------------------------------------------------------------------------


def test_augmentation_moves_turns_and_stretches():
    image = np.zeros((28, 28, 1), np.uint8)
    image[10:18, 12:16] = 200
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:28, :28] + 0.5

    def moments(a):
        a = a[..., 0].astype(float)
        cx, cy = (a * x).sum() / a.sum(), (a * y).sum() / a.sum()
        xx, yy, xy = ((a * p).sum() / a.sum() for p in ((x - cx) ** 2, (y - cy) ** 2, (x - cx) * (y - cy)))
        return cx, cy, a.sum(), np.degrees(0.5 * np.arctan2(2 * xy, xx - yy)) % 180

    assert augment(image, rng, 0, 0, 0) is image
    shifted = np.asarray([moments(augment(image, rng, 2, 0, 0)) for _ in range(60)])
    assert np.abs(shifted[:, :2] - 14).max() <= 2.01 and np.ptp(shifted[:, 0]) > 3 and np.ptp(shifted[:, 1]) > 3
    np.testing.assert_allclose(shifted[:, 2], image.sum(), rtol=0.01)
    turned = np.asarray([moments(augment(image, rng, 0, 20, 0)) for _ in range(60)])
    np.testing.assert_allclose(turned[:, :2], 14, atol=0.1)
    assert np.abs(turned[:, 3] - 90).max() < 21 and np.ptp(turned[:, 3]) > 30
    scaled = np.asarray([moments(augment(image, rng, 0, 0, 0.3))[2] for _ in range(60)]) / image.sum()
    assert 0.7**2 <= scaled.min() < 0.8 and 1.25 < scaled.max() <= 1.3**2


# --- mistakes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"measure": "test"}, "data.measure is 'test'; it is 'heldout' or 'validation'"),
        ({"heldout": -1}, "data.heldout is -1"),
        ({"scale": 1.0}, "data.scale is 1.0; it should be from 0 to 0.9"),
        ({"shift": -1.0}, "data.shift is -1.0"),
    ],
)
def test_what_cannot_be(fields, message):
    with pytest.raises(UserError, match=message):
        Digits(**fields)


def test_files_that_cannot_be(tmp_path):
    def digits(name, array, labels=None):
        if labels is not None:
            write_idx(tmp_path / f"{name}-labels-idx1-ubyte", np.asarray(labels))
        return Digits(path=write_idx(tmp_path / f"{name}-images-idx3-ubyte", array))

    zeros = np.zeros((50, 28, 28))
    with pytest.raises(UserError, match="a-labels-idx1-ubyte is not there"):
        digits("a", zeros).prepare()
    with pytest.raises(UserError, match="has 49 labels for the 50 digits"):
        digits("b", zeros, np.zeros(49)).prepare()
    with pytest.raises(UserError, match=r"shape \(50, 32, 28\)"):
        digits("c", np.zeros((50, 32, 28)), np.zeros(50)).prepare()
    with pytest.raises(UserError, match="labels up to 10"):
        digits("d", zeros, np.full(50, 10)).prepare()
    with pytest.raises(UserError, match="holds 1 digits, too few"):
        digits("e", zeros[:1], [3]).prepare()
    with pytest.raises(UserError, match="should have 'images' in it"):
        Digits(path=str(tmp_path / "digits.gz")).prepare()
    with pytest.raises(UserError, match="nowhere-images"):
        Digits(path=str(tmp_path / "nowhere-images-idx3-ubyte")).prepare()
