"""Texts that a model goes on with: what fits its positions is read."""

import jax
import numpy as np
import pytest

from jaxgen.evaluation import preview
from jaxgen.models.gpt import GPT
from jaxgen.sampling.text import Sampling
from jaxgen.sharding import unbox

LEARNED = GPT(vocab_size=20, depth=1, width=16, heads=2, max_length=40)
LONG = "abcdefghijklmnopqrs" * 3


class Letters:
    """Token n is the n-th letter; nothing stands before a text, and none ends it."""

    eos = None

    def encode(self, text):
        return np.array([ord(c) - 96 for c in text], np.int32)

    def decode(self, tokens):
        return "".join(chr(96 + t) for t in tokens)


@pytest.fixture
def read(monkeypatch):
    """Texts of a model, and what of each prompt it has read."""
    prompts = []
    generate = preview.generate

    def reading(model, params, padded, lengths, *rest):
        prompts[:] = [Letters().decode(row[:n]) for row, n in zip(padded.tolist(), lengths.tolist(), strict=True)]
        return generate(model, params, padded, lengths, *rest)

    monkeypatch.setattr(preview, "generate", reading)

    def texts(model: GPT, given: list[str], tokens: int) -> tuple[list[str], list[str]]:
        shapes = unbox(jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 1), np.int32)))["params"]
        params = jax.tree.map(lambda s: jax.random.normal(jax.random.key(s.size), s.shape), shapes)
        return preview.continue_texts(model, params, Letters(), given, tokens, Sampling(0.0), 0), prompts

    return texts


@pytest.mark.parametrize(("tokens", "kept"), [(1, 40), (8, 33), (20, 21)])
def test_a_long_prompt_keeps_as_much_of_its_end_as_fits(read, tokens, kept):
    """The last new token takes no position: it is not read."""
    texts, prompts = read(LEARNED, [LONG, "s"], tokens)
    assert prompts == [LONG[-kept:], "s"] and [len(t) for t in texts] == [tokens] * 2


def test_fewer_new_tokens_where_positions_end(read):
    """Half of the positions are a prompt's, and all that it leaves are the new tokens'."""
    texts, prompts = read(LEARNED, [LONG], 60)
    assert prompts == [LONG[-21:]] and len(texts[0]) == 20
    texts, prompts = read(LEARNED, ["abc"], 60)
    assert prompts == ["abc"] and len(texts[0]) == 38


def test_a_prompt_that_fits_is_whole(read):
    assert read(LEARNED, ["abcdefg"], 34)[1] == ["abcdefg"]


def test_positions_that_are_not_learned_do_not_end(read):
    texts, prompts = read(LEARNED.clone(positions="rope"), [LONG], 60)
    assert prompts == [LONG] and len(texts[0]) == 60
