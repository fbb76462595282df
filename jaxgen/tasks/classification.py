"""Classification of pictures."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jaxgen.errors import UserError
from jaxgen.models.resnet import ResNet
from jaxgen.models.vit import ViT
from jaxgen.pretrained import Pretrained
from jaxgen.tasks import vision
from jaxgen.tasks.base import Batch, Context, Loss, Params, Task, mean
from jaxgen.tasks.mixing import CutMix, Mixup


@dataclasses.dataclass(frozen=True)
class Classification(Task):
    """Maximum likelihood of a picture's class: -log p(class | picture), in nats.

    A batch has `image` (B, H, W, C) of 0 to 255, or `patches`, `coordinates` and `patch_mask` (NaFlex), with `label`
    (B,) or the classes' probabilities `soft` (B, K), and where they matter `weights` (B,). The state, of the part
    `model`, is its batch statistics, which are of the whole batch on any mesh, but of each of the `microbatches` where
    there are more.
    """

    model: ViT | ResNet | Pretrained = ViT(out=1000)
    """Its `out` is the number of classes; 0 for features alone, which can be measured and not trained."""
    label_smoothing: float = 0.0
    """Share of the probability that training spreads evenly over all classes (Szegedy et al. 2016, section 7)."""
    mix: Mixup | CutMix | None = None
    """Mixes pictures and labels in training."""
    mean: tuple[float, ...] = (0.5,)
    """Subtracted from pixels between 0 and 1, which are then divided by `std`: one for each channel, or one for all."""
    std: tuple[float, ...] = (0.5,)

    def init(self, key):
        with vision.unsplit():
            state = dict(vision.for_init(self.model).init(key, vision.example(self.model)))
        params = {"model": state.pop("params")}
        return params, {"model": state} if state else {}

    def loss(self, params: Params, batch: Batch, context: Context) -> Loss:
        keys = context.keys() if context.train else None
        logits, state = self._logits(params, batch, context.state, keys, context.train)
        target = batch["soft"] if "soft" in batch else jax.nn.one_hot(batch["label"], logits.shape[1])
        right = (jnp.argmax(logits, 1) == jnp.argmax(target, 1)).astype(jnp.float32)
        if context.train:
            target = optax.smooth_labels(target, self.label_smoothing)
        total, weight = mean(optax.softmax_cross_entropy(logits, target), batch.get("weights"))
        return Loss(total, weight, state, {"accuracy": mean(right, batch.get("weights"))})

    def logits(self, params: Params, state: Any, batch: Batch) -> Float[Array, "B K"]:
        """Logits of the classes, in float32; `state` is the task's."""
        return self._logits(params, batch, state, None, False)[0]

    def embed_images(self, params: Params, batch: Batch, state: Any = None) -> Float[Array, "B E"]:
        """The features that the last layer reads, in float32. `state` is the task's, which batch statistics need."""
        x = vision.pixels(batch, self.mean, self.std)
        variables = {"params": params["model"], **(state or {}).get("model", {})}
        return self.model.apply(variables, x, method="features").astype(jnp.float32)

    def _logits(self, params, batch, state, keys, train: bool):
        """(logits, new state)."""
        self._check_head()  # else features would pass for logits
        state = (state or {}).get("model", {})
        x = vision.pixels(batch, self.mean, self.std)
        logits, new = self.model.apply(
            {"params": params["model"], **state}, x, key=keys, train=train, mutable=list(state) if train else []
        )
        return logits.astype(jnp.float32), {"model": dict(new)} if train and state else None

    # ---- mixtures ----

    def collect(self, train_state, batch, key):
        return batch if self.mix is None else _mixed(self.mix, self.model.out, batch, key)

    def collected(self, spec):
        if self.mix is None:
            return spec
        soft = jax.ShapeDtypeStruct((spec["label"].shape[0], self.model.out), jnp.float32)
        return {**{name: s for name, s in spec.items() if name != "label"}, "soft": soft}

    # ---- what is said and refused ----

    def check(self, spec):
        self.model.check()
        vision.check(spec, self.model, self.mean, self.std, "task.model")
        if "label" not in spec and "soft" not in spec:
            raise UserError(f"The data has {', '.join(spec)}, and the task needs label (or soft).")
        if "soft" in spec and spec["soft"].shape[1] != self.model.out > 0:
            raise UserError(
                f"The data has {spec['soft'].shape[1]} classes and task.model.out is {self.model.out}; "
                "they should be the same."
            )
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"task.label_smoothing is at least 0 and below 1, not {self.label_smoothing}.")
        if self.mix is not None and not {"image", "label"} <= set(spec):
            raise UserError(f"task.mix needs image and label, and the data has {', '.join(spec)}.")

    def check_training(self, spec):
        self._check_head()

    def _check_head(self):
        if self.model.out < 1:
            raise UserError("task.model.out is 0, which should be the number of classes: the model gives features.")

    def check_data(self, data):
        classes = getattr(data, "classes", ())
        if len(classes) > self.model.out > 0:
            raise UserError(
                f"The data has {len(classes)} classes and task.model.out is {self.model.out}; "
                "it should be at least as many."
            )

    def flops(self, spec):
        shape = vision.shape(spec)
        size = spec["image" if "image" in spec else "patches"].shape[0]
        return 3 * size * self.model.flops_per_example(shape, train=True)

    def notes(self, spec):
        size = spec["image" if "image" in spec else "patches"].shape[0]
        return vision.attention(size, model=vision.picture_attention(self.model, spec))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _mixed(mix, classes: int, batch: Batch, key: Array) -> Batch:
    target = jax.nn.one_hot(batch["label"], classes)
    key = jax.random.fold_in(key, 1 << 30)  # the step folds its players' keys, by their number, from the same one
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(target.shape[0]))
    image, soft = mix(batch["image"], target, keys)
    return {**{name: x for name, x in batch.items() if name != "label"}, "image": image, "soft": soft}
