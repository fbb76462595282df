"""Contrastive learning of images and texts: CLIP and SigLIP."""

import dataclasses
import math
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxgen.nn.contrastive import softmax_loss
from jaxgen.pretrained import Pretrained
from jaxgen.tasks.base import Batch, Context, Loss, Params, Task


@dataclasses.dataclass(frozen=True)
class Contrastive(Task):
    """Pictures and their texts get embeddings near each other, and far from the others' of the batch.

    A batch has `image` uint8 (B, H, W, C), `tokens` and `lengths`, and where they matter `weights` (B,).
    """

    image: nn.Module | Pretrained
    text: nn.Module | Pretrained
    objective: Literal["softmax"] = "softmax"
    chunk: int = 0
    max_scale: float = 100.0
    """Largest inverse temperature (Radford et al. 2021, section 2.5)."""
    mean: tuple[float, ...] = (0.5,)
    """Subtracted from each channel of pictures whose values go from 0 to 1 ..."""
    std: tuple[float, ...] = (0.5,)
    """... which are then divided by this."""

    def init(self, key):
        image_key, text_key = jax.random.split(key)
        size = getattr(self.image, "image_size", 32)
        image = jnp.zeros((1, size, size, getattr(self.image, "channels", 3)))
        return {
            "image": self.image.init(image_key, image)["params"],
            "text": self.text.init(text_key, jnp.zeros((1, 2), jnp.int32), jnp.ones((1,), jnp.int32))["params"],
            "temperature": {"scale": jnp.float32(math.log(1 / 0.07))},
        }, {}

    def loss(self, params: Params, batch: Batch, context: Context) -> Loss:
        weights = batch.get("weights")
        weights = jnp.ones(batch["tokens"].shape[0]) if weights is None else weights
        scale = jnp.minimum(jnp.exp(params["temperature"]["scale"]), self.max_scale)
        image = self.embed_images(params, batch, context.keys() if context.train else None)
        text = self.embed_texts(params, batch)
        total, correct = softmax_loss(image, text, scale, weights, self.chunk)
        weight = jnp.sum(weights)
        return Loss(total, weight, metrics={"accuracy": (correct, weight), "scale": (scale * weight, weight)})

    def embed_images(self, params: Params, batch: Batch, keys: Array | None = None) -> Float[Array, "B E"]:
        """Unit vectors of a batch's pictures."""
        x = (batch["image"] / 255.0 - jnp.asarray(self.mean)) / jnp.asarray(self.std)
        return unit(self.image.apply({"params": params["image"]}, x, key=keys))

    def embed_texts(self, params: Params, batch: Batch) -> Float[Array, "B E"]:
        """Unit vectors of a batch's texts."""
        return unit(self.text.apply({"params": params["text"]}, batch["tokens"], batch["lengths"]))


def unit(x: Float[Array, "B E"]) -> Float[Array, "B E"]:
    """Vectors of length 1, in float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), -1, keepdims=True), 1e-12))
