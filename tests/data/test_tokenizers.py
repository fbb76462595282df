import random

import numpy as np
import pytest

from jaxgen.data import Bytes, Characters, SentencePiece
from jaxgen.data.tokenizers import Words, load, sample
from jaxgen.data.tokens import train_tokenizer
from jaxgen.errors import UserError

CODE = "def f(x):\n\tif x:\n        return  x   # two  spaces\n\n\n    \treturn None\r\n" * 40
CODE += "für “quotes” and 数字 1234\n" * 20


@pytest.fixture(scope="module")
def pieces():
    return SentencePiece(vocab_size=420).fit([CODE, "hello world, hello tokens\n" * 50])


def strings(n=300):
    draw = random.Random(0)
    alphabet = ["\t", " ", "  ", "\n", "\r\n", "\0", "\u2581", "\u2581\u2581", "\u3000", "\u00a0", "\u200b", "é",
                "e\u0301", "\U0001f600", "数", "</s>", "<unk>", "<0x41>", "\ufffd", "\ufeff", "self.", "x", "1",
                "\x1f", "\x85"]
    for _ in range(n):
        yield "".join(draw.choice(alphabet) for _ in range(draw.randrange(12)))
        yield "".join(chr(draw.choice([draw.randrange(0xD800), draw.randrange(0xE000, 0x110000)])) for _ in range(5))


@pytest.mark.parametrize("text", [CODE, "", " ", "\n", "\u2581", " leading", "trailing "])
def test_known_texts_come_back(pieces, text):
    for tokenizer in (Bytes().fit(), pieces):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_random_texts_come_back(pieces):
    everything = list(strings())
    for tokenizer in (Bytes().fit(), pieces, Characters(vocab_size=10**6).fit(everything)):
        for text in everything:
            ids = tokenizer.encode(text)
            assert ids.dtype == np.int32 and (not len(ids) or 0 <= ids.min() <= ids.max() < tokenizer.vocab_size)
            assert tokenizer.eos not in ids
            assert tokenizer.decode(ids) == text


def test_eos_is_empty_text(pieces):
    for tokenizer in (Bytes().fit(), pieces, Characters().fit(["ab"])):
        assert tokenizer.decode([*tokenizer.encode("ab"), tokenizer.eos]) == "ab"


def test_lone_surrogates_are_replaced(pieces):
    for tokenizer in (Bytes().fit(), pieces):
        assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a?b"


def test_words_keep_the_most_frequent(tmp_path):
    tokenizer = Words(vocab_size=6).fit(["the cat, the dog,", "the cat sat"])
    assert tokenizer.words == (",", "cat", "dog", "the")  # of words as frequent the first by name
    assert tokenizer.encode("the cat, sat").tolist() == [5, 3, 2, 0]
    assert tokenizer.decode([5, 3, 2, 5, 4, 1, 0]) == "the cat, the dog \ufffd"
    tokenizer.save(tmp_path)
    assert load(tmp_path) == tokenizer and load(tmp_path).fingerprint == tokenizer.fingerprint
    assert Words().fit([]).encode("").tolist() == [] and Words(vocab_size=3).fit(["b a"]).vocab_size == 3
    with pytest.raises(UserError, match="words need at least 3"):
        Words(vocab_size=2)


def test_characters_keep_the_most_frequent():
    tokenizer = Characters(vocab_size=4).fit(["aaab", "bcd"])
    assert tokenizer.vocab_size == 4
    assert tokenizer.encode("abcz\U0001f600").tolist() == [2, 3, 0, 0, 0]
    assert tokenizer.decode([2, 3, 0]) == "ab\ufffd"


def test_sentencepiece_learns_the_same_twice_and_keeps_runs_whole(pieces):
    again = SentencePiece(vocab_size=420).fit([CODE, "hello world, hello tokens\n" * 50])
    assert again.files() == pieces.files() and again.fingerprint == pieces.fingerprint
    assert len(pieces.encode(" " * 8)) <= 2
    assert len(pieces.encode("hello")) <= 2


def test_save_and_load(tmp_path, pieces):
    for name, tokenizer in (("b", Bytes().fit()), ("c", Characters().fit(["añ\n"])), ("s", pieces)):
        tokenizer.save(tmp_path / name)
        loaded = load(tmp_path / name)
        assert type(loaded) is type(tokenizer) and loaded.fingerprint == tokenizer.fingerprint
        assert loaded.encode("añ\n").tolist() == tokenizer.encode("añ\n").tolist()
        assert (loaded.vocab_size, loaded.eos) == (tokenizer.vocab_size, tokenizer.eos)


def test_load_says_what_is_wrong(tmp_path, pieces):
    with pytest.raises(UserError, match="no tokenizer in .*tokenizer.json is missing"):
        load(tmp_path)
    pieces.save(tmp_path)
    model = (tmp_path / "tokenizer.model").read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(model[:-40] + b"x" + model[-39:])
    with pytest.raises(UserError, match="damaged|not a SentencePiece"):
        load(tmp_path)
    (tmp_path / "tokenizer.model").unlink()
    with pytest.raises(UserError, match="tokenizer.model is missing"):
        load(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"kind": "byte"}')
    with pytest.raises(UserError, match="unknown kind 'byte'; did you mean 'bytes'"):
        load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        load(tmp_path)


def test_sentencepiece_from_a_file(tmp_path, pieces):
    (tmp_path / "t.model").write_bytes(pieces.files()["tokenizer.model"])
    assert SentencePiece(str(tmp_path / "t.model"), 420).fit().fingerprint == pieces.fingerprint
    with pytest.raises(UserError, match="has 420 entries, but tokenizer.vocab_size is 4096"):
        SentencePiece(str(tmp_path / "t.model")).fit()
    with pytest.raises(UserError, match="no tokenizer at"):
        SentencePiece(str(tmp_path / "none.model")).fit()
    (tmp_path / "t.model").write_text("no model")
    with pytest.raises(UserError, match="not a SentencePiece model"):
        SentencePiece(str(tmp_path / "t.model")).fit()


def test_vocabularies_that_cannot_be():
    with pytest.raises(UserError, match="may be at most"):
        SentencePiece(vocab_size=4096).fit(["only a little text"])
    with pytest.raises(UserError, match="at least 384"):
        SentencePiece(vocab_size=100)
    with pytest.raises(UserError, match="at least 3"):
        Characters(vocab_size=2)
    with pytest.raises(UserError, match="no text to learn"):
        SentencePiece().fit([])
    with pytest.raises(UserError, match="too many different characters .* must be at least"):
        SentencePiece(vocab_size=400).fit([chr(0x4E00 + i % 3000) for i in range(9000)])


def test_train_tokenizer_writes_both_forms(tmp_path):
    (tmp_path / "a.txt").write_text(CODE)
    tokenizer = train_tokenizer(str(tmp_path / "a.txt"), 400, tmp_path / "out" / "t.model")
    assert SentencePiece(str(tmp_path / "out" / "t.model"), 400).fit().fingerprint == tokenizer.fingerprint
    train_tokenizer(str(tmp_path / "a.txt"), 400, tmp_path / "folder")
    assert load(tmp_path / "folder").fingerprint == tokenizer.fingerprint
    with pytest.raises(UserError, match="cannot write the tokenizer"):
        train_tokenizer(str(tmp_path / "a.txt"), 400, tmp_path / "a.txt" / "t.model")


def test_sample_is_even_and_repeatable():
    items = [str(i) for i in range(10_000)]
    kept = sample(items, 1000)
    assert kept == sample(items, 1000) and len(set(kept)) == 1000
    assert 4600 < np.mean([int(i) for i in kept]) < 5400
    assert sample(items[:10], 1000) == items[:10]
