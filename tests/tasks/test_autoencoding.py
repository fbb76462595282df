"""The autoencoding task: its loss and gradient, the adaptive weight, who moves when, and the latents' statistics."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import jit

from jaxgen.errors import UserError
from jaxgen.models.autoencoder import Autoencoder, Gaussian
from jaxgen.models.discriminator import Discriminator
from jaxgen.models.perceptual import LPIPS, Features
from jaxgen.models.resnet import ResNet
from jaxgen.models.vit import ViT
from jaxgen.sharding import RULES, Mesh, Sharding, unbox
from jaxgen.tasks.autoencoder import Autoencoding, adaptive_weight, measured, psnr
from jaxgen.tasks.base import Context
from jaxgen.training.optimizers import SGD
from jaxgen.training.schedules import Constant
from jaxgen.training.step import Program

B, SIDE, D = 8, 8, 8 * 8 * 3
MODEL = Autoencoder(width=8, multipliers=(1,), blocks=1, groups=4, latent=2, attention=False)
TOWER = ViT(patch=4, width=8, depth=2, heads=2, image_size=8, pool="mean", kernel="xla")
TASK = Autoencoding(
    MODEL,
    Discriminator(width=4, depth=1, norm="group", groups=2),
    Features(TOWER, depth=1),
    distance="l2",
    perceptual_weight=0.3,
    kl_weight=0.02,
    log_variance=-0.7,
    learned_variance=True,
    adversarial_weight=0.8,
    start=2,
    ramp=4,
)
PLAIN = dataclasses.replace(TASK, discriminator=None, perceptual=None)
JUDGE = Discriminator(width=4, depth=1)  # with batch statistics
WEIGHTS = (np.arange(B) < 5).astype(np.float32)


def batch_of(step=0):
    """Pictures whose colours differ, in later batches more."""
    random = np.random.default_rng(step)
    image = random.integers(0, 160, (B, SIDE, SIDE, 3)) + np.array([0, 20 + 10 * step, 90])
    return {"image": image.astype(np.uint8)}


def spec_of(batch):
    return {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in batch.items()}


def context(train=True, step=0, state=None, index=None):
    key = jax.random.key(3)
    return Context(key, key, jnp.int32(step), jnp.arange(B) if index is None else index, state, None, train)


@functools.cache
def start():
    """(parameters of which none is 0, state)."""

    @jit
    def make(key):
        params, state = unbox(TASK.init(key))
        return jax.tree.map(lambda p: p + 0.1 * jax.random.normal(jax.random.key(p.size), p.shape), params), state

    return make(jax.random.key(0))


def image_of(batch):
    return jnp.asarray(batch["image"] / 127.5 - 1, jnp.float32)


def decoded(task, params, batch, train=True):
    """(the latents' distribution, pictures from a draw of it)."""
    posterior = task.model.apply({"params": params["model"]}, image_of(batch), method="encode")
    latent = posterior.sample(context().keys()) if train else posterior.mean
    return posterior, task.model.apply({"params": params["model"]}, latent, method="decode")


# ---- the loss ----


@pytest.mark.parametrize(("train", "distance"), [(True, "l1"), (False, "l2")])
def test_reconstruction_and_divergence(train, distance):
    """In NumPy, from what was encoded and decoded; of draws in training, of means in evaluation."""
    task = dataclasses.replace(PLAIN, distance=distance)
    (params, state), batch = start(), batch_of() | {"weights": WEIGHTS}

    @jit
    def run(params, batch):
        return task.loss(params, batch, context(train, state=state)), *decoded(task, params, batch, train)

    loss, posterior, found = run(params, batch)
    image, found = np.float64(image_of(batch)), np.float64(found)
    error = np.abs(found - image) if distance == "l1" else (found - image) ** 2
    error = error.reshape(B, -1).mean(1)
    m, v = (np.float64(x).reshape(B, -1) for x in posterior)
    kl = 0.5 * (m**2 + np.exp(v) - 1 - v).sum(1)
    s = np.float64(params["log_variance"]["value"])
    losses = error / np.exp(s) + s + 0.02 * kl / D
    np.testing.assert_allclose([loss.sum, loss.weight], [losses @ WEIGHTS, 5], rtol=1e-4)
    mse = ((np.clip(found, -1, 1) - image) ** 2).reshape(B, -1).mean(1)
    expected = {
        "reconstruction": error, "kl": kl, "psnr": 10 * np.log10(4 / mse), "log_variance": np.full(B, s),
    }  # fmt: skip
    assert loss.metrics.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(loss.metrics[name], [values @ WEIGHTS, 5], rtol=1e-4)
    assert (loss.state is not None) == train


def test_gradient_is_that_of_the_whole_loss():
    """Of error, divergence and adversarial term, with the weight that two gradients at the last layer give; before the
    discriminator's start, and in the step at which it starts, without it."""
    (params, state), batch = start(), batch_of()

    def terms(params):
        posterior, found = decoded(TASK, params, batch)
        error = jnp.square(found - image_of(batch)).reshape(B, -1).mean(1)
        error += 0.3 * TASK.perceptual.distance({"params": params["perceptual"]}, found, image_of(batch))
        s = params["log_variance"]["value"]
        adversarial = -TASK.discriminator.apply({"params": params["discriminator"]}, found).mean()
        return error.mean() * jnp.exp(-s) + s, 0.02 * posterior.kl().mean() / D, adversarial

    def at_last(number):
        def value(kernel):
            decoder = params["model"]["decoder"]
            layer = {**decoder, "out": {**decoder["out"], "kernel": kernel}}
            return terms({**params, "model": {**params["model"], "decoder": layer}})[number]

        return jnp.linalg.norm(jax.grad(value)(params["model"]["decoder"]["out"]["kernel"]))

    def whole(trained, weight):
        error, kl, adversarial = terms({**params, **trained})
        return error + kl + weight * adversarial

    def loss(trained, step):
        found = TASK.loss({**params, **trained}, batch, context(step=step, state=state))
        return found.sum / found.weight, found.metrics["adversarial_weight"][0] / B

    @jit
    def run(trained, share, step):
        weight = share * at_last(0) / at_last(2)
        expected = jax.value_and_grad(whole)(trained, weight)
        return weight, expected, jax.value_and_grad(loss, has_aux=True)(trained, step)

    trained = {name: params[name] for name in ("model", "log_variance")}
    for step, share in ((1, 0.0), (2, 0.0), (4, 0.8 * 2 / 4), (9, 0.8)):
        weight, (expected, wanted), ((value, told), gradient) = run(trained, share, step)
        np.testing.assert_allclose(told, weight, rtol=1e-3)
        np.testing.assert_allclose(value, expected, rtol=1e-5)
        top = max(np.abs(x).max() for x in jax.tree.leaves(wanted))
        jax.tree.map(lambda a, b, top=top: np.testing.assert_allclose(
            a, b, atol=1e-3 * np.abs(b).max() + 1e-5 * top), gradient, wanted)  # fmt: skip
    assert weight > 0.01


def test_an_example_is_its_own():
    """Its draw, and all else of it, is the same whatever stands beside it."""
    (params, state), batch = start(), batch_of()
    run = jit(lambda image, index: PLAIN.loss(params, {"image": image}, context(state=state, index=index)).sum)
    parts = [run(batch["image"][part], jnp.arange(B)[part]) for part in (slice(B), slice(0, 4), slice(4, 8))]
    np.testing.assert_allclose(parts[1] + parts[2], parts[0], rtol=1e-5)
    assert abs(run(batch["image"][4:], jnp.arange(4)) - parts[2]) > 1e-3


def test_adaptive_weight():
    """Norms 5 and 2; bounded; and none where there is nothing to divide."""
    error, adversarial = jnp.array([[3.0, 0.0], [0.0, 4.0]]), jnp.array([2.0])
    assert adaptive_weight(error, adversarial, 1e4) == pytest.approx(2.5, rel=1e-5)
    assert adaptive_weight(error, 0 * adversarial, 1e4) == 1e4
    assert adaptive_weight(0 * error, 0 * adversarial, 1e4) == 0


def test_discriminators_loss():
    """Hinges, how often it is right, and batch statistics of both halves of what it sees."""
    task, batch = dataclasses.replace(TASK, discriminator=JUDGE), batch_of() | {"weights": WEIGHTS}
    params, state = start()
    made = jit(lambda key: unbox(JUDGE.init(key, jnp.zeros((1, SIDE, SIDE, 3)))))(jax.random.key(1))
    params, state = {**params, "discriminator": made["params"]}, {**state, "discriminator": {
        "batch_stats": made["batch_stats"]}}  # fmt: skip

    @jit
    def run(params):
        found = task.loss_of_discriminator(params, batch, context(step=5, state=state))
        own, logits = state["discriminator"], []
        for x in (image_of(batch), decoded(task, params, batch)[1]):
            variables = {"params": params["discriminator"], **own}
            made, own = JUDGE.apply(variables, x, True, mutable=["batch_stats"])
            logits.append(made.reshape(B, -1))
        return found, logits, own

    found, (real, fake), own = jax.tree.map(np.float64, run(params))
    losses = 0.5 * (np.maximum(1 - real, 0) + np.maximum(1 + fake, 0)).mean(1)
    np.testing.assert_allclose([found.sum, found.weight], [losses @ WEIGHTS, 5], rtol=1e-4)
    right = 0.5 * ((real > 0).mean(1) + (fake < 0).mean(1))
    np.testing.assert_allclose(found.metrics["accuracy"], [right @ WEIGHTS, 5], rtol=1e-6)
    assert set(found.state) == {"model", "discriminator"}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
                 found.state["discriminator"], own)  # fmt: skip


# ---- training ----


TRAINED = dataclasses.replace(TASK, discriminator=JUDGE)


def train(mesh, devices, first=None):
    """States, the first before any step, and metrics, on the host; and how many of the parameters are split."""
    sharding = Sharding(mesh.build(jax.devices()[:devices]), RULES)
    optimizer = SGD(learning_rate=0.02, schedule=Constant(), momentum=0.0, clip=1.0)
    p = Program(TRAINED, optimizer, sharding, spec_of(batch_of()), 10)
    run = jit(p._step, in_shardings=(p.shardings, p.collected_shardings),
              out_shardings=(p.shardings, p.sharding.replicated))  # fmt: skip
    make = jit(p._create, out_shardings=p.shardings)
    state = make(jax.random.key_data(jax.random.key(0))) if first is None else jax.device_put(first, p.shardings)
    states, metrics = [jax.device_get(state)], []
    for step in range(6):
        state, found = run(state, jax.device_put(batch_of(step), p.batch_shardings))
        states.append(jax.device_get(state))
        metrics.append(jax.device_get(found))
    return states, metrics, sum(not x.sharding.is_fully_replicated for x in jax.tree.leaves(state.params))


@pytest.fixture(scope="module")
def alone():
    return train(Mesh(), 1)


def test_the_discriminator_waits(alone):
    """It does not move before its start, and is no term of the loss before it has moved; then its weight rises."""
    states, metrics, _ = alone
    moved = []
    for before, after in zip(states, states[1:], strict=False):
        pairs = zip(*(jax.tree.leaves(s.params["discriminator"]) for s in (before, after)), strict=True)
        moved.append(any((a != b).any() for a, b in pairs))
    assert moved == [False, False, True, True, True, True]
    for step, found in enumerate(metrics):
        assert (found["model/adversarial_weight"] > 0) == (step > 2)
        assert np.isnan(found["discriminator/loss"]) == (step < 2)
        assert found["skipped"] == 0
    assert jax.tree.leaves(states[2].state["discriminator"])[0].max() == 0  # the mean, of batch statistics
    assert np.abs(jax.tree.leaves(states[3].state["discriminator"])[0]).max() > 0


def test_what_nobody_moves_is_frozen(alone):
    first, last = alone[0][0], alone[0][-1]
    assert first.params["perceptual"] == jax.tree.map(lambda _: None, first.frozen["perceptual"])
    jax.tree.map(np.testing.assert_array_equal, first.frozen["perceptual"], last.frozen["perceptual"])
    assert last.params["log_variance"]["value"] != first.params["log_variance"]["value"]


def test_trains_the_same_on_a_mesh(alone):
    """All steps, the adaptive weight, both states: those of the global batch."""
    states, metrics, split = train(Mesh(data=2, fsdp=2, tensor=2), 8, alone[0][0])
    assert split > 20
    first = jax.tree.map(lambda a, b: np.abs(a - b).max(), alone[0][1].params, states[1].params)
    assert max(jax.tree.leaves(first)) < 1e-5  # after one step: the gradient
    for part in ("params", "state"):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3 * np.abs(a).max() + 1e-5),
                     getattr(alone[0][-1], part), getattr(states[-1], part))  # fmt: skip
    for one, many in zip(alone[1], metrics, strict=True):
        for name in one:
            np.testing.assert_allclose(many[name], one[name], rtol=5e-3, atol=1e-4, err_msg=name)


# ---- latents ----


def posterior_of(seed):
    random = np.random.default_rng(seed)
    shape = (B, 3, 4, 2)
    return Gaussian(jnp.float32(random.normal(seed, 2, shape) + [0, 5]), jnp.float32(random.normal(-1, 0.5, shape)))


def test_statistics_are_those_of_all_pictures_so_far():
    """Mean and standard deviation of draws, of all batches alike; of each batch's pictures by weight."""
    found = {"mean": jnp.zeros(2), "std": jnp.ones(2), "count": jnp.float32(0)}
    means, seconds = [], []
    for seed in range(4):
        posterior = posterior_of(seed)
        found = jit(measured, static_argnums=3)(found, posterior, jnp.asarray(WEIGHTS), 0.999)
        m, v = (np.float64(x)[:5].reshape(-1, 2) for x in posterior)
        means.append(m.mean(0))
        seconds.append((m**2 + np.exp(v)).mean(0))
    mean = np.mean(means, 0)
    np.testing.assert_allclose(found["mean"], mean, rtol=1e-5)
    np.testing.assert_allclose(found["std"], np.sqrt(np.mean(seconds, 0) - mean**2), rtol=1e-5)
    assert found["count"] == 4


def test_statistics_forget():
    found = {"mean": jnp.zeros(2), "std": jnp.ones(2), "count": jnp.float32(1e6)}
    for _ in range(30):
        found = measured(found, posterior_of(1), jnp.ones(B), 0.5)
    m, v = (np.float64(x).reshape(-1, 2) for x in posterior_of(1))
    np.testing.assert_allclose(found["mean"], m.mean(0), rtol=1e-4)
    np.testing.assert_allclose(found["std"], np.sqrt(m.var(0) + np.exp(v).mean(0)), rtol=1e-4)


def test_latents_are_normal():
    """What `encode` gives of the pictures that were measured has mean 0 and deviation 1; `decode` takes it back."""
    (params, state), batch = start(), batch_of()

    @jit
    def run(params, keys):
        new = PLAIN.loss(params, batch, context(state=state)).state
        draws = jax.vmap(lambda keys: PLAIN.encode(params, new, batch, keys))(keys)
        latent = PLAIN.encode(params, new, batch)
        again, shown = PLAIN.decode(params, new, latent), PLAIN.reconstruct(params, new, batch)
        return draws, latent, again, shown, decoded(PLAIN, params, batch, False)[1]

    draws, latent, again, shown, expected = run(params, jax.random.split(jax.random.key(1), (10, B)))
    draws = np.array(draws).reshape(-1, 2)
    np.testing.assert_allclose(draws.mean(0), 0, atol=0.05)
    np.testing.assert_allclose(draws.std(0), 1, rtol=0.05)
    assert latent.shape == (B, SIDE, SIDE, 2) and shown.dtype == np.uint8
    np.testing.assert_allclose(again, expected, atol=1e-4)
    assert np.abs(shown - np.clip((np.float64(again) + 1) * 127.5, 0, 255)).max() <= 0.51


def test_statistics_that_are_not_measured():
    task, (params, state) = dataclasses.replace(PLAIN, measure=False), start()

    def check(params):
        loss = task.loss(params, batch_of(), context(state=state))
        assert loss.state is state
        return loss.sum

    jax.eval_shape(check, params)


def test_psnr():
    """A tenth of the range off everywhere: 20 dB."""
    image = jnp.zeros((2, 4, 4, 1))
    np.testing.assert_allclose(psnr(image + jnp.array([0.2, 0.02]).reshape(2, 1, 1, 1), image), [20, 40], rtol=1e-5)
    np.testing.assert_allclose(psnr(image + 1.2, image + 1), [100, 100], rtol=1e-5)  # what is beyond is cut off


# ---- what is said and refused ----


@pytest.mark.parametrize(("changes", "message"), [
    ({"model": MODEL.clone(channels=1)}, "pictures have 3 channels and task.model.channels is 1."),
    ({"model": MODEL.clone(multipliers=(1,) * 5)}, "pictures whose sides are multiples of 16, and not 8 x 8."),
    ({"discriminator": Discriminator()}, "Pictures of 8 x 8 are too small for a discriminator of depth 3"),
    ({"perceptual": LPIPS("x.npz")}, "LPIPS is for pictures of 16 pixels and more, not 8 x 8."),
    ({"ramp": -1}, "task.ramp is 0 or more, not -1."),
    ({"momentum": 1.0}, "task.momentum is at least 0 and below 1, not 1.0."),
])  # fmt: skip
def test_what_does_not_fit(changes, message):
    TASK.check(spec_of(batch_of()))
    with pytest.raises(UserError) as caught:
        dataclasses.replace(TASK, **changes).check(spec_of(batch_of()))
    assert message in str(caught.value)


def test_pictures_in_patches_are_refused():
    spec = {"patches": jax.ShapeDtypeStruct((B, 4, 48), np.uint8)}
    with pytest.raises(UserError, match="gives patches, which task.model, an? Autoencoder, does not take"):
        TASK.check(spec)


def test_says():
    assert TASK.notes(spec_of(batch_of())) == {
        "loss": "l2 + 0.3 perceptual (ViT) + 0.02 KL + 0.8 adversarial from step 2, in full from 6",
        "latents": "8 x 8 x 2",
    }
    plain = PLAIN.flops(spec_of(batch_of()))
    assert plain == 3 * B * MODEL.flops_per_example((8, 8, 3)) < TASK.flops(spec_of(batch_of()))
    assert [player.name for player in PLAIN.players()] == ["model"]


def test_a_tower_with_batch_statistics():
    """They are the perceptual part's state, and do not move."""
    task = dataclasses.replace(PLAIN, perceptual=Features(ResNet(18, width=2, out=3, small=True), depth=1))
    params, state = jax.eval_shape(lambda key: unbox(task.init(key)), jax.random.key(0))
    assert set(state) == {"model", "perceptual"} and set(params) == {"model", "perceptual", "log_variance"}
    loss = jax.eval_shape(task.loss, params, spec_of(batch_of()), context(state=state))
    assert jax.tree.structure(loss.state) == jax.tree.structure(state)
