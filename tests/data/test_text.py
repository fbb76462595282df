import json
import pickle
import random
import string
from fractions import Fraction

import numpy as np
import pytest

from jaxgen.data import Bytes, Characters, Mixture, SentencePiece, Text
from jaxgen.data.packing import best_fit, write_plan
from jaxgen.data.text import Interleave, proportions
from jaxgen.errors import UserError

LENGTH = 16
EOS = 256


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    """300 documents of 1 to 70 random letters, so that every window of the stream is another."""
    path = tmp_path_factory.mktemp("text") / "lines.jsonl"
    draw = random.Random(0)
    texts = ["".join(draw.choices(string.ascii_lowercase, k=1 + i % 70)) for i in range(300)]
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return str(path)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def text(path, **fields):
    return Text(**({"path": path, "tokenizer": Bytes(), "length": LENGTH, "heldout": 0.1} | fields))


def stream(prepared, part="train"):
    return np.asarray(prepared._corpus.part(part).stream, np.int32)


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("packing", ["blocks", "documents"])
def test_spec_is_what_comes(lines, cache, packing):
    data = text(lines, packing=packing)
    prepared = data.prepare(cache)
    for dataset, extra in ((prepared.train(0), set()), (prepared.heldout(), {"weights"})):
        spec = data.spec(4)
        for name, value in dataset[0].items():
            if name not in spec:
                assert name in extra
                continue
            assert (4, *value.shape) == spec[name].shape and value.dtype == spec[name].dtype
        assert set(spec) <= set(dataset[0])


@pytest.mark.parametrize("packing", ["blocks", "documents"])
def test_example_is_a_function_of_seed_and_index(lines, cache, packing):
    prepared = text(lines, packing=packing).prepare(cache)
    one, two, other = prepared.train(3), text(lines, packing=packing).prepare(cache).train(3), prepared.train(4)
    assert prepared.train(-1)[0].keys() == prepared.train(2**70)[0].keys() == one[0].keys()
    far = 10**12
    for i in (0, 5, 700, far):
        assert same(one[i], two[i])
    assert same(pickle.loads(pickle.dumps(one))[700], one[700])
    assert sum(same(one[i], other[i]) for i in range(50)) < 10
    assert len(one) > 1e18


def test_blocks_cover_the_stream_once_an_epoch_and_are_cut_anew(lines, cache):
    prepared = text(lines).prepare(cache)
    tokens, dataset = stream(prepared), prepared.train(0)
    n = len(tokens) // LENGTH
    circle = np.concatenate([tokens, tokens[:2 * LENGTH]])
    where = {circle[i:i + LENGTH + 1].tobytes(): i for i in range(len(tokens))}
    epochs = []
    for epoch in range(3):
        starts = []
        for i in range(epoch * n, (epoch + 1) * n):
            example = dataset[i]
            assert np.array_equal(example["tokens"][1:], example["targets"][:-1])
            starts.append(where[np.append(example["tokens"], example["targets"][-1]).tobytes()])
        targets = (np.asarray(starts)[:, None] + 1 + np.arange(LENGTH)) % len(tokens)
        assert len(np.unique(targets)) == n * LENGTH  # no token twice
        assert starts != sorted(starts)
        epochs.append((starts[0] % LENGTH, starts))
    assert len({first for first, _ in epochs}) > 1  # other cuts
    assert len({tuple(np.argsort(s)) for _, s in epochs}) == 3  # other orders


@pytest.mark.parametrize("packing", ["blocks", "documents"])
@pytest.mark.parametrize("heldout_by", ["name", "tail"])
def test_heldout_predicts_every_token_once(lines, cache, packing, heldout_by):
    prepared = text(lines, packing=packing, heldout_by=heldout_by).prepare(cache)
    tokens, dataset = stream(prepared, "heldout"), prepared.heldout()
    examples = [dataset[i] for i in range(len(dataset))]
    targets = np.concatenate([e["targets"][e["weights"] > 0] for e in examples])
    assert sum(e["weights"].sum() for e in examples) == len(tokens)
    assert np.array_equal(np.sort(targets), np.sort(tokens))
    if packing == "blocks":
        assert np.array_equal(targets, tokens)
        assert examples[0]["tokens"][0] == EOS  # the first token is predicted too
    assert prepared.heldout_bytes == (tokens != EOS).sum() > 0
    assert prepared.facts["xz_bits_per_byte"] > 0
    assert same(dataset[1], text(lines, packing=packing, heldout_by=heldout_by).prepare(cache).heldout()[1])


def test_documents_lose_and_double_nothing(lines, cache):
    prepared = text(lines, packing="documents").prepare(cache)
    tokens, dataset = stream(prepared), prepared.train(1)
    n = len(prepared._corpus.part("train").ends)
    bins, documents = set(), []
    i = 0
    while True:  # one epoch: until a bin comes back
        example = dataset[i]
        if (mark := example["tokens"].tobytes()) in bins:
            break
        bins.add(mark)
        i += 1
        ids, weights = example["segment_ids"], example["weights"]
        assert np.array_equal(ids > 0, weights == 1) and set(np.unique(weights)) <= {0, 1}
        assert set(np.diff(ids[ids > 0])) <= {0, 1} and ids[0] == 1
        assert not example["tokens"][ids == 0].any() and not example["targets"][ids == 0].any()
        for k in range(1, ids.max() + 1):
            inside = ids == k
            inputs, targets = example["tokens"][inside], example["targets"][inside]
            assert np.array_equal(example["positions"][inside], np.arange(inside.sum()))
            assert np.array_equal(inputs[1:], targets[:-1])
            assert EOS not in inputs[1:] and EOS not in targets[:-1]  # a segment is of one document
            documents.append((inputs[0], targets))
    assert np.array_equal(np.sort(np.concatenate([t for _, t in documents])), np.sort(tokens))
    assert sum(first == EOS for first, _ in documents) == n == sum(t[-1] == EOS for _, t in documents)
    used = sum(len(t) for _, t in documents) / (i * LENGTH)
    assert used > 0.97, used
    second = [dataset[i + k]["tokens"].tobytes() for k in range(i)]
    assert set(second) == bins and second != [dataset[k]["tokens"].tobytes() for k in range(i)]


def test_best_fit():
    draw = np.random.default_rng(0)
    for capacity in (1, 7, 64, 1000):
        lengths = draw.integers(1, capacity + 1, 500)
        bin_of = best_fit(lengths, capacity)
        filled = np.bincount(bin_of, lengths)
        assert filled.max() <= capacity and filled.min() > 0
        assert len(filled) <= 11 / 9 * np.ceil(lengths.sum() / capacity) + 20
    assert best_fit(np.array([3, 5, 5, 2, 3, 2]), 5).tolist() == [2, 0, 1, 3, 3, 2]


def test_a_plan_of_no_documents(tmp_path):
    write_plan(tmp_path, np.zeros(0, np.int64), 8)
    assert np.load(tmp_path / "bins.npy").tolist() == [0]


def test_python_documentation(cache):
    data = Text(tokenizer=SentencePiece(vocab_size=1024), length=64)
    facts = data.prepare(cache).facts
    assert facts["lossless"] and facts["vocabulary"] == 1024 and facts["bytes"] > 3e6
    assert 0 < facts["heldout_bytes"] < 0.2 * facts["bytes"] and 1 < facts["xz_bits_per_byte"] < 3
    trained = {line for _, p in data.division().pieces() if _ == "train" for line in map(str.strip, p.text.split("\n"))}
    for part, piece in data.division().pieces():
        if part == "heldout":
            long = [line for line in {s.strip() for s in piece.text.splitlines()} if len(line) >= 40]
            assert long and sum(line in trained for line in long) <= 0.1 * len(long), piece.name


def test_too_little_text(lines, cache):
    with pytest.raises(UserError, match="fewer than one example of data.length 100000"):
        text(lines, length=100_000).prepare(cache)


def test_interleave_is_exact():
    weights = (0.7, 0.2, 0.1)
    shares = proportions(weights)
    assert shares == (7, 2, 1) and proportions((1 / 3, 2 / 3)) == (1, 2) and proportions((2.0, 2.0)) == (1, 1)
    assert proportions((1e-9, 1.0))[0] > 0
    select, seen = Interleave(shares), [0, 0, 0]
    for i in range(1000):
        part, index = select[i]
        assert index == seen[part]  # each part is read in order, with no gap
        seen[part] += 1
        assert all(abs(n - (i + 1) * Fraction(w).limit_denominator(100)) <= 2
                   for n, w in zip(seen, weights, strict=True))
    assert seen == [700, 200, 100]
    assert sorted(select[10**15 + k] for k in range(10)) == (
        [(0, 7 * 10**14 + k) for k in range(7)] + [(1, 2 * 10**14 + k) for k in range(2)] + [(2, 10**14)])


@pytest.mark.parametrize("packing", ["blocks", "documents"])
def test_mixture(lines, cache, tmp_path, packing):
    (tmp_path / "upper.jsonl").write_text("".join(json.dumps({"text": "ABCDEFGH" * 9}) + "\n" for _ in range(200)))
    upper = text(str(tmp_path / "upper.jsonl"), heldout_by="tail", packing=packing)
    data = Mixture((text(lines, packing=packing), upper), (3.0, 1.0))
    prepared = data.prepare(cache)
    dataset = prepared.train(0)
    is_upper = [bool(np.isin(dataset[i]["targets"], range(65, 91)).any()) for i in range(400)]
    assert sum(is_upper) == 100
    assert same(dataset[77], data.prepare(cache).train(0)[77])
    parts = [part.prepare(cache) for part in data.parts]
    assert prepared.heldout_bytes == sum(p.heldout_bytes for p in parts)
    held = prepared.heldout()
    assert len(held) == sum(len(p.heldout()) for p in parts)
    assert sum(held[i]["weights"].sum() for i in range(len(held))) == prepared.facts["heldout_tokens"]
    assert data.spec(2).keys() == data.parts[0].spec(2).keys()
    assert prepared.fingerprint != Mixture(data.parts, (1.0, 1.0)).prepare(cache).fingerprint


def test_mixture_learns_one_tokenizer(lines, cache, tmp_path):
    (tmp_path / "upper.txt").write_text("XYZ\n" * 100)
    parts = (text(lines, tokenizer=Characters()), text(str(tmp_path / "upper.txt"), tokenizer=Characters(),
                                                      heldout_by="tail"))
    assert Mixture(parts).prepare(cache).tokenizer.decode(
        Mixture(parts).prepare(cache).tokenizer.encode("XYZ abc")) == "XYZ\ufffdabc"


def test_mixtures_that_cannot_be(lines):
    part = text(lines)
    with pytest.raises(UserError, match="at least one part"):
        Mixture()
    with pytest.raises(UserError, match="1 values for 2 parts"):
        Mixture((part, part), (1.0,))
    with pytest.raises(UserError, match="must be above 0"):
        Mixture((part, part), (1.0, 0.0))
    with pytest.raises(UserError, match="share data.length, but have 16 and 8"):
        Mixture((part, text(lines, length=8)))
    with pytest.raises(UserError, match="share data.tokenizer"):
        Mixture((part, text(lines, tokenizer=Characters())))
