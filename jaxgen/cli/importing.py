"""`jaxgen import DIR DEST`."""

import argparse
import contextlib
import dataclasses
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxgen import record, runtime
from jaxgen.cli import options
from jaxgen.cli.main import DONE
from jaxgen.errors import UserError

BATCH = 64   # examples at a time, where a command says nothing else


def parser() -> options.Parser:
    parser = options.Parser(
        "import",
        "Makes a model directory of another project's weights (transformers, open_clip, timm, diffusers): CLIP, "
        "SigLIP, SigLIP 2, ViT, ResNet, BiT, whole pipelines of Stable Diffusion 1.x and 2.x and of DiT, and parts of "
        "others (SDXL, SD3, Flux). It is read as a run directory is: by Pretrained, sample, eval, search and export.",
        usage="jaxgen import DIR DEST [--tokenizer PATH] [--part NAME]",
    )
    parser.add_argument("directory", nargs="?", metavar="DIR", help="a folder with config.json and .safetensors files, "
                        "or of a pipeline, with model_index.json")
    parser.add_argument("destination", nargs="?", metavar="DEST", help="the model directory, which is made")
    parser.add_argument("--tokenizer", metavar="PATH", help="its folder or file, where it is not in DIR; none for none")
    parser.add_argument("--part", metavar="NAME", help="one part of a pipeline alone: unet, transformer, vae or "
                        "text_encoder")
    options.add_devices(parser)
    return parser


def run(argv: Sequence[str]) -> int:
    arguments = parser().parse(argv)
    if not arguments.destination:
        raise UserError("jaxgen import needs the folder of the model and the directory to make: DIR DEST")
    destination = Path(arguments.destination)
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise UserError(f"{destination} exists already; give another DEST")
    runtime.prepare(arguments.devices)
    runtime.start()
    import jax

    from jaxgen.training.loop import program_of
    from jaxgen.training.parameters import merge

    imported = _pipeline(arguments, destination) or _model(arguments, destination)
    experiment, shards = imported.experiment, jax.device_count()
    experiment = dataclasses.replace(experiment, batch_size=-(-experiment.batch_size // shards) * shards)
    program = program_of(experiment)
    params, state = imported.read(program)
    shapes = program.shapes
    wanted = merge(shapes.params, shapes.frozen), shapes.state
    if jax.tree.structure((params, state)) != jax.tree.structure(wanted):
        raise ValueError("the imported variables are not those of the task")
    moving, frozen = (jax.tree.map(lambda shape, x: None if shape is None else x, part, params, is_leaf=_nothing)
                      for part in (shapes.params, shapes.frozen))  # fmt: skip
    with _made_whole(destination) as folder:
        _save(folder, {"params": moving, "state": state}, frozen, imported.tokenizer)
        _note(folder, imported.parts)
        record.store(folder, experiment)
    count = sum(x.size for x in jax.tree.leaves(params))
    print(f"{destination}: {imported.name}, {count:,} parameters; {imported.use}")
    return DONE


def _nothing(x: Any) -> bool:
    return x is None


@dataclasses.dataclass(frozen=True)
class Imported:
    """What becomes of a folder of another project."""

    name: str
    experiment: Any
    parts: tuple[Any, ...]
    """The folders that were found."""
    read: Callable[[Any], tuple[Any, Any]]
    """program -> (parameters, state) by part."""
    tokenizer: Any
    use: str
    """What it is good for."""


def _model(arguments: argparse.Namespace, destination: Path) -> Imported:
    """The model in a folder, or one part of a pipeline."""
    from jaxgen.interop.families import component, find
    from jaxgen.models.clip import CLIP
    from jaxgen.tasks.vision import turned

    folder, part = arguments.directory, arguments.part
    found = component(folder, part) if part else find(folder)
    tokenizer = _tokenizer(found, arguments.tokenizer)

    def read(program: Any) -> tuple[Any, Any]:
        variables = found.read(program.sharding)
        params = variables.pop("params")
        if "model" in program.shapes.params:
            return {"model": params}, {"model": variables} if variables else {}
        return params, turned(variables)

    experiment = described(found, destination, tokenizer)
    tower = "image" if isinstance(found.module, CLIP) else "model"
    what = "its picture's tower" if experiment.evaluations else f"the {type(found.module).__name__}"
    use = f"Pretrained('{destination}', part='task.{tower}') is {what}"
    return Imported(found.format.name, experiment, (found,), read, tokenizer, use)


def _pipeline(arguments: argparse.Namespace, destination: Path) -> Imported | None:
    """A whole pipeline of diffusers; None where the folder is none, or a part of it is meant."""
    from jaxgen.cli import pipelines
    from jaxgen.data.huggingface import read
    from jaxgen.experiment import Experiment
    from jaxgen.training.optimizers import AdamW

    if arguments.part or not pipelines.is_pipeline(arguments.directory):
        return None
    found = pipelines.opened(arguments.directory)
    tokenizer = None
    if found.tokenizer is not None:
        if arguments.tokenizer == "none":
            raise UserError("a pipeline that draws what a text says needs a tokenizer; --tokenizer none leaves it "
                            "without")
        tokenizer = _checked(read(arguments.tokenizer or found.tokenizer), found.parts["text"].module,
                             arguments.tokenizer or found.tokenizer)  # fmt: skip
    task, data, preview = found.described(tokenizer, str(destination / "tokenizer"))
    experiment = Experiment(_named(destination), task, data, AdamW(), BATCH, steps=1, evaluations=(preview,))
    asked = '--prompt "..."' if tokenizer is not None else "--class NAME"
    left = f" (without {', '.join(found.left)})" if found.left else ""
    kind = pipelines.INPAINTING if task.beside else found.kind
    return Imported(
        f"diffusers {kind}{left}", experiment, tuple(found.parts.values()),
        lambda program: found.read(program.sharding), tokenizer,
        f"jaxgen sample {destination} {asked} draws with it",
    )  # fmt: skip


def described(found: Any, destination: Path, tokenizer: Any) -> Any:
    """The experiment that the model directory records: its task and how its data is read."""
    from jaxgen.data.huggingface import Existing
    from jaxgen.data.imagetext import ImageText, LabelledImages
    from jaxgen.evaluation.calibration import Accuracy
    from jaxgen.evaluation.retrieval import Retrieval
    from jaxgen.experiment import Experiment
    from jaxgen.models.clip import CLIP
    from jaxgen.models.resnet import ResNet
    from jaxgen.models.vit import ViT
    from jaxgen.tasks.classification import Classification
    from jaxgen.tasks.contrastive import Contrastive
    from jaxgen.training.optimizers import AdamW

    module, pictures = found.module, found.pictures
    if not isinstance(module, CLIP | ViT | ResNet):
        return _described_part(module, pictures, destination)
    shown = dict(size=pictures.size, channels=getattr(module, "channels", 3), fit=_fit(pictures))
    normal = dict(mean=pictures.mean, std=pictures.std)
    if isinstance(module, CLIP):
        image, text = module.image, module.text
        task = Contrastive(image, text, "sigmoid" if module.bias else "softmax", **normal)
        if pictures.patches:
            shown |= dict(patches=pictures.patches, patch=image.patch)
        known = ("", text.vocab_size) if tokenizer is None else (str(destination / "tokenizer"), tokenizer.vocab_size)
        data = ImageText(**shown, tokenizer=Existing(*known), length=text.max_length)
        evaluations = (Retrieval(),)
    else:
        task, data = Classification(module, **normal), LabelledImages(**shown)
        evaluations = (Accuracy(),) if module.out else ()
    return Experiment(_named(destination), task, data, AdamW(), BATCH, steps=1, evaluations=evaluations)


def _described_part(module: Any, pictures: Any, destination: Path) -> Any:
    """The experiment of one part of a pipeline, which draws nothing on its own."""
    from jaxgen.data.imagetext import LabelledImages
    from jaxgen.experiment import Experiment
    from jaxgen.models.autoencoder import Autoencoder
    from jaxgen.tasks.autoencoder import Autoencoding
    from jaxgen.tasks.part import Part
    from jaxgen.training.optimizers import AdamW

    task: Any = Part(module)
    data = LabelledImages(size=pictures.size or 64)
    if isinstance(module, Autoencoder):
        task = Autoencoding(module, discriminator=None, measure=False)
        data = dataclasses.replace(data, channels=module.channels)
    return Experiment(_named(destination), task, data, AdamW(), BATCH, steps=1)


def _named(destination: Path) -> str:
    """An experiment's name for a directory."""
    return re.sub(r"[^\w.+-]", "-", destination.absolute().name).lstrip("-+") or "model"


def _fit(pictures: Any) -> tuple[Any, ...]:
    """How a picture is made as large as the model wants it; empty for the way of data that says nothing."""
    from jaxgen.data.transforms import CenterCrop, Resize

    side = pictures.resize or pictures.size
    if pictures.crop and side == pictures.size and pictures.filter == Resize.filter:
        return ()
    resize = Resize(side, "shortest" if pictures.crop else "exact", pictures.filter)
    return (resize, CenterCrop(pictures.size)) if pictures.crop or side != pictures.size else (resize,)


def _tokenizer(found: Any, given: str | None) -> Any:
    """The tokenizer of a model with a text's tower, checked against it."""
    from jaxgen.data.huggingface import FILES, read
    from jaxgen.models.clip import CLIP

    if not isinstance(found.module, CLIP) or given == "none":
        return None
    if given is None and not any((found.path / name).is_file() for name in FILES):
        raise UserError(f"{found.path} has no tokenizer ({', '.join(FILES)}); name one with --tokenizer PATH, or do "
                        "without, and without searches, with --tokenizer none")
    return _checked(read(given or found.path, found.path), found.module.text, given or found.path)


def _checked(tokenizer: Any, text: Any, where: str | Path) -> Any:
    """The tokenizer; UserError where it is not for the text's tower."""
    if tokenizer.vocab_size > text.vocab_size:
        raise UserError(f"the tokenizer {where} has {tokenizer.vocab_size} entries, and the model knows "
                        f"{text.vocab_size}: it belongs to another model")
    return tokenizer


@contextlib.contextmanager
def _made_whole(destination: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `destination` once it is whole."""
    import jax

    if jax.process_count() > 1:
        raise UserError("jaxgen import runs in one process")
    partial = destination.absolute().parent / f".{destination.name}.{os.getpid()}"
    try:
        partial.mkdir(parents=True)
        yield partial
        if destination.exists():
            destination.rmdir()   # empty
        partial.replace(destination)
    except OSError as error:
        raise UserError(f"cannot write {destination}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _save(folder: Path, state: Any, frozen: Any, tokenizer: Any) -> None:
    import jax

    from jaxgen.training.checkpoint import Checkpoints

    checkpoints = Checkpoints(folder / "checkpoints")
    if jax.tree.leaves(frozen):
        checkpoints.save_once("frozen", frozen)
    checkpoints.save(0, state)
    checkpoints.wait()
    if tokenizer is not None:
        tokenizer.save(folder / "tokenizer")


def _note(folder: Path, parts: tuple[Any, ...]) -> None:
    """What the directory tells of where it came from."""
    import json
    from importlib.metadata import version

    from jaxgen.files import write_whole

    imported = [{"path": str(found.path.absolute()), "format": found.format.name, "file": found.tensors.path.name}
                for found in parts]  # fmt: skip
    told = {
        "imported": imported[0] if len(imported) == 1 else imported,
        "versions": {name: version(name) for name in ("jaxgen", "jax", "flax", "safetensors")},
    }
    write_whole(folder / "run.json", json.dumps(told, indent=1) + "\n")
