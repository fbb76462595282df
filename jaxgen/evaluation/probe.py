"""What features are good for: a linear classifier on them, and their nearest neighbours."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Bool, Float, Int

from jaxgen.data.base import Data
from jaxgen.errors import UserError
from jaxgen.evaluation import calibration, whole
from jaxgen.evaluation.base import Evaluation, Report, Setting
from jaxgen.sharding import Sharding

ROWS = 8192
"""Examples that are classified, and compared with, at a time."""
TOLERANCE = 1e-5
"""A fit is done when no entry of the gradient is larger."""


@dataclasses.dataclass(frozen=True)
class OnFeatures(Evaluation):
    """An evaluation that learns from features of labelled training pictures and is measured on held-out ones.

    Features are what the task's `embed_images` gives.
    """

    data: Data | None = None
    """Labelled pictures; None for the experiment's own. Its augmentation is what training examples are read with."""
    label: str = ""
    """A column of the experiment's own pictures with captions, which then are labelled by it."""
    examples: int = 10_000
    """Training examples that are learned from, or all where the data has fewer."""
    batch_size: int = 0
    """Examples at a time; 0 for the training batch's."""

    def features(self, setting: Setting) -> Callable[[Any, Any], tuple["Labelled", "Labelled", int]]:
        """Compiles (params, state) -> (training and held-out features, number of classes)."""
        whole.demand(self, setting.task, "embeds pictures", "embed_images")
        data = whole.prepared(self, self.data, setting, "label", label=self.label)
        if self.examples < 2:
            raise UserError(f"the evaluation '{self.name}' learns from {self.examples} examples, which should be more")

        def function(params, state, batch):
            found = setting.task.embed_images(params, batch, state)
            return {"features": found.astype(jnp.float32), "label": batch["label"]}

        size = self.batch_size or whole.default_batch(setting)
        count = len(data.names("train")) if hasattr(data, "names") else self.examples   # then they come again
        train = data.train(setting.seed)[: min(self.examples, count)].map(_real)
        parts = [whole.rows(d, setting, size, function) for d in (train, whole.held_out(self, data))]

        def run(params, state):
            found = [part(params, state) for part in parts]
            train, heldout = (Labelled(f["features"], f["label"]) for f in found)
            classes = len(getattr(data, "classes", ())) or 1 + int(max(train.label.max(), heldout.label.max()))
            return train, heldout, classes

        return run


def _real(example: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {**example, "weights": np.float32(1)}


class Labelled(NamedTuple):
    """Features (N, D) and labels (N,)."""

    features: Float[np.ndarray, "N D"]
    label: Int[np.ndarray, "N"]


@dataclasses.dataclass(frozen=True)
class LinearProbe(OnFeatures):
    """Accuracy of multinomial logistic regression on the features, fitted by L-BFGS.

    Features are standardised by the training examples' mean and deviation. The strength of the L2 penalty is the one
    that does best on a fifth of the training examples (the stronger of equals); the classifier is then fitted to all.
    """

    name: str = "probe"
    l2: tuple[float, ...] = (1.0, 0.1, 0.01, 1e-3, 1e-4, 1e-5)
    """Strengths to choose from: the penalty is l2 / 2 times the squared weights, beside the mean cross-entropy."""
    iterations: int = 200
    """At most so many steps of L-BFGS for each strength."""

    def build(self, setting: Setting):
        if not self.l2 or min(self.l2) < 0:
            raise UserError(f"the evaluation '{self.name}' has the strengths l2 = {self.l2!r}, which should be some "
                            "that are not negative")
        features, sharding = self.features(setting), setting.sharding

        def run(params, state, step):
            train, heldout, classes = features(params, state)
            l2 = self.l2[0] if len(self.l2) == 1 else self._choose(train, classes, sharding)
            model = fit(train, classes, l2, sharding, self.iterations)
            found = calibration.metrics(_scores(model, heldout, sharding), classes)
            chosen = f"{len(train.label)} training examples, {classes} classes; chance {1 / classes:.4f}; l2 {l2:g}\n"
            return Report({k: found[k] for k in ("top1", "top5") if k in found}, {self.name: chosen})

        return run

    def _choose(self, train: Labelled, classes: int, sharding: Sharding) -> float:
        count = len(train.label)
        apart = np.random.default_rng(0).permutation(count) < max(count // 5, 1)
        validation = Labelled(*(a[apart] for a in train))
        best, chosen, model = -1.0, 0.0, None
        for l2 in sorted(self.l2, reverse=True):   # each fit begins where a stronger penalty ended
            model = fit(train, classes, l2, sharding, self.iterations, ~apart, model)
            right = float(_scores(model, validation, sharding)["top1"])
            if right > best:
                best, chosen = right, l2
        return chosen


class Linear(NamedTuple):
    """A classifier: softmax(standardised features @ weight + bias)."""

    mean: Float[np.ndarray, "D"]
    deviation: Float[np.ndarray, "D"]
    weight: Float[np.ndarray, "D C"]
    bias: Float[np.ndarray, "C"]


def fit(
    train: Labelled,
    classes: int,
    l2: float,
    sharding: Sharding,
    iterations: int = 200,
    used: Bool[np.ndarray, "N"] | None = None,
    start: Linear | None = None,
) -> Linear:
    """Multinomial logistic regression: the least mean cross-entropy + l2 / 2 * |weight|^2; the bias bears no penalty.

    Only the examples `used` count (None: all). They are split over the mesh.
    """
    used = np.ones(len(train.label), bool) if used is None else used   # a mask, so that all fits have one shape
    seen = train.features[used]
    mean, deviation = seen.mean(0, dtype=np.float64), seen.std(0, dtype=np.float64)
    deviation = np.where(deviation > 1e-6 * (1 + np.abs(mean)), deviation, 1)   # a constant feature stays 0
    rows = whole.whole_rows(sharding, len(used))
    x = whole.padded(((train.features - mean) / deviation).astype(np.float32), rows)
    begin = (np.zeros((x.shape[1], classes), np.float32), np.zeros(classes, np.float32))
    weight, bias = _minimise(
        begin if start is None else (start.weight, start.bias),
        whole.place(sharding, x, "batch", None),
        whole.place(sharding, whole.padded(train.label, rows), "batch"),
        whole.place(sharding, whole.padded((used / used.sum()).astype(np.float32), rows), "batch"),
        np.float32(l2),
        iterations,
        sharding.replicated,
    )
    return Linear(mean, deviation, np.asarray(weight), np.asarray(bias))


@functools.partial(jax.jit, static_argnames=("iterations", "replicated"))
def _minimise(begin, x, label, share, l2, iterations, replicated):
    solver = optax.lbfgs()

    def loss(parameters):
        weight, bias = parameters
        logits = jnp.matmul(x, weight, precision="highest") + bias
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, label)
        return jnp.sum(nats * share) + l2 / 2 * jnp.sum(weight * weight)

    value_and_grad = optax.value_and_grad_from_state(loss)   # reuses what the line search has found

    def unfinished(carry):
        _, _, steepest, n = carry
        return (n < iterations) & (steepest > TOLERANCE)

    def step(carry):
        parameters, state, _, n = carry
        value, grad = value_and_grad(parameters, state=state)
        updates, state = solver.update(grad, state, parameters, value=value, grad=grad, value_fn=loss)
        steepest = jnp.maximum(*(jnp.max(jnp.abs(g)) for g in grad))
        return optax.apply_updates(parameters, updates), state, steepest, n + 1

    carry = begin, solver.init(begin), jnp.float32(jnp.inf), jnp.int32(0)
    return jax.lax.with_sharding_constraint(jax.lax.while_loop(unfinished, step, carry)[0], replicated)


@functools.partial(jax.jit, static_argnames="replicated")
def _tally(x, label, real, weight, bias, replicated):
    sums = calibration.tally(jnp.matmul(x, weight, precision="highest") + bias, label, real)
    return jax.lax.with_sharding_constraint(sums, replicated)


def _scores(model: Linear, examples: Labelled, sharding: Sharding) -> dict[str, Any]:
    """The sums of `calibration.tally` over the examples."""

    def tally(features, label, real):
        x = np.where(real[:, None] > 0, (features - model.mean) / model.deviation, 0).astype(np.float32)
        return _tally(
            whole.place(sharding, x, "batch", None), whole.place(sharding, label, "batch"),
            whole.place(sharding, real, "batch"), model.weight, model.bias, sharding.replicated,
        )  # fmt: skip

    return whole.total(list(whole.fetched(tally(*piece) for piece in _pieces(examples, sharding))))


def _pieces(examples: Labelled, sharding: Sharding) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(features, labels, weights) of at most ROWS examples, all of the same shape: the last ones are padding."""
    count = len(examples.label)
    rows = whole.whole_rows(sharding, min(ROWS, count))
    for first in range(0, count, rows):
        arrays = *examples, np.ones(count, np.float32)
        yield tuple(whole.padded(a[first : first + rows], rows) for a in arrays)


@dataclasses.dataclass(frozen=True)
class NearestNeighbours(OnFeatures):
    """Accuracy of the vote of the k training examples that are nearest by cosine similarity.

    A neighbour's vote weighs exp(similarity / temperature) (Wu et al. 2018, section 3.4).
    """

    name: str = "neighbours"
    k: int = 20
    """Neighbours that vote."""
    temperature: float = 0.07
    """How fast a vote weighs less with the distance."""

    def build(self, setting: Setting):
        if self.k < 1 or self.temperature <= 0:
            raise UserError(f"the evaluation '{self.name}' has k = {self.k} and temperature = {self.temperature:g}; "
                            "k should be at least 1 and the temperature above 0")
        features, sharding = self.features(setting), setting.sharding

        def run(params, state, step):
            train, heldout, classes = features(params, state)
            votes = neighbour_votes(train, heldout.features, classes, sharding, self.k, self.temperature)
            found = {f"top{n}": _top(votes, heldout.label, n) for n in (1, 5) if classes >= n}
            told = f"{len(train.label)} training examples, {classes} classes; chance {1 / classes:.4f}; k {self.k}\n"
            return Report(found, {self.name: told})

        return run


def _top(votes: Float[np.ndarray, "Q C"], label: Int[np.ndarray, "Q"], n: int) -> float:
    """The share of queries whose class is among the n with the most votes, ties by chance; none where one is NaN."""
    true = np.take_along_axis(votes, label[:, None], 1)
    above, level = (votes > true).sum(1), (votes == true).sum(1)
    hits = np.clip((n - above) / np.maximum(level, 1), 0, 1)
    return float(np.mean(np.where(np.isnan(votes).any(1), 0, hits)))


def neighbour_votes(
    train: Labelled, queries: Float[np.ndarray, "Q D"], classes: int, sharding: Sharding, k: int, temperature: float
) -> Float[np.ndarray, "Q C"]:
    """The weight of each class among the k nearest training examples, by class; of equally near ones the first count.

    Queries are split over the mesh, and at most ROWS x ROWS similarities exist at a time.
    """
    columns = min(ROWS, len(train.label))
    k = min(k, len(train.label))
    pieces = []
    for first in range(0, len(train.label), columns):
        near, label = (a[first : first + columns] for a in train)
        pieces.append((whole.padded(_unit(near), columns), whole.padded(label, columns, -1)))
    found = []
    for features, _, real in _pieces(Labelled(queries, np.zeros(len(queries), np.int32)), sharding):
        query = whole.place(sharding, _unit(features), "batch", None)
        best = whole.place(sharding, np.full((len(features), k), -np.inf, np.float32), "batch", None)
        label = whole.place(sharding, np.zeros((len(features), k), np.int32), "batch", None)
        for piece in pieces:
            candidates, theirs = (whole.place(sharding, x, *(None,) * x.ndim) for x in piece)
            best, label = _nearer(best, label, query, candidates, theirs)
        votes = _vote(best, label, np.float32(temperature), classes, sharding.replicated)
        found.append(np.asarray(votes)[real > 0])
    return np.concatenate(found)


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


@jax.jit
def _nearer(best, label, query, candidates, theirs):
    """The k nearest of those found before and the candidates; a label of -1 is padding."""
    similar = jnp.where(theirs >= 0, jnp.matmul(query, candidates.T, precision="highest"), -jnp.inf)
    both = jnp.concatenate([best, similar], 1)
    labels = jnp.concatenate([label, jnp.broadcast_to(theirs, similar.shape)], 1)
    best, place = jax.lax.top_k(both, best.shape[1])
    return best, jnp.take_along_axis(labels, place, 1)


@functools.partial(jax.jit, static_argnames=("classes", "replicated"))
def _vote(best, label, temperature, classes, replicated):
    weight = jnp.exp((best - 1) / temperature)
    votes = jnp.zeros((len(best), classes)).at[jnp.arange(len(best))[:, None], label].add(weight)
    return jax.lax.with_sharding_constraint(votes, replicated)
