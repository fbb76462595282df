"""What a kill or a damaged file does to a run: never wrong values, never a lost run."""

import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.errors import UserError
from jaxgen.training.checkpoint import Checkpointing, Checkpoints


def make(step: int) -> dict:
    return {"params": {"x": jnp.arange(64.0).reshape(8, 8) + step}, "step": jnp.int32(step),
            "optimizer": {"mu": jnp.ones(8, jnp.bfloat16) * step}}


TARGET = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), make(0))


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Path:
    """Steps 1 and 2, whole."""
    directory = tmp_path_factory.mktemp("pristine")
    checkpoints = Checkpoints(directory)
    for step in (1, 2):
        checkpoints.save(step, make(step))
    checkpoints.wait()
    return directory


def newest_files(directory: Path) -> list[Path]:
    return sorted(path for path in (directory / "00000002").rglob("*") if path.is_file())


def flip(position: float, bit: int):
    def flip(path: Path) -> bool:
        data = bytearray(path.read_bytes())
        if not data:
            return False
        data[int(position * (len(data) - 1))] ^= 1 << bit
        path.write_bytes(data)
        return True
    return flip


def truncate(path: Path) -> bool:
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    return bool(data)


def delete(path: Path) -> bool:
    path.unlink()
    return True


def lengthen(path: Path) -> bool:
    path.write_bytes(path.read_bytes() + b"\n")
    return True


def empty(path: Path) -> bool:
    path.write_bytes(b"")
    return True


def replace_by_folder(path: Path) -> bool:
    path.unlink()
    path.mkdir()
    return True


def add_beside(path: Path) -> bool:
    (path.parent / "other").write_text("x")
    return True


HARMS = [flip(0, 0), flip(0.5, 3), flip(1, 7), truncate, delete, lengthen, empty, replace_by_folder, add_beside]


@pytest.mark.parametrize("harm", HARMS, ids=lambda harm: harm.__qualname__.split(".")[0])
def test_each_file_of_the_newest_step(pristine, tmp_path, harm):
    """The step before is used and the damage named, whichever file it is; nothing is found wrong where nothing is."""
    names = [path.relative_to(pristine) for path in newest_files(pristine)]
    assert len(names) > 12 and Path("00000002/manifest.json") in names
    directory = tmp_path / "run"
    shutil.copytree(pristine, directory)
    for name in names:
        assert harm(directory / name)
        said: list[str] = []
        step, state = Checkpoints(directory, report=said.append).restore(TARGET)
        assert step == 1, name
        assert all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(make(1)), strict=True))
        assert len(said) == 1 and said[0].startswith(f"Step 2 in {directory} is damaged: ")
        assert said[0].endswith("; step 1 is used instead.")
        assert harm is add_beside or str(Path(*name.parts[1:])) in said[0], said
        shutil.rmtree(directory / name) if harm is replace_by_folder else None
        (directory / name).parent.joinpath("other").unlink(missing_ok=True)
        shutil.copy(pristine / name, directory / name)
    assert Checkpoints(directory).find() == 2
    untouched: list[str] = []
    assert Checkpoints(pristine, report=untouched.append).restore(TARGET)[0] == 2 and not untouched


def test_flipped_bits_all_over_a_manifest(pristine, tmp_path):
    path = tmp_path / "run/00000002/manifest.json"
    shutil.copytree(pristine, tmp_path / "run")
    good = path.read_bytes()
    checkpoints = Checkpoints(tmp_path / "run")
    for position in range(0, len(good), 7):   # and so each bit of a byte in turn
        path.write_bytes(good[:position] + bytes([good[position] ^ 1 << position % 8]) + good[position + 1:])
        assert position % 70 or checkpoints.find("latest") == 1   # the whole search, which takes longer
        assert not _sound(path.parent)
    path.write_bytes(good)
    assert checkpoints.find("latest") == 2 and _sound(path.parent)


def _sound(folder: Path) -> bool:
    from etils import epath

    from jaxgen.training import manifest
    try:
        manifest.read(epath.Path(folder))
    except manifest.Damaged:
        return False
    return True


def test_a_damaged_step_asked_for_by_number_is_an_error(pristine, tmp_path):
    shutil.copytree(pristine, tmp_path / "run")
    data = max((tmp_path / "run/00000002/params").rglob("d/*"), key=lambda path: path.stat().st_size)
    flip(0.5, 0)(data)
    with pytest.raises(UserError, match="Step 2 in .* is damaged: the content of params/.* is not what was written"):
        Checkpoints(tmp_path / "run").restore(TARGET, 2)
    delete(data)
    with pytest.raises(UserError, match="Step 2 in .* is damaged: params/.* is missing; whole are steps 1"):
        Checkpoints(tmp_path / "run").restore(TARGET, 2)


def test_the_best_step_damaged_gives_way_to_the_next_best(tmp_path):
    said: list[str] = []
    checkpoints = Checkpoints(tmp_path, Checkpointing(best=3, metric="loss"), report=said.append)
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0)):
        checkpoints.save(step, make(step), {"loss": loss})
    checkpoints.wait()
    flip(0.5, 0)(next(path for path in newest_files(tmp_path) if "/d/" in str(path)))
    assert checkpoints.restore(TARGET, "best")[0] == 3 and "step 3 is used instead" in said[0]
    assert checkpoints.steps() == [1, 3]


def test_no_whole_step_left(pristine, tmp_path):
    """The run starts from the beginning, says why, and may save over what is damaged."""
    shutil.copytree(pristine, tmp_path / "run")
    for path in (tmp_path / "run").glob("*/_CHECKPOINT_METADATA"):
        flip(0.5, 1)(path)
    said: list[str] = []
    checkpoints = Checkpoints(tmp_path / "run", report=said.append)
    assert checkpoints.resume(TARGET) is None
    assert len(said) == 2 and all("damaged: the content of _CHECKPOINT_METADATA" in text for text in said)
    checkpoints.save(1, make(1))
    checkpoints.wait()
    assert checkpoints.steps() == [1] and checkpoints.verify(1) == ""


def test_the_run_goes_on_past_a_damaged_step(pristine, tmp_path):
    shutil.copytree(pristine, tmp_path / "run")
    flip(0.5, 0)(next(path for path in newest_files(tmp_path / "run") if "/d/" in str(path)))
    checkpoints = Checkpoints(tmp_path / "run", report=lambda text: None)
    assert checkpoints.restore(TARGET)[0] == 1
    checkpoints.save(2, make(2))
    checkpoints.wait()
    assert Checkpoints(tmp_path / "run").restore(TARGET)[0] == 2
    assert sorted(os.listdir(tmp_path / "run")) == ["00000001", "00000002"]


CHILD = """
    import os, shutil, signal, sys
    import jax.numpy as jnp
    from jaxgen.training import checkpoint, manifest
    from jaxgen.training.checkpoint import Checkpointing, Checkpoints

    def die(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGKILL)

    def make(step, size):
        return {"params": {"x": jnp.arange(64.0).reshape(8, 8) + step}, "optimizer": {"mu": jnp.ones(size) * step}}

    directory, moment = sys.argv[1:]
    checkpoints = Checkpoints(directory, Checkpointing(keep=1 if moment == "deleting" else 3))
    checkpoints.save(1, make(1, 8))
    checkpoints.wait()
    if moment == "before_manifest":
        manifest.write = die
    elif moment == "in_manifest":
        os.fsync = die
    elif moment == "before_rename":
        manifest.os.replace = die
    elif moment == "deleting":
        shutil.rmtree = die
    checkpoints.save(2, make(2, 20_000_000 if moment == "saving" else 8))
    if moment == "saving":
        die()
    checkpoints.wait()
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> dict[str, Path]:
    """Directories of runs killed with -9 at moments of their second save."""
    moments = ("saving", "before_manifest", "in_manifest", "before_rename", "deleting")
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "JAX_PLATFORMS": "cpu"}
    directories = {moment: tmp_path_factory.mktemp(moment) / "run" for moment in moments}
    python = [sys.executable, "-c", textwrap.dedent(CHILD)]
    children = [subprocess.Popen([*python, str(directory), moment], env=environment)
                for moment, directory in directories.items()]
    for process in children:
        assert process.wait(timeout=120) == -signal.SIGKILL
    return directories


@pytest.mark.parametrize("moment", ["saving", "before_manifest", "in_manifest", "before_rename", "deleting"])
def test_killed_at(killed, moment):
    """The newest whole step is found, with its values; the next writer clears what was left."""
    directory, step = killed[moment], 2 if moment == "deleting" else 1
    assert len(os.listdir(directory)) == 2   # something is left: the kill came at its moment
    checkpoints = Checkpoints(directory, report=lambda text: None)
    target = {"params": TARGET["params"], "optimizer": {"mu": jax.ShapeDtypeStruct((8,), jnp.float32)}}
    found, state = checkpoints.resume(target)
    assert found == step
    assert np.array_equal(state["params"]["x"], np.arange(64.0).reshape(8, 8) + step)
    assert np.array_equal(state["optimizer"]["mu"], np.ones(8) * step)
    checkpoints.save(3, state)
    checkpoints.wait()
    assert sorted(os.listdir(directory)) == [f"{n:08d}" for n in (step, 3)]
