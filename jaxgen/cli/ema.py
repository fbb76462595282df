"""`jaxgen ema RUN --std 0.1`."""

import dataclasses
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxgen import record, runtime
from jaxgen.cli import options
from jaxgen.cli.main import DONE
from jaxgen.errors import UserError

TOLERATED = 0.3   # error of an average's profile, above which it is told that it is another than was asked for


def parser() -> options.Parser:
    parser = options.Parser(
        "ema",
        "Averages a run's weights over another span of it than those that it keeps (post-hoc EMA, Karras et al. 2024). "
        "The experiment has ema=PowerEma(), and others are made of its checkpoints: checkpoint.keep says how many "
        "there are. What is made is a model directory, which is read as a run directory is.",
        usage="jaxgen ema RUN --std STD [--out DIR] [--step N|latest|best]",
    )
    parser.add_argument("run", nargs="?", metavar="RUN", help="a run directory, or a name under runs/")
    parser.add_argument("--run-dir", metavar="DIR", help="the same as RUN")
    parser.add_argument("--step", default="latest", type=options.step, metavar="N|latest|best",
                        help="the end of the average, a checkpoint (latest)")
    parser.add_argument("--std", type=float, metavar="STD", help="width of the average: the standard deviation of the "
                        "time at which a parameter in it was made, as a share of the run (0.05 to 0.25 are usual)")
    parser.add_argument("--out", metavar="DIR", help="the model directory, which is made (RUN-ema-STD)")
    options.add_trust(parser)
    options.add_devices(parser)
    return parser


def run(argv: Sequence[str]) -> int:
    arguments = parser().parse(argv)
    from jaxgen.cli.opened import directory_of, experiment_of, open_run

    directory = directory_of(arguments, "ema")
    stored = record.stored(directory)
    if arguments.std is None:
        raise UserError("jaxgen ema needs the width of the average: --std 0.1")
    if not str((stored.experiment.get("ema") or {}).get("class")).endswith(":PowerEma"):
        raise UserError(f"{directory} keeps no power-function averages, of which others are made: its experiment needs "
                        "ema=PowerEma()")
    out = Path(arguments.out or f"{directory}-ema-{arguments.std:g}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists already; give another --out")
    runtime.prepare(arguments.devices)
    runtime.start()
    from jaxgen.training.checkpoint import Checkpoints
    from jaxgen.training.ema import check_std, combination

    check_std(arguments.std)
    policy = record.from_record(stored.experiment["checkpoint"], path="experiment.checkpoint")
    checkpoints = Checkpoints(directory / "checkpoints", policy, read_only=True)
    step = checkpoints.find(arguments.step)
    steps = [n for n in checkpoints.steps() if 0 < n <= (step or 0)]
    if len(steps) < 2:
        raise UserError(f"{directory} has {len(steps) or 'no'} checkpoint{'s' * (len(steps) != 1)} up to step "
                        f"{step or 0}, and an average is made of two or more; a larger checkpoint.keep keeps more")
    arguments.step, arguments.weights = step, "raw"
    opened = open_run(arguments, "ema")
    import jax

    if jax.process_count() > 1:
        raise UserError("jaxgen ema runs in one process")
    stds = opened.experiment.ema.stds
    weights, error = combination([n for n in steps for _ in stds], stds * len(steps), step, arguments.std)
    each = dict(zip(steps, weights.reshape(len(steps), -1).tolist(), strict=True))
    average = _average(checkpoints, opened.program.shapes, each)
    _write(out, opened, experiment_of(directory, stored, arguments.trust), average, arguments.std, error)
    print(f"{out}: the average of relative standard deviation {arguments.std:g} at step {step}, from {len(steps)} "
          f"checkpoints; its profile is met to {100 * error:.2g} %")
    if error > TOLERATED:
        print(f"that is far off: averages nearer to {arguments.std:g} than {', '.join(map(str, stds))}, or more "
              "checkpoints before the last, come closer")
    return DONE


def _average(checkpoints: Any, shapes: Any, weights: dict[int, list[float]]) -> Any:
    """The weighted sum of all averages of these steps, of which one step's at a time are in memory."""
    import jax

    from jaxgen.training.ema import combined

    add = jax.jit(lambda total, found, each: combined([total, *found], [1.0, *each]), donate_argnums=0)
    total = None
    for step, each in weights.items():
        _, found = checkpoints.restore(shapes.ema, step, part="ema")
        total = combined(found, each) if total is None else add(total, found, each)
    return jax.tree.map(lambda x, shape: x.astype(shape.dtype), total, shapes.params)


def _write(out: Path, opened: Any, experiment: Any, average: Any, std: float, error: float) -> None:
    """The model directory, whole or not at all; `experiment` is what the run's own record says."""
    import jax

    from jaxgen.cli.importing import _made_whole
    from jaxgen.files import write_whole
    from jaxgen.training.checkpoint import Checkpoints

    name = re.sub(r"[^\w.+-]", "-", out.absolute().name).lstrip("-+") or "model"
    experiment = dataclasses.replace(experiment, name=name, ema=None)
    frozen = jax.tree.map(lambda shape, p: None if shape is None else p, opened.program.shapes.frozen, opened.params,
                          is_leaf=lambda x: x is None)  # fmt: skip
    with _made_whole(out) as folder:
        checkpoints = Checkpoints(folder / "checkpoints")
        checkpoints.save(opened.step, {"params": average, "state": opened.state})
        checkpoints.wait()
        if jax.tree.leaves(frozen):
            checkpoints.save_once("frozen", frozen)
        if (opened.directory / "tokenizer").is_dir():
            shutil.copytree(opened.directory / "tokenizer", folder / "tokenizer")
        told = {"averaged": {"run": str(opened.directory.absolute()), "step": opened.step, "std": std, "error": error}}
        write_whole(folder / "run.json", json.dumps(told, indent=1) + "\n")
        record.store(folder, experiment)
