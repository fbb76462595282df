"""`jaxgen export RUN OUT`."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxgen.cli import options
from jaxgen.cli.main import DONE
from jaxgen.errors import UserError

DTYPES = ("float32", "bfloat16", "float16")
PROJECTS = ("huggingface", "open_clip")


def parser() -> options.Parser:
    parser = options.Parser(
        "export",
        "Writes a step of a run, or an imported model, as another project reads it: configuration and .safetensors.",
        usage="jaxgen export RUN OUT [--format huggingface|open_clip] [--dtype float32|bfloat16|float16] [--step N]",
    )
    options.add_run(parser)
    parser.add_argument("out", nargs="?", metavar="OUT", help="the folder, which is made")
    parser.add_argument("--format", default=PROJECTS[0], choices=PROJECTS, help="whose (huggingface)")
    parser.add_argument("--dtype", default=DTYPES[0], choices=DTYPES, help="format of the numbers (float32)")
    return parser


def run(argv: Sequence[str]) -> int:
    arguments = parser().parse(argv)
    if arguments.run_dir and arguments.run and not arguments.out:
        arguments.run, arguments.out = None, arguments.run
    if not arguments.out:
        raise UserError("jaxgen export needs a run and the folder to write: RUN OUT")
    out = Path(arguments.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists already; give another OUT")
    from jaxgen.cli.opened import open_run

    opened = open_run(arguments, "export")
    import json

    import jax
    import ml_dtypes  # noqa: F401   (bfloat16 becomes known to numpy)
    import numpy as np

    from jaxgen.data.huggingface import write as write_tokenizer
    from jaxgen.files import write_whole
    from jaxgen.interop.families import format_for
    from jaxgen.interop.formats import Pictures, written
    from jaxgen.interop.safetensors import write
    from jaxgen.tasks.diffusion import Diffusion

    if jax.process_count() > 1:
        raise UserError("jaxgen export runs in one process")
    task, data = opened.experiment.task, opened.experiment.data
    if isinstance(task, Diffusion):
        return _pipeline(opened, arguments, out)
    module = _module(task, opened)
    patches = getattr(data, "patches", 0)
    format = format_for(module, arguments.format, naflex=bool(patches))
    format.check(module)
    channels = getattr(getattr(module, "image", module), "channels", 3)
    size = getattr(data, "size", None) or getattr(getattr(module, "image", module), "image_size", 224)
    mean, std = (values * channels if len(values) == 1 else values for values in (task.mean, task.std))
    pictures = Pictures(size, mean, std, patches=patches, **_fitted(getattr(data, "fit", ()), size))
    tensors = written(format, module, _variables(task, module, opened), np.dtype(arguments.dtype))
    tokenizer = _tokenizer(opened.directory)
    files = format.files(module, pictures)
    for config in files.values():
        _tell_tokens(config, tokenizer, arguments.dtype)
    paths = write(out, tensors, format.weights)
    try:
        for name, content in files.items():
            write_whole(out / name, json.dumps(content, indent=1) + "\n")
        told = write_tokenizer(tokenizer, out)
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror or error}") from None
    size = sum(path.stat().st_size for path in paths)
    print(f"{out}: {format.name}, step {opened.step} of {opened.directory}, {size:,} bytes in {len(paths)} file(s)")
    if tokenizer is None and "text_config" in files.get("config.json", {}):
        print("the model has no tokenizer here, so which token ends a text is not known: eos_token_id in config.json "
              "is a guess")
    if tokenizer is not None and not told:
        print(f"its tokenizer ({tokenizer.kind}) has no form there, and is not written")
    return DONE


def _pipeline(opened: Any, arguments: argparse.Namespace, out: Path) -> int:
    """A run that draws pictures, as a pipeline of diffusers."""
    from jaxgen.cli.pipelines import exported

    if arguments.format != PROJECTS[0]:
        raise UserError(f"{opened.directory} draws pictures, and {arguments.format} does not; --format {PROJECTS[0]} "
                        "writes it")  # fmt: skip
    tokenizer = _tokenizer(opened.directory)
    name, paths = exported(opened, tokenizer, out, arguments.dtype)
    size = sum(path.stat().st_size for path in paths)
    print(f"{out}: diffusers {name}, step {opened.step} of {opened.directory}, {size:,} bytes in {len(paths)} file(s)")
    if tokenizer is not None and not (out / "tokenizer").is_dir():
        print(f"its tokenizer ({tokenizer.kind}) is not CLIP's, and is not written")
    return DONE


def _module(task: Any, opened: Any) -> Any:
    from jaxgen.interop.autoencoder import with_statistics
    from jaxgen.models.autoencoder import Autoencoder

    module = getattr(task, "model", None)
    if module is None or not hasattr(task, "mean"):
        raise UserError(f"{opened.directory} is a run of a {type(task).__name__}, which cannot be exported yet")
    if isinstance(module, Autoencoder):
        return with_statistics(module, (opened.state or {}).get("model", {}))
    return module


def _fitted(fit: tuple[Any, ...], size: int) -> dict[str, Any]:
    """How data makes a picture as large as the model wants it, in the words of `Pictures`."""
    from jaxgen.data.transforms import Resize

    first = fit[0] if fit else None
    if not isinstance(first, Resize):
        return {"crop": not fit}
    resize = first.size if first.size != size else 0
    return {"crop": first.mode == "shortest", "resize": resize, "filter": first.filter}


def _variables(task: Any, module: Any, opened: Any) -> dict[str, Any]:
    """The module's own variables, of what the run keeps by part."""
    import math

    import jax.numpy as jnp

    from jaxgen.models.clip import CLIP
    from jaxgen.tasks.vision import turned

    params, state = opened.params, opened.state or {}
    if not isinstance(module, CLIP):
        return {"params": params["model"], **state.get("model", {})}
    if not module.bias and module.max_scale:   # other projects know no bound, or put the parameter itself there
        scale = jnp.minimum(params["temperature"]["scale"], math.log(module.max_scale))
        params = {**params, "temperature": {**params["temperature"], "scale": scale}}
    return {"params": params, **turned(state)}


def _tokenizer(directory: Path) -> Any:
    from jaxgen.data.tokenizers import load

    return load(directory / "tokenizer") if (directory / "tokenizer" / "tokenizer.json").is_file() else None


def _tell_tokens(config: dict[str, Any], tokenizer: Any, dtype: str) -> None:
    """Puts into a configuration what the tokenizer and the numbers are."""
    from jaxgen.data.huggingface import CaptionTokenizer

    if "model_cfg" in config and isinstance(tokenizer, CaptionTokenizer):
        clean = "canonicalize" if tokenizer.plain else "lower"
        config["model_cfg"]["text_cfg"]["tokenizer_kwargs"] = {"clean": clean}
    if "dtype" in config:
        config["dtype"] = dtype
    if tokenizer is None or "text_config" not in config:
        return
    padding = tokenizer.eos if tokenizer.padding is None else tokenizer.padding
    config["text_config"] |= {"eos_token_id": tokenizer.eos, "pad_token_id": padding}
    if config["model_type"] == "clip" and tokenizer.eos == 2:
        raise UserError("this tokenizer ends texts with the id 2, which transformers takes for a mark of the first "
                        "CLIP models, whose texts end with the largest id")
