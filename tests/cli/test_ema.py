"""`jaxgen ema`: the average of another span, made of a run's checkpoints and used as a run is."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from jaxgen import record
from jaxgen.cli.main import main
from jaxgen.data import Bytes, Text
from jaxgen.evaluation.heldout import HeldOut
from jaxgen.experiment import Experiment, train
from jaxgen.models.gpt import GPT
from jaxgen.pretrained import Pretrained
from jaxgen.tasks.language import LanguageModel
from jaxgen.training import metrics as metering
from jaxgen.training.checkpoint import Checkpointing, Checkpoints
from jaxgen.training.ema import Ema, PowerEma, combination
from jaxgen.training.optimizers import AdamW


@pytest.fixture(scope="module")
def experiment(tmp_path_factory) -> Experiment:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"{i} is {i * i} squared, and {i**3} cubed.\n" for i in range(400)))
    return Experiment(
        "tiny", LanguageModel(GPT(vocab_size=257, depth=1, width=16, heads=2, max_length=32)),
        Text(path=str(path), tokenizer=Bytes(), length=16, heldout_by="tail"),
        AdamW(1e-2, freeze=("position_embedding|final_norm",)), batch_size=8, steps=12, ema=PowerEma((0.05, 0.1)),
        evaluations=(HeldOut(),), checkpoint=Checkpointing(every=2, keep=100, best=0),
    )  # fmt: skip


@pytest.fixture(scope="module")
def done(experiment, tmp_path_factory):
    return train(experiment, tmp_path_factory.mktemp("runs") / "tiny").directory


def jaxgen(*words) -> int:
    return main([str(word) for word in words])


def refused(capsys, *words) -> str:
    assert jaxgen(*words) == 2
    return capsys.readouterr().err


def kernels(directory, part, step="latest"):
    """All leaves of a part of a checkpoint."""
    checkpoints = Checkpoints(directory / "checkpoints", read_only=True)
    target = {name: np.zeros(s.shape, s.dtype) for name, s in checkpoints.contents(step, part).items()}
    assert target
    nested = {}
    for name, value in target.items():
        node = nested
        *above, last = name.removeprefix(f"{part}/").split("/")
        for key in above:
            node = node.setdefault(key, {})
        node[last] = value
    return checkpoints.restore(nested, step, part=part)[1]


def test_another_average(done, tmp_path, capsys):
    out = tmp_path / "model"
    assert jaxgen("ema", done, "--std", "0.15", "--out", out) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{out}: the average of relative standard deviation 0.15 at step 12, from 6 checkpoints;")
    weights, error = combination([n for n in range(2, 13, 2) for _ in range(2)], [0.05, 0.1] * 6, 12, 0.15)
    averages = [kernels(done, f"ema/{i}", n) for n in range(2, 13, 2) for i in range(2)]
    expected = jax.tree.map(lambda *leaves: np.tensordot(weights, np.stack(leaves), 1), *averages)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), kernels(out, "params"), expected)
    told = json.loads((out / "run.json").read_text())["averaged"]
    assert told == {"run": str(done), "step": 12, "std": 0.15, "error": error}
    assert record.stored(out).experiment["ema"] is None and record.stored(out).experiment["name"] == "model"

    # it is read as a run is, frozen parameters and tokenizer included
    assert jaxgen("eval", out, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    first = metering.last(done)["eval/heldout/loss"]  # of the first average
    assert found["step"] == 12 and 1e-6 < abs(found["metrics"]["eval/heldout/loss"] - first) < 0.5
    assert (out / "tokenizer" / "tokenizer.json").is_file()


def test_what_was_kept_is_found_again(done, tmp_path, capsys):
    """The average of a width that the run keeps, at an earlier step, and with the default name."""
    out = done.with_name("tiny-ema-0.1")
    assert jaxgen("ema", done, "--std", "0.1", "--step", "8") == 0
    assert str(out) in capsys.readouterr().out
    found, wanted = kernels(out, "params"), kernels(done, "ema/1", 8)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, wanted)
    assert "exists already; give another --out" in refused(capsys, "ema", done, "--std", "0.1", "--step", "8")


def test_weights_for_another_run(done, experiment, tmp_path):
    """`Pretrained` takes the first average."""
    task = dataclasses.replace(experiment.task, model=Pretrained(str(done)))
    still = dataclasses.replace(experiment, task=task, optimizer=AdamW(1e-9), steps=1, ema=None, evaluations=())
    found, wanted = train(still, tmp_path / "new").state.params["model"], kernels(done, "ema/0")["model"]
    for name in wanted:   # without those that were frozen
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found[name], wanted[name])


def test_runs_that_cannot(done, experiment, tmp_path, capsys):
    said = refused(capsys, "ema", done)
    assert said == "jaxgen: jaxgen ema needs the width of the average: --std 0.1\n"
    said = refused(capsys, "ema", done, "--std", "0.4", "--out", tmp_path / "new")
    assert said == "jaxgen: A relative standard deviation is above 0 and at most 0.2887, not 0.4.\n"
    said = refused(capsys, "ema", done, "--std", "0.1", "--step", "2", "--out", tmp_path / "new")
    assert said == (
        f"jaxgen: {done} has 1 checkpoint up to step 2, and an average is made of two or more; a larger "
        "checkpoint.keep keeps more\n"
    )
    other = tmp_path / "other"
    record.store(other, dataclasses.replace(experiment, ema=Ema()))
    said = refused(capsys, "ema", other, "--std", "0.1")
    assert said == (
        f"jaxgen: {other} keeps no power-function averages, of which others are made: its experiment needs "
        "ema=PowerEma()\n"
    )
