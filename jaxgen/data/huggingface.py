"""Tokenizers of other projects: `tokenizer.json` files, and the clean-up of captions that some want first.

Needs the package `tokenizers` for the former: `pip install jaxgen[hf]`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import string
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Int, Integer

from jaxgen.data.tokenizers import SentencePieceTokenizer, Tokenizer, TokenizerConfig, load, read_model
from jaxgen.errors import UserError, nearest
from jaxgen.files import write_whole

FILES = ("tokenizer.json", "spiece.model", "tokenizer.model", "vocab.json")
END = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "[SEP]")


@dataclasses.dataclass(frozen=True)
class Existing(TokenizerConfig):
    """The tokenizer of a model that exists.

    Attributes:
      path: another project's folder, with `tokenizer.json` or a SentencePiece model in it, or that file; or the folder
        `tokenizer` of a run or an imported model. Empty for a model that has none: its texts cannot be read.
      vocab_size: number of entries; what that tokenizer has.
    """

    path: str = ""
    vocab_size: int = 49408

    def fit(self, texts: Iterable[str] = ()) -> Tokenizer:
        if not self.path:
            raise UserError("the model has no tokenizer (it was imported with --tokenizer none), so no text can be "
                            "read for it; import it again with --tokenizer PATH")
        tokenizer = read(self.path)
        if tokenizer.vocab_size != self.vocab_size:
            raise UserError(f"the tokenizer {self.path} has {tokenizer.vocab_size} entries, "
                            f"but tokenizer.vocab_size is {self.vocab_size}")
        return tokenizer


def read(path: str | Path, model: str | Path | None = None) -> Tokenizer:
    """The tokenizer in a model's folder, or that of a file.

    Args:
      model: the model's folder, where it is another; what that says of cleaning captions counts too.

    Raises:
      UserError: there is none, or it has no token that ends a text.
    """
    path = Path(path).expanduser()
    if _is_ours(path):
        return load(path)
    files = [path / name for name in FILES] if path.is_dir() else [path]
    file = next((f for f in files if f.is_file()), None)
    if file is None:
        raise UserError(f"no tokenizer at {path}" + (
            f": it has none of {', '.join(f.name for f in files)}" if path.is_dir() else ""))
    told = _told(file.parent)
    lower, plain, apart = _cleaning(told, _open_clip(file.parent) or (_open_clip(Path(model)) if model else ""))
    if file.suffix == ".model":
        inner: Tokenizer = read_model(file.read_bytes(), file)
    else:
        definition = _of_clip(file, told) if file.name == "vocab.json" else file.read_bytes()
        inner = _tokenizer_json(file, definition, told)
    return CaptionTokenizer(inner, lower, plain, apart) if lower or plain else inner


def _is_ours(folder: Path) -> bool:
    """Whether `Tokenizer.save` wrote the folder."""
    try:
        return "fingerprint" in json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def write(tokenizer: Tokenizer | None, folder: str | Path) -> bool:
    """Writes the tokenizer in the form of other projects; False where it has none."""
    folder = Path(folder)
    inner = tokenizer.inner if isinstance(tokenizer, CaptionTokenizer) else tokenizer
    told: dict[str, Any] = {}
    if isinstance(inner, HuggingFaceTokenizer):
        names = {i: token for token, i in _parsed(inner.definition).get_vocab(with_added_tokens=True).items()}
        told = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": names[inner.eos],
                "pad_token": names[inner.padding]}
        if inner is not tokenizer and not (folder / "open_clip_config.json").is_file():   # which says it itself
            if tokenizer.plain:
                return False
            told["tokenizer_class"] = "Siglip2Tokenizer"
        write_whole(folder / "tokenizer.json", inner.definition)
    elif isinstance(inner, SentencePieceTokenizer) and inner is not tokenizer:
        write_whole(folder / "spiece.model", inner.model)
        told = {"tokenizer_class": "SiglipTokenizer", "do_lower_case": tokenizer.lower, "eos_token": "</s>",
                "pad_token": "</s>", "unk_token": "<unk>"}
    else:
        return False
    write_whole(folder / "tokenizer_config.json", json.dumps(told, indent=1) + "\n")
    return True


def _told(folder: Path) -> dict[str, Any]:
    """What the JSON files beside say of special tokens, and of the model."""
    told: dict[str, Any] = {}
    for name in ("config.json", "special_tokens_map.json", "tokenizer_config.json"):
        told |= _json(folder / name)
    return told


def _json(file: Path) -> dict[str, Any]:
    """What a file says; nothing where there is none."""
    try:
        return {} | json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, OSError):
        raise UserError(f"{file} cannot be read") from None


def _open_clip(folder: Path) -> str:
    """How open_clip cleans a model's captions, where the folder has its configuration: "canonicalize", "lower", ..."""
    told: Any = _json(folder / "open_clip_config.json")
    for name in ("model_cfg", "text_cfg", "tokenizer_kwargs", "clean"):
        told = told.get(name) if isinstance(told, dict) else None
    return told if isinstance(told, str) else ""


def _cleaning(told: dict[str, Any], clean: str) -> tuple[bool, bool, bool]:
    """(letters become small, punctuation goes, underscores become spaces): what was done to captions before they came
    to these tokenizers, as open_clip says it, or as transformers' class does."""
    if clean in ("canonicalize", "lower"):
        return True, clean == "canonicalize", clean == "canonicalize"
    name = str(told.get("tokenizer_class", "")).removesuffix("Fast")
    first = name == "SiglipTokenizer"
    second = name == "Siglip2Tokenizer" or (name == "GemmaTokenizer" and "siglip" in str(told.get("model_type")))
    return (first and told.get("do_lower_case", True)) or second, first, False


def _tokenizer_json(file: Path, definition: bytes, told: dict[str, Any]) -> HuggingFaceTokenizer:
    try:
        known = _parsed(definition).get_vocab(with_added_tokens=True)
    except UserError:
        raise
    except Exception as error:   # whatever the package raises of a file that it does not know
        raise UserError(f"{file} is no tokenizer: {error}") from None
    end = _named(told, "eos_token") or _named(told, "sep_token") or next((t for t in END if t in known), None)
    if end not in known:
        raise UserError(f"the tokenizer {file} has no token that ends a text"
                        + (f" ('{end}'){nearest(end, known)}" if end else " (eos_token in tokenizer_config.json)"))
    return HuggingFaceTokenizer(definition, known[end], known.get(_named(told, "pad_token"), known[end]))


def _named(told: dict[str, Any], key: str) -> str | None:
    """A special token: a string, or an object that says more of it."""
    token = told.get(key)
    return token.get("content") if isinstance(token, dict) else token


START = "<|startoftext|>"
WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
"""What CLIP's tokenizer takes for words (Radford et al. 2021, section 2.4, by their program)."""


def _of_clip(vocab: Path, told: dict[str, Any]) -> bytes:
    """The definition that the two files of CLIP's tokenizer, `vocab.json` and `merges.txt`, stand for: pairs of bytes
    within words, which end with "</w>"."""
    places, merges = _json(vocab), vocab.with_name("merges.txt")
    if START not in places or END[0] not in places:
        raise UserError(f"{vocab} lacks {START} or {END[0]}, so it is not of CLIP's tokenizer, the only one that is "
                        "read from vocab.json and merges.txt")
    try:
        lines = merges.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        raise UserError(f"{merges}, which belongs to {vocab.name}, cannot be read") from None
    pairs = [line.split() for line in lines if line.strip() and not line.startswith("#version")]
    unknown = _named(told, "unk_token") or END[0]
    special = sorted({START, END[0]}, key=places.get)
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    clean = [{"type": "NFC"}, {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "}, {"type": "Lowercase"}]
    words = {"type": "Split", "pattern": {"Regex": WORDS}, "behavior": "Removed", "invert": True}
    as_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return json.dumps({
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": places[token], "content": token, **plain} for token in special],
        "normalizer": {"type": "Sequence", "normalizers": clean},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [words, as_bytes]},
        "post_processor": {"type": "RobertaProcessing", "sep": [END[0], places[END[0]]], "cls": [START, places[START]],
                           "trim_offsets": False, "add_prefix_space": False},
        "decoder": {**as_bytes, "add_prefix_space": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": unknown, "continuing_subword_prefix": "",
                  "end_of_word_suffix": "</w>", "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                  "vocab": places, "merges": pairs},
    }, ensure_ascii=False).encode()  # fmt: skip


def write_clip(tokenizer: Tokenizer | None, folder: str | Path, length: int) -> bool:
    """Writes CLIP's tokenizer in the form of a pipeline's folder `tokenizer`, for texts of `length` tokens; False where
    it is another. The two files are for whoever is too old for `tokenizer.json`."""
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        return False
    told = json.loads(tokenizer.definition)
    model, names = told["model"], {i: name for name, i in _parsed(tokenizer.definition).get_vocab(True).items()}
    if model.get("end_of_word_suffix") != "</w>" or START not in names.values():
        return False
    special = {"bos_token": START, "eos_token": names[tokenizer.eos], "unk_token": model.get("unk_token") or END[0],
               "pad_token": names[tokenizer.padding]}  # fmt: skip
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    vocab = dict(sorted({**model["vocab"], **{name: i for i, name in names.items()}}.items(), key=lambda item: item[1]))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "tokenizer.json", tokenizer.definition)
    write_whole(folder / "vocab.json", json.dumps(vocab, ensure_ascii=False))
    write_whole(folder / "merges.txt", "\n".join(["#version: 0.2", *merges, ""]))
    write_whole(folder / "special_tokens_map.json", json.dumps(special, indent=1) + "\n")
    config = {"tokenizer_class": "CLIPTokenizer", **special, "model_max_length": length, "do_lower_case": True}
    write_whole(folder / "tokenizer_config.json", json.dumps(config, indent=1) + "\n")
    return True


@dataclasses.dataclass(frozen=True)
class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json`. What it puts before a text is kept; the end of the text is left to whoever makes rows."""

    definition: bytes = dataclasses.field(repr=False)
    eos: int
    padding: int   # what fills a row after the end
    kind: ClassVar[str] = "huggingface"

    @property
    def vocab_size(self) -> int:
        return 1 + max(_parsed(self.definition).get_vocab(with_added_tokens=True).values())

    def encode(self, text: str) -> Int[np.ndarray, " N"]:
        ids = _parsed(self.definition).encode(text.encode(errors="replace").decode()).ids
        while ids and ids[-1] == self.eos:
            ids.pop()
        return np.asarray(ids, np.int32)

    def decode(self, ids: Sequence[int] | Integer[np.ndarray, " N"]) -> str:
        return _parsed(self.definition).decode(np.asarray(ids).tolist(), skip_special_tokens=True)

    def files(self) -> dict[str, bytes]:
        special = json.dumps({"eos": self.eos, "padding": self.padding}).encode()
        return {"huggingface.json": self.definition, "special.json": special}

    @classmethod
    def from_files(cls, directory: Path) -> HuggingFaceTokenizer:
        special = json.loads((directory / "special.json").read_bytes())
        return cls((directory / "huggingface.json").read_bytes(), int(special["eos"]), int(special["padding"]))


@functools.lru_cache(maxsize=8)
def _parsed(definition: bytes):
    try:
        from tokenizers import Tokenizer as Parsed
    except ImportError:
        raise UserError("this tokenizer needs the package 'tokenizers': pip install 'jaxgen[hf]'") from None
    parsed = Parsed.from_str(definition.decode())
    parsed.no_padding()
    parsed.no_truncation()
    return parsed


@dataclasses.dataclass(frozen=True)
class CaptionTokenizer(Tokenizer):
    """A tokenizer whose texts are cleaned up first, as SigLIP's are: small letters, no punctuation, single spaces."""

    inner: Tokenizer
    lower: bool = True
    plain: bool = True
    apart: bool = False
    """Underscores become spaces, as in open_clip, and are not left out like other punctuation."""
    kind: ClassVar[str] = "captions"

    @property
    def vocab_size(self) -> int:
        return self.inner.vocab_size

    @property
    def eos(self) -> int:
        return self.inner.eos

    @property
    def unknown(self) -> int | None:
        return self.inner.unknown

    @property
    def padding(self) -> int | None:
        return self.inner.padding

    def encode(self, text: str) -> Int[np.ndarray, " N"]:
        if self.lower:
            text = text.lower()
        if self.apart:
            text = text.replace("_", " ")
        if self.plain:
            text = re.sub(r"\s+", " ", text.translate(_PUNCTUATION)).strip()
        return self.inner.encode(text)

    def decode(self, ids: Sequence[int] | Integer[np.ndarray, " N"]) -> str:
        return self.inner.decode(ids)

    def files(self) -> dict[str, bytes]:
        told = {"kind": self.inner.kind, "lower": self.lower, "plain": self.plain}
        if self.apart:   # else the fingerprints are those of before it was known
            told["apart"] = True
        return {"captions.json": json.dumps(told).encode(), **self.inner.files()}

    @classmethod
    def from_files(cls, directory: Path) -> CaptionTokenizer:
        told = json.loads((directory / "captions.json").read_bytes())
        kinds = {kind.kind: kind for kind in (HuggingFaceTokenizer, SentencePieceTokenizer)}
        inner = kinds[told["kind"]].from_files(directory)
        return cls(inner, bool(told["lower"]), bool(told["plain"]), bool(told.get("apart", False)))


_PUNCTUATION = str.maketrans("", "", string.punctuation)

KINDS = (HuggingFaceTokenizer, CaptionTokenizer)
