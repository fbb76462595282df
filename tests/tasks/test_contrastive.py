"""The contrastive task: on any mesh and in parts the same gradient, locked towers, and what it refuses."""

import dataclasses
import functools
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import jit

from jaxgen.errors import UserError
from jaxgen.models.clip import CLIP
from jaxgen.models.text import TextTower
from jaxgen.models.vit import ViT
from jaxgen.nn.patches import patchify
from jaxgen.sharding import RULES, Mesh, Sharding, unbox
from jaxgen.tasks.base import Context
from jaxgen.tasks.contrastive import Contrastive
from jaxgen.training.optimizers import AdamW
from jaxgen.training.schedules import Constant
from jaxgen.training.step import Program

B = 16
TASK = Contrastive(
    ViT(patch=4, width=16, depth=1, heads=2, image_size=8, out=12, pool="mean", patch_dropout=0.5, kernel="xla"),
    TextTower(vocab_size=30, width=16, depth=1, heads=2, max_length=6, out=12),
    mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4),
)  # fmt: skip
SIGMOID = dataclasses.replace(TASK, objective="sigmoid", chunk=3)


def batch_of(seed=0, size=B):
    rng = np.random.default_rng(seed)
    return {
        "image": rng.integers(0, 256, (size, 8, 8, 3)).astype(np.uint8),
        "tokens": rng.integers(0, 30, (size, 6)).astype(np.int32),
        "lengths": rng.integers(1, 7, size).astype(np.int32),
    }


def spec_of(batch):
    return {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in batch.items()}


def context(train, state=None, index=None):
    key = jax.random.key(0)
    return Context(key, key, jnp.int32(0), jnp.arange(B) if index is None else index, state or {}, None, train)


@functools.cache
def params_of(task):
    """Parameters with towers that tell examples apart."""
    shapes = unbox(jax.eval_shape(task.init, jax.random.key(0))[0])
    towers = jax.tree.map(lambda s: 0.5 * jax.random.normal(jax.random.key(s.size), s.shape), shapes)
    bias = {"bias": jnp.float32(-2)} if "bias" in shapes["temperature"] else {}
    return towers | {"temperature": {"scale": jnp.float32(2), **bias}}


def state_of(task):
    shapes = unbox(jax.eval_shape(task.init, jax.random.key(0))[1])
    return jax.tree_util.tree_map_with_path(lambda p, s: jnp.full(s.shape, "var" in str(p[-1]), s.dtype), shapes)


def program(task, mesh=None, devices=1, batch=None, **options):
    options = {"steps": 10, "optimizer": AdamW(learning_rate=1e-2, schedule=Constant())} | options
    sharding = Sharding((mesh or Mesh()).build(jax.devices()[:devices]), RULES)
    return Program(task, options.pop("optimizer"), sharding, spec_of(batch or batch_of()), **options)


def compiled(task, mesh=None, devices=1, batch=None):
    """(parameters, state, batch) -> ((loss, state), gradient) on a mesh, and its program."""
    p = program(task, mesh, devices, batch)

    @jit
    def run(params, state, batch):
        def value(params):
            index = jnp.arange(batch["tokens"].shape[0])
            loss = task.loss(params, batch, context(True, state, index))
            return loss.sum / loss.weight, loss.state

        with p.sharding.use():
            return jax.value_and_grad(value, has_aux=True)(params)

    return run, p


def gradient(task, mesh=None, devices=1):
    """(loss, state, gradient of all parameters) of a batch on a mesh."""
    run, p = compiled(task, mesh, devices)
    state = jax.device_put(state_of(task), p.shardings.state)
    (loss, state), grads = run(
        jax.device_put(params_of(task), p.shardings.params), state, jax.device_put(batch_of(), p.batch_shardings)
    )
    return jax.device_get((loss, state, grads))


def assert_same(one, other, rtol=1e-6):
    """Trees whose leaves differ by no more than a share of their largest numbers, and of the tree's: some gradients
    are 0 but for rounding."""
    largest = max(np.abs(y).max() for y in jax.tree.leaves(other))
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(x, y, atol=rtol * (np.abs(y).max() + 0.1 * largest))


# ---- the loss ----


@pytest.mark.parametrize("task", [TASK, SIGMOID], ids=lambda t: t.objective)
def test_loss_of_the_unit_vectors(task):
    """From the towers' own outputs, in float64; padding rows are neither examples nor negatives."""
    params, batch, weights = params_of(task), batch_of(), (np.arange(B) < 11).astype(np.float32)
    pixels = (batch["image"] / 255 - np.array(task.mean)) / np.array(task.std)
    model = CLIP(task.image, task.text, task.objective == "sigmoid")
    apply = jit(lambda p, x, t, l: model.apply({"params": p}, x, t, l))
    image, text, scale, bias = apply(params, jnp.asarray(pixels, jnp.float32), batch["tokens"], batch["lengths"])
    image, text = (np.asarray(x, np.float64)[:11] for x in (image, text))
    logits = float(scale) * image @ text.T + (0 if bias is None else float(bias))
    if bias is None:
        norms = np.log(np.exp(logits).sum(0)) + np.log(np.exp(logits).sum(1))
        expected = (0.5 * norms - np.diag(logits)).sum()
    else:
        expected = np.log1p(np.exp(-(2 * np.eye(11) - 1) * logits)).sum()
    found = jit(task.loss)(params, batch | {"weights": weights}, context(False))
    np.testing.assert_allclose([found.sum, found.weight], [expected, 11], rtol=1e-5)
    right = (logits.argmax(1) == np.arange(11)).sum()
    assert 0 < right < 11
    means = {k: float(total / weight) for k, (total, weight) in found.metrics.items()}
    expected = {"accuracy": right / 11, "scale": np.exp(2)} | ({} if bias is None else {"bias": -2})
    assert means == pytest.approx(expected)
    assert found.state is None


def test_embeddings():
    params, batch = params_of(TASK), batch_of()
    image, text = jit(TASK.embed_images)(params, batch), jit(TASK.embed_texts)(params, batch)
    for x in (image, text):
        assert x.shape == (B, 12) and x.dtype == jnp.float32
        np.testing.assert_allclose(np.linalg.norm(x, axis=1), 1, rtol=1e-5)


def test_patches_are_the_picture():
    """NaFlex's form of the same pictures."""
    batch = batch_of()
    patches = np.asarray(patchify(jnp.asarray(batch["image"], jnp.float32), 4)).astype(np.uint8)
    at = np.broadcast_to(np.array([[0, 0], [0, 1], [1, 0], [1, 1]], np.int32), (B, 4, 2))
    rest = {k: v for k, v in batch.items() if k != "image"}
    packed = rest | {
        "patches": np.pad(patches, ((0, 0), (0, 2), (0, 0))),
        "coordinates": np.pad(at, ((0, 0), (0, 2), (0, 0))),
        "patch_mask": np.pad(np.ones((B, 4), bool), ((0, 0), (0, 2))),
    }
    TASK.check(spec_of(packed))
    params = params_of(TASK)
    embed = jit(TASK.embed_images)
    np.testing.assert_allclose(embed(params, packed), embed(params, batch), atol=1e-5)
    plain = spec_of(batch)
    assert TASK.flops(spec_of(packed)) > TASK.flops(plain) > 3 * B * TASK.text.flops_per_example((6,))


def test_the_scale_has_a_bound_that_it_can_leave():
    params = params_of(TASK) | {"temperature": {"scale": jnp.float32(9)}}

    def total(params, batch):
        loss = TASK.loss(params, batch, context(False))
        return loss.sum, loss.metrics["scale"]

    run = jit(jax.grad(total, has_aux=True))
    batch = batch_of()
    grads, (scale, weight) = run(params, batch)
    np.testing.assert_allclose(scale / weight, 100, rtol=1e-6)
    assert grads["temperature"]["scale"] > 0  # wrong pairs are nearer: the scale is to fall, and may
    free = dataclasses.replace(TASK, max_scale=0.0)
    assert float(free.model.apply({"params": params}, method="scale")[0]) == pytest.approx(np.exp(9))


def test_masked_patches_are_the_examples_own():
    """Patch dropout (FLIP) in training alone, by keys of (seed, step, index), so half a batch is half of the whole."""
    params, batch = params_of(TASK), batch_of()
    run = jit(lambda b, c: TASK._images(params, b, {}, c.keys(), c.train)[0])
    whole = run(batch, context(True))
    half = run({k: v[8:] for k, v in batch.items()}, context(True, index=jnp.arange(8, 16)))
    np.testing.assert_allclose(half, whole[8:], atol=1e-6)
    moved = run(batch, context(True, index=jnp.arange(1, B + 1)))
    assert np.abs(moved - whole).max() > 0.01 and np.abs(run(batch, context(False)) - whole).max() > 0.01


# ---- on meshes and in parts ----


alone = functools.cache(gradient)


@pytest.mark.parametrize(
    ("task", "mesh"),
    [
        (TASK, Mesh(data=8)),
        (TASK, Mesh(data=2, sequence=2, tensor=2)),
        (SIGMOID, Mesh(data=2, fsdp=2, tensor=2)),
    ],
)
def test_gradient_as_on_one_device(task, mesh):
    loss, _, grads = gradient(task, mesh, 8)
    np.testing.assert_allclose(loss, alone(task)[0], rtol=1e-5)
    assert_same(grads, alone(task)[2], 1e-5)


@pytest.mark.parametrize("mesh", [None, Mesh(data=2, fsdp=2)])
def test_in_parts_the_gradient_is_the_whole_batchs(mesh):
    """Masked patches too, since their keys are the examples'."""
    parts = dataclasses.replace(TASK, embed_chunk=4)
    loss, _, grads = gradient(parts, mesh, 1 if mesh is None else 4)
    np.testing.assert_allclose(loss, alone(TASK)[0], rtol=1e-6)
    assert_same(grads, alone(TASK)[2], 1e-5)


def test_in_parts_the_memory_is_small():
    """Activations of 16 examples, not of 256: about 1/11 of the temporaries."""

    def temporaries(chunk):
        task, batch = dataclasses.replace(TASK, chunk=32, embed_chunk=chunk), batch_of(0, 256)
        lowered = compiled(task, batch=batch)[0].lower(params_of(task), {}, batch)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert temporaries(16) < temporaries(0) / 5


def test_trains():
    p = program(dataclasses.replace(TASK, image=TASK.image.clone(patch_dropout=0.0)), Mesh(data=8), 8)
    state, batch = p.init(0), jax.device_put(batch_of(), p.batch_shardings)
    for _ in range(60):
        state, metrics = p.step(state, batch)
        jax.block_until_ready(metrics)  # many programs at once block each other on simulated devices
    assert metrics["accuracy"] == 1 and metrics["loss"] < 0.2


LOCKED = dataclasses.replace(TASK, locked=("image",))


@pytest.mark.parametrize(("task", "freeze"), [(TASK, ("^image/",)), (LOCKED, ())], ids=["frozen", "locked"])
def test_a_locked_tower(task, freeze):
    """LiT: the tower has no optimizer state and no gradient, and stays what it was."""
    p = program(task, optimizer=AdamW(learning_rate=1e-2, schedule=Constant(), freeze=freeze))
    begin = jax.device_get(p.init(0))
    state, _ = p.step(jax.device_put(begin, p.shardings), jax.device_put(batch_of(), p.batch_shardings))
    state = jax.device_get(state)
    moments = state.optimizer["model"]
    assert jax.tree.leaves((state.params["image"], optax.tree.get(moments, "mu").get("image"))) == []
    jax.tree.map(np.testing.assert_array_equal, state.frozen["image"], begin.frozen["image"])
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), state.params, begin.params)
    assert moved["text"]["head"]["kernel"] > 1e-3 and moved["temperature"]["scale"] > 1e-3
    if not freeze:
        return  # it sees all patches, which costs more

    def flops(program):
        return program.lower().cost_analysis()["flops"]

    spared = B * TASK.image.flops_per_example((8, 8, 3), train=True)  # a pass back is up to two forward
    assert flops(program(TASK)) - flops(p) > 1.5 * spared


# ---- batch statistics ----


def test_a_locked_tower_runs_as_in_evaluation():
    """All patches are seen, and the embeddings are those of measuring, in parts too."""
    params, batch = params_of(TASK), batch_of()
    expected = jit(TASK.embed_images)(params, batch)
    for task in (LOCKED, dataclasses.replace(LOCKED, embed_chunk=4)):
        found = jit(lambda b, c, t=task: t._images(params, b, {}, c.keys(), c.train)[0])(batch, context(True))
        np.testing.assert_allclose(found, expected, atol=1e-6)


class Normed(nn.Module):
    """A tower with batch norm."""

    embed_dim: int = 12
    image_size: int = 8

    @nn.compact
    def __call__(self, image, key=None, train=False):
        x = nn.Dense(12)(image.reshape(image.shape[0], -1))
        return jnp.sin(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))

    def check(self):
        pass


def test_batch_statistics_are_the_whole_batchs():
    task = dataclasses.replace(TASK, image=Normed())
    loss, state, grads = alone(task)
    many = gradient(task, Mesh(data=4, fsdp=2), 8)
    np.testing.assert_allclose(many[0], loss, rtol=1e-5)
    assert_same(many[1], state, 1e-5)
    assert_same(many[2], grads, 1e-5)
    dense = params_of(task)["image"]["Dense_0"]
    pixels = (batch_of()["image"] / 255 - np.array(task.mean)) / np.array(task.std)
    hidden = pixels.reshape(B, -1) @ np.asarray(dense["kernel"], np.float64) + np.asarray(dense["bias"])
    found = state["image"]["batch_stats"]["BatchNorm_0"]
    np.testing.assert_allclose(found["mean"], 0.1 * hidden.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found["var"], 0.9 + 0.1 * hidden.var(0), rtol=1e-4)

    embed = jit(lambda state: task.embed_images(params_of(task), batch_of(), state))
    assert np.abs(embed(state) - embed(state_of(task))).max() > 1e-3
    measured = jit(task.loss)(params_of(task), batch_of(), context(False, state))
    assert measured.state is None and np.isfinite(measured.sum)
    with pytest.raises(UserError, match="embed_chunk needs an image tower without statistics of the whole batch"):
        dataclasses.replace(task, embed_chunk=4).check(spec_of(batch_of()))


def test_a_locked_tower_keeps_its_statistics():
    task = dataclasses.replace(TASK, image=Normed(), locked=("image",), embed_chunk=4)
    p = program(task)
    begin = jax.device_get(p.init(0))
    state, metrics = p.step(jax.device_put(begin, p.shardings), jax.device_put(batch_of(), p.batch_shardings))
    assert np.isfinite(metrics["loss"]) and begin.state["image"]["batch_stats"]
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.state), begin.state)


# ---- what is said and refused ----


@pytest.mark.parametrize(
    ("changes", "names", "message"),
    [
        ({"objective": "sigmiod"}, (), "task.objective is 'softmax' or 'sigmoid', not 'sigmiod'."),
        ({"embed_chunk": 5}, (), "task.embed_chunk = 5 does not divide batch_size = 16."),
        ({"chunk": -1}, (), "task.chunk is 0 or more, not -1."),
        ({"locked": ("picture",)}, (), "task.locked names towers, 'image' and 'text', and 'picture' is none."),
        ({"mean": (0.1, 0.2)}, (), "task.mean has 2 numbers, which should be 1 or 3: the pictures have 3 channels."),
        ({"std": (0.0,)}, (), "task.std is above 0, not 0.0."),
        ({"image": TASK.image.clone(channels=1)}, (), "pictures have 3 channels and task.image.channels is 1."),
        ({"image": TASK.image.clone(out=13)}, (), "tower gives 13 numbers and the text's 12"),
        ({"text": TASK.text.clone(max_length=5)}, (), "Captions of 6 tokens (data.length) do not fit the text tower"),
        ({}, ("lengths",), "The data has image, tokens, and the task needs lengths too."),
        ({}, ("image",), "The data has tokens, lengths, and the task needs image (or patches)."),
    ],
)
def test_what_does_not_fit(changes, names, message):
    spec = {k: v for k, v in spec_of(batch_of()).items() if k not in names}
    with pytest.raises(UserError) as caught:
        dataclasses.replace(TASK, **changes).check(spec)
    assert message in str(caught.value)


def test_patches_of_another_size():
    batch = batch_of()
    spec = {k: v for k, v in spec_of(batch).items() if k != "image"} | {
        "patches": jax.ShapeDtypeStruct((B, 6, 8 * 8 * 3), jnp.uint8),
        "coordinates": jax.ShapeDtypeStruct((B, 6, 2), jnp.int32),
        "patch_mask": jax.ShapeDtypeStruct((B, 6), jnp.bool_),
    }
    with pytest.raises(UserError, match="patches have 192 numbers each, and task.image takes 48: 3 channels of 4 x 4"):
        TASK.check(spec)


def test_microbatches_would_cut_the_negatives():
    with pytest.raises(UserError, match="microbatches = 4 cannot be: .*task.embed_chunk"):
        program(TASK, microbatches=4)


def test_parts_over_more_devices_than_examples():
    """Found before the run directory is made; measuring, which takes no parts, is let pass."""
    p = program(dataclasses.replace(TASK, embed_chunk=4), Mesh(data=8), 8)

    def checked():
        with p.sharding.use():
            p.task.check_training(p.spec)

    for refused in (checked, p.lower):
        with pytest.raises(UserError) as caught:
            refused()
        assert str(caught.value) == (
            "task.embed_chunk = 4 cannot be divided over the 8 shards of the batch that the mesh makes."
        )


def test_says():
    TASK.check_data(SimpleNamespace(tokenizer=SimpleNamespace(vocab_size=30)))
    TASK.check_data(SimpleNamespace())
    with pytest.raises(UserError, match="The tokenizer has 31 tokens and task.text.vocab_size is 30"):
        TASK.check_data(SimpleNamespace(tokenizer=SimpleNamespace(vocab_size=31)))
    spec = spec_of(batch_of())
    assert dataclasses.replace(TASK, embed_chunk=4).notes(spec) == {
        "loss": "softmax, each picture against the 16 texts of the batch; embeddings in parts of 4",
        "attention": "image xla (asked for); text xla (no fused kernel for cpu)",
    }
    assert TASK.units(spec) == ("examples", 16)
    towers = TASK.image.flops_per_example((8, 8, 3), True) + TASK.text.flops_per_example((6,), True)
    assert TASK.flops(spec) == 3 * B * (towers + 2 * B * 12)
