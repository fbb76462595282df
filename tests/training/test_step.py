"""What one compiled step does, shown by toy tasks: players, state, teacher, frozen parts, keys, skipped updates."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.errors import UserError
from jaxgen.sharding import RULES, Mesh, Sharding
from jaxgen.tasks.base import Loss, Player, Task
from jaxgen.training.ema import Ema
from jaxgen.training.optimizers import SGD, AdamW
from jaxgen.training.schedules import Constant, Linear
from jaxgen.training.step import Program

DESCENT = SGD(learning_rate=0.1, schedule=Constant(), momentum=0.0)
VALUES = jnp.arange(8, dtype=jnp.float32)


def program(task, optimizer=DESCENT, batch=None, devices=1, **options):
    spec = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in (batch or {"x": VALUES}).items()}
    sharding = Sharding(Mesh().build(jax.devices()[:devices]), RULES)
    return Program(task, optimizer, sharding, spec, **{"steps": 10, **options})


def run(program, batches):
    """The states and metrics after each batch, on the host; the first state is that before."""
    state = program.init(0)
    states, metrics = [jax.device_get(state)], []
    for batch in batches:
        state, found = program.step(state, jax.device_put(batch, program.batch_shardings))
        states.append(jax.device_get(state))
        metrics.append(jax.device_get(found))
    return states, metrics


def mean(values, **more):
    return Loss(jnp.sum(values), jnp.float32(values.shape[0]), **more)


@dataclasses.dataclass(frozen=True)
class Toy(Task):
    """(w - x)^2, and whatever a test adds."""

    def init(self, key):
        return {"model": {"w": jnp.float32(3.0)}}, {}

    def loss(self, params, batch, context):
        return mean(jnp.square(params["model"]["w"] - batch["x"]))


# ---- players ----


@dataclasses.dataclass(frozen=True)
class MinMax(Task):
    """One player moves a down a b, the other moves b up it: a GAN, with nothing to learn."""

    every: int = 1
    start: int = 0

    def init(self, key):
        return {"a": jnp.float32(1.0), "b": jnp.float32(2.0), "rest": jnp.float32(7.0)}, {}

    def players(self):
        def product(params, batch):
            return params["a"] * params["b"] * jnp.ones_like(batch["x"])

        return (
            Player("low", lambda p, b, c: mean(product(p, b)), ("a",)),
            Player("high", lambda p, b, c: mean(-product(p, b)), ("b",), self.every, self.start),
        )


def test_two_players():
    """a <- a - r b, then b <- b + r a with the new a: powers of one matrix."""
    states, metrics = run(program(MinMax()), [{"x": VALUES}] * 10)
    turn = np.array([[1, -0.1], [0.1, 1 - 0.01]])
    for n, state in enumerate(states):
        expected = np.linalg.matrix_power(turn, n) @ [1.0, 2.0]
        np.testing.assert_allclose([state.params["a"], state.params["b"]], expected, rtol=1e-5)
    assert {"low/loss", "high/loss", "high/learning_rate", "low/gradient_norm", "skipped"} <= set(metrics[0])


def test_every_and_start():
    """The second player moves in steps 2, 5 and 8, each of its schedule's three updates once."""
    optimizers = {"low": DESCENT, "high": dataclasses.replace(DESCENT, schedule=Linear())}
    states, metrics = run(program(MinMax(3, 2), optimizers), [{"x": VALUES}] * 10)
    a, b, rates = 1.0, 2.0, {2: 0.1, 5: 0.1 * 2 / 3, 8: 0.1 / 3}
    for step, (state, found) in enumerate(zip(states[1:], metrics, strict=True)):
        a -= 0.1 * b
        b += rates.get(step, 0.0) * a
        np.testing.assert_allclose([state.params["a"], state.params["b"]], [a, b], rtol=1e-5)
        assert np.isnan(found["high/loss"]) == (step not in rates)
        np.testing.assert_allclose(found["high/learning_rate"], rates.get(step, np.nan), rtol=1e-5)


def test_a_part_that_no_player_moves_is_frozen():
    states, _ = run(program(MinMax(), ema=Ema()), [{"x": VALUES}])
    assert states[1].frozen == {"a": None, "b": None, "rest": 7.0} and states[1].params["rest"] is None
    assert states[1].ema["rest"] is None


def test_optimizers_are_the_players():
    with pytest.raises(UserError) as caught:
        program(MinMax(), {"low": DESCENT, "hihg": DESCENT})
    assert str(caught.value) == "The optimizers are for ['hihg', 'low'], and the task's players are ['high', 'low']."


def test_learning_rate_metric():
    """That of the update that the step makes."""
    optimizer = dataclasses.replace(DESCENT, schedule=Linear(warmup=2))
    _, metrics = run(program(Toy(), optimizer, steps=6), [{"x": VALUES}] * 6)
    expected = [0.1 / 3, 0.2 / 3, 0.1, 0.075, 0.05, 0.025]
    np.testing.assert_allclose([m["learning_rate"] for m in metrics], expected, rtol=1e-5)


# ---- state, teacher, frozen ----


@dataclasses.dataclass(frozen=True)
class RunningMean(Toy):
    """Learns the distance to the mean of all that it has seen."""

    def init(self, key):
        return super().init(key)[0], {"sum": jnp.float32(0), "count": jnp.float32(0)}

    def loss(self, params, batch, context):
        total = context.state["sum"] + batch["x"].sum()
        count = context.state["count"] + batch["x"].shape[0]
        return dataclasses.replace(
            super().loss(params, batch, context), state={"sum": total, "count": count},
            metrics={"x": (batch["x"].sum(), jnp.float32(batch["x"].shape[0]))},
        )  # fmt: skip


@pytest.mark.parametrize("microbatches", [1, 4])
def test_state_without_gradient(microbatches):
    """Each example counts once, whatever the microbatches."""
    states, metrics = run(program(RunningMean(), microbatches=microbatches), [{"x": VALUES}, {"x": 3 * VALUES}])
    assert states[1].state == {"sum": 28.0, "count": 8.0} and states[2].state == {"sum": 112.0, "count": 16.0}
    assert metrics[1]["x"] == 10.5
    np.testing.assert_allclose(states[1].params["model"]["w"], 3.0 - 0.1 * 2 * (3.0 - 3.5), rtol=1e-6)


@dataclasses.dataclass(frozen=True)
class Student(Toy):
    """Half of the pull is towards the average of its own past."""

    def loss(self, params, batch, context):
        w, teacher = params["model"]["w"], jax.lax.stop_gradient(context.ema["model"]["w"])
        return mean(jnp.square(w - batch["x"]) + jnp.square(w - teacher))


def test_a_teacher_that_is_the_average_of_the_past():
    states, _ = run(program(Student(), ema=Ema(decay=0.9, warmup=1.0)), [{"x": VALUES}] * 5)
    w = teacher = 3.0
    for state in states[1:]:
        w -= 0.1 * (2 * (w - 3.5) + 2 * (w - teacher))
        teacher = 0.9 * teacher + 0.1 * w
        np.testing.assert_allclose(state.params["model"]["w"], w, rtol=1e-6)
        np.testing.assert_allclose(state.ema["model"]["w"], teacher, rtol=1e-6)


@dataclasses.dataclass(frozen=True)
class Layers(Toy):
    def init(self, key):
        layer = {"kernel": jnp.full((4,), 0.5), "bias": jnp.ones((4,))}
        return {"model": {"base": layer, "head": layer}}, {}

    def loss(self, params, batch, context):
        base, head = params["model"]["base"], params["model"]["head"]
        out = (batch["x"][:, None] * base["kernel"] + base["bias"]) * head["kernel"] + head["bias"]
        return mean(jnp.square(out).sum(-1))


@pytest.mark.parametrize("microbatches", [1, 2])
def test_frozen_parameters(microbatches):
    """No gradient (of the norm too), no optimizer state, and not a bit of change."""
    optimizer = AdamW(learning_rate=0.1, schedule=Constant(), freeze=("base", "head/bias"))
    states, metrics = run(program(Layers(), optimizer, microbatches=microbatches), [{"x": VALUES}] * 2)
    names = {"/".join(k.key for k in path) for path, _ in jax.tree_util.tree_leaves_with_path(states[0].params)}
    assert names == {"model/head/kernel"}
    assert len(jax.tree.leaves(states[0].frozen)) == 3
    assert sum(np.size(x) for x in jax.tree.leaves(states[0].optimizer)) == 2 * 4 + 2  # two moments, two counts
    jax.tree.map(np.testing.assert_array_equal, states[0].frozen, states[2].frozen)
    assert (states[0].params["model"]["head"]["kernel"] != states[2].params["model"]["head"]["kernel"]).all()
    h = 0.5 * np.arange(8.0) + 1  # d/dk (h k + 1)^2 = 2 h (h k + 1), four times
    np.testing.assert_allclose(metrics[0]["gradient_norm"], np.sqrt(4) * np.mean(2 * h * (0.5 * h + 1)), rtol=1e-5)


# ---- microbatches and meshes ----


@dataclasses.dataclass(frozen=True)
class Draws(Toy):
    """Keeps what each example drew from its own key."""

    def init(self, key):
        return super().init(key)[0], {"draws": jnp.zeros(8)}

    def loss(self, params, batch, context):
        draws = jax.vmap(jax.random.uniform)(context.keys())
        state = {"draws": context.state["draws"].at[context.index].set(draws)}
        return mean(jnp.square(params["model"]["w"] - batch["x"] * draws), state=state)


def test_examples_draw_the_same_on_any_mesh_and_microbatches():
    states, _ = run(program(Draws()), [{"x": VALUES}] * 2)
    first, second = states[1].state["draws"], states[2].state["draws"]
    assert len({*first.tolist(), *second.tolist()}) == 16  # each its own, in each step
    for devices, microbatches in ((1, 4), (8, 1), (4, 2)):
        other, _ = run(program(Draws(), devices=devices, microbatches=microbatches), [{"x": VALUES}] * 2)
        np.testing.assert_array_equal(other[1].state["draws"], first)
        np.testing.assert_array_equal(other[2].state["draws"], second)
        np.testing.assert_allclose(other[2].params["model"]["w"], states[2].params["model"]["w"], rtol=1e-6)


@dataclasses.dataclass(frozen=True)
class Weighted(Toy):
    def loss(self, params, batch, context):
        error, weight = jnp.square(params["model"]["w"] - batch["x"]), batch["weight"]
        total = jnp.sum(weight)
        return Loss(jnp.sum(error * weight), total, None, {"x": (jnp.sum(batch["x"] * weight), total)})


def test_microbatches_are_the_large_batch_with_uneven_weights():
    """As packed documents make them: the mean is over all weights, and a microbatch may have none."""
    batch = {"x": VALUES, "weight": jnp.array([8.0, 1, 0, 2, 5, 1, 0, 3])}  # microbatch 2 is examples 2 and 6
    for microbatches in (1, 4):
        states, metrics = run(program(Weighted(), batch=batch, microbatches=microbatches), [batch])
        centre, loss = (np.average(x, weights=batch["weight"]) for x in (VALUES, (3 - VALUES) ** 2))
        np.testing.assert_allclose(states[1].params["model"]["w"], 3.0 - 0.1 * 2 * (3.0 - centre), rtol=1e-6)
        np.testing.assert_allclose(metrics[0]["gradient_norm"], abs(2 * (3.0 - centre)), rtol=1e-5)
        np.testing.assert_allclose(metrics[0]["loss"], loss, rtol=1e-6)
        np.testing.assert_allclose(metrics[0]["x"], centre, rtol=1e-6)


@pytest.mark.parametrize(("options", "words"), [
    ({"microbatches": 3}, "batch_size = 8 is not a multiple of microbatches = 3."),
    ({"microbatches": 2, "devices": 8},
     "batch_size / microbatches = 4 cannot be divided over the 8 shards of the batch that the mesh makes."),
])  # fmt: skip
def test_batches_that_do_not_divide(options, words):
    with pytest.raises(UserError) as caught:
        program(Toy(), **options)
    assert str(caught.value) == words


# ---- what is not finite ----


@dataclasses.dataclass(frozen=True)
class Root(RunningMean):
    """sqrt(w^2 x): at x = 0 the loss is 0 and its gradient is not finite."""

    def loss(self, params, batch, context):
        loss = super().loss(params, batch, context)
        return loss.replace(sum=jnp.sum(jnp.sqrt(jnp.square(params["model"]["w"]) * batch["x"])))


@pytest.mark.parametrize("microbatches", [1, 4])
def test_an_update_that_is_not_finite_is_left_out(microbatches):
    good, bad_loss, bad_gradient = VALUES + 1, (VALUES + 1).at[3].set(jnp.inf), VALUES
    optimizer = AdamW(learning_rate=0.1, schedule=Constant())
    batches = [{"x": x} for x in (good, bad_loss, bad_gradient, good, bad_loss)]
    states, metrics = run(program(Root(), optimizer, microbatches=microbatches), batches)
    assert [s.skipped.tolist() for s in states] == [[0, 0], [0, 0], [1, 1], [2, 2], [2, 0], [3, 1]]
    assert metrics[3]["skipped"] == 2 and metrics[2]["skipped_in_a_row"] == 2
    assert np.isinf(metrics[1]["loss"]) and np.isfinite(metrics[2]["loss"])
    for before, after, kept in zip(states, states[1:], (False, True, True, False, True), strict=False):
        parts = [(s.params, s.state, s.optimizer) for s in (before, after)]
        same = jax.tree.leaves(jax.tree.map(np.array_equal, *parts))
        assert all(same) if kept else not any(same)
        assert after.step == before.step + 1


@dataclasses.dataclass(frozen=True)
class OneFails(MinMax):
    def players(self):
        first, second = super().players()
        return first, dataclasses.replace(second, loss=lambda p, b, c: mean(p["b"] * b["x"] * jnp.nan))


def test_one_player_that_fails_for_good_is_noticed():
    """The other's good updates do not hide it."""
    states, _ = run(program(OneFails()), [{"x": VALUES}] * 3)
    assert states[3].skipped.tolist() == [3, 3]
    assert states[3].params["b"] == 2.0 and states[3].params["a"] != 1.0


# ---- a step of a task's own ----


@dataclasses.dataclass(frozen=True)
class Twice(Toy):
    """Takes the gradient step twice, as an adaptive weight would."""

    def step(self, train_state: Any, batch, update):
        for player in self.players():
            train_state, _ = update(train_state, batch, player)
            train_state, metrics = update(train_state, batch, player)
        return train_state, metrics | {"own": train_state.params["model"]["w"]}


def test_a_step_of_its_own():
    states, metrics = run(program(Twice()), [{"x": VALUES}])
    w = 3.5 + (3.0 - 3.5) * 0.8**2
    np.testing.assert_allclose([states[1].params["model"]["w"], metrics[0]["own"]], w, rtol=1e-6)
    assert states[1].step == 1
