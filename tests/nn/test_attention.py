"""Attention: which keys a query sees, and every kernel against plain loops and against each other."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import jit

from jaxgen.errors import UserError
from jaxgen.nn import kernels
from jaxgen.nn.attention import Mask, attention
from jaxgen.sharding import RULES, Mesh, Sharding

SEGMENTS = jnp.array([[1] * 5 + [2] * 11, [1] * 9 + [2] * 4 + [0] * 3])
MASKS = {
    "causal": Mask("causal"),
    "bidirectional": Mask("bidirectional"),
    "prefix": Mask("prefix", prefix=jnp.array([3, 7])),
    "causal window": Mask("causal", 4),
    "window both ways": Mask("bidirectional", 3),
    "documents": Mask("causal", query_segments=SEGMENTS),
    "documents both ways, in a window": Mask("bidirectional", 4, query_segments=SEGMENTS),
    "decoding": Mask("causal", 6, query_positions=jnp.array([[*range(16)], [*range(3, 19)]])),
    "cross": Mask("bidirectional", query_segments=SEGMENTS, key_segments=jnp.array([[1] * 8 + [2] * 16, [2] * 24])),
}  # fmt: skip


def arrays(length=16, keys=16, heads=4, kv_heads=2, size=8, batch=2):
    shapes = (batch, length, heads, size), (batch, keys, kv_heads, size), (batch, keys, kv_heads, size)
    return tuple(jax.random.normal(jax.random.key(i), s) for i, s in enumerate(shapes))


def visible(mask, batch, length, keys):
    """(B, L, S): whether a query sees a key, one by one, from the words of `Mask`."""
    fields = (mask.prefix, mask.query_segments, mask.key_segments, mask.query_positions)
    prefix, mine, theirs, positions = (None if x is None else np.asarray(x) for x in fields)
    theirs = mine if theirs is None else theirs

    def sees(b, i, j):
        if mine is not None and mine[b, i] != theirs[b, j]:
            return False
        at = i if positions is None else positions[b, i]
        if mask.window and abs(at - j) >= mask.window:
            return False
        if mask.kind == "prefix" and j < prefix[b]:
            return True
        return mask.kind == "bidirectional" or j <= at

    return np.array([[[sees(b, i, j) for j in range(keys)] for i in range(length)] for b in range(batch)])


def by_loops(query, key, value, mask, cap):
    """In float64, a head at a time; and which keys each query saw."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    (batch, length, heads, size), keys = query.shape, key.shape[1]
    seen = visible(mask, batch, length, keys)
    out = np.zeros_like(query)
    for h in range(heads):
        k, v = (x[:, :, h // (heads // key.shape[2])] for x in (key, value))
        scores = np.einsum("bld,bsd->bls", query[:, :, h], k) / np.sqrt(size)
        scores = cap * np.tanh(scores / cap) if cap else scores
        weights = np.where(seen, np.exp(scores), 0)
        out[:, :, h] = weights / np.maximum(weights.sum(-1, keepdims=True), 1e-9) @ v
    return out, seen


def run(kernel, inputs, mask, cap=0.0):
    """(output, gradients) of one kernel."""

    def total(*inputs):
        out = kernels.KERNELS[kernel](*inputs, mask, cap)
        return jnp.sum(out * jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)), out

    (_, out), gradients = jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(*inputs)
    return out, *gradients


def close(found, expected, tolerance=1e-5):
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance * np.abs(b).max())


@pytest.mark.parametrize("name", MASKS)
def test_plain_attention_agrees_with_loops(name):
    """With one-hot values the output is the weights: exactly 0 for a key that is not seen, and for no other."""
    mask = MASKS[name]
    keys, cap = 24 if name in ("decoding", "cross") else 16, 1.5 if "documents" in name else 0.0
    query, key, _ = arrays(keys=keys, size=keys)
    value = jnp.broadcast_to(jnp.eye(keys)[None, :, None], key.shape)
    expected, seen = by_loops(query, key, value, mask, cap)
    found = np.asarray(jit(lambda *x: attention(*x, mask, "xla", cap))(query, key, value))
    any_seen = seen.any(-1)  # a query that sees nothing gets no sensible output
    np.testing.assert_allclose(found[any_seen], expected[any_seen], atol=1e-5)
    for h in range(4):
        np.testing.assert_array_equal((found[:, :, h] != 0)[any_seen], seen[any_seen])


@pytest.mark.parametrize("window", [0, 50])
def test_long_causal_attention_agrees_with_loops(window):
    """Long enough that it goes in blocks, each with the keys up to its end."""
    segments = jnp.where(jnp.arange(256) < 100, 1, 2)[None]
    mask, inputs = Mask("causal", window, query_segments=segments), arrays(256, 256, 2, 1, batch=1)
    found = jit(lambda *x: attention(*x, mask, "xla"))(*inputs)
    np.testing.assert_allclose(found, by_loops(*inputs, mask, 0.0)[0], atol=1e-5)


@pytest.mark.parametrize("name", ["causal window", "prefix", "documents", "decoding", "cross"])
def test_chunked_is_plain(name, monkeypatch):
    monkeypatch.setattr(kernels, "CHUNK", 4)
    inputs, cap = arrays(keys=24 if name in ("decoding", "cross") else 16), 2.0 if "window" in name else 0.0
    close(run("chunked", inputs, MASKS[name], cap), run("xla", inputs, MASKS[name], cap))


# ---- the TPU kernel, interpreted ----

LONG = jnp.where(jnp.arange(256) < 100, 1, 2)[None].repeat(2, 0)
SPLASH = {
    "causal": (Mask(), 0.0),
    "everything": (Mask("causal", 70, query_segments=LONG), 5.0),
    "both ways, in a window": (Mask("bidirectional", 90), 0.0),
}


@functools.cache
def plain(name):
    return run("xla", arrays(256, 256, 4, 2, 64), *SPLASH[name])


@pytest.mark.parametrize("name", ["everything", "both ways, in a window"])
def test_splash_is_plain(name):
    close(run("splash_interpret", arrays(256, 256, 4, 2, 64), *SPLASH[name]), plain(name))


@pytest.mark.parametrize(
    ("name", "mesh", "rules"),
    [
        ("everything", Mesh(data=2, tensor=2, sequence=2), {}),
        ("causal", Mesh(data=2, tensor=2, sequence=2), {}),
        ("causal", Mesh(data=2, tensor=4), {"kv_heads": ()}),  # more devices than key heads
    ],
)
def test_splash_on_a_mesh_is_plain(name, mesh, rules):
    with Sharding(mesh.build(), {**RULES, **rules}).use():
        found = run("splash_interpret", arrays(256, 256, 4, 2, 64), *SPLASH[name])
    close(found, plain(name))


# ---- the choice ----


def choice(kernel="auto", length=256, size=64, mask=Mask(), cap=0.0, dtype=jnp.bfloat16, keys=None):
    query, key = (jax.ShapeDtypeStruct((2, n, 4, size), dtype) for n in (length, keys or length))
    return kernels.choose(kernel, query, key, mask, cap)


def test_choice_on_cpu(monkeypatch):
    monkeypatch.setattr(kernels, "CHUNK", 128)
    assert choice(length=64) == ("xla", "no fused kernel for cpu")
    assert choice(length=128).name == "xla"
    assert choice(length=256).name == "chunked"
    assert choice(length=200).name == "xla"
    assert choice("chunked", length=256) == ("chunked", "asked for")


def trace_for(monkeypatch, machine: str) -> None:
    """A platform, and the compute capability of its devices."""
    platform, _, capability = machine.partition(" ")
    monkeypatch.setattr(kernels, "platform", lambda: platform)
    monkeypatch.setattr(kernels, "device", lambda: SimpleNamespace(compute_capability=capability or "9.0"))


@pytest.mark.parametrize(
    ("platform", "change", "name", "reason"),
    [
        ("gpu", {}, "cudnn", "the fused kernel of gpu"),
        ("gpu", {"mask": Mask("causal", 8)}, "cudnn", "the fused kernel of gpu"),
        ("gpu", {"dtype": jnp.float32}, "xla", "cudnn cannot: it computes in bfloat16 or float16, not float32"),
        ("gpu", {"cap": 5.0}, "xla", "cudnn cannot: it has no soft cap on scores"),
        ("gpu", {"mask": Mask(query_segments=LONG)}, "xla", "cudnn cannot: it has no document masks"),
        ("gpu", {"mask": Mask("bidirectional", 8)}, "xla", "cudnn cannot: its window is causal"),
        ("gpu", {"size": 256}, "xla", "cudnn cannot: it takes head sizes up to 128 in steps of 8, not 256"),
        ("gpu", {"length": 4096, "size": 12}, "chunked",
         "cudnn cannot: it takes head sizes up to 128 in steps of 8, not 12"),
        ("gpu 7.5", {}, "xla", "cudnn cannot: it needs an NVIDIA GPU of compute capability 8.0 or newer"),
        ("gpu gfx90a", {}, "xla", "cudnn cannot: it needs an NVIDIA GPU of compute capability 8.0 or newer"),
        ("tpu", {}, "splash", "the fused kernel of tpu"),
        ("tpu", {"cap": 5.0, "mask": Mask("causal", 8, query_segments=LONG)}, "splash", "the fused kernel of tpu"),
        ("tpu", {"length": 100}, "xla",
         "splash cannot: it takes lengths in steps of 128 on each device, not 100 and 100"),
        ("tpu", {"size": 80}, "xla", "splash cannot: it takes head sizes in steps of 64, not 80"),
        ("tpu", {"mask": Mask("prefix", prefix=jnp.array([1, 2]))}, "xla",
         "splash cannot: it knows no prefix masks and no cache positions"),
        ("tpu", {"mask": Mask(query_positions=LONG)}, "xla",
         "splash cannot: it knows no prefix masks and no cache positions"),
    ],
)  # fmt: skip
def test_choice_on_accelerators(monkeypatch, platform, change, name, reason):
    trace_for(monkeypatch, platform)
    assert choice(**change) == (name, reason)


def test_choice_where_the_sequence_is_split(monkeypatch):
    trace_for(monkeypatch, "gpu")
    with Sharding(Mesh(sequence=4).build(), RULES).use():
        assert choice() == ("xla", "cudnn cannot: the sequence is split over devices")
        trace_for(monkeypatch, "tpu")
        assert choice() == ("xla", "splash cannot: it takes lengths in steps of 128 on each device, not 64 and 256")
        assert choice(length=512).name == "splash"


def test_a_kernel_that_cannot_is_refused():
    with pytest.raises(UserError) as caught:
        choice("splash")
    assert str(caught.value) == (
        "The attention kernel 'splash' cannot run here: it is for TPUs, and this is cpu; 'auto' takes one that can."
    )
    with pytest.raises(UserError, match="it is for NVIDIA GPUs, and this is cpu"):
        attention(*arrays(), Mask(), "cudnn")
    with pytest.raises(UserError, match="the length 1025 is not a multiple of 1024"):
        choice("chunked", length=1025)


def test_incomplete_masks_are_refused():
    with pytest.raises(ValueError, match="prefix"):
        attention(*arrays(), Mask("prefix"))
    with pytest.raises(ValueError, match="query_segments"):
        attention(*arrays(), Mask("bidirectional", key_segments=SEGMENTS))
