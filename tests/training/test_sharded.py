"""One model on many meshes: loss, gradients and training as on one device, with the parameters really split."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxgen.models.gpt import GPT
from jaxgen.sharding import RULES, Mesh, Sharding
from jaxgen.tasks.language import LanguageModel
from jaxgen.training.optimizers import AdamW
from jaxgen.training.schedules import Constant
from jaxgen.training.step import Program

MODEL = GPT(
    vocab_size=64, depth=2, width=32, heads=8, kv_heads=8, max_length=16, positions="rope", norm="rmsnorm",
    activation="swiglu", bias=False, tied=False,
)  # fmt: skip
SHAPE = (16, 16)
MESHES = {
    "data 8": Mesh(data=8),
    "fsdp 8": Mesh(data=1, fsdp=8),
    "tensor 8": Mesh(data=1, tensor=8),
    "fsdp 2 x tensor 2 x sequence 2": Mesh(data=1, fsdp=2, tensor=2, sequence=2),
    "2 slices of fsdp 2 x tensor 2": Mesh(data=2, fsdp=2, tensor=2, slices=2),
    "2 slices of data 2 x fsdp 2": Mesh(data=4, fsdp=2, slices=2),
}


def batch_of(step: int):
    key = jax.random.fold_in(jax.random.key(3), step)
    tokens = jax.random.randint(key, (SHAPE[0], SHAPE[1] + 1), 0, 64)
    segments = jnp.where(jnp.arange(SHAPE[1]) < 9, 1, 2) * jnp.ones((SHAPE[0], 1), jnp.int32)
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "segment_ids": segments}


def program(mesh: Mesh, devices: int, model=MODEL, optimizer=None, **more) -> Program:
    spec = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in batch_of(0).items()}
    return Program(
        LanguageModel(model, **more),
        optimizer or AdamW(learning_rate=1e-2, schedule=Constant()),
        Sharding(mesh.build(jax.devices()[:devices]), RULES),
        spec,
        steps=20,
    )


@functools.cache
def start():
    """The state before the first step, made on one device."""
    return jax.device_get(program(Mesh(), 1).init(0))


def run(program: Program, steps: int):
    """(the state after so many steps, the gradient of the first, all losses)."""
    state, losses, gradient = jax.device_put(start(), program.shardings), [], None
    for step in range(steps):
        state, metrics = program.step(state, jax.device_put(batch_of(step), program.batch_shardings))
        losses.append(float(metrics["loss"]))
        if gradient is None:  # Adam's first moment, while it is 0.1 of the first gradient
            gradient = jax.device_get(optax.tree.get(state.optimizer["model"], "mu"))
    return state, gradient, np.asarray(losses)


@pytest.fixture(scope="module")
def alone():
    return run(program(Mesh(), 1), 20)


@pytest.mark.parametrize("name", MESHES)
def test_trains_as_on_one_device(name, alone):
    state, gradient, losses = run(program(MESHES[name], 8), 20)
    np.testing.assert_allclose(losses[0], alone[2][0], rtol=1e-6)
    for one, many in zip(jax.tree.leaves(alone[1]), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(many, one, atol=1e-6 * np.abs(one).max() + 1e-8)
    np.testing.assert_allclose(losses, alone[2], rtol=2e-5)
    for one, many in zip(jax.tree.leaves(alone[0].params), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_allclose(np.asarray(many), np.asarray(one), atol=2e-3)


@pytest.mark.parametrize(("name", "share"), [("fsdp 8", 8), ("tensor 8", 8), ("fsdp 2 x tensor 2 x sequence 2", 4)])
def test_parameters_are_split(name, share):
    p = program(MESHES[name], 8)
    state = jax.device_put(start(), p.shardings)

    def bytes_on_first(tree):
        first = jax.devices()[0]
        return sum(s.data.nbytes for x in jax.tree.leaves(tree) for s in x.addressable_shards if s.device == first)

    def bytes_of(tree):
        return sum(x.nbytes for x in jax.tree.leaves(tree))

    # norms stay whole: a few hundred numbers
    assert bytes_on_first(state.params) < bytes_of(state.params) / share + 2048
    assert bytes_on_first(state.optimizer) < bytes_of(state.optimizer) / share + 4096


def test_state_is_created_in_its_layout():
    """The compiled initialisation has no output, and no temporary, of the size of the whole state."""
    big = dataclasses.replace(MODEL, vocab_size=4096, width=256)
    p = program(Mesh(data=1, fsdp=8), 8, big)
    seed = jax.random.key_data(jax.random.key(0))
    memory = jax.jit(p._create, out_shardings=p.shardings).lower(seed).compile().memory_analysis()
    whole = sum(np.prod(s.shape) * s.dtype.itemsize for s in jax.tree.leaves(p.shapes))
    assert memory.output_size_in_bytes < whole / 8 * 1.1
    assert memory.temp_size_in_bytes < whole / 4
    made = jax.device_get(p.init(0))
    plain = jax.device_get(program(Mesh(), 1, big).init(0))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), made, plain)


def test_constraints_are_in_the_lowered_program():
    text = program(MESHES["fsdp 2 x tensor 2 x sequence 2"], 8).lower().as_text()
    assert text.count("sharding_constraint") + text.count("@Sharding") >= 8


def test_step_compiles_once():
    p = program(Mesh(data=8), 8)
    run(p, 3)
    assert p.step._cache_size() == 1


def test_chunked_loss_is_the_plain_loss(alone):
    losses = run(program(MESHES["fsdp 2 x tensor 2 x sequence 2"], 8, loss_chunk=4), 5)[2]
    np.testing.assert_allclose(losses, alone[2][:5], rtol=1e-5)


def test_microbatches_are_the_whole_batch(alone):
    p = dataclasses.replace(program(Mesh(data=2), 2), microbatches=4)
    np.testing.assert_allclose(run(p, 5)[2], alone[2][:5], rtol=1e-5)
