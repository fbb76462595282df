"""The diffusion task: its loss, what is dropped, learned variance, likelihood, and the mesh."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import jit

from jaxgen.diffusion.paths import Cosine, Flow, Linear, Table
from jaxgen.diffusion.predictions import X0, Edm, Epsilon, V, Velocity
from jaxgen.diffusion.weightings import MinSnr, Uniform, UniformTimes, uniforms
from jaxgen.errors import UserError
from jaxgen.models.conditions import Conditions
from jaxgen.models.dit import DiT
from jaxgen.models.mlp import MLP
from jaxgen.models.text import TextTower
from jaxgen.sampling.diffusion import Sampling, keys_of
from jaxgen.sampling.solvers import Ddim, Ddpm
from jaxgen.sharding import RULES, Mesh, Sharding, unbox
from jaxgen.tasks.base import Context
from jaxgen.tasks.diffusion import Diffusion, emptied, variational_bound
from jaxgen.training.optimizers import SGD
from jaxgen.training.schedules import Constant
from jaxgen.training.step import Program

B = 16
NET = DiT(out=1, patch=4, width=16, depth=1, heads=2, classes=3, periods=16, kernel="xla")
TASK = Diffusion(NET)
TEXT = Diffusion(
    NET.clone(classes=0, text=8, pooled=8),
    text=TextTower(vocab_size=20, width=8, depth=1, heads=2, max_length=6, out=8, kernel="xla"),
)


class Constantly(nn.Module):
    """Gives the same number for each channel, whatever it is given."""

    out: int = 1
    classes: int = 0

    @nn.compact
    def __call__(self, x, label, conditions=Conditions(), key=None):
        value = self.param("value", nn.initializers.constant(0.3), (self.out,))
        return jnp.broadcast_to(value, (*x.shape[:-1], self.out))

    def flops_per_example(self, shape, length=0):
        return 0.0


def batch_of(text=False, size=B):
    rng = np.random.default_rng(0)
    batch = {"image": rng.integers(0, 256, (size, 8, 8, 1)).astype(np.uint8)}
    if text:
        lengths = rng.integers(2, 7, size).astype(np.int32)
        tokens = rng.integers(2, 20, (size, 6)).astype(np.int32)
        return batch | {"tokens": np.where(np.arange(6) < lengths[:, None] - 1, tokens, 1), "lengths": lengths}
    return batch | {"label": rng.integers(0, 3, size).astype(np.int32)}


def context(train=True, size=B, seed=0):
    key = jax.random.key(seed)
    return Context(key, key, jnp.int32(0), jnp.arange(size), {}, None, train, size)


@functools.cache
def start(task):
    """Parameters of which every part counts."""
    params = jit(lambda key: unbox(task.init(key)))(jax.random.key(0))[0]
    return jax.tree.map(lambda p: p + 0.2 * jax.random.normal(jax.random.key(p.size), p.shape), params)


# ---- the loss ----


@pytest.mark.parametrize("path", [Linear(), Flow()], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("prediction", [Epsilon(), V(), X0(), Velocity()], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("weighting", [Uniform(), MinSnr(2.0)], ids=lambda p: type(p).__name__)
def test_loss(path, prediction, weighting):
    """In float64, of a network that always gives 0.3; the draws are the task's own."""
    task = Diffusion(Constantly(), path, prediction, weighting, UniformTimes(0.1, 0.9))
    batch, told = batch_of(), context()
    loss = jit(task.loss)({"network": {"value": jnp.array([0.3])}}, batch, told)
    t = np.asarray(0.1 + 0.8 * uniforms(jax.random.fold_in(told.step_key, 1), told.index, B), np.float64)
    keys = jax.vmap(lambda key: jax.random.split(key, 3))(told.keys())[:, 0]
    noise = np.asarray(jax.vmap(lambda key: jax.random.normal(key, (8, 8, 1)))(keys), np.float64)
    x0 = batch["image"] / 127.5 - 1.0
    at = jnp.asarray(t, jnp.float32)
    a, s = (np.asarray(f(at), np.float64)[:, None, None, None] for f in (path.alpha, path.sigma))
    target = {"Epsilon": noise, "V": a * noise - s * x0, "X0": x0, "Velocity": noise - x0}[type(prediction).__name__]
    error = ((0.3 - target) ** 2).mean((1, 2, 3))
    snr, a, s = ((a / s) ** 2).ravel(), a.ravel(), s.ravel()
    out = {"Epsilon": s / a, "V": s / (a**2 + s**2), "X0": 1, "Velocity": s / (a + s)}[type(prediction).__name__]
    weights = 1 if isinstance(weighting, Uniform) else np.minimum(snr, 2) * out**2
    np.testing.assert_allclose(loss.sum, (weights * error).sum(), rtol=2e-4)
    assert loss.weight == B
    np.testing.assert_allclose(loss.metrics["error"][0], error.sum(), rtol=2e-4)
    part = jit(task.loss)({"network": {"value": jnp.array([0.3])}}, batch | {"weights": np.eye(B)[3]}, told)
    np.testing.assert_allclose(part.sum, (weights * error)[3] if weighting != Uniform() else error[3], rtol=2e-4)


def test_times_are_spread_evenly():
    key, index = jax.random.key(3), jnp.arange(40)
    u = np.sort(uniforms(key, index, 40))
    assert ((u * 40).astype(int) == np.arange(40)).all()
    parts = np.concatenate([uniforms(key, index[a::4], 40) for a in range(4)])
    np.testing.assert_allclose(np.sort(parts), u)
    assert abs(np.mean([uniforms(jax.random.key(s), jnp.arange(1), 1)[0] for s in range(300)]) - 0.5) < 0.06


def test_what_is_dropped():
    """The share of examples, by example's key; in measuring none."""
    seen = []

    class Spy(Constantly):
        @nn.compact
        def __call__(self, x, label, conditions=Conditions(), key=None):
            seen.append(conditions.classes)
            return jnp.zeros_like(x)

    size, batch = 2000, batch_of(size=2000)
    for drop, train, low, high in ((0.3, True, 0.27, 0.33), (0.0, True, 0, 0), (0.3, False, 0, 0)):
        Diffusion(Spy(classes=3), drop=drop).loss({"network": {}}, batch, context(train, size))
        none = np.asarray(seen[-1]) == 3
        assert low <= none.mean() <= high
        np.testing.assert_array_equal(seen[-1][~none], batch["label"][~none])


def test_an_empty_caption():
    tokens, lengths = jnp.array([[5, 6, 7, 1, 1], [8, 9, 1, 1, 1]]), jnp.array([4, 3])
    found = emptied(tokens, lengths)
    np.testing.assert_array_equal(found[0], np.ones((2, 5)))
    np.testing.assert_array_equal(found[1], [1, 1])
    np.testing.assert_array_equal(emptied(tokens, lengths, 1)[0], [[5, 1, 1, 1, 1], [8, 1, 1, 1, 1]])
    params = start(TEXT)
    batch = batch_of(text=True)
    told = jit(TEXT.condition)(params, batch, jnp.arange(B) % 2 == 0)
    empty = jit(TEXT.condition)(params, {"tokens": np.ones((B, 6), np.int32), "lengths": np.ones(B, np.int32)})
    for found, none in ((told.tokens, empty.tokens), (told.pooled, empty.pooled), (told.mask, empty.mask)):
        np.testing.assert_allclose(found[::2], none[::2], atol=1e-6)
    assert not np.allclose(told.pooled[1::2], empty.pooled[1::2])
    np.testing.assert_array_equal(told.mask.sum(1), np.where(np.arange(B) % 2, batch["lengths"], 1))


def test_text_moves_unless_it_is_locked():
    batch = batch_of(text=True)
    for locked in ((), ("text",)):
        task = dataclasses.replace(TEXT, locked=locked)
        program = Program(task, SGD(0.1, schedule=Constant(), momentum=0.0), one_device(), spec_of(batch), 1)
        assert (jax.tree.leaves(program.shapes.params["text"]) == []) == bool(locked)


# ---- the mesh ----


def one_device():
    return Sharding(Mesh(data=1).build(jax.devices()[:1]), RULES)


def spec_of(batch):
    return {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in batch.items()}


@functools.cache
def stepped(mesh, microbatches, text):
    """The parameters after one step, and the loss."""
    task, batch = (TEXT if text else TASK), batch_of(text)
    devices = jax.devices() if mesh else jax.devices()[:1]
    sharding = Sharding(Mesh(**dict(mesh or (("data", 1),))).build(devices), RULES)
    program = Program(
        task, SGD(0.1, schedule=Constant(), momentum=0.0), sharding, spec_of(batch), 1, microbatches
    )
    state = program.init(0)
    given = jax.tree.map(lambda p, s: jax.device_put(np.asarray(p), s.sharding), start(task), state.params)
    state, metrics = program.step(state.replace(params=given), jax.device_put(batch, program.batch_shardings))
    return jax.tree.map(np.asarray, state.params), float(metrics["loss"])


MIXED = (("data", 2), ("fsdp", 2), ("tensor", 2))


@pytest.mark.parametrize(
    ("mesh", "microbatches", "text"),
    [
        pytest.param((("data", 8),), 2, False, marks=pytest.mark.experiments),
        (MIXED, 2, False),
        pytest.param(MIXED, 1, True, marks=pytest.mark.experiments),
    ],
    ids=["data", "classes", "text"],
)
def test_same_step(mesh, microbatches, text):
    params, loss = stepped(None, 1, text)
    found, same = stepped(mesh, microbatches, text)
    np.testing.assert_allclose(same, loss, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), found, params)


# ---- pictures ----


def test_sampling():
    params, batch = start(TASK), batch_of()
    keys = keys_of(0, jnp.arange(B))
    sampling = Sampling(Ddim(), steps=3, guidance=2.0)
    found = TASK.sample(params, {}, batch, keys, sampling)
    assert found.shape == (B, 8, 8, 1) and found.dtype == jnp.uint8
    one = {"label": batch["label"][5:6]}
    alone = TASK.sample(params, {}, one, keys[5:6], dataclasses.replace(sampling, shape=(8, 8, 1)))
    assert np.abs(alone[0].astype(int) - found[5].astype(int)).max() <= 1
    other = {"label": (batch["label"] + 1) % 3}
    assert (TASK.sample(params, {}, batch | other, keys, sampling) != found).any()
    away = TASK.sample(params, {}, batch, keys, sampling, unwanted=other)
    assert (away != found).any()
    none = TASK.sample(params, {}, batch, keys, sampling, unwanted=batch | {"label": np.full(B, 3)})
    np.testing.assert_array_equal(none, found)


class Same(nn.Module):
    """Says the same of every picture."""

    value: float = 1.8
    out: int = 1

    def example(self):
        return jnp.zeros((1, 8, 8, 1))

    @nn.compact
    def __call__(self, x, label, condition, key=None):
        return jnp.full_like(x, self.value) + 0 * self.param("w", nn.initializers.zeros, ())


def test_black_and_white_are_the_tasks_own():
    """(0 - mean) / std and (1 - mean) / std, beyond which nothing is drawn."""
    for std, value, wanted in ((0.25, 1.8, 242), (0.25, 2.5, 255), (0.5, -1.5, 0)):
        task = Diffusion(Same(value), Flow(), X0(), std=(std,))
        params, _ = task.init(jax.random.key(0))
        for threshold in ("auto", "clip"):
            sampling = Sampling(Ddim(), steps=2, threshold=threshold, shape=(8, 8, 1))
            found = task.sample(params, {}, {}, keys_of(0, jnp.arange(2)), sampling)
            assert (found == wanted).all()


def test_edm_begins_with_nothing_of_the_data():
    """On a path whose highest noise level is none."""
    task = Diffusion(NET, Flow(), Edm(), drop=0.1)
    found = task.sample(start(task), {}, batch_of(), keys_of(0, jnp.arange(B)), Sampling(Ddim(), steps=2))
    assert found.std() > 1


def test_guidance_needs_something_to_leave_out():
    task, keys = dataclasses.replace(TASK, drop=0.0), keys_of(0, jnp.arange(B))
    with pytest.raises(UserError, match=r"some were left out \(task.drop\), which this one was not"):
        task.sample(start(TASK), {}, batch_of(), keys, Sampling(Ddim(), steps=2, guidance=2.0))


def test_sampling_on_a_mesh():
    params, batch = start(TASK), batch_of()
    sampling = Sampling(Ddpm(), steps=3, guidance=2.0)
    alone = np.asarray(TASK.sample(params, {}, batch, keys_of(0, jnp.arange(B)), sampling)).astype(int)
    for mesh in (Mesh(data=8), Mesh(data=2, fsdp=2, tensor=2)):
        with Sharding(mesh.build(jax.devices()), RULES).use():
            found = np.asarray(TASK.sample(params, {}, batch, keys_of(0, jnp.arange(B)), sampling)).astype(int)
        assert np.abs(found - alone).max() <= 1


def test_damaged_weights_are_named_with_step_and_time():
    params = jax.tree.map(lambda p: p * jnp.nan, start(TASK))
    with pytest.raises(UserError, match=r"not finite in step 1 of 4 \(time 1.0000\)"):
        TASK.sample(params, {}, batch_of(), keys_of(0, jnp.arange(B)), Sampling(Ddim(), steps=4))


def test_bits_of_unit_noise():
    """A network that knows its data is one Gaussian gives that Gaussian's density."""
    spread = 0.25

    class Gaussian(nn.Module):
        out: int = 1

        @nn.compact
        def __call__(self, x, label, conditions=None, key=None):
            t = (label / 1000)[:, None, None, None]
            a, s = Cosine().alpha(t), Cosine().sigma(t)
            return a * spread**2 / (a**2 * spread**2 + s**2) * x

    task = Diffusion(Gaussian(), Cosine(), X0())
    rng = np.random.default_rng(0)
    image = np.clip(np.round(127.5 + 127.5 * spread * rng.standard_normal((4, 8, 8, 1))), 0, 255).astype(np.uint8)
    found = task.bits_per_dim({"network": {}}, {}, {"image": image}, keys_of(0, jnp.arange(4)), 32, 4)
    uniform = np.asarray(jax.vmap(lambda key: jax.random.uniform(jax.random.split(key)[0], (8, 8, 1)))(
        keys_of(0, jnp.arange(4))))
    x = (image + uniform) / 128 - 1
    log2 = -(x**2) / (2 * spread**2) / np.log(2) - 0.5 * np.log2(2 * np.pi * spread**2)
    np.testing.assert_allclose(found, (-log2 - np.log2(2 / 256)).mean((1, 2, 3)), rtol=0.01)


# ---- a learned variance ----


def test_bound():
    """The divergence of two Gaussians, in float64 from DDPM's own table."""
    betas = np.linspace(1e-4, 0.02, 50)
    path, step = Table(tuple(betas.tolist())), np.array([7, 20, 49])
    rng = np.random.default_rng(0)
    x0, found = rng.uniform(-1, 1, (2, 3, 4, 4, 1))
    v = rng.uniform(-1, 1, (3, 4, 4, 1))
    kept = np.cumprod(1 - betas)
    before, b = kept[step - 1], betas[step]
    before, b, after = (a[:, None, None, None] for a in (before, b, kept[step]))
    small = b * (1 - before) / (1 - after)
    log = (v + 1) / 2 * np.log(b) + (1 - v) / 2 * np.log(small)
    factor = np.sqrt(before) * b / (1 - after)
    nats = 0.5 * (log - np.log(small) - 1 + (small + (factor * (found - x0)) ** 2) / np.exp(log))
    with jax.enable_x64(True):
        t = jnp.asarray((step + 1) / 50)
        bound = variational_bound(path, *map(jnp.asarray, (x0, found, x0, v)), t, 50)
    np.testing.assert_allclose(bound, nats.mean((1, 2, 3)) / np.log(2), rtol=1e-3)


def test_bound_of_the_last_step_is_the_likelihood_of_8_bits():
    """Of all 256 values together the probability is 1."""
    values = (np.arange(256) / 127.5 - 1).reshape(256, 1, 1, 1)
    found, v = np.full_like(values, 0.1), np.full_like(values, 0.2)
    bits = variational_bound(Table.linear(1000, 0.01), *map(jnp.float32, (values, found, values, v)),
                             jnp.full(256, 0.001, jnp.float32), 1000)
    assert abs(float((2.0**-bits).sum()) - 1) < 1e-3


def test_a_variance_is_learned_and_used():
    task = Diffusion(NET.clone(out=2), Table.linear(1000), Epsilon(), learned_variance=True)
    params, batch = start(task), batch_of()

    def loss_of(params):
        loss = task.loss(params, batch, context())
        return loss.sum, loss

    gradient, loss = jit(jax.grad(loss_of, has_aux=True))(params)
    assert float(loss.metrics["bound"][0]) > 0
    head = gradient["network"]["head"]["kernel"].reshape(16, 16, 2)
    assert np.abs(head[..., 1]).max() > 0  # of the variance's half
    sampling = Sampling(Ddpm("learned"), steps=3, threshold="none")
    assert np.isfinite(task.sample(params, {}, batch, keys_of(0, jnp.arange(B)), sampling)).all()


# ---- points, and mistakes ----


def test_points():
    task = Diffusion(MLP(width=16, depth=1), Flow(), Velocity())
    points = np.random.default_rng(0).normal(size=(B, 2)).astype(np.float32)
    task.check({"points": jax.ShapeDtypeStruct((B, 2), np.float32)})
    params = start(task)
    assert np.isfinite(float(jit(task.loss)(params, {"points": points}, context()).sum))
    found = task.sample(params, {}, {"points": points}, keys_of(0, jnp.arange(B)), Sampling(Ddim(), steps=2))
    assert found.shape == (B, 2) and found.dtype == jnp.float32


@pytest.mark.parametrize(
    ("task", "change", "said"),
    [
        (TASK, {"label": None}, "a network with classes needs label"),
        (TASK, {"image": None}, "the task needs image"),
        (TASK, {"image": (B, 8, 8, 3)}, "has 3 channels and task.network.out is 1; it should be 3"),
        (TASK, {"image": (B, 10, 8, 1)}, "10 x 8 is not made of whole patches of 4"),
        (dataclasses.replace(TASK, learned_variance=True), {}, "should be 2, twice as many for task.learned_variance"),
        (dataclasses.replace(TASK, drop=1.0), {}, "task.drop is at least 0 and below 1"),
        (dataclasses.replace(TASK, locked=("text",)), {}, "has no text tower"),
        (TEXT, {"label": None}, "task.text needs tokens and lengths"),
        (dataclasses.replace(TASK, path=Cosine(), prediction=Epsilon()), {}, "leaves nothing of the data at t = 1"),
    ],
)
def test_mistakes(task, change, said):
    spec = spec_of(batch_of())
    for name, shape in change.items():
        spec.pop(name) if shape is None else spec.update({name: jax.ShapeDtypeStruct(shape, np.uint8)})
    with pytest.raises(UserError, match=said):
        task.check(spec)
