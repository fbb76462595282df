"""Contrastive losses: those of the plain matrix of pairs, in float64, in value and gradient on any mesh, in small
memory."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import jit

from jaxgen.nn.contrastive import sigmoid_loss, softmax_loss
from jaxgen.sharding import RULES, Mesh, Sharding

B, E = 24, 5
MESHES = {
    "1": (Mesh(), 1),
    "2": (Mesh(data=2), 2),
    "4": (Mesh(data=1, fsdp=4), 4),
    "8": (Mesh(data=8), 8),
    "data 2 x fsdp 4": (Mesh(data=2, fsdp=4), 8),
    "data 2 x tensor 2 x sequence 2": (Mesh(data=2, tensor=2, sequence=2), 8),
}
BIAS = -3.0


def vectors(seed, rows=B):
    """Unit vectors of images, and of texts near them."""
    rng = np.random.default_rng(seed)
    image = rng.normal(size=(rows, E))
    text = image + rng.normal(size=(rows, E))
    return tuple((x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32) for x in (image, text))


def weightings():
    rng = np.random.default_rng(9)
    last = np.where(np.arange(B) < B - 5, 1.0, 0.0)  # the padding of a last batch: all that some devices have
    return {"ones": np.ones(B), "last": last, "any": rng.uniform(0.2, 2, B) * (rng.uniform(size=B) < 0.7)}


def softmax_reference(image, text, scale, weights):
    """(loss, right, gradients by image, text and scale) in float64, by the matrix of pairs of the real rows alone."""
    keep = weights > 0
    x, y, w = (np.asarray(v, np.float64)[keep] for v in (image, text, weights))
    logits = scale * x @ y.T
    by_row, by_column = (np.exp(logits - logits.max(a, keepdims=True)) for a in (1, 0))
    by_row, by_column = by_row / by_row.sum(1, keepdims=True), by_column / by_column.sum(0)
    loss = -0.5 * (w * (np.log(np.diag(by_row)) + np.log(np.diag(by_column)))).sum()
    slope = 0.5 * (w[:, None] * by_row + w * by_column) - np.diag(w)
    return loss, w[logits.argmax(1) == np.arange(len(w))].sum(), *spread(keep, x, y, scale, slope)


def sigmoid_reference(image, text, scale, weights):
    """The same of the pairwise logistic loss, and the gradient by the bias."""
    keep = weights > 0
    x, y, w = (np.asarray(v, np.float64)[keep] for v in (image, text, weights))
    logits = scale * x @ y.T + BIAS
    z, pair = 2 * np.eye(len(w)) - 1, 0.5 * (w[:, None] + w)
    slope = -pair * z / (1 + np.exp(z * logits))
    loss = (pair * np.log1p(np.exp(-z * logits))).sum()
    right = w[logits.argmax(1) == np.arange(len(w))].sum()
    return loss, right, *spread(keep, x, y, scale, slope), slope.sum()


def spread(keep, x, y, scale, slope):
    to_x, to_y = np.zeros((len(keep), E)), np.zeros((len(keep), E))
    to_x[keep], to_y[keep] = scale * slope @ y, scale * slope.T @ x
    return to_x, to_y, (slope * (x @ y.T)).sum()


LOSSES = {"softmax": (softmax_loss, softmax_reference, ()), "sigmoid": (sigmoid_loss, sigmoid_reference, (BIAS,))}


@functools.cache
def compiled(loss, mesh, chunk):
    """(image, text, scale, weights) -> (loss, right, gradients by image, text, scale and the bias)."""
    sizes, devices = MESHES[mesh]
    scope, (function, _, more) = Sharding(sizes.build(jax.devices()[:devices]), RULES), LOSSES[loss]

    @jit
    def run(image, text, scale, weights):
        def total(image, text, *numbers):
            return function(image, text, *numbers, weights=weights, chunk=chunk)

        with scope.use():
            numbers = (scale, *map(jnp.float32, more))
            (value, right), grads = jax.value_and_grad(total, tuple(range(2 + len(numbers))), has_aux=True)(
                image, text, *numbers
            )
            return value, right, *grads

    rows = scope.named(("batch",))

    def placed(image, text, scale, weights):
        return run(*(jax.device_put(x, rows) for x in (image, text)), scale, jax.device_put(weights, rows))

    return placed


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("chunk", [0, 2, 5])
def test_is_the_plain_loss(loss, mesh, chunk):
    """For chunks that do and do not divide a device's share (24, 12, 6, 3), with and without padding."""
    run, reference = compiled(loss, mesh, chunk), LOSSES[loss][1]
    for seed, (name, weights) in enumerate(weightings().items()):
        for scale in (2.0, 100.0):
            image, text = vectors(seed)
            found = run(image, text, jnp.float32(scale), weights.astype(np.float32))
            expected = reference(image, text, scale, weights)
            np.testing.assert_allclose(found[1], expected[1], rtol=1e-6, err_msg=name)
            for one, other in zip((found[0], *found[2:]), (expected[0], *expected[2:]), strict=True):
                # a logit's rounding grows with the scale, and a gradient is the scale times a probability
                np.testing.assert_allclose(one, other, atol=1e-6 + 5e-8 * scale**2, rtol=2e-5, err_msg=name)


def test_weights_are_optional():
    image, text = map(jnp.asarray, vectors(0))
    for with_, without in (
        (softmax_loss(image, text, jnp.float32(9), jnp.ones(B)), softmax_loss(image, text, jnp.float32(9))),
        (
            sigmoid_loss(image, text, jnp.float32(9), jnp.float32(-1), jnp.ones(B)),
            sigmoid_loss(image, text, jnp.float32(9), jnp.float32(-1)),
        ),
    ):
        np.testing.assert_array_equal(with_, without)


@pytest.mark.parametrize("loss", LOSSES)
def test_one_real_example_and_none(loss):
    """Alone, an example has no negatives; without any, nothing is learned."""
    run = compiled(loss, "8", 2)
    image, text = vectors(0)
    for weights in (np.eye(B)[3], np.zeros(B)):
        found = run(image, text, jnp.float32(50), weights.astype(np.float32))
        expected = LOSSES[loss][1](image, text, 50, weights) if weights.any() else [0.0] * len(found)
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one, np.broadcast_to(other, one.shape), atol=1e-4)


@pytest.mark.parametrize("loss", LOSSES)
def test_logits_far_apart(loss):
    """Opposite vectors at the largest scale: exponentials of 200 would overflow."""
    image = np.tile(np.eye(1, E, dtype=np.float32), (B, 1))
    found = compiled(loss, "data 2 x fsdp 4", 2)(image, -image, jnp.float32(100), np.ones(B, np.float32))
    each = np.log(B) if loss == "softmax" else 100 - BIAS  # logits are all -100
    np.testing.assert_allclose(found[0], B * each, rtol=1e-5)
    assert all(np.isfinite(x).all() for x in found)
    assert found[1] == B  # all are as near: a tie is no error


def test_bfloat16():
    """Vectors of less precision: products summed in float32, gradients in their own format."""
    image, text = (jnp.asarray(x, jnp.bfloat16) for x in vectors(1))
    expected = softmax_reference(image, text, 20, np.ones(B))
    value, grads = jax.value_and_grad(lambda i, t: softmax_loss(i, t, jnp.float32(20), chunk=7)[0], (0, 1))(image, text)
    np.testing.assert_allclose(value, expected[0], rtol=1e-4)
    assert grads[0].dtype == grads[1].dtype == jnp.bfloat16
    np.testing.assert_allclose(grads[1].astype(np.float32), expected[3], rtol=0.01, atol=0.02)


# ---- memory ----

LARGE, WIDTH = 32_768, 512


def plain_softmax(image, text, scale, weights):
    logits = scale * image @ text.T
    own = jnp.diag(logits)
    return jnp.sum(weights * (0.5 * (jax.nn.logsumexp(logits, 0) + jax.nn.logsumexp(logits, 1)) - own))


def plain_sigmoid(image, text, scale, bias, weights):
    z = 2 * jnp.eye(image.shape[0]) - 1
    return -jnp.sum(weights * jax.nn.log_sigmoid(z * (scale * image @ text.T + bias)))


def temporaries(function, numbers: int, mesh: Mesh) -> int:
    """Bytes on each of 8 devices that the compiled loss and gradient need besides arguments and results."""
    scope = Sharding(mesh.build(), RULES)
    rows = scope.named(("batch",))
    x = jax.ShapeDtypeStruct((LARGE, WIDTH), jnp.float32, sharding=rows)
    w = jax.ShapeDtypeStruct((LARGE,), jnp.float32, sharding=rows)
    number = jax.ShapeDtypeStruct((), jnp.float32, sharding=scope.replicated)

    def run(*inputs):
        with scope.use():
            return jax.value_and_grad(function, tuple(range(2 + numbers)))(*inputs)

    out = scope.replicated, (rows, rows, *(scope.replicated,) * numbers)
    lowered = jax.jit(run, out_shardings=out).lower(x, x, *(number,) * numbers, w)
    return lowered.compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("mesh", [Mesh(data=8), Mesh(data=2, fsdp=4)])
def test_memory_of_a_large_batch(mesh):
    """A global batch of 32,768 on 8 devices: less than 1/8 of the plain form's 1.7 and 1.1 GB on each (1/28, 1/13)."""
    plain = temporaries(plain_softmax, 1, mesh)
    assert plain > 4 * LARGE * LARGE / 8  # the plain form does hold its rows of the matrix
    assert temporaries(lambda i, t, s, w: softmax_loss(i, t, s, w, 1024)[0], 1, mesh) < plain / 8
    plain = temporaries(plain_sigmoid, 2, mesh)
    assert temporaries(lambda i, t, s, b, w: sigmoid_loss(i, t, s, b, w, 1024)[0], 2, mesh) < plain / 8


@pytest.mark.parametrize("loss", [softmax_loss, lambda x, y, s: sigmoid_loss(x, y, s, jnp.float32(BIAS))],
                         ids=["softmax", "sigmoid"])
def test_products_of_float32_are_in_full(loss):
    """Where the default is less, as on a TPU; those of bfloat16 are left as they are."""

    def precisions(dtype):
        image, text = (jnp.asarray(x, dtype) for x in vectors(0))
        value = jax.grad(lambda x, y: loss(x, y, jnp.float32(100))[0], (0, 1))
        return re.findall(r"[( ]precision=(\S+)", str(jax.make_jaxpr(value)(image, text)))

    found = precisions(jnp.float32)
    assert len(found) >= 3 and all("HIGHEST" in p for p in found)
    assert not any("HIGHEST" in p for p in precisions(jnp.bfloat16))
