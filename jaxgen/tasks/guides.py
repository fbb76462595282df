"""Guidance of a diffusion model by another model of the suite, for `guide` of `sampling.diffusion.generate`."""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxgen.diffusion import guidance
from jaxgen.diffusion.denoiser import Denoise
from jaxgen.errors import UserError
from jaxgen.tasks.base import Batch, Params
from jaxgen.tasks.classification import Classification
from jaxgen.tasks.contrastive import Contrastive
from jaxgen.tasks.diffusion import Diffusion


@flax.struct.dataclass
class Guiding:
    """What a guide needs besides the noisy pictures (`guide_args`)."""

    params: Params
    """Of the model that guides; `state` likewise."""
    state: Any
    wanted: Batch
    """What is asked of it, examples first: `label`, or `tokens` and `lengths`, or neither."""
    scale: Float[Array, ""]
    drawn: tuple[Params, Any] | None = None
    """Parameters and state of the model that draws, whose autoencoder shows latents as pictures."""


@dataclasses.dataclass(frozen=True)
class Weaker:
    """Away from what a weaker diffusion model of the same data does (`guidance.autoguidance`): a smaller one, one that
    was trained for less time, or one without conditions."""

    task: Diffusion

    def check(self, drawn: Diffusion, shape: tuple[int, ...]) -> None:
        """UserError for a model that cannot guide another one, which draws pictures of a shape (H, W, C)."""
        for name in ("path", "mean", "std", "autoencoder"):
            if getattr(self.task, name) != getattr(drawn, name):
                raise UserError(f"A weaker model has the same task.{name} as the one that it guides.")
        if self.task.beside is not None:
            raise UserError("A model that sees a picture beside the noisy one (task.beside) cannot guide.")
        outs = self.task.network.out // (2 if self.task.learned_variance else 1)
        if self.task.autoencoder is None and outs != shape[-1]:
            raise UserError(f"It draws pictures of {outs} channels, and those to be guided have {shape[-1]}.")
        self.task.check_shape(shape)

    def __call__(self, denoise: Denoise, given: Guiding) -> Denoise:
        condition = self.task.condition(given.params, given.wanted)
        weaker = self.task.model.denoiser(given.params["network"])
        return guidance.autoguidance(denoise, lambda x, t, _: weaker(x, t, condition), given.scale)


@dataclasses.dataclass(frozen=True)
class Judge:
    """Toward pictures of which a classifier says the class, or CLIP the text: scale times the gradient of log p of the
    denoised picture (`guidance.likeness`).

    CLIP's log p is, up to what does not depend on the picture, the scaled product of the embeddings.
    """

    task: Classification | Contrastive
    drawn: Diffusion
    size: tuple[int, int, int]
    """(H, W, C) of the pictures that it knows."""

    def check(self, drawn: Diffusion, shape: tuple[int, ...]) -> None:
        """UserError for a model that cannot guide another one, which draws pictures of a shape (H, W, C)."""
        if shape[-1] != self.size[-1] and 1 not in (shape[-1], self.size[-1]):
            raise UserError(f"It judges pictures of {self.size[-1]} channels, and those drawn have {shape[-1]}.")

    def __call__(self, denoise: Denoise, given: Guiding) -> Denoise:
        params, state, wanted = given.params, given.state, given.wanted
        if isinstance(self.task, Contrastive):
            scale = self.task.model.apply({"params": params}, method="scale")[0]
            texts = scale * self.task.embed_texts(params, wanted)

        def similarity(x0, condition):
            batch = {"image": self._seen(self.drawn.shown(*given.drawn, x0))}
            if isinstance(self.task, Contrastive):
                return jnp.sum(texts * self.task.embed_images(params, batch, state), -1)
            logits = jax.nn.log_softmax(self.task.logits(params, state, batch))
            return jnp.take_along_axis(logits, wanted["label"][:, None], 1)[:, 0]

        return guidance.likeness(denoise, similarity, self.drawn.path, given.scale)

    def _seen(self, pictures: Float[Array, "B H W C"]) -> Float[Array, "B h w c"]:
        """Pictures as the judge knows them."""
        height, width, channels = self.size
        if pictures.shape[-1] > channels:
            pictures = pictures.mean(-1, keepdims=True)
        pictures = jax.image.resize(pictures, (len(pictures), height, width, pictures.shape[-1]), "bilinear")
        return jnp.broadcast_to(pictures, (*pictures.shape[:-1], channels))
