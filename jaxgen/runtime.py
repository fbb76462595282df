"""What must be decided before JAX starts: platform, flags, caches, simulated devices, and several processes.

Imports no JAX at the top. A variable that the user has set is never changed.
"""

import contextlib
import ctypes
import hashlib
import importlib.metadata
import importlib.util
import logging
import os
import platform
import sys
from glob import glob
from pathlib import Path

from jaxgen.errors import UserError


def cache_dir() -> Path:
    """The per-user cache: `$JAXGEN_CACHE`, else `$XDG_CACHE_HOME/jaxgen`, else `~/.cache/jaxgen`."""
    if own := os.environ.get("JAXGEN_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "jaxgen"


def prepare(devices: int | None = None) -> None:
    """Sets the environment for JAX; call it before JAX is imported.

    `devices` (or `$JAXGEN_CPU_DEVICES`) simulates that many devices on the CPU.
    """
    if devices is not None and devices < 1:
        raise UserError(f"--devices is {devices}, which should be at least 1")
    if devices := devices or _number("JAXGEN_CPU_DEVICES"):
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        os.environ["JAX_NUM_CPU_DEVICES"] = str(devices)
    if not (has_gpu() or has_tpu()):
        if importlib.util.find_spec("libtpu"):   # which otherwise looks for chips, and prints that it found none
            os.environ.setdefault("JAX_PLATFORMS", "cpu")
        # a fusion that costs convolutions and attention up to half their speed
        add_flags(xla_cpu_experimental_ynn_fusion_type="")
        _keep_memory()
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache_dir() / "xla" / machine()))
    if "jax" in sys.modules:   # which has read the variable already
        import jax

        if jax.config.jax_compilation_cache_dir is None:
            jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    _quiet()


def start() -> None:
    """Joins the other processes of the run, where the environment tells of any, and has JAX run on the main thread what
    runs on one CPU device (see `_keep_memory`).

    Knows JAX_COORDINATOR_ADDRESS with JAX_NUM_PROCESSES and JAX_PROCESS_ID, Slurm, and Cloud TPU slices.
    """
    import jax

    if not (has_gpu() or has_tpu()):
        jax.config.update("jax_cpu_enable_async_dispatch", False)
    if jax.distributed.is_initialized():
        return
    if address := os.environ.get("JAX_COORDINATOR_ADDRESS"):
        jax.distributed.initialize(address, _number("JAX_NUM_PROCESSES"), _number("JAX_PROCESS_ID"))
    elif (_number("SLURM_STEP_NUM_TASKS") or 1) > 1 and "SLURM_PROCID" in os.environ:
        jax.distributed.initialize()
    elif has_tpu() and importlib.util.find_spec("libtpu") and os.environ.get("JAX_PLATFORMS", "tpu").startswith("tpu"):
        try:
            jax.distributed.initialize()
        except ValueError:   # one host on its own, with nobody to ask about others
            pass
    if has_gpu() and "JAX_PLATFORMS" not in os.environ and jax.default_backend() == "cpu":
        print("this JAX cannot use the GPU of this machine: pip install 'jaxgen[cuda]' for NVIDIA's", file=sys.stderr)


def _number(name: str) -> int | None:
    """The variable's value; None where it is not set."""
    text = os.environ.get(name, "")
    if text and not text.isdecimal():
        raise UserError(f"{name} is {text!r}, which should be a number")
    return int(text) if text else None


def has_gpu() -> bool:
    """Whether this machine shows an NVIDIA or AMD GPU."""
    return bool(glob("/dev/nvidia[0-9]*") or os.path.exists("/dev/kfd"))


def has_tpu() -> bool:
    """Whether this machine shows TPU chips (`/dev/accel*`, or `/dev/vfio/*` with Google's PCI vendor)."""
    if glob("/dev/accel[0-9]*"):
        return True
    if not glob("/dev/vfio/[0-9]*"):
        return False
    for file in glob("/sys/bus/pci/devices/*/vendor"):
        try:
            if Path(file).read_text().strip() == "0x1ae0":
                return True
        except OSError:
            continue
    return False


def machine() -> str:
    """A name for the kind of this CPU: machines that share a home directory do not share programs compiled for one."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        features = next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        features = platform.processor()
    return f"{platform.machine()}-{hashlib.sha256(features.encode()).hexdigest()[:8]}"


FLAGS = {
    "--xla_cpu_experimental_ynn_fusion_type": {(0, 10)},
    "--xla_cpu_use_fusion_emitters": {(0, 10)},
    "--xla_backend_optimization_level": {(0, 10), (0, 12)},
    "--xla_llvm_disable_expensive_passes": {(0, 10), (0, 12)},
    "--xla_cpu_parallel_codegen_split_count": {(0, 10), (0, 12)},
}
"""Versions of jaxlib that are known to have a flag of XLA: an unknown one ends the process."""


def add_flags(**values: str) -> None:
    """Adds to XLA_FLAGS what this version knows and the user has not set."""
    flags = os.environ.get("XLA_FLAGS", "").split()
    given = {flag.partition("=")[0] for flag in flags}
    wanted = {f"--{name}": value for name, value in values.items()}
    if new := [f"{k}={v}" for k, v in wanted.items() if k not in given and _jax_version() in FLAGS[k]]:
        os.environ["XLA_FLAGS"] = " ".join(flags + new)


def _keep_memory() -> None:
    """Lets the process keep the memory it frees. XLA's CPU client takes and gives back each step's buffers, and glibc
    returns those to the system, which then clears every page again: a fifth of the time of a step.

    What is taken on the main thread comes from a heap that is kept, so `start` has the steps run there, not dispatched
    to another. Threads keep heaps of their own: in a common one they wait for each other, once compiling has cut it
    into pieces, half of the time.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: nothing outside of the heap
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: and none of it given back


def _jax_version() -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in importlib.metadata.version("jaxlib").split(".")[:2])
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return ()


def _quiet() -> None:
    """Keeps the libraries' notices off the console; their errors stay. Grain's workers need absl's flags parsed."""
    from absl import flags
    from absl import logging as absl_logging

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    absl_logging.set_verbosity(absl_logging.ERROR)
    for name in ("jax._src.xla_bridge", "orbax", "grain"):
        logging.getLogger(name).setLevel(logging.ERROR)
