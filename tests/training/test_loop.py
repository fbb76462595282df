"""The loop: what it writes, how it goes on, and when it stops."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxgen import record
from jaxgen.data import Bytes, Text, batching
from jaxgen.errors import UserError
from jaxgen.evaluation.base import Evaluation, Report
from jaxgen.evaluation.heldout import HeldOut
from jaxgen.evaluation.preview import TextPreview
from jaxgen.experiment import Experiment, train
from jaxgen.models.gpt import GPT
from jaxgen.pretrained import Pretrained
from jaxgen.sharding import Mesh
from jaxgen.tasks.language import LanguageModel
from jaxgen.training import loop
from jaxgen.training.checkpoint import Checkpointing, Checkpoints
from jaxgen.training.ema import Ema
from jaxgen.training.metrics import Logging
from jaxgen.training.optimizers import AdamW
from jaxgen.training.parameters import merge


@dataclasses.dataclass(frozen=True)
class Breaking(LanguageModel):
    """Its loss is not a number from step `breaks` on."""

    breaks: int = 1 << 30

    def loss(self, params, batch, context):
        loss = super().loss(params, batch, context)
        return loss.replace(sum=jnp.where(context.train & (context.step >= self.breaks), jnp.nan, loss.sum))


@pytest.fixture(scope="module")
def experiment(tmp_path_factory) -> Experiment:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"{i} is {i * i} squared, and {i**3} cubed.\n" for i in range(400)))
    return Experiment(
        name="tiny",
        task=Breaking(GPT(vocab_size=264, depth=1, width=16, heads=2, max_length=32)),
        data=Text(path=str(path), tokenizer=Bytes(), length=32, heldout_by="tail", heldout=0.1),
        optimizer=AdamW(learning_rate=1e-2),
        batch_size=8,
        steps=12,
        ema=Ema(0.9),
        evaluations=(HeldOut(every=4), TextPreview(tokens=8)),
        checkpoint=Checkpointing(every=4, keep=2),
        log=Logging(every=1, tensorboard=False),
        max_skipped=3,
    )


@pytest.fixture(scope="module")
def done(experiment, tmp_path_factory):
    directory = tmp_path_factory.mktemp("run") / "tiny"
    return train(experiment, directory, profile=True)


def lines(directory) -> list[dict]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def losses(directory) -> list[tuple]:
    return [(n["step"], k, v) for n in lines(directory) for k, v in n.items() if k.endswith("/loss")]


@pytest.fixture
def copy(done, tmp_path):
    return shutil.copytree(done.directory, tmp_path / "tiny")


def test_metrics(done, experiment):
    found = lines(done.directory)
    assert [n["step"] for n in found if "train/loss" in n] == list(range(1, 13))
    assert [n["step"] for n in found if "eval/heldout/loss" in n] == [4, 8, 12]
    first, last = found[1], found[-1]
    wanted = {"loss", "gradient_norm", "learning_rate", "tokens_per_second", "step_seconds", "mfu", "data_wait_share"}
    assert {f"train/{name}" for name in wanted} <= set(first)
    assert first["train/mfu"] is None, "the peak of a CPU is unknown"
    assert first["train/learning_rate"] == pytest.approx(float(experiment.optimizer.rate(1, 12)))
    assert first["train/loss"] > last["eval/heldout/loss"] < np.log(264)
    nats, size = last["eval/heldout/loss"], done.metrics["eval/heldout/bits_per_byte"]
    assert last["eval/heldout/perplexity"] == pytest.approx(np.exp(nats))
    assert size == pytest.approx(nats / np.log(2), rel=0.01), "a byte a token, and one more for the end"


def test_run_directory(done):
    held = {path.name for path in done.directory.iterdir()}
    assert {"experiment.json", "run.json", "tokenizer", "metrics.jsonl", "samples", "checkpoints", "profile"} <= held
    assert list((done.directory / "profile").rglob("*.xplane.pb"))
    assert len((done.directory / "samples" / "00000012-preview.txt").read_text()) > 8
    assert json.loads((done.directory / "run.json").read_text())["versions"]["jax"] == jax.__version__


def test_a_finished_run_says_so(experiment, done, capfd):
    before = lines(done.directory)
    again = train(experiment, done.directory)
    assert "finished" in capfd.readouterr().err and again.step == 12
    assert lines(done.directory) == before


def test_goes_on_bit_for_bit(experiment, done, copy, capfd):
    shutil.rmtree(copy / "checkpoints" / "00000012")
    again = train(experiment, copy)
    assert "resumed" in capfd.readouterr().err
    assert losses(copy) == losses(done.directory)
    jax.tree.map(np.testing.assert_array_equal, again.state, done.state)


def test_goes_on_elsewhere_and_further(experiment, done, copy, capfd):
    more = dataclasses.replace(experiment, steps=14, mesh=Mesh(data=2, fsdp=2, tensor=2), log=Logging(1, False))
    train(more, copy)
    said = capfd.readouterr().err
    assert "steps (12, now 14)" in said and "mesh.fsdp (1, now 2)" in said
    assert [s for s, _, _ in losses(copy)] == [s for s, _, _ in losses(done.directory)] + [13, 14, 14]


def test_another_run_is_refused(experiment, done):
    other = dataclasses.replace(experiment, seed=1, batch_size=16)
    with pytest.raises(UserError, match=r"batch_size \(8, now 16\).*seed \(0, now 1\).*--run-dir"):
        train(other, done.directory)


def test_another_tokenizer_is_refused(experiment, done, tmp_path):
    small = dataclasses.replace(experiment, task=LanguageModel(experiment.task.model.clone(vocab_size=64)))
    with pytest.raises(UserError, match="tokenizer has 257 tokens.*vocab_size is 64"):
        train(small, tmp_path / "small")


def test_changed_data_is_refused(experiment, copy, tmp_path):
    text = tmp_path / "other.txt"
    text.write_text(open(experiment.data.path).read() + "one more line\n")
    shutil.rmtree(copy / "checkpoints" / "00000012")
    other = dataclasses.replace(experiment, data=dataclasses.replace(experiment.data, path=str(text)))
    with pytest.raises(UserError, match="data.path"):
        train(other, copy)
    text.write_text(open(experiment.data.path).read())
    assert train(other, copy).step == 12, "another path with the same content is taken"


def test_a_directory_without_a_step_is_begun_anew(experiment, tmp_path):
    """Here of a kernel that cannot run, and of weights that are not written."""
    task = dataclasses.replace(experiment.task, model=experiment.task.model.clone(kernel="splash"))
    wrong = dataclasses.replace(experiment, task=task)
    with pytest.raises(UserError, match="splash"):
        train(wrong, tmp_path / "run")
    record.store(tmp_path / "run", wrong)
    (tmp_path / "run" / "checkpoints" / "frozen").mkdir(parents=True)
    short = dataclasses.replace(experiment, steps=2, evaluations=())
    assert train(short, tmp_path / "run").step == 2
    with pytest.raises(UserError, match="task.model.kernel"):
        train(wrong, tmp_path / "run")


def test_steps_without_their_record_are_refused(experiment, copy):
    (copy / "experiment.json").unlink()
    with pytest.raises(UserError, match="has checkpoints, and no experiment.json"):
        train(experiment, copy)


def test_a_finished_run_needs_no_data(experiment, copy, monkeypatch, capfd):
    monkeypatch.setattr(Text, "prepare", lambda *_, **__: pytest.fail("data was read"))
    assert train(experiment, copy).step == 12 and "finished" in capfd.readouterr().err


@dataclasses.dataclass(frozen=True)
class Terminated(Evaluation):
    """Is asked to leave in the middle, the first time."""

    name: str = "terminated"

    def build(self, setting):
        def measure(params, state, step):
            if not asked:
                asked.append(step)
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.1)
                raise AssertionError("it went on")
            return Report({"found": float("nan")})

        return measure


asked = []


def test_sigterm_in_an_evaluation_saves_at_once(experiment, tmp_path, capfd):
    short = dataclasses.replace(experiment, steps=2, evaluations=(Terminated(),))
    assert train(short, tmp_path / "run", profile=True).preempted
    assert Checkpoints(tmp_path / "run" / "checkpoints", read_only=True).steps() == [2]
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb")), "a profile of a run that is short"
    result = train(short, tmp_path / "run")
    assert not result.preempted and result.metrics["eval/terminated/found"] is None
    assert "terminated/found: not finite" in capfd.readouterr().out


def test_the_last_step_is_in_the_metrics(experiment, tmp_path):
    short = dataclasses.replace(experiment, steps=5, evaluations=(), log=Logging(every=3, tensorboard=False))
    train(short, tmp_path / "run")
    assert [n["step"] for n in lines(tmp_path / "run")] == [3, 5]


def test_stops_when_the_loss_stays_not_finite(experiment, done, tmp_path):
    task = dataclasses.replace(experiment.task, breaks=5)
    broken = dataclasses.replace(experiment, task=task, evaluations=())
    with pytest.raises(UserError, match=f"not finite for 3 steps in a row, up to step 8.*{tmp_path}"):
        train(broken, tmp_path / "run")
    found = lines(tmp_path / "run")
    assert [n["train/skipped"] for n in found][-4:] == [0, 1, 2, 3]
    assert found[-1]["train/loss"] is None

    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints", read_only=True)
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), done.state.replace(frozen=None))
    states = {step: checkpoints.restore(target, step)[1] for step in checkpoints.steps()}
    assert list(states) == [4, 8] and states[8].optimizer["model"] != {}
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(states[8].params))
    moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), states[4].params, states[8].params)
    assert all(jax.tree.leaves(moved)), "step 5 was the last good one"


def test_unwritable_directory(experiment, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Cannot write the run directory"):
        train(experiment, tmp_path / "file" / "run")


def test_one_process_at_a_time(experiment, copy):
    hold = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print('held'); input()"
    command = [sys.executable, "-u", "-c", hold, str(copy / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="Another process is training in"):
            train(experiment, copy)
        other.communicate("\n")
    assert train(experiment, copy).step == experiment.steps


def test_a_source_without_the_step_leaves_no_run(experiment, done, tmp_path):
    tuned = dataclasses.replace(experiment, task=Breaking(Pretrained(str(done.directory), step="99")))
    with pytest.raises(UserError, match="There is no step 99"):
        train(tuned, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_weights_of_a_run_that_froze_some(experiment, tmp_path):
    """What did not move in the other run comes from where it is kept, and the rest from its step."""
    short = dataclasses.replace(experiment, steps=2, ema=None, evaluations=())
    short = dataclasses.replace(short, optimizer=AdamW(1e-2, freeze=("embedding",)))
    first = train(short, tmp_path / "first")
    assert jax.tree.leaves(first.state.frozen)
    tuned = dataclasses.replace(short, task=Breaking(Pretrained(str(first.directory))), optimizer=AdamW(0.0))
    second = train(tuned, tmp_path / "second")
    both = merge(first.state.params, first.state.frozen), second.state.params
    jax.tree.map(np.testing.assert_array_equal, *map(jax.device_get, both))


def test_damaged_metrics(experiment, copy):
    with open(copy / "metrics.jsonl", "ab") as file:
        file.write(b'5\n{}\n\xff\xfe\n{"step": 12, "train/lo')
    train(dataclasses.replace(experiment, steps=13), copy)
    assert [n["step"] for n in lines(copy) if "train/loss" in n] == list(range(1, 14))


def test_an_evaluation_that_a_preemption_left_out_is_made_up(experiment, done, tmp_path, monkeypatch, capfd):
    directory = tmp_path / "tiny"
    for step in (4, 6, 12):   # at an evaluation, between two, and at the end
        monkeypatch.setattr(loop, "reached_preemption", lambda n, step=step: n == step)
        assert train(experiment, directory).preempted
        assert [n for n, _, _ in losses(directory)][-1] == step
        assert not any(n["step"] == step for n in lines(directory) if "eval/heldout/loss" in n)
    monkeypatch.setattr(loop, "reached_preemption", lambda n: False)
    again = train(experiment, directory)
    assert not again.preempted and losses(directory) == losses(done.directory)
    name = "samples/00000012-preview.txt"
    assert (directory / name).read_text() == (done.directory / name).read_text()
    jax.tree.map(np.testing.assert_array_equal, again.state, done.state)

    capfd.readouterr()
    train(experiment, directory)
    assert "finished" in capfd.readouterr().err and losses(directory) == losses(done.directory), "once is enough"


def test_nothing_to_resume(experiment, tmp_path):
    with pytest.raises(UserError, match="no run"):
        train(experiment, tmp_path / "nothing", resume=True)


@dataclasses.dataclass(frozen=True)
class Shown(Evaluation):
    """Gives a picture."""

    name: str = "shown"

    def build(self, setting):
        return lambda params, state, step: Report({}, images={"shown": np.full((2, 3, 3), step, np.uint8)})


class Unreadable:
    """Data of which every third example, and all held-out ones, are told to be unreadable."""

    def __init__(self, data):
        self._data = data

    def __getattr__(self, name):
        return getattr(self._data, name)

    def batched(self, batch_size):
        return Unreadable(self._data.batched(batch_size))

    def train(self, seed):
        def read(example):
            if example["tokens"].sum() % 3 == 0:
                batching.skipped(f"example {example['tokens'].sum()}", "it is damaged", 1.0)
            return example

        return self._data.train(seed).map(read)

    def heldout(self):
        def read(example):
            batching.skipped("the held-out ones", "they are damaged", 1.0)
            return example

        return self._data.heldout().map(read)


@dataclasses.dataclass(frozen=True)
class Damaged(Text):
    def prepare(self, cache=None, progress=None):
        return Unreadable(super().prepare(cache, progress))


def test_pictures_and_what_could_not_be_read(experiment, tmp_path, capfd):
    data = Damaged(**{f.name: getattr(experiment.data, f.name) for f in dataclasses.fields(experiment.data)})
    log, evaluations = Logging(every=2, tensorboard=True), (Shown(every=2), HeldOut(every=2))
    told = dataclasses.replace(experiment, data=data, steps=4, evaluations=evaluations, log=log)
    found = train(told, tmp_path / "run")
    pictures = sorted((found.directory / "samples").iterdir())
    assert [picture.name for picture in pictures] == ["00000002-shown.png", "00000004-shown.png"]
    assert (np.asarray(Image.open(pictures[1])) == 4).all()
    assert any((found.directory / "tensorboard").iterdir())
    assert found.metrics["data/skipped"] > 3
    said = capfd.readouterr().err
    assert ": it is damaged" in said and said.count("skipped the held-out ones: they are damaged") == 1
