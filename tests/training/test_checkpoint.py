"""Checkpoints: what is restored is what was saved, bit for bit, on any mesh; and what is kept."""

import errno
import functools
import os
import shutil
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxgen.errors import UserError
from jaxgen.training import checkpoint
from jaxgen.training.checkpoint import Checkpointing, Checkpoints

LOSS = "eval/heldout/loss"


@flax.struct.dataclass
class State:
    step: jax.Array
    key: jax.Array
    params: dict
    frozen: dict | None
    optimizer: dict


def make(seed: int = 0) -> State:
    """A state with each kind of leaf: bit patterns that a careless copy would change, None, tuples, optax states."""
    kernel = jax.random.normal(jax.random.key(seed), (16, 8))
    params = {"model": {"kernel": kernel.at[0, :3].set(jnp.array([jnp.nan, -0.0, jnp.inf])),
                        "scale": jax.random.normal(jax.random.key(seed + 1), (8,), jnp.bfloat16),
                        "held": None, "none": jnp.zeros((0, 3)), "a.b": jnp.ones(3), "a": {"b": jnp.zeros(3)}},
              "list": [jnp.arange(8, dtype=jnp.int32), (jnp.float32(2), jnp.uint32(4_000_000_000 + seed))]}
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)).init(params["model"])
    return State(jnp.int32(seed), jax.random.key_data(jax.random.key(seed)), params, None, {"model": optimizer})


def abstract(tree, sharding=None):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def mesh(**axes: int) -> Mesh:
    count = int(np.prod(list(axes.values())))
    assert len(jax.devices()) >= count, "these tests need eight simulated devices"
    return Mesh(np.array(jax.devices()[:count]).reshape(tuple(axes.values())), tuple(axes))


@pytest.fixture
def said():
    return []


@pytest.fixture
def open_(tmp_path, said):
    def open_(**options) -> Checkpoints:
        read_only = options.pop("read_only", False)
        return Checkpoints(tmp_path / "run", Checkpointing(**options), read_only=read_only, report=said.append)
    return open_


def filled(checkpoints: Checkpoints, *steps: int) -> Checkpoints:
    for step in steps:
        checkpoints.save(step, make(step))
    checkpoints.wait()
    return checkpoints


def test_restores_what_was_saved_bit_for_bit(open_):
    filled(open_(), 10, 20)
    step, state = open_().restore(abstract(make()))
    assert step == 20
    assert_same(state, make(20))
    assert_same(open_().restore(abstract(make()), 10)[1], make(10))
    assert_same(open_().restore(make(), "latest")[1], make(20))   # arrays as target
    on_host = open_().restore(jax.tree.map(np.asarray, make()))[1]
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(on_host))
    assert_same(on_host, jax.tree.map(np.asarray, make(20)))


def test_buffers_may_be_donated_as_soon_as_save_returns(open_):
    @functools.partial(jax.jit, donate_argnums=0)
    def overwrite(tree):
        return jax.tree.map(lambda x: x * 0 - 1, tree)

    values = np.arange(4_000_000, dtype=np.float32)   # large enough for the write to go on meanwhile
    for n, spec in enumerate((PartitionSpec(), PartitionSpec("data"))):
        state = {"a": {"x": jax.device_put(values, NamedSharding(mesh(data=4), spec))}}
        checkpoints = open_()
        checkpoints.restore(abstract(state)) if n else None
        checkpoints.save(n, state)
        assert checkpoints._thread is not None
        for _ in range(3):
            state = overwrite(state)
        jax.block_until_ready(state)
        checkpoints.wait()
        assert np.array_equal(checkpoints.restore(abstract(state))[1]["a"]["x"], values)


@pytest.mark.parametrize("axes, spec", [
    ({"data": 1}, ()), ({"data": 8}, ("data",)), ({"data": 2, "tensor": 2}, ("data", "tensor")),
    ({"tensor": 4, "data": 2}, (None, "tensor")), ({"data": 4}, ()),
])
def test_restores_onto_another_mesh_straight_into_its_shards(open_, axes, spec):
    saved = NamedSharding(mesh(fsdp=4, tensor=2), PartitionSpec("fsdp", "tensor"))
    value = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
    filled_ = open_()
    filled_.save(1, {"params": {"x": jax.device_put(value, saved)}})
    filled_.wait()
    sharding = NamedSharding(mesh(**axes), PartitionSpec(*spec))
    target = {"params": {"x": jax.ShapeDtypeStruct((16, 8), jnp.float32, sharding=sharding)}}
    x = open_().restore(target)[1]["params"]["x"]
    assert x.sharding == sharding
    assert {shard.data.shape for shard in x.addressable_shards} == {sharding.shard_shape((16, 8))}
    assert np.array_equal(x, value)


def test_a_part_is_read_alone(open_, tmp_path):
    filled(open_(), 1)
    shutil.rmtree(tmp_path / "run/00000001/optimizer")   # proof that it is not read
    checkpoints = open_(read_only=True)
    assert_same(checkpoints.restore(abstract(make().params), part="params")[1], make(1).params)
    assert_same(checkpoints.restore(abstract(make().params["model"]), part="params/model")[1], make(1).params["model"])
    assert_same(checkpoints.restore(abstract(make().params["list"][1][0]), part="params/list/1/0")[1], jnp.float32(2))
    assert checkpoints.restore({}, part="state") == (1, {})   # a state without leaves
    with pytest.raises(UserError, match="did you mean 'params/model'"):
        checkpoints.restore(abstract(make().params), part="params/modle")
    with pytest.raises(UserError, match="There is no whole checkpoint"):
        checkpoints.restore(abstract(make()))


def test_names_what_does_not_fit(open_):
    filled(open_(), 1)
    checkpoints = open_()
    target = abstract(make())

    def renamed(**changes):
        return target.replace(params=target.params | {"model": target.params["model"] | changes})

    model = dict(target.params["model"])
    model["kernle"] = model.pop("kernel")
    named = r"kernle is not in it; did you mean 'params/model/kernel'\?.*kernel is left over"
    with pytest.raises(UserError, match=named):
        checkpoints.restore(target.replace(params=target.params | {"model": model}))
    with pytest.raises(UserError, match=r"kernel has shape \(16, 8\) in it and \(8, 16\) here"):
        checkpoints.restore(renamed(kernel=jax.ShapeDtypeStruct((8, 16), jnp.float32)))
    half = renamed(kernel=jax.ShapeDtypeStruct((16, 8), jnp.bfloat16))
    with pytest.raises(UserError, match="kernel is float32 in it and bfloat16 here"):
        checkpoints.restore(half)
    cast = checkpoints.restore(half, cast=True)[1].params["model"]["kernel"]
    assert cast.dtype == jnp.bfloat16
    expected = make(1).params["model"]["kernel"].astype(jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(cast, np.float32), np.asarray(expected, np.float32))


def test_keeps_the_newest_and_the_best_over_restarts(open_):
    losses = {1: 5.0, 2: 1.0, 3: 4.0, 4: float("nan"), 5: 3.0, 6: 2.0, 7: 6.0}
    for step, loss in losses.items():
        checkpoints = open_(keep=2, best=2)   # a new start each time
        checkpoints.resume(abstract(make()))
        checkpoints.save(step, make(step), {LOSS: loss, "train/loss": jnp.float32(9)})
        checkpoints.wait()
    assert checkpoints.steps() == [2, 6, 7]
    assert checkpoints.find("best") == 2 and checkpoints.find("latest") == 7 and checkpoints.find(6) == 6
    assert checkpoints.metrics("best") == {LOSS: 1.0, "train/loss": 9.0}
    assert checkpoints.restore(abstract(make()), "best")[0] == 2
    assert open_(best=1, lower_is_better=False).find("best") == 7
    with pytest.raises(UserError, match=f"'eval/heldout/los'; did you mean '{LOSS}'"):
        open_(metric="eval/heldout/los").find("best")
    with pytest.raises(UserError, match="no step 5 in .*; there are steps 2, 6, 7"):
        checkpoints.restore(abstract(make()), 5)
    with pytest.raises(UserError, match="'newest' is no step"):
        checkpoints.find("newest")


def test_what_a_step_holds_is_known_without_reading_it(open_):
    checkpoints = filled(open_(), 1, 2)
    assert checkpoints.contents(part="params/model")["params/model/scale"] == jax.ShapeDtypeStruct((8,), jnp.bfloat16)
    assert len(checkpoints.checksum(1)) == 64 and checkpoints.checksum(1) != checkpoints.checksum(2)
    assert checkpoints.checksum(1) == open_().checksum(1)
    assert checkpoints.verify(1) == ""


def test_nothing_saved(open_):
    checkpoints = open_()
    assert checkpoints.steps() == [] and checkpoints.find("latest") is None and checkpoints.find("best") is None
    assert checkpoints.resume(abstract(make())) is None
    with pytest.raises(UserError, match="There is no whole checkpoint"):
        checkpoints.restore(abstract(make()))


def test_a_failed_save_is_told_by_the_next_and_costs_no_older_step(open_, monkeypatch):
    checkpoints = filled(open_(keep=1), 1)
    real = checkpoint.manifests.write

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint.manifests, "write", full)
    checkpoints.save(2, make(2))
    with pytest.raises(UserError, match="no space left on the device; the ones before are whole"):
        checkpoints.save(3, make(3))
    assert checkpoints.steps() == [1]
    monkeypatch.setattr(checkpoint.manifests, "write", lambda *args: 1 / 0)
    checkpoints.save(3, make(3))
    with pytest.raises(ZeroDivisionError):   # a bug is not dressed up
        checkpoints.wait()
    monkeypatch.setattr(checkpoint.manifests, "write", real)
    checkpoints.wait()   # told once
    filled(checkpoints, 4)
    assert checkpoints.steps() == [4]
    assert sorted(os.listdir(checkpoints.directory)) == ["00000004"]
    assert_same(open_().restore(abstract(make()))[1], make(4))


def test_going_back_abandons_the_later_steps_once_the_new_one_is_whole(open_, said, monkeypatch):
    filled(open_(keep=9), 10, 20, 30)
    checkpoints = open_(keep=9)
    checkpoints.restore(abstract(make()), 10)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.manifests, "write", lambda *args: 1 / 0)
        checkpoints.save(20, make(21))
        with pytest.raises(ZeroDivisionError):
            checkpoints.wait()
    assert checkpoints.steps() == [10]
    assert "00000020.abandoned" in os.listdir(checkpoints.directory)   # a person can still have it back
    checkpoints.save(20, make(21))
    checkpoints.wait()
    assert sorted(os.listdir(checkpoints.directory)) == ["00000010", "00000020"]
    assert_same(open_().restore(abstract(make()))[1], make(21))
    assert said == ["The run goes on from step 10; abandoned: steps 20, 30."]


def test_saving_where_the_run_is_changes_nothing(open_):
    filled(open_(), 10)
    before = {path: path.stat().st_mtime_ns for path in Path(open_().directory).rglob("*")}
    checkpoints = open_()
    _, state = checkpoints.restore(abstract(make()))
    checkpoints.save(10, state)
    checkpoints.wait()
    assert before == {path: path.stat().st_mtime_ns for path in Path(checkpoints.directory).rglob("*")}


def test_another_run_is_not_overwritten(open_):
    filled(open_(), 10, 20)
    checkpoints = open_()
    with pytest.raises(UserError, match="holds step 20 of a run, which step 5 of another would replace"):
        checkpoints.save(5, make(5))
    assert checkpoints.steps() == [10, 20]


def test_leftovers_go_at_the_next_start_of_a_writer_and_never_by_a_reader(open_, tmp_path):
    filled(open_(), 1)
    for name in ("00000002.orbax-checkpoint-tmp", "00000003", "notes"):
        (tmp_path / "run" / name).mkdir()
        (tmp_path / "run" / name / "file").write_text("x")

    def listing():
        return {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}

    before, reader = listing(), open_(read_only=True)
    reader.restore(abstract(make()))
    with pytest.raises(ValueError, match="read-only"):
        reader.save(4, make(4))
    with pytest.raises(ValueError, match="read-only"):
        reader.save_once("frozen", make(4))
    assert listing() == before
    writer = open_()
    writer.resume(abstract(make()))
    filled(writer, 4)
    assert sorted(os.listdir(tmp_path / "run")) == ["00000001", "00000004", "notes"]   # what is not ours stays


def test_what_is_frozen_is_saved_once(open_, tmp_path, said):
    tree = make(3).params
    assert open_().save_once("frozen", tree) is True
    manifest = tmp_path / "run/frozen/manifest.json"
    before = manifest.read_bytes()
    assert open_().save_once("frozen", tree) is False
    assert manifest.read_bytes() == before
    assert_same(open_().restore_once("frozen", abstract(tree)), tree)
    assert_same(open_().restore_once("frozen", abstract(tree["model"]), part="model"), tree["model"])
    with pytest.raises(UserError, match="holds something else than is to be saved: other is not in it"):
        open_().save_once("frozen", {"other": jnp.ones(2)})
    with pytest.raises(UserError, match="There is no 'teacher'"):
        open_().restore_once("teacher", abstract(tree))
    filled(open_(), 1)
    assert open_().steps() == [1]
    victim = next(path for path in (tmp_path / "run/frozen").rglob("d/*") if path.is_file())
    victim.write_bytes(victim.read_bytes()[:-1])
    with pytest.raises(UserError, match="'frozen' in .* is damaged: .* bytes instead of"):
        open_().restore_once("frozen", abstract(tree))
    assert open_().save_once("frozen", tree) is True and "written again" in said[-1]
    assert_same(open_().restore_once("frozen", abstract(tree)), tree)


def test_a_file_where_the_directory_should_be(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="a file stands where a directory should"):
        Checkpoints(tmp_path / "file" / "run").save(1, make())
    with pytest.raises(UserError, match="a file stands where a directory should"):
        Checkpoints(tmp_path / "file").save(1, make())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_that_may_not_be_written(tmp_path):
    (tmp_path / "run").mkdir(mode=0o500)
    with pytest.raises(UserError, match="writing there is not permitted"):
        Checkpoints(tmp_path / "run").save(1, make())


def test_policy_is_checked():
    with pytest.raises(UserError, match="checkpoint.keep is 0; it must be at least 1"):
        Checkpointing(keep=0)
    assert not checkpoint.reached_preemption(1)


ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "JAX_PLATFORMS": "cpu"}


def child(source: str, *args) -> subprocess.Popen:
    """A Python process that runs `source` with this checkout."""
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(source), *map(str, args)], env=ENVIRONMENT,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_a_full_disk_ends_in_one_sentence_and_older_steps_are_whole(tmp_path):
    source = """
        import subprocess, sys
        import numpy as np
        from jaxgen.errors import UserError
        from jaxgen.training.checkpoint import Checkpoints, Checkpointing
        if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", sys.argv[1]]).returncode:
            sys.exit(77)
        checkpoints = Checkpoints(sys.argv[1] + "/run")
        value = np.random.default_rng(0).normal(size=200_000)
        checkpoints.save(1, {"params": {"x": value}})
        try:
            checkpoints.save(2, {"params": {"x": np.tile(value, 2)}})   # 3.2 MB of noise
            checkpoints.wait()
        except UserError as error:
            print(error)
        state = checkpoints.restore({"params": {"x": value}})[1]
        print(checkpoints.steps(), np.array_equal(state["params"]["x"], value))
        checkpoints.save(3, {"params": {"x": value[:9]}})   # what was half written is gone again
        checkpoints.wait()
        print(checkpoints.steps())
    """
    unshare = ["unshare", "--mount"] + ["--map-root-user"] * (os.geteuid() != 0)
    if not shutil.which("unshare") or subprocess.run([*unshare, "true"], capture_output=True).returncode:
        pytest.skip("needs a mount namespace")
    run = subprocess.run([*unshare, sys.executable, "-c", textwrap.dedent(source), tmp_path], text=True,
                         capture_output=True, env=ENVIRONMENT)
    if run.returncode == 77:
        pytest.skip("needs to mount a small file system")
    told, whole, after = run.stdout.splitlines()
    assert told == (f"A checkpoint could not be saved in {tmp_path}/run: there is no space left on the device; "
                    "the ones before are whole.")
    assert whole == "[1] True" and after == "[1, 3]"
    assert "Traceback" not in run.stderr, run.stderr


def test_two_processes_save_and_restore_as_one(tmp_path, open_):
    """Two of four devices write one step, and each reads half of it to verify; one of eight devices reads it too."""
    source = """
        import os, sys
        import jax, numpy as np
        jax.config.update("jax_num_cpu_devices", 4)
        jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
        from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
        from jaxgen.training.checkpoint import Checkpoints, Checkpointing, reached_preemption
        mesh = Mesh(np.array(jax.devices()), ("data",))
        value = np.arange(64, dtype=np.float32).reshape(8, 8)
        def make(n, spec):
            place = lambda x, spec: jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), lambda i: x[i])
            return {"params": {"x": place(value + n, spec)}, "step": place(np.int32(n), P())}
        said = []
        checkpoints = Checkpoints(sys.argv[3], Checkpointing(keep=2), report=said.append)
        checkpoints.save_once("frozen", make(7, P("data")))
        for n in (1, 2, 3):
            checkpoints.save(n, make(n, P("data")))
            checkpoints.wait()
        assert checkpoints.steps() == [2, 3], checkpoints.steps()
        jax.experimental.multihost_utils.sync_global_devices("saved")
        if jax.process_index() == 0:   # one file of the newest step, which one process alone reads
            path = next(checkpoints.directory.joinpath("00000003", "params", "d").iterdir())
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 1
            path.write_bytes(bytes(data))
        jax.experimental.multihost_utils.sync_global_devices("damaged")
        target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
                              make(0, P(None, "data")))
        checkpoints = Checkpoints(sys.argv[3], Checkpointing(keep=2), report=said.append)
        step, state = checkpoints.resume(target)
        assert step == 2, step
        for shard in state["params"]["x"].addressable_shards:
            assert np.array_equal(np.asarray(shard.data), (value + 2)[shard.index])
        assert len(said) == 1 - jax.process_index(), said
        checkpoints.restore_once("frozen", target)
        checkpoints.save(4, state)
        checkpoints.wait()
        assert not reached_preemption(4)
        print("good", flush=True)
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    both = [child(source, address, index, tmp_path / "run") for index in (0, 1)]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in both]
    finally:
        for process in both:
            process.kill()
    assert [process.returncode for process in both] == [0, 0], "\n".join(outputs)
    target = {"params": {"x": jax.ShapeDtypeStruct((8, 8), jnp.float32)}, "step": jax.ShapeDtypeStruct((), jnp.int32)}
    sharding = NamedSharding(mesh(data=4, tensor=2), PartitionSpec("tensor", "data"))
    target["params"]["x"] = jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=sharding)
    step, state = open_().restore(target)
    assert step == 4 and np.array_equal(state["params"]["x"], np.arange(64).reshape(8, 8) + 2)
