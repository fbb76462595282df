"""What is set before JAX starts."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from jaxgen import runtime
from jaxgen.errors import UserError


@pytest.fixture
def environment(monkeypatch):
    """An environment of the test's own: a machine with no accelerator, libtpu installed, and jax 0.10."""
    fresh = {"HOME": "/home/someone"}
    monkeypatch.setattr(os, "environ", fresh)
    monkeypatch.setattr(runtime, "has_gpu", lambda: False)
    monkeypatch.setattr(runtime, "has_tpu", lambda: False)
    monkeypatch.setattr(runtime, "_jax_version", lambda: (0, 10))
    monkeypatch.setattr(runtime.importlib.util, "find_spec", lambda name: object())
    return fresh


def test_cache_dir(environment):
    environment["XDG_CACHE_HOME"] = "/x"
    assert runtime.cache_dir() == Path("/x/jaxgen")
    environment["JAXGEN_CACHE"] = "/own"
    assert runtime.cache_dir() == Path("/own")


def test_cpu_where_there_is_no_accelerator(environment):
    runtime.prepare()
    assert environment["JAX_PLATFORMS"] == "cpu" and "ynn_fusion" in environment["XLA_FLAGS"]
    assert Path(environment["JAX_COMPILATION_CACHE_DIR"]).parent == runtime.cache_dir() / "xla"
    assert "JAX_NUM_CPU_DEVICES" not in environment


@pytest.mark.parametrize("chip", ["has_gpu", "has_tpu"])
def test_nothing_is_said_of_the_platform_where_there_is_one(environment, monkeypatch, chip):
    monkeypatch.setattr(runtime, chip, lambda: True)
    runtime.prepare()
    assert "JAX_PLATFORMS" not in environment and "XLA_FLAGS" not in environment


def test_platform_is_left_alone_without_libtpu(environment, monkeypatch):
    monkeypatch.setattr(runtime.importlib.util, "find_spec", lambda name: None)
    runtime.prepare()
    assert "JAX_PLATFORMS" not in environment


def test_the_users_own_settings_stay(environment):
    own = {"JAX_PLATFORMS": "tpu", "XLA_FLAGS": "--xla_cpu_experimental_ynn_fusion_type=2 --xla_dump_to=x",
           "JAX_COMPILATION_CACHE_DIR": "", "TF_CPP_MIN_LOG_LEVEL": "0", "GRPC_VERBOSITY": "INFO"}
    environment.update(own)
    runtime.prepare()
    assert {name: environment[name] for name in own} == own


def test_other_flags_of_the_user_stay(environment):
    environment["XLA_FLAGS"] = "--xla_dump_to=x"
    runtime.prepare()
    assert environment["XLA_FLAGS"].split() == ["--xla_dump_to=x", "--xla_cpu_experimental_ynn_fusion_type="]


def test_flag_is_not_set_for_unknown_versions(environment, monkeypatch):
    monkeypatch.setattr(runtime, "_jax_version", lambda: (0, 99))
    runtime.prepare()
    assert "XLA_FLAGS" not in environment


@pytest.mark.parametrize("gpu", [False, True])
def test_steps_run_on_the_main_thread_of_a_cpu(environment, monkeypatch, gpu):
    monkeypatch.setattr(runtime, "has_gpu", lambda: gpu)
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    settings = {}
    monkeypatch.setattr(jax.config, "update", settings.__setitem__)
    runtime.start()
    assert settings == ({} if gpu else {"jax_cpu_enable_async_dispatch": False})


def test_simulated_devices(environment):
    runtime.prepare(4)
    assert environment["JAX_NUM_CPU_DEVICES"] == "4" and environment["JAX_PLATFORMS"] == "cpu"
    environment["JAXGEN_CPU_DEVICES"] = "2"
    runtime.prepare()
    assert environment["JAX_NUM_CPU_DEVICES"] == "2"
    environment["JAXGEN_CPU_DEVICES"] = "two"
    with pytest.raises(UserError, match="JAXGEN_CPU_DEVICES is 'two'"):
        runtime.prepare()
    with pytest.raises(UserError, match="--devices is -1"):
        runtime.prepare(-1)


@pytest.mark.parametrize(
    ("variables", "calls"),
    [
        ({}, []),
        ({"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}, [("h:1", 2, 1)]),
        ({"JAX_COORDINATOR_ADDRESS": "h:1"}, [("h:1", None, None)]),
        ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "0"}, [()]),
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, []),
        ({"SLURM_NTASKS": "4"}, []),   # in an allocation, but not started by srun
    ],
)
def test_start_joins_what_the_environment_tells_of(environment, monkeypatch, variables, calls):
    import jax

    environment.update(variables)
    called = []
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: False)
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args: called.append(args))
    runtime.start()
    assert called == calls


def test_wrong_number_of_processes(environment):
    environment.update({"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "two"})
    with pytest.raises(UserError, match="JAX_NUM_PROCESSES is 'two', which should be a number"):
        runtime.start()


def test_two_processes_of_two_devices():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    code = (
        "from jaxgen import runtime; runtime.prepare(2); runtime.start(); import jax;"
        "print(jax.process_index(), jax.process_count(), jax.device_count(), jax.local_device_count())"
    )
    shared = {**os.environ, "JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": "2"}
    processes = [
        subprocess.Popen([sys.executable, "-c", code], env={**shared, "JAX_PROCESS_ID": str(i)}, text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for i in range(2)
    ]  # fmt: skip
    found = [process.communicate(timeout=100)[0].strip() for process in processes]
    assert found == ["0 2 4 2", "1 2 4 2"]
