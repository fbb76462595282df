"""Aspect buckets: the table of shapes, where each picture goes, and the order of batches of one shape each."""

import collections
import dataclasses
import fractions
import io
import itertools
import math
import pickle

import jax
import numpy as np
import pytest
from PIL import Image

from jaxgen.data import buckets
from jaxgen.data.batching import Rows
from jaxgen.data.buckets import nearest, shapes
from jaxgen.data.imagetext import ImageText, LabelledImages
from jaxgen.data.loader import Loader
from jaxgen.data.tokenizers import Bytes
from jaxgen.data.transforms import ColorJitter, Cover, Flip, RandomResizedCrop
from jaxgen.errors import UserError

SIZES = [(40, 26)] * 22 + [(32, 32)] * 30 + [(24, 44)] * 18 + [(60, 30)] * 3  # (height, width) of the pictures
TABLE = ((24, 40), (32, 32), (40, 24))


def colour(i):
    return np.array([i * 3 % 256, 255 - i * 2, i * 7 % 256], np.uint8)


@pytest.fixture
def folder(tmp_path):
    """Pictures of one colour each, by which they are known; the last of each kind is saved turned, as EXIF says."""
    (tmp_path / "data").mkdir()
    lines = ["file\tcaption"]
    for i, (height, width) in enumerate(SIZES):
        pixels = np.broadcast_to(colour(i), (height, width, 3))
        exif = Image.Exif()
        if i in (21, 51, 69):
            exif[0x0112], pixels = 6, pixels.swapaxes(0, 1)
        Image.fromarray(np.ascontiguousarray(pixels)).save(tmp_path / "data" / f"{i:02}.png", exif=exif)
        lines.append(f"{i:02}.png\tpicture {i}")
    (tmp_path / "data" / "t.tsv").write_text("\n".join(lines))
    return tmp_path / "data"


def data_of(folder, **fields):
    fields = {"image": "file", "tokenizer": Bytes(), "length": 12, "size": 32, "aspect": 2.0, "aspect_step": 8,
              "heldout": 0.0} | fields
    return ImageText(str(folder / "t.tsv"), **fields)


def prepared(folder, **fields):
    return data_of(folder, **fields).prepare(folder.parent / "cache")


def number(example):
    return int(bytes(example["tokens"].astype(np.uint8)[: example["lengths"] - 1]).split()[1])


# --- the table -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size, aspect, multiple", [(512, 2.0, 64), (1024, 4.0, 64), (32, 2.0, 8), (96, 3.5, 8)])
def test_the_table_by_trying_all(size, aspect, multiple):
    sides = range(multiple, size * size // multiple + 1, multiple)
    fits = {(h, w) for h in sides for w in range(multiple, size * size // h + 1, multiple)}
    longest = [(h, w) for h, w in fits if not {(h + multiple, w), (h, w + multiple)} & fits]
    expected = sorted((h, w) for h, w in longest if max(h, w) <= aspect * min(h, w))
    assert list(shapes(size, aspect, multiple)) == expected and (size, size) in expected
    assert all((w, h) in expected for h, w in expected)


def test_tables_as_they_are():
    assert shapes(512, 2.0, 64) == ((384, 640), (448, 576), (512, 512), (576, 448), (640, 384))
    assert shapes(32, 2.0, 8) == TABLE and shapes(512, 1.0, 64) == ((512, 512),)
    assert {(832, 1216), (896, 1152), (768, 1344), (640, 1600), (512, 2048)} < set(shapes(1024, 4.0, 64))  # SDXL's


def test_the_nearest_in_the_logarithm():
    table, rng = shapes(512, 3.0, 64), np.random.default_rng(0)
    height, width = rng.integers(1, 5000, (2, 500))
    expected = [min(range(len(table)), key=lambda k: abs(math.log(h / w) - math.log(table[k][0] / table[k][1])))
                for h, w in zip(height.tolist(), width.tolist(), strict=True)]
    assert nearest(table, height, width).tolist() == expected
    one = int(nearest(table, 2, 3))
    exact = [fractions.Fraction(2 * w, 3 * h) for h, w in table]
    assert max(exact[one], 1 / exact[one]) == min(max(x, 1 / x) for x in exact)


# --- pictures --------------------------------------------------------------------------------------------------------


def test_a_picture_covers_its_shape_and_is_cut_in_the_middle():
    image = np.zeros((20, 64, 3), np.uint8)
    image[:, :, 0] = np.arange(64)  # columns 12 to 51 are the middle, twice as wide as high
    image[:, :, 1] = np.arange(20)[:, None]
    same = Cover(20, 40, "nearest")(image, np.random.default_rng(0))
    assert np.array_equal(same, image[:, 12:52])
    half = Cover(10, 20, "bilinear")(image, np.random.default_rng(0)).astype(float)
    assert np.abs(half[:, :, 0] - (12.5 + 2 * np.arange(20))).max() <= 1
    assert np.abs(half[:, :, 1] - (0.5 + 2 * np.arange(10))[:, None]).max() <= 1
    assert np.array_equal(Cover(20, 64)(image, np.random.default_rng(0)), image)


def test_pictures_are_of_their_nearest_shape(folder):
    p = prepared(folder, augment=(Flip(), ColorJitter(0, 0, 0, 0)))
    reader = p.readers("train", 0)
    for i, kind in enumerate(reader.kinds(1)):
        high, wide = SIZES[i]
        assert TABLE[kind] == ((24, 40) if wide > high else (40, 24) if high > wide else (32, 32))  # turned ones too
        image = reader.train(i, int(kind))["image"]
        assert image.shape == (*TABLE[kind], 3) and (image == colour(i)).all()
    assert p.picture(np.zeros((9, 5, 3), np.uint8)).shape == p.train(0)[0]["image"].shape == (32, 32, 3)


def test_heldout_pictures_stay_square(folder):
    p = prepared(folder, heldout=0.2)
    assert {p.heldout()[i]["image"].shape for i in range(len(p.heldout()))} == {(32, 32, 3)}


def test_sizes_are_read_once(folder, monkeypatch):
    first = prepared(folder).readers("train", 0).kinds(1)
    from jaxgen.data import imagetext

    monkeypatch.setattr(imagetext, "size_of", lambda data: pytest.fail("read again"))
    assert np.array_equal(prepared(folder).readers("train", 0).kinds(1), first)
    prepared(folder, aspect=3.0)  # for another table too


def test_aspect_one_is_what_it_was(folder):
    square = prepared(folder, aspect=1.0)
    assert square.batched(8) is square and "shapes" not in square.facts and not hasattr(square.train(0), "batches_of")
    assert not (folder.parent / "cache" / "sizes").exists()
    assert len({prepared(folder, **f).fingerprint for f in ({"aspect": 1.0}, {"aspect": 2.0}, {"aspect": 4.0},
                                                             {"aspect": 1.0, "aspect_step": 4})}) == 3


# --- the order -------------------------------------------------------------------------------------------------------


def epochs(p, size, count, seed=0):
    """Batches of numbers of pictures, with their shapes, by epoch."""
    kinds = collections.Counter(p.readers("train", 0).kinds(size).tolist())
    length = sum(n // size for n in kinds.values())
    dataset = p.train(seed).batches_of(size)
    examples = [[dataset[n * size + k] for k in range(size)] for n in range(count * length)]
    found = [([number(e) for e in batch], {e["image"].shape[:2] for e in batch}) for batch in examples]
    return [found[k * length:(k + 1) * length] for k in range(count)]


def test_batches_are_of_one_shape_and_epochs_whole(folder):
    p = prepared(folder)
    kinds = p.readers("train", 0).kinds(8)
    counts = np.bincount(kinds)
    assert counts.tolist() == [18, 30, 25]
    seen, orders = [], []
    for epoch in epochs(p, 8, 6):
        assert len(epoch) == 18 // 8 + 30 // 8 + 25 // 8
        numbers = [i for batch, _ in epoch for i in batch]
        assert len(set(numbers)) == len(numbers)
        for batch, shape in epoch:
            assert shape == {TABLE[kinds[batch[0]]]} and len(set(kinds[batch].tolist())) == 1
        assert collections.Counter(TABLE.index(*shape) for _, shape in epoch) == {0: 2, 1: 3, 2: 3}
        seen.append(frozenset(numbers))
        orders.append(tuple(TABLE.index(*shape) for _, shape in epoch))
    assert len(set(seen)) > 3 and set().union(*seen) == set(range(len(SIZES)))  # another rest is left out each time
    assert len(set(orders)) > 3 and any(list(o) != sorted(o) for o in orders)


def test_the_order_is_a_function_of_the_seed_alone(folder):
    p = prepared(folder)
    dataset = p.train(3).batches_of(8)
    again = pickle.loads(pickle.dumps(prepared(folder).batched(8).train(3).batches_of(8)))
    for i in (200, 7, 0, 511, 64):  # in any order
        assert number(again[i]) == number(dataset[i])
    other = p.train(4).batches_of(8)
    assert [number(other[i]) for i in range(24)] != [number(dataset[i]) for i in range(24)]


def test_any_processes_and_workers_read_the_same(folder):
    p = prepared(folder, augment=(Flip(), ColorJitter()))
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    runs = []
    for start, workers in ((0, 0), (0, 1), (3, 0)):
        with Loader(p.train(1), sharding, 8, start=start, stop=7, workers=workers) as loader:
            runs.append({n: jax.tree.map(np.asarray, batch) for n, batch in loader})
    whole = runs[0]
    assert len({batch["image"].shape for batch in whole.values()}) > 1 and sorted(runs[2]) == [3, 4, 5, 6]
    for run in runs[1:]:
        for n, batch in run.items():
            assert all(np.array_equal(batch[k], whole[n][k]) for k in whole[n])
    parts = [Rows(p.train(1).batches_of(8), rows, 8)(2) for rows in (range(4), range(4, 8))]  # as two processes
    assert np.array_equal(np.concatenate([part["image"] for part in parts]), whole[2]["image"])


def test_few_pictures_go_where_there_are_enough(folder):
    p = prepared(folder).batched(20)
    assert p.facts["shapes"] == "32x32 48 (with 18 of 24x40, fewer than a batch); 40x24 25"
    assert prepared(folder).batched(8).facts["shapes"] == "24x40 18; 32x32 30; 40x24 25"
    for batch, shape in itertools.chain(*epochs(p, 20, 2)):
        assert shape == {(32, 32)} if set(batch) & set(range(22, 70)) else shape == {(40, 24)}
    with pytest.raises(UserError, match="none of the 3 shapes that data.aspect makes has the 64 pictures of a batch, "
                                        "32x32 the most with 30; a smaller batch_size"):
        prepared(folder).batched(64)
    with pytest.raises(UserError, match="none of the 3 shapes"):
        Loader(prepared(folder).train(0), jax.sharding.SingleDeviceSharding(jax.devices()[0]), 64)


def test_what_cannot_be_read_is_replaced_by_one_of_its_shape(folder):
    p = prepared(folder, max_bad=1.0)
    (folder / "60.png").write_bytes((folder / "60.png").read_bytes()[:70])
    for seed in range(3):
        for batch, shape in epochs(p, 8, 2, seed)[1]:
            assert shape != {(24, 40)} or (all(52 <= i < 70 for i in batch) and 60 not in batch)
    (folder / "00.png").write_bytes(b"nothing")  # before anything is known of it
    fresh = data_of(folder, max_bad=1.0).prepare(folder.parent / "other")
    assert TABLE[fresh.readers("train", 0).kinds(1)[0]] == (32, 32)


def test_labels(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (30, 12, 20, 3), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", images=images, labels=np.arange(30) % 3)
    data = LabelledImages(str(tmp_path / "a.npz"), size=16, aspect=2.0, aspect_step=4, heldout=0.2)
    p = data.prepare(tmp_path / "cache").batched(4)
    batch = Rows(p.train(0).batches_of(4), range(4), 4)(0)
    assert batch["image"].shape == (4, 12, 20, 3) and batch["image"].shape in {
        spec["image"].shape for spec in data.specs(4)}
    rows = {image.tobytes(): k % 3 for k, image in enumerate(images)}
    assert [rows[image.tobytes()] for image in batch["image"]] == batch["label"].tolist()  # of the shape: as they are


# --- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields, message", [
    ({"aspect": 0.5}, "data.aspect is 0.5; it must be at least 1"),
    ({"aspect_step": 0}, "data.aspect_step is 0; it must be at least 1"),
    ({"size": 36}, "data.size is 36, which should be a multiple of data.aspect_step = 8"),
    ({"aspect": 1.5}, "data.aspect = 1.5 has no shape but 32 x 32 in steps of data.aspect_step = 8; give a larger"),
    ({"patches": 9}, "data.patches keeps the proportions of pictures already"),
    ({"augment": (Flip(), RandomResizedCrop(32))}, "data.augment makes 32 x 32 pixels of 24 x 40; with data.aspect"),
])
def test_fields(fields, message, tmp_path):
    with pytest.raises(UserError, match=message):
        data_of(tmp_path, **fields)
    if "aspect" not in fields and "aspect_step" not in fields:
        data_of(tmp_path, **fields, aspect=1.0)  # which has none of it
    assert dataclasses.replace(data_of(tmp_path), size=64).table == buckets.shapes(64, 2.0, 8)


def test_orientation_in_the_header():
    from jaxgen.data.images import BadImage, read, size_of

    def file(form, orientation):
        exif, out = Image.Exif(), io.BytesIO()
        exif[0x0112] = orientation
        Image.fromarray(np.zeros((20, 31, 3), np.uint8)).save(out, form, exif=exif)
        return out.getvalue()

    for form, orientation in itertools.product(("PNG", "JPEG", "TIFF", "WEBP"), range(1, 9)):
        data = file(form, orientation)
        assert size_of(data) == read(data).size[::-1] == ((31, 20) if orientation > 4 else (20, 31))
    with pytest.raises(BadImage, match="not a picture"):
        size_of(b"nothing")
    assert size_of(file("JPEG", 6)[:-20]) == (31, 20)  # the pixels are another matter
