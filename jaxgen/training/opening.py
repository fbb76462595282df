"""The network of a run, with its weights, for measurements of another."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax

from jaxgen import record
from jaxgen.errors import UserError
from jaxgen.evaluation.features import Network, of_task, pictures_alone
from jaxgen.pretrained import Pretrained
from jaxgen.sharding import Sharding
from jaxgen.training.checkpoint import Checkpoints
from jaxgen.training.parameters import merge
from jaxgen.training.step import Program


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
    shapes = program.shapes
    reader = Checkpoints(directory / "checkpoints", experiment.checkpoint, read_only=True)
    averaged = pretrained.weights == "ema" and shapes.ema is not None
    step = int(pretrained.step) if pretrained.step.isdecimal() else pretrained.step
    which, target = ("ema", shapes.ema) if averaged else ("params", shapes.params)
    step, weights = reader.restore(target, step, part=which)
    if averaged:
        weights = program.ema.weights(weights)
    if jax.tree.leaves(shapes.frozen):
        weights = merge(weights, reader.restore_once("frozen", shapes.frozen))
    state = shapes.state
    if jax.tree.leaves(state):
        _, state = reader.restore(state, step, part="state")
    shape = shapes_of_data["image"].shape[1:]
    name = f"{experiment.name} step {step} {'ema' if averaged else 'raw'}"
    return of_task(name, experiment.task, weights, state, shape, sharding, _encoder(directory, experiment.data))


def _encoder(directory: Path, data: Any) -> Any:
    """How the run's captions become tokens; None where it has none."""
    if not (directory / "tokenizer" / "tokenizer.json").is_file():
        return None
    from jaxgen.data.captions import encode_captions
    from jaxgen.data.tokenizers import load

    tokenizer = load(directory / "tokenizer")
    return lambda texts: encode_captions(tokenizer, texts, data.length)
