"""Losses over a vocabulary."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@jax.custom_vjp
def cross_entropy(logits: Float[Array, "*n V"], targets: Int[Array, "*n"]) -> Float[Array, "*n"]:
    """-log softmax(logits)[target] in nats, in float32 whatever the logits are.

    The target's logit is picked by comparison, not by index, so that a split vocabulary needs no gather and the
    gradient, softmax - one_hot, is one fused pass.
    """
    return _forward(logits, targets)[0]


def _is_target(logits, targets):
    return jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1) == targets[..., None]


def _forward(logits, targets):
    x = logits.astype(jnp.float32)
    top = jax.lax.stop_gradient(x.max(-1))
    log_z = top + jnp.log(jnp.exp(x - top[..., None]).sum(-1))
    picked = jnp.where(_is_target(logits, targets), x, 0.0).sum(-1)
    return log_z - picked, (logits, targets, log_z)


def _backward(saved, g):
    logits, targets, log_z = saved
    probability = jnp.exp(logits.astype(jnp.float32) - log_z[..., None])
    grad = jnp.where(_is_target(logits, targets), probability - 1.0, probability) * g[..., None]
    return grad.astype(logits.dtype), None


cross_entropy.defvjp(_forward, _backward)


def vocabulary_loss(
    logits: Callable[[Float[Array, "B c D"]], Float[Array, "B c V"]],
    hidden: Float[Array, "B L D"],
    targets: Int[Array, "B L"],
    weights: Float[Array, "B L"],
    chunk: int = 0,
) -> Float[Array, ""]:
    """The weighted sum of cross-entropies, in nats.

    With `chunk` > 0 the logits of so many positions of every sequence are made at a time, forward and again backward,
    so the whole (B, L, V) never exists. A chunk takes positions L/chunk apart, which keeps a split length split.
    """

    def block(h, t, w):
        return jnp.sum(cross_entropy(logits(h), t) * w)

    length = hidden.shape[1]
    if not chunk or chunk >= length:
        return block(hidden, targets, weights)
    if length % chunk:
        raise ValueError(f"the length {length} is not a multiple of the chunk {chunk}")

    def split(x):  # (B, L, ...) -> (L / chunk, B, chunk, ...)
        return jnp.moveaxis(x.reshape(x.shape[0], chunk, length // chunk, *x.shape[2:]), 2, 0)

    def body(total, part):
        return total + jax.checkpoint(block)(*part), None

    return jax.lax.scan(body, jnp.zeros((), jnp.float32), (split(hidden), split(targets), split(weights)))[0]
