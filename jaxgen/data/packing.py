"""Examples cut from a token stream: contiguous blocks, or whole documents packed side by side.

A stream is a circle of documents that each end with `eos`. The token at position t is predicted from those before it,
the input at t being the token at t - 1: so the `eos` of one document is the first input of the next, every token of the
stream is a target, and a prompt that starts with `eos` starts a document.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import numpy as np
from jaxtyping import Int

from jaxgen.data.tokens import Tokens

Example = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Example i of epoch e: `length` tokens at offset(seed, e) + i * length around the circle.

    Within an epoch no token comes twice and all but the last few (less than a block) come once; each epoch cuts anew.
    Indices count on through the epochs: example i of epoch e has the index e * len(self) + i.
    """

    tokens: Tokens
    length: int
    seed: int

    def __len__(self) -> int:
        return len(self.tokens) // self.length

    def __getitem__(self, index: int) -> Example:
        epoch, block = divmod(int(index), len(self))
        start = _offset(self.seed, epoch, len(self.tokens)) + block * self.length
        window = _circle(self.tokens, start - 1, self.length + 1)
        return {"tokens": window[:-1], "targets": window[1:]}


@functools.lru_cache(maxsize=64)
def _offset(seed: int, epoch: int, size: int) -> int:
    return int(np.random.default_rng([seed, epoch]).integers(size))


def _circle(tokens: Tokens, start: int, length: int) -> Int[np.ndarray, " length"]:
    start %= len(tokens)
    if start + length <= len(tokens):
        return tokens.stream[start:start + length].astype(np.int32)
    return tokens.stream[np.arange(start, start + length) % len(tokens)].astype(np.int32)


@dataclasses.dataclass(frozen=True)
class HeldoutBlocks:
    """The stream from its start, in blocks; the last is filled up with weight 0."""

    tokens: Tokens
    length: int

    def __len__(self) -> int:
        return -(-len(self.tokens) // self.length)

    def __getitem__(self, index: int) -> Example:
        start = int(index) * self.length
        count = min(self.length, len(self.tokens) - start)
        window = _circle(self.tokens, start - 1, count + 1)
        example = {"tokens": window[:-1], "targets": window[1:], "weights": np.ones(count, np.float32)}
        return _padded(example, self.length)


def _padded(example: Example, length: int) -> Example:
    padded = {name: np.zeros(length, value.dtype) for name, value in example.items()}
    for name, value in example.items():
        padded[name][:len(value)] = value
    return padded


# --- documents -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Documents:
    """Example i: the pieces of bin i of a plan (see `write_plan`), each a segment of its own, numbered from 1."""

    tokens: Tokens
    length: int
    plan: Path

    @functools.cached_property
    def _arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        paths = [self.plan / f"{name}.npy" for name in ("starts", "lengths", "bins")]
        return tuple(np.load(p, mmap_mode="r" if p.stat().st_size > 128 else None) for p in paths)  # 128: header alone

    def __getstate__(self) -> dict:
        return {"tokens": self.tokens, "length": self.length, "plan": self.plan}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)

    def __len__(self) -> int:
        return len(self._arrays[2]) - 1

    def __getitem__(self, index: int) -> Example:
        starts, lengths, bins = self._arrays
        i = int(index) % len(self)
        pieces = range(bins[i], bins[i + 1])
        sizes = [int(lengths[p]) for p in pieces]
        windows = [_circle(self.tokens, int(starts[p]) - 1, n + 1) for p, n in zip(pieces, sizes, strict=True)]
        return _padded({
            "tokens": np.concatenate([w[:-1] for w in windows]),
            "targets": np.concatenate([w[1:] for w in windows]),
            "weights": np.ones(sum(sizes), np.float32),
            "segment_ids": np.repeat(np.arange(1, len(sizes) + 1, dtype=np.int32), sizes),
            "positions": np.concatenate([np.arange(n, dtype=np.int32) for n in sizes]),
        }, self.length)


def write_plan(directory: Path, ends: Int[np.ndarray, " documents"], length: int) -> None:
    """Cuts documents longer than `length`, packs the pieces by best fit, longest first, and writes the plan.

    The plan is one for all seeds and epochs, since segments do not see each other: what shares a bin changes no loss.
    Files: starts (stream position of a piece's first target), lengths, bins (first piece of each bin, and the end).
    """
    starts, lengths = _cut(np.asarray(ends), length)
    bin_of = best_fit(lengths, length)
    order = np.argsort(bin_of, kind="stable")
    np.save(directory / "starts.npy", starts[order])
    np.save(directory / "lengths.npy", lengths[order].astype(np.int32))
    np.save(directory / "bins.npy", np.concatenate([[0], np.cumsum(np.bincount(bin_of))]).astype(np.int64))


def _cut(ends: Int[np.ndarray, " documents"], length: int) -> tuple[np.ndarray, np.ndarray]:
    begins = np.concatenate([[0], ends])[:-1].astype(np.int64)
    pieces = -(-(ends - begins) // length)
    number = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)  # of a piece in its document
    starts = np.repeat(begins, pieces) + number * length
    return starts, np.minimum(length, np.repeat(ends, pieces) - starts)


def best_fit(lengths: Int[np.ndarray, " pieces"], capacity: int) -> Int[np.ndarray, " pieces"]:
    """Bin of each piece: longest first, each into the fullest bin that still has room (best-fit decreasing)."""
    bin_of = np.empty(len(lengths), np.int64)
    order = np.argsort(-lengths, kind="stable")
    full = int((lengths == capacity).sum())
    bin_of[order[:full]] = np.arange(full)
    bins = full
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # by free places
    some = 0  # bit r: with_room[r] is not empty
    for piece, size in zip(order[full:].tolist(), lengths[order[full:]].tolist(), strict=True):
        fitting = some >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            chosen = with_room[room].pop()
            if not with_room[room]:
                some &= ~(1 << room)
        else:
            room, chosen, bins = capacity, bins, bins + 1
        bin_of[piece] = chosen
        if room > size:
            with_room[room - size].append(chosen)
            some |= 1 << (room - size)
    return bin_of
