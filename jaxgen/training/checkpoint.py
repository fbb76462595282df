"""Checkpoints of a run: written in the background, verified when read, never lost to a kill or a damaged file.

    checkpoints/00001000/               one step, written by Orbax, atomically
        params/ optimizer/ ... leaves/  one Orbax tree for each field of the state, so that weights can be read alone
        manifest.json                   written last: no sound manifest, not a whole step
    checkpoints/NAME/                   what is saved once a run (`save_once`), in the same form

Steps are kept by what their manifests say, so that a restarted run forgets nothing.
"""

import contextlib
import dataclasses
import errno
import itertools
import logging
import math
import os
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from jaxgen.errors import UserError, nearest
from jaxgen.training import leaves
from jaxgen.training import manifest as manifests
from jaxgen.training.manifest import Damaged, Manifest

Step = int | Literal["latest", "best"]

_ABANDONED = ".abandoned"
_TIMEOUT = 1200   # seconds for one save
_barriers = itertools.count()   # equal on all processes, which save the same things in the same order


@dataclasses.dataclass(frozen=True)
class Checkpointing:
    """When to save and what to keep: the newest `keep` steps, and the `best` ones by `metric`."""

    every: int = 1000                    # steps between two saves
    keep: int = 3                        # newest steps kept
    best: int = 1                        # best steps kept besides
    metric: str = "eval/heldout/loss"    # what best means; steps saved without it are not among them
    lower_is_better: bool = True

    def __post_init__(self):
        for name, least in (("every", 1), ("keep", 1), ("best", 0)):
            if getattr(self, name) < least:
                raise UserError(f"checkpoint.{name} is {getattr(self, name)}; it must be at least {least}.")


def reached_preemption(step: int) -> bool:
    """Whether all processes are to save at this step and leave: one of them got SIGTERM or a notice of maintenance.

    True at the same step on every process. Needs `jax.distributed`; a run of one process handles SIGTERM itself.
    """
    return jax.process_count() > 1 and ocp.multihost.reached_preemption(step)


class Checkpoints:
    """The checkpoints of one run in `directory` (local, or gs://): one writer, any number of `read_only` readers.

    Every process of the run makes the same calls in the same order. `report` is called with one sentence for each
    thing a person should know: a damaged step that was passed over, steps abandoned because the run went back.
    """

    def __init__(self, directory: str | epath.PathLike, policy: Checkpointing = Checkpointing(), *,
                 read_only: bool = False, report: Callable[[str], None] = lambda text: print(text, file=sys.stderr)):
        path = epath.Path(directory)
        self.directory = path if "://" in os.fspath(path) else path.expanduser().absolute()
        self.policy = policy
        self.read_only = read_only
        self.report = report if jax.process_index() == 0 else lambda message: None
        self._orbax: ocp.AsyncCheckpointer | None = None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._current: int | None = None        # the step last restored or saved: where the run is
        self._damaged: set[int] = set()         # steps found damaged by their content
        self._clean = False                     # leftovers of killed saves are gone

    # Writing

    def save(self, step: int, state: Any, metrics: Mapping[str, Any] | None = None) -> None:
        """Save `state` as `step` in the background: it is on the host when this returns, so its buffers may be donated.

        Waits for the save before. UserError: that one, or the start of this one, failed for want of space or of
        permission; the steps before are whole. Steps at or after `step`, from which the run went back by `restore` of
        an older one, are set aside, and deleted once this one is whole. `wait` before the program ends.
        """
        step = int(step)
        self._start_writing(step)
        if jax.process_index() == 0:
            with _explaining(self.directory):
                self._set_aside(step)
        if step != self._current:   # else nothing has changed since it was saved or restored
            self._write(f"{step:08d}", step, state, metrics or {})
        elif jax.process_index() == 0:
            self._retain()

    def wait(self) -> None:
        """Return once the save in the background is whole. Errors: those of `save`."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            # Orbax may still write to what failed: the next save or start clears it away, with another checkpointer.
            self._orbax, self._clean = None, False
            raise _explained(error, self.directory) from error

    close = wait

    def save_once(self, name: str, tree: Any) -> bool:
        """Save `tree` as `name` unless it is there, whole. Returns whether it was written. Blocks.

        UserError: `name` holds another tree.
        """
        folder = self._once(name)
        self._start_writing()
        if _agreed("yes" if folder.exists() else "") == "yes":
            problem = self._problem(folder)
            if not problem:
                if differing := leaves.differences(leaves.named(tree), manifests.read(folder).leaves):
                    raise UserError(f"{folder} holds something else than is to be saved: {differing}")
                return False
            self.report(f"'{name}' in {self.directory} is damaged: {problem}; it is written again.")
            if jax.process_index() == 0:
                _remove(folder)
        self._write(name, -1, tree, {})
        self.wait()
        return True

    def _start_writing(self, step: int | None = None) -> None:
        if self.read_only:
            raise ValueError(f"these checkpoints were opened read-only: {self.directory}")
        self.wait()
        if self._clean:
            return
        refused = ""
        if jax.process_index() == 0:
            try:
                with _explaining(self.directory):
                    self.directory.mkdir(parents=True, exist_ok=True)
                    self._remove_leftovers()
                    if step is not None and self._current is None:
                        self._refuse_another_run(step)
            except UserError as error:
                refused = str(error)
        if refused := _agreed(refused):
            raise UserError(refused)
        self._clean = step is not None

    def _write(self, name: str, step: int, tree: Any, metrics: Mapping[str, Any]) -> None:
        """Hand `tree` to Orbax, and to a thread what comes after: the manifest, then what need not be kept."""
        folder = self.directory / name
        held = leaves.named(tree)
        described = {name: leaves.described(leaf) for name, leaf in held.items()}
        measured = {name: _finite(value) for name, value in metrics.items()}
        barrier = f"jaxgen_manifest_{next(_barriers)}"
        self._orbax = orbax = self._orbax or _orbax()

        def finish() -> None:
            try:
                try:
                    orbax.wait_until_finished()
                    if jax.process_index() == 0:
                        manifests.write(folder, step, measured, described)
                        self._damaged.discard(step)
                        if step >= 0:
                            self._retain()
                finally:   # also after an error, so that no process waits in vain
                    ocp.multihost.get_barrier_sync_fn()(key=barrier, timeout_ms=1000 * _TIMEOUT)
                if not (folder / manifests.NAME).exists():
                    raise RuntimeError(f"process 0 could not finish {folder}")
                if step >= 0:
                    self._current = step
                    self._damaged.discard(step)
            except BaseException as error:   # told by the next save or wait
                self._error = error

        try:
            args = {item: ocp.args.PyTreeSave(tree) for item, tree in leaves.items(held).items()}
            orbax.save(folder, args=ocp.args.Composite(**args))
        except Exception as error:
            self._error = error
            self.wait()
        self._thread = threading.Thread(target=finish, name=f"checkpoint-{name}")
        self._thread.start()

    def _refuse_another_run(self, step: int) -> None:
        if later := [n for n in self.steps() if n >= step]:
            raise UserError(f"{self.directory} holds step {later[-1]} of a run, which step {step} of another would "
                            f"replace; resume that run, or choose another run directory.")

    def _set_aside(self, step: int) -> None:
        """Move steps at or after `step` out of sight: the run went back to one before them, or they are damaged."""
        later = [n for n in self._folders() if n >= step and n != self._current]
        for n in later:
            aside = self._folder(n, _ABANDONED)
            _remove(aside)
            self._folder(n).rename(aside)
        if later:
            self.report(f"The run goes on from step {self._current or 0}; abandoned: {_listed(later)}.")

    def _retain(self) -> None:
        """Delete what the policy does not keep. Called when the newest step is whole."""
        whole = self._whole()
        kept = set(list(whole)[-self.policy.keep:]) | set(self._ranked(whole)[:self.policy.best])
        for step in whole:
            if step not in kept:
                _remove(self._folder(step))
        for path in self.directory.iterdir():
            if re.fullmatch(rf"\d{{8,}}{_ABANDONED}", path.name):
                _remove(path)

    def _remove_leftovers(self) -> None:
        """Delete what killed saves left: Orbax's temporary folders, and steps without a manifest."""
        for path in self.directory.iterdir():
            cut_off = re.fullmatch(r"\d{8,}", path.name) and not (path / manifests.NAME).exists()
            if cut_off or re.fullmatch(r"[\w-]+\.orbax-checkpoint-tmp.*", path.name):
                _remove(path)

    # Finding

    def steps(self) -> list[int]:
        """The whole steps, ascending: a sound manifest, and all its files there with their sizes.

        Content is read by `restore` and `verify` alone; a step that they found damaged is no longer listed.
        """
        return list(self._whole())

    def find(self, step: Step = "latest") -> int | None:
        """The step that is meant, or None: nothing is saved yet. UserError: no such step, or none with the metric."""
        whole = self._whole()
        if step == "latest":
            return max(whole, default=None)
        if step == "best":
            ranked = self._ranked(whole)
            if whole and not ranked:
                known = {name for manifest in whole.values() for name in manifest.metrics}
                raise UserError(f"No step in {self.directory} was saved with the metric '{self.policy.metric}'"
                                f"{nearest(self.policy.metric, known) or f'; there are {sorted(known)}' * bool(known)}")
            return ranked[0] if ranked else None
        if isinstance(step, str):
            raise UserError(f"'{step}' is no step; it is 'latest', 'best' or a number.")
        if step not in self._folders():
            raise UserError(f"There is no step {step} in {self.directory}; there are {_listed(whole)}.")
        if step not in whole:
            try:
                manifests.check(self._folder(step), manifests.read(self._folder(step)))
                problem = "its content is not what was written"
            except Damaged as error:
                problem = str(error)
            raise UserError(f"Step {step} in {self.directory} is damaged: {problem}; whole are {_listed(whole)}.")
        return step

    def manifest(self, step: Step = "latest") -> Manifest:
        """The manifest of a step: metrics, leaves (name, shape, dtype), files; `.checksum` names its content."""
        if (found := self.find(step)) is None:
            raise UserError(f"There is no whole checkpoint in {self.directory}.")
        return manifests.read(self._folder(found))

    def metrics(self, step: Step = "latest") -> dict[str, float | None]:
        """What was measured at a step."""
        return self.manifest(step).metrics

    def checksum(self, step: Step = "latest") -> str:
        """SHA-256 that names the content of a step, for the record of where weights came from."""
        return self.manifest(step).checksum

    def contents(self, step: Step = "latest", part: str = "") -> dict[str, jax.ShapeDtypeStruct]:
        """Name -> shape and dtype of each leaf of a step below `part`."""
        return _shapes(leaves.below(self.manifest(step).leaves, part))

    def contents_once(self, name: str, part: str = "") -> dict[str, jax.ShapeDtypeStruct]:
        """As `contents`, of what `save_once` saved as `name`; empty where there is none."""
        folder = self._once(name)
        return _shapes(leaves.below(manifests.read(folder).leaves, part)) if folder.exists() else {}

    def _whole(self) -> dict[int, Manifest]:
        """The manifests of the whole steps, ascending."""
        whole = {}
        for step in self._folders():
            with contextlib.suppress(Damaged):
                if step not in self._damaged:
                    manifest = manifests.read(self._folder(step))
                    manifests.check(self._folder(step), manifest)
                    whole[step] = manifest
        return whole

    def _ranked(self, found: Mapping[int, Manifest]) -> list[int]:
        """Steps with the metric, best first; the newer of equals."""
        values = {step: manifest.metrics.get(self.policy.metric) for step, manifest in found.items()}
        sign = 1 if self.policy.lower_is_better else -1
        return sorted((n for n in values if values[n] is not None), key=lambda n: (sign * values[n], -n))

    def _folders(self) -> list[int]:
        if not self.directory.exists():
            return []
        return sorted(int(path.name) for path in self.directory.iterdir() if re.fullmatch(r"\d{8,}", path.name))

    def _folder(self, step: int, suffix: str = "") -> epath.Path:
        return self.directory / f"{step:08d}{suffix}"

    def _once(self, name: str) -> epath.Path:
        if not re.fullmatch(r"[A-Za-z][\w-]*", name):
            raise ValueError(f"a name of letters, digits, _ and - is wanted, not '{name}'")
        return self.directory / name

    # Reading

    def restore(self, target: Any, step: Step = "latest", part: str = "", cast: bool = False) -> tuple[int, Any]:
        """(step, state): a whole step, its content verified, in the structure, dtypes and shardings of `target`.

        target: pytree of jax.ShapeDtypeStruct with `.sharding` (each device reads its own shard), of arrays (restored
        like them), or without sharding (onto the first local device).
        part: only what stands below this path, such as "params" or "ema/model": `target` is that subtree, and the other
        fields of the state are not read. cast: convert a leaf of another dtype rather than refuse it.
        With "latest" and "best" a damaged step is reported and the next one used.
        UserError: no such step, a damaged one asked for by number, or a target whose leaves are not those saved.
        """
        found = self._restore(target, step, part, cast)
        if found is None:
            raise UserError(f"There is no whole checkpoint in {self.directory}.")
        return found

    def resume(self, target: Any) -> tuple[int, Any] | None:
        """`restore` of the latest whole step; None when there is none, and the run starts from the beginning."""
        return self._restore(target, "latest", "", False)

    def restore_once(self, name: str, target: Any, part: str = "", cast: bool = False) -> Any:
        """What `save_once` saved as `name`, verified, in the structure and shardings of `target`; see `restore`.

        UserError: it is missing or damaged, or its leaves are not those of `target`.
        """
        self.wait()
        folder = self._once(name)
        if _agreed("yes" if folder.exists() else "") != "yes":
            raise UserError(f"There is no '{name}' in {self.directory}.")
        if problem := self._problem(folder, part):
            raise UserError(f"'{name}' in {self.directory} is damaged: {problem}.")
        return _read(folder, target, part, cast)

    def verify(self, step: int) -> str:
        """What is wrong with a step, read whole; empty when nothing is."""
        return self._problem(self._folder(step))

    def _restore(self, target: Any, step: Step, part: str, cast: bool) -> tuple[int, Any] | None:
        self.wait()
        found = self.find(step)
        if step == "latest":   # those whose manifests are damaged too: a person should know
            order = self._folders()[::-1]
        elif step == "best":
            order = self._ranked(self._whole())
        else:
            order = [found]
        problems = []
        for n in map(int, _agreed(" ".join(map(str, order))).split()):
            if problem := self._problem(self._folder(n), part):
                problems.append(f"Step {n} in {self.directory} is damaged: {problem}")
                self._damaged.add(n)
                continue
            for message in problems:
                self.report(f"{message}; step {n} is used instead.")
            state = _read(self._folder(n), target, part, cast)
            if not part:
                self._current = n
            return n, state
        if not isinstance(step, str):
            raise UserError(f"{problems[0]}; whole are {_listed(self.steps())}.")
        for message in problems:
            self.report(f"{message}; there is no whole step before it.")
        return None

    def _problem(self, folder: epath.Path, part: str = "") -> str:
        """What is wrong with `folder`, or with what of it `part` needs; empty when nothing is.

        Each process reads its share of the files, and all get the same answer.
        """
        problem = ""
        try:
            manifest = manifests.read(folder)
            needed = {leaves.item(name) for name in leaves.below(manifest.leaves, part)}
            found = manifests.listed(folder, manifest)
            wanted = sorted(name for name in found if "/" not in name or name.split("/")[0] in needed)
            manifests.check(folder, manifest, wanted)
            mine = wanted[jax.process_index()::jax.process_count()]
            manifests.verify(folder, manifest, mine)
        except Damaged as error:
            problem = str(error)
        return next(filter(None, _gathered(problem)), "")


# Trees


def _shapes(saved: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    return {name: jax.ShapeDtypeStruct(tuple(leaf["shape"]), jnp.dtype(leaf["dtype"])) for name, leaf in saved.items()}


def _read(folder: epath.Path, target: Any, part: str, cast: bool) -> Any:
    """The tree below `part` of a verified folder, in the structure of `target`."""
    held = manifests.read(folder).leaves
    saved = leaves.below(held, part)
    if not saved and part and jax.tree.leaves(target):
        raise UserError(f"There is no '{part}' in {folder}{nearest(part, leaves.parts(held))}")
    wanted = {"/".join(filter(None, (part, name))): leaf for name, leaf in leaves.named(target).items()}
    if differing := leaves.differences(wanted, saved, dtypes=not cast):
        raise UserError(f"{folder} does not fit: {differing}")
    args = {item: ocp.args.PyTreeRestore(tree, jax.tree.map(leaves.restore_args, tree), partial_restore=True)
            for item, tree in leaves.items(wanted).items()}
    restored = _orbax().restore(folder, args=ocp.args.Composite(**args)) if args else {}
    values = [leaves.empty(leaf) if 0 in leaf.shape else leaves.pick(restored, name) for name, leaf in wanted.items()]
    return jax.tree.unflatten(jax.tree.structure(target), values)


def _orbax() -> ocp.AsyncCheckpointer:
    logging.getLogger("absl").addFilter(_told_by_wait)
    # Replicas share the writing of large arrays alone: cutting the small ones compiles a program for each shape.
    arrays = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=1 << 20)
    known = (np.ndarray, ocp.type_handlers.NumpyHandler()), (jax.Array, arrays)
    types = ocp.type_handlers.create_type_handler_registry(*known)
    handler, items = ocp.PyTreeCheckpointHandler(type_handler_registry=types), ocp.DefaultCheckpointHandlerRegistry()
    items.add(None, ocp.args.PyTreeSave, handler)
    items.add(None, ocp.args.PyTreeRestore, handler)
    return ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(handler_registry=items), timeout_secs=_TIMEOUT)


def _told_by_wait(record: logging.LogRecord) -> bool:
    """Drops the tracebacks that Orbax's threads log: `wait` raises the same errors."""
    return not (record.exc_info and "orbax" in record.pathname)


# Between processes


def _agreed(text: str) -> str:
    """The text of process 0, on every process."""
    if jax.process_count() == 1:
        return text
    return _decoded(multihost_utils.broadcast_one_to_all(_encoded(text)))


def _gathered(text: str) -> list[str]:
    """The text of each process, on every process."""
    if jax.process_count() == 1:
        return [text]
    return [_decoded(row) for row in multihost_utils.process_allgather(_encoded(text))]


def _encoded(text: str, size: int = 4096) -> np.ndarray:
    return np.frombuffer(text.encode()[:size].ljust(size, b"\0"), np.uint8)


def _decoded(row: Any) -> str:
    return bytes(np.asarray(row, np.uint8)).rstrip(b"\0").decode(errors="replace")


# Files and errors


def _remove(folder: epath.Path) -> None:
    """Delete a folder, its manifest first: what a kill leaves of it is not taken for a whole step."""
    (folder / manifests.NAME).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True) if "://" not in os.fspath(folder) else folder.rmtree(missing_ok=True)


@contextlib.contextmanager
def _explaining(directory: epath.Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise _explained(error, directory) from error


_CAUSES = (
    ("there is no space left on the device", errno.ENOSPC, "No space left on device"),
    ("the disk quota is used up", errno.EDQUOT, "Disk quota exceeded"),
    ("a file grew over the limit on file sizes", errno.EFBIG, "File too large"),
    ("writing there is not permitted", errno.EACCES, "Permission denied|PERMISSION_DENIED"),
    ("writing there is not permitted", errno.EPERM, "Operation not permitted"),
    ("the file system is read-only", errno.EROFS, "Read-only file system"),
    ("a file stands where a directory should", errno.ENOTDIR, "Not a directory"),
    ("a file stands where a directory should", errno.EEXIST, "File exists"),
)


def _explained(error: BaseException, directory: epath.Path) -> BaseException:
    """A UserError for what a person can mend; any other error as it is."""
    for cause, number, pattern in _CAUSES:
        if getattr(error, "errno", None) == number or re.search(pattern, str(error)):
            return UserError(f"A checkpoint could not be saved in {directory}: {cause}; the ones before are whole.")
    return error


def _finite(value: Any) -> float | None:
    value = float(value)
    return value if math.isfinite(value) else None


def _listed(steps: Iterable[int]) -> str:
    text = ", ".join(map(str, steps))
    return f"steps {text}" if text else "no steps"
