import collections
import dataclasses
import io
import json
import os
import pickle

import jax
import numpy as np
import pytest
from PIL import Image

from jaxgen.data.batching import Rows
from jaxgen.data.captions import encode_captions
from jaxgen.data.images import BadImage
from jaxgen.data.imagetext import ImageText, LabelledImages, View
from jaxgen.data.loader import Loader, heldout_batches
from jaxgen.data.tokenizers import Bytes, ByteTokenizer, Characters, SentencePiece
from jaxgen.data.transforms import CenterCrop, ColorJitter, Flip, Pad, RandomResizedCrop, Resize
from jaxgen.errors import UserError
from jaxgen.record import resume

AUGMENT = (RandomResizedCrop(16, (0.3, 1.0)), Flip(), ColorJitter())


def png(value, height=20, width=26):
    rng = np.random.default_rng(value)
    pixels = np.asarray(Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((width, height), 3))
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def folder(tmp_path):
    """Forty pictures with captions in a table: `group` is shared by pairs."""
    (tmp_path / "data").mkdir()
    lines = ["file\tcaption\tgroup\tkind"]
    for i in range(40):
        (tmp_path / "data" / f"{i:02}.png").write_bytes(png(i))
        lines.append(f"{i:02}.png\tpicture number {i}\tpair{i // 2}\t{'abc'[i % 3]}")
    (tmp_path / "data" / "t.tsv").write_text("\n".join(lines))
    return tmp_path / "data"


def captions(folder, **fields):
    fields = {"image": "file", "tokenizer": Bytes(), "length": 24, "size": 16, "heldout": 0.2} | fields
    return ImageText(str(folder / "t.tsv") if (folder / "t.tsv").exists() else str(folder), **fields)


def prepared(folder, data=None, **fields):
    return (data or captions(folder, **fields)).prepare(folder.parent / "cache")


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


def test_examples(folder):
    data = captions(folder)
    p = prepared(folder, data)
    batch = Rows(p.train(0), range(8), 8)(0)
    assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {k: (v.shape, v.dtype) for k, v in data.spec(8).items()}
    assert len(p.names("train")) + len(p.names("heldout")) == 40 and 2 <= len(p.names("heldout")) <= 16
    assert p.heldout_bytes == 0 and p.facts["pictures"] == len(p.names("train")) and "skipped" not in p.facts
    # Each picture comes with its own caption; one epoch has each once.
    n = len(p.names("train"))
    seen = []
    for i in range(n):
        example = p.train(0)[i]
        text = p.tokenizer.decode(example["tokens"])
        number = int(text.rsplit(" ", 1)[1])
        assert text == f"picture number {number}" and example["lengths"] == len(text) + 1
        assert np.array_equal(example["image"], p.picture(png(number)))
        seen.append(number)
    assert sorted(f"{k:02}.png" for k in seen) == sorted(p.names("train"))
    assert seen != sorted(seen) and not set(p.names("heldout")) & {f"{k:02}.png" for k in seen}


@pytest.mark.parametrize("fields", [{}, {"patches": 6, "patch": 8, "augment": (Flip(), ColorJitter())}])
def test_an_example_is_a_function_of_seed_and_index(folder, fields):
    data = captions(folder, **{"augment": AUGMENT} | fields)
    p = prepared(folder, data)
    dataset, again = p.train(3), pickle.loads(pickle.dumps(prepared(folder, data).train(3)))
    n = len(p.names("train"))
    for i in (5, 0, n + 5, 17, 5):
        assert same(dataset[i], again[i])
    other = p.train(4)
    assert not all(same(dataset[i], other[i]) for i in range(5))
    # A picture looks different in each epoch, and epochs come in another order.
    name = "patches" if fields else "image"
    looks = collections.defaultdict(set)
    for i in range(3 * n):
        example = dataset[i]
        looks[example["tokens"].tobytes()].add(example[name].tobytes())
    assert len(looks) == n and all(len(seen) == 3 for seen in looks.values())
    order = [dataset[i]["tokens"].tobytes() for i in range(2 * n)]
    assert order[:n] != order[n:] and sorted(order[:n]) == sorted(order[n:])


def test_any_number_of_workers_reads_the_same(folder):
    dataset = prepared(folder, augment=AUGMENT).train(1)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    runs = []
    for workers in (0, 2):
        with Loader(dataset, sharding, 8, stop=3, workers=workers) as loader:
            runs.append([{k: np.asarray(v) for k, v in batch.items()} for _, batch in loader])
    assert all(same(a, b) for a, b in zip(*runs, strict=True))


def test_heldout_is_plain_and_whole(folder):
    p = prepared(folder, augment=AUGMENT)
    examples = [p.heldout()[i] for i in range(len(p.heldout()))]
    for name, example in zip(p.names("heldout"), examples, strict=True):
        assert np.array_equal(example["image"], p.picture((folder / name).read_bytes()))  # nothing random in it
        assert p.tokenizer.decode(example["tokens"]) == f"picture number {int(name[:2])}"
        assert example["weights"] == 1 and example["weights"].dtype == np.float32
    assert p.captions("heldout") == [[f"picture number {int(name[:2])}"] for name in p.names("heldout")]
    batches = list(heldout_batches(p.heldout(), jax.sharding.SingleDeviceSharding(jax.devices()[0]), 3))
    assert sum(float(b["weights"].sum()) for b in batches) == len(examples) and batches[-1]["image"].shape[0] == 3


def test_what_is_held_out(folder):
    grouped = prepared(folder, group_by="group")
    groups = {part: {int(name[:2]) // 2 for name in grouped.names(part)} for part in ("train", "heldout")}
    assert groups["heldout"] and not groups["train"] & groups["heldout"]
    assert all(len(grouped.names(part)) == 2 * len(groups[part]) for part in groups)
    joined = prepared(folder, group_by="group", group_match=r"pair\d", heldout=0.3)  # by the first digit alone
    digits = {part: {str(int(name[:2]) // 2)[0] for name in joined.names(part)} for part in ("train", "heldout")}
    assert digits["heldout"] and not digits["train"] & digits["heldout"]
    # By name: a picture stays on its side when others come or go.
    before = set(prepared(folder).names("heldout"))
    lines = (folder / "t.tsv").read_text().splitlines()
    (folder / "t.tsv").write_text("\n".join(lines[:1] + lines[21:]))
    assert set(prepared(folder).names("heldout")) == {name for name in before if int(name[:2]) >= 20}
    assert list(prepared(folder, heldout_by="tail").names("heldout")) == [f"{i}.png" for i in range(36, 40)]
    whole = prepared(folder, heldout=0.0)
    assert len(whole.heldout()) == 0 and len(whole.names("train")) == 20
    other = prepared(folder, heldout_path=str(folder / "t.tsv"))
    assert len(other.names("train")) == len(other.names("heldout")) == 20
    with pytest.raises(UserError, match="no picture of 20 fell into the held-out part"):
        prepared(folder, heldout=1e-9)
    with pytest.raises(UserError, match="all pictures are held out"):
        prepared(folder, heldout=0.999999)
    with pytest.raises(UserError, match="no column 'gruop', only file, caption, group, kind; did you mean 'group'"):
        prepared(folder, group_by="gruop")


def test_the_fingerprint_tells_what_decides_an_example(folder):
    first = prepared(folder, augment=AUGMENT).fingerprint
    assert prepared(folder, augment=AUGMENT, max_bad=0.5, workers=3).fingerprint == first
    differing = [prepared(folder, **{"augment": AUGMENT} | fields).fingerprint for fields in (
        {"augment": AUGMENT[:2]}, {"size": 24}, {"length": 12}, {"channels": 1}, {"background": (0, 0, 0)},
        {"heldout": 0.3}, {"group_by": "group"}, {"caption": "kind"}, {"tokenizer": Characters()},
        {"fit": (Resize(16, "exact"),)})]
    assert len({first, *differing}) == len(differing) + 1
    (folder / "00.png").write_bytes(png(77))
    assert prepared(folder, augment=AUGMENT).fingerprint != first


def test_captions(folder):
    tokens, lengths = encode_captions(ByteTokenizer(), ["abc", "", "abcdefgh"], 5)
    assert tokens.tolist() == [[97, 98, 99, 256, 256], [256] * 5, [97, 98, 99, 100, 256]]
    assert lengths.tolist() == [4, 1, 5] and tokens.dtype == lengths.dtype == np.int32
    p = prepared(folder, length=17)  # "picture number 10" and the end are one too many
    tokens, lengths = p.encode(["picture number 7", "picture number 10"])
    assert lengths.tolist() == [17, 17] and p.tokenizer.decode(tokens[1]) == "picture number 1"
    cut = p.facts["captions_cut"] + p.facts["heldout_captions_cut"]
    assert cut == 30
    for i in range(20):
        assert p.train(0)[i]["tokens"][-1] == 256 and p.train(0)[i]["lengths"] == 17


def test_captions_on_disk_are_those_of_encode(folder, monkeypatch):
    """Also where what fills a row is not what ends a caption, and where some are too long."""
    for padding, length in ((None, 17), (0, 24), (0, 17), (0, 12)):
        monkeypatch.setattr(ByteTokenizer, "padding", padding)
        p = captions(folder, length=length).prepare(folder.parent / f"cache-{padding}")
        for i, texts in enumerate(p.captions("heldout")):
            (tokens,), (count,) = p.encode(texts)
            example = p.heldout()[i]
            assert np.array_equal(example["tokens"], tokens) and example["lengths"] == count
            assert tokens[count - 1] == 256 and (tokens[count:] == (256 if padding is None else padding)).all()


def test_learned_tokenizers_learn_from_the_training_captions(folder):
    lines = (folder / "t.tsv").read_text().replace("picture number", "abc").splitlines()
    held = {name for name in prepared(folder).names("heldout")}
    marked = [line.replace("abc", "xyz") if line.split("\t")[0] in held else line for line in lines]
    (folder / "t.tsv").write_text("\n".join(marked))
    p = prepared(folder, tokenizer=Characters(64))
    assert set(p.names("heldout")) == held and "b" in p.tokenizer.characters and "x" not in p.tokenizer.characters
    with pytest.raises(UserError, match="too small for a vocabulary of 384"):
        prepared(folder, tokenizer=SentencePiece(vocab_size=384))


def test_several_captions_of_a_picture(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    rows = []
    for i in range(20):
        (folder / f"{i}.png").write_bytes(png(i))
        rows.append({"file": f"{i}.png", "captions": [f"{i} one", f"{i} two", " ", f"{i} three"]})
    (folder / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = ImageText(str(folder), image="file", caption="captions", tokenizer=Bytes(), length=12, size=8, heldout=0.3)
    p = data.prepare(tmp_path / "cache")
    n = len(p.names("train"))
    texts = [p.tokenizer.decode(p.train(0)[i]["tokens"]).split() for i in range(12 * n)]
    assert {word for _, word in texts} == {"one", "two", "three"}
    counts = collections.Counter(word for _, word in texts)
    assert min(counts.values()) > 2.5 * n
    assert all(p.tokenizer.decode(p.heldout()[i]["tokens"]).endswith(" one") for i in range(len(p.heldout())))
    assert p.facts["captions"] == 3 * n


# --- what cannot be used ---------------------------------------------------------------------------------------------


def test_pictures_that_cannot_be_read_are_replaced_counted_and_named(folder):
    p = prepared(folder, augment=AUGMENT)
    bad, held = p.names("train")[3], p.names("heldout")[0]
    clean = [p.train(0)[i] for i in range(len(p.names("train")))]
    (folder / bad).write_bytes(png(3)[:200])
    (folder / held).unlink()
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    dataset, n = p.train(0), len(p.names("train"))  # not prepared again: they were damaged since
    replaced = [i for i in range(n) if not same(dataset[i], clean[i])]
    assert len(replaced) == 1
    example = dataset[replaced[0]]
    assert same(example, p.train(0)[replaced[0]])  # by the same picture, whoever reads it
    assert any(np.array_equal(example["tokens"], e["tokens"]) for k, e in enumerate(clean) if k != replaced[0])
    for workers in (0, 1):
        with Loader(dataset, sharding, 5, stop=2 * n // 5, workers=workers) as loader:
            batches = [batch for _, batch in loader]
            assert len(batches) == 2 * n // 5
            assert loader.skipped.keys() == {bad} and "damaged" in loader.skipped[bad]
            assert loader.examples == 5 * len(batches) and 1 <= loader.replaced <= 4
    # Held out, it has no weight, and shifts nothing.
    examples = [p.heldout()[i] for i in range(len(p.heldout()))]
    assert [float(e["weights"]) for e in examples] == [0.0] + [1.0] * (len(examples) - 1)
    assert not examples[0]["image"].any()
    _, told = Rows(p.heldout(), range(3), 3).read(0)
    assert [(name, reason) for name, reason, _ in told] == [(held, "the file is not there")]


def test_too_many_stop_the_run(folder):
    p = prepared(folder, max_bad=0.1)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def read(count):
        for name in p.names("train")[:count]:
            (folder / name).write_bytes(b"nothing")
        with Loader(p.train(0), sharding, 8, stop=20) as loader:
            return len(list(loader)), len(loader.skipped)

    assert read(4) == (20, 4)  # more than a tenth, but a handful
    with pytest.raises(UserError, match=r"of \d+ examples cannot be used, for example \d+.png: it is not a picture of "
                                        r"a known format; data.max_bad allows a share of 0.1"):
        read(8)
    p = prepared(folder, max_bad=0.9)
    assert read(8) == (20, 8)
    with pytest.raises(UserError, match="none of 100 pictures can be read, for example .*not a picture"):
        read(40)


def test_captions_that_cannot_be_used(folder):
    lines = (folder / "t.tsv").read_text().encode().splitlines()
    lines[3] = lines[3].replace(b"picture number 2", b"  ")
    lines[4] = lines[4].replace(b"picture", b"\xff\xfe")
    lines[5] = lines[5].replace(b"picture number 4", b"")
    lines[6] = b"05.png"
    (folder / "t.tsv").write_bytes(b"\n".join(lines))
    p = prepared(folder)
    assert p.facts["skipped"] == 4 and p.facts["pictures"] + p.facts["heldout_pictures"] == 36
    for told in ("02.png: its caption is empty", "03.png: its caption is not UTF-8", "04.png: its caption is empty",
                 "t.tsv, line 7: it has 1 columns, not 4"):
        assert told in p.facts["skipped_names"]
    lines[7] = lines[7].replace(b"picture number 6", b"")
    (folder / "t.tsv").write_bytes(b"\n".join(lines))
    with pytest.raises(UserError, match="5 of 40 examples cannot be used, for example 02.png: its caption is empty"):
        prepared(folder)
    assert prepared(folder, max_bad=0.2).facts["skipped"] == 5
    (folder / "t.tsv").write_bytes(b"\n".join([lines[0], *(line.split(b"\t")[0] + b"\t\t\t" for line in lines[8:])]))
    with pytest.raises(UserError, match="none of the 33 pictures of .* can be used, for example 07.png: its caption"):
        prepared(folder, max_bad=1.0)
    with pytest.raises(UserError, match="no column 'captoin', only .*; did you mean 'caption'"):
        prepared(folder, caption="captoin")


def test_a_folder_in_which_only_some_have_captions(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for i in range(10):
        (folder / f"{i}.png").write_bytes(png(i))
        if i != 4:
            (folder / f"{i}.txt").write_text(f"caption {i}")
    p = captions(folder, image="image", heldout=0.4).prepare(tmp_path / "cache")
    assert p.facts["skipped_names"] == "4.png: it has no caption"
    with pytest.raises(BadImage, match="not a picture"):
        p.picture(b"no picture")
    for i in range(9):  # the first as well as any; none of them is a mistake
        (folder / f"{i}.txt").unlink(missing_ok=True)
    p = captions(folder, image="image", heldout=0.0, max_bad=1.0).prepare(tmp_path / "cache")
    assert p.facts["pictures"] == 1 and p.facts["skipped"] == 9
    assert p.facts["skipped_names"].startswith("0.png: it has no caption; ")
    (folder / "9.txt").unlink()
    with pytest.raises(UserError, match=f"the pictures of {folder} have no column 'caption', only none"):
        captions(folder, image="image", max_bad=1.0).prepare(tmp_path / "cache")


def test_names_that_utf8_cannot_hold(tmp_path):
    """A file's name of another encoding, and half of a surrogate pair in JSON, can be kept, told and printed."""
    folder = tmp_path / "data"
    folder.mkdir()
    lines = []
    for i in range(8):
        name = f"caf\udce9 {i}.png"
        try:
            (folder / name).write_bytes(png(i))
        except (OSError, UnicodeError):
            pytest.skip("this file system takes no such names")
        lines.append(json.dumps({"file": name, "caption": str(i)}))
    lines += [json.dumps({"file": f"\ud800{i}.png", "caption": "x" * i}) for i in range(3)]
    (folder / "t.jsonl").write_text("\n".join(lines))
    data = ImageText(str(folder / "t.jsonl"), image="file", tokenizer=Bytes(), length=8, size=8, heldout=0.2,
                     heldout_by="tail")
    p = data.prepare(tmp_path / "cache")
    json.dumps(p.facts, ensure_ascii=False).encode()
    assert p.names("train")[1] == "caf\\udce9 1.png" and p.names("heldout")[-1] == "\\ud8002.png"
    assert p.facts["skipped_names"] == "\\ud8000.png: its caption is empty"
    assert np.array_equal(p.train(0)[0]["image"], p.picture(png(int(p.tokenizer.decode(p.train(0)[0]["tokens"])))))
    _, told = Rows(p.heldout(), range(2), 2).read(0)
    assert [name.encode() for name, _, _ in told] == [b"\\ud8001.png", b"\\ud8002.png"]
    # In a folder of folders.
    (folder / "t.jsonl").unlink()
    for i in range(8):
        os.makedirs(folder / "ab\udce9"[i % 2 * 2], exist_ok=True)
        (folder / f"caf\udce9 {i}.png").rename(folder / "ab\udce9"[i % 2 * 2] / f"\udcff{i}.png")
    labelled = LabelledImages(str(folder), size=8, heldout=0.0).prepare(tmp_path / "cache")
    assert labelled.classes == ("\\udce9", "a") and labelled.names("train")[0] == "a/\\udcff0.png"


# --- labels ----------------------------------------------------------------------------------------------------------


def test_labels_by_folder(tmp_path):
    for i in range(30):
        place = tmp_path / "data" / ("zebra", "ant", "cow")[i % 3]
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{i}.png").write_bytes(png(i))
    data = LabelledImages(str(tmp_path / "data"), size=16, augment=AUGMENT, heldout=0.3)
    p = data.prepare(tmp_path / "cache")
    assert p.classes == ("ant", "cow", "zebra") and p.facts["classes"] == 3
    batch = Rows(p.train(0), range(8), 8)(0)
    assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {k: (v.shape, v.dtype) for k, v in data.spec(8).items()}
    for i, name in enumerate(p.names("heldout")):
        assert p.classes[p.heldout()[i]["label"]] == name.split("/")[0]
    (tmp_path / "data" / "1.png").write_bytes(png(1))  # it comes first
    p = data.prepare(tmp_path / "cache")
    assert p.facts["skipped_names"] == "1.png: it has no label" and p.classes == ("ant", "cow", "zebra")
    with pytest.raises(UserError, match="no column 'labels', only label; did you mean 'label'"):
        dataclasses.replace(data, label="labels").prepare(tmp_path / "cache")


def test_given_classes_number_any_part_of_them_alike(tmp_path):
    for i in range(20):
        for kind in ("all", "some"):
            place = tmp_path / kind / (("zebra", "ant", "cow")[i % 3] if kind == "all" else "cow")
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{i}.png").write_bytes(png(i))
    names = ("zebra", "ant", "cow", "dog")

    def prepared(kind, *classes):
        data = LabelledImages(str(tmp_path / kind), size=16, heldout=0.3, classes=classes)
        return data.prepare(tmp_path / "cache")

    assert prepared("some").train(0)[0]["label"] == 0
    p = prepared("some", *names)
    assert p.train(0)[0]["label"] == 2 and p.classes == names and p.facts["classes"] == 4
    p = prepared("all", *names)
    for i, name in enumerate(p.names("heldout")):
        assert p.classes[p.heldout()[i]["label"]] == name.split("/")[0]
    assert prepared("all", *names[::-1]).fingerprint not in (p.fingerprint, prepared("all").fingerprint)
    with pytest.raises(UserError, match="the label 'cow' of .*all is not among the 3 of data.classes"):
        prepared("all", "zebra", "ant", "crow")
    with pytest.raises(UserError, match="data.classes has 'ant' twice"):
        prepared("all", "ant", "zebra", "ant")


@pytest.mark.parametrize("classes, numbers", [(("a", "b", "c"), (1, 2)), (("2", "0", "1"), (2, 0))])
def test_given_classes_of_numbers(tmp_path, classes, numbers):
    labels = np.arange(30) % 2 + 1
    np.savez(tmp_path / "a.npz", images=np.zeros((30, 8, 8), np.uint8), labels=labels)
    data = LabelledImages(str(tmp_path / "a.npz"), size=8, heldout=0.3, classes=classes)
    p = data.prepare(tmp_path / "cache")
    for i, name in enumerate(p.names("heldout")):
        assert p.heldout()[i]["label"] == numbers[labels[int(name)] - 1]
    with pytest.raises(UserError, match="the label '2' of .*a.npz is not among the 2 of data.classes"):
        dataclasses.replace(data, classes=classes[1:]).prepare(tmp_path / "cache")


def test_numbered_labels_and_grey(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (30, 12, 12), dtype=np.uint8)
    labels = np.arange(30) % 4 + 1  # no 0
    np.savez(tmp_path / "a.npz", images=images, labels=labels)
    p = LabelledImages(str(tmp_path / "a.npz"), size=12, channels=1, heldout=0.3).prepare(tmp_path / "cache")
    assert p.classes == ("0", "1", "2", "3", "4")
    for i, name in enumerate(p.names("heldout")):
        example = p.heldout()[i]
        assert np.array_equal(example["image"][..., 0], images[int(name)]) and example["label"] == labels[int(name)]
    colour = LabelledImages(str(tmp_path / "a.npz"), size=12, heldout=0.3).prepare(tmp_path / "cache")
    assert np.array_equal(colour.train(0)[0]["image"][..., 1:2], p.train(0)[0]["image"])
    np.savez(tmp_path / "a.npz", images=images, labels=np.where(np.arange(30) < 27, labels, 9))
    with pytest.raises(UserError, match="the class '9' is in the held-out part alone"):
        LabelledImages(str(tmp_path / "a.npz"), size=12, heldout_by="tail").prepare(tmp_path / "cache")


# --- sizes -----------------------------------------------------------------------------------------------------------


def test_fit_and_proportions(folder):
    exact = prepared(folder, fit=(Resize(16, "exact", "bilinear"),))
    expected = Image.open(io.BytesIO(png(1))).resize((16, 16), Image.Resampling.BILINEAR)
    assert np.array_equal(exact.picture(png(1)), np.asarray(expected))
    padded = prepared(folder, fit=(Resize(16, "fit"), Pad((0, 0, 0)))).picture(png(1))
    assert padded.shape == (16, 16, 3) and not padded[0].any()
    with pytest.raises(UserError, match="data.fit gives a picture of 21 x 16 pixels, but data.size is 16"):
        prepared(folder, fit=(Resize(16),)).picture(png(1))
    middle = prepared(folder, fit=(Resize(20), CenterCrop(16))).picture(png(1, 16, 16))  # of the size already
    larger = Image.open(io.BytesIO(png(1, 16, 16))).resize((20, 20), Image.Resampling.BICUBIC)
    assert np.array_equal(middle, np.asarray(larger)[2:18, 2:18])
    free = prepared(folder, patches=6, patch=8)
    example = free.example(png(1, 16, 24))
    assert example["patches"].shape == (6, 192) and example["patch_mask"].all()
    assert example["coordinates"].tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]
    pixels = np.asarray(Image.open(io.BytesIO(png(1, 16, 24))))
    assert np.array_equal(example["patches"][4].reshape(8, 8, 3), pixels[8:, 8:16])
    with pytest.raises(UserError, match="keep their proportions"):
        free.picture(png(1))


def test_a_picture_that_is_all_length_cannot_be_fitted():
    """Its shorter side enlarged would take gigabytes."""
    line = np.zeros((1, 10_000, 3), np.uint8)
    with pytest.raises(BadImage, match="its 10000 x 1 pixels would become 2240000 x 224"):
        View(224)(line)
    assert View(16)(line)["image"].shape == (16, 16, 3)  # which does not


def test_what_may_change_when_a_run_goes_on():
    data = ImageText("here", root="/a", images="b")
    for fields in ({"max_bad": 0.5}, {"workers": 7}):
        changed = resume({"data": data}, {"data": dataclasses.replace(data, **fields)}, lambda: pytest.fail("asked"))
        assert [d.path for d in changed] == [f"data.{name}" for name in fields]
    for fields in ({"root": "/c"}, {"images": ""}, {"path": "there", "root": "d"}):
        moved = dataclasses.replace(data, **fields)
        assert len(resume({"data": data}, {"data": moved}, lambda: True)) == len(fields)
        with pytest.raises(UserError, match=rf"data\.{next(iter(fields))}"):
            resume({"data": data}, {"data": moved}, lambda: False)
    with pytest.raises(UserError, match=r"data\.image \("):
        resume({"data": data}, {"data": dataclasses.replace(data, image="x")}, lambda: True)


@pytest.mark.parametrize("fields, message", [
    ({"size": 0}, "data.size is 0"), ({"heldout": 1.0}, "data.heldout is 1.0"), ({"max_bad": 2.0}, "data.max_bad is"),
    ({"channels": 2}, "data.channels is 2"), ({"length": 1}, "data.length is 1"), ({"heldout_by": "x"}, "'name' or"),
    ({"group_match": "("}, "no regular expression"),
    ({"group_by": "g", "heldout_by": "tail"}, "data.group_by goes with"), ({"workers": -2}, "data.workers is -2")])
def test_fields(fields, message):
    with pytest.raises(UserError, match=message):
        ImageText("x", **fields)


def test_the_order_of_small_and_large_sets():
    """Both ways of shuffling give each example once an epoch, and count the epochs on."""
    from jaxgen.data import batching

    for size in (7, (1 << 16) + 3):
        dataset = batching.endless(lambda i: {"i": np.int64(i)}, size, 5)
        count = 3 * size if size < 100 else 50
        indices = [int(dataset[i]["i"]) for i in range(count)]
        assert len(set(indices)) == count and indices != sorted(indices)
        if size < 100:
            for epoch in range(3):
                assert sorted(indices[epoch * 7:epoch * 7 + 7]) == list(range(epoch * 7, epoch * 7 + 7))
        assert int(dataset[size]["i"]) // size == 1
