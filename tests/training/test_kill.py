"""A run killed with -9 goes on by itself, and every loss is that of a run that was never cut off, bit for bit."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

EXPERIMENT = """
from jaxgen.data import Bytes, Text
from jaxgen.evaluation.heldout import HeldOut
from jaxgen.experiment import Experiment
from jaxgen.models.gpt import GPT
from jaxgen.tasks.language import LanguageModel
from jaxgen.training.checkpoint import Checkpointing
from jaxgen.training.ema import Ema
from jaxgen.training.metrics import Logging
from jaxgen.training.optimizers import AdamW

experiment = Experiment(
    name="killed",
    task=LanguageModel(GPT(vocab_size=264, depth=2, width=32, heads=2, max_length=32, dropout=0.1)),
    data=Text(path={path!r}, tokenizer=Bytes(), length=32, heldout_by="tail", heldout=0.1),
    optimizer=AdamW(learning_rate=1e-3),
    batch_size=4,
    steps=30,
    ema=Ema(0.9),
    evaluations=(HeldOut(every=10),),
    checkpoint=Checkpointing(every=5, keep=2),
    log=Logging(every=1, tensorboard=False),
)
"""

# Sends itself SIGKILL at a chosen moment.
KILL = {
    "in a step": """
        from jaxgen.training import loop
        real = loop._Meter.step
        def step(self, number, metrics):
            real(self, number, metrics)
            if number == 13:
                die()
        loop._Meter.step = step
    """,
    "in a save": """
        import orbax.checkpoint as ocp
        real = ocp.AsyncCheckpointer.save
        def save(self, folder, *args, **kwargs):
            real(self, folder, *args, **kwargs)
            if folder.name == "00000010":
                die()   # while the writing goes on in the background
        ocp.AsyncCheckpointer.save = save
    """,
    "between data and manifest": """
        from jaxgen.training import manifest
        real = manifest.write
        def write(folder, step, *args):
            if step == 10:
                die()
            return real(folder, step, *args)
        manifest.write = write
    """,
}
HEAD = """
import os, signal, sys
def die():
    os.kill(os.getpid(), signal.SIGKILL)
"""
TAIL = """
from jaxgen.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def run(directory: Path, *args: str, kill: str = "") -> subprocess.CompletedProcess:
    program = HEAD + textwrap.dedent(KILL[kill] if kill else "") + TAIL
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
    command = [sys.executable, "-c", program, "train", str(directory / "experiment.py"), *args]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=directory)


def losses(directory: Path) -> list[tuple]:
    """(step, name, value) of every loss of a run, as written."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], name, value) for line in lines for name, value in line.items() if name.endswith("/loss")]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("kill")
    text = "".join(f"{i} is {i * i} squared, and {i**3} cubed.\n" for i in range(400))
    (directory / "text.txt").write_text(text)
    (directory / "experiment.py").write_text(EXPERIMENT.format(path=str(directory / "text.txt")))
    done = run(directory, "--run-dir", "whole")
    assert done.returncode == 0, done.stderr
    return directory


@pytest.mark.experiments
@pytest.mark.parametrize("moment", KILL)
def test_goes_on_bit_for_bit(place, moment):
    name = moment.replace(" ", "-")
    killed = run(place, "--run-dir", name, kill=moment)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    done = run(place, "--run-dir", name)
    assert done.returncode == 0, done.stderr
    assert "resumed" in done.stderr
    assert losses(place / name) == losses(place / "whole")
    assert len(losses(place / name)) == 33
    assert not list((place / name / "checkpoints").glob("*tmp*"))


@pytest.mark.experiments
def test_sigterm_saves_and_leaves(place):
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
    program = HEAD + textwrap.dedent(KILL["in a step"]).replace("die()", "os.kill(os.getpid(), signal.SIGTERM)") + TAIL
    command = [sys.executable, "-c", program, "train", str(place / "experiment.py"), "--run-dir", "terminated"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=place)
    assert done.returncode == 75, done.stderr
    done = run(place, "--run-dir", "terminated")
    assert done.returncode == 0 and "at step 1" in done.stderr, done.stderr
    assert losses(place / "terminated") == losses(place / "whole")
