"""Zero-shot classification, accuracy and calibration against NumPy in float64."""

import dataclasses

import jax
import numpy as np
import pytest
from toys import Classifier, Pairs, Ready, Tables, parameters, setting, table, unit

from jaxgen.errors import UserError
from jaxgen.evaluation import calibration
from jaxgen.evaluation.calibration import Accuracy
from jaxgen.evaluation.zeroshot import ZeroShot
from jaxgen.sharding import Mesh
from jaxgen.tasks.base import Task

N, CLASSES = 29, 7
LABELS = np.random.default_rng(0).integers(0, CLASSES, N)
TEMPLATES = ("{} word", "{}0 word", "{}1 {} words")   # for class 4 the tokens 4, 40 and 41
NAMES = tuple("1234567")
TEXTS = table(2, 80)
IMAGES = unit(table(1, N) + 0.6 * TEXTS[LABELS + 1]).astype(np.float32)
PARAMS = parameters(IMAGES, TEXTS)


def by_hand(logits, labels, bins=15):
    """Accuracy and calibration, an example at a time."""
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    order = np.argsort(-p, 1, kind="stable")
    gaps, confidence, right = 0.0, p.max(1), order[:, 0] == labels
    for i in range(bins):
        inside = (confidence > i / bins) & (confidence <= (i + 1) / bins)
        if inside.any():
            gaps += inside.mean() * abs(confidence[inside].mean() - right[inside].mean())
    return {
        "top1": right.mean(),
        "top5": (order[:, :5] == labels[:, None]).any(1).mean(),
        "nll": -np.mean(np.log(p[np.arange(len(labels)), labels])),
        "brier": np.mean(((p - np.eye(p.shape[1])[labels]) ** 2).sum(1)),
        "ece": gaps,
    }


def close(expected):
    return {k: pytest.approx(v, rel=2e-5) for k, v in expected.items()}


def similarities():
    texts = TEXTS.astype(np.float64)
    prompts = np.stack([texts[[c, 10 * c, 10 * c + 1]] for c in range(1, CLASSES + 1)])
    return IMAGES.astype(np.float64) @ unit(prompts.mean(1)).T


@pytest.mark.parametrize(
    ("size", "devices", "mesh"), [(5, 1, Mesh()), (64, 1, Mesh()), (8, 8, Mesh(data=2, fsdp=2, tensor=2))]
)
def test_prompts_are_averaged_for_each_class(size, devices, mesh):
    evaluation = ZeroShot(templates=TEMPLATES, batch_size=size)
    data = Pairs(N, labels=LABELS, classes=NAMES)
    report = evaluation.build(setting(data, devices=devices, mesh=mesh))(PARAMS, {}, 0)
    expected = by_hand(20 * similarities(), LABELS)
    assert report.metrics == close(expected) and 0.3 < expected["top1"] < expected["top5"] < 1
    assert report.texts["zeroshot"].startswith("7 classes, 3 prompts each; chance 0.1429\n")


def test_data_and_names_of_its_own():
    """Other pictures than the experiment's, whose captions tell how texts are encoded."""
    captions = Pairs(N, captions=LABELS)
    evaluation = ZeroShot(data=Ready(Pairs(11, labels=LABELS)), classes=NAMES, templates=TEMPLATES)
    metrics = evaluation.build(setting(captions))(PARAMS, {}, 0).metrics
    assert metrics == close(by_hand(20 * similarities()[:11], LABELS[:11]))


def test_the_temperature_has_its_bound():
    data, evaluation = Pairs(N, labels=LABELS, classes=NAMES), ZeroShot(templates=TEMPLATES)
    metrics = evaluation.build(setting(data, Tables(max_scale=3)))(PARAMS, {}, 0).metrics
    assert metrics["nll"] == pytest.approx(by_hand(3 * similarities(), LABELS)["nll"], rel=1e-5)


def test_labels_without_a_name():
    built = ZeroShot(classes=NAMES[:5], templates=TEMPLATES).build(setting(Pairs(N, labels=LABELS)))
    with pytest.raises(UserError, match=f"names for 5 classes, and {(LABELS >= 5).sum()} of its pictures have labels"):
        built(PARAMS, {}, 0)


@pytest.mark.parametrize(
    ("evaluation", "data", "task", "said"),
    [
        (ZeroShot(classes=NAMES), Pairs(N, captions=LABELS), Tables(), "needs label, .* pictures in its field data"),
        (ZeroShot(), Pairs(N, labels=LABELS), Tables(), "needs names for the classes"),
        (ZeroShot(templates=("a photo",)), Pairs(N, labels=LABELS, classes=NAMES), Tables(), "needs prompts with {}"),
        (ZeroShot(), Pairs(N, labels=LABELS, classes=NAMES), Task(), "embeds pictures and texts, and Task does not"),
        (Accuracy(), Pairs(N, labels=LABELS), Tables(), "needs a task that classifies, and Tables does not"),
        (Accuracy(), Pairs(N, captions=LABELS), Classifier(), "'accuracy' needs label"),
    ],
)
def test_mistakes(evaluation, data, task, said):
    with pytest.raises(UserError, match=said):
        evaluation.build(setting(data, task))


def test_embeddings_that_are_not_numbers_are_no_hits():
    built = ZeroShot(templates=TEMPLATES).build(setting(Pairs(N, labels=LABELS, classes=NAMES)))
    for images, texts in ((IMAGES * np.nan, TEXTS), (IMAGES, TEXTS * np.nan)):
        metrics = built(parameters(images, texts), {}, 0).metrics
        assert metrics["top1"] == metrics["top5"] == 0 and np.isnan(metrics["nll"])


# Classification

tally = jax.jit(calibration.tally)

@pytest.mark.parametrize(
    ("size", "devices", "mesh"), [(5, 1, Mesh()), (64, 1, Mesh()), (8, 8, Mesh(data=2, fsdp=2, tensor=2))]
)
def test_accuracy_and_calibration(size, devices, mesh):
    logits = np.random.default_rng(3).normal(size=(N, CLASSES)) + 2 * np.eye(CLASSES)[LABELS]
    state = np.linspace(0, 1, CLASSES)
    evaluation = Accuracy(batch_size=size, bins=10)
    built = evaluation.build(setting(Pairs(N, labels=LABELS), Classifier(), devices, mesh))
    report = built({"model": np.float32(logits)}, np.float32(state), 0)
    expected = by_hand(logits + state, LABELS, bins=10)
    assert report.metrics == close(expected) and 0.3 < expected["top1"] < expected["top5"] < 1
    lines = [line.split() for line in report.texts["accuracy"].splitlines()[1:]]
    assert sum(int(line[1]) for line in lines) == N
    assert sum(int(line[1]) * float(line[3]) for line in lines) == pytest.approx(N * expected["top1"], abs=0.05)


def test_few_classes_have_no_top_5():
    sums = tally(np.eye(5, dtype=np.float32), np.arange(5), np.ones(5, np.float32))
    assert set(calibration.metrics(sums, 5)) == {"top1", "nll", "brier", "ece"}


def test_equal_logits_are_chance():
    """And a confident mistake counts by its confidence."""
    sums = tally(np.zeros((3, 10), np.float32), np.array([0, 4, 9]), np.array([1, 1, 0], np.float32))
    found = calibration.metrics(sums, 10)
    assert found == {k: pytest.approx(v, abs=1e-6) for k, v in
                     {"top1": 0.1, "top5": 0.5, "nll": np.log(10), "brier": 0.9, "ece": 0.0}.items()}
    wrong = tally(np.float32([[9, 0, 0], [9, 0, 0]]), np.array([0, 1]), np.ones(2, np.float32))
    assert calibration.metrics(wrong, 3)["ece"] == pytest.approx(0.5, abs=1e-3)


def test_logits_that_are_not_numbers_are_no_hits():
    """One such example beside one that is right; and a label that no logit is of."""
    logits = np.float32([[np.nan] * 7, np.eye(7)[3], np.eye(7)[6]])
    sums = tally(logits, np.array([0, 3, 7]), np.ones(3, np.float32))
    assert sums["top1"] == sums["top5"] == 1 and np.isnan(sums["nll"])
    assert sums["bin_right"].sum() == 1


def test_more_classes_than_the_task_has():
    """In the experiment's data the task looks itself, in the evaluation's own nobody else would."""

    @dataclasses.dataclass(frozen=True)
    class Few(Classifier):
        def check_data(self, data):
            if len(getattr(data, "classes", ())) > 3:
                raise UserError("too many classes")

    own = Ready(Pairs(N, labels=LABELS, classes=NAMES))
    with pytest.raises(UserError, match="too many classes"):
        Accuracy(data=own).build(setting(Pairs(N, labels=LABELS % 3), Few()))


def test_calibration_of_a_perfectly_calibrated_classifier():
    """Labels drawn with the probabilities that are told."""
    rng = np.random.default_rng(0)
    logits = 1.5 * rng.normal(size=(20_000, 4))
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    labels = (rng.random((len(p), 1)) > p.cumsum(1)).sum(1)
    ones = np.ones(len(p), np.float32)
    assert calibration.metrics(tally(np.float32(logits), labels, ones), 4)["ece"] < 0.015
    assert calibration.metrics(tally(np.float32(3 * logits), labels, ones), 4)["ece"] > 0.15
