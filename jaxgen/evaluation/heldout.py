"""The loss on all of the held-out data."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from jaxgen.data.loader import heldout_batches
from jaxgen.evaluation import whole
from jaxgen.evaluation.base import Evaluation, Report, Setting, constant_key
from jaxgen.tasks.base import Context, batch_shardings


@dataclasses.dataclass(frozen=True)
class HeldOut(Evaluation):
    """Mean loss over the whole held-out set: sum / weight, exact for any batch size, mesh and number of processes.

    A contrastive task's loss is not: there the other examples of a batch are the negatives, so that it depends on the
    batch size; `Retrieval` does not.

    For text also the perplexity and the bits per byte: all the held-out text's nats / ln 2 / its bytes in UTF-8, which
    compares models whatever their tokenizers.
    """

    name: str = "heldout"
    batch_size: int = 0
    """Examples at a time; 0 for the training batch's."""

    def build(self, setting: Setting):
        task, data, sharding = setting.task, setting.data, setting.sharding
        size = self.batch_size or whole.default_batch(setting)
        dataset = whole.held_out(self, data)
        example = dataset[0]
        spec = {k: jax.ShapeDtypeStruct((size, *v.shape), v.dtype) for k, v in example.items()}
        layout = batch_shardings(task, sharding, spec)

        @jax.jit
        def measure(params, state, batch, start):
            with sharding.use():
                key = constant_key()
                index = start + jnp.arange(size, dtype=jnp.int32)
                context = Context(key, key, jnp.int32(0), index, state, params, train=False)
                losses = {}
                for player in task.players():
                    loss = player.loss(params, batch, context)
                    prefix = f"{player.name}/" if len(task.players()) > 1 else ""
                    found = {"loss": (loss.sum, loss.weight), **loss.metrics}
                    losses |= {prefix + name: pair for name, pair in found.items()}
                return losses

        def run(params, state, step):
            batches = enumerate(heldout_batches(dataset, layout, size, setting.told))
            parts = list(whole.fetched(measure(params, state, batch, jnp.int32(i * size)) for i, batch in batches))
            sums = {k: tuple(math.fsum(float(p[k][i]) for p in parts) for i in (0, 1)) for k in parts[0]}
            metrics = {k: total / weight for k, (total, weight) in sums.items()}
            if data.heldout_bytes and "loss" in sums:
                nats, tokens = sums["loss"]
                metrics["perplexity"] = math.exp(min(nats / tokens, 700))
                metrics["bits_per_byte"] = nats / math.log(2) / data.heldout_bytes
            return Report(metrics)

        return run
