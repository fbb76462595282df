"""The loss over a vocabulary: its value and gradient, and that chunks keep it small."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import jit

from jaxgen.nn.losses import cross_entropy, vocabulary_loss

B, L, D, V = 2, 12, 4, 40


@jit
def both(logits, targets, ahead=1.0):
    """(losses, their gradients times `ahead`)."""
    loss, back = jax.vjp(lambda x: cross_entropy(x, targets), logits)
    return loss, back(jnp.full_like(loss, ahead))[0]


def numpy_cross_entropy(logits, targets):
    """(losses, their gradients) in float64."""
    x = np.asarray(logits, np.float64)
    x = x - x.max(-1, keepdims=True)
    log_p = x - np.log(np.exp(x).sum(-1, keepdims=True))
    hot = np.eye(x.shape[-1])[np.asarray(targets)]
    return -(log_p * hot).sum(-1), np.exp(log_p) - hot


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_cross_entropy_agrees_with_float64(scale):
    logits = scale * jax.random.normal(jax.random.key(0), (3, 5, V))
    targets = jax.random.randint(jax.random.key(1), (3, 5), 0, V)
    loss, gradient = numpy_cross_entropy(logits, targets)
    found, grad = both(logits, targets, 2.0)
    np.testing.assert_allclose(found, loss, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(grad, 2 * gradient, atol=1e-5)


def test_cross_entropy_of_extremes():
    """Logits at the ends of float32, and -inf for a token that cannot be."""
    logits = jnp.array([[3e38, -3e38, 0.0], [0.0, 1.0, -jnp.inf], [-1e4, -1e4, -1e4]])
    found, grad = both(logits, jnp.array([0, 1, 2]))
    np.testing.assert_allclose(found, [0.0, np.log1p(np.exp(-1.0)), np.log(3.0)], rtol=1e-3)
    np.testing.assert_allclose(grad[1], [0.268941, -0.268941, 0.0], rtol=1e-5)
    assert np.isfinite(grad).all()


def test_cross_entropy_of_bfloat16_is_computed_in_float32():
    logits = jax.random.normal(jax.random.key(0), (50, V)).astype(jnp.bfloat16)
    targets = jnp.arange(50) % V
    found, grad = both(logits, targets)
    expected, gradient = numpy_cross_entropy(logits, targets)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert found.dtype == jnp.float32 and grad.dtype == jnp.bfloat16
    np.testing.assert_allclose(grad.astype(jnp.float32), gradient, atol=4e-3)


@functools.cache
def loss_of(chunk):
    def loss(table, hidden):
        targets = jax.random.randint(jax.random.key(2), (B, L), 0, V)
        weights = jax.random.uniform(jax.random.key(3), (B, L)).at[:, -2:].set(0.0)
        return vocabulary_loss(lambda h: jnp.tanh(h @ table), hidden, targets, weights, chunk)

    return jax.jit(jax.value_and_grad(loss, (0, 1)))


ARGUMENTS = jax.random.normal(jax.random.key(0), (D, V)), jax.random.normal(jax.random.key(1), (B, L, D))


@pytest.mark.parametrize("chunk", [4, 100])
def test_chunked_is_plain(chunk):
    expected, found = loss_of(0)(*ARGUMENTS), loss_of(chunk)(*ARGUMENTS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected)


def test_chunks_never_hold_all_logits():
    """No buffer of B L V elements, in any shape, stands in the compiled program; without chunks one does."""

    def largest(chunk):
        text = loss_of(chunk).lower(*ARGUMENTS).compile().as_text()
        shapes = re.findall(r"(?:f32|bf16|f64)\[([\d,]+)\]", text)
        return max(np.prod([int(n) for n in shape.split(",")]) for shape in shapes)

    assert largest(0) == B * L * V
    assert largest(3) == B * 3 * V


def test_a_chunk_that_does_not_divide():
    with pytest.raises(ValueError, match="the length 12 is not a multiple of the chunk 5"):
        loss_of(5)(*ARGUMENTS)
