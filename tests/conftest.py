"""Tests run on eight simulated CPU devices, with the jaxtyping shapes of signatures checked as they are called."""

import gc
import os
import re

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
gc.set_threshold(100_000, 50)  # tracing makes much, and little of it is garbage

from jaxgen.runtime import add_flags, cache_dir, machine  # noqa: E402

# Compiling takes a fifth of the time; what is trained at length, in processes of its own, does without.
add_flags(
    xla_backend_optimization_level="0",
    xla_llvm_disable_expensive_passes="true",
    xla_cpu_use_fusion_emitters="false",
    xla_cpu_parallel_codegen_split_count="1",
)
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache_dir() / "xla-tests" / machine()))

from jaxtyping import install_import_hook  # noqa: E402

_hook = install_import_hook(["jaxgen.nn", "jaxgen.models", "jaxgen.sampling"], "beartype.beartype")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """A file's tests go to one worker, which compiles what they share once; those of an experiment file likewise."""
    from xdist.scheduler import LoadScopeScheduling

    class Files(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            path, _, test = nodeid.partition("::")
            experiment = re.search(r"\[(\w+/\w+)", test)
            return f"{path}:{experiment[1]}" if experiment and path.endswith("test_experiments.py") else path

    return Files(config, log)


@pytest.fixture
def double():
    """JAX in float64."""
    import jax

    with jax.enable_x64(True):
        yield
