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

from jaxgen.cli.editing import given
from jaxgen.cli.main import DONE
from jaxgen.data import buckets
from jaxgen.data.captions import encode_captions
from jaxgen.data.sheets import png, sheet
from jaxgen.data.tokenizers import load
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
    batch, labels, unwanted = asked(arguments, opened)
    shown = given(arguments, beside, shape, opened.directory)
    shape = shown.shape
    experiment.task.check_shape(shape)
    sampling = dataclasses.replace(sampling, shape=shape)
    n = arguments.n or 16
    total = len(labels) * n
    index = np.tile(np.arange(n), len(labels))
    batch = {k: np.repeat(v, n, 0) for k, v in batch.items()}
    batch |= {k: np.repeat(v, total, 0) for k, v in shown.arrays.items()}
    unwanted = unwanted and {k: np.repeat(v[:1], total, 0) for k, v in unwanted.items()}
    edit = shown.edit(opened, total)

    frames: dict[int, np.ndarray] = {}
    more = {"callback": lambda step, x: frames.setdefault(int(step), np.asarray(x[0]))} if arguments.frames else {}
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
        found.append(run(opened.params, opened.state, cut(batch), index[part], arguments.seed, cut(unwanted), own))
    pictures = np.concatenate(found)
    if jax.process_index():
        return DONE

    labels = [label for label in labels for _ in range(n)]
    told = {"run": str(opened.directory), "step": opened.step, "weights": arguments.weights, "seed": arguments.seed}
    told |= described(sampling)
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
    numbers = ("steps", "guidance", "image_guidance")
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


def asked(arguments: argparse.Namespace, opened: Any) -> tuple[dict[str, np.ndarray], list[str], dict | None]:
    """(conditions, what they are called, conditions that are unwanted)."""
    task, data, spec = opened.experiment.task, opened.experiment.data, opened.program.spec
    if getattr(task, "text", None) is not None:
        if getattr(arguments, "class"):
            raise UserError(f"--class is of no use here: {opened.directory} takes a --prompt")
        prompts = arguments.prompt
        if not prompts:
            raise UserError(f'{opened.directory} makes pictures of texts: say what they show with --prompt "..."')
        tokenizer, length = load(opened.directory / "tokenizer"), spec["tokens"].shape[1]
        for prompt in (*prompts, arguments.negative or ""):
            told_of(prompt, tokenizer, length)

        def encode(texts):
            tokens, lengths = encode_captions(tokenizer, texts, length)
            return {"tokens": tokens, "lengths": lengths}

        return encode(prompts), list(prompts), arguments.negative and encode([arguments.negative])
    if arguments.prompt or arguments.negative:
        raise UserError(f"{opened.directory} knows no texts: --prompt and --negative are of no use")
    wanted = getattr(arguments, "class")
    classes = getattr(task.network, "classes", 0)
    if not classes:
        if wanted:
            raise UserError(f"{opened.directory} knows no classes: --class is of no use")
        return {}, [""], None
    names = names_of(data, classes)
    numbers = [number_of(w, names) for w in wanted] if wanted else list(range(classes))[: max(1, min(classes, 10))]
    return {"label": np.asarray(numbers, np.int32)}, [names[i] for i in numbers], None


def names_of(data: Any, classes: int) -> list[str]:
    """What the classes are called, where the data says."""
    try:
        known = list(getattr(data, "classes", ()) or data.prepare().classes)
    except (AttributeError, UserError):   # data on another machine
        known = []
    return [str(c) for c in known[:classes]] + [str(i) for i in range(len(known), classes)]


def number_of(wanted: str, names: list[str]) -> int:
    """The number of a class by its name or number."""
    if wanted in names:
        return names.index(wanted)
    if wanted.isdecimal() and int(wanted) < len(names):
        return int(wanted)
    hint = "" if wanted.isdecimal() else nearest(wanted, names)
    raise UserError(f"there is no class {wanted!r}{hint or f'; they are 0 to {len(names) - 1}'}")


def told_of(prompt: str, tokenizer: Any, length: int) -> None:
    """Says what of a prompt the model does not get to see."""
    ids = np.asarray(tokenizer.encode(prompt))
    if len(ids) >= length:
        lost = tokenizer.decode(ids[length - 1 :].tolist())
        print(f"the prompt is cut after {length - 1} tokens; left out is {lost!r}", file=sys.stderr)
    unknown = [w for w in prompt.split() if set(np.asarray(tokenizer.encode(w)).tolist()) == {_unknown(tokenizer)}]
    if unknown:
        print(f"the run's vocabulary lacks {', '.join(map(repr, unknown))}", file=sys.stderr)


def _unknown(tokenizer: Any) -> int:
    found = getattr(tokenizer, "unknown", None)
    return -1 if found is None else found


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
