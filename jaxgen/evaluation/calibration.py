"""How often a classifier is right, and whether it knows: accuracy and calibration."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxgen.data.base import Data
from jaxgen.evaluation import whole
from jaxgen.evaluation.base import Evaluation, Report, Setting


def tally(
    logits: Float[Array, "B C"], label: Int[Array, "B"], weights: Float[Array, "B"], bins: int = 15
) -> dict[str, Array]:
    """Sums over the examples, from which `metrics` makes accuracy and calibration.

    Where the true class's logit is shared with others, the sums hold the mean over ways to order them, so that a
    classifier that cannot tell classes apart scores chance. Logits that are not numbers, and a label beyond the
    classes, are no hit.
    """
    logits = logits.astype(jnp.float32)
    log_p = jax.nn.log_softmax(logits)
    true = jnp.take_along_axis(log_p, label[:, None], 1)
    above, tied = jnp.sum(log_p > true, 1), jnp.sum(log_p == true, 1)

    def hit(k):
        return jnp.where(tied > 0, jnp.clip((k - above) / jnp.maximum(tied, 1), 0, 1), 0)   # NaN is level with none

    p, p_true = jnp.exp(log_p), jnp.exp(true[:, 0])
    confidence = jnp.max(p, 1)
    place = jnp.clip(jnp.ceil(confidence * bins).astype(jnp.int32) - 1, 0, bins - 1)
    inside = (place[:, None] == jnp.arange(bins)) * weights[:, None]  # (B, bins)
    return {
        "count": jnp.sum(weights),
        "top1": jnp.sum(hit(1) * weights),
        "top5": jnp.sum(hit(5) * weights),
        "nll": -jnp.sum(jnp.where(weights > 0, true[:, 0] * weights, 0)),
        "brier": jnp.sum((jnp.sum(p * p, 1) - 2 * p_true + 1) * weights),
        "bin_count": jnp.sum(inside, 0),
        "bin_confidence": confidence @ inside,
        "bin_right": hit(1) @ inside,
    }


def metrics(sums: Mapping[str, Any], classes: int) -> dict[str, float]:
    """Accuracy, negative log-likelihood (nats), Brier score, and the expected calibration error over bins of
    confidence (Guo et al. 2017, eq. 3), each a mean over the examples."""
    count = float(sums["count"])
    names = ["top1", "top5", "nll", "brier"] if classes > 5 else ["top1", "nll", "brier"]
    gap = np.abs(np.asarray(sums["bin_right"]) - np.asarray(sums["bin_confidence"])).sum()
    return {name: float(sums[name]) / count for name in names} | {"ece": float(gap) / count}


def reliability(sums: Mapping[str, Any]) -> str:
    """A line for each bin of confidence that holds examples."""
    count, confidence, right = (np.asarray(sums[f"bin_{k}"]) for k in ("count", "confidence", "right"))
    lines = [f"{'confidence':<12}{'examples':>10}{'confidence':>12}{'accuracy':>10}"]
    for i in np.flatnonzero(count):
        bounds = f"{i / len(count):.2f}-{(i + 1) / len(count):.2f}"
        lines.append(f"{bounds:<12}{count[i]:>10.0f}{confidence[i] / count[i]:>12.3f}{right[i] / count[i]:>10.3f}")
    return "\n".join(lines) + "\n"


@dataclasses.dataclass(frozen=True)
class Accuracy(Evaluation):
    """Top-1 and top-5 accuracy of a classification task on held-out examples, with its calibration.

    The report's text gives accuracy by confidence.
    """

    name: str = "accuracy"
    data: Data | None = None
    """Labelled pictures whose held-out part is measured; None for the experiment's own."""
    bins: int = 15
    """Bins of confidence for the calibration error."""
    batch_size: int = 0
    """Examples at a time; 0 for the training batch's."""

    def build(self, setting: Setting):
        task = setting.task
        whole.demand(self, task, "classifies", "logits")
        data = whole.prepared(self, self.data, setting, "label")
        task.check_data(data)   # its own is seen by nobody else
        classes = []   # known when traced

        def measure(params, state, batch):
            logits = task.logits(params, state, batch)
            classes[:] = [logits.shape[1]]
            return tally(logits, batch["label"], batch["weights"], self.bins)

        size = self.batch_size or whole.default_batch(setting)
        measured = whole.batches(whole.held_out(self, data), setting, size, measure)

        def run(params, state, step):
            sums = whole.total(measured(params, state))
            return Report(metrics(sums, classes[0]), {self.name: reliability(sums)})

        return run
