"""Averages by powers of the time: against their closed form, in the step, and others made of what was kept."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.errors import UserError
from jaxgen.sharding import RULES, Mesh, Sharding
from jaxgen.tasks.base import Loss, Task
from jaxgen.training.ema import LARGEST_STD, PowerEma, combination, combined, gamma_of, std_of
from jaxgen.training.optimizers import SGD
from jaxgen.training.schedules import Constant
from jaxgen.training.step import Program


@pytest.mark.parametrize(("std", "gamma"), [(0.05, 16.97), (0.1, 6.94), (LARGEST_STD, 0.0)])
def test_widths_and_powers(std, gamma):
    """The two that the paper keeps, and the average in which all count alike."""
    assert gamma_of(std) == pytest.approx(gamma, abs=5e-3)
    assert std_of(gamma_of(std)) == pytest.approx(std, rel=1e-6)
    tau = (np.arange(200_000) + 0.5) / 200_000
    share = tau ** gamma_of(std) / (tau ** gamma_of(std)).sum()
    mean = share @ tau
    assert np.sqrt(share @ (tau - mean) ** 2) == pytest.approx(std, rel=1e-4)


def profile(gamma, steps):
    """What the parameters after each of so many steps weigh, in float64, by the update itself."""
    share = np.zeros(steps)
    for t in range(1, steps + 1):
        beta = (1 - 1 / t) ** (gamma + 1)
        share *= beta
        share[t - 1] = 1 - beta
    return share


def run(ema, values):
    """The averages after each value of two parameters, of which one is a whole number."""
    average = ema.init({"w": jnp.full(2, 99.0), "n": jnp.zeros((), jnp.int32), "hole": None})
    update, seen = jax.jit(ema.update), []
    for step, value in enumerate(values):
        params = {"w": jnp.asarray([value, 1.0], jnp.bfloat16 if step < 0 else jnp.float32), "n": step, "hole": None}
        average = update(average, params, step)
        seen.append(jax.device_get(average))
    return seen


def test_the_update_has_the_closed_form():
    """Steps weigh nearly as powers of the time, and what was before the first is forgotten."""
    values = np.sin(np.arange(40.0)) + np.arange(40) / 10
    ema = PowerEma((0.1, 0.2))
    seen = run(ema, values)
    for i, std in enumerate(ema.stds):
        expected = [profile(gamma_of(std), n + 1) @ values[: n + 1] for n in range(40)]
        np.testing.assert_allclose([s[i]["w"][0] for s in seen], expected, rtol=1e-5)
        np.testing.assert_allclose([s[i]["w"][1] for s in seen], 1, rtol=1e-5)
    assert seen[-1][0]["n"] == 39 and seen[-1][0]["hole"] is None
    np.testing.assert_array_equal(ema.weights(seen[-1])["w"], seen[-1][0]["w"])
    power, exact = np.arange(1.0, 1001) ** 6.94, profile(6.94, 1000)
    np.testing.assert_allclose(exact[500:], power[500:] / power.sum(), rtol=0.02)


def test_a_late_step_keeps_its_rate_in_float32():
    ema = PowerEma((0.1,))
    (after,) = ema.update(({"w": jnp.zeros(())},), {"w": jnp.ones(())}, 2_000_000)
    np.testing.assert_allclose(after["w"], (gamma_of(0.1) + 1) / 2_000_001, rtol=1e-5)


STEPS, EVERY = 2000, 100


@pytest.fixture(scope="module")
def snapshots():
    """A wandering parameter that also drifts, and its averages every 100 steps, in float32 as a run keeps them."""
    random = np.random.default_rng(0)
    values = 3 + np.cumsum(random.normal(size=(STEPS, 50)), 0) / 10 + np.linspace(0, 4, STEPS)[:, None] ** 0.5
    kept, running = [], {}
    for std in (0.05, 0.1):
        gamma, average = gamma_of(std), np.zeros(50)
        for t in range(1, STEPS + 1):
            beta = (1 - 1 / t) ** (gamma + 1)
            average = beta * average + (1 - beta) * values[t - 1]
            if t % EVERY == 0:
                running[t, std] = np.float32(average)
    for t in range(EVERY, STEPS + 1, EVERY):
        kept += [(t, std, running[t, std]) for std in (0.05, 0.1)]
    return values, kept


@pytest.mark.parametrize("std", [0.05, 0.07, 0.15, 0.2])
@pytest.mark.parametrize("step", [2000, 1500])
def test_other_averages_from_snapshots(snapshots, std, step):
    """Known averages, made of two others that were kept, to less than 1 % (of the parameter's own spread)."""
    values, kept = snapshots
    kept = [one for one in kept if one[0] <= step]
    weights, error = combination([n for n, _, _ in kept], [s for _, s, _ in kept], step, std)
    assert weights.dtype == np.float64 and weights.sum() == pytest.approx(1, abs=0.01) and error < 0.05
    found = combined([{"w": w} for _, _, w in kept], weights)["w"]
    expected = profile(gamma_of(std), step) @ values[:step]
    assert np.abs(found - expected).max() < 0.01 * values[:step].std()
    assert np.linalg.norm(found - expected) < 0.01 * np.linalg.norm(expected)
    if std != 0.05:
        assert np.abs(kept[-2][2] - expected).max() > 0.05 * values[:step].std(), "it is not what was kept"


def test_what_is_kept_is_found_again():
    weights, error = combination([100, 200, 200], [0.1, 0.05, 0.1], 200, 0.1)
    np.testing.assert_allclose(weights, [0, 0, 1], atol=1e-6)
    assert error < 1e-5
    for wanted in (0.02, 0.15, 0.25):   # far off what is kept, too
        weights, _ = combination([1400, 1500] * 2, [0.05, 0.05, 0.1, 0.1], 1500, wanted)
        assert weights.sum() == pytest.approx(1, abs=1e-6)
    _, one = combination([200, 200], [0.05, 0.1], 200, 0.25)
    _, more = combination([n for n in range(10, 201, 10) for _ in range(2)], [0.05, 0.1] * 20, 200, 0.25)
    assert one > 0.5 > 0.1 > more, "more snapshots make it nearer"


def test_whole_numbers_are_the_last_ones():
    found = combined([{"n": np.array([1]), "w": np.ones(1)}, {"n": np.array([5]), "w": np.ones(1)}], [0.25, 0.5])
    assert found["n"] == [5] and found["w"] == [0.75]


# ---- in the step ----


@dataclasses.dataclass(frozen=True)
class Toy(Task):
    """(w - x)^2, with the first average's w beside."""

    def init(self, key):
        import flax.linen as nn

        w = nn.with_logical_partitioning(nn.initializers.normal(1.0), ("embed", None))(key, (8, 2))
        return {"model": {"w": w}}, {}

    def loss(self, params, batch, context):
        error = jnp.square(params["model"]["w"].mean() - batch["x"]) + 0 * context.ema["model"]["w"].sum()
        return Loss(error.sum(), jnp.float32(error.shape[0]))


@pytest.mark.parametrize("mesh", [Mesh(), Mesh(data=2, fsdp=4)], ids=["data", "fsdp"])
def test_in_the_step(mesh):
    """Averages are laid out as the parameters, and follow them."""
    batch = {"x": jnp.arange(8.0)}
    spec = {"x": jax.ShapeDtypeStruct((8,), jnp.float32)}
    optimizer = SGD(learning_rate=0.2, schedule=Constant(), momentum=0.0)
    ema = PowerEma((0.1, 0.25))
    program = Program(Toy(), optimizer, Sharding(mesh.build(), RULES), spec, 5, ema=ema)
    state = program.init(0)
    for average in state.ema:
        assert average["model"]["w"].sharding.is_equivalent_to(state.params["model"]["w"].sharding, 2)
    assert state.ema[1]["model"]["w"].is_fully_replicated == (mesh.fsdp == 1)
    seen = []
    for _ in range(5):
        state, _ = program.step(state, jax.device_put(batch, program.batch_shardings))
        seen.append(np.asarray(state.params["model"]["w"]))
    for std, average in zip(ema.stds, state.ema, strict=True):
        expected = np.tensordot(profile(gamma_of(std), 5), np.stack(seen), 1)
        np.testing.assert_allclose(average["model"]["w"], expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("stds", "words"),
    [
        ((), "at least one"),
        ((0.05, 0.0), "above 0 and at most 0.2887, not 0.0"),
        ((0.3,), "above 0 and at most 0.2887, not 0.3"),
        ((0.1, 0.1), "each another, not"),
    ],
)
def test_bad_fields_are_told(stds, words):
    with pytest.raises(UserError, match=words):
        PowerEma(stds)
