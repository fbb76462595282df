"""`jaxgen eval RUN`."""

import json
from collections.abc import Sequence

from jaxgen.cli import options
from jaxgen.cli.main import DONE
from jaxgen.errors import UserError


def parser() -> options.Parser:
    parser = options.Parser(
        "eval",
        "Makes the experiment's own measurements of a step of a run, on its data or other.",
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
    data = experiment.data.prepare(progress=Console(1, "", jax.process_index() == 0).prepare)
    experiment.task.check_data(data)
    setting = Setting(experiment.task, data, program.sharding, program.spec, experiment.seed)
    metrics, texts = {}, {}
    for evaluation in experiment.evaluations:
        report = evaluation.build(setting)(opened.params, opened.state, opened.step)
        metrics |= {f"eval/{evaluation.name}/{name}": value for name, value in report.metrics.items()}
        texts |= report.texts
    if jax.process_index() > 0:
        return DONE
    if arguments.json:
        told = {"run": str(opened.directory), "step": opened.step, "weights": arguments.weights}
        print(json.dumps({**told, "metrics": metrics, "texts": texts}, indent=1))
        return DONE
    print(f"{opened.directory}, step {opened.step}, {arguments.weights} weights")
    width = max(map(len, metrics), default=0)
    for name, value in metrics.items():
        print(f"{name:<{width}}  {value:.6g}")
    for name, text in texts.items():
        print(f"\n{name}\n\n{text}")
    return DONE
