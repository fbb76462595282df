"""`jaxgen eval RUN`."""

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from jaxgen.cli import options
from jaxgen.cli.main import DONE
from jaxgen.errors import UserError, nearest

LIKELIHOOD, RECOGNISED, FACTS = "bpd", "recognised", "facts"
WEIGHTS = (".safetensors", ".npz")
SETTINGS = "-settings"
"""Ends the names of texts that are data."""


def parser() -> options.Parser:
    parser = options.Parser(
        "eval",
        "Makes the experiment's own measurements of a step of a run, on its data or other; or with --metrics those of "
        "pictures that it draws. What it finds is printed, and kept under RUN/eval as JSON, with its pictures.",
        usage="jaxgen eval RUN [--step N|latest|best] [--weights ema|raw] [--json] [--data.path PATH ...] "
        "[--metrics fd,kid,... [--features FILE] [--n N]]",
    )
    options.add_run(parser)
    parser.add_argument("--json", action="store_true", help="print data for programs")
    drawn = parser.add_argument_group("pictures that the run draws, beside held-out ones")
    drawn.add_argument("--metrics", metavar="A,B,...", help="of fd, kid, precision_recall, density_coverage, "
                       f"inception_score, cmmd, clip_score, {RECOGNISED} (of a class, by a classifier), {FACTS} "
                       f"(of drawn scenes) and {LIKELIHOOD} (bits per dimension)")
    drawn.add_argument("--features", metavar="FILE", help="FID's InceptionV3 (.safetensors or .npz), or the run or "
                       "experiment file of a classifier (the one that the run's experiment names)")
    drawn.add_argument("--n", type=int, metavar="N", help="pictures to draw (10,000; for facts, 1,024 of each split)")
    return parser


def run(argv: Sequence[str]) -> int:
    from jaxgen.cli.experiments import split

    arguments, overrides = split(parser(), argv, positional="run")
    _check(arguments)
    from jaxgen.cli.opened import open_run

    opened = open_run(arguments, "eval", overrides)
    import jax

    from jaxgen.evaluation.base import Setting
    from jaxgen.training.metrics import Console

    experiment, program = opened.experiment, opened.program
    if arguments.metrics is not None:
        evaluations = of_metrics(arguments, opened)
    elif not (evaluations := experiment.evaluations):
        raise UserError(f"the experiment of {opened.directory} has no evaluations")
    console = Console(1, "", jax.process_index() == 0)
    data = experiment.data.prepare(progress=console.prepare)
    experiment.task.check_data(data)
    setting = Setting(experiment.task, data, program.sharding, program.spec, experiment.seed, console.skipped)
    metrics, texts, images = {}, {}, {}
    for evaluation in ready(evaluations, arguments, program.sharding, opened.weights):
        report = evaluation.build(setting)(opened.params, opened.state, opened.step)
        metrics |= {f"eval/{evaluation.name}/{name}": value for name, value in report.metrics.items()}
        texts |= report.texts
        images |= report.images
    if jax.process_index() > 0:
        return DONE
    overrides += [word for name in ("metrics", "features", "n") if (value := getattr(arguments, name)) is not None
                  for word in (f"--{name}", str(value))]  # fmt: skip
    told = {"run": str(opened.directory), "step": opened.step, "weights": opened.weights, "overrides": overrides}
    told |= {"metrics": metrics, "texts": {k: v for k, v in texts.items() if not k.endswith(SETTINGS)}}
    if decided := {k.removesuffix(SETTINGS): json.loads(v) for k, v in texts.items() if k.endswith(SETTINGS)}:
        told["results"] = decided
    where = _keep(opened.directory / "eval", told, images)
    if arguments.json:
        print(json.dumps(told, indent=1))
        return DONE
    print(f"{opened.directory}, step {opened.step}, {opened.weights} weights")
    width = max(map(len, metrics), default=0)
    for name, value in metrics.items():
        print(f"{name:<{width}}  {value:.6g}")
    for name, text in told["texts"].items():
        print(f"\n{name}\n\n{text.rstrip()}")
    if where:
        print(f"\n{where}")
    for path in told["images"].values():
        print(path)
    return DONE


def _check(arguments: argparse.Namespace) -> None:
    """UserError for options that do not fit together, before anything slow."""
    for name in ("features", "n"):
        if getattr(arguments, name) is not None and arguments.metrics is None:
            raise UserError(f"--{name} is for the measurements that --metrics names, such as --metrics fd,kid")
    if arguments.n is not None and arguments.n < 1:
        raise UserError(f"--n is {arguments.n}, which should be at least 1")
    if arguments.features and not Path(arguments.features).exists() and not Path("runs", arguments.features).exists():
        raise UserError(f"--features is {arguments.features}, and there is no such file or run")


def of_metrics(arguments: argparse.Namespace, opened: Any) -> tuple[Any, ...]:
    """The evaluations that --metrics names, of pictures drawn as the experiment draws them for its own."""
    from jaxgen.evaluation.generated import METRICS, BitsPerDim, Drawing, FactsRight, Generated, Recognised
    from jaxgen.sampling.diffusion import Sampling

    experiment = opened.experiment
    names = [name.strip() for name in arguments.metrics.split(",") if name.strip()]
    pictures = (*METRICS, RECOGNISED, FACTS)
    known = (*pictures, LIKELIHOOD)
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"--metrics names {unknown[0]}{nearest(unknown[0], known)}; there are {', '.join(known)}")
    if not names:
        raise UserError(f"--metrics names nothing; there are {', '.join(known)}")
    task, found = experiment.task, []
    if drawn := tuple(name for name in pictures if name in names):
        if not hasattr(task, "sample"):
            raise UserError(f"{drawn[0]} of --metrics is of pictures that a run draws, and a {type(task).__name__} "
                            "draws none")
        own = sorted(experiment.evaluations, key=lambda e: not isinstance(e, Generated))   # its own first
        ways = (getattr(e, "sampling", None) for e in own)
        sampling = next((way for way in ways if isinstance(way, Sampling)), Sampling())
        features = _network(arguments.features) or _named(experiment)
        if features is None and drawn != (FACTS,):
            from jaxgen.cli.features import own_network

            features = own_network(opened, arguments.trust)
        if features is None and drawn != (FACTS,):
            raise UserError(
                "a network is needed to see pictures with, the run's experiment names none, and its data has neither "
                "classes nor captions to train one: give --features FILE, FID's InceptionV3 as .safetensors or .npz, "
                "or the run directory of a classifier"
            )
        if compared := tuple(name for name in METRICS if name in names):
            found.append(Generated(n=arguments.n or Drawing.n, sampling=sampling, metrics=compared, features=features))
        if RECOGNISED in names:
            found.append(Recognised(n=arguments.n or Recognised.n, sampling=sampling, classifier=features))
        if FACTS in names:
            captions = math.ceil(arguments.n / FactsRight.each) if arguments.n else FactsRight.n
            found.append(FactsRight(n=captions, sampling=sampling))
    if LIKELIHOOD in names:
        found.append(BitsPerDim(n=arguments.n or 0))
    return tuple(found)


def _network(given: str | None) -> Any:
    """What --features names."""
    from jaxgen.cli.opened import named
    from jaxgen.evaluation.features import Inception
    from jaxgen.pretrained import Pretrained

    if given is None:
        return None
    if given.endswith(WEIGHTS) or Path(given).is_file() and not given.endswith(".py"):
        return Inception(given)
    return Pretrained(str(named(given)), "task")


def _named(experiment: Any) -> Any:
    """The network that an evaluation of the experiment sees pictures with, or classifies them by."""
    from jaxgen.evaluation.generated import Generated, Recognised

    fields = ((Generated, "features"), (Recognised, "classifier"))
    named = (getattr(e, field) for kind, field in fields for e in experiment.evaluations if isinstance(e, kind))
    return next((network for network in named if network is not None), None)


def ready(evaluations: Sequence[Any], arguments: argparse.Namespace, sharding: Any, weights: str) -> list[Any]:
    """The evaluations with the networks that they name, and told which weights they measure."""
    from jaxgen.evaluation.features import filled
    from jaxgen.evaluation.generated import Drawing
    from jaxgen.experiment import resolve
    from jaxgen.training.opening import network

    def opened(pretrained):
        _, (source,) = resolve({"features": dataclasses.replace(pretrained, part="task")}, arguments.trust)
        return network(pretrained, source.directory, sharding, arguments.trust)

    found = [filled(evaluation, opened) for evaluation in evaluations]
    return [dataclasses.replace(e, weights=weights) if isinstance(e, Drawing) else e for e in found]


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
