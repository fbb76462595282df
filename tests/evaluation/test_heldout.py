"""The held-out loss: one number, whatever the batch size and the mesh; and bits per byte by hand."""

import dataclasses
import math

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.data.base import Prepared
from jaxgen.errors import UserError
from jaxgen.evaluation.base import Setting
from jaxgen.evaluation.heldout import HeldOut
from jaxgen.evaluation.preview import TextPreview
from jaxgen.models.gpt import GPT
from jaxgen.sampling.text import Sampling
from jaxgen.sharding import RULES, Mesh, Sharding, unbox
from jaxgen.tasks.base import Loss, Player, Task
from jaxgen.tasks.language import LanguageModel

TASK = LanguageModel(
    GPT(vocab_size=20, depth=1, width=16, heads=2, mlp_width=16, max_length=40, norm="rmsnorm", bias=False, dropout=0.3)
)
SHAPES = unbox(jax.eval_shape(TASK.init, jax.random.key(0))[0])
PARAMS = jax.tree.map(lambda s: 0.3 * jax.random.normal(jax.random.key(s.size), s.shape), SHAPES)


class Letters:
    """Token n is the n-th letter."""

    vocab_size, eos = 20, 0

    def encode(self, text):
        return np.array([ord(c) - 96 for c in text], np.int32)

    def decode(self, tokens):
        return "".join(chr(96 + t) for t in tokens)


class Examples(Prepared):
    """13 sequences, of which the last is mostly padding."""

    heldout_bytes = 100
    tokenizer = Letters()

    def __init__(self):
        tokens = np.random.default_rng(0).integers(0, 20, (13, 9)).astype(np.int32)
        weights = np.ones((13, 8), np.float32)
        weights[12, 3:] = 0
        self.arrays = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights}

    def train(self, seed):
        return self.heldout().repeat()

    def heldout(self):
        return grain.MapDataset.range(13).map(lambda i: {k: v[i] for k, v in self.arrays.items()})


DATA = Examples()


def setting(task=TASK, devices=1, mesh=Mesh(), data=DATA):
    spec = {k: jax.ShapeDtypeStruct((16, 8), jnp.int32) for k in ("tokens", "targets")}
    return Setting(task, data, Sharding(mesh.build(jax.devices()[:devices]), RULES), spec)


def by_hand():
    logits = np.asarray(TASK.model.apply({"params": PARAMS["model"]}, jnp.asarray(DATA.arrays["tokens"])), np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nats = -np.take_along_axis(log_p, DATA.arrays["targets"][..., None], -1)[..., 0] * DATA.arrays["weights"]
    return nats.sum(), DATA.arrays["weights"].sum()


@pytest.mark.parametrize(
    ("size", "devices", "mesh"),
    [(3, 1, Mesh()), (8, 1, Mesh()), (0, 1, Mesh()), (8, 8, Mesh(data=2, fsdp=2, sequence=2))],
)
def test_one_number_for_any_batch_size_and_mesh(size, devices, mesh):
    nats, tokens = by_hand()
    metrics = HeldOut(batch_size=size).build(setting(devices=devices, mesh=mesh))(PARAMS, {}, 7).metrics
    assert metrics == {
        "loss": pytest.approx(nats / tokens, rel=1e-6),
        "perplexity": pytest.approx(math.exp(nats / tokens), rel=1e-5),
        "bits_per_byte": pytest.approx(nats / math.log(2) / 100, rel=1e-6),
    }


@dataclasses.dataclass(frozen=True)
class Two(Task):
    """Two players, the state, and a metric besides the loss."""

    def players(self):
        def one(params, batch, context):
            weight, real = batch["weights"].sum(), batch["weights"][:, 0]
            found = {"tokens": (batch["tokens"].sum(), weight), "index": (jnp.sum(context.index * real), real.sum())}
            return Loss(context.state["scale"] * weight, weight, metrics=found)

        return Player("a", one), Player("b", lambda *args: one(*args).replace(sum=jnp.float32(0)))


def test_players_metrics_and_state():
    """Named by player, and no perplexity where there is no one loss; an example's index is its place in the set."""
    metrics = HeldOut(batch_size=8).build(setting(Two()))({}, {"scale": jnp.float32(2.5)}, 0).metrics
    mean = DATA.arrays["tokens"].sum() / DATA.arrays["weights"].sum()
    expected = {"tokens": pytest.approx(mean), "index": 6}
    both = {"a/loss": 2.5, "b/loss": 0} | {f"{player}/{k}": v for player in "ab" for k, v in expected.items()}
    assert metrics == both


def test_preview():
    """The same texts every time, each after its prompt; a prompt longer than the model keeps its end."""
    preview = TextPreview(prompts=("", "abc", "s" * 60), tokens=5, sampling=Sampling(temperature=1.0))
    report = preview.build(setting())(PARAMS, {}, 0)
    assert report.metrics == {} and report.texts == preview.build(setting())(PARAMS, {}, 9).texts
    parts = report.texts["preview"].split("\n\n")
    assert [p.splitlines()[0] for p in parts] == ["=== ''", "=== 'abc'", f"=== {'s' * 60!r}"]
    assert parts[1].splitlines()[1].startswith("abc") and len(parts[1].splitlines()[1]) <= 8


def test_nothing_held_out():
    class Empty(Examples):
        def heldout(self):
            return grain.MapDataset.source([])

    with pytest.raises(UserError, match="'heldout' has nothing to measure"):
        HeldOut().build(setting(data=Empty()))
