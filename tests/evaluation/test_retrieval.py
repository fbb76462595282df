"""Retrieval against plain NumPy over the whole similarity matrix, on any mesh, batch size and chunk."""

import itertools

import jax
import numpy as np
import pytest
from toys import Pairs, Tables, parameters, setting, table, unit

from jaxgen.data.sheets import COLOURS
from jaxgen.errors import UserError
from jaxgen.evaluation.retrieval import Retrieval, equal_captions, ranker, recall
from jaxgen.sharding import RULES, Mesh, Sharding
from jaxgen.tasks.base import Task

N = 29
CAPTIONS = np.random.default_rng(0).integers(0, 20, N)   # some captions are those of two or three pictures
IMAGES = table(1, N)
TEXTS = unit(table(2, 30) + np.concatenate([IMAGES, IMAGES[:1]]))   # by token
TEXTS[CAPTIONS[:8]] = unit(TEXTS[CAPTIONS[:8]] + 3 * IMAGES[:8])
PARAMS = parameters(IMAGES, TEXTS)


def by_hand(k, direction, part=slice(None)):
    captions = CAPTIONS[part]
    similar = IMAGES[part].astype(np.float64) @ TEXTS[captions].T.astype(np.float64)
    same = captions[:, None] == captions
    if direction == "image_to_text":
        # equal captions have equal embeddings: one of them stands k-th or better when the others are all wrong
        return np.mean([(similar[i] > similar[i][same[i]].max()).sum() < k for i in range(len(captions))])
    return np.mean([(similar[:, i] > similar[:, i][same[i]].max()).sum() < k for i in range(len(captions))])


@pytest.mark.parametrize(
    ("size", "devices", "mesh"),
    [(5, 1, Mesh()), (0, 1, Mesh()), (32, 1, Mesh()), (8, 8, Mesh(data=2, fsdp=2, tensor=2)), (16, 8, Mesh())],
)
def test_recall_is_that_of_the_whole_matrix(size, devices, mesh):
    built = Retrieval(batch_size=size, shown=0).build(setting(Pairs(N, CAPTIONS), devices=devices, mesh=mesh))
    report = built(PARAMS, {}, 3)
    expected = {
        f"{d}/recall@{k}": pytest.approx(by_hand(k, d))
        for d in ("image_to_text", "text_to_image") for k in (1, 5, 10)
    }  # fmt: skip
    assert report.metrics == expected and not report.images
    values = list(report.metrics.values())
    assert values == sorted(values[:3]) + sorted(values[3:]) and 0.1 < values[0] < values[2] < 1


def test_galleries_are_cut_in_order_and_the_rest_left_out():
    metrics = Retrieval(among=9, shown=0).build(setting(Pairs(N, CAPTIONS)))(PARAMS, {}, 0).metrics
    for k in (1, 5):
        parts = [by_hand(k, "text_to_image", slice(start, start + 9)) for start in (0, 9, 18)]
        assert metrics[f"text_to_image/recall@{k}"] == pytest.approx(np.mean(parts))
    assert by_hand(1, "text_to_image") != metrics["text_to_image/recall@1"]


@pytest.mark.parametrize("chunk", [3, 8, 29, 4096])
@pytest.mark.parametrize("devices", [1, 8])
def test_ranks_in_chunks(chunk, devices):
    """Chunks that do and do not divide; more candidates than queries; every kind of tie."""
    candidates = table(3, 40)
    groups = np.arange(40, dtype=np.int32) % 23
    candidates[7] = candidates[3]             # a wrong one level with a right one
    candidates[24] = candidates[1]            # two right ones level
    queries, group = candidates[:N].copy(), groups[:N]
    queries[4:] = table(4, N)[4:]
    similar = queries.astype(np.float64) @ candidates.T.astype(np.float64)
    right = group[:, None] == groups
    best = np.where(right, similar, -2).max(1, keepdims=True)
    above = ~right & (similar > best + 1e-6)
    level = np.abs(similar - best) <= 1e-6
    expected = above.sum(1), (~right & level).sum(1), (right & level).sum(1)
    assert expected[1][3] == 1 and expected[2][1] == 2 and expected[0].max() > 20
    sharding = Sharding(Mesh().build(jax.devices()[:devices]), RULES)
    for found, wanted in zip(ranker(sharding, chunk)(queries, candidates, group, groups), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_ties_are_broken_by_chance():
    """Against all orders of two wrong and two right level candidates after one that is above them."""
    ranks = np.array([1]), np.array([2]), np.array([2])
    for k in (1, 2, 3, 4, 5):
        orders = [order[: max(k - 1, 0)] for order in itertools.permutations("wwrr")]
        assert recall(ranks, k) == pytest.approx(np.mean(["r" in order for order in orders]))


def test_a_model_that_tells_nothing_apart_scores_chance():
    same = np.ones((N + 1, 6)) / np.sqrt(6)
    report = Retrieval(shown=0).build(setting(Pairs(N, range(N))))(parameters(same[:N], same), {}, 0)
    for direction in ("image_to_text", "text_to_image"):
        for k in (1, 5, 10):
            assert report.metrics[f"{direction}/recall@{k}"] == pytest.approx(k / N)
    lines = report.texts["retrieval"].splitlines()
    assert lines[0] == f"among {N}" and lines[1].split() == ["recall@1", "recall@5", "recall@10"]
    assert lines[2].split()[-3:] == lines[4].split()[-3:] == ["0.0345", "0.1724", "0.3448"]


@pytest.mark.parametrize("broken", [(0, 1), (1, 0), (1, 1)], ids=["images", "texts", "both"])
def test_embeddings_that_are_not_numbers_are_no_hits(broken):
    parts = [np.where(b, np.nan, x) for b, x in zip(broken, (IMAGES, TEXTS), strict=True)]
    metrics = Retrieval(shown=0).build(setting(Pairs(N, CAPTIONS)))(parameters(*parts), {}, 0).metrics
    assert set(metrics.values()) == {0}


def test_one_embedding_that_is_not_a_number():
    """Its own query is missed; those of others are answered among the rest."""
    images = table(1, 12)
    texts = np.concatenate([images, images[:1]])
    images[3] = np.nan
    metrics = Retrieval(shown=0).build(setting(Pairs(12, range(12))))(parameters(images, texts), {}, 0).metrics
    np.testing.assert_allclose(list(metrics.values()), 11 / 12)


def test_pictures_that_cannot_be_read():
    """Fewer pairs than were asked for are one gallery, and the report says so."""
    data = Pairs(N, CAPTIONS, unread=(4, 17))
    built = Retrieval(among=N, shown=2).build(setting(data))
    report, plain = built(PARAMS, {}, 0), Retrieval(shown=0).build(setting(data))(PARAMS, {}, 0)
    assert report.metrics == plain.metrics and "retrieval" in report.images
    said = f"among {N - 2}, not {N}: the other pictures cannot be read"
    assert report.texts["retrieval"].splitlines()[0] == said
    assert plain.texts["retrieval"].splitlines()[0] == f"among {N - 2}"
    with pytest.raises(UserError, match=f"none of the {N} held-out pairs can be read"):
        Retrieval().build(setting(Pairs(N, CAPTIONS, unread=range(N))))(PARAMS, {}, 0)


def test_what_is_after_the_end_of_a_caption_is_no_part_of_it():
    tokens = np.array([[3, 4, 0, 9], [3, 4, 0, 8], [3, 4, 7, 0], [3, 4, 0, 0]], np.int32)
    found = equal_captions(tokens, np.array([3, 3, 4, 4], np.int32))
    assert found[0] == found[1] and len(set(found.tolist())) == 3 and set(found.tolist()) == {0, 1, 2}


def test_picture_of_hits():
    """A green frame around each right answer among the five shown, on both halves."""
    report = Retrieval(shown=4, name="hits").build(setting(Pairs(N, CAPTIONS)))(PARAMS, {}, 0)
    picture = report.images["hits"]
    assert picture.dtype == np.uint8 and picture.shape[2] == 3
    green = (picture == COLOURS["green"]).all(-1)
    rows = picture.shape[0] // 8, picture.shape[1] // 6
    cells = green[: rows[0] * 8, : rows[1] * 6].reshape(8, rows[0], 6, rows[1]).any((1, 3))
    similar = IMAGES.astype(np.float64) @ TEXTS[CAPTIONS].T
    expected = np.zeros((8, 6), bool)
    for i in range(4):
        for row, scores in ((i, similar[:, i]), (4 + i, similar[i])):
            expected[row, 1:] = CAPTIONS[np.argsort(-scores, kind="stable")[:5]] == CAPTIONS[i]
    np.testing.assert_array_equal(cells, expected)
    assert expected.any() and not expected[:, 1:].all()


@pytest.mark.parametrize(
    ("evaluation", "data", "task", "said"),
    [
        (Retrieval(among=30), Pairs(N, CAPTIONS), Tables(), "looks among 30 pairs, and the data holds out 29"),
        (Retrieval(), Pairs(N, labels=CAPTIONS), Tables(), "needs tokens and lengths, and .* data has image, label"),
        (Retrieval(), Pairs(0, []), Tables(), "'retrieval' has nothing to measure"),
        (Retrieval(), Pairs(N, CAPTIONS), Task(), "needs a task that embeds pictures and texts, and Task does not"),
    ],
)
def test_mistakes(evaluation, data, task, said):
    with pytest.raises(UserError, match=said):
        evaluation.build(setting(data, task))
