"""The text tower: the forward pass against NumPy, and what its padding does."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import vision_reference as reference
from jax import jit
from towers import close, float64, on_mesh, random_of, shapes_of

from jaxgen.errors import UserError
from jaxgen.models.text import TextTower
from jaxgen.sharding import RULES, Mesh, Sharding

CLIPS = TextTower(vocab_size=32, width=16, depth=2, heads=2, max_length=12, out=6, activation="quick_gelu")
SIGLIPS = CLIPS.clone(mask="bidirectional", pool="final", head_bias=True, norm_epsilon=1e-6, activation="gelu")
FORMS = {
    "clip": CLIPS,
    "siglip": SIGLIPS,
    "first": CLIPS.clone(mask="bidirectional", pool="first", out=0, mlp_width=24),
    "mean": CLIPS.clone(
        mask="bidirectional", pool="mean", norm="rmsnorm", activation="swiglu", bias=False, qk_norm=True
    ),
    "causal mean": CLIPS.clone(pool="mean"),
}
TOKENS = jax.random.randint(jax.random.key(0), (3, 10), 0, 32)
LENGTHS = jnp.array([4, 10, 1], jnp.int32)


@functools.cache
def params_of(model):
    return random_of(model, TOKENS, LENGTHS)["params"]


@functools.partial(jit, static_argnums=0)
def forward(model, params, tokens, lengths=LENGTHS):
    return model.apply({"params": params}, tokens, lengths)


@pytest.mark.parametrize("form", FORMS)
def test_agrees_with_numpy(form):
    model = FORMS[form]
    pairs = zip(np.asarray(TOKENS), np.asarray(LENGTHS), strict=True)
    expected = np.stack([reference.text(model, float64(params_of(model)), *pair) for pair in pairs])
    assert expected.std() > 0.1
    close(forward(model, params_of(model), TOKENS), expected, 5e-5)


@pytest.mark.parametrize("form", FORMS)
def test_padding(form):
    """Is seen by SigLIP's tower alone."""
    model = FORMS[form]
    other = jnp.where(jnp.arange(10) < LENGTHS[:, None], TOKENS, (TOKENS + 5) % 32)
    one, two = (forward(model, params_of(model), tokens) for tokens in (TOKENS, other))
    assert (form == "siglip") == (np.abs(one - two).max() > 1e-3)
    np.testing.assert_array_equal(one[1], two[1])


def test_scan_and_remat_change_nothing():
    def run(model):
        return jit(jax.value_and_grad(lambda p: jnp.square(model.apply({"params": p}, TOKENS, LENGTHS)).sum()))(
            params_of(CLIPS)
        )

    close(run(CLIPS.clone(scan=False, remat="full")), run(CLIPS))


def test_on_a_mesh_as_alone():
    model, tokens = FORMS["mean"].clone(mlp_width=24), jnp.tile(TOKENS[:2], (4, 1))
    lengths = jnp.arange(1, 9, dtype=jnp.int32)
    variables = random_of(model, tokens, lengths)

    def run(variables, tokens, lengths):
        return jax.value_and_grad(lambda v: jnp.square(model.apply(v, tokens, lengths)).sum())(variables)

    found, split = on_mesh(run, model, variables, (tokens, lengths), fsdp=2, tensor=2, sequence=2)
    assert split > 6
    close(found, jit(run)(variables, tokens, lengths))


def test_counts_its_operations():
    """Within 2 % of the compiler's count of the unrolled program."""
    model = TextTower(vocab_size=64, width=512, depth=2, heads=8, max_length=48, out=64, scan=False, dtype="float32")
    tokens, lengths = jax.ShapeDtypeStruct((8, 48), jnp.int32), jax.ShapeDtypeStruct((8,), jnp.int32)
    params = shapes_of(model, tokens, lengths)["params"]

    def total(params, tokens, lengths):
        return model.apply({"params": params}, tokens, lengths).sum()

    for function, times in ((total, 1), (jax.grad(total), 3)):
        counted = jax.jit(function).lower(params, tokens, lengths).cost_analysis()["flops"]
        assert counted == pytest.approx(times * 8 * model.flops_per_example((48,)), rel=0.02)


@pytest.mark.parametrize(("change", "words"), [
    ({"heads": 3}, "The width 16 is not a multiple of the 3 heads."),
    ({"depth": 0}, "vocab_size, width, depth, heads and max_length of a TextTower are at least 1."),
    ({"pool": "first"}, 'The first token of a causal tower sees no other: pool="first" needs mask="bidirectional".'),
])  # fmt: skip
def test_sizes_that_do_not_fit(change, words):
    with pytest.raises(UserError) as caught:
        CLIPS.clone(**change).check()
    assert str(caught.value) == words


def test_captions_that_do_not_fit():
    tokens, lengths = jnp.zeros((1, 13), jnp.int32), jnp.ones((1,), jnp.int32)
    with pytest.raises(UserError, match="A caption of 13 tokens is longer than the tower's max_length 12."):
        CLIPS.apply({"params": params_of(CLIPS)}, tokens, lengths)
    with Sharding(Mesh(sequence=8).build(), RULES).use(), pytest.raises(UserError, match="makes sequences of 10"):
        CLIPS.apply({"params": params_of(CLIPS)}, TOKENS, LENGTHS)
