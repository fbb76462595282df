"""Losses over all pairs of a batch of images and texts."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def softmax_loss(
    image: Float[Array, "B E"],
    text: Float[Array, "B E"],
    scale: Float[Array, ""],
    weights: Float[Array, "B"] | None = None,
    chunk: int = 0,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """InfoNCE both ways (Radford et al. 2021, figure 3): each picture's cross-entropy over all texts and each text's
    over all pictures, halved, in nats.

    Returns (sum over the examples, how many pictures have their own text nearest), both weighted. Rows of weight 0 are
    neither examples nor negatives.
    """
    weights = jnp.ones(image.shape[0]) if weights is None else weights
    logits = scale * jnp.matmul(image, text.T, preferred_element_type=jnp.float32)
    real = weights > 0
    logits = jnp.where(real[:, None] & real[None], logits, -1e30)
    own = jnp.diag(logits)
    loss = 0.5 * (jax.nn.logsumexp(logits, 1) + jax.nn.logsumexp(logits, 0)) - own
    return jnp.sum(loss * weights), jnp.sum((own >= logits.max(1)) * weights)
