"""Two processes of four devices train, save and resume as one process of eight."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.training.test_kill import EXPERIMENT

MESH = ["--mesh.data", "2", "--mesh.fsdp", "2", "--mesh.tensor", "2", "--batch-size", "8"]


def start(directory: Path, processes: int, *args: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    running = []
    for index in range(processes):
        environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(8 // processes)}
        environment |= {"JAXGEN_CPU_DEVICES": str(8 // processes)}
        if processes > 1:
            environment |= {
                "JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(processes), "JAX_PROCESS_ID": str(index),
            }  # fmt: skip
        command = [sys.executable, "-m", "jaxgen.cli.main", "train", "experiment.py", *MESH, *args]
        running.append(subprocess.Popen(
            command, cwd=directory, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ))
    for process in running:
        out, _ = process.communicate(timeout=500)
        assert process.returncode == 0, out[-3000:]


def losses(directory: Path, name: str) -> dict[tuple, float]:
    lines = [json.loads(line) for line in (directory / name / "metrics.jsonl").read_text().splitlines()]
    return {(n["step"], k): v for n in lines for k, v in n.items() if k.endswith("/loss")}


@pytest.mark.experiments
def test_two_processes_are_as_one(tmp_path):
    text = "".join(f"{i} is {i * i} squared, and {i**3} cubed.\n" for i in range(400))
    (tmp_path / "text.txt").write_text(text)
    shown = "HeldOut(every=10), TextPreview(tokens=8, prompts=('1 is', 'and'))"
    code = EXPERIMENT.replace("HeldOut(every=10),", shown + ",").format(path=str(tmp_path / "text.txt"))
    (tmp_path / "experiment.py").write_text("from jaxgen.evaluation.preview import TextPreview\n" + code)
    start(tmp_path, 1, "--run-dir", "one")
    start(tmp_path, 2, "--run-dir", "two", "--steps", "30")
    one, two = losses(tmp_path, "one"), losses(tmp_path, "two")
    assert one.keys() == two.keys() and len(one) == 33
    np.testing.assert_allclose(list(two.values()), list(one.values()), rtol=1e-5)
    texts = [(tmp_path / name / "samples" / "00000030-preview.txt").read_text() for name in ("one", "two")]
    assert texts[0] == texts[1]

    # what two processes saved half-way, one goes on with, and the other way round
    start(tmp_path, 2, "--run-dir", "two-one", "--steps", "30", "--checkpoint.every", "15")
    import shutil

    for name, count in (("two-one", 1), ("one", 2)):
        directory = tmp_path / name
        for step in sorted((directory / "checkpoints").glob("0*"))[1:]:
            shutil.rmtree(step)
        kept = int(next((directory / "checkpoints").glob("0*")).name)
        assert kept < 30
        start(tmp_path, count, "--run-dir", name)
        found = losses(tmp_path, name)
        assert found.keys() == one.keys()
        np.testing.assert_allclose(list(found.values()), list(one.values()), rtol=1e-5)
