import base64
import gzip
import io
import json
import pickle
import struct
import tarfile
import textwrap

import numpy as np
import pytest
from PIL import Image

from jaxgen.data import tars
from jaxgen.data.array_records import example_fields
from jaxgen.data.images import BadImage, decode
from jaxgen.data.pictures import idx_labels, open_pictures, read_idx
from jaxgen.errors import UserError


def picture(value):
    return np.full((8, 10, 3), value, np.uint8)


def png(value):
    out = io.BytesIO()
    Image.fromarray(picture(value)).save(out, "PNG")
    return out.getvalue()


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def write_records(path, records):
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()


def opened(path, tmp_path, *args, **kwargs):
    """[{columns, name, shade of the picture}], the same from the source and from a copy that went through a pickle."""
    source = open_pictures(str(path), *args, cache=tmp_path / "cache", **kwargs)
    source.fingerprint(tmp_path / "cache")

    def rows(source):
        found = []
        for i in range(len(source)):
            row = source[i]
            image = row.pop("image")
            found.append(row | {"shade": int((decode(image) if isinstance(image, bytes) else image)[0, 0, 0])})
            columns = source.row(i)
            assert columns.columns | {"name": columns.name} == row
        return found

    assert rows(pickle.loads(pickle.dumps(source))) == rows(source)
    return rows(source)


def test_folder(tmp_path):
    folder = tmp_path / "data"
    for name, value in (("cat/b.png", 1), ("cat/a.PNG", 2), ("dog/small/c.png", 3), ("d.png", 4)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png(value))
    (folder / "cat/a.txt").write_text(" a cat\n")
    (folder / "d.txt").write_bytes(b"\xff")
    (folder / "notes.md").write_text("not a picture")
    (folder / ".hidden.png").write_bytes(png(9))
    assert opened(folder, tmp_path) == [
        {"name": "cat/a.PNG", "label": "cat", "caption": "a cat", "shade": 2},
        {"name": "cat/b.png", "label": "cat", "shade": 1},
        {"name": "d.png", "caption": b"\xff", "shade": 4},
        {"name": "dog/small/c.png", "label": "dog/small", "shade": 3}]
    assert [row["name"] for row in opened(folder / "*.png", tmp_path)] == ["d.png"]
    before = open_pictures(str(folder)).fingerprint(tmp_path)
    (folder / "cat/a.txt").write_text("another")
    assert open_pictures(str(folder)).fingerprint(tmp_path) != before


TSV = "file\tcaption\nx/a.png\tone\nx/b.png\ttwo words\n\n"
JSONL = '{"file": "x/a.png", "caption": "one", "n": 3}\n\n{"file": "x/b.png", "caption": ["two", "words"]}'


@pytest.mark.parametrize("name, content", [
    ("t.tsv", TSV.encode()), ("t.tsv", TSV.replace("\n", "\r\n").encode()), ("t.tsv", b"\xef\xbb\xbf" + TSV.encode()),
    ("t.jsonl", JSONL.encode()), ("t.jsonl.gz", gzip.compress(JSONL.encode(), mtime=0))])
def test_table(tmp_path, name, content):
    folder = tmp_path / "data"
    (folder / "x").mkdir(parents=True)
    for k, letter in enumerate("ab"):
        (folder / "x" / f"{letter}.png").write_bytes(png(k))
    (folder / name).write_bytes(content)
    rows = opened(folder / name, tmp_path, "file")
    assert [(row["file"], row["name"], row["shade"]) for row in rows] == [("x/a.png", "x/a.png", 0),
                                                                         ("x/b.png", "x/b.png", 1)]
    assert rows[0]["caption"] == "one" and rows[1]["caption"] in ("two words", ["two", "words"])
    assert opened(folder, tmp_path, "file") == rows  # a folder with a table is the table
    (tmp_path / name).write_bytes(content)
    assert opened(tmp_path / name, tmp_path, "file", str(folder)) == rows
    write_tar(tmp_path / "t.tar", [("./x/a.png", png(0)), ("x/b.png", png(1))])
    assert opened(tmp_path / name, tmp_path, "file") == rows  # in a tar beside it, of the same name
    assert opened(tmp_path / name, tmp_path, "file", str(tmp_path / "t.tar")) == rows
    # The table and its pictures in one tar.
    if not name.endswith(".gz"):
        write_tar(tmp_path / "whole.tar", [(name, content), ("x/b.png", png(1)), ("x/a.png", png(0))])
        assert opened(tmp_path / "whole.tar", tmp_path, "file") == rows


def test_lines_of_a_table_that_cannot_be_used(tmp_path):
    (tmp_path / "a.png").write_bytes(png(1))
    (tmp_path / "t.tsv").write_bytes(b"file\tcaption\na.png\nnone.png\tx\n\ty\na.png\t\xff\n")
    source = open_pictures(str(tmp_path / "t.tsv"), "file")
    assert [source.row(i).problem for i in range(4)] == [
        "it has 1 columns, not 2", "", "its column 'file' names no picture", ""]
    with pytest.raises(BadImage, match="the file is not there"):
        source.image(1)
    assert source.row(3).columns == {"file": "a.png", "caption": b"\xff"}
    lines = [b'{"file": "a.png"}', b'{"file": ', b'[1]', b'{"file": 3}', b'{"file": "\xff"}']
    (tmp_path / "t.jsonl").write_bytes(b"\n".join(lines))
    source = open_pictures(str(tmp_path / "t.jsonl"), "file")
    problems = [source.row(i).problem for i in range(5)]
    assert problems[0] == "" and "not valid JSON" in problems[1] and problems[2] == "it is not a JSON object but list"
    assert problems[3:] == ["its column 'file' names no picture", "it is not UTF-8"]
    assert source.row(1).name.endswith("t.jsonl, line 2")
    (tmp_path / "t.jsonl").write_bytes(b"\n".join([b'{"caption": "x"}', b'{"fle": "x"}', *lines]))
    source = open_pictures(str(tmp_path / "t.jsonl"), "file")  # the first lacks it, as any line may
    assert [source.row(i).problem for i in range(3)] == ["its column 'file' names no picture"] * 2 + [""]
    (tmp_path / "t.jsonl").write_bytes(b'{"caption": "x"}\n[1]\n{"fle": "x"}')
    with pytest.raises(UserError, match="t.jsonl has no column 'file', only caption, fle; did you mean 'fle'"):
        open_pictures(str(tmp_path / "t.jsonl"), "file")


def test_webdataset(tmp_path):
    first = [("0/a.txt", b"one\n"), ("0/a.png", png(1)), ("0/a.json", b'{"n": 4, "deep": {"k": 1}}'),
             ("0/a.seg.png", png(9)), ("0/b.cls", b"7"), ("0/b.png", png(2)), ("0/c.txt", b"no picture")]
    second = [("d.png", png(3)), ("d.txt", b"\xff"), ("e.png", png(4)), ("e.json", b"{")]
    write_tar(tmp_path / "s-00.tar", first)
    write_tar(tmp_path / "s-01.tar", second)
    source = open_pictures(str(tmp_path / "s-*.tar"), cache=tmp_path / "cache")
    assert source.row(3).problem.startswith("its .json is damaged") and len(source) == 4
    write_tar(tmp_path / "s-01.tar", second[:-1])
    assert opened(tmp_path / "s-*.tar", tmp_path) == [
        {"name": "0/a.png", "caption": "one", "n": 4, "deep": {"k": 1}, "shade": 1},
        {"name": "0/b.png", "label": 7, "shade": 2},
        {"name": "d.png", "caption": b"\xff", "shade": 3},
        {"name": "e.png", "shade": 4}]
    assert [row["shade"] for row in opened(tmp_path / "s-00.tar", tmp_path, "seg.png")] == [9]
    with pytest.raises(UserError, match="no pictures of the ending .jpg in .*s-00.tar"):
        len(open_pictures(str(tmp_path / "s-00.tar"), "jpg", cache=tmp_path))


def test_a_tar_is_indexed_once(tmp_path, monkeypatch):
    write_tar(tmp_path / "a.tar", [(f"{i}.png", png(i)) for i in range(5)])
    assert len(open_pictures(str(tmp_path / "a.tar"), cache=tmp_path / "cache")) == 5
    monkeypatch.setattr(tarfile, "open", lambda *_, **__: pytest.fail("indexed again"))
    monkeypatch.setattr(tars, "_stem", lambda *_: pytest.fail("samples found again"))
    source = open_pictures(str(tmp_path / "a.tar"), cache=tmp_path / "cache")
    assert len(source) == 5 and source.image(3) == png(3)
    monkeypatch.undo()
    with pytest.raises(UserError, match="no pictures of the ending .x in"):
        len(open_pictures(str(tmp_path / "a.tar"), "x", cache=tmp_path / "cache"))


def varint(number):
    out = b""
    number %= 1 << 64
    while number > 127:
        out, number = out + bytes([number & 127 | 128]), number >> 7
    return out + bytes([number])


def field(number, content):
    return varint(number << 3 | 2) + varint(len(content)) + content


def tf_example(**features):
    """tf.train.Example, written out: bytes, floats (packed) and ints (packed)."""
    entries = b""
    for name, values in features.items():
        if isinstance(values[0], bytes):
            feature = field(1, b"".join(field(1, v) for v in values))
        elif isinstance(values[0], float):
            feature = field(2, field(1, struct.pack(f"<{len(values)}f", *values)))
        else:
            feature = field(3, field(1, b"".join(map(varint, values))))
        entries += field(1, field(1, name.encode()) + field(2, feature))
    return field(1, entries)


def test_array_record(tmp_path):
    write_records(tmp_path / "a.array_record", [
        tf_example(image=[png(1)], caption=[b"one"], label=[3]),
        tf_example(image=[png(2)], caption=[b"two", b"words"], label=[-1], boxes=[0.5, 0.25]),
        json.dumps({"image": base64.b64encode(png(3)).decode(), "caption": "three"}).encode()])
    assert opened(tmp_path / "a.array_record", tmp_path) == [
        {"name": "0", "caption": "one", "label": 3, "shade": 1},
        {"name": "1", "caption": ["two", "words"], "label": -1, "boxes": [0.5, 0.25], "shade": 2},
        {"name": "2", "caption": "three", "shade": 3}]
    with pytest.raises(UserError, match="has no column 'imgae', only image, caption, label, boxes; did you mean 'im"):
        open_pictures(str(tmp_path / "a.array_record"), "imgae").row(0)
    write_records(tmp_path / "d.array_record", [tf_example(label=[3]), b"neither", tf_example(image=[png(2)])])
    source = open_pictures(str(tmp_path / "d.array_record"))  # the first lacks it, as any record may
    assert source.row(0).problem == "it has no field 'image'" and source.image(2) == png(2)
    write_records(tmp_path / "b.array_record", [b"neither", png(1), tf_example(image=[b"x"]) [:-1], b'{"image": "-"}'])
    source = open_pictures(str(tmp_path / "b.array_record"))
    assert {source.row(i).problem for i in range(3)} == {"it is neither JSON nor a tf.train.Example"}
    with pytest.raises(BadImage, match="not base64"):
        source.image(3)
    (tmp_path / "c.array_record").write_bytes(b"nothing of the kind" * 10000)
    with pytest.raises(UserError, match="is not an ArrayRecord file, or a damaged one"):
        len(open_pictures(str(tmp_path / "c.array_record")))


def test_unpacked_and_damaged_examples():
    ints = field(3, varint(1 << 3) + varint(5) + varint(8) + varint(6))  # each of its own, as older writers do
    assert example_fields(field(1, field(1, field(1, b"a") + field(2, ints)))) == {"a": [5, 6]}
    for damaged in (b"", b"\x0a", b"\xff" * 20, b"\x0b\x00", b"\x0a\xff\xff\x01abc"):
        with pytest.raises((ValueError, IndexError)):
            example_fields(damaged)


def test_records_of_something_else_are_named(tmp_path):
    path = tmp_path / "texts.array_record"
    write_records(path, [b"plain text of a caption", b"\x0a\x02\x0a\x00"])
    rows = open_pictures(str(path))
    assert [rows.row(i).problem for i in range(2)] == ["it is neither JSON nor a tf.train.Example"] * 2


def test_arrays(tmp_path):
    images = np.stack([picture(i) for i in range(4)])
    np.savez(tmp_path / "a.npz", images=images, labels=np.arange(4), names=np.array(["w", "x", "y", "z"]), other=1)
    rows = opened(tmp_path / "a.npz", tmp_path)
    assert [(row["label"], row["shade"]) for row in rows] == [(0, 0), (1, 1), (2, 2), (3, 3)]
    assert open_pictures(str(tmp_path / "a.npz")).classes("label") == ("w", "x", "y", "z")
    np.savez(tmp_path / "b.npz", pixels=images.astype(np.float32))
    with pytest.raises(UserError, match="'pixels' is float32 of shape .*pictures are uint8"):
        len(open_pictures(str(tmp_path / "b.npz"), "pixels"))
    with pytest.raises(UserError, match="has no column 'image', only pixels"):
        len(open_pictures(str(tmp_path / "b.npz")))
    (tmp_path / "c.npz").write_bytes(b"PK nothing")
    with pytest.raises(UserError, match="is not an NPZ file, or a damaged one"):
        len(open_pictures(str(tmp_path / "c.npz")))


def idx(values):
    return bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()


@pytest.mark.parametrize("packed", [False, True])
def test_idx(tmp_path, packed):
    images, labels = np.arange(3 * 4 * 5, dtype=np.uint8).reshape(3, 4, 5), np.array([7, 0, 2], np.uint8)
    end = ".gz" if packed else ""
    write = (lambda p, d: p.write_bytes(gzip.compress(d, mtime=0))) if packed else (lambda p, d: p.write_bytes(d))
    write(tmp_path / f"train-images-idx3-ubyte{end}", idx(images))
    write(tmp_path / f"train-labels-idx1-ubyte{end}", idx(labels))
    source = open_pictures(str(tmp_path / f"train-images-idx3-ubyte{end}"))
    assert [source.row(i).columns for i in range(3)] == [{"label": 7}, {"label": 0}, {"label": 2}]
    assert np.array_equal(np.stack([source.image(i)[..., 0] for i in range(3)]), images)
    before = source.fingerprint(tmp_path / "cache")
    write(tmp_path / f"train-labels-idx1-ubyte{end}", idx(labels[::-1]))
    source = open_pictures(str(tmp_path / f"train-images-idx3-ubyte{end}"))
    assert source.row(0).columns == {"label": 2} and source.fingerprint(tmp_path / "cache") != before
    write(tmp_path / f"train-labels-idx1-ubyte{end}", idx(labels[:2]))
    with pytest.raises(UserError, match="has 2 labels for 3 pictures"):
        len(open_pictures(str(tmp_path / f"train-images-idx3-ubyte{end}")))
    write(tmp_path / f"cut{end}", idx(images)[:-1])
    with pytest.raises(UserError, match="damaged IDX file: 59 values, not 3 x 4 x 5"):
        read_idx(str(tmp_path / f"cut{end}"))
    write(tmp_path / f"none{end}", b"abc")
    with pytest.raises(UserError, match="is not an IDX file of bytes"):
        read_idx(str(tmp_path / f"none{end}"))


def test_labels_of_an_idx_file_by_its_own_name(tmp_path):
    """That of its folder does not count, and both classes that read such files go by one rule."""
    folder = tmp_path / "images-idx3"
    folder.mkdir()
    (folder / "images-idx3-ubyte").write_bytes(idx(np.zeros((3, 28, 28), np.uint8)))
    (folder / "labels-idx1-ubyte").write_bytes(idx(np.array([7, 0, 2], np.uint8)))
    source = open_pictures(str(folder / "images-idx3-ubyte"))
    assert [source.row(i).columns for i in range(3)] == [{"label": 7}, {"label": 0}, {"label": 2}]
    assert idx_labels("images/t10k-images.idx3-ubyte") == "images/t10k-labels.idx1-ubyte"
    assert idx_labels("images/other") == ""


def test_tfds(tmp_path, monkeypatch):
    pytest.importorskip("tensorflow_datasets")
    monkeypatch.setattr("tensorflow_datasets.core.constants.DATA_DIR", str(tmp_path / "tfds"))
    package = tmp_path / "tiny_pictures"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "tiny_pictures_builder.py").write_text(textwrap.dedent("""
        import io

        import numpy as np
        import tensorflow_datasets as tfds
        from PIL import Image

        class TinyPictures(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("1.0.0")
            def _info(self):
                return self.dataset_info_from_configs(features=tfds.features.FeaturesDict({
                    "image": tfds.features.Image(shape=(None, None, 3)), "caption": tfds.features.Text(),
                    "label": tfds.features.ClassLabel(names=["cat", "dog"])}))
            def _split_generators(self, download):
                return {"train": self._generate_examples(3)}
            def _generate_examples(self, count):
                for i in range(count):
                    image = io.BytesIO()
                    Image.fromarray(np.full((8, 10, 3), i, np.uint8)).save(image, "PNG")
                    image.seek(0)
                    yield i, {"image": image, "caption": f"picture {i}", "label": i % 2}
    """))
    monkeypatch.syspath_prepend(str(tmp_path))
    __import__("tiny_pictures.tiny_pictures_builder")
    rows = opened("tfds:tiny_pictures", tmp_path)
    assert sorted(row["caption"] for row in rows) == ["picture 0", "picture 1", "picture 2"]
    assert all(row["caption"] == f"picture {row['shade']}" and row["label"] == row["shade"] % 2 for row in rows)
    source = open_pictures("tfds:tiny_pictures")
    assert isinstance(source.image(0), bytes) and source.classes("label") == ("cat", "dog")
    with pytest.raises(UserError, match="no field 'imgae', only .*; did you mean 'image'"):
        len(open_pictures("tfds:tiny_pictures", "imgae"))


def test_what_is_missing(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("x")
    (tmp_path / "a.tar.gz").write_bytes(b"")
    (tmp_path / "t.tsv").write_text("file\tcaption\nb.png\tx\n")
    (tmp_path / "none.tsv").write_text("")
    for path, message in ((tmp_path / "empty", "no files in .*empty"),
                          (tmp_path / "text", "no pictures in .*text, only a.txt"),
                          (tmp_path / "tetx", "no data at .*tetx; did you mean 'text'"),
                          (tmp_path / "a.tar.gz", "is packed and cannot be read at random: unpack it")):
        with pytest.raises(UserError, match=message):
            open_pictures(str(path), cache=tmp_path)
    with pytest.raises(UserError, match="t.tsv has no column 'flie', only file, caption; did you mean 'file'"):
        open_pictures(str(tmp_path / "t.tsv"), "flie")
    with pytest.raises(UserError, match="none.tsv is empty"):
        open_pictures(str(tmp_path / "none.tsv"), "file")
    with pytest.raises(UserError, match="data.images is /nowhere, which is neither a folder nor a tar"):
        open_pictures(str(tmp_path / "t.tsv"), "file", "/nowhere")


def test_damaged_tars(tmp_path):
    path = tmp_path / "a.tar"
    write_tar(path, [("a.png", png(1)), ("b.png", bytes(5000))])
    whole = path.read_bytes()
    for end in (700, 1600, 3000):
        path.write_bytes(whole[:end])
        with pytest.raises(UserError, match="unfinished tar file"):
            open_pictures(str(path), cache=tmp_path / "cache")
    path.write_bytes(b"x" * 2000)
    with pytest.raises(UserError, match="damaged or unfinished tar file"):
        open_pictures(str(path), cache=tmp_path / "cache")
    write_tar(path, [("a.txt", b"x")])
    with pytest.raises(UserError, match="no pictures in .*a.tar"):
        len(open_pictures(str(path), cache=tmp_path / "cache"))


def test_drawn_scenes_say_what_they_show():
    from jaxgen.data.scenes import parse
    from jaxgen.evaluation.scenes import read

    source = pickle.loads(pickle.dumps(open_pictures("")))
    assert len(source) == 4096
    for i in range(20):
        row, facts = source.row(i), read(source.image(i), level=1)
        assert facts == parse(row.columns["caption"]) and row.columns["label"] == facts.groups[0].name
