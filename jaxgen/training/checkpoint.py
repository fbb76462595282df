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

    def __init__(self, directory: str | epath.PathLike, policy: Checkpointing = Checkpointing(), *, read_only: bool = False,
                 report: Callable[[str], None] = lambda message: print(message, file=sys.stderr)):
        self.directory = epath.Path(directory).expanduser().absolute()
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

        Waits for the save before. UserError: that one or the start of this one failed for want of space or
        permission; the steps before are whole. Steps at or after `step` from which the run went back (by `restore` of
        an older one) are set aside, and deleted once this one is whole.
        """
        step = int(step)
        self._start_writing()
        if jax.process_index() == 0:
            self._set_aside(step)
        if step == self._current:   # nothing has changed since it was saved or restored
            if jax.process_index() == 0:
                self._retain()
            return
        self._write(f"{step:08d}", step, state, metrics or {})

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
        if _agreed("yes" if folder.exists() else "no") == "yes":
            problem = self._problem(folder)
            if not problem:
                if (differing := _differences(_named(tree), manifests.read(folder).leaves)):
                    raise UserError(f"{folder} holds something else than is to be saved: {differing}.")
                return False
            self.report(f"'{name}' in {self.directory} is damaged: {problem}; it is written again.")
            if jax.process_index() == 0:
                _remove(folder)
        self._write(name, -1, tree, {})
        self.wait()
        return True

    def _start_writing(self) -> None:
        if self.read_only:
            raise ValueError(f"these checkpoints were opened read-only: {self.directory}")
        self.wait()
        if jax.process_index() == 0:
            with _explaining(self.directory):
                self.directory.mkdir(parents=True, exist_ok=True)
                if not self._clean:
                    self._remove_leftovers()
        self._clean = True

    def _write(self, name: str, step: int, tree: Any, metrics: Mapping[str, Any]) -> None:
        leaves = _named(tree)
        folder = self.directory / name
        described = {name: {"shape": list(leaf.shape), "dtype": str(leaf.dtype)} for name, leaf in leaves.items()}
        measured = {name: _finite(value) for name, value in metrics.items()}
        barrier = f"jaxgen_manifest_{next(_barriers)}"
        self._orbax = self._orbax or _orbax()
        orbax = self._orbax
        items = {item: ocp.args.PyTreeSave(tree) for item, tree in _items(leaves).items()}

        def finish() -> None:
            try:
                try:
                    orbax.wait_until_finished()
                    if jax.process_index() == 0:
                        manifests.write(folder, step, measured, described)
                finally:
                    ocp.multihost.get_barrier_sync_fn()(key=barrier, timeout_ms=1000 * _TIMEOUT)
                if not (folder / manifests.NAME).exists():
                    raise RuntimeError(f"process 0 could not finish {folder}")
                if step >= 0:
                    self._current = step
                    self._damaged.discard(step)
                    if jax.process_index() == 0:
                        self._retain()
            except BaseException as error:   # told by the next save or wait
                self._error = error

        try:
            orbax.save(folder, args=ocp.args.Composite(**items))
        except Exception as error:
            self._error = error
            self.wait()
        self._thread = threading.Thread(target=finish, name=f"checkpoint-{name}")
        self._thread.start()

    def _set_aside(self, step: int) -> None:
        """Move steps at or after `step` out of sight: the run went back to one before them."""
        later = [n for n in self._folders() if n >= step and n != self._current]
        if self._current is None and (whole := [n for n in self.steps() if n in later]):
            raise UserError(f"{self.directory} already holds step {whole[-1]} of a run, and step {step} of another would "
                            f"replace it; resume that run, or choose another run directory.")
        for n in later:
            folder, aside = self._folder(n), self._folder(n, _ABANDONED)
            if aside.exists():
                _remove(aside)
            folder.rename(aside)
        if later:
            self.report(f"The run goes on from step {self._current or 0}: "
                        f"step{'s' * (len(later) > 1)} {', '.join(map(str, later))} are abandoned.")

    def _retain(self) -> None:
        """Delete what the policy does not keep. Called when the newest step is whole."""
        found = {step: manifests.read(self._folder(step)) for step in self.steps()}
        kept = set(sorted(found)[-self.policy.keep:]) | set(self._ranked(found)[:self.policy.best])
        for step in found:
            if step not in kept:
                _remove(self._folder(step))
        for path in self.directory.iterdir():
            if path.name.endswith(_ABANDONED):
                _remove(path)

    def _remove_leftovers(self) -> None:
        """Delete what killed saves left: Orbax's temporary folders, and folders without a manifest."""
        if not self.directory.exists():
            return
        for path in self.directory.iterdir():
            if path.is_dir() and not path.name.endswith(_ABANDONED) and not (path / manifests.NAME).exists():
                _remove(path)

    # Finding

    def steps(self) -> list[int]:
        """The whole steps, ascending: a sound manifest, and all its files there with their sizes. Content is verified by
        `restore` and `verify`; a step whose content they found damaged is no longer listed."""
        return [step for step in self._folders() if step not in self._damaged and not self._problem(self._folder(step), content=False)]

    def find(self, step: Step = "latest") -> int | None:
        """The step that is meant, or None: nothing is saved yet. UserError: no such step, or none with the metric."""
        steps = self.steps()
        if step == "latest":
            return steps[-1] if steps else None
        if step == "best":
            if not steps:
                return None
            ranked = self._ranked({n: manifests.read(self._folder(n)) for n in steps})
            if not ranked:
                raise UserError(f"No step in {self.directory} was saved with the metric '{self.policy.metric}'"
                                f"{nearest(self.policy.metric, self.metrics(steps[-1]))}")
            return ranked[0]
        if isinstance(step, str):
            raise UserError(f"'{step}' is no step; it is 'latest', 'best' or a number.")
        if step not in steps:
            folder = self._folder(step)
            if folder.exists():
                problem = self._problem(folder, content=False) or "its content is not what was written"
                raise UserError(f"Step {step} in {self.directory} is damaged: {problem}; whole are {_listed(steps)}.")
            raise UserError(f"There is no step {step} in {self.directory}; there are {_listed(steps)}.")
        return step

    def manifest(self, step: Step = "latest") -> Manifest:
        """The manifest of a step: metrics, leaves (name, shape, dtype), files, and `.checksum`, which names its content."""
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
        return {name: jax.ShapeDtypeStruct(tuple(leaf["shape"]), jnp.dtype(leaf["dtype"]))
                for name, leaf in _below(self.manifest(step).leaves, part).items()}

    def _ranked(self, found: Mapping[int, Manifest]) -> list[int]:
        """Steps with the metric, best first; the newer of equals."""
        values = {step: manifest.metrics.get(self.policy.metric) for step, manifest in found.items()}
        sign = 1 if self.policy.lower_is_better else -1
        return sorted((n for n in values if values[n] is not None), key=lambda n: (sign * values[n], -n))

    def _folders(self) -> list[int]:
        if not self.directory.exists():
            return []
        return sorted(int(path.name) for path in self.directory.iterdir() if re.fullmatch(r"\d{8,}", path.name) and path.is_dir())

    def _folder(self, step: int, suffix: str = "") -> epath.Path:
        return self.directory / f"{step:08d}{suffix}"

    def _once(self, name: str) -> epath.Path:
        if not re.fullmatch(r"[A-Za-z][\w-]*", name):
            raise ValueError(f"a name of letters, digits, _ and - is wanted, not '{name}'")
        return self.directory / name

    # Reading

    def restore(self, target: Any, step: Step = "latest", part: str = "", cast: bool = False) -> tuple[int, Any]:
        """(step, state): a whole step, verified, in the structure, dtypes and shardings of `target`.

        target: pytree of jax.ShapeDtypeStruct with `.sharding` (each device reads its own shard), of arrays (restored like
        them), or without sharding (on the first local device).
        part: only what stands below this path, such as "params" or "ema/model"; `target` is that subtree, and the
        other fields of the state are not read. cast: whether a leaf of another dtype is converted rather than refused.
        With "latest" and "best" a damaged step is reported and the next one used.
        UserError: no such step, a damaged one asked for by number, or a target whose leaves are not those saved.
        """
        found = self._restore(target, step, part, cast)
        if found is None:
            raise UserError(f"There is no whole checkpoint in {self.directory}.")
        return found

    def resume(self, target: Any) -> tuple[int, Any] | None:
        """`restore` of the latest whole step; None when there is none and the run starts from the beginning."""
        return self._restore(target, "latest", "", False)

    def restore_once(self, name: str, target: Any, part: str = "") -> Any:
        """What `save_once` saved as `name`, verified, in the structure and shardings of `target`. UserError: missing, damaged, another tree."""
        self.wait()
        folder = self._once(name)
        if _agreed("yes" if folder.exists() else "no") == "no":
            raise UserError(f"There is no '{name}' in {self.directory}.")
        if problem := self._problem(folder, part=part):
            raise UserError(f"'{name}' in {self.directory} is damaged: {problem}.")
        return _read(folder, target, part, False)

    def verify(self, step: Step = "latest") -> str:
        """What is wrong with a step, read whole; empty when nothing is."""
        return self._problem(self._folder(self.find(step) or 0) if isinstance(step, str) else self._folder(step))

    def _restore(self, target: Any, step: Step, part: str, cast: bool) -> tuple[int, Any] | None:
        self.wait()
        if step == "latest":
            order = reversed(self._folders())
        elif step == "best":
            self.find(step)
            order = self._ranked({n: manifests.read(self._folder(n)) for n in self.steps()})
        else:
            order = [self.find(step)]
        problems = []
        for n in map(int, _agreed(" ".join(map(str, order))).split()):
            problem = self._problem(self._folder(n), part=part)
            if problem:
                problems.append(f"Step {n} in {self.directory} is damaged: {problem}")
                self._damaged.add(n)
                continue
            for message in problems:
                self.report(f"{message}; step {n} is used instead.")
            state = _read(self._folder(n), target, part, cast)
            if not part:
                self._current = n
            return n, state
        if isinstance(step, int):
            raise UserError(problems[0] + f"; whole are {_listed(self.steps())}.")
        for message in problems:
            self.report(f"{message}; there is no other step.")
        return None

    def _problem(self, folder: epath.Path, part: str = "", content: bool = True) -> str:
        """What is wrong with `folder`, or with what of it `part` needs; empty when nothing is. Files are shared out among the processes."""
        try:
            manifest = manifests.read(folder)
            needed = {_item(name) for name in _below(manifest.leaves, part)}
            wanted = lambda name: "/" not in name or name.split("/")[0] in needed   # noqa: E731
            manifests.check(folder, manifest, wanted)
            problem = ""
            if content:
                mine = set(sorted(manifest.files)[jax.process_index()::jax.process_count()])
                manifests.verify(folder, manifest, lambda name: name in mine and wanted(name))
        except Damaged as error:
            problem = str(error)
        return next(filter(None, _gathered(problem)), "") if content else problem


# Trees as names and leaves


def _named(tree: Any) -> dict[str, Any]:
    """Leaves by name, "params/model/kernel": keys, fields and indices joined by "/"; None and empty containers have no leaves."""
    named = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = "/".join(_component(key) for key in path)
        if name in named:
            raise ValueError(f"two leaves are named {name}")
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            leaf = np.asarray(leaf)
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            raise ValueError(f"{name} is a typed random key; save jax.random.key_data of it")
        named[name] = leaf
    return named


def _component(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return re.sub(r"[%/.]", lambda match: f"%{ord(match[0]):02X}", str(getattr(key, attribute)))
    raise TypeError(f"a key path of this kind is not known: {key!r}")


def _item(name: str) -> str:
    """The Orbax item that holds a leaf: its top field, or "leaves" for what is a leaf of the tree itself."""
    top, _, rest = name.partition("/")
    return top if rest and re.fullmatch(r"[A-Za-z][\w-]*", top) else "leaves"


def _items(leaves: Mapping[str, Any]) -> dict[str, dict]:
    """Item -> nested dict of its leaves; empty arrays, which Orbax refuses, are left to the manifest."""
    items: dict[str, dict] = {}
    for name, leaf in leaves.items():
        if 0 in leaf.shape:
            continue
        *above, last = name.split("/")
        node = items.setdefault(_item(name), {})
        for component in above:
            node = node.setdefault(component, {})
        node[last] = leaf
    return items


def _below(named: Mapping[str, Any], part: str) -> dict[str, Any]:
    return {name: value for name, value in named.items() if not part or name == part or name.startswith(part + "/")}


def _differences(wanted: Mapping[str, Any], saved: Mapping[str, dict], dtypes: bool = True) -> str:
    """How the leaves `wanted` are not those `saved`, or an empty string."""
    missing, left = [n for n in wanted if n not in saved], [n for n in saved if n not in wanted]
    texts = [f"{name} is not in it{nearest(name, left or saved)}" for name in missing]
    texts += [f"{name} is left over" for name in left]
    for name in wanted:
        if name in saved:
            there, here = saved[name], wanted[name]
            if tuple(there["shape"]) != tuple(here.shape):
                texts.append(f"{name} has shape {tuple(there['shape'])} in it and {tuple(here.shape)} here")
            elif dtypes and there["dtype"] != str(here.dtype):
                texts.append(f"{name} is {there['dtype']} in it and {here.dtype} here")
    return "; ".join(texts[:12]) + (f"; and {len(texts) - 12} more" if len(texts) > 12 else "")


def _read(folder: epath.Path, target: Any, part: str, cast: bool) -> Any:
    """The tree below `part` of a verified folder, in the structure of `target`."""
    wanted = {"/".join(filter(None, (part, name))): leaf for name, leaf in _named(target).items()}
    saved = _below(manifests.read(folder).leaves, part)
    if part and not saved:
        tops = {name.rsplit("/", n)[0] for name in manifests.read(folder).leaves for n in range(1, name.count("/") + 1)}
        raise UserError(f"There is no '{part}' in {folder}{nearest(part, tops)}")
    if differing := _differences(wanted, saved, dtypes=not cast):
        raise UserError(f"{folder} does not fit: {differing}.")
    items = {item: ocp.args.PyTreeRestore(item=tree, restore_args=jax.tree.map(_restore_args, tree), partial_restore=True)
             for item, tree in _items(wanted).items()}
    restored = _orbax().restore(folder, args=ocp.args.Composite(**items)) if items else {}
    leaves = _named([restored[item] for item in items])
    leaves = {name.partition("/")[2]: leaf for name, leaf in leaves.items()}
    return jax.tree.unflatten(jax.tree.structure(target), [leaves[name] if name in leaves else _empty(leaf) for name, leaf in wanted.items()])


def _empty(leaf: Any) -> Any:
    if isinstance(leaf, np.ndarray | np.generic):
        return np.zeros(leaf.shape, leaf.dtype)
    return jax.make_array_from_callback(leaf.shape, _sharding(leaf), lambda index: np.zeros(leaf.shape, leaf.dtype)[index])


def _sharding(leaf: Any) -> jax.sharding.Sharding:
    return leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


def _restore_args(leaf: Any) -> ocp.RestoreArgs:
    if isinstance(leaf, np.ndarray | np.generic):
        return ocp.RestoreArgs(restore_type=np.ndarray, dtype=leaf.dtype)
    return ocp.ArrayRestoreArgs(sharding=_sharding(leaf), global_shape=leaf.shape, dtype=leaf.dtype)


def _orbax() -> ocp.AsyncCheckpointer:
    return ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(), timeout_secs=_TIMEOUT)


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


_CAUSES = {
    "there is no space left on the device": ((errno.ENOSPC,), "No space left on device|RESOURCE_EXHAUSTED.*space"),
    "the disk quota is used up": ((errno.EDQUOT,), "Disk quota exceeded"),
    "a file grew over the limit on file sizes": ((errno.EFBIG,), "File too large"),
    "writing there is not permitted": ((errno.EACCES, errno.EPERM), "Permission denied|Operation not permitted|PERMISSION_DENIED"),
    "the file system is read-only": ((errno.EROFS,), "Read-only file system"),
    "a file stands in the way of a directory": ((errno.ENOTDIR, errno.EEXIST), "Not a directory"),
}


def _explained(error: BaseException, directory: epath.Path) -> BaseException:
    """A UserError for what a person can mend; any other error as it is."""
    for cause, (numbers, pattern) in _CAUSES.items():
        if (isinstance(error, OSError) and error.errno in numbers) or re.search(pattern, str(error)):
            return UserError(f"A checkpoint could not be saved in {directory}: {cause}; the checkpoints before are whole.")
    return error


def _finite(value: Any) -> float | None:
    value = float(value)
    return value if math.isfinite(value) else None


def _listed(steps: Iterable[int]) -> str:
    return f"steps {', '.join(map(str, steps))}" if steps else "no other steps"
