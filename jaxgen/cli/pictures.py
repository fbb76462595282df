"""Pictures for `jaxgen sample`."""

import argparse
import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxgen.cli.asking import asked
from jaxgen.cli.editing import given
from jaxgen.cli.guiding import guide_of
from jaxgen.cli.main import DONE
from jaxgen.data import buckets
from jaxgen.data.sheets import png, sheet
from jaxgen.errors import UserError, nearest
from jaxgen.evaluation.base import Setting
from jaxgen.evaluation.pictures import PicturePreview, drawing
from jaxgen.files import write_whole
from jaxgen.sampling import grids, solvers
from jaxgen.sampling.diffusion import Sampling

BATCH = 64   # pictures at a time
HIGH = 30.0   # a guidance scale beyond which little is left of a picture


def draw(arguments: argparse.Namespace, opened: Any) -> int:
    """Draws pictures, writes each with its settings inside, and a sheet of all."""
    experiment, program = opened.experiment, opened.program
    sampling = settings(arguments, experiment)
    spec = program.spec
    shape = size_of(arguments.size, tuple(spec["image"].shape[1:]) if "image" in spec else None)
    if shape is None:
        raise UserError(f"{opened.directory} makes points, which `jaxgen eval` plots, and no pictures")
    if arguments.aspect:
        shape = (*nearest_shape(arguments, getattr(experiment.data, "table", ()), shape, opened.directory), shape[2])
    beside = getattr(experiment.task, "beside", None)
    if sampling.image_guidance != 1 and not getattr(beside, "drop", 0):
        raise UserError(f"--image-guidance is of no use here: {opened.directory} edits no pictures by instructions")
    shown = given(arguments, beside, shape, opened.directory)
    shape = shown.shape
    experiment.task.check_shape(shape)
    guide = guide_of(arguments, experiment.task, shape)
    conditional = experiment.task.text is not None or getattr(experiment.task.network, "classes", 0)
    if guide and not conditional and not arguments.negative:
        batch, labels, unwanted = {}, guide.asked(arguments), None
    else:
        batch, labels, unwanted = asked(arguments, opened)
    sampling = dataclasses.replace(sampling, shape=shape)
    n = arguments.n or 16
    total = len(labels) * n
    index = np.tile(np.arange(n), len(labels))
    guiding = guide and guide.guiding(labels, lambda array: np.repeat(array, n, 0))
    batch = {k: np.repeat(v, n, 0) for k, v in batch.items()}
    batch |= {k: np.repeat(v, total, 0) for k, v in shown.arrays.items()}
    unwanted = unwanted and {k: np.repeat(v[:1], total, 0) for k, v in unwanted.items()}
    edit = shown.edit(opened, total)

    frames: dict[int, np.ndarray] = {}
    more = {"callback": lambda step, x: frames.setdefault(int(step), np.asarray(x[0]))} if arguments.frames else {}
    more |= {"guide": guide.kind} if guide else {}
    setting = Setting(experiment.task, None, program.sharding, spec, experiment.seed)
    at_a_time = min(BATCH, total)
    run = drawing(setting, at_a_time, sampling, **more)
    found = []
    for first in range(0, total, at_a_time):
        part = slice(first, first + at_a_time)

        def cut(tree, part=part):
            return tree and {k: v[part] for k, v in tree.items()}

        own = edit and dataclasses.replace(
            edit, start=edit.start[part], mask=None if edit.mask is None else edit.mask[part]
        )
        asked_for = cut(batch), index[part], arguments.seed, cut(unwanted), own
        told_guide = guiding and guiding.replace(wanted=cut(guiding.wanted))
        found.append(run(opened.params, opened.state, *asked_for, told_guide))
    pictures = np.concatenate(found)
    jax.effects_barrier()  # until all frames are here
    if jax.process_index():
        return DONE

    labels = [label for label in labels for _ in range(n)]
    told = {"run": str(opened.directory), "step": opened.step, "weights": opened.weights, "seed": arguments.seed}
    told |= described(sampling) | (guide.told if guide else {})
    told |= {k: v for k in ("negative", "image", "mask", "extend", "image_noise") if (v := getattr(arguments, k))}
    told |= {"strength": edit.strength} if edit else {}
    folder = Path(arguments.out) if arguments.out else opened.directory / "drawn" / name_of(labels, arguments.seed)
    files = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for number, (picture, label, i) in enumerate(zip(pictures, labels, index.tolist(), strict=True)):
            inside = json.dumps(told | {"asked": label, "index": i})
            files.append(folder / f"{number:04d}.png")
            write_whole(files[-1], png(picture, {"jaxgen": inside}))
        columns = min(8, n) if len(set(labels)) > 1 else min(8, round(total**0.5 + 0.49))
        cell = max(shape[:2]) * max(1, 96 // max(shape[:2]))
        shown = labels if len(set(labels)) > 1 else [""] * total
        write_whole(folder / "sheet.png", png(sheet(list(pictures), columns, shown, size=min(cell, 512))))
        if frames:
            steps = sorted(frames)
            stages = np.stack([frames[k] for k in steps])
            stages = np.asarray(experiment.task.pictures(opened.params, opened.state, stages))
            strip = sheet(list(stages), min(8, len(stages)), [f"step {k}" for k in steps], size=min(cell, 512))
            write_whole(folder / "frames.png", png(strip))
    except OSError as error:
        raise UserError(f"pictures cannot be written to {folder}: {error.strerror}") from None
    if arguments.json:
        rows = zip(files, labels, index.tolist(), strict=True)
        samples = [{"file": str(file), "asked": label, "index": i} for file, label, i in rows]
        print(json.dumps(told | {"sheet": str(folder / "sheet.png"), "samples": samples}, indent=1))
    else:
        print(f"{total} pictures in {folder}")
        for name in ("sheet.png", "frames.png") if frames else ("sheet.png",):
            print(folder / name)
    return DONE


# ---- what was asked for ----


def settings(arguments: argparse.Namespace, experiment: Any) -> Sampling:
    """The run's own way to draw, as its previews have it, with what was chosen otherwise."""
    own = next((e.sampling for e in experiment.evaluations if isinstance(e, PicturePreview)), Sampling())
    numbers = ("steps", "guidance", "interval", "rescale", "image_guidance")
    changes: dict[str, Any] = {k: v for k in numbers if (v := getattr(arguments, k)) is not None}
    if arguments.solver:
        changes["solver"] = chosen(arguments.solver, solvers, solvers.Solver, "--solver")()
    if arguments.grid:
        changes["grid"] = chosen(arguments.grid, grids, grids.Grid, "--grid")()
    sampling = dataclasses.replace(own, **changes)
    if abs(sampling.guidance) > HIGH:
        print(f"a guidance of {sampling.guidance:g} leaves little of a picture; 1 to 10 is usual", file=sys.stderr)
    if arguments.negative and sampling.guidance == 1:
        raise UserError("--negative is for guidance, which is 1 (none) here; give --guidance 4, for example")
    return sampling


def chosen(name: str, module: Any, base: type, option: str) -> type:
    """The class of a module by its name in any spelling: dpmpp_2m, DpmPP2M; "uniform" for UniformGrid."""
    kinds = {
        k.lower().removesuffix("grid"): v for k, v in vars(module).items()
        if isinstance(v, type) and issubclass(v, base) and v is not base and not k.startswith("_")
        and not v.__subclasses__() and not any(f.default is dataclasses.MISSING for f in dataclasses.fields(v))
    }  # fmt: skip
    known = re.sub(r"[_\W]", "", name).lower().removesuffix("grid")
    if known not in kinds:
        hint = nearest(known, kinds) or f"; there are {', '.join(sorted(kinds))}"
        raise UserError(f"{option} is {name!r}{hint}")
    return kinds[known]


def size_of(text: str | None, shape: tuple[int, ...] | None) -> tuple[int, ...] | None:
    """(H, W, C) of the pictures."""
    if text is None or shape is None:
        return shape
    if not (match := re.fullmatch(r"(\d+)x(\d+)", text)):
        raise UserError(f"--size is {text!r}, which should be like 64x96, height and width")
    return int(match[1]), int(match[2]), shape[2]


def nearest_shape(
    arguments: argparse.Namespace, table: tuple[tuple[int, int], ...], square: tuple[int, ...], run: Path
) -> tuple[int, int]:
    """(H, W) of the shapes in the table of the run's data whose proportions are nearest to --aspect."""
    if arguments.size:
        raise UserError(f"both --size {arguments.size} and --aspect {arguments.aspect} say what is drawn; give one")
    match = re.fullmatch(r"(\d{1,5}):(\d{1,5})", arguments.aspect)
    width, height = map(int, match.groups()) if match else (0, 0)
    if not width or not height:
        raise UserError(f"--aspect is {arguments.aspect!r}, which should be like 3:2, width to height")
    if not table:
        raise UserError(
            f"--aspect is of no use here: {run} has learned pictures of one shape, {square[0]} x {square[1]} "
            "(data.aspect is 1); --size asks for another"
        )
    return table[int(buckets.nearest(table, height, width))]


# ---- what is said ----


def described(sampling: Sampling) -> dict[str, Any]:
    """All that decides a picture besides weights and seed, as data."""
    return {
        "solver": repr(sampling.solver), "grid": repr(sampling.grid), "steps": sampling.steps,
        "guidance": sampling.guidance, "image_guidance": sampling.image_guidance,
        "interval": list(sampling.interval), "rescale": sampling.rescale,
        "threshold": sampling.threshold, "shape": list(sampling.shape),
    }  # fmt: skip


def name_of(labels: list[str], seed: int) -> str:
    """A folder's name for what was asked."""
    text = "-".join(dict.fromkeys(labels)) or "pictures"
    return f"{re.sub(r'[^a-zA-Z0-9]+', '-', text).strip('-')[:60] or 'pictures'}-seed{seed}"
