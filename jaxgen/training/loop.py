"""The one training loop."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import platform as host
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxgen import files, record
from jaxgen.data.base import Prepared
from jaxgen.data.loader import Loader
from jaxgen.data.sheets import png
from jaxgen.errors import UserError
from jaxgen.evaluation.base import Evaluation, Measure, Setting
from jaxgen.evaluation.features import filled
from jaxgen.sharding import Sharding
from jaxgen.training import leaves
from jaxgen.training import metrics as metering
from jaxgen.training.checkpoint import Checkpoints, reached_preemption
from jaxgen.training.ema import Ema, PowerEma
from jaxgen.training.hardware import peak_flops
from jaxgen.training.opening import network
from jaxgen.training.parameters import merge
from jaxgen.training.state import TrainState
from jaxgen.training.step import Program

if TYPE_CHECKING:
    from jaxgen.experiment import Experiment, Source

NOTES = "run.json"  # of a run directory
PROFILED = (5, 10)  # steps after the first that a profile covers


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run came to."""

    directory: Path
    step: int
    metrics: dict[str, float]
    """The last value of each metric."""
    state: TrainState
    preempted: bool = False
    """The run was asked to leave, and saved where it stood."""


def program_of(experiment: Experiment, devices: Any = None, platform: str = "") -> Program:
    """The compiled program of an experiment on its mesh: of the given devices, all there are, or (a number) of so many
    of a platform that need not exist, for tracing alone."""
    mesh = experiment.mesh.abstract(devices) if isinstance(devices, int) else experiment.mesh.build(devices)
    program = Program(
        experiment.task,
        experiment.optimizer,
        Sharding(mesh, experiment.rules, platform),
        experiment.data.spec(experiment.batch_size),
        experiment.steps,
        experiment.microbatches,
        experiment.ema,
    )
    for spec in experiment.data.specs(experiment.batch_size)[1:]:
        experiment.task.check(spec)  # as the program did of the first
    return program


def train(
    experiment: Experiment, run_dir: str | Path, profile: bool = False, pretrained: Sequence[Source] = ()
) -> Result:
    """Trains an experiment in a run directory, or goes on with the run that it holds.

    Raises UserError for a directory that holds another run, data or a mesh that does not fit, and a loss that stays
    not finite.
    """
    with contextlib.ExitStack() as held:
        run = _open(experiment, Path(run_dir), held)
        missed, preempted = _missed(run) if run.begun else [], False
        if run.begun and run.step >= experiment.steps and not missed:
            run.console.say(f"{run.directory} is finished: it has its {experiment.steps} steps")
        else:
            _equip(run, pretrained, held)
            _greet(run)
            preempted = _steps(run, missed, profile)
            if not preempted:
                _conclude(run)
        found = metering.last(run.directory) if run.lead else {}
        return Result(run.directory, run.step, found, run.state, preempted)


@dataclasses.dataclass
class _Run:
    """What the steps of a run work with, and its state."""

    experiment: Experiment
    directory: Path
    lead: bool
    """This is the process that writes and prints."""
    program: Program
    console: metering.Console
    checkpoints: Checkpoints
    prepared: Callable[[], Prepared]
    """The data, which may take long when it is first asked for."""
    state: TrainState | None = None
    """None before the first step of a new run."""
    measures: dict[str, Measure] = dataclasses.field(default_factory=dict)
    """By the name of the evaluation."""

    @property
    def step(self) -> int:
        """Where the run stands; waits for the step that is under way."""
        return int(self.state.step)

    @property
    def data(self) -> Prepared:
        return self.prepared()

    @property
    def begun(self) -> bool:
        return self.state is not None


def _open(experiment: Experiment, directory: Path, held: contextlib.ExitStack) -> _Run:
    """What can be known before any data is read, and the state of a run that goes on, with its directory in `held`."""
    lead, begun = jax.process_index() == 0, record.begun(directory)
    if not begun:
        record.check(experiment)  # else it would train, and not be opened afterwards
    program = program_of(experiment)
    with program.sharding.use():
        experiment.task.check_training(program.spec)
    console = metering.Console(experiment.steps, experiment.task.units(program.spec)[0], lead)
    program.shapes  # noqa: B018  what does not fit is found

    @functools.cache
    def prepared() -> Prepared:
        data = experiment.data.prepare(progress=console.prepare).batched(experiment.batch_size)
        experiment.task.check_data(data)
        return data

    checkpoints = Checkpoints(directory / "checkpoints", experiment.checkpoint, report=console.say)
    run = _Run(experiment, directory, lead, program, console, checkpoints, prepared)
    if begun:
        if lead:
            _hold(directory, held)
        facts, old = noted(directory), record.stored(directory).experiment
        for change in record.resume(
            old, record.to_record(experiment), lambda: facts.get("data") == run.data.fingerprint, directory
        ):
            console.say(f"{directory} goes on with another {change}")
        run.state = _restore(program, checkpoints)
    return run


def _equip(run: _Run, pretrained: Sequence[Source], held: contextlib.ExitStack) -> None:
    """The data, what it is measured by, and the directory and the state of a new run."""
    experiment, directory, program, console, data = run.experiment, run.directory, run.program, run.console, run.data
    setting = Setting(experiment.task, data, program.sharding, program.spec, experiment.seed, console.skipped)
    measuring = {s.pretrained: s.directory for s in pretrained if s.path.startswith("evaluations.")}
    learned_from = [s for s in pretrained if not s.path.startswith("evaluations.")]

    def opened(wanted):
        return network(wanted, measuring[wanted], program.sharding)

    run.measures |= {e.name: filled(e, opened).build(setting) for e in experiment.evaluations}
    with program.sharding.use():
        experiment.task.notes(program.spec)  # what cannot run here is found
    if not run.begun:
        for source in learned_from:
            _origin(program, source)  # a mistake in it leaves no run behind
    elif kept := noted(directory):
        if kept.get("data") != data.fingerprint:
            raise UserError(
                f"The data of {directory} has changed since the run began: its content is not what the run was trained "
                "on; give another --run-dir for a new run, or bring the old data back."
            )
    else:
        console.say(f"{directory / NOTES} is missing or damaged, so nothing tells whether the data is still the same")
    _write_directory(run, pretrained, held)
    if run.begun:
        console.say(f"resumed {directory} at step {run.step}")
        return
    run.state, origins = _begin(program, experiment, run.checkpoints, learned_from)
    if origins and run.lead:
        _note(directory, pretrained=origins)


def _steps(run: _Run, missed: Sequence[Evaluation], profile: bool) -> bool:
    """Takes the run from where it stands to its end; True when it was asked to leave before, and saved."""
    experiment, directory, program, console = run.experiment, run.directory, run.program, run.console
    step = begin = run.step
    writer = metering.Writer(directory, step, experiment.log.tensorboard) if run.lead else None
    stored = _stored(run)
    data, layout = (run.data, program.batch_shardings) if stored is None else (stored, program.collected_shardings)
    loader = Loader(data.train(experiment.seed), layout, experiment.batch_size, step, workers=data.workers)
    meter = _Meter(program, experiment.log.every, loader, writer, console, experiment.max_skipped)
    collect = experiment.task.collect_every
    preempted = False

    with _sigterm() as asked, contextlib.ExitStack() as stack:
        stack.callback(loader.close)
        stack.callback(console.close)
        if writer is not None:
            stack.callback(writer.close)
        console.start(step)
        if missed:
            try:
                with asked.interrupting():
                    _evaluate(missed, run, step, writer)
            except _Asked:
                return True  # the step is saved
        batches = iter(loader)
        trace = stack.enter_context(_trace(run, begin, profile))
        while step < experiment.steps:
            _, data_batch = next(batches)
            if stored is not None:
                batch = data_batch
            elif step % collect == 0 or step == begin:  # saved off a boundary: a run that now takes more steps
                key = jax.random.fold_in(jax.random.wrap_key_data(run.state.key), step)
                batch = experiment.task.collect(run.state, data_batch, key)
                if batch is not data_batch:
                    batch = jax.device_put(batch, program.collected_shardings)
            run.state, metrics = program.step(run.state, batch)
            step += 1
            meter.step(step, metrics)  # reads those of the step before, while this one runs
            trace(step, run.state)

            boundary = step % collect == 0
            preempted = boundary and (asked.is_set() or reached_preemption(step))
            due, found = _due(run, step), {}
            if due and not preempted:  # which leaves them to the process that goes on
                try:
                    with meter.paused(), asked.interrupting(boundary):
                        found = _evaluate(due, run, step, writer)
                except _Asked:
                    preempted = True
            if meter.diverged or step == experiment.steps or preempted or _saves(run, step):
                meter.flush()
                with meter.paused():
                    run.checkpoints.save(step, run.state.replace(frozen=None), found)
            if preempted or meter.diverged:
                break
        meter.close()
        run.checkpoints.wait()

    if meter.diverged:
        raise UserError(
            f"The loss or gradient was not finite for {experiment.max_skipped} steps in a row, up to step {step}; the "
            f"parameters before them are saved as step {step} of {directory}. A lower optimizer.learning_rate, or a "
            "longer warm-up, may help."
        )
    return preempted


@contextlib.contextmanager
def _trace(run: _Run, begin: int, wanted: bool) -> Iterator[Callable[[int, TrainState], None]]:
    """Called after each step: writes an XLA trace of some early steps, where it is wanted."""
    first, last = (min(begin + steps, run.experiment.steps - 1 + i) for i, steps in enumerate(PROFILED))
    tracing = False

    def stop(step: int) -> None:
        nonlocal tracing
        jax.profiler.stop_trace()
        tracing = False
        run.console.say(f"profile of steps {first + 1} to {step} in {run.directory / 'profile'}")

    def at(step: int, state: TrainState) -> None:
        nonlocal tracing
        if not wanted or step not in (first, last):
            return
        jax.block_until_ready(state)
        if step == first:
            jax.profiler.start_trace(str(run.directory / "profile"))
            tracing = True
        elif tracing:
            stop(step)

    if wanted and run.experiment.steps - begin < 2:
        run.console.say("no profile: it needs two steps, the first of which compiles")
    try:
        yield at
    finally:
        if tracing:
            stop(run.step)


def _stored(run: _Run) -> Prepared | None:
    params = merge(run.state.params, run.state.frozen)
    return run.experiment.task.stored(run.data, params, run.state.state, run.console.prepare)


# ---- the run directory ----


def _write_directory(run: _Run, pretrained: Sequence[Source], held: contextlib.ExitStack) -> None:
    """Makes the run directory, or brings up to date what it says of the run."""
    if not run.lead:
        return
    directory, data = run.directory, run.data
    try:
        if not run.begun:
            directory.mkdir(parents=True, exist_ok=True)
            _hold(directory, held)
            if not record.begun(directory):
                shutil.rmtree(directory / "checkpoints", ignore_errors=True)  # of a run that came to no step
        if data.tokenizer is not None:
            data.tokenizer.save(directory / "tokenizer")
        _note(directory, data=data.fingerprint, facts=data.facts, **_versions())
        # last, since it is what makes the directory a run
        record.store(directory, run.experiment, {s.path: record.to_record(s.pretrained) for s in pretrained})
    except OSError as error:
        raise UserError(f"Cannot write the run directory {directory}: {error.strerror or error}.") from None


def _hold(directory: Path, held: contextlib.ExitStack) -> None:
    """Keeps others out of the run directory: of two at once, each would set aside what the other saves."""
    try:
        held.enter_context(files.locked(directory / "lock", wait=False))
    except BlockingIOError:
        raise UserError(
            f"Another process is training in {directory}; wait until it ends, or give another --run-dir."
        ) from None
    except OSError as error:
        raise UserError(f"Cannot write the run directory {directory}: {error.strerror or error}.") from None


def _versions() -> dict[str, Any]:
    from importlib.metadata import version

    names = ("jaxgen", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    devices = jax.devices()
    return {
        "versions": {"python": host.python_version(), **{name: version(name) for name in names}},
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "processes": jax.process_count(),
        "host": host.platform(),
    }


def noted(directory: Path) -> dict[str, Any]:
    """What the run directory notes of itself in run.json; empty where that is missing or damaged."""
    with contextlib.suppress(OSError, ValueError):
        notes = json.loads((directory / NOTES).read_text(encoding="utf-8"))
        return notes if isinstance(notes, dict) else {}
    return {}


def _note(directory: Path, **facts: Any) -> None:
    """Adds facts to run.json, whole or not at all."""
    notes = json.dumps(noted(directory) | facts, indent=1, default=str)
    files.write_whole(directory / NOTES, notes + "\n")


# ---- the state ----


def _restore(program: Program, checkpoints: Checkpoints) -> TrainState | None:
    """The newest whole step, in this mesh's layout; None when there is none."""
    shapes = program.shapes
    found = checkpoints.resume(shapes.replace(frozen=None))
    if found is None:
        return None
    frozen = shapes.frozen
    if jax.tree.leaves(frozen):
        frozen = checkpoints.restore_once("frozen", frozen)
    return found[1].replace(frozen=frozen)


def _begin(
    program: Program, experiment: Experiment, checkpoints: Checkpoints, pretrained: Sequence[Source]
) -> tuple[TrainState, dict[str, Any]]:
    """A new state with the weights that come from elsewhere in their places, and where they came from."""
    state, origins = program.init(experiment.seed), {}
    for source in pretrained:
        part = source.path.removeprefix("task.").split(".")[0]
        weights, own, origins[source.path] = _read_pretrained(program, source, part)

        def fill(tree, part=part, weights=weights):
            kept = jax.tree.map(lambda old, new: None if old is None else new, tree[part], weights, is_leaf=_none)
            return {**tree, part: kept}

        state = state.replace(params=fill(state.params), frozen=fill(state.frozen))
        if own is not None:
            state = state.replace(state={**state.state, part: own})
    if pretrained and program.ema is not None:
        state = state.replace(ema=jax.jit(program.ema.init, out_shardings=program.shardings.ema)(state.params))
    if jax.tree.leaves(state.frozen):
        checkpoints.save_once("frozen", state.frozen)
    return state, origins


def _none(x: Any) -> bool:
    return x is None


def _origin(program: Program, source: Source) -> tuple[Checkpoints, Any, str, str]:
    """Where the weights of a source are: its checkpoints, the step, the tree in it (ema/PART or params/PART), and that
    of the part's state; empty where it has none."""
    wanted = source.pretrained
    data = record.stored(source.directory).experiment["checkpoint"]
    policy = record.from_record(data, path="experiment.checkpoint")  # says what best means
    reader = Checkpoints(Path(source.directory) / "checkpoints", policy, read_only=True)
    theirs = wanted.part.removeprefix("task.").split(".")[0]
    step = wanted.step if wanted.step in ("latest", "best") else int(wanted.step)
    contents = reader.contents(step)
    averaged, moved = (
        next((at for at in places if any(name.startswith(f"{at}/{theirs}/") for name in contents)), "")
        for places in ((Ema.part, PowerEma.part), ("state",))
    )
    state, part = program.shapes.state, source.path.removeprefix("task.").split(".")[0]
    wants = isinstance(state, dict) and part in state
    if moved and not wants:
        raise UserError(
            f"{wanted.source} keeps state of {wanted.part}, such as batch statistics, and the task keeps none of "
            f"{source.path}."
        )
    if wants and not moved:
        raise UserError(
            f"The task keeps state of {source.path}, such as batch statistics, and {wanted.source} keeps none of "
            f"{wanted.part}."
        )
    tree = f"{averaged if wanted.weights == 'ema' and averaged else 'params'}/{theirs}"
    return reader, step, tree, f"state/{theirs}" if moved else ""


def _read_pretrained(program: Program, source: Source, part: str) -> tuple[Any, Any, dict[str, Any]]:
    """The weights of a source's part, streamed into this run's layout, its state or None, and what names them."""
    target = merge(program.shapes.params, program.shapes.frozen)[part]
    reader, step, tree, kept = _origin(program, source)
    theirs = tree.rpartition("/")[2]
    cold = {name.removeprefix(f"{theirs}/") for name in reader.contents_once("frozen", theirs)}  # which did not move
    names = jax.tree.unflatten(jax.tree.structure(target), leaves.named(target))

    def where(frozen: bool):
        return jax.tree.map(lambda name, leaf: leaf if (name in cold) == frozen else None, names, target)

    step, weights = reader.restore(where(frozen=False), step, part=tree, cast=True)
    if cold:
        weights = merge(weights, reader.restore_once("frozen", where(frozen=True), part=theirs, cast=True))
    own = reader.restore(program.shapes.state[part], step, part=kept, cast=True)[1] if kept else None
    kind = tree.partition("/")[0]
    origin = {"source": str(source.directory), "step": step, "weights": kind, "checksum": reader.checksum(step)}
    return weights, own, origin


# ---- evaluation ----


def weights_of(program: Program, state: TrainState, which: str = "ema") -> dict[str, Any]:
    """All parameters by part: the averaged ones where they are kept and wanted, else the raw."""
    average = which == "ema" and state.ema is not None
    return merge(program.ema.weights(state.ema) if average else state.params, state.frozen)


def _due(run: _Run, step: int) -> list[Evaluation]:
    """What is to be measured after a step."""
    last = step == run.experiment.steps
    return [e for e in run.experiment.evaluations if last or (e.every and step % e.every == 0)]


def _missed(run: _Run) -> list[Evaluation]:
    """What was due at the step that the run goes on from, and is not recorded: it was preempted there.

    Recorded are numbers in `metrics.jsonl`, or a sample of the evaluation's name.
    """
    step = run.step
    due = _due(run, step) if step else []
    if not due:
        return []
    names = {name for line in metering.read(run.directory) if line["step"] == step for name in line}
    recorded = [
        any(name.startswith(f"eval/{e.name}/") for name in names)
        or _sample(run.directory, step, f"{e.name}.txt").exists()
        for e in due
    ]
    recorded = multihost_utils.broadcast_one_to_all(np.array(recorded))  # all processes measure, or none
    return [e for e, known in zip(due, recorded, strict=True) if not known]


def _evaluate(
    due: Sequence[Evaluation], run: _Run, step: int, writer: metering.Writer | None
) -> dict[str, float]:
    """Measures what is due, and writes it; the numbers."""
    params, found = weights_of(run.program, run.state), {}
    for evaluation in due:
        report = run.measures[evaluation.name](params, run.state.state, step)
        numbers = {f"eval/{evaluation.name}/{k}": v for k, v in report.metrics.items()}
        found |= numbers
        if writer is None:
            continue
        if numbers:
            writer.write(step, numbers)
        if report.texts or report.images:
            (run.directory / "samples").mkdir(exist_ok=True)
        for name, text in report.texts.items():
            files.write_whole(_sample(run.directory, step, f"{name}.txt"), text)
            writer.text(name, step, text)
        for name, image in report.images.items():
            files.write_whole(_sample(run.directory, step, f"{name}.png"), png(image))
            writer.image(name, step, image)
    if found and step < run.experiment.steps:  # at the end `_conclude` tells
        run.console.say(f"step {step}: " + ", ".join(f"{k[len('eval/') :]} {_said(v)}" for k, v in found.items()))
    return found


def _said(value: float | None) -> str:
    return "not finite" if value is None or not math.isfinite(value) else f"{value:.4f}"


def _sample(directory: Path, step: int, name: str) -> Path:
    return directory / "samples" / f"{step:08d}-{name}"


# ---- pace ----


def _saves(run: _Run, step: int) -> bool:
    """Whether a save falls between here and the collection before: saves stand on collections' boundaries."""
    every, collect = run.experiment.checkpoint.every, run.experiment.task.collect_every
    return step % collect == 0 and step // every > (step - collect) // every


class _Meter:
    """Reads the metrics of each step once the next is dispatched, and measures the pace between two lines."""

    def __init__(self, program, every, loader, writer, console, max_skipped):
        self._every, self._last = every, program.steps
        self._loader, self._writer, self._console = loader, writer, console
        self._unit, self._units = program.task.units(program.spec)
        self._flops = program.task.flops(program.spec)
        devices = program.sharding.mesh.devices
        peak = peak_flops(devices.flat[0].device_kind)
        self._peak = peak and peak * devices.size
        self._max_skipped = max_skipped
        self._pending: tuple[int, Any] | None = None
        self._steps, self._time, self._waited = 0, time.perf_counter(), loader.wait_seconds
        self._first = True
        self.diverged = False

    def step(self, step: int, metrics: Any) -> None:
        """Take a step's metrics, and read those of the step before."""
        self.flush()
        self._pending = (step, metrics)

    def flush(self) -> None:
        """Read what is pending: waits for its step to end."""
        if self._pending is None:
            return
        (step, metrics), self._pending = self._pending, None
        metrics = jax.device_get(metrics)
        self._steps += 1
        if self._first:  # the first step has the compilation in it
            self._restart()
        self.diverged = bool(metrics["skipped_in_a_row"] >= self._max_skipped)
        if step % self._every == 0 or step == self._last or self.diverged:
            self._write(step, {k: float(v) for k, v in metrics.items()})

    def close(self) -> None:
        """Read what is pending, and name what was skipped since the last line."""
        self.flush()
        self._tell_skipped()

    def _tell_skipped(self) -> None:
        for name, reason in dict(self._loader.skipped).items():
            self._console.skipped(name, reason)

    def _write(self, step: int, values: dict[str, float]) -> None:
        values.pop("skipped_in_a_row")
        values = {k: v for k, v in values.items() if not np.isnan(v) or k.endswith("loss")}
        now, rate, mfu = time.perf_counter(), None, None
        numbers = {f"train/{k}": v for k, v in values.items()}
        if self._steps:
            seconds = (now - self._time) / self._steps
            rate = self._units / seconds
            mfu = self._flops / seconds / self._peak if self._flops and self._peak else None
            numbers |= {
                f"train/{self._unit}_per_second": rate,
                "train/step_seconds": seconds,
                "train/data_wait_share": (self._loader.wait_seconds - self._waited) / max(now - self._time, 1e-9),
                "train/mfu": mfu,
            }
            self._console.pace(seconds)
        if self._loader.skipped:
            numbers["data/skipped"] = len(self._loader.skipped)
            self._tell_skipped()
        if self._writer is not None:
            self._writer.write(step, numbers)
        self._console.update(step, values, rate, mfu)
        self._restart()

    def _restart(self) -> None:
        self._first, self._steps, self._time, self._waited = False, 0, time.perf_counter(), self._loader.wait_seconds

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time in here does not count."""
        self.flush()
        begin, waited = time.perf_counter(), self._loader.wait_seconds
        try:
            yield
        finally:
            self._time += time.perf_counter() - begin
            self._waited += self._loader.wait_seconds - waited


class _Asked(BaseException):
    """SIGTERM came while something that can be left was under way."""


class _Leaving(threading.Event):
    """Set when the process is asked to leave."""

    _interrupts = False

    @contextlib.contextmanager
    def interrupting(self, wanted: bool = True) -> Iterator[None]:
        """Being asked in here raises `_Asked` at once: a notice of preemption leaves half a minute."""
        self._interrupts = wanted
        try:
            if wanted and self.is_set():
                raise _Asked
            yield
        finally:
            self._interrupts = False

    def ask(self, *_: Any) -> None:
        self.set()
        if self._interrupts:
            raise _Asked


@contextlib.contextmanager
def _sigterm() -> Iterator[_Leaving]:
    """What SIGTERM sets, in place of ending the process. With several processes JAX handles the signal, so that all
    leave at one step."""
    asked = _Leaving()
    if threading.current_thread() is not threading.main_thread() or jax.process_count() > 1:
        yield asked
        return
    before = signal.signal(signal.SIGTERM, asked.ask)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, before)


# ---- words ----


def _greet(run: _Run) -> None:
    experiment, program, console = run.experiment, run.program, run.console
    devices = jax.devices()
    count = sum(int(np.prod(p.shape)) for p in jax.tree.leaves(program.params_shapes))
    mesh = {k: v for k, v in program.sharding.mesh.shape.items() if v > 1}
    console.say(f"{experiment.name}: {count / 1e6:.2f} M parameters on {len(devices)} x {devices[0].device_kind}"
                + (f", mesh {', '.join(f'{k} {v}' for k, v in mesh.items())}" if mesh else "")
                + f", in {run.directory}")
    with program.sharding.use():
        notes = experiment.task.notes(program.spec)
    for name, note in notes.items():
        console.say(f"{name}: {note}")
    if run.data.facts:
        console.say("data: " + ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}"
                                         for k, v in run.data.facts.items() if isinstance(v, str | int | float)))


def _conclude(run: _Run) -> None:
    """The end of a run: what was measured, a sample, and where all is."""
    if not run.lead:
        return
    for name, value in metering.last(run.directory).items():
        if name.startswith("eval/"):
            print(f"{name.removeprefix('eval/')}: {_said(value)}")
    for name, value in run.data.facts.items():
        if "xz" in name:
            print(f"{name}: {value:.4f}" if isinstance(value, float) else f"{name}: {value}")
    for path in sorted((run.directory / "samples").glob(f"{run.step:08d}-*.txt")):
        if path.stem.endswith("-settings"):  # data, for programs
            continue
        print(f"\n{path.read_text(encoding='utf-8')}")
    print(f"run directory: {run.directory}")
    sys.stdout.flush()
