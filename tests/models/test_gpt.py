"""GPT: the forward pass against NumPy, its forms against each other, what sees what, and its count of operations."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax import jit

from jaxgen.errors import UserError
from jaxgen.models.gpt import GPT
from jaxgen.nn.rope import Rope
from jaxgen.sharding import unbox

GPT2 = GPT(vocab_size=32, depth=2, width=32, heads=4, max_length=16)
MODERN = GPT(
    vocab_size=32, depth=4, width=32, heads=4, kv_heads=2, mlp_width=40, max_length=16, positions="rope",
    norm="rmsnorm", activation="swiglu", bias=False, tied=False, qk_norm=True, attention_cap=2.0, logit_cap=3.0,
    windows=(3, 0), rope=Rope(theta=100.0, scaling="llama3", factor=4.0, original_length=64),
)  # fmt: skip
FORMS = {
    "gpt2": GPT2,
    "modern": MODERN,
    "geglu, linear rope, one key head, wide heads": GPT2.clone(
        activation="geglu", positions="rope", rope=Rope(scaling="linear", factor=3.0), kv_heads=1, head_dim=16,
        norm="rmsnorm", tied=False,
    ),
    "no positions, exact gelu": GPT2.clone(positions="none", activation="gelu_exact", windows=(4,), attention_cap=1.0),
}  # fmt: skip
LEAN = GPT(
    vocab_size=32, depth=2, width=16, heads=2, max_length=16, positions="none", norm="rmsnorm", activation="relu",
    bias=False,
)  # fmt: skip
TOKENS = jax.random.randint(jax.random.key(0), (2, 12), 0, 32)
SEGMENTS = jnp.array([[1] * 5 + [2] * 7, [1] * 2 + [2] * 9 + [0]])
POSITIONS = jnp.array([[*range(5), *range(7)], [*range(2), *range(9), 0]])


@functools.cache
def params_of(model: GPT):
    """Random parameters of which none is 0 or 1, so that each one's place matters."""
    random = np.random.default_rng(1)

    def one(path, shape):
        mean = 1.0 if path[-1].key == "scale" else 0.0
        return jnp.asarray(random.normal(mean, 0.2, shape.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(one, shapes_of(model))


def shapes_of(model):
    return unbox(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"])


@functools.partial(jit, static_argnums=0)
def forward(model, params, tokens, segments=None, positions=None):
    return model.apply({"params": params}, tokens, segments=segments, positions=positions)


@pytest.mark.parametrize(
    ("form", "packed"), [(form, True) for form in FORMS] + [("gpt2", False), ("modern", False)]
)
def test_agrees_with_numpy(form, packed):
    model = FORMS[form]
    params, more = params_of(model), (SEGMENTS, POSITIONS) if packed else ()
    expected = reference.gpt(model, jax.tree.map(np.float64, params), *map(np.asarray, (TOKENS, *more)))
    found = np.asarray(forward(model, params, TOKENS, *more))
    assert expected.std() > 0.3
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


def test_llama3_scaling_has_its_three_ranges():
    """Fast waves are left alone, slow ones divided, and some lie between (theta and lengths of Llama 3.1)."""
    rope = Rope(theta=500_000.0, scaling="llama3", factor=8.0, original_length=8192)
    ratio = np.asarray(rope.frequencies(128)) / np.asarray(dataclasses.replace(rope, scaling="none").frequencies(128))
    np.testing.assert_allclose(rope.frequencies(128), reference.frequencies(rope, 128), rtol=1e-5)
    assert (ratio > 0.999).any() and (ratio < 0.126).any() and ((ratio > 0.2) & (ratio < 0.8)).any()


@functools.partial(jit, static_argnums=0)
def loss_and_gradient(model, params, key):
    def loss(params):
        hidden, _ = model.apply({"params": params}, TOKENS, SEGMENTS, POSITIONS, key=key, method="hidden")
        return jnp.mean(jnp.square(hidden - 1.0))

    return jax.value_and_grad(loss)(params)


@pytest.mark.parametrize(
    "change",
    [{"scan": False}, {"remat": "full"}, {"remat": "dots"}, {"scan": False, "remat": "full"}],
    ids=str,
)
def test_scan_and_remat_change_nothing(change):
    """With dropout: the masks are the same too."""
    model, key = LEAN.clone(depth=4, windows=(3, 0), dropout=0.2), jax.random.key(5)
    params = params_of(model)
    expected = loss_and_gradient(model, params, key)
    found = loss_and_gradient(model.clone(**change), params, key)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max()), found[1], expected[1])


def test_remat_saves_less():
    """Of what the forward pass leaves for the backward: "dots" less than everything, "full" only each block's input."""
    params = params_of(LEAN)

    def saved(remat):
        def hidden(params):
            return LEAN.clone(remat=remat).apply({"params": params}, TOKENS, method="hidden")[0]

        back = jax.eval_shape(lambda p: jax.vjp(hidden, p)[1], params)
        return sum(x.size for x in jax.tree.leaves(back))

    sizes = {remat: saved(remat) for remat in ("none", "dots", "full")}
    assert sizes["full"] < sizes["dots"] < sizes["none"], sizes


def test_dropout_needs_a_key_and_a_rate():
    params, key = params_of(LEAN), jax.random.key(1)

    def hidden(rate, key):
        model = LEAN.clone(dropout=rate)
        return np.asarray(jit(lambda k: model.apply({"params": params}, TOKENS, key=k, method="hidden")[0])(key))

    plain = hidden(0.0, None)
    np.testing.assert_array_equal(hidden(0.2, None), plain)
    np.testing.assert_array_equal(hidden(0.0, key), plain)
    assert (hidden(0.2, key) != plain).any(axis=-1).all()


def influence(model, segments=None):
    """(L, L): whether the hidden state at i depends on the embedding at j, in a sequence of all different tokens."""
    params, tokens = params_of(model), jnp.arange(16, dtype=jnp.int32)[None]

    def hidden(table):
        new = {**params, "token_embedding": {"embedding": table}}
        return model.apply({"params": new}, tokens, segments, method="hidden")[0][0] @ jnp.arange(1.0, model.width + 1)

    gradient = jit(jax.jacrev(hidden))(params["token_embedding"]["embedding"])
    return np.abs(np.asarray(gradient)[:, :16]).max(-1) != 0  # exactly


BACK = np.arange(16)[:, None] - np.arange(16)[None]


def test_sees_the_past_alone():
    np.testing.assert_array_equal(influence(GPT2), BACK >= 0)


def test_sees_its_own_document_alone():
    """So that the loss of one document moves nothing by way of another's tokens."""
    segments = jnp.array([[1] * 4 + [2] * 7 + [3] * 5])
    expected = (BACK >= 0) & np.asarray(segments[0][:, None] == segments[0][None])
    np.testing.assert_array_equal(influence(GPT2, segments), expected)


def test_windows_reach_as_far_as_their_sum():
    np.testing.assert_array_equal(influence(LEAN.clone(windows=(2, 4))), (BACK >= 0) & (BACK <= 1 + 3))


@pytest.mark.parametrize("model", [GPT2, MODERN], ids=["learned", "rope"])
def test_a_packed_document_is_as_alone(model):
    """The same logits, wherever it stands in the sequence."""
    document = TOKENS[0, 5:]
    alone = jnp.zeros((2, 12), jnp.int32).at[0, :7].set(document)
    packed = forward(model, params_of(model), TOKENS, SEGMENTS, POSITIONS)[0, 5:]
    np.testing.assert_allclose(packed, forward(model, params_of(model), alone)[0, :7], atol=2e-5)
    shifted = forward(model, params_of(model), TOKENS, SEGMENTS)[0, 5:]  # without positions of its own
    if model.positions == "learned":
        assert np.abs(shifted - packed).max() > 1e-2
    else:
        np.testing.assert_allclose(shifted, packed, atol=2e-4)  # rotary positions are relative


@pytest.mark.parametrize("model", [GPT2.clone(scan=False), MODERN], ids=["gpt2, unrolled", "modern, scanned"])
def test_decoding_with_a_cache_is_the_whole_forward_pass(model):
    params = params_of(model)

    @jit
    def extend(tokens, positions, cache):
        hidden, cache = model.apply({"params": params}, tokens, positions=positions, cache=cache, method="hidden")
        return model.apply({"params": params}, hidden, method="logits"), cache

    cache, found, at = model.empty_cache(2, 14), [], 0
    for size in (5, 1, 1, 1, 1, 1, 1, 1):  # a prompt, then a token at a time
        positions = jnp.broadcast_to(jnp.arange(at, at + size, dtype=jnp.int32), (2, size))
        logits, cache = extend(TOKENS[:, at : at + size], positions, cache)
        found, at = [*found, logits], at + size
    np.testing.assert_allclose(np.concatenate(found, 1), forward(model, params, TOKENS), atol=2e-5)


@pytest.mark.parametrize("model", [
    GPT(vocab_size=1024, depth=2, width=512, heads=8, max_length=128, scan=False, dtype="float32"),
    GPT(vocab_size=1024, depth=2, width=512, heads=8, kv_heads=2, max_length=128, positions="rope", norm="rmsnorm",
        activation="swiglu", bias=False, tied=False, scan=False, dtype="float32"),
], ids=["gpt2", "modern"])  # fmt: skip
def test_counts_its_operations(model):
    """Within 2 % of the compiler's count of the unrolled program, forward and with the gradient (of nothing but matrix
    products: large enough that the rest hardly counts)."""
    tokens = jax.ShapeDtypeStruct((4, 64), jnp.int32)
    params = shapes_of(model)

    def total(params, tokens):
        return model.apply({"params": params}, tokens).sum()

    analytic = 4 * 64 * model.flops_per_token(64)
    for function, times in ((total, 1), (jax.value_and_grad(total), 3)):
        counted = jax.jit(function).lower(params, tokens).cost_analysis()["flops"]
        assert counted == pytest.approx(times * analytic, rel=0.02)


@pytest.mark.parametrize(("change", "words"), [
    ({"heads": 5}, "The width 32 is not a multiple of the 5 heads."),
    ({"kv_heads": 3}, "The 4 heads are not a multiple of the 3 kv_heads."),
    ({"positions": "rope", "head_dim": 7}, "Rotary positions need an even head size, not 7."),
    ({"windows": (1, 2, 3)}, "The depth 2 is not a multiple of the 3 windows' pattern."),
    ({"kv_heads": -1}, "kv_heads of a GPT is -1, which should be at least 0."),
    ({"mlp_width": -5}, "mlp_width of a GPT is -5, which should be at least 0."),
    ({"attention_cap": -1.0}, "attention_cap of a GPT is -1.0, which should be at least 0."),
    ({"windows": (-3,)}, "The windows of a GPT are (-3,), and none should be less than 0."),
    ({"dropout": 1.5}, "The dropout of a GPT is 1.5, which should be at least 0 and less than 1."),
    ({"norm_epsilon": -1.0}, "norm_epsilon of a GPT is at least 0, and the factor of its rope is more than 0."),
    ({"heads": 0}, "depth, width, heads, vocab_size and max_length of a GPT are at least 1."),
    ({"depth": 0}, "depth, width, heads, vocab_size and max_length of a GPT are at least 1."),
])  # fmt: skip
def test_sizes_that_do_not_fit(change, words):
    with pytest.raises(UserError) as caught:
        GPT2.clone(**change).check()
    assert str(caught.value) == words


def test_a_sequence_longer_than_the_table():
    with pytest.raises(UserError, match="A sequence of 17 tokens is longer than the model's max_length 16."):
        jax.eval_shape(lambda p: GPT2.apply({"params": p}, jnp.zeros((1, 17), jnp.int32)), params_of(GPT2))
