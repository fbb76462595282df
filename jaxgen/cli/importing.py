"""`jaxgen import DIR DEST`."""

import contextlib
import dataclasses
import os
import re
import shutil
from collections.abc import Iterator, Sequence
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
        "Makes a model directory of another project's weights (transformers, open_clip, timm): CLIP, SigLIP, SigLIP 2, "
        "ViT, ResNet, BiT. It is read as a run directory is: by Pretrained, eval, search and export.",
        usage="jaxgen import DIR DEST [--tokenizer PATH]",
    )
    parser.add_argument("directory", nargs="?", metavar="DIR", help="a folder with config.json and .safetensors files")
    parser.add_argument("destination", nargs="?", metavar="DEST", help="the model directory, which is made")
    parser.add_argument("--tokenizer", metavar="PATH", help="its folder or file, where it is not in DIR; none for none")
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

    from jaxgen.interop.families import find
    from jaxgen.tasks.vision import turned
    from jaxgen.training.loop import program_of

    found = find(arguments.directory)
    tokenizer = _tokenizer(found, arguments.tokenizer)
    experiment = described(found, destination, tokenizer)
    shards = jax.device_count()
    experiment = dataclasses.replace(experiment, batch_size=-(-BATCH // shards) * shards)
    program = program_of(experiment)
    variables = found.read(program.sharding)
    params = variables.pop("params")
    if "model" in program.shapes.params:
        params, kept = {"model": params}, {"model": variables} if variables else {}
    else:
        kept = turned(variables)
    state = {"params": params, "state": kept}
    wanted = {"params": program.shapes.params, "state": program.shapes.state}
    if jax.tree.structure(state) != jax.tree.structure(wanted):
        raise ValueError("the imported variables are not those of the task")
    with _made_whole(destination) as folder:
        _save(folder, state, tokenizer)
        _note(folder, found, experiment)
        record.store(folder, experiment)
    count = sum(x.size for x in jax.tree.leaves(params))
    print(f"{destination}: {found.format.name}, {count:,} parameters; Pretrained('{destination}', part='task."
          f"{'model' if 'model' in params else 'image'}') is its picture's tower")
    return DONE


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
        raise UserError(
            f"a {type(module).__name__} is one part of a pipeline, and no model on its own; "
            "jaxgen.interop.families.component reads it"
        )
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
    name = re.sub(r"[^\w.+-]", "-", destination.absolute().name).lstrip("-+") or "model"
    return Experiment(name, task, data, AdamW(), BATCH, steps=1, evaluations=evaluations)


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
    tokenizer = read(given or found.path, found.path)
    if tokenizer.vocab_size > found.module.text.vocab_size:
        raise UserError(f"the tokenizer {given or found.path} has {tokenizer.vocab_size} entries, and the model knows "
                        f"{found.module.text.vocab_size}: it belongs to another model")
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


def _save(folder: Path, state: Any, tokenizer: Any) -> None:
    from jaxgen.training.checkpoint import Checkpoints

    checkpoints = Checkpoints(folder / "checkpoints")
    checkpoints.save(0, state)
    checkpoints.wait()
    if tokenizer is not None:
        tokenizer.save(folder / "tokenizer")


def _note(folder: Path, found: Any, experiment: Any) -> None:
    """What the directory tells of where it came from."""
    import json
    from importlib.metadata import version

    from jaxgen.files import write_whole

    told = {
        "imported": {"path": str(found.path.absolute()), "format": found.format.name, "file": found.tensors.path.name},
        "versions": {name: version(name) for name in ("jaxgen", "jax", "flax", "safetensors")},
    }
    write_whole(folder / "run.json", json.dumps(told, indent=1) + "\n")
