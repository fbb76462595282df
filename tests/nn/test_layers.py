"""Dropout's statistics, and number formats."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.nn.convolution import silu
from jaxgen.nn.dropout import dropout
from jaxgen.nn.dtypes import resolve
from jaxgen.nn.feedforward import FeedForward
from jaxgen.nn.linear import Norm, matmul, rows


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout(rate):
    x = jnp.full((400, 500), 3.0)
    out = np.asarray(dropout(x, rate, jax.random.key(0)))
    assert (out == 0).mean() == pytest.approx(rate, abs=0.005)
    assert out.mean() == pytest.approx(3.0, rel=0.01)
    np.testing.assert_allclose(out[out != 0], 3.0 / (1 - rate), rtol=1e-6)
    assert dropout(x, rate, None) is x and dropout(x, 0.0, jax.random.key(0)) is x


def test_auto_is_float32_on_cpu():
    assert resolve("auto") == jnp.float32 and resolve("bfloat16") == jnp.bfloat16


def test_norms_are_computed_in_float32():
    """Of bfloat16 inputs whose squares' mean would lose the small ones; the result is in the compute format."""
    x = (1000 + jax.random.normal(jax.random.key(0), (4, 512))).astype(jnp.bfloat16)
    out, _ = Norm("layernorm", dtype="bfloat16").init_with_output(jax.random.key(0), x)
    exact = np.asarray(x, np.float64)
    exact = (exact - exact.mean(-1, keepdims=True)) / np.sqrt(exact.var(-1, keepdims=True) + 1e-5)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(out, np.float64), exact, atol=0.02)


def test_compute_format_is_a_field():
    x = jax.ShapeDtypeStruct((1, 2, 8), jnp.float32)
    layer = FeedForward(16, dtype="bfloat16")
    out, params = jax.eval_shape(layer.init_with_output, jax.random.key(0), x)
    assert out.dtype == jnp.bfloat16
    assert {p.dtype for p in jax.tree.leaves(params)} == {jnp.dtype("float32")}


def test_what_is_fast_on_cpu_is_the_plain_thing():
    """The narrowing product and the broadcast rows, with first, second and forward derivatives, and by example."""
    x, w, b = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(2, 3, 6), (6, 4), (2, 2)]))

    def fast(x, w, b):
        y = matmul(x, w).reshape(2, 3, 2, 2)
        return jnp.sum(jnp.tanh(y + rows(b, y.shape)))

    def plain(x, w, b):
        return jnp.sum(jnp.tanh((x @ w).reshape(2, 3, 2, 2) + b))

    def all_of(f):
        tangents = (jnp.cos(x), jnp.sin(w), jnp.cos(b))
        several = jnp.stack([b, 2 * b])
        return [
            jax.grad(f, (0, 1, 2))(x, w, b), jax.jvp(f, (x, w, b), tangents), jax.hessian(f, (1, 2))(x, w, b),
            jax.vmap(jax.grad(f, (1, 2)), (None, None, 0))(x, w, several),
        ]  # fmt: skip

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), all_of(fast), all_of(plain))


def test_silu():
    """As float64 has it, with first and second derivatives, where its exponential overflows too."""
    x = jnp.asarray([-500.0, -90.0, -20.0, -1.0, 0.0, 0.5, 30.0, 500.0])
    wide = np.asarray(x, np.float64)
    s = np.exp(-np.logaddexp(0, -wide))
    np.testing.assert_allclose(silu(x), wide * s, rtol=1e-6, atol=1e-30)
    slope, bend = jax.vmap(jax.grad(silu))(x), jax.vmap(jax.grad(jax.grad(silu)))(x)
    np.testing.assert_allclose(slope, s * (1 + wide * (1 - s)), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(bend, s * (1 - s) * (2 + wide * (1 - 2 * s)), rtol=1e-5, atol=1e-6)
    assert silu(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16
