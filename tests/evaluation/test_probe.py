"""Linear probe and nearest neighbours against SciPy and NumPy in float64."""

import dataclasses

import jax
import numpy as np
import pytest
from scipy.optimize import minimize
from toys import Pairs, Ready, Tables, parameters, setting, table

from jaxgen.errors import UserError
from jaxgen.evaluation import probe
from jaxgen.evaluation.probe import Labelled, LinearProbe, NearestNeighbours, fit, neighbour_votes
from jaxgen.sharding import RULES, Mesh, Sharding
from jaxgen.tasks.base import Task

RNG = np.random.default_rng(0)
TRAIN, N, CLASSES = 60, 90, 4
CENTRES = RNG.normal(size=(CLASSES, 6))
LABELS = RNG.integers(0, CLASSES, N)
FEATURES = (CENTRES[LABELS] + 0.9 * RNG.normal(size=(N, 6))) * [1, 5, 0.1, 1, 1, 0] + [0, 100, 0, 0, 0, 7]
DATA = Pairs(N, labels=LABELS, train=TRAIN)
PARAMS = parameters(FEATURES, np.zeros((1, 6)))
EXAMPLES = Labelled(FEATURES.astype(np.float32), LABELS.astype(np.int32))


def sharding(devices=1, mesh=Mesh()):
    return Sharding(mesh.build(jax.devices()[:devices]), RULES)


def by_hand(x, labels, l2):
    """Multinomial logistic regression on standardised features: (mean, deviation, weight, bias)."""
    mean, deviation = x.mean(0), np.where(x.std(0) > 1e-6, x.std(0), 1)
    z, hot = (x - mean) / deviation, np.eye(CLASSES)[labels]

    def loss(flat):
        weight, bias = flat[: x.shape[1] * CLASSES].reshape(-1, CLASSES), flat[x.shape[1] * CLASSES :]
        logits = z @ weight + bias
        top = logits.max(1, keepdims=True)
        log_p = logits - top - np.log(np.exp(logits - top).sum(1, keepdims=True))
        error = (np.exp(log_p) - hot) / len(z)
        value = -(log_p * hot).sum() / len(z) + l2 / 2 * (weight**2).sum()
        return value, np.concatenate([(z.T @ error + l2 * weight).ravel(), error.sum(0)])

    found = minimize(loss, np.zeros((x.shape[1] + 1) * CLASSES), jac=True, tol=1e-14, method="BFGS").x
    return mean, deviation, found[: x.shape[1] * CLASSES].reshape(-1, CLASSES), found[x.shape[1] * CLASSES :]


@pytest.mark.parametrize(("devices", "mesh"), [(1, Mesh()), (8, Mesh(data=2, fsdp=2, tensor=2))])
@pytest.mark.parametrize("l2", [1.0, 0.01])
def test_the_fit_is_the_minimum(l2, devices, mesh):
    """61 examples, which no mesh of several devices divides; one feature is constant, one has a large mean."""
    train = Labelled(*(a[:61] for a in EXAMPLES))
    model = fit(train, CLASSES, l2, sharding(devices, mesh))
    mean, deviation, weight, bias = by_hand(train.features.astype(np.float64), train.label, l2)
    np.testing.assert_allclose(model.mean, mean, rtol=1e-6)
    np.testing.assert_allclose(model.deviation, deviation, rtol=1e-4)
    np.testing.assert_allclose(model.weight, weight, atol=2e-4 / l2**0.5)
    # a constant added to every bias changes nothing
    np.testing.assert_allclose(model.bias - np.mean(model.bias), bias - bias.mean(), atol=1e-3)
    assert np.abs(weight).max() > 0.1 and np.all(np.asarray(model.weight)[5] == 0)


def test_a_fit_that_begins_elsewhere_ends_in_the_same_place():
    far = fit(EXAMPLES, CLASSES, 1.0, sharding())
    again, plain = (fit(EXAMPLES, CLASSES, 0.01, sharding(), start=start) for start in (far, None))
    np.testing.assert_allclose(again.weight, plain.weight, atol=2e-3)
    stopped = fit(EXAMPLES, CLASSES, 0.01, sharding(), iterations=1)
    assert np.abs(stopped.weight - plain.weight).max() > 0.1


@pytest.mark.parametrize(
    ("size", "devices", "mesh"), [(7, 1, Mesh()), (0, 1, Mesh()), (8, 8, Mesh(data=2, fsdp=2, tensor=2))]
)
def test_probe_learns_from_training_examples_alone(size, devices, mesh, monkeypatch):
    monkeypatch.setattr(probe, "ROWS", 8)
    evaluation = LinearProbe(examples=TRAIN, l2=(0.01,), batch_size=size)
    report = evaluation.build(setting(DATA, devices=devices, mesh=mesh))(PARAMS, {}, 0)
    mean, deviation, weight, bias = by_hand(EXAMPLES.features[:TRAIN].astype(np.float64), LABELS[:TRAIN], 0.01)
    right = ((EXAMPLES.features[TRAIN:] - mean) / deviation @ weight + bias).argmax(1) == LABELS[TRAIN:]
    assert report.metrics == {"top1": pytest.approx(right.mean())} and 0.5 < right.mean() < 1
    assert report.texts["probe"] == "60 training examples, 4 classes; chance 0.2500; l2 0.01\n"


@pytest.mark.parametrize("choices", [(1e-3, 3.0), (3.0, 1e-3), (0.03, 0.03, 3.0)])
def test_the_penalty_is_chosen_on_a_fifth_of_the_training_examples(choices):
    """The one that a fit to the others does best with; what is held out plays no part in it."""
    apart = np.random.default_rng(0).permutation(TRAIN) < TRAIN // 5
    noise = np.random.default_rng(9).normal(size=(N, 6))
    features = np.float32(EXAMPLES.features + noise * [2, 10, 0.2, 2, 2, 0])
    labels = LABELS[:TRAIN]
    right = {}
    for l2 in choices:
        mean, deviation, weight, bias = by_hand(features[:TRAIN][~apart].astype(np.float64), labels[~apart], l2)
        scores = (features[:TRAIN][apart] - mean) / deviation @ weight + bias
        right[l2] = np.mean(scores.argmax(1) == labels[apart])
    best = max(sorted(right, reverse=True), key=right.get)
    assert len(set(right.values())) > 1
    held_out = np.random.default_rng(1).permutation(LABELS[TRAIN:])
    for each in (LABELS, np.concatenate([labels, held_out])):
        built = LinearProbe(examples=TRAIN, l2=choices).build(setting(Pairs(N, labels=each, train=TRAIN)))
        assert float(built(parameters(features, features), {}, 0).texts["probe"].split()[-1]) == best


def test_data_of_its_own_and_names_of_its_classes():
    """Six classes are named, of which four are seen; top 5 is told from five classes on."""
    data = Pairs(N, labels=LABELS, train=TRAIN, classes=tuple("abcdef"))
    for evaluation in (LinearProbe(data=Ready(data), examples=TRAIN, l2=(0.1,)), NearestNeighbours(data=Ready(data))):
        evaluation = dataclasses.replace(evaluation, examples=TRAIN)
        report = evaluation.build(setting(Pairs(N, captions=LABELS)))(PARAMS, {}, 0)
        assert "6 classes; chance 0.1667" in report.texts[evaluation.name]
        assert report.metrics["top1"] > 0.4 and report.metrics["top5"] > 0.9


# Nearest neighbours


@pytest.mark.parametrize(("devices", "mesh"), [(1, Mesh()), (8, Mesh(data=2, fsdp=2, tensor=2))])
@pytest.mark.parametrize("rows", [7, 16, 8192])
def test_votes(rows, devices, mesh, monkeypatch):
    monkeypatch.setattr(probe, "ROWS", rows)
    x = table(5, N)
    train, queries = Labelled(3 * x[:TRAIN], LABELS[:TRAIN].astype(np.int32)), 2 * x[TRAIN:]
    found = neighbour_votes(train, queries, CLASSES, sharding(devices, mesh), 9, 0.5)
    similar = x[TRAIN:].astype(np.float64) @ x[:TRAIN].T.astype(np.float64)
    expected = np.zeros((N - TRAIN, CLASSES))
    for i, row in enumerate(similar):
        for j in np.argsort(-row)[:9]:
            expected[i, LABELS[j]] += np.exp((row[j] - 1) / 0.5)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_neighbours():
    """k = 1 takes the nearest; a k beyond all examples, at a high temperature, the largest class."""
    x = FEATURES / np.linalg.norm(FEATURES, axis=1, keepdims=True)
    built = NearestNeighbours(examples=TRAIN, k=1).build(setting(DATA))
    nearest = LABELS[(x[TRAIN:] @ x[:TRAIN].T).argmax(1)] == LABELS[TRAIN:]
    assert built(PARAMS, {}, 0).metrics == {"top1": pytest.approx(nearest.mean())}
    built = NearestNeighbours(examples=TRAIN, k=1000, temperature=1e4).build(setting(DATA))
    largest = np.bincount(LABELS[:TRAIN]).argmax() == LABELS[TRAIN:]
    assert built(PARAMS, {}, 0).metrics == {"top1": pytest.approx(largest.mean())}


@pytest.mark.parametrize("broken", [slice(None), slice(TRAIN), slice(TRAIN, None)], ids=["all", "train", "heldout"])
@pytest.mark.parametrize(
    "evaluation", [LinearProbe(examples=TRAIN, l2=(1.0, 0.1)), NearestNeighbours(examples=TRAIN, k=1)]
)
def test_features_that_are_not_numbers_are_no_hits(evaluation, broken):
    features = FEATURES.copy()
    features[broken] = np.nan
    metrics = evaluation.build(setting(DATA))(parameters(features, features), {}, 0).metrics
    assert metrics == {"top1": 0}


@pytest.mark.parametrize(
    ("evaluation", "data", "task", "said"),
    [
        (LinearProbe(), Pairs(N, captions=LABELS), Tables(), "'probe' needs label"),
        (LinearProbe(), DATA, Task(), "needs a task that embeds pictures, and Task does not"),
        (LinearProbe(l2=()), DATA, Tables(), "which should be some that are not negative"),
        (LinearProbe(examples=1), DATA, Tables(), "learns from 1 examples, which should be more"),
        (NearestNeighbours(k=0), DATA, Tables(), "k should be at least 1"),
    ],
)
def test_mistakes(evaluation, data, task, said):
    with pytest.raises(UserError, match=said):
        evaluation.build(setting(data, task))
