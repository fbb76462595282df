"""Collection through the loop: one collected batch feeds several steps, and resuming falls on its boundary."""

import dataclasses
import json
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np

from jaxgen.data.base import Data, Prepared
from jaxgen.experiment import Experiment
from jaxgen.sharding import Mesh
from jaxgen.tasks.base import Loss, Task
from jaxgen.training import loop
from jaxgen.training.checkpoint import Checkpointing
from jaxgen.training.metrics import Logging
from jaxgen.training.optimizers import SGD
from jaxgen.training.schedules import Constant


class Numbers(Prepared):
    fingerprint = "numbers"

    def train(self, seed):
        return grain.MapDataset.range(1 << 30).map(lambda i: {"x": np.float32(i)})

    def heldout(self):
        return self.train(0)[:4]


@dataclasses.dataclass(frozen=True)
class Counting(Data):
    """Example i is i."""

    def spec(self, batch_size):
        return {"x": jax.ShapeDtypeStruct((batch_size,), jnp.float32)}

    def prepare(self, cache=None, progress=None):
        return Numbers()


@dataclasses.dataclass(frozen=True)
class Rollouts(Task):
    """Learns from what it made of the first example with its parameters of then: two arrays of two rows each."""

    collect_every: int = 3

    def init(self, key):
        return {"model": jnp.float32(1.0)}, {}

    def collect(self, train_state: Any, batch, key):
        w, x = (np.asarray(jax.device_get(v)) for v in (train_state.params["model"], batch["x"]))  # host code
        return {"made": np.repeat(w, 2), "x": x[:2]}

    def collected(self, spec):
        return {name: jax.ShapeDtypeStruct((2,), jnp.float32) for name in ("made", "x")}

    def loss(self, params, batch, context):
        error = params["model"] - 0.5 * batch["made"]
        return Loss(jnp.sum(jnp.square(error)), jnp.float32(2), metrics={"x": (batch["x"].sum(), jnp.float32(1))})


def experiment(steps):
    return Experiment(
        "collect", Rollouts(), Counting(), SGD(learning_rate=0.1, schedule=Constant(), momentum=0.0), 4, steps,
        mesh=Mesh(data=2, tensor=4), checkpoint=Checkpointing(every=4), log=Logging(every=1, tensorboard=False),
    )  # fmt: skip


def test_collected_batches(tmp_path):
    """Steps 0 to 2 learn from what was made at step 0 of data batch 0, and so on; resumed it is the same."""
    result = loop.train(experiment(8), tmp_path / "run")
    w, made = 1.0, 0.0
    for step in range(8):
        made = w if step % 3 == 0 else made
        w -= 0.1 * 2 * (w - 0.5 * made)
    np.testing.assert_allclose(result.state.params["model"], w, rtol=1e-6)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    seen = [line["train/x"] for line in lines if "train/x" in line]
    assert seen == [1.0] * 3 + [25.0] * 3 + [49.0] * 2  # batch n is 4 n .. 4 n + 3, of which two are kept
    steps = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir() if p.name.isdigit())
    assert [int(s) for s in steps] == [6, 8]  # not 4, in the midst of a collection

    loop.train(experiment(6), tmp_path / "two")
    again = loop.train(experiment(8), tmp_path / "two")
    assert again.state.params["model"] == result.state.params["model"]

    longer = loop.train(experiment(9), tmp_path / "run")  # from step 8: a new collection, of the data of step 8
    assert longer.step == 9 and longer.metrics["train/x"] == 65.0
