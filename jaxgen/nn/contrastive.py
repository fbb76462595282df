"""Losses over all pairs of a batch of images and texts, without the matrix of pairs.

Every device keeps its own images. The texts go round a ring of the devices that split the batch, together with what the
images met so far add up to for them (a column's normaliser, or its gradient), and are complete when they come home.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, PartitionSpec
from jaxtyping import Array, Float

from jaxgen import sharding

_NEVER = -1e30
"""The logit of a pair that does not count: finite, since infinities differ to nan."""


def softmax_loss(
    image: Float[Array, "B E"],
    text: Float[Array, "B E"],
    scale: Float[Array, ""],
    weights: Float[Array, "B"] | None = None,
    chunk: int = 0,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """InfoNCE both ways, in nats: half the cross-entropy of each image over all texts and half that of each text over
    all images, with logits scale * <image, text> (Radford et al. 2021, figure 3).

    Returns two sums over the examples: the loss, and how many images have no text nearer than their own. Those of the
    other devices are negatives too. Rows of weight 0 are neither examples nor negatives; `chunk` is how many texts are
    met at a time (0 for all that one device has).
    """
    return _softmax(_Ring.current(chunk), image, text, scale, _weights(weights, image))


def sigmoid_loss(
    image: Float[Array, "B E"],
    text: Float[Array, "B E"],
    scale: Float[Array, ""],
    bias: Float[Array, ""],
    weights: Float[Array, "B"] | None = None,
    chunk: int = 0,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Each pair's logistic loss, in nats: log(1 + exp(-z (scale * <image, text> + bias))), z being 1 for an image with
    its own text and -1 for any other pair (Zhai et al. 2023, algorithm 1).

    Returns and arguments as of `softmax_loss`. A pair counts by the mean weight of its two examples.
    """
    return _sigmoid(_Ring.current(chunk), image, text, scale, bias, _weights(weights, image))


def _weights(weights, image):
    return jnp.ones(image.shape[:1], jnp.float32) if weights is None else jax.lax.stop_gradient(weights)


@dataclasses.dataclass(frozen=True)
class _Ring:
    """The devices that split the batch, in a ring, and how many of the visitors are met at a time."""

    mesh: jax.sharding.Mesh | AbstractMesh | None
    axes: tuple[str, ...]
    chunk: int

    @classmethod
    def current(cls, chunk: int) -> "_Ring":
        scope = sharding.current()
        axes = () if scope is None else tuple(scope.spec(("batch",)))[:1]
        axes = axes[0] if axes and isinstance(axes[0], tuple) else axes
        return cls(scope.mesh if axes else None, axes, chunk)

    @property
    def devices(self) -> int:
        return math.prod(self.mesh.shape[a] for a in self.axes)

    def local(self, function: Callable) -> Callable:
        """`function(rows, numbers) -> (rows, numbers)` run by each device on its own rows; the numbers that it returns
        are summed over the devices."""
        if not self.axes:
            return function

        def run(rows, numbers):
            rows, numbers = function(rows, numbers)
            return rows, jax.lax.psum(numbers, self.axes)

        split, whole = PartitionSpec(self.axes), PartitionSpec()
        return jax.shard_map(
            run, mesh=self.mesh, in_specs=(split, whole), out_specs=(split, whole), check_vma=False
        )

    def meet(self, pair: Callable, host: Any, guest: Any) -> tuple[Any, Any]:
        """Every device's `host` with all devices' `guest`: `pair(host, part of a guest, own) -> (host, part)`, where
        `own` (hosts, guests) says which belong together, and is None where none can.

        A guest is a dict of arrays with the examples first, of which `weight` is one; it is padded with zeros.
        """
        rows = guest["weight"].shape[0]
        count = -(-rows // self.chunk) if self.chunk else 1
        size = -(-rows // count)

        def cut(x):
            x = jnp.pad(x, [(0, count * size - rows)] + [(0, 0)] * (x.ndim - 1))
            return x.reshape(count, size, *x.shape[1:])

        def visit(host, guest, home: bool):
            def one(host, part):
                place, part = part
                own = jnp.arange(rows)[:, None] == place if home else None
                return pair(host, part, own)

            places = jnp.arange(count * size).reshape(count, size)
            return jax.lax.scan(one, host, (places, guest), unroll=count == 1)

        host, guest = visit(host, jax.tree.map(cut, guest), home=True)
        if self.axes and self.devices > 1:
            on = [(i, (i + 1) % self.devices) for i in range(self.devices)]
            move = functools.partial(jax.lax.ppermute, axis_name=self.axes, perm=on)
            turn = lambda _, both: visit(both[0], move(both[1]), home=False)  # noqa: E731
            host, guest = jax.lax.fori_loop(1, self.devices, turn, (host, guest))
            guest = move(guest)
        return host, jax.tree.map(lambda x: x.reshape(count * size, *x.shape[2:])[:rows], guest)


def _product(x, y):
    """x @ y in float32. Of float32 in full, wherever it runs: a TPU would round to bfloat16, and logits at a scale of
    100 be off by 0.2."""
    full = x.dtype == y.dtype == jnp.float32
    return jnp.matmul(x, y, precision="highest" if full else None, preferred_element_type=jnp.float32)


def _logits(host, guest, scale):
    """(logits of the pairs, whether both examples of a pair are real)."""
    product = _product(host["vector"], guest["vector"].T)
    return scale * product, (host["weight"] > 0)[:, None] & (guest["weight"] > 0)


def _pull(host, guest, slope):
    """Both sides with what the pairs' `slope` (the gradient by their inner products) adds to the vectors' gradients."""
    return (
        {**host, "pull": host["pull"] + _product(slope, guest["vector"])},
        {**guest, "pull": guest["pull"] + _product(slope.T, host["vector"])},
    )


def _no_pull(vector):
    return jnp.zeros(vector.shape, jnp.float32)


# ---- softmax ----


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _softmax(ring, image, text, scale, weights):
    return _softmax_forward(ring, image, text, scale, weights)[0]


def _softmax_forward(ring, image, text, scale, weights):
    def local(rows, scale):
        image, text, weight = rows
        zero = jnp.zeros_like(weight)

        def add(side, logits, axis):  # to the log of the sum of exponentials, kept as a maximum and a relative sum
            top = jnp.maximum(side["top"], logits.max(axis))
            more = jnp.exp(logits - jnp.expand_dims(top, axis)).sum(axis)
            return {**side, "top": top, "sum": side["sum"] * jnp.exp(side["top"] - top) + more}

        def pair(host, guest, own):
            logits, real = _logits(host, guest, scale)
            logits = jnp.where(real, logits, _NEVER)
            if own is not None:
                host = {**host, "own": host["own"] + jnp.where(own, logits, 0.0).sum(1)}
            return add(host, logits, 1), add(guest, logits, 0)

        side = {"weight": weight, "top": zero + _NEVER, "sum": zero}
        host, guest = ring.meet(pair, {**side, "vector": image, "own": zero}, {**side, "vector": text})
        norms = tuple(side["top"] + jnp.log(side["sum"]) for side in (host, guest))
        loss = 0.5 * (norms[0] + norms[1]) - host["own"]
        return norms, (jnp.sum(loss * weight), jnp.sum((host["own"] >= host["top"]) * weight))

    norms, sums = ring.local(local)((image, text, weights), scale)
    return sums, (image, text, scale, weights, *norms)


def _softmax_backward(ring, saved, cotangents):
    image, text, scale, weights, *norms = saved

    def local(rows, scale):
        image, text, weight, over_texts, over_images = rows

        def pair(host, guest, own):
            logits, real = _logits(host, guest, scale)
            logits = jnp.where(real, logits, _NEVER)
            slope = host["weight"][:, None] * jnp.exp(logits - host["norm"][:, None])
            slope += guest["weight"] * jnp.exp(logits - guest["norm"])
            return _pull(host, guest, 0.5 * slope)

        host = {"vector": image, "weight": weight, "norm": over_texts, "pull": _no_pull(image)}
        guest = {"vector": text, "weight": weight, "norm": over_images, "pull": _no_pull(text)}
        host, guest = ring.meet(pair, host, guest)
        to_image = host["pull"] - weight[:, None] * text
        to_text = guest["pull"] - weight[:, None] * image
        return (to_image, to_text), jnp.sum(to_image * image)

    (to_image, to_text), to_scale = ring.local(local)((image, text, weights, *norms), scale)
    to_image, to_text = (cotangents[0] * scale * x for x in (to_image, to_text))
    return to_image.astype(image.dtype), to_text.astype(text.dtype), cotangents[0] * to_scale, None


_softmax.defvjp(_softmax_forward, _softmax_backward)


# ---- sigmoid ----


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sigmoid(ring, image, text, scale, bias, weights):
    return _sigmoid_pass(ring, image, text, scale, bias, weights, False)[0]


def _sigmoid_forward(ring, image, text, scale, bias, weights):
    return _sigmoid_pass(ring, image, text, scale, bias, weights, True)


def _sigmoid_pass(ring, image, text, scale, bias, weights, gradient):
    """(the sums, gradients): no pair's gradient depends on another pair, so one pass makes both."""

    def local(rows, numbers):
        (image, text, weight), (scale, bias) = rows, numbers
        zero = jnp.zeros_like(weight)

        def pair(host, guest, own):
            logits, real = _logits(host, guest, scale)
            logits += bias
            # as if no pair belonged together; those that do are put right at the end: softplus(-x) = softplus(x) - x
            count = jnp.where(real, 0.5 * (host["weight"][:, None] + guest["weight"]), 0.0)
            host = {
                **host,
                "loss": host["loss"] + (count * jax.nn.softplus(logits)).sum(1),
                "top": jnp.maximum(host["top"], jnp.where(real, logits, _NEVER).max(1)),
            }
            if own is not None:
                host["own"] += jnp.where(own, logits, 0.0).sum(1)
            if gradient:
                slope = count * jax.nn.sigmoid(logits)
                host["slope"] += slope.sum(1)
                host, guest = _pull(host, guest, slope)
            return host, guest

        host = {"vector": image, "weight": weight, "loss": zero, "top": zero + _NEVER, "own": zero}
        guest = {"vector": text, "weight": weight}
        if gradient:
            host |= {"pull": _no_pull(image), "slope": zero}
            guest |= {"pull": _no_pull(text)}
        host, guest = ring.meet(pair, host, guest)
        sums = jnp.sum(host["loss"] - host["own"] * weight), jnp.sum((host["own"] >= host["top"]) * weight)
        if not gradient:
            return (), (sums, ())
        to_image = host["pull"] - weight[:, None] * text
        to_text = guest["pull"] - weight[:, None] * image
        return (to_image, to_text), (sums, (jnp.sum(to_image * image), jnp.sum(host["slope"] - weight)))

    vectors, (sums, numbers) = ring.local(local)((image, text, weights), (scale, bias))
    vectors = tuple((scale * v).astype(x.dtype) for v, x in zip(vectors, (image, text), strict=False))
    return sums, vectors + numbers


def _sigmoid_backward(ring, gradients, cotangents):
    return *((cotangents[0] * g).astype(g.dtype) for g in gradients), None


_sigmoid.defvjp(_sigmoid_forward, _sigmoid_backward)
