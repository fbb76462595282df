import builtins
import gzip
import json
import os
import sys
import textwrap

import pytest

from jaxgen.data import sources
from jaxgen.data.sources import content_hashes, open_source
from jaxgen.errors import UserError


def documents(path, field="text"):
    """{name: text} with the pieces of long documents joined."""
    texts, name = {}, None
    for piece in open_source(str(path), field).pieces():
        assert piece.name == name or piece.name not in texts
        texts[piece.name] = texts.get(piece.name, "") + piece.text
        name = None if piece.last else piece.name
    assert name is None
    return texts


def write_records(path, records):
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()


def test_every_form(tmp_path):
    lines = "".join(json.dumps({"text": f"line {i}", "body": "b"}) + "\n" for i in range(3)) + "\n"
    (tmp_path / "b.jsonl").write_text(lines)
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "a.txt").write_bytes("añ\r\nb".encode())
    (tmp_path / "e.txt.gz").write_bytes(gzip.compress(b"packed"))
    (tmp_path / ".hidden").write_bytes(b"\xff")
    write_records(tmp_path / "d.array_record", [b'{"text": "json"}', b"plain text"])
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "z.txt").write_text("z")

    assert documents(tmp_path / "a.txt") == {"a.txt": "añ\r\nb"}
    assert documents(tmp_path / "b.jsonl") == {"1": "line 0", "2": "line 1", "3": "line 2"}
    assert documents(tmp_path / "c.jsonl.gz", "body") == {"1": "b", "2": "b", "3": "b"}
    assert documents(tmp_path / "d.array_record") == {"0": "json", "1": "plain text"}
    assert documents(tmp_path / "*.txt*") == {"a.txt": "añ\r\nb", "e.txt.gz": "packed"}
    assert list(documents(tmp_path / "**" / "*.txt")) == ["a.txt", "sub/z.txt"]
    assert list(documents(tmp_path)) == [
        "a.txt", "b.jsonl:1", "b.jsonl:2", "b.jsonl:3", "c.jsonl.gz:1", "c.jsonl.gz:2", "c.jsonl.gz:3",
        "d.array_record:0", "d.array_record:1", "e.txt.gz", "sub/z.txt"]


@pytest.mark.parametrize("text", ["ab\n" * 50, "ñ数\U0001f600" * 40, "a" * 64, "é" * 32, "x" * 63 + "é", ""])
def test_long_texts_come_in_pieces(tmp_path, monkeypatch, text):
    monkeypatch.setattr(sources, "PIECE", 16)
    (tmp_path / "a.txt").write_text(text)
    assert documents(tmp_path / "a.txt") == {"a.txt": text}
    assert all(len(p.text.encode()) <= 32 for p in open_source(str(tmp_path / "a.txt")).pieces())


def test_what_is_missing(tmp_path):
    (tmp_path / "input.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no data at .*inptu.txt; did you mean 'input.txt'\?"):
        open_source(str(tmp_path / "inptu.txt"))
    with pytest.raises(UserError, match="no data at /nowhere/at/all$"):
        open_source("/nowhere/at/all")
    with pytest.raises(UserError, match="no files in .*empty"):
        open_source(str(tmp_path / "empty"))
    with pytest.raises(UserError, match=r"no files match .*\*\.json"):
        open_source(str(tmp_path / "*.json"))
    source = open_source(str(tmp_path / "input.txt"))
    (tmp_path / "input.txt").unlink()
    with pytest.raises(UserError, match="input.txt is not there any more"):
        list(source.pieces())


def bad(path, content, field="text"):
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        documents(path, field)
    return str(error.value)


def test_what_is_damaged(tmp_path):
    good = b'{"text": "a", "title": "b"}\n'
    assert "b.jsonl, line 2 is not valid JSON" in bad(tmp_path / "b.jsonl", good + b'{"text": \n')
    assert "line 1 is not a JSON object but list" in bad(tmp_path / "b.jsonl", b"[1]\n")
    assert "line 1 is not UTF-8 text" in bad(tmp_path / "b.jsonl", b'{"text": "\xff\xfe"}\n')
    message = bad(tmp_path / "b.jsonl", good, "txet")
    assert message.endswith("line 1 has no field 'txet', only text, title; did you mean 'text'?")
    assert "the field 'text' is not text but int" in bad(tmp_path / "b.jsonl", b'{"text": 3}')
    packed = gzip.compress(good * 100, mtime=0)
    assert "c.jsonl.gz is a damaged or unfinished gzip" in bad(tmp_path / "c.jsonl.gz", packed[:-20])
    flipped = packed[:-6] + bytes([packed[-6] ^ 1]) + packed[-5:]
    assert "damaged or unfinished gzip" in bad(tmp_path / "c.jsonl.gz", flipped)
    assert "damaged or unfinished gzip" in bad(tmp_path / "c.txt.gz", b"no gzip at all")
    assert "is not UTF-8 text (invalid start byte near byte 3)" in bad(tmp_path / "a.txt", b"abc\xff")
    assert "is not an ArrayRecord file" in bad(tmp_path / "d.array_record", b"nothing of the kind" * 10000)


def test_damaged_array_record(tmp_path):
    path = tmp_path / "d.array_record"
    write_records(path, [os.urandom(5000).hex().encode() for _ in range(20)])
    data = bytearray(path.read_bytes())
    data[len(data) // 4] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(UserError, match="d.array_record is damaged near record|not an ArrayRecord"):
        documents(path)
    write_records(path, [b"\xff\xfe"])
    with pytest.raises(UserError, match="record 0 is neither JSON nor UTF-8 text"):
        documents(path)


def test_python_library():
    texts = documents("")
    assert texts["library/argparse.py"].startswith("# Author") and len(texts) > 300
    assert not any("/test" in name or "encodings/" in name or "site-packages" in name for name in texts)
    assert all("\0" not in text for text in texts.values())


def test_extras_are_named(monkeypatch):
    def without(*names):
        real = builtins.__import__

        def refuse(name, *args, **kwargs):
            if name.split(".")[0] in names:
                raise ImportError(f"No module named {name}")
            return real(name, *args, **kwargs)

        monkeypatch.setattr(builtins, "__import__", refuse)
        for name in list(sys.modules):
            if name.split(".")[0] in names:
                monkeypatch.delitem(sys.modules, name)

    without("tensorflow_datasets", "gcsfs", "tensorflow")
    with pytest.raises(UserError, match=r"needs TensorFlow Datasets: pip install 'jaxgen\[tfds\]'"):
        list(open_source("tfds:lm1b/subwords:1.0").pieces())
    with pytest.raises(UserError, match=r"needs Google Cloud Storage support: pip install 'jaxgen\[gcs\]'"):
        open_source("gs://bucket/data/*.jsonl")


def test_tfds(tmp_path, monkeypatch):
    pytest.importorskip("tensorflow_datasets")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "data"))
    package = tmp_path / "tiny_words"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "tiny_words_builder.py").write_text(textwrap.dedent("""
        import numpy as np
        import tensorflow_datasets as tfds

        class TinyWords(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("1.0.0")
            def _info(self):
                features = tfds.features.FeaturesDict({"text": tfds.features.Text(), "n": np.int32})
                return self.dataset_info_from_configs(features=features)
            def _split_generators(self, download):
                return {"train": self._generate_examples(4), "test": self._generate_examples(2)}
            def _generate_examples(self, count):
                for i in range(count):
                    yield i, {"text": f"word {i}", "n": i}
    """))
    monkeypatch.syspath_prepend(str(tmp_path))
    __import__("tiny_words.tiny_words_builder")

    assert sorted(documents("tfds:tiny_words").values()) == [f"word {i}" for i in range(4)]
    assert len(documents("tfds:tiny_words:1.0#test")) == 2
    assert len(documents("tfds:tiny_words#train[:3]")) == 3
    source = open_source("tfds:tiny_words")
    assert source.fingerprint(tmp_path) == open_source("tfds:tiny_words").fingerprint(tmp_path)
    assert source.fingerprint(tmp_path) != open_source("tfds:tiny_words#test").fingerprint(tmp_path)
    with pytest.raises(UserError, match="no split 'tset', only test, train; did you mean 'test'"):
        documents("tfds:tiny_words#tset")
    with pytest.raises(UserError, match="no field 'txt', only text, n; did you mean 'text'"):
        documents("tfds:tiny_words", "txt")
    with pytest.raises(UserError, match="the field 'n' is not text but int"):
        documents("tfds:tiny_words", "n")
    with pytest.raises(UserError, match="TFDS cannot give tiny_wrods"):
        documents("tfds:tiny_wrods")


def test_hashes_are_of_content_and_remembered(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("one")
    os.utime(path, ns=(10**18, 10**18))
    first = content_hashes([str(path)], tmp_path / "cache")[str(path)]
    with monkeypatch.context() as patch:
        patch.setattr(sources, "_digest", lambda *_: pytest.fail("hashed an unchanged file again"))
        assert content_hashes([str(path)], tmp_path / "cache")[str(path)] == first
    os.utime(path, ns=(10**18 + 1, 10**18 + 1))
    assert content_hashes([str(path)], tmp_path / "cache")[str(path)] == first  # touched only
    path.write_text("two")
    assert content_hashes([str(path)], tmp_path / "cache")[str(path)] != first
    path.write_text("one")  # written just now: not trusted by time stamp
    assert content_hashes([str(path)], tmp_path / "cache")[str(path)] == first


def test_a_copy_elsewhere_is_the_same_data(tmp_path):
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        for name in ("a.txt", "b.txt"):
            (tmp_path / folder / name).write_text(name)
    (tmp_path / "renamed.txt").write_text("a.txt")

    def fingerprint(path):
        return open_source(str(tmp_path / path)).fingerprint(tmp_path / "cache")

    assert fingerprint("x") == fingerprint("y") != fingerprint("x/a.txt") == fingerprint("renamed.txt")
