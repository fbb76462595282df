"""Contrastive learning of pictures and texts: CLIP and SigLIP, at any batch size."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxgen import sharding
from jaxgen.errors import UserError
from jaxgen.models.clip import CLIP
from jaxgen.models.resnet import ResNet
from jaxgen.models.text import TextTower
from jaxgen.models.vit import ViT
from jaxgen.nn.attention import Mask
from jaxgen.nn.contrastive import sigmoid_loss, softmax_loss
from jaxgen.pretrained import Pretrained
from jaxgen.tasks import vision
from jaxgen.tasks.base import Batch, Context, Loss, Params, Player, Task, split


@dataclasses.dataclass(frozen=True)
class Contrastive(Task):
    """A picture and its text get embeddings near each other, and far from all others of the batch on any device.

    A batch has `image` (B, H, W, C) of 0 to 255, or `patches`, `coordinates` and `patch_mask` (NaFlex), with `tokens`
    (B, L) and `lengths` (B,), and where they matter `weights` (B,); examples of weight 0 are no negatives either.
    Parameters, by part `image`, `text` and `temperature`, are those of `CLIP`, and state its statistics. The
    picture's `patch_dropout` masks patches (FLIP, Li et al. 2022).
    """

    image: ViT | ResNet | Pretrained = ViT(out=512)
    text: TextTower | Pretrained = TextTower()
    objective: Literal["softmax", "sigmoid"] = "softmax"
    """CLIP's loss (Radford et al. 2021) or SigLIP's (Zhai et al. 2023)."""
    chunk: int = 1024
    """Texts that a device compares with its pictures at a time; 0 for a device's share of the batch."""
    embed_chunk: int = 0
    """Examples whose activations are held at a time: the towers run over the batch a part at a time and again for the
    gradient, which is exactly that of the whole batch; 0 for all at once. Microbatches would have fewer negatives."""
    max_scale: float = 100.0
    """Bound of the softmax's inverse temperature; 0 for none."""
    mean: tuple[float, ...] = (0.5,)
    """Subtracted from pixels between 0 and 1, which are then divided by `std`: one for each channel, or one for all."""
    std: tuple[float, ...] = (0.5,)
    locked: tuple[Literal["image", "text"], ...] = ()
    """Towers that stay as they are and run as in evaluation (LiT, Zhai et al. 2022): neither parameters nor batch
    statistics move. `optimizer.freeze=("^image/",)` holds the parameters alone."""

    whole_batch: ClassVar[str] = (
        "examples of a batch are each other's negatives; task.embed_chunk runs the towers over a part at a time and "
        "keeps the loss whole"
    )

    @property
    def model(self) -> CLIP:
        return CLIP(self.image, self.text, self.objective == "sigmoid", self.max_scale, parent=None)

    def init(self, key):
        model = self.model.clone(image=vision.for_init(self.image), text=vision.for_init(self.text))
        tokens, lengths = jnp.zeros((1, 1), jnp.int32), jnp.ones((1,), jnp.int32)
        with vision.unsplit():
            state = dict(model.init(key, vision.example(self.image), tokens, lengths))
        return state.pop("params"), vision.turned(state)

    def players(self):
        moved = tuple(part for part in ("image", "text", "temperature") if part not in self.locked)
        return (Player("model", self.loss, moved if self.locked else None),)

    def loss(self, params: Params, batch: Batch, context: Context) -> Loss:
        weights = batch.get("weights")
        weights = jnp.ones(batch["tokens"].shape[:1], jnp.float32) if weights is None else weights
        image, state = self._images(params, batch, context.state, context.keys(), context.train)
        text = self._texts(params, batch, context.train)
        scale, bias = self.model.apply({"params": params}, method="scale")
        if bias is None:
            total, right = softmax_loss(image, text, scale, weights, self.chunk)
        else:
            total, right = sigmoid_loss(image, text, scale, bias, weights, self.chunk)
        weight = jnp.sum(weights)
        metrics = {"accuracy": (right, weight), "scale": (scale * weight, weight)}
        if bias is not None:
            metrics["bias"] = (bias * weight, weight)
        return Loss(total, weight, state, metrics)

    def embed_images(self, params: Params, batch: Batch, state: Any = None) -> Float[Array, "B E"]:
        """Unit vectors of a batch's pictures. `state` is the task's, which models with batch statistics need."""
        return self._images(params, batch, state, None, False)[0]

    def embed_texts(self, params: Params, batch: Batch) -> Float[Array, "B E"]:
        """Unit vectors of a batch's texts."""
        return self._texts(params, batch, False)

    def _images(self, params, batch, state, keys, train: bool):
        """(unit vectors, new state)."""
        state, moves = vision.turned(state or {}), train and "image" not in self.locked

        def embed(batch, keys):
            x = vision.pixels(batch, self.mean, self.std)
            variables, changes = {"params": params, **state}, list(state) if moves else []
            return self.model.apply(variables, x, keys, moves, method="embed_image", mutable=changes)

        inputs = {k: batch[k] for k in vision.NAMES if k in batch}
        if not train:
            return embed(inputs, None)[0], None
        if moves and state:
            found, new = embed(inputs, keys)
            return found, vision.turned(new)
        return self._in_parts(lambda part: embed(*part)[0], (inputs, keys if moves else None)), None

    def _texts(self, params, batch, train: bool):
        def embed(part):
            return self.model.apply({"params": params}, *part, method="embed_text")

        inputs = batch["tokens"], batch["lengths"]
        return self._in_parts(embed, inputs) if train else embed(inputs)

    def _in_parts(self, embed: Callable[[Any], Array], inputs: Any) -> Float[Array, "B E"]:
        """`embed` of `embed_chunk` examples at a time, keeping nothing but its result (Gao et al. 2021, GradCache)."""
        size = jax.tree.leaves(inputs)[0].shape[0]
        if not self.embed_chunk or self.embed_chunk >= size:
            return embed(inputs)
        self._check_shards(size)
        parts = jax.tree.map(lambda x: split(x, size // self.embed_chunk), inputs)
        found = jax.lax.map(jax.checkpoint(embed, prevent_cse=False), parts)
        return jnp.moveaxis(found, 0, 1).reshape(size, -1)

    def check(self, spec):
        if self.objective not in ("softmax", "sigmoid"):
            raise UserError(f"task.objective is 'softmax' or 'sigmoid', not '{self.objective}'.")
        for name in ("chunk", "embed_chunk", "max_scale"):
            if getattr(self, name) < 0:
                raise UserError(f"task.{name} is 0 or more, not {getattr(self, name)}.")
        self.model.check()
        if missing := [name for name in ("tokens", "lengths") if name not in spec]:
            raise UserError(f"The data has {', '.join(spec)}, and the task needs {' and '.join(missing)} too.")
        vision.check(spec, self.image, self.mean, self.std, "task.image")
        size, length = spec["tokens"].shape
        if length > self.text.max_length:
            raise UserError(
                f"Captions of {length} tokens (data.length) do not fit the text tower: task.text.max_length is "
                f"{self.text.max_length}."
            )
        for name in self.locked:
            if name not in ("image", "text"):
                raise UserError(f"task.locked names towers, 'image' and 'text', and '{name}' is none.")
        if self.embed_chunk and size % self.embed_chunk and self.embed_chunk < size:
            raise UserError(f"task.embed_chunk = {self.embed_chunk} does not divide batch_size = {size}.")
        if self.embed_chunk and "image" not in self.locked and jax.eval_shape(self.init, jax.random.key(0))[1]:
            raise UserError(
                "task.embed_chunk needs an image tower without statistics of the whole batch: a ViT, a "
                'ResNet of the form "bit", or a locked one.'
            )

    def check_training(self, spec):
        self._check_shards(spec["tokens"].shape[0])

    def _check_shards(self, size: int) -> None:
        scope = sharding.current()
        shards = 1 if scope is None else scope.parts("batch")[0]
        if self.embed_chunk < size and self.embed_chunk % shards:
            raise UserError(
                f"task.embed_chunk = {self.embed_chunk} cannot be divided over the {shards} shards of the batch that "
                "the mesh makes."
            )

    def check_data(self, data):
        tokenizer = getattr(data, "tokenizer", None)
        if tokenizer is not None and tokenizer.vocab_size > self.text.vocab_size:
            raise UserError(
                f"The tokenizer has {tokenizer.vocab_size} tokens and task.text.vocab_size is {self.text.vocab_size}; "
                "it should be at least as many."
            )

    def flops(self, spec):
        """Of the towers and the comparison of all pairs. What is computed again to save memory is not counted."""
        size, length = spec["tokens"].shape
        towers = self.model.flops_per_example(vision.shape(spec), (length,), train=True)
        return 3 * size * (towers + 2.0 * size * self.image.embed_dim)

    def notes(self, spec):
        size, length = spec["tokens"].shape
        form = f"{self.objective}, each picture against the {size} texts of the batch"
        if self.embed_chunk and self.embed_chunk < size:
            form += f"; embeddings in parts of {self.embed_chunk}"
        padded = self.text.mask == "bidirectional" and self.text.pool != "final"
        text = length, Mask(self.text.mask, query_segments=jnp.ones((1, 1), jnp.int32) if padded else None)
        towers = {"image": vision.picture_attention(self.image, spec), "text": (self.text, *text)}
        return {"loss": form, **vision.attention(size, **towers)}
