"""A run directory opened for use: the experiment rebuilt from its record, and weights of one of its steps."""

import argparse
import dataclasses
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxgen import record, runtime
from jaxgen.errors import UserError, nearest

OVERRIDES = ("data", "evaluations", "mesh", "rules", "batch_size", "seed")   # what does not change the weights' meaning


@dataclasses.dataclass(frozen=True, eq=False)
class Opened:
    """A run's experiment on this machine's devices, with the weights that were asked for."""

    directory: Path
    experiment: Any
    program: Any
    step: int
    weights: str
    """"ema" or "raw"."""
    params: dict[str, Any]   # by part, on the mesh
    state: Any


def directory_of(arguments: argparse.Namespace, verb: str) -> Path:
    """The run directory that RUN or --run-dir names; a bare name is looked for under runs/ too."""
    given = arguments.run_dir or arguments.run
    if given is None:
        raise UserError(f"jaxgen {verb} needs a run directory")
    if arguments.run_dir and arguments.run and Path(arguments.run_dir) != Path(arguments.run):
        raise UserError(f"both {arguments.run} and --run-dir {arguments.run_dir} are given: which run is meant?")
    return named(given)


def named(run: str) -> Path:
    """The directory of a run; a bare name is looked for under runs/ too."""
    path, known = Path(run), Path("runs") / run
    better = (known / record.FILE).is_file() and not (path / record.FILE).is_file()
    return known if better or (known.exists() and not path.exists()) else path


def experiment_of(
    directory: Path, stored: record.Stored, trust: Sequence[str | Path] = (), overrides: Sequence[str] = ()
) -> Any:
    """The experiment that a run's record holds, with what may be overridden."""
    _allowed(overrides)
    from jaxgen.experiment import Experiment
    from jaxgen.override import override

    experiment = record.from_record(stored.experiment, trust)
    if not isinstance(experiment, Experiment):
        raise UserError(f"{directory / record.FILE} is damaged: it holds a {type(experiment).__name__}, no Experiment")
    return override(experiment, overrides)


def open_run(arguments: argparse.Namespace, verb: str, overrides: Sequence[str] = ()) -> Opened:
    """Reads a run: `--step` of its checkpoints, and the `--weights` of it. Changes nothing in the run directory."""
    directory = directory_of(arguments, verb)
    stored = record.stored(directory)   # before anything slow
    runtime.prepare(arguments.devices)
    runtime.start()
    from jaxgen.training.opening import weights_of

    experiment = experiment_of(directory, stored, arguments.trust, overrides)
    meshed = any(word.startswith("--mesh.") for word in overrides)
    experiment, program = _program(_own_tokenizer(experiment, directory), meshed)
    found = weights_of(directory, experiment, program, arguments.weights, arguments.step)
    weights = "ema" if found.averaged else "raw"
    return Opened(directory, experiment, program, found.step, weights, found.params, found.state)


def _allowed(overrides: Sequence[str]) -> None:
    for word in overrides:
        top = word[2:].partition("=")[0].partition(".")[0].replace("-", "_")
        if word.startswith("--") and top not in OVERRIDES:
            raise UserError(
                f"{word.partition('=')[0]} cannot be changed in a run that is made{nearest(top, OVERRIDES)}; "
                f"only {', '.join(OVERRIDES)} can"
            )


def _program(experiment: Any, meshed: bool) -> tuple[Any, Any]:
    """The experiment as it fits these devices, and its program. Says where it had to be changed to fit, unless its mesh
    was asked for."""
    import jax

    from jaxgen.sharding import Mesh
    from jaxgen.training.loop import program_of

    try:
        experiment.mesh.sizes(jax.device_count())
    except UserError:
        if meshed:
            raise
        print(f"the run's mesh does not fit {jax.device_count()} device(s): its data axis takes all", file=sys.stderr)
        experiment = dataclasses.replace(experiment, mesh=Mesh())
    sizes = experiment.mesh.sizes(jax.device_count())
    shards = math.prod(sizes.get(axis, 1) for axis in experiment.rules.get("batch", ()))
    # on the size depends nothing that is measured but a contrastive loss, whose negatives are the batch's
    size = -(-experiment.batch_size // shards) * shards
    experiment = dataclasses.replace(experiment, batch_size=size, microbatches=1)
    return experiment, program_of(experiment)


def _own_tokenizer(experiment: Any, directory: Path) -> Any:
    """The experiment with the tokenizer that the run keeps, so that other data is read as the model learned it."""
    if not (directory / "tokenizer" / "tokenizer.json").is_file():
        return experiment
    from jaxgen.data.tokenizers import TokenizerConfig, load

    kept = load(directory / "tokenizer")

    @dataclasses.dataclass(frozen=True)
    class Kept(TokenizerConfig):
        fingerprint: str   # what caches know it by
        vocab_size = kept.vocab_size

        def fit(self, texts: Any = ()) -> Any:
            return kept

    return dataclasses.replace(experiment, data=_swapped(experiment.data, TokenizerConfig, Kept(kept.fingerprint)))


def _swapped(tree: Any, kind: type, value: Any) -> Any:
    """The tree with a value in the place of all that is of a kind; at once, since the parts of a mixture must agree."""
    if isinstance(tree, kind):
        return value
    if isinstance(tree, tuple | list):
        return type(tree)(_swapped(x, kind, value) for x in tree)
    if record.is_node(tree):
        return dataclasses.replace(
            tree, **{f.name: _swapped(getattr(tree, f.name), kind, value) for f in record.fields(tree)}
        )
    return tree
