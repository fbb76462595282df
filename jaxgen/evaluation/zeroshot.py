"""Zero-shot classification: the class whose description is nearest to the picture."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxgen.data.base import Data
from jaxgen.errors import UserError
from jaxgen.evaluation import calibration, whole
from jaxgen.evaluation.base import Evaluation, Report, Setting

PROMPTS = tuple(
    f"a {kind}photo of {article} {{}}."
    for article in ("a", "the")
    for kind in ("", "blurry ", "black and white ", "low contrast ", "high contrast ", "bad ", "good ")
) + tuple(f"a photo of {article} {size} {{}}." for article in ("a", "the") for size in ("small", "big"))
"""The prompts that CLIP is measured by on CIFAR-10 (Radford et al. 2021, section 3.1.4)."""


@dataclasses.dataclass(frozen=True)
class ZeroShot(Evaluation):
    """Accuracy of the class whose prompts' mean embedding is nearest (Radford et al. 2021, section 3.1): top 1, top 5.

    Probabilities are the softmax of the similarities over the learned temperature; the report's text gives accuracy by
    confidence.
    """

    name: str = "zeroshot"
    data: Data | None = None
    """Labelled pictures whose held-out part is measured; None for the experiment's own, where they have labels."""
    label: str = ""
    """A column of the experiment's own pictures with captions, which then are labelled by it."""
    classes: tuple[str, ...] = ()
    """What the classes are called, by label; none for the names that the data gives."""
    templates: tuple[str, ...] = ("a photo of a {}.",)
    """Prompts with {} for the class; a class's embedding is the mean over all of them."""
    bins: int = 15
    """Bins of confidence for the calibration error."""
    batch_size: int = 0
    """Examples at a time; 0 for the training batch's."""

    def build(self, setting: Setting):
        task = setting.task
        whole.demand(self, task, "embeds pictures and texts", "embed_images", "embed_texts")
        wrong = [t for t in self.templates if "{}" not in t]
        if wrong or not self.templates:
            raise UserError(f"the evaluation '{self.name}' needs prompts with {{}} for the class; its templates are "
                            f"{self.templates!r}")
        data = whole.prepared(self, self.data, setting, "label", label=self.label)
        classes = self.classes or tuple(getattr(data, "classes", ()))
        if not classes:
            raise UserError(f"the evaluation '{self.name}' needs names for the classes; give them in its field classes")
        size = self.batch_size or whole.default_batch(setting)
        prompts = [template.replace("{}", name) for name in classes for template in self.templates]
        texts = text_embedder(setting, prompts, size)

        def measure(params, state, batch, described):
            # a label without a name is seen below; here it must only not be read beside the logits
            images = task.embed_images(params, batch, state).astype(jnp.float32)
            scale, _ = task.model.apply({"params": params}, method="scale")
            logits = scale * jnp.matmul(images, described.T, precision="highest")
            unnamed = jnp.sum((batch["label"] >= len(classes)) * batch["weights"])
            label = jnp.minimum(batch["label"], len(classes) - 1)
            return calibration.tally(logits, label, batch["weights"], self.bins) | {"unnamed": unnamed}

        measured = whole.batches(whole.held_out(self, data), setting, size, measure)

        def run(params, state, step):
            means = texts(params, state).reshape(len(classes), len(self.templates), -1).mean(1)
            described = means / np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)
            described = whole.place(setting.sharding, described.astype(np.float32), None, None)
            sums = whole.total(measured(params, state, described))
            if sums["unnamed"]:
                raise UserError(f"the evaluation '{self.name}' has names for {len(classes)} classes, and "
                                f"{sums['unnamed']:.0f} of its pictures have labels beyond them")
            found = calibration.metrics(sums, len(classes))
            head = f"{len(classes)} classes, {len(self.templates)} prompts each; chance {1 / len(classes):.4f}\n"
            return Report(found, {self.name: head + calibration.reliability(sums)})

        return run


def text_embedder(setting: Setting, texts: list[str], size: int) -> Callable[[Any, Any], Float[np.ndarray, "N E"]]:
    """Compiles the function (params, state) -> the task's embeddings of the texts, encoded as the experiment's data
    encodes its captions."""
    if not hasattr(setting.data, "encode"):
        raise UserError("the experiment's data has no captions, so it is not known how texts are to be encoded")
    import grain

    tokens, lengths = setting.data.encode(texts)
    rows = [{"tokens": t, "lengths": n, "weights": np.float32(1)} for t, n in zip(tokens, lengths, strict=True)]
    size = min(size, whole.whole_rows(setting.sharding, len(rows)))
    embedded = whole.rows(
        grain.MapDataset.source(rows), setting, size,
        lambda params, state, batch: {"texts": setting.task.embed_texts(params, batch).astype(jnp.float32)},
    )  # fmt: skip
    return lambda params, state: embedded(params, state)["texts"]
