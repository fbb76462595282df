"""Text for language models: one source, or a weighted mixture of several."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from jaxgen.data import cache as caching
from jaxgen.data.base import Data, Prepared, Progress
from jaxgen.data.batching import At, fold
from jaxgen.data.sources import open_source
from jaxgen.data.tokenizers import SentencePiece, Tokenizer, TokenizerConfig
from jaxgen.data.tokens import Corpus, Division, fit, tokenize
from jaxgen.errors import UserError

if TYPE_CHECKING:
    import grain
    import jax


@dataclasses.dataclass(frozen=True)
class Text(Data):
    """Next-token examples from a source of text.

    A batch has `tokens` and `targets`, int32 (B, length); with packing "documents" also `weights`, float32, and
    `segment_ids` (0 = padding) and `positions`, int32. Held-out batches have `weights` always.

    Attributes:
      path: a file, a folder, a pattern, gs://..., tfds:NAME, or "" for Python's own documentation and standard library.
      field: where the text is in JSON lines, ArrayRecord and TFDS.
      tokenizer: Bytes, Characters or SentencePiece.
      length: tokens in an example.
      packing: "blocks" cuts the stream of all documents; "documents" packs whole ones, with no attention across.
      heldout: fraction that is held out.
      heldout_by: "name" holds out whole documents by a hash of their names; "tail" the last part of the text.
      heldout_path: a source of its own for the held-out text, in place of the two above.
    """

    path: str = ""
    field: str = "text"
    tokenizer: TokenizerConfig = SentencePiece()
    length: int = 256
    packing: Literal["blocks", "documents"] = "blocks"
    heldout: float = 0.05
    heldout_by: Literal["name", "tail"] = "name"
    heldout_path: str = ""

    def __post_init__(self):
        if self.length < 1:
            raise UserError(f"data.length is {self.length}; it must be at least 1")
        if not 0 <= self.heldout < 1:
            raise UserError(f"data.heldout is {self.heldout}; it is a fraction, from 0 to less than 1")
        if self.packing not in ("blocks", "documents"):
            raise UserError(f"data.packing is '{self.packing}'; it is 'blocks' or 'documents'")
        if self.heldout_by not in ("name", "tail"):
            raise UserError(f"data.heldout_by is '{self.heldout_by}'; it is 'name' or 'tail'")

    def spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        import jax

        names = {"tokens": np.int32, "targets": np.int32}
        if self.packing == "documents":
            names |= {"weights": np.float32, "segment_ids": np.int32, "positions": np.int32}
        return {name: jax.ShapeDtypeStruct((batch_size, self.length), dtype) for name, dtype in names.items()}

    def division(self) -> Division:
        """The source and how it is divided; opens no file."""
        other = open_source(self.heldout_path, self.field) if self.heldout_path else None
        return Division(open_source(self.path, self.field), self.heldout, self.heldout_by, other)

    def prepare(self, cache: str | Path | None = None, progress: Progress | None = None) -> PreparedText:
        place, division = caching.root(cache), self.division()
        return self._with(fit(self.tokenizer, [division], place, progress), division, place, progress)

    def _with(self, tokenizer: Tokenizer, division: Division, cache: Path, progress: Progress | None) -> PreparedText:
        corpus = tokenize(division, tokenizer, cache, progress)
        if self.packing == "blocks" and len(corpus.part("train")) < self.length:
            raise UserError(f"the training text has {len(corpus.part('train'))} tokens, fewer than one example of "
                            f"data.length {self.length}")
        return PreparedText(self, corpus, tokenizer, cache)


class PreparedText(Prepared):
    """See `Prepared`; the order of examples is a shuffle of all of them, another for each epoch."""

    def __init__(self, data: Text, corpus: Corpus, tokenizer: Tokenizer, cache: Path):
        self._data, self._corpus, self._cache = data, corpus, cache
        self.tokenizer = tokenizer
        self.heldout_bytes = corpus.meta["parts"]["heldout"]["bytes"]
        self.fingerprint = caching.key(corpus.directory.name, tokenizer.fingerprint, data.packing, data.length)
        self.facts = _facts(data.path or "Python's documentation and standard library", corpus.meta, tokenizer)

    def train(self, seed: int) -> grain.MapDataset:
        import grain

        from jaxgen.data.packing import Blocks, Documents

        tokens, length = self._corpus.part("train"), self._data.length
        seed = fold(seed)  # Grain's shuffle seeds epoch e with seed + e: neighbouring seeds would share epochs
        source = Blocks(tokens, length, seed) if self._data.packing == "blocks" else \
            Documents(tokens, length, self._plan("train"))
        # The shuffle hands down epoch * size + place, in constant time.
        return grain.MapDataset.range(len(source)).map_with_index(At(source.__getitem__)).shuffle(seed).repeat()

    def heldout(self) -> grain.MapDataset:
        import grain

        from jaxgen.data.packing import Documents, HeldoutBlocks

        tokens, length = self._corpus.part("heldout"), self._data.length
        return grain.MapDataset.source(HeldoutBlocks(tokens, length) if self._data.packing == "blocks" else
                                       Documents(tokens, length, self._plan("heldout")))

    def _plan(self, part: str) -> Path:
        from jaxgen.data.packing import write_plan

        length, ends = self._data.length, self._corpus.part(part).ends
        return caching.build(self._cache / "plans" / f"{self._corpus.directory.name}-{part}-{length}",
                             lambda directory: write_plan(directory, ends, length))


def _facts(name: str, meta: dict[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    train, held = meta["parts"]["train"], meta["parts"]["heldout"]
    facts = {"source": name, "vocabulary": tokenizer.vocab_size, "documents": train["documents"],
             "tokens": train["tokens"], "bytes": train["bytes"],
             "bytes_per_token": round(train["bytes"] / train["tokens"], 3),
             "heldout_documents": held["documents"], "heldout_tokens": held["tokens"], "heldout_bytes": held["bytes"],
             "lossless": meta["lossless"]}
    if train["unknown"] + held["unknown"]:
        facts |= {"unknown": train["unknown"], "heldout_unknown": held["unknown"]}
    if meta["near_duplicates"]:
        facts["near_duplicates"] = len(meta["near_duplicates"])
    if meta["xz_bits_per_byte"]:
        facts["xz_bits_per_byte"] = round(meta["xz_bits_per_byte"], 4)
    return facts


# --- mixtures ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Mixture(Data):
    """Examples from several texts in fixed proportions: after n examples each part gave its share, to one or two.

    All parts share one tokenizer, learned from all of them where it is learned. The held-out part is that of all
    parts, one after the other.

    Attributes:
      parts: the texts; their tokenizer, length and packing are the same.
      weights: shares of the examples, of any sum; empty for equal ones.
    """

    parts: tuple[Text, ...] = ()
    weights: tuple[float, ...] = ()

    def __post_init__(self):
        if not self.parts:
            raise UserError("a mixture needs at least one part in data.parts")
        if self.weights and len(self.weights) != len(self.parts):
            raise UserError(f"data.weights has {len(self.weights)} values for {len(self.parts)} parts")
        if any(not (w > 0 and math.isfinite(w)) for w in self.weights):
            raise UserError(f"data.weights is {self.weights}; each must be above 0")
        for name in ("tokenizer", "length", "packing"):
            values = [getattr(part, name) for part in self.parts]
            if any(value != values[0] for value in values):
                raise UserError(f"the parts of a mixture must share data.{name}, but have "
                                + " and ".join(dict.fromkeys(map(str, values))))

    def spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        return self.parts[0].spec(batch_size)

    def prepare(self, cache: str | Path | None = None, progress: Progress | None = None) -> PreparedMixture:
        place, divisions = caching.root(cache), [part.division() for part in self.parts]
        tokenizer = fit(self.parts[0].tokenizer, divisions, place, progress)
        parts = [part._with(tokenizer, d, place, progress) for part, d in zip(self.parts, divisions, strict=True)]
        return PreparedMixture(parts, proportions(self.weights or (1.0,) * len(parts)))


def proportions(weights: Sequence[float]) -> tuple[int, ...]:
    """The smallest whole numbers in the ratio of `weights`, exact for weights of up to six decimals."""
    exact = [Fraction(w).limit_denominator(10**6) or Fraction(w) for w in weights]
    whole = [int(f * math.lcm(*(g.denominator for g in exact))) for f in exact]
    return tuple(w // math.gcd(*whole) for w in whole)


@dataclasses.dataclass(frozen=True)
class Interleave:
    """Grain's selection map: which part gives example i, and which of its examples that is.

    Part 0 takes example i when i * p0 / sum passes a whole number; the others share the rest in the same way.
    """

    proportions: tuple[int, ...]

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> tuple[int, int]:
        rest = sum(self.proportions)
        for part, share in enumerate(self.proportions):
            before = index * share // rest
            if (index + 1) * share // rest > before:
                return part, before
            index, rest = index - before, rest - share
        raise AssertionError("the last part takes what is left")


class PreparedMixture(Prepared):
    def __init__(self, parts: Sequence[PreparedText], shares: tuple[int, ...]):
        self._parts, self._shares = parts, shares
        self.tokenizer = parts[0].tokenizer
        self.heldout_bytes = sum(part.heldout_bytes for part in parts)
        self.fingerprint = caching.key([part.fingerprint for part in parts], shares)
        summed = ("documents", "tokens", "bytes", "heldout_documents", "heldout_tokens", "heldout_bytes")
        self.facts = {name: sum(part.facts[name] for part in parts) for name in summed}
        self.facts["parts"] = [part.facts | {"share": s / sum(shares)} for part, s in zip(parts, shares, strict=True)]
        if self.heldout_bytes and all("xz_bits_per_byte" in p.facts for p in parts if p.heldout_bytes):
            bits = sum(p.facts["xz_bits_per_byte"] * p.heldout_bytes for p in parts if p.heldout_bytes)
            self.facts["xz_bits_per_byte"] = round(bits / self.heldout_bytes, 4)

    def train(self, seed: int) -> grain.MapDataset:
        import grain

        return grain.MapDataset.select_from_datasets(
            [part.train(fold(seed, k)) for k, part in enumerate(self._parts)], Interleave(self._shares))

    def heldout(self) -> grain.MapDataset:
        import grain

        return grain.MapDataset.concatenate([part.heldout() for part in self._parts if part.heldout_bytes])
