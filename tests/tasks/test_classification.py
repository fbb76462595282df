"""The classification task: its loss, batch statistics of the whole batch, and mixtures of examples."""

import dataclasses
import functools
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import jit

from jaxgen.errors import UserError
from jaxgen.models.resnet import ResNet
from jaxgen.models.vit import ViT
from jaxgen.sharding import RULES, Mesh, Sharding, unbox
from jaxgen.tasks.base import Context, batch_shardings
from jaxgen.tasks.classification import Classification
from jaxgen.tasks.mixing import CutMix, Mixup
from jaxgen.training.optimizers import SGD
from jaxgen.training.schedules import Constant
from jaxgen.training.step import Program

B, K = 16, 5
TASK = Classification(
    ViT(patch=4, width=16, depth=1, heads=2, image_size=8, out=K, channels=1, kernel="xla"), label_smoothing=0.1
)
WEIGHTS = (np.arange(B) < 11).astype(np.float32)


def batch_of(channels=1):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (B, 8, 8, channels)).astype(np.uint8)
    return {"image": image, "label": rng.integers(0, K, B).astype(np.int32)}


def spec_of(batch):
    return {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in batch.items()}


def context(train, state=None):
    key = jax.random.key(0)
    return Context(key, key, jnp.int32(0), jnp.arange(B), state or {}, None, train)


@functools.cache
def start(task):
    """(parameters that tell classes apart, state)."""
    params, state = jit(lambda key: unbox(task.init(key)))(jax.random.key(0))
    return jax.tree.map(lambda p: p + 0.3 * jax.random.normal(jax.random.key(p.size), p.shape), params), state


# ---- the loss ----


def test_loss_of_the_logits():
    """In float64: smoothed in training alone, weighted in measuring, and the same of probabilities as of labels."""
    params, batch = start(TASK)[0], batch_of()
    pixels = jnp.asarray(batch["image"] / 127.5 - 1, jnp.float32)
    logits = np.asarray(jit(TASK.model.apply)({"params": params["model"]}, pixels), np.float64)
    np.testing.assert_allclose(jit(TASK.logits)(params, {}, batch), logits, atol=1e-5)
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    hot = np.eye(K)[batch["label"]]
    right = logits.argmax(1) == batch["label"]
    run = jit(TASK.loss)
    smooth = 0.9 * hot + 0.1 / K
    cases = [
        (batch, True, -(smooth * log_p).sum(1), np.ones(B)),
        (batch, False, -(hot * log_p).sum(1), np.ones(B)),
        (batch | {"weights": WEIGHTS}, False, -(hot * log_p).sum(1), WEIGHTS),
    ]
    soft = np.random.default_rng(1).dirichlet(np.ones(K), B).astype(np.float32)
    cases.append(({"image": batch["image"], "soft": soft}, True, -((0.9 * soft + 0.1 / K) * log_p).sum(1), np.ones(B)))
    for given, train, nats, weights in cases:
        found = run(params, given, context(train))
        np.testing.assert_allclose([found.sum, found.weight], [nats @ weights, weights.sum()], rtol=1e-5)
        expected = logits.argmax(1) == given["soft"].argmax(1) if "soft" in given else right
        total, weight = found.metrics["accuracy"]
        np.testing.assert_allclose([total, weight], [expected @ weights, weights.sum()])
        assert found.state is None


def test_features():
    found = jit(TASK.embed_images)(start(TASK)[0], batch_of())
    assert found.shape == (B, 16) and found.dtype == jnp.float32


# ---- batch statistics ----


class Normed(nn.Module):
    """Two layers and batch norm."""

    out: int = K
    channels: int = 1
    image_size: int = 8

    @nn.compact
    def __call__(self, image, key=None, train=False):
        x = nn.Dense(12)(image.reshape(image.shape[0], -1))
        return nn.Dense(self.out)(jnp.sin(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)))

    def check(self):
        pass


def step(task, mesh=None, devices=1, steps=2, **options):
    """(state, loss of the last step) after some steps."""
    sharding = Sharding((mesh or Mesh()).build(jax.devices()[:devices]), RULES)
    optimizer = SGD(learning_rate=0.1, schedule=Constant(), momentum=0.0)
    p = Program(task, optimizer, sharding, spec_of(batch_of()), 10, **options)
    state, batch = p.init(0), jax.device_put(batch_of(), p.batch_shardings)
    for _ in range(steps):
        state, metrics = p.step(state, batch)
    return jax.device_get((state, metrics["loss"]))


def test_batch_statistics_are_the_whole_batchs():
    """On 8 devices they, the loss and the parameters are one device's, and NumPy's."""
    task = Classification(Normed())
    one, many = step(task), step(task, Mesh(data=4, fsdp=2), 8)
    np.testing.assert_allclose(many[1], one[1], rtol=1e-5)
    for part in ("params", "state"):
        trees = getattr(many[0], part), getattr(one[0], part)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *trees)

    params, state = start(task)
    new = jit(task.loss)(params, batch_of(), context(True, state)).state["model"]["batch_stats"]["BatchNorm_0"]
    dense = params["model"]["Dense_0"]
    pixels = (batch_of()["image"] / 127.5 - 1).reshape(B, -1)
    hidden = pixels @ np.asarray(dense["kernel"], np.float64) + np.asarray(dense["bias"], np.float64)
    np.testing.assert_allclose(new["mean"], 0.1 * hidden.mean(0), atol=1e-5)
    np.testing.assert_allclose(new["var"], 0.9 + 0.1 * hidden.var(0), rtol=1e-5)


def test_measuring_uses_the_running_statistics():
    task = Classification(Normed())
    params, state = start(task)
    run = jit(task.loss)
    moved = run(params, batch_of(), context(True, state)).state
    found = [run(params, batch_of(), context(False, s)) for s in (state, moved)]
    assert found[0].state is None is found[1].state
    assert abs(found[0].sum - found[1].sum) > 1e-3
    one = {k: v[3:4] for k, v in batch_of().items()}
    both = task.logits(params, moved, one), task.logits(params, moved, batch_of())[3:4]
    np.testing.assert_allclose(*both, atol=1e-5)


def test_resnet():
    """Its statistics are the state, and colour and grey pictures are taken."""
    model = ResNet(depth=18, width=8, out=K, small=True, channels=1)
    for task, names in (
        (Classification(model), {"model"}),
        (Classification(model.clone(form="bit", groups=4, channels=3)), set()),
    ):
        batch = batch_of(task.model.channels)
        task.check(spec_of(batch))
        params, state = jax.eval_shape(lambda key, t=task: unbox(t.init(key)), jax.random.key(0))
        assert set(state) == names
        loss = jax.eval_shape(task.loss, params, spec_of(batch), context(True, state))
        assert jax.tree.structure(loss.state) == jax.tree.structure(state or None)
        features = jax.eval_shape(task.embed_images, params, spec_of(batch), state)
        assert features.shape == (B, task.model.feature_width)
        assert task.flops(spec_of(batch)) == 3 * B * task.model.flops_per_example(batch["image"].shape[1:])
        assert task.notes(spec_of(batch)) == {}


# ---- mixtures ----

KEY = jax.random.key(7)


def mixed(mix, mesh=None, devices=1):
    task = dataclasses.replace(TASK, mix=mix)
    sharding = Sharding((mesh or Mesh()).build(jax.devices()[:devices]), RULES)
    layout = batch_shardings(task, sharding, spec_of(batch_of()))
    found = task.collect(None, jax.device_put(batch_of(), layout), KEY)
    spec = task.collected(spec_of(batch_of()))
    assert {k: (v.shape, v.dtype) for k, v in found.items()} == {k: (s.shape, s.dtype) for k, s in spec.items()}
    return jax.device_get(found)


def shares(soft, label):
    """The share of each example that stays, where its partner is of another class; else nan."""
    other = label[::-1] != label
    np.testing.assert_allclose(soft.sum(1), 1, rtol=1e-6)
    np.testing.assert_allclose((soft > 0).sum(1), np.where(other, 2, 1))
    return np.where(other, soft[np.arange(B), label], np.nan)


def test_mixup():
    batch, found = batch_of(), mixed(Mixup(alpha=1.0))
    stays = shares(found["soft"], batch["label"])
    known = np.isfinite(stays)
    one, other = batch["image"].astype(np.float64), batch["image"][::-1].astype(np.float64)
    share = stays[:, None, None, None]
    expected = share * one + (1 - share) * other
    assert np.abs(found["image"][known] - expected[known]).max() <= 0.5 + 1e-3
    assert len(set(stays[known].round(4))) == known.sum() > 5  # a draw for each example


def test_cutmix():
    batch, found = batch_of(), mixed(CutMix())
    stays = shares(found["soft"], batch["label"])
    one, other = batch["image"], batch["image"][::-1]
    replaced = ((found["image"] != one) | (one == other)).all(-1)
    for i in np.flatnonzero(np.isfinite(stays)):
        rows, columns = np.nonzero((found["image"][i] != one[i]).any(-1))
        box = np.zeros((8, 8), bool)
        if len(rows):
            box[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1] = True
        np.testing.assert_array_equal(found["image"][i], np.where(box[..., None], other[i], one[i]))
        assert replaced[i][box].all()
        assert stays[i] == pytest.approx(1 - box.mean(), abs=2 / 64)  # pixels that are equal by chance
    assert len(set(stays[np.isfinite(stays)])) > 3


@pytest.mark.parametrize("mix", [Mixup(), CutMix()], ids=["mixup", "cutmix"])
def test_mixtures_are_the_same_on_a_mesh(mix):
    for one, many in zip(mixed(mix).values(), mixed(mix, Mesh(data=4, fsdp=2), 8).values(), strict=True):
        np.testing.assert_allclose(one.astype(np.float32), many, atol=1e-5)


def test_shares_are_of_the_beta_distribution():
    keys = jax.random.split(KEY, 4000)
    image = jnp.zeros((8, 8, 1), jnp.uint8)
    stays = np.asarray(jax.vmap(lambda k: Mixup(alpha=0.2).mix(image, image, k)[1])(keys))
    assert stays.mean() == pytest.approx(0.5, abs=0.03)
    assert stays.var() == pytest.approx(0.25 / 1.4, abs=0.01)  # of Beta(a, a): 1 / 4 (2 a + 1)


def test_trains_on_mixtures():
    task = dataclasses.replace(TASK, mix=Mixup())
    sharding = Sharding(Mesh(data=8).build(), RULES)
    p = Program(task, SGD(learning_rate=0.1, schedule=Constant()), sharding, spec_of(batch_of()), 60)
    state, batch = p.init(0), jax.device_put(batch_of(), p.batch_shardings)
    for i in range(60):
        made = task.collect(state, batch, jax.random.fold_in(KEY, i))
        state, metrics = p.step(state, jax.device_put(made, p.collected_shardings))
        jax.block_until_ready(metrics)  # many programs at once block each other on simulated devices
    params = jax.tree.map(jnp.asarray, jax.device_get(state.params))
    found = jit(TASK.loss)(params, batch_of(), context(False))
    assert found.metrics["accuracy"][0] == B and metrics["loss"] < 1.5


# ---- what is said and refused ----


@pytest.mark.parametrize(
    ("changes", "names", "message"),
    [
        ({"label_smoothing": 1.0}, (), "task.label_smoothing is at least 0 and below 1, not 1.0."),
        ({"model": TASK.model.clone(channels=3)}, (), "pictures have 1 channels and task.model.channels is 3."),
        ({"mean": (0.1, 0.2, 0.3)}, (), "task.mean has 3 numbers, which should be 1: the pictures have 1 channel."),
        ({}, ("label",), "The data has image, and the task needs label (or soft)."),
        ({"mix": Mixup()}, ("image",), "The data has label, and the task needs image (or patches)."),
    ],
)
def test_what_does_not_fit(changes, names, message):
    spec = {k: v for k, v in spec_of(batch_of()).items() if k not in names}
    with pytest.raises(UserError) as caught:
        dataclasses.replace(TASK, **changes).check(spec)
    assert message in str(caught.value)


def test_features_alone():
    """A model without a head is measured on its features; it has no loss and no logits."""
    task = dataclasses.replace(TASK, model=TASK.model.clone(out=0))
    task.check(spec_of(batch_of()))
    task.check_data(SimpleNamespace(classes=tuple("abcde")))
    params, _ = jax.eval_shape(lambda key: unbox(task.init(key)), jax.random.key(0))
    assert jax.eval_shape(task.embed_images, params, spec_of(batch_of())).shape == (B, 16)
    TASK.check_training(spec_of(batch_of()))
    for refused in (
        lambda: task.check_training(spec_of(batch_of())),
        lambda: jax.eval_shape(task.logits, params, {}, spec_of(batch_of())),
        lambda: jax.eval_shape(task.loss, params, spec_of(batch_of()), context(True)),
    ):
        with pytest.raises(UserError, match="task.model.out is 0, which should be the number of classes"):
            refused()


def test_what_else_does_not_fit():
    soft = {"image": batch_of()["image"], "soft": np.zeros((B, 4), np.float32)}
    with pytest.raises(UserError, match="The data has 4 classes and task.model.out is 5; they should be the same."):
        TASK.check(spec_of(soft))
    with pytest.raises(UserError, match="task.mix needs image and label, and the data has image, soft."):
        dataclasses.replace(TASK, mix=CutMix()).check(spec_of(soft | {"soft": np.zeros((B, K), np.float32)}))
    with pytest.raises(UserError, match="The data has 6 classes and task.model.out is 5"):
        TASK.check_data(SimpleNamespace(classes=tuple("abcdef")))
    TASK.check_data(SimpleNamespace(classes=tuple("abcde")))
    with pytest.raises(UserError, match="the alpha of Mixup is above 0, not 0"):
        Mixup(alpha=0)
    patches = {"patches": np.zeros((B, 4, 48), np.uint8), "label": np.zeros(B, np.int32)}
    with pytest.raises(UserError, match="gives patches, which task.model, a ResNet, does not take; a ViT does."):
        Classification(ResNet(out=K)).check(spec_of(patches))


def test_says():
    assert TASK.notes(spec_of(batch_of())) == {"attention": "model xla (asked for)"}
    assert TASK.units(spec_of(batch_of())) == ("examples", B)
