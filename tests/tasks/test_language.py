"""The language model's task: its loss, what it refuses, and what it says."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import jit

from jaxgen.errors import UserError
from jaxgen.models.gpt import GPT
from jaxgen.sharding import RULES, Mesh, Sharding, unbox
from jaxgen.tasks.base import Context
from jaxgen.tasks.language import LanguageModel

TASK = LanguageModel(
    GPT(vocab_size=20, depth=1, width=16, heads=2, mlp_width=16, max_length=12, norm="rmsnorm", bias=False, dropout=0.3)
)
TOKENS = jax.random.randint(jax.random.key(0), (4, 13), 0, 20)
BATCH = {"tokens": TOKENS[:, :-1], "targets": TOKENS[:, 1:]}
SHAPES = unbox(jax.eval_shape(TASK.init, jax.random.key(0))[0])
PARAMS = jax.tree.map(lambda s: 0.3 * jax.random.normal(jax.random.key(s.size), s.shape), SHAPES)


def context(train, key=0):
    key = jax.random.key(key)
    return Context(key, key, jnp.int32(0), jnp.arange(4), {}, None, train)


@jit
def loss(params, batch, context):
    return TASK.loss(params, batch, context)


def test_loss_is_the_sum_over_weighted_tokens():
    logits = np.asarray(TASK.model.apply({"params": PARAMS["model"]}, BATCH["tokens"]), np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nats = -np.take_along_axis(log_p, np.asarray(BATCH["targets"])[..., None], -1)[..., 0]
    found = loss(PARAMS, BATCH, context(train=False))
    np.testing.assert_allclose([found.sum, found.weight], [nats.sum(), 48], rtol=1e-5)
    weights = np.random.default_rng(0).uniform(0, 2, (4, 12)).astype(np.float32)
    found = loss(PARAMS, BATCH | {"weights": jnp.asarray(weights)}, context(train=False))
    np.testing.assert_allclose([found.sum, found.weight], [(nats * weights).sum(), weights.sum()], rtol=1e-5)


def test_dropout_is_for_training_alone():
    trained = [float(loss(PARAMS, BATCH, context(True, key)).sum) for key in (0, 1, 0)]
    measured = [float(loss(PARAMS, BATCH, context(False, key)).sum) for key in (0, 1)]
    assert trained[0] == trained[2] != trained[1] and measured[0] == measured[1] not in trained


def spec(length=12, **more):
    return {k: jax.ShapeDtypeStruct((4, length), jnp.int32) for k in ("tokens", "targets", *more)}


def test_what_does_not_fit():
    with pytest.raises(UserError) as caught:
        TASK.check(spec(13))
    assert str(caught.value) == (
        "Sequences of 13 tokens (data.length) do not fit the model: task.model.max_length is 12."
    )
    with pytest.raises(UserError, match="task.loss_chunk = 5 does not divide data.length = 12."):
        dataclasses.replace(TASK, loss_chunk=5).check(spec())
    with pytest.raises(UserError, match="The width 16 is not a multiple of the 3 heads"):
        dataclasses.replace(TASK, model=TASK.model.clone(heads=3)).check(spec())
    tokenizer = SimpleNamespace(vocab_size=21)
    with pytest.raises(UserError, match="The tokenizer has 21 tokens and task.model.vocab_size is 20"):
        TASK.check_data(SimpleNamespace(tokenizer=tokenizer))
    TASK.check_data(SimpleNamespace(tokenizer=None))


def test_says_which_kernel_runs():
    task = dataclasses.replace(TASK, model=TASK.model.clone(depth=2, windows=(4, 0)))
    expected = "xla (no fused kernel for cpu) for windows of 4; xla (no fused kernel for cpu)"
    assert task.notes(spec(segment_ids=1)) == {"attention": expected}
    with Sharding(Mesh().build(), RULES).use():
        assert task.notes(spec()) == {"attention": expected}
    asked = dataclasses.replace(TASK, model=TASK.model.clone(kernel="chunked"))
    assert asked.notes(spec()) == {"attention": "chunked (asked for)"}


def test_counts():
    assert TASK.units(spec()) == ("tokens", 48)
    assert TASK.flops(spec()) == 3 * 48 * TASK.model.flops_per_token(12)
    assert TASK.axes(spec()) == {"tokens": ("batch", "length"), "targets": ("batch", "length")}
