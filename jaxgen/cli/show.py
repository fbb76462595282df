"""`jaxgen show FILE` or `RUN`: what an experiment is, from its shapes alone; no data is read, no parameter made."""

import argparse
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxgen import record, runtime
from jaxgen.cli import opened, options
from jaxgen.cli.main import DONE
from jaxgen.errors import UserError


def parser() -> options.Parser:
    parser = options.Parser(
        "show",
        "Prints the resolved experiment, parameters by part, FLOPs, and the sharding of every parameter on the mesh.",
        usage="jaxgen show FILE|RUN [--smoke] [--devices N] [--json] [--field.path value ...]",
        add_help=False,
    )
    options.add_file(parser, "an experiment file, a run directory, or a name under runs/")
    parser.add_argument("--devices", type=options.devices, metavar="N",
                        help="devices of the mesh (those of the topology, or here)")
    parser.add_argument("--json", action="store_true", help="print data for programs")
    options.add_trust(parser)
    return parser


def run(argv: Sequence[str]) -> int:
    from jaxgen.cli.experiments import split

    arguments, overrides = split(parser(), argv)
    directory = opened.named(arguments.file) if arguments.file else None
    found = _of_run(arguments, directory, overrides) if directory and directory.is_dir() else _of_file(argv)
    if found is None:
        return DONE
    experiment, pretrained, devices = found
    told = {**describe(experiment, arguments.devices or devices), "pretrained": pretrained}
    if arguments.json:
        print(json.dumps(told, indent=1, allow_nan=False))
    else:
        _print(told, experiment)
    return DONE


Found = tuple[Any, dict[str, Any], int]   # the experiment, the records of its `Pretrained` parts, devices of its mesh


def _of_file(argv: Sequence[str]) -> Found | None:
    """What FILE defines; None when help was asked for, and given."""
    from jaxgen.cli.experiments import chosen

    found = chosen(parser(), argv, simulate=False)
    if found is None:
        return None
    arguments, experiment = found
    from jaxgen.experiment import NoSource, resolve

    try:
        resolved, sources = resolve(experiment, (*arguments.trust, arguments.file), weights=False)
    except NoSource as error:
        known = Path("runs") / experiment.name
        where = known if (known / record.FILE).is_file() else "RUNDIR"
        raise UserError(
            f"{arguments.file} cannot be shown without its source (a run of it can, by jaxgen show {where}): {error}"
        ) from None
    # a smoke form is for the machine at hand, whatever the experiment is for
    devices = 0 if arguments.smoke else chips(experiment.topology)
    return resolved, {s.path: record.to_record(s.pretrained) for s in sources}, devices


def _of_run(arguments: argparse.Namespace, directory: Path, overrides: Sequence[str]) -> Found | None:
    """What a run records of itself, on as many devices as it was trained on; None when help was asked for, and given.

    Its `Pretrained` parts are the modules that they became, so that no source is needed.
    """
    if arguments.help:
        parser().print_help()
        return None
    if arguments.smoke:
        raise UserError(f"--smoke is for an experiment file, and {directory} is a directory")
    stored = record.stored(directory)   # before anything slow
    runtime.prepare()
    experiment = opened.experiment_of(directory, stored, arguments.trust, overrides)
    from jaxgen.training.loop import noted

    devices = re.match(r"(\d+) x ", str(noted(directory).get("devices")))
    return experiment, stored.pretrained, int(devices[1]) if devices else 0


def describe(experiment: Any, devices: int = 0) -> dict[str, Any]:
    """All that is shown, as JSON data, on so many devices (0 for those at hand).

    Bytes are of one device; FLOPs are of a training step, forward and backward.
    """
    import jax

    from jaxgen.training.loop import program_of

    count = devices or jax.device_count()
    program = program_of(experiment, count, "tpu" if devices and devices == chips(experiment.topology) else "")
    spec = program.spec
    shapes, _ = program.shapes, program.batch_shardings   # which raises where the batch does not fit the mesh
    rows = _rows(program)
    with program.sharding.use():
        notes = experiment.task.notes(spec)
    flops, (unit, units) = experiment.task.flops(spec), experiment.task.units(spec)
    parts = {}
    for row in rows:
        part = parts.setdefault(row["name"].partition("/")[0], {"count": 0, "trainable": 0})
        part["count"] += math.prod(row["shape"])
        part["trainable"] += math.prod(row["shape"]) * row["trainable"]
    return {
        "experiment": record.to_record(experiment),
        "devices": count,
        "mesh": {axis: size for axis, size in program.sharding.mesh.shape.items()},
        "parameters": {"count": sum(p["count"] for p in parts.values()), "parts": parts},
        "flops": {"step": flops, "unit": unit, "units": units, "per_unit": None if flops is None else flops / units},
        "batch": {k: {"shape": list(s.shape), "dtype": s.dtype.name} for k, s in spec.items()},
        "state_bytes": {
            name: sum(_bytes(leaf) for leaf in jax.tree.leaves(getattr(shapes, name)))
            for name in ("params", "frozen", "state", "optimizer", "ema")
        },
        "notes": notes,
        "sharding": rows,
    }


def chips(topology: str) -> int:
    """Devices of a topology such as v5p:4x4x4 or 2*v5e:16x16 (slices first); 0 where none is named."""
    if not topology:
        return 0
    found = re.fullmatch(r"(?:(\d+)\*)?[\w-]+:(\d+(?:x\d+)*)", topology)
    if not found:
        raise UserError(f"topology is {topology!r}, which should be like v5p:4x4x4")
    return int(found[1] or 1) * math.prod(int(n) for n in found[2].split("x"))


def _rows(program: Any) -> list[dict[str, Any]]:
    """One row a parameter, in the tree's order."""
    import jax

    from jaxgen.training.parameters import merge, paths

    shapes = program.shapes
    trainable = {p: True for p in jax.tree.leaves(paths(shapes.params))}
    merged = merge(shapes.params, shapes.frozen)
    names = jax.tree.leaves(paths(merged))
    axes = jax.tree.leaves(jax.tree.map(lambda shape, names: _Axes(names), merged, program.params_names))
    return [
        {
            "name": name,
            "shape": list(leaf.shape),
            "dtype": leaf.dtype.name,
            "axes": list(axis.names),
            "split": [list(entry) if isinstance(entry, tuple) else entry and [entry] for entry in _spec(leaf)],
            "bytes": _bytes(leaf),
            "trainable": name in trainable,
        }
        for name, leaf, axis in zip(names, jax.tree.leaves(merged), axes, strict=True)
    ]


class _Axes:
    """Names of one parameter's axes, as a leaf of a tree."""

    def __init__(self, names: Any):
        self.names = tuple(names)


def _spec(leaf: Any) -> list[Any]:
    spec = list(leaf.sharding.spec)
    return spec + [None] * (len(leaf.shape) - len(spec))


def _bytes(leaf: Any) -> int:
    """On one device."""
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def _print(told: dict[str, Any], experiment: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    from jaxgen.cli.text import number, size

    console = Console(highlight=False, width=10_000)   # a pipe or a narrow window cuts nothing
    for depth, name, value in _lines(experiment):
        console.print(f"{'  ' * depth}{name:<{max(1, 28 - 2 * depth)}} {value}".rstrip(), markup=False)

    def heading(text: str) -> None:
        console.print()
        console.print(text, style="bold", markup=False)

    def table(*columns: str, numbers: Sequence[str] = ()) -> Table:
        made = Table(box=None, pad_edge=False, show_edge=False, header_style="dim")
        for column in columns:
            made.add_column(column, justify="right" if column in numbers else "left", no_wrap=True)
        return made

    parameters, flops, mesh = told["parameters"], told["flops"], told["mesh"]
    heading(f"{number(parameters['count'])} parameters ({parameters['count']:,})")
    parts = table("part", "parameters", "trainable", numbers=("parameters", "trainable"))
    for name, part in parameters["parts"].items():
        parts.add_row(name, f"{part['count']:,}", f"{part['trainable']:,}")
    console.print(parts)
    heading("Compute")
    unit = flops["unit"].removesuffix("s")
    if flops["step"] is None:
        console.print("FLOPs: unknown for this task")
    else:
        console.print(f"{number(flops['per_unit'])} FLOPs a {unit} of training ({number(flops['step'])} a step of "
                      f"{flops['units']:,} {flops['unit']})")
    for name, note in told["notes"].items():
        console.print(f"{name}: {note}", markup=False)
    axes = ", ".join(f"{axis} {n}" for axis, n in mesh.items() if n > 1) or "not split"
    heading(f"Sharding on {told['devices']} device{'s' * (told['devices'] > 1)} ({axes})")
    rows = table("parameter", "shape", "axes", "split over", "a device", numbers=("a device",))
    for row in told["sharding"]:
        pairs = zip(row["axes"], row["split"], strict=True)
        split = ", ".join(f"{axis or '-'}: {'+'.join(by)}" for axis, by in pairs if by)
        rows.add_row(
            row["name"] + ("" if row["trainable"] else " (frozen)"), "x".join(map(str, row["shape"])) or "scalar",
            " ".join(axis or "-" for axis in row["axes"]), split or "whole", size(row["bytes"]),
        )
    console.print(rows)
    state = {name: n for name, n in told["state_bytes"].items() if n}
    console.print(f"state on a device: {size(sum(state.values()))} "
                  f"({', '.join(f'{name} {size(n)}' for name, n in state.items())})")


def _lines(tree: Any, depth: int = 0) -> list[tuple[int, str, str]]:
    """(depth, name, value) of each field, a line each."""
    lines = [(0, type(tree).__name__, "")] if depth == 0 else []
    children = [(f.name, getattr(tree, f.name)) for f in record.fields(tree)] if record.is_node(tree) else \
        [(str(k), v) for k, v in (tree.items() if isinstance(tree, dict) else enumerate(tree))]
    for name, value in children:
        if record.is_node(value):
            lines += [(depth + 1, name, type(value).__name__), *_lines(value, depth + 1)]
        elif isinstance(value, dict) and value or isinstance(value, tuple) and any(map(record.is_node, value)):
            lines += [(depth + 1, name, ""), *_lines(value, depth + 1)]
        elif isinstance(value, tuple):
            lines.append((depth + 1, name, " ".join(map(str, value)) or "()"))
        else:
            lines.append((depth + 1, name, repr(value) if isinstance(value, str) and not value else str(value)))
    return lines
