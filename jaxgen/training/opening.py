"""The weights of a run, and its network for measurements of another."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxgen import record
from jaxgen.errors import UserError
from jaxgen.evaluation.features import Network, of_task, pictures_alone
from jaxgen.pretrained import Pretrained
from jaxgen.sharding import Sharding
from jaxgen.training.checkpoint import Checkpoints
from jaxgen.training.parameters import merge
from jaxgen.training.step import Program


class Weights(NamedTuple):
    """Those of one step of a run."""

    step: int
    averaged: bool
    params: Any
    """With what is frozen."""
    state: Any


def weights_of(directory: Path, experiment: Any, program: Program, weights: str, step: int | str) -> Weights:
    """Reads a step of a run, in the layout of the program; `weights` are "ema" (raw where none is kept) or "raw"."""
    shapes = program.shapes
    reader = Checkpoints(directory / "checkpoints", experiment.checkpoint, read_only=True)
    averaged = weights == "ema" and shapes.ema is not None
    which, target = ("ema", shapes.ema) if averaged else ("params", shapes.params)
    step, params = reader.restore(target, step, part=which)
    if averaged:
        params = program.ema.weights(params)
    frozen, state = shapes.frozen, shapes.state
    if jax.tree.leaves(frozen):
        frozen = reader.restore_once("frozen", frozen)
    if jax.tree.leaves(state):
        _, state = reader.restore(state, step, part="state")
    return Weights(step, averaged, merge(params, frozen), state)


def network(
    pretrained: Pretrained, directory: str | Path, sharding: Sharding, trust: Iterable[str | Path] = ()
) -> Network:
    """The task of the run in `directory`, whole on every device of the mesh, as it sees pictures.

    `pretrained.part` does not matter: pictures are prepared as the run's task does it. `trust` names files whose
    classes may be rebuilt; a source that is an experiment file is one.
    """
    directory = Path(directory)
    trust = [*trust, *[pretrained.source] * pretrained.source.endswith(".py")]
    experiment = record.from_record(record.stored(directory).experiment, trust)
    scope = pictures_alone(sharding)
    shapes_of_data = experiment.data.spec(scope.parts("batch")[0])
    if "image" not in shapes_of_data:
        raise UserError(f"{directory} has learned from {', '.join(shapes_of_data)}, and cannot see whole pictures")
    program = Program(
        experiment.task, experiment.optimizer, scope, shapes_of_data, experiment.steps, ema=experiment.ema
    )
    step = int(pretrained.step) if pretrained.step.isdecimal() else pretrained.step
    found = weights_of(directory, experiment, program, pretrained.weights, step)
    shape = shapes_of_data["image"].shape[1:]
    name = f"{experiment.name} step {found.step} {'ema' if found.averaged else 'raw'}"
    encoder = _encoder(directory, experiment.data)
    return of_task(name, experiment.task, found.params, found.state, shape, sharding, encoder)


def _encoder(directory: Path, data: Any) -> Any:
    """How the run's captions become tokens; None where it has none."""
    if not (directory / "tokenizer" / "tokenizer.json").is_file():
        return None
    from jaxgen.data.captions import encode_captions
    from jaxgen.data.tokenizers import load

    tokenizer = load(directory / "tokenizer")
    return lambda texts: encode_captions(tokenizer, texts, data.length)
