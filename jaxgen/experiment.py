"""An experiment: everything that a run is, as one tree of frozen dataclasses.

A file in `experiments/` defines `experiment` and `smoke`, the same classes small enough for a laptop. This module holds
the type, loads such files, and puts the modules of other runs where an experiment asks for them.
"""

import contextlib
import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax

from jaxgen import files, record, runtime
from jaxgen.data.base import Data
from jaxgen.errors import UserError, nearest
from jaxgen.evaluation.base import Evaluation
from jaxgen.pretrained import Pretrained
from jaxgen.sharding import RULES, Mesh
from jaxgen.tasks.base import Task
from jaxgen.training.checkpoint import Checkpointing
from jaxgen.training.ema import Ema, PowerEma
from jaxgen.training.metrics import Logging
from jaxgen.training.optimizers import Optimizer


@dataclasses.dataclass(frozen=True)
class Target:
    """The metric that a run must reach: what a smoke form is tested by."""

    metric: str
    """Name of the metric, for example eval/heldout/bits_per_byte."""
    at_most: float = float("inf")
    """Reached when the last value is not above this."""
    at_least: float = float("-inf")
    """Reached when the last value is not below this."""

    def reached(self, metrics: Mapping[str, float]) -> bool:
        """Whether `metrics` (the last value of each) reach it. Raises UserError where the metric was not measured."""
        if self.metric not in metrics:
            raise UserError(f"the target's metric {self.metric} was not measured{nearest(self.metric, metrics)}")
        return self.at_least <= metrics[self.metric] <= self.at_most


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What a run is. Every field, at any depth, can be overridden on the command line."""

    name: str
    """Names the run: its directory is runs/NAME."""
    task: Task
    """What is learned: holds the models and gives the loss."""
    data: Data
    """What is learned from."""
    optimizer: Optimizer | dict[str, Optimizer]
    """One optimizer, or one a player by the player's name."""
    batch_size: int
    """Examples a step, over all devices and microbatches."""
    steps: int
    """Updates in all."""
    seed: int = 0
    """Seeds the parameters, the order of the data and every random draw."""
    microbatches: int = 1
    """Parts that a batch is split into, one after the other, to save memory; the gradient is the whole batch's."""
    max_skipped: int = 20
    """Updates in a row with a loss or gradient that is not finite, at which the run stops."""
    mesh: Mesh = Mesh()
    """How the devices are arranged."""
    rules: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=lambda: dict(RULES))
    """Mesh axes that each logical axis is split over."""
    ema: Ema | PowerEma | None = None
    """Moving average of the parameters; None keeps none."""
    evaluations: tuple[Evaluation, ...] = ()
    """What is measured during and after training, each at its own interval."""
    checkpoint: Checkpointing = Checkpointing()
    """When the state is saved, and which steps are kept."""
    log: Logging = Logging()
    """When metrics are written, and where."""
    target: Target | None = None
    """The metric that the run must reach."""
    topology: str = ""
    """The hardware that the experiment is meant for, for example v5p:4x4x4."""

    def __post_init__(self):
        if not re.fullmatch(r"[\w.][\w.+-]*", self.name) or set(self.name) == {"."}:
            raise UserError(f"the experiment's name is {self.name!r}, which should be usable as a folder's name")
        for field in ("batch_size", "steps", "microbatches", "max_skipped"):
            if getattr(self, field) < 1:
                raise UserError(f"{field} is {getattr(self, field)}, which should be at least 1")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"the seed is {self.seed}, which should be from 0 to 2^63 - 1")
        if self.batch_size % self.microbatches:
            raise UserError(f"batch_size {self.batch_size} does not split into {self.microbatches} microbatches")
        names = [e.name for e in self.evaluations if isinstance(e, Evaluation)]
        head, _, rest = self.checkpoint.metric.removeprefix("eval/").partition("/")
        if self.checkpoint.metric != Checkpointing().metric and (not rest or head not in names):
            raise UserError(f"checkpoint.metric is {self.checkpoint.metric!r}, which should be eval/NAME/... of an "
                            f"evaluation{nearest(head, names) or f': {names}'}")
        if same := [name for i, name in enumerate(names) if name in names[:i]]:
            raise UserError(f"two evaluations have the name '{same[0]}', so one's results would overwrite the other's: "
                            "give one another name")


def load(path: str | Path) -> ModuleType:
    """Executes an experiment file: a module with `experiment`, and `smoke` where it has one.

    Raises UserError for a file that is missing or is no Python, or defines no
    experiment; what the file itself raises is not caught.
    """
    module = files.load(path)
    for name in ("experiment", "smoke"):
        value = getattr(module, name, None)
        if value is not None and not isinstance(value, Experiment):
            raise UserError(f"'{name}' in {path} is a {type(value).__name__}, which should be a jaxgen Experiment")
    if getattr(module, "experiment", None) is None:
        found = [k for k, v in vars(module).items() if isinstance(v, Experiment)]
        hint = f"; it defines {', '.join(found)}" if found else ""
        raise UserError(f"{path} defines no 'experiment'{hint}")
    return module


def select(module: ModuleType, smoke: bool = False) -> Experiment:
    """The file's experiment, or its smoke form under the name NAME-smoke."""
    if not smoke:
        return module.experiment
    if getattr(module, "smoke", None) is None:
        raise UserError(f"{module.__file__} defines no 'smoke' form")
    form = module.smoke
    return form if form.name != module.experiment.name else dataclasses.replace(form, name=f"{form.name}-smoke")


class NoSource(UserError):
    """The source of a `Pretrained` is missing, or cannot be read."""


class Source(NamedTuple):
    """Where the weights of a field come from."""

    path: str                # of the field, for example "task.model"
    pretrained: Pretrained   # what stood there
    directory: Path          # the run directory that holds part and weights


def resolve(
    experiment: Experiment,
    trust: Iterable[str | Path] = (),
    run_dir: str | Path | None = None,
    weights: bool = True,
) -> tuple[Experiment, list[Source]]:
    """The experiment with each `Pretrained` of the task replaced by the module of its source, and where the weights of
    all are. Those of the evaluations, whose networks are opened for each use, stay.

    A run directory that was started from the same `Pretrained` has its own record of the module, so it goes on when
    the source is gone. Without `weights`, no source that is a file is trained for them, and its `like` stands for one
    that is missing. Raises UserError for a missing source or part.
    """
    trust, asked = tuple(trust), dict(find(experiment))
    own = record.stored(run_dir) if run_dir and record.begun(run_dir) else None
    if own and (changed := record.differences(own.pretrained, {k: record.to_record(v) for k, v in asked.items()})):
        raise UserError(
            f"{run_dir} holds a run whose weights come from elsewhere: {'; '.join(map(str, changed))}: "
            "give another --run-dir for a new run"
        )
    sources = []
    for path, pretrained in asked.items():
        if path.startswith("evaluations."):
            sources.append(Source(path, pretrained, _source(pretrained, path, trust, weights)[0]))
            continue
        if own:
            data, directory = own.experiment, Path(pretrained.source)
            module = record.from_record(_part(data, path, str(run_dir)), trust, path)
        else:
            try:
                directory, data, more = _source(pretrained, path, trust, weights)
            except NoSource:
                if weights or pretrained.like is None:
                    raise
                directory, module = Path(pretrained.source), pretrained.like
            else:
                module = record.from_record(_part(data, pretrained.part, pretrained.source), (*trust, *more), path)
        sources.append(Source(path, pretrained, directory))
        experiment = _replace(experiment, path.split("."), module)
    return experiment, sources


def train(
    experiment: Experiment,
    run_dir: str | Path | None = None,
    resume: bool = False,
    profile: bool = False,
    trust: Iterable[str | Path] = (),
) -> Any:
    """Trains, or goes on with, the run in `run_dir` (runs/NAME where none is given).

    A directory that already holds this run is resumed; `resume` demands one. Raises UserError where the directory
    holds another run.
    """
    if "://" in str(run_dir or ""):
        raise UserError(f"the run directory is {run_dir}, which should be a folder: mount the bucket, and name that")
    directory = Path(run_dir or Path("runs") / experiment.name)
    if resume and not (directory / record.FILE).is_file():
        record.stored(directory)   # raises, and says what is there instead
    from jaxgen.training import loop

    resolved, sources = resolve(experiment, trust, directory)
    return loop.train(resolved, run_dir=directory, profile=profile, pretrained=sources)


def find(tree: Any, path: str = "") -> Iterator[tuple[str, Pretrained]]:
    """Every `Pretrained` in a tree, with its path."""
    if isinstance(tree, Pretrained):
        yield path, tree
    for name, value in _children(tree):
        yield from find(value, f"{path}.{name}" if path else name)


def _children(tree: Any) -> list[tuple[str, Any]]:
    if record.is_node(tree):
        return [(f.name, getattr(tree, f.name)) for f in record.fields(tree)]
    if isinstance(tree, Mapping):
        return [(str(k), v) for k, v in tree.items()]
    return [(str(i), v) for i, v in enumerate(tree)] if isinstance(tree, tuple | list) else []


def _replace(tree: Any, path: list[str], value: Any) -> Any:
    if not path:
        return value
    head, rest = path[0], path[1:]
    if record.is_node(tree):
        return dataclasses.replace(tree, **{head: _replace(getattr(tree, head), rest, value)})
    if isinstance(tree, Mapping):
        return {k: _replace(v, rest, value) if str(k) == head else v for k, v in tree.items()}
    return type(tree)(_replace(v, rest, value) if str(i) == head else v for i, v in enumerate(tree))


def _part(data: Any, part: str, where: str) -> Any:
    """The subtree of a record at a dotted path."""
    for i, name in enumerate(part.split(".")):
        inside = dict(enumerate(data)) if isinstance(data, list) else data if isinstance(data, dict) else {}
        inside = {str(k): v for k, v in inside.items() if k != "class"}
        if name not in inside:
            done = ".".join(part.split(".")[:i]) or "the experiment"
            raise UserError(f"{where} has no part {part}: there is no '{name}' in {done}{nearest(name, inside)}")
        data = inside[name]
    if not isinstance(data, dict) or "class" not in data:
        raise UserError(f"part {part} of {where} is {data!r}, which is no module")
    return data


def _source(
    pretrained: Pretrained, path: str, trust: tuple[str | Path, ...], weights: bool
) -> tuple[Path, Any, tuple[Path, ...]]:
    """The run directory of a source, its experiment's record, and the files whose classes it may use."""
    source = Path(pretrained.source)
    try:
        if source.suffix != ".py" and not source.is_file():
            return source, record.stored(source).experiment, ()
        files.existing(source)
    except UserError as error:
        raise NoSource(f"{path} is to come from {source}, but {error}") from None
    smoke = select(load(source), smoke=True)
    described, _ = resolve(smoke, (*trust, source), weights=False)
    return trained(smoke, (*trust, source), weights), record.to_record(described), (source,)


def trained(experiment: Experiment, trust: Iterable[str | Path] = (), weights: bool = True) -> Path:
    """The finished run of an experiment in the cache, trained once for all users of the same record. Without `weights`
    it is not trained: where it would be."""
    digest = hashlib.sha256(json.dumps(record.to_record(experiment), sort_keys=True).encode()).hexdigest()[:16]
    directory = runtime.cache_dir() / "pretrained" / f"{experiment.name}-{digest}"
    if weights and not (directory / "done").exists():
        directory.parent.mkdir(parents=True, exist_ok=True)
        alone = jax.process_count() == 1   # the processes of one run enter together
        with files.locked(directory.with_name(f"{directory.name}.lock")) if alone else contextlib.nullcontext():
            if not (directory / "done").exists():
                train(experiment, run_dir=directory, trust=trust)
                (directory / "done").touch()
    return directory
