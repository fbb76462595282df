"""`jaxgen eval RUN`."""

import json
import sys
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from jaxgen.cli import options
from jaxgen.cli.main import DONE
from jaxgen.errors import UserError


def parser() -> options.Parser:
    parser = options.Parser(
        "eval",
        "Makes the experiment's own measurements of a step of a run, on its data or other. What it finds is printed, "
        "and kept under RUN/eval as JSON, with its pictures.",
        usage="jaxgen eval RUN [--step N|latest|best] [--weights ema|raw] [--json] [--data.path PATH ...]",
    )
    options.add_run(parser)
    parser.add_argument("--json", action="store_true", help="print data for programs")
    return parser


def run(argv: Sequence[str]) -> int:
    from jaxgen.cli.experiments import split

    arguments, overrides = split(parser(), argv, positional="run")
    from jaxgen.cli.opened import open_run

    opened = open_run(arguments, "eval", overrides)
    import jax

    from jaxgen.evaluation.base import Setting
    from jaxgen.training.metrics import Console

    experiment, program = opened.experiment, opened.program
    if not experiment.evaluations:
        raise UserError(f"the experiment of {opened.directory} has no evaluations")
    console = Console(1, "", jax.process_index() == 0)
    data = experiment.data.prepare(progress=console.prepare)
    experiment.task.check_data(data)
    setting = Setting(experiment.task, data, program.sharding, program.spec, experiment.seed, console.skipped)
    metrics, texts, images = {}, {}, {}
    for evaluation in experiment.evaluations:
        report = evaluation.build(setting)(opened.params, opened.state, opened.step)
        metrics |= {f"eval/{evaluation.name}/{name}": value for name, value in report.metrics.items()}
        texts |= report.texts
        images |= report.images
    if jax.process_index() > 0:
        return DONE
    told = {"run": str(opened.directory), "step": opened.step, "weights": arguments.weights, "overrides": overrides}
    told |= {"metrics": metrics, "texts": texts}
    where = _keep(opened.directory / "eval", told, images)
    if arguments.json:
        print(json.dumps(told, indent=1))
        return DONE
    print(f"{opened.directory}, step {opened.step}, {arguments.weights} weights")
    width = max(map(len, metrics), default=0)
    for name, value in metrics.items():
        print(f"{name:<{width}}  {value:.6g}")
    for name, text in texts.items():
        print(f"\n{name}\n\n{text.rstrip()}")
    if where:
        print(f"\n{where}")
    for path in told["images"].values():
        print(path)
    return DONE


def _keep(folder: Path, told: dict[str, Any], images: dict[str, Any]) -> Path | None:
    """Writes what was found, with its pictures, whose paths go into `told`; where, or None for a folder that cannot be
    written. Measurements of other data, or with other settings, have files of their own."""
    from jaxgen.data.sheets import png
    from jaxgen.files import write_whole

    name = f"{told['step']:08d}-{told['weights']}"
    if told["overrides"]:
        name += f"-{sha256(json.dumps(told['overrides']).encode()).hexdigest()[:8]}"
    told["images"] = {}
    try:
        folder.mkdir(exist_ok=True)
        for key, image in images.items():
            write_whole(folder / f"{name}-{key}.png", png(image))
            told["images"][key] = str(folder / f"{name}-{key}.png")
        write_whole(folder / f"{name}.json", json.dumps(told, indent=1) + "\n")
    except OSError as error:
        print(f"what was found is not kept: {folder} cannot be written ({error.strerror})", file=sys.stderr)
        return None
    return folder / f"{name}.json"
