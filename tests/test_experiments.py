"""Every experiment file: built, traced on its topology, its smoke form run; at length, trained and compiled."""

import dataclasses
import hashlib
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from jaxgen import record, runtime
from jaxgen.cli.show import chips
from jaxgen.evaluation.base import Setting
from jaxgen.evaluation.heldout import HeldOut
from jaxgen.experiment import load, resolve, train
from jaxgen.sharding import RULES, Mesh, Sharding, unbox
from jaxgen.training import metrics
from jaxgen.training.loop import program_of

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "experiments").glob("*/*.py"))
PLAIN = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}  # as a person's processes have it
LIBTPU = subprocess.run([sys.executable, "-c", "import libtpu"], capture_output=True).returncode == 0


@pytest.fixture(params=FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def file(request):
    return request.param


def test_is_described_and_recorded(file):
    module = load(file)
    assert re.search(r"jaxgen train|minutes", module.__doc__), "the docstring tells how to run it"
    assert module.experiment.topology and module.smoke.target is not None
    for form in (module.experiment, module.smoke):
        assert record.from_record(record.to_record(form)) == form
    assert type(module.smoke.task) is type(module.experiment.task)
    assert type(module.smoke.data) is type(module.experiment.data)


def test_a_loss_of_the_whole_batch_is_no_measurement(file):
    """It depends on the batch size, which is rounded for the devices at hand."""
    module = load(file)
    for form in (module.experiment, module.smoke):
        assert not (form.task.whole_batch and any(isinstance(e, HeldOut) for e in form.evaluations))


@pytest.mark.parametrize("name", ["vit/vit_s16_imagenet", "resnet/resnet50_imagenet"])
def test_imagenet_is_measured_as_in_the_papers(name):
    """The central 224 pixels of a picture whose shorter side is 256."""
    data = load(ROOT / "experiments" / f"{name}.py").experiment.data
    columns = np.tile(np.arange(256, dtype=np.uint8)[None, :, None], (300, 1, 3))
    row = data.view(columns)["image"][0, :, 0]
    np.testing.assert_array_equal(row, np.arange(16, 240))


@pytest.mark.experiments
def test_emoji_is_measured_by_all_that_pictures_and_texts_allow(tmp_path, monkeypatch):
    """Each evaluation of both forms on a small set with the columns of the real one."""
    lines = ["file\tcaption\tconcept\tgroup"]
    for i in range(60):
        Image.new("RGB", (72, 72), (4 * i, 0, 0)).save(tmp_path / f"{i}.png")
        lines.append(f"{i}.png\tthing {i} of many\tconcept {i // 2}\t{['Food & Drink', 'Flags'][i // 2 % 2]}")
    (tmp_path / "captions.tsv").write_text("\n".join(lines))
    monkeypatch.setenv("JAXGEN_CACHE", str(tmp_path / "cache"))
    module = load(ROOT / "experiments/clip/emoji.py")
    real = dataclasses.replace(module.smoke.data, path="captions.tsv", root=str(tmp_path), image="file", heldout=0.3)
    for form, data in ((module.experiment, real), (module.smoke, module.smoke.data)):
        task = module.smoke.task
        params, state = task.init(jax.random.key(0))
        spec = data.spec(8)
        setting = Setting(task, data.prepare(), Sharding(Mesh().build(jax.devices()[:1]), RULES), spec)
        found = {e.name: e.build(setting) for e in form.evaluations}
        assert {"retrieval", "zeroshot", "probe", "neighbours"} <= set(found)
        if data is real:
            reports = {name: measure(unbox(params), state, 0) for name, measure in found.items()}
            assert all(0 <= reports[name].metrics["top1"] <= 1 for name in ("zeroshot", "probe", "neighbours"))
            assert "2 classes" in reports["zeroshot"].texts["zeroshot"]


def test_traces_on_its_topology(file):
    """The whole step, by shapes alone, on an abstract mesh of the chips it is meant for."""
    experiment, _ = resolve(load(file).experiment, weights=False)
    program = program_of(experiment, chips(experiment.topology))
    state, found = jax.eval_shape(program._step, program.shapes, program.spec)
    for new, old in zip(jax.tree.leaves(state), jax.tree.leaves(program.shapes), strict=True):
        assert (new.shape, new.dtype) == (old.shape, old.dtype)
    losses = [value for name, value in found.items() if name.endswith("loss")]  # one for each player
    assert losses and all(value.shape == () for value in losses)
    assert program.batch_shardings


@pytest.mark.parametrize("devices", [1, pytest.param(8, marks=pytest.mark.experiments)])
def test_two_steps_of_the_smoke_form(file, devices, tmp_path, monkeypatch):
    smoke, _ = resolve(load(file).smoke, weights=False)  # a network of another file is trained at length
    data = math.gcd(smoke.batch_size // smoke.microbatches, devices)
    mesh = Mesh(data=data, tensor=devices // data)
    smoke = dataclasses.replace(smoke, steps=2, evaluations=(), mesh=mesh)
    few = jax.devices()[:devices]
    monkeypatch.setattr(jax, "devices", lambda: few)
    result = train(smoke, run_dir=tmp_path / "run")
    assert result.step == 2


@pytest.mark.experiments
def test_smoke_form_reaches_its_metric(file, tmp_path):
    """On one device, by the command that a person gives."""
    train = [sys.executable, "-m", "jaxgen.cli.main", "train"]
    command = [*train, str(file), "--smoke", "--run-dir", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, env=PLAIN | {"JAX_NUM_CPU_DEVICES": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    found = metrics.last(tmp_path / "run")
    assert load(file).smoke.target.reached(found), found
    assert list((tmp_path / "run" / "samples").iterdir())


COMPILE = """
import sys
import jax
from jax.experimental import topologies
from jaxgen.experiment import load, resolve
from jaxgen.training.loop import program_of

experiment, _ = resolve(load(sys.argv[1]).experiment, weights=False)
devices = topologies.get_topology_desc(platform="tpu", topology_name=experiment.topology).devices
lowered = program_of(experiment, devices).lower()
if sys.argv[2] == "hash":
    import hashlib
    print("hash", hashlib.sha256(lowered.as_text().encode()).hexdigest())
else:
    memory = lowered.compile().memory_analysis()
    print("GiB a device:", (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 2**30)
"""


@pytest.mark.experiments
@pytest.mark.skipif(not LIBTPU, reason="libtpu is not installed")
def test_full_form_compiles_for_its_topology(file):
    """Compiled ahead of time, which fails where it does not fit the memory; a program once compiled is not again."""
    environment = PLAIN | {"TPU_SKIP_MDS_QUERY": "1", "JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}

    def run(what: str) -> str:
        command = [sys.executable, "-c", COMPILE, str(file), what]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout.splitlines()[-1]

    version = subprocess.run(
        [sys.executable, "-c", "from importlib.metadata import version; print(version('libtpu'))"],
        capture_output=True, text=True,
    ).stdout  # fmt: skip
    known = runtime.cache_dir() / "compiled" / hashlib.sha256((run("hash") + version).encode()).hexdigest()
    if not known.exists():
        told = run("compile")
        known.parent.mkdir(parents=True, exist_ok=True)
        known.write_text(told)
    print(file.stem, known.read_text())
