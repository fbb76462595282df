import errno
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from jaxgen.data import Bytes, Characters, SentencePiece, Text
from jaxgen.data import cache as caching
from jaxgen.data.processes import workers
from jaxgen.data.sources import Piece, Source, open_source
from jaxgen.data.tokens import Division, tokenize
from jaxgen.errors import UserError


class Listed(Source):
    """Pieces from a list, read in the same way as files are."""

    def __init__(self, *pieces, deduplicate=False):
        self.list = [Piece(*p) for p in pieces]
        self.deduplicate = deduplicate

    def pieces(self):
        yield from self.list

    def fingerprint(self, cache, progress=None):
        return caching.key([(p.name, p.text, p.last) for p in self.list])


def test_a_document_of_a_name_that_is_not_utf8():
    division = Division(Listed(("caf\udce9.txt", "text")), heldout=0.5, by="name")
    assert [piece.text for _, piece in division.pieces()] == ["text"]


def parts(corpus, tokenizer):
    """The documents of each part, as text."""
    found = {}
    for name in ("train", "heldout"):
        tokens = corpus.part(name)
        assert len(tokens) == (tokens.ends[-1] if len(tokens.ends) else 0)
        begins = [0, *tokens.ends[:-1]]
        assert all(tokens.stream[end - 1] == tokenizer.eos for end in tokens.ends)
        found[name] = [tokenizer.decode(tokens.stream[a:b - 1]) for a, b in zip(begins, tokens.ends, strict=False)]
    return found


def divided(tmp_path, source, heldout, by, other=None):
    tokenizer = Bytes().fit()
    corpus = tokenize(Division(source, heldout, by, other), tokenizer, tmp_path)
    return parts(corpus, tokenizer), corpus.meta


@pytest.mark.parametrize("pieces", [
    [("a", "0123456789" * 3), ("b", "xyz" * 10)],
    [("a", "0123456789", False), ("a", "0123456789" * 2), ("b", "xyz", False), ("b", "xyz" * 9)],
    [("a", "0123456789" * 3, False), ("a", ""), ("b", "xyz" * 10, False), ("b", "")],
])
@pytest.mark.parametrize("heldout", [0.1, 0.5, 0.75])
def test_tail_is_the_last_characters_exactly(tmp_path, pieces, heldout):
    found, meta = divided(tmp_path, Listed(*pieces), heldout, "tail")
    text = "0123456789" * 3 + "xyz" * 10
    cut = int(60 * (1 - heldout))
    assert "".join(found["train"]) == text[:cut] and "".join(found["heldout"]) == text[cut:]
    assert "" not in found["train"] + found["heldout"]
    assert meta["parts"]["heldout"]["bytes"] == 60 - cut


def test_names_divide_documents_stably(tmp_path):
    few = [(f"doc{i}", f"text {i}") for i in range(200)]
    found, _ = divided(tmp_path, Listed(*few), 0.1, "name")
    assert 8 <= len(found["heldout"]) <= 35 and len(found["heldout"]) + len(found["train"]) == 200
    more, _ = divided(tmp_path, Listed(*few, *[(f"more{i}", "more") for i in range(50)]), 0.1, "name")
    assert [t for t in more["heldout"] if t != "more"] == found["heldout"]


def test_another_source_is_held_out(tmp_path):
    found, _ = divided(tmp_path, Listed(("a", "train")), 0.1, "name", Listed(("a", "held")))
    assert found == {"train": ["train"], "heldout": ["held"]}


def test_near_duplicates_leave_both_parts(tmp_path):
    names = [f"doc{i}" for i in range(300)]
    division = Division(Listed(*[(n, "x") for n in names]), 0.2, "name")
    held = [n for n in names if division.held(n)]
    kept = [n for n in names if not division.held(n)]
    own = [f"a line of document {i} that is long enough to count" for i in range(40)]
    shared = "a line that stands in a training document, long enough"
    source = Listed((kept[0], "\n".join([shared, "second " + shared])), (held[0], "\n".join([*own[:9], shared])),
                    (held[1], "\n".join([*own[:8], "  " + shared, "second " + shared])), (held[2], "short\n" * 9),
                    deduplicate=True)
    division = Division(source, 0.2, "name")
    assert division.near_duplicates == {held[1], held[2]}  # a tenth may be shared; what cannot be judged leaves too
    found, meta = divided(tmp_path, source, 0.2, "name")
    assert len(found["train"]) == len(found["heldout"]) == 1
    assert meta["near_duplicates"] == sorted([held[1], held[2]])


def test_what_cannot_be_divided(tmp_path):
    with pytest.raises(UserError, match="there is no text in the data"):
        divided(tmp_path, Listed(("a", "")), 0.1, "tail")
    with pytest.raises(UserError, match="no document of 1 fell into the held-out part .* 'tail'"):
        divided(tmp_path, Listed(("a", "text")), 0.01, "name")
    with pytest.raises(UserError, match="all of the data is held out"):
        divided(tmp_path, Listed(("a", "text")), 0.99999999999, "name")
    with pytest.raises(UserError, match="no text in data.heldout_path"):
        divided(tmp_path, Listed(("a", "text")), 0.0, "name", Listed(("a", "")))
    for wrong, message in (({"heldout": 1.0}, "fraction"), ({"length": 0}, "at least 1"),
                           ({"packing": "x"}, "'blocks'"), ({"heldout_by": "x"}, "'tail'")):
        with pytest.raises(UserError, match=message):
            Text(**wrong)


def test_unknown_characters_are_counted(tmp_path):
    tokenizer = Characters(vocab_size=3).fit(["aa"])
    meta = tokenize(Division(Listed(("x", "aab")), 0.0, "name"), tokenizer, tmp_path).meta
    assert meta["parts"]["train"]["unknown"] == 1 and not meta["lossless"]


def test_processes_write_what_one_writes(tmp_path):
    source = Listed(*[(f"d{i}", f"document {i} says this\n" * (50 * i), i % 3 > 0) for i in range(60)], ("end", "z"))
    tokenizer = SentencePiece(vocab_size=384).fit([" ".join(map(str, range(9000))) + "document says this\n" * 200])
    files = []
    for processes in (0, 2):
        directory = tokenize(Division(source, 0.1, "tail"), tokenizer, tmp_path / str(processes), None,
                             processes).directory
        files.append({p.name: p.read_bytes() for p in directory.iterdir()})
    assert files[0] == files[1] and len(files[0]["train.bin"]) > 1 << 17


def test_cache_is_by_content(tmp_path):
    (tmp_path / "a.txt").write_text("some text\n" * 100)
    data = Text(path=str(tmp_path / "a.txt"), tokenizer=Characters(), length=8, heldout_by="tail")
    first = data.prepare(tmp_path / "cache")
    stages = []
    again = data.prepare(tmp_path / "cache", lambda stage, *_: stages.append(stage))
    assert not stages and again.fingerprint == first.fingerprint
    (tmp_path / "a.txt").rename(tmp_path / "b.txt")
    moved = Text(path=str(tmp_path / "b.txt"), tokenizer=Characters(), length=8, heldout_by="tail")
    assert moved.prepare(tmp_path / "cache").fingerprint == first.fingerprint
    (tmp_path / "b.txt").write_text("some texT\n" * 100)
    assert moved.prepare(tmp_path / "cache").fingerprint != first.fingerprint


def test_a_damaged_entry_is_made_anew(tmp_path):
    source, tokenizer = Listed(("a", "some text")), Bytes().fit()
    corpus = tokenize(Division(source, 0.0, "name"), tokenizer, tmp_path)
    (corpus.directory / "train.bin").write_bytes(b"")
    again = tokenize(Division(source, 0.0, "name"), tokenizer, tmp_path)
    assert parts(again, tokenizer)["train"] == ["some text"]


SLOW = """
import sys, time
from jaxgen.data import Bytes, Text
def progress(stage, done, total):
    print(stage, flush=True)
    time.sleep({sleep})
Text(path=sys.argv[1], tokenizer=Bytes(), length=8, heldout_by="tail").prepare(sys.argv[2], progress)
print("done", flush=True)
"""


def start(tmp_path, sleep):
    return subprocess.Popen([sys.executable, "-c", SLOW.format(sleep=sleep), str(tmp_path / "a.txt"),
                             str(tmp_path / "cache")], stdout=subprocess.PIPE, text=True)


def test_killed_midway_it_starts_again(tmp_path):
    (tmp_path / "a.txt").write_text("0123456789\n" * 500_000)
    killed = start(tmp_path, 60)
    while killed.stdout.readline().strip() != "tokenizing":
        assert killed.poll() is None
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    children = subprocess.run(["pgrep", "-P", str(killed.pid)], capture_output=True, text=True).stdout
    tokens = tmp_path / "cache" / "tokens"
    assert not children and [p for p in tokens.iterdir() if ".tmp-" in p.name]
    data = Text(path=str(tmp_path / "a.txt"), tokenizer=Bytes(), length=8, heldout_by="tail")
    prepared = data.prepare(tmp_path / "cache")
    assert prepared.facts["bytes"] + prepared.heldout_bytes == 5_500_000
    assert not [p for p in tokens.iterdir() if ".tmp-" in p.name]  # what the dead one left is cleared away
    assert prepared.fingerprint == data.prepare(tmp_path / "other").fingerprint


def test_two_at_once_make_one(tmp_path):
    (tmp_path / "a.txt").write_text("0123456789\n" * 1000)
    both = [start(tmp_path, 0.3) for _ in range(2)]
    out = [p.communicate(timeout=60)[0] for p in both]
    assert all(p.returncode == 0 for p in both) and all("done" in o for o in out)
    assert sum("tokenizing" in o for o in out) == 1  # the other waited, and found it
    entries = [p for p in (tmp_path / "cache" / "tokens").iterdir() if p.is_dir()]
    assert len(entries) == 1 and caching.is_whole(entries[0])


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("text " * 100)
    (tmp_path / "file").write_text("")
    data = Text(path=str(tmp_path / "a.txt"), tokenizer=Bytes(), length=8, heldout_by="tail")
    with pytest.raises(UserError, match="cannot write to the cache .*JAXGEN_CACHE"):
        data.prepare(tmp_path / "file" / "cache")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(caching, "_seal", full)
    with pytest.raises(UserError, match="no space left in the cache"):
        data.prepare(tmp_path / "cache")
    assert not [p for p in (tmp_path / "cache" / "tokens").iterdir() if p.is_dir()]


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.delenv("JAXGEN_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert caching.root() == tmp_path / "jaxgen"
    monkeypatch.setenv("JAXGEN_CACHE", str(tmp_path / "own"))
    assert caching.root() == tmp_path / "own" and caching.root("/given") == type(tmp_path)("/given")


def test_data_that_changes_while_it_is_read(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("text " * 100)
    data = Text(path=str(path), tokenizer=Bytes(), length=8, heldout_by="tail")
    with pytest.raises(UserError, match="changed while it was read"):
        data.prepare(tmp_path / "cache", lambda *_: path.write_text("other " * 100))


def square(x):
    if x == 13:
        raise UserError("thirteen")
    return x * x


def test_workers_answer_in_order_and_pass_errors_on():
    with workers(square, 2) as run:
        assert list(run(range(12))) == [(i, i * i) for i in range(12)]
    with pytest.raises(UserError, match="^thirteen$"):
        with workers(square, 2) as run:
            list(run(range(20)))
    began = time.perf_counter()
    with pytest.raises(RuntimeError, match=r"a data process died \(exit code"):
        with workers(lambda x: os._exit(3), 2) as run:
            list(run(range(20)))
    assert time.perf_counter() - began < 10


def test_large_vocabularies_take_four_bytes(tmp_path):
    class Many(type(Bytes().fit())):
        vocab_size = 100_000

    corpus = tokenize(Division(Listed(("a", "abc")), 0.0, "name"), Many(), tmp_path)
    assert corpus.part("train").stream.dtype == np.uint32
    assert json.loads((corpus.directory / "meta.json").read_text())["dtype"] == "uint32"


def test_source_of_a_big_file_is_read_in_pieces(tmp_path):
    (tmp_path / "a.txt").write_text("0123456789\n" * 300_000)
    pieces = list(open_source(str(tmp_path / "a.txt")).pieces())
    assert len(pieces) > 3 and [p.last for p in pieces] == [False] * (len(pieces) - 1) + [True]
