"""Tokenizers: a small config that stands in the experiment, and the fitted tokenizer that it becomes.

A fitted tokenizer is plain data: `save` writes it into a directory, `load` reads it back and runs no code of it.
"""

from __future__ import annotations

import abc
import collections
import dataclasses
import functools
import hashlib
import json
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
from jaxtyping import Int, Integer, UInt32

from jaxgen.errors import UserError, nearest


class Tokenizer(abc.ABC):
    """A fitted tokenizer. Token ids are 0 .. vocab_size - 1; `eos` ends a document and so stands before the next."""

    kind: ClassVar[str]
    vocab_size: int
    eos: int
    unknown: int | None = None  # the id of what cannot be expressed; None where every text can be
    padding: int | None = None  # the id that fills a row of captions after the end; None for `eos`

    @abc.abstractmethod
    def encode(self, text: str) -> Int[np.ndarray, " N"]:
        """Ids of `text`, int32, without `eos`."""

    @abc.abstractmethod
    def decode(self, ids: Sequence[int] | Integer[np.ndarray, " N"]) -> str:
        """Text of `ids`; `eos` is empty text, bytes that are no UTF-8 become U+FFFD."""

    @abc.abstractmethod
    def files(self) -> dict[str, bytes]:
        """What `save` writes beside `tokenizer.json`."""

    @classmethod
    @abc.abstractmethod
    def from_files(cls, directory: Path) -> Tokenizer:
        """Reads what `files` gave."""

    @functools.cached_property
    def fingerprint(self) -> str:
        digest = hashlib.sha256(self.kind.encode())
        for name, content in sorted(self.files().items()):
            digest.update(name.encode() + content)
        return digest.hexdigest()[:24]

    def save(self, directory: str | Path) -> None:
        """Writes the tokenizer into `directory`, which is made if need be."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in self.files().items():
            (directory / name).write_bytes(content)
        record = {"kind": self.kind, "vocab_size": self.vocab_size, "eos": self.eos, "fingerprint": self.fingerprint}
        (directory / "tokenizer.json").write_text(json.dumps(record, indent=1) + "\n")


class TokenizerConfig(abc.ABC):
    """What an experiment says of its tokenizer; subclasses are frozen dataclasses."""

    vocab_size: int  # what the model's embedding must hold, known before any data is read

    @property
    def trained(self) -> bool:
        """Whether `fit` looks at the text."""
        return False

    @abc.abstractmethod
    def fit(self, texts: Iterable[str]) -> Tokenizer:
        """The tokenizer, learned from `texts` where it has something to learn."""


# --- bytes ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Bytes(TokenizerConfig):
    """UTF-8 bytes, and 256 for the end of a document."""

    @property
    def vocab_size(self) -> int:
        return 257

    def fit(self, texts: Iterable[str] = ()) -> ByteTokenizer:
        return ByteTokenizer()


class ByteTokenizer(Tokenizer):
    kind, vocab_size, eos = "bytes", 257, 256

    def encode(self, text: str) -> Int[np.ndarray, " N"]:
        return np.frombuffer(text.encode(errors="replace"), np.uint8).astype(np.int32)

    def decode(self, ids: Sequence[int] | Integer[np.ndarray, " N"]) -> str:
        ids = np.asarray(ids)
        return ids[ids < 256].astype(np.uint8).tobytes().decode(errors="replace")

    def files(self) -> dict[str, bytes]:
        return {}

    @classmethod
    def from_files(cls, directory: Path) -> ByteTokenizer:
        return cls()


# --- characters ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Characters(TokenizerConfig):
    """The most frequent characters of the training text.

    Attributes:
      vocab_size: number of ids, with 0 for every other character and 1 for the end of a document.
    """

    vocab_size: int = 128

    def __post_init__(self):
        if self.vocab_size < 3:
            raise UserError(f"tokenizer.vocab_size is {self.vocab_size}; characters need at least 3")

    @property
    def trained(self) -> bool:
        return True

    def fit(self, texts: Iterable[str]) -> CharacterTokenizer:
        counts: collections.Counter[int] = collections.Counter()
        for text in texts:
            codes, number = np.unique(_codes(text), return_counts=True)
            counts.update(dict(zip(codes.tolist(), number.tolist(), strict=True)))
        common = sorted(counts, key=lambda code: (-counts[code], code))[: self.vocab_size - 2]
        return CharacterTokenizer("".join(map(chr, sorted(common))))


def _codes(text: str) -> UInt32[np.ndarray, " N"]:
    return np.frombuffer(text.encode("utf-32-le", errors="replace"), np.uint32)


@dataclasses.dataclass(frozen=True)
class CharacterTokenizer(Tokenizer):
    characters: str  # character k has the id k + 2
    kind: ClassVar[str] = "characters"
    eos: ClassVar[int] = 1
    unknown: ClassVar[int] = 0

    @property
    def vocab_size(self) -> int:
        return len(self.characters) + 2

    @functools.cached_property
    def _table(self) -> Int[np.ndarray, " codes"]:
        codes = _codes(self.characters)
        table = np.zeros(int(codes.max(initial=0)) + 2, np.int32)
        table[codes] = np.arange(2, self.vocab_size)
        return table

    def encode(self, text: str) -> Int[np.ndarray, " N"]:
        return self._table[np.minimum(_codes(text), len(self._table) - 1)]

    def decode(self, ids: Sequence[int] | Integer[np.ndarray, " N"]) -> str:
        letters = ["\ufffd", "", *self.characters]
        return "".join(letters[i] if 0 <= i < len(letters) else "\ufffd" for i in np.asarray(ids).tolist())

    def files(self) -> dict[str, bytes]:
        return {"characters.json": json.dumps(self.characters).encode()}

    @classmethod
    def from_files(cls, directory: Path) -> CharacterTokenizer:
        return cls(json.loads((directory / "characters.json").read_text()))


# --- words ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Words(TokenizerConfig):
    """The most frequent words and signs of the training text: for captions of a small language.

    Attributes:
      vocab_size: number of ids, with 0 for every other word and 1 for the end of a document.
    """

    vocab_size: int = 128

    def __post_init__(self):
        if self.vocab_size < 3:
            raise UserError(f"tokenizer.vocab_size is {self.vocab_size}; words need at least 3")

    @property
    def trained(self) -> bool:
        return True

    def fit(self, texts: Iterable[str]) -> WordTokenizer:
        counts = collections.Counter(word for text in texts for word in _WORD.findall(text))
        common = sorted(counts, key=lambda word: (-counts[word], word))[: self.vocab_size - 2]
        return WordTokenizer(tuple(sorted(common)))


_WORD = re.compile(r"\w+|[^\w\s]")


@dataclasses.dataclass(frozen=True)
class WordTokenizer(Tokenizer):
    """Decodes with one space between words, and none before the signs that end a phrase."""

    words: tuple[str, ...]  # word k has the id k + 2
    kind: ClassVar[str] = "words"
    eos: ClassVar[int] = 1
    unknown: ClassVar[int] = 0

    @property
    def vocab_size(self) -> int:
        return len(self.words) + 2

    @functools.cached_property
    def _ids(self) -> dict[str, int]:
        return {word: i for i, word in enumerate(self.words, 2)}

    def encode(self, text: str) -> Int[np.ndarray, " N"]:
        return np.asarray([self._ids.get(word, 0) for word in _WORD.findall(text)], np.int32)

    def decode(self, ids: Sequence[int] | Integer[np.ndarray, " N"]) -> str:
        known = ["\ufffd", "", *self.words]
        words = [known[i] if 0 <= i < len(known) else "\ufffd" for i in np.asarray(ids).tolist()]
        return re.sub(r" ([.,;:!?])", r"\1", " ".join(word for word in words if word))

    def files(self) -> dict[str, bytes]:
        return {"words.json": json.dumps(self.words).encode()}

    @classmethod
    def from_files(cls, directory: Path) -> WordTokenizer:
        return cls(tuple(json.loads((directory / "words.json").read_text())))


# --- SentencePiece -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class SentencePiece(TokenizerConfig):
    """SentencePiece (Kudo and Richardson 2018): a given model, or byte-pair encoding learned from the training text.

    What is learned here loses nothing: every text, with its tabs and runs of spaces, comes back as it was.

    Attributes:
      path: a `.model` file; empty to learn one.
      vocab_size: number of entries; with a path, what that file must have.
    """

    path: str = ""
    vocab_size: int = 4096

    def __post_init__(self):
        if not self.path and self.vocab_size < 384:
            raise UserError(f"tokenizer.vocab_size is {self.vocab_size}; SentencePiece needs at least 384, "
                            "since 256 are bytes and 96 are printable characters")

    @property
    def trained(self) -> bool:
        return not self.path

    def fit(self, texts: Iterable[str] = ()) -> SentencePieceTokenizer:
        if not self.path:
            return _train(texts, self.vocab_size)
        try:
            model = Path(self.path).expanduser().read_bytes()
        except OSError as e:
            raise UserError(f"no tokenizer at {self.path} ({e.strerror})") from e
        tokenizer = read_model(model, self.path)
        if tokenizer.vocab_size != self.vocab_size:
            raise UserError(f"the tokenizer {self.path} has {tokenizer.vocab_size} entries, "
                            f"but tokenizer.vocab_size is {self.vocab_size}")
        return tokenizer


@dataclasses.dataclass(frozen=True)
class SentencePieceTokenizer(Tokenizer):
    model: bytes = dataclasses.field(repr=False)
    kind: ClassVar[str] = "sentencepiece"

    @property
    def vocab_size(self) -> int:
        return _processor(self.model).vocab_size()

    @property
    def eos(self) -> int:
        return _processor(self.model).eos_id()

    @property
    def unknown(self) -> int:
        return _processor(self.model).unk_id()

    def encode(self, text: str) -> Int[np.ndarray, " N"]:
        processor, space = _processor(self.model), _space(self.model)
        # SentencePiece writes a space as U+2581 and so would turn a real U+2581 into one: that goes in as its bytes.
        ids: list[int] = []
        for chunk in _chunks(text.encode(errors="replace").decode(), 8000):  # its time grows faster than the text
            first, *rest = chunk.split("\u2581") if space else [chunk]
            ids += processor.encode(first)
            for part in rest:
                ids += space
                ids += processor.encode(part)
        return np.asarray(ids, np.int32)

    def decode(self, ids: Sequence[int] | Integer[np.ndarray, " N"]) -> str:
        return _processor(self.model).decode(np.asarray(ids).tolist())

    def files(self) -> dict[str, bytes]:
        return {"tokenizer.model": self.model}

    @classmethod
    def from_files(cls, directory: Path) -> SentencePieceTokenizer:
        return read_model((directory / "tokenizer.model").read_bytes(), directory / "tokenizer.model")


@functools.lru_cache(maxsize=8)
def _processor(model: bytes):
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_proto=model)


@functools.lru_cache(maxsize=8)
def _space(model: bytes) -> list[int]:
    """The byte pieces of U+2581, or nothing for a model without them."""
    processor = _processor(model)
    ids = [processor.piece_to_id(f"<0x{byte:02X}>") for byte in "\u2581".encode()]
    return ids if all(processor.is_byte(i) for i in ids) else []


def read_model(model: bytes, path: str | Path) -> SentencePieceTokenizer:
    """The tokenizer of a SentencePiece model, the content of `path`."""
    try:
        tokenizer = SentencePieceTokenizer(model)
        eos, _ = tokenizer.eos, tokenizer.vocab_size
    except (RuntimeError, OSError, ValueError) as e:
        raise UserError(f"{path} is not a SentencePiece model") from e
    if eos < 0:
        raise UserError(f"the tokenizer {path} has no end-of-sentence entry (eos), which ends documents here; "
                        "train one with `jaxgen tokenizer train`")
    return tokenizer


def _train(texts: Iterable[str], vocab_size: int, limit: int = 8_000_000) -> SentencePieceTokenizer:
    import io

    import sentencepiece

    chunks = sample((chunk for text in texts for chunk in _chunks(text, 2000)), limit // 2000)
    if not chunks:
        raise UserError("there is no text to learn a tokenizer from")
    out = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(c.replace("\u2581", "\ufffd") for c in chunks), model_writer=out, vocab_size=vocab_size,
            model_type="bpe", byte_fallback=True, normalization_rule_name="identity", add_dummy_prefix=False,
            remove_extra_whitespaces=False, allow_whitespace_only_pieces=True,
            # Chunks keep their newlines, so that "):\n" may be one piece; scripts and signs may join ("self.").
            split_by_unicode_script=False, split_digits=True, max_sentence_length=1 << 20,
            required_chars="".join(map(chr, range(33, 127))) + "\t\n", character_coverage=0.9995,
            unk_id=0, eos_id=1, bos_id=-1, pad_id=-1, num_threads=1, minloglevel=3)
    except RuntimeError as e:
        if found := re.search(r"Vocabulary size too high.*value <= (\d+)", str(e)):
            raise UserError(f"the text is too small for a vocabulary of {vocab_size}: "
                            f"tokenizer.vocab_size may be at most {found[1]}") from e
        if found := re.search(r"Vocabulary size is smaller than required_chars\. (\d+) vs (\d+)", str(e)):
            raise UserError(f"the text has too many different characters for a vocabulary of {vocab_size}: "
                            f"tokenizer.vocab_size must be at least {found[2]}") from e
        raise
    return SentencePieceTokenizer(out.getvalue())


def _chunks(text: str, size: int) -> Iterator[str]:
    """`text` in pieces of about `size` characters that end with a line where they can; joined, they are `text`."""
    start = 0
    while start < len(text):
        end = start + size
        if end < len(text):
            line = text.rfind("\n", start + size // 2, end) + 1
            end = line or end
        yield text[start:end]
        start = end


def sample(items: Iterable[str], size: int) -> list[str]:
    """At most `size` of the items, each equally likely, always the same ones (reservoir sampling: Vitter 1985)."""
    kept: list[str] = []
    draw = random.Random(0)
    for n, item in enumerate(items):
        if n < size:
            kept.append(item)
        elif (place := draw.randrange(n + 1)) < size:
            kept[place] = item
    return kept


# --- directories ---------------------------------------------------------------------------------------------------

KINDS: tuple[type[Tokenizer], ...] = (ByteTokenizer, CharacterTokenizer, WordTokenizer, SentencePieceTokenizer)


def load(directory: str | Path, kinds: Sequence[type[Tokenizer]] = KINDS) -> Tokenizer:
    """The tokenizer saved in `directory`; pass `kinds` with your own classes to read one of those.

    Raises:
      UserError: nothing is saved there, or it is damaged or of an unknown kind.
    """
    directory = Path(directory)
    try:
        record = json.loads((directory / "tokenizer.json").read_text())
        by_name = {kind.kind: kind for kind in kinds}
        if kinds is KINDS and record["kind"] not in by_name:
            from jaxgen.data import huggingface

            by_name |= {kind.kind: kind for kind in huggingface.KINDS}
        if record["kind"] not in by_name:
            raise UserError(f"{directory} holds a tokenizer of the unknown kind '{record['kind']}'"
                            + nearest(record["kind"], by_name))
        tokenizer = by_name[record["kind"]].from_files(directory)
    except FileNotFoundError as e:
        raise UserError(f"no tokenizer in {directory}: {Path(e.filename).name} is missing") from e
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(f"the tokenizer in {directory} is damaged") from e
    if tokenizer.fingerprint != record.get("fingerprint"):
        raise UserError(f"the tokenizer in {directory} is damaged: its content is not what was saved")
    return tokenizer
