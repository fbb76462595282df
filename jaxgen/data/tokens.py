"""Text to token files, once: divided into a training and a held-out part, tokenized in parallel, cached by content."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import lzma
import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Int, Integer

from jaxgen.data import cache as caching
from jaxgen.data.base import Progress
from jaxgen.data.processes import workers
from jaxgen.data.sources import Piece, Source, open_source
from jaxgen.data.tokenizers import Tokenizer, TokenizerConfig, load
from jaxgen.errors import UserError

VERSION = 2  # counts up when the same input would give other files
XZ_LIMIT = 64 << 20  # bytes of held-out text up to which xz is run on it
PROBE = 1 << 20  # characters of each part that are decoded again, to see whether the tokenizer loses anything
PARTS = ("train", "heldout")


# --- the division --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Division:
    """What is trained on and what is held out.

    Attributes:
      source: the documents.
      heldout: fraction that is held out.
      by: "name" holds out whole documents, chosen by a hash of their name; "tail" the last characters.
      other: a source of its own for the held-out part, in place of the two above.
    """

    source: Source
    heldout: float
    by: str
    other: Source | None = None

    def fingerprint(self, cache: Path, progress: Progress | None = None) -> str:
        rest = [self.other.fingerprint(cache, progress)] if self.other else [self.heldout, self.by]
        return caching.key(VERSION, self.source.fingerprint(cache, progress), *rest)

    def pieces(self) -> Iterator[tuple[str, Piece]]:
        """("train" or "heldout", piece) in order; documents without text are left out, and near-duplicates."""
        if self.other:
            yield from (("train", p) for p in self.source.pieces())
            yield from (("heldout", p) for p in self.other.pieces())
        elif self.by == "tail" and self.heldout:
            yield from self._tail()
        else:
            for piece in self.source.pieces():
                if piece.name not in self.near_duplicates:
                    yield ("heldout" if self.held(piece.name) else "train"), piece

    def held(self, name: str) -> bool:
        """Whether the document of this name is held out, when that goes by name."""
        return int.from_bytes(hashlib.sha256(name.encode(errors="replace")).digest()[:8], "big") < self.heldout * 2**64

    def _tail(self) -> Iterator[tuple[str, Piece]]:
        train = int(self._characters * (1 - self.heldout))
        position = 0
        for piece in self.source.pieces():
            cut = min(max(train - position, 0), len(piece.text))
            if position < train:
                ends = position + len(piece.text) >= train  # the rest of the document, if any, is held out
                yield "train", Piece(piece.name, piece.text[:cut], piece.last or ends)
            if cut < len(piece.text) or position >= train:
                yield "heldout", Piece(piece.name, piece.text[cut:], piece.last)
            position += len(piece.text)

    @functools.cached_property
    def _characters(self) -> int:
        return sum(len(piece.text) for piece in self.source.pieces())

    @functools.cached_property
    def near_duplicates(self) -> frozenset[str]:
        """Held-out documents of which over a tenth of the long lines (40 characters or more) are trained on too.

        They leave both parts. One without long lines cannot be judged, and leaves too.
        """
        if not self.source.deduplicate or not self.heldout:
            return frozenset()
        seen: set[int] = set()
        held: dict[str, set[int]] = {}
        for piece in self.source.pieces():
            lines = {hash(line) for line in map(str.strip, piece.text.splitlines()) if len(line) >= 40}
            (held.setdefault(piece.name, set()) if self.held(piece.name) else seen).update(lines)
        return frozenset(name for name, lines in held.items() if len(lines & seen) * 10 > len(lines) or not lines)


# --- the files -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Tokens:
    """A token stream on disk; every document ends with `eos`. Pickles as its path.

    Attributes:
      path: `.bin` file of tokens, with document ends beside it (`.ends`, int64, exclusive).
      dtype: "uint16" or "uint32".
    """

    path: Path
    dtype: str

    @functools.cached_property
    def stream(self) -> Integer[np.ndarray, " N"]:
        return _mapped(self.path, self.dtype)

    @functools.cached_property
    def ends(self) -> Int[np.ndarray, " documents"]:
        return _mapped(self.path.with_suffix(".ends"), "int64")

    def __len__(self) -> int:
        return len(self.stream)

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "dtype": self.dtype}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


def _mapped(path: Path, dtype: str) -> np.ndarray:
    return np.memmap(path, dtype, "r") if path.stat().st_size else np.zeros(0, dtype)


@dataclasses.dataclass(frozen=True)
class Corpus:
    """The tokenized data: two streams and what is known of them."""

    directory: Path
    meta: dict[str, Any]

    def part(self, name: str) -> Tokens:
        return Tokens(self.directory / f"{name}.bin", self.meta["dtype"])


def fit(config: TokenizerConfig, divisions: Sequence[Division], cache: Path,
        progress: Progress | None = None) -> Tokenizer:
    """The fitted tokenizer; what is learned is learned from the training parts and cached by their content."""
    if not config.trained:
        return config.fit(())
    key = caching.key(VERSION, type(config).__name__, dataclasses.asdict(config), _library(),
                      [d.fingerprint(cache, progress) for d in divisions])

    def texts() -> Iterator[str]:
        total = sum(d.source.size for d in divisions)
        done = 0
        for division in divisions:
            for part, piece in division.pieces():
                if part == "train":
                    yield piece.text
                done += len(piece.text)
                if progress:
                    progress("learning the tokenizer", done, max(total, done))

    return load(caching.build(cache / "tokenizers" / key, lambda directory: config.fit(texts()).save(directory)))


def _library() -> str:
    import sentencepiece

    return sentencepiece.__version__


def tokenize(division: Division, tokenizer: Tokenizer, cache: Path, progress: Progress | None = None,
             processes: int | None = None) -> Corpus:
    """The token files of `division`, found in `cache` or made there.

    Args:
      processes: worker processes; None for one a core where there is enough text to be worth it, 0 for none.

    Raises:
      UserError: there is nothing to train on, or the source cannot be read.
    """
    before = division.fingerprint(cache, progress)
    directory = cache / "tokens" / caching.key(before, tokenizer.fingerprint)

    def make(temporary: Path) -> None:
        _write(temporary, division, tokenizer, progress, processes)
        if division.fingerprint(cache) != before:
            raise UserError("the data changed while it was read; start again")

    caching.build(directory, make)
    return Corpus(directory, json.loads((directory / "meta.json").read_text()))


def _write(directory: Path, division: Division, tokenizer: Tokenizer, progress: Progress | None,
           processes: int | None) -> None:
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    total = division.source.size + (division.other.size if division.other else 0)
    if processes is None:
        processes = min(os.cpu_count() or 1, 32) if total > 4 << 20 else 0
    counts = {part: dict.fromkeys(("documents", "tokens", "bytes", "characters", "unknown"), 0) for part in PARTS}
    done, exact = 0, True
    with contextlib.ExitStack() as stack:
        def create(name: str) -> BinaryIO:
            return stack.enter_context((directory / name).open("wb"))

        streams = {part: create(f"{part}.bin") for part in PARTS}
        ends = {part: create(f"{part}.ends") for part in PARTS}
        heldout_text = create("heldout.txt")
        encode = stack.enter_context(workers(_Encode(tokenizer), processes))
        for pieces, encoded in encode(_batches(division.pieces())):
            for (part, piece), ids in zip(pieces, encoded, strict=True):
                count, data = counts[part], piece.text.encode(errors="replace")
                if count["characters"] < PROBE:
                    exact = exact and tokenizer.decode(ids) == piece.text
                ids = ids.astype(dtype)
                if tokenizer.unknown is not None:
                    count["unknown"] += int((ids == tokenizer.unknown).sum())
                streams[part].write(ids.tobytes())
                count["tokens"] += len(ids)
                count["bytes"] += len(data)
                count["characters"] += len(piece.text)
                if piece.last:
                    streams[part].write(np.asarray([tokenizer.eos], dtype).tobytes())
                    count["tokens"] += 1
                    count["documents"] += 1
                    ends[part].write(struct.pack("<q", count["tokens"]))
                if part == "heldout" and count["bytes"] < XZ_LIMIT:
                    heldout_text.write(data)
                done += len(data)
            if progress:
                progress("tokenizing", done, max(total, done))
    if not counts["train"]["tokens"]:
        raise UserError("there is no text in the data" if not counts["heldout"]["tokens"] else
                        "all of the data is held out: give less to data.heldout, or hold out by 'tail'")
    held = counts["heldout"]
    if not held["tokens"] and (division.heldout or division.other):
        n = counts["train"]["documents"]
        raise UserError(
            "there is no text in data.heldout_path" if division.other else
            f"no document of {n} fell into the held-out part ({division.heldout:g}); "
            "use data.heldout_by 'tail', a larger data.heldout, or data.heldout_path")
    text = directory / "heldout.txt"
    xz = None
    if 0 < held["bytes"] < XZ_LIMIT:
        if progress:
            progress("compressing the held-out text with xz", 0, 0)
        xz = 8 * len(lzma.compress(text.read_bytes(), preset=9)) / held["bytes"]
    text.unlink()
    exact = exact and not any(count["unknown"] for count in counts.values())
    meta = {"dtype": dtype, "lossless": exact, "parts": counts, "xz_bits_per_byte": xz,
            "near_duplicates": sorted(division.near_duplicates if division.by == "name" and not division.other else ())}
    (directory / "meta.json").write_text(json.dumps(meta))


@dataclasses.dataclass(frozen=True)
class _Encode:
    tokenizer: Tokenizer

    def __call__(self, batch: list[tuple[str, Piece]]) -> list[Int[np.ndarray, " N"]]:
        return [self.tokenizer.encode(piece.text) for _, piece in batch]


def _batches(pieces: Iterator[tuple[str, Piece]], size: int = 1 << 20) -> Iterator[list[tuple[str, Piece]]]:
    """Pieces in lists of about `size` characters; documents without any text are left out."""
    batch: list[tuple[str, Piece]] = []
    characters, inside = 0, None
    for part, piece in pieces:
        if not piece.text and inside != part:
            continue
        inside = None if piece.last else part
        batch.append((part, piece))
        characters += len(piece.text)
        if characters >= size:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def train_tokenizer(path: str, vocab_size: int, output: str | Path, field: str = "text",
                    progress: Progress | None = None) -> Tokenizer:
    """Learns a SentencePiece tokenizer from the data at `path` ("" = Python's documentation) and writes it.

    Args:
      output: a `.model` file, or a directory that `tokenizers.load` reads.
    """
    from jaxgen.data.tokenizers import SentencePiece

    source = open_source(path, field)

    def texts() -> Iterator[str]:
        done = 0
        for piece in source.pieces():
            yield piece.text
            done += len(piece.text)
            if progress:
                progress("reading", done, max(source.size, done))

    tokenizer = SentencePiece(vocab_size=vocab_size).fit(texts())
    output = Path(output).expanduser()
    try:
        if output.suffix == ".model":
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_bytes(tokenizer.files()["tokenizer.model"])
        else:
            tokenizer.save(output)
    except OSError as e:
        raise UserError(f"cannot write the tokenizer to {output} ({e.strerror})") from e
    return tokenizer
