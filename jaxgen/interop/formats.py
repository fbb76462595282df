"""What other projects' model folders say, as modules of ours, and back.

A `Format` is one family in one project's words.
"""

import abc
import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import flax.linen as nn
import jax

from jaxgen import record
from jaxgen.errors import UserError, nearest
from jaxgen.interop.names import Expanded, NameMap, flat, nested
from jaxgen.interop.safetensors import Lazy, Tensors
from jaxgen.sharding import Sharding, names_of, unbox

CONFIGS = ("config.json", "open_clip_config.json")
KINDS = ("model_type", "architecture", "_class_name")   # where a configuration says of what family it is
RUNTIME = ("scan", "remat", "kernel", "dtype", "patch_dropout", "max_scale")   # fields that no weights depend on


@dataclasses.dataclass(frozen=True)
class Pictures:
    """How the pictures that a model was trained on were prepared."""

    size: int = 224
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    crop: bool = True
    """The picture keeps its proportions, and the middle is cut out; False squeezes it."""
    resize: int = 0
    """Pixels of the shorter side (squeezed: of both) before the middle of `size` is cut out; 0 for `size`."""
    filter: str = "bicubic"
    """How pixels are interpolated."""
    patches: int = 0
    """Patches of a picture that keeps its proportions (NaFlex); 0 for pictures of one size."""


class Format(abc.ABC):
    """A family of models in the words of one project."""

    name: ClassVar[str]
    weights: ClassVar[str] = "model.safetensors"

    @abc.abstractmethod
    def recognises(self, config: Mapping[str, Any]) -> bool:
        """Whether this is such a model's configuration."""

    @abc.abstractmethod
    def module(self, config: Mapping[str, Any], tensors: Mapping[str, Any]) -> nn.Module:
        """Our module. UserError for what it cannot express. Sizes may be taken from the shapes of `tensors`."""

    @abc.abstractmethod
    def names(self, module: nn.Module) -> NameMap:
        """The map of its variables ("params/...", "batch_stats/...")."""

    @abc.abstractmethod
    def config(self, module: nn.Module) -> dict[str, Any]:
        """The configuration that `module` reads."""

    @abc.abstractmethod
    def inputs(self, module: nn.Module) -> tuple[Any, ...]:
        """Arguments for `module.init`."""

    def pictures(self, config: Mapping[str, Any], module: nn.Module) -> Pictures:
        """How pictures are prepared, where the configuration says it."""
        return Pictures(getattr(getattr(module, "image", module), "image_size", 224))

    def files(self, module: nn.Module, pictures: Pictures) -> dict[str, dict[str, Any]]:
        """Further files to write, by name: the configuration with how pictures are prepared."""
        return {
            "config.json": self.config(module),
            "preprocessor_config.json": preprocessor(module, pictures),
        }

    def check(self, module: nn.Module) -> None:
        """Raises UserError where this format has no words for the module."""
        try:
            again = self.module(self.config(module), {})
        except (KeyError, AttributeError) as error:   # a part that the family has not
            kind = type(module).__name__
            raise UserError(f"a {kind} of this kind cannot be written as {self.name}: {error}") from None
        found = record.differences(again, default_width(module))
        differing = [d for d in found if d.path.split(".")[-1] not in RUNTIME]
        if differing:
            told = ", ".join(f"{d.path} is {d.new!r} and would be {d.old!r}" for d in differing[:8])
            raise UserError(f"the model cannot be written as {self.name}: {told}")


@dataclasses.dataclass(frozen=True)
class Found:
    """A model folder of another project, opened: nothing of its weights is read yet."""

    path: Path
    format: Format
    module: nn.Module
    tensors: Tensors
    pictures: Pictures

    @functools.cached_property
    def boxed(self) -> dict[str, Any]:
        return variables(self.format, self.module)

    def read(self, sharding: Sharding | None = None) -> dict[str, Any]:
        """The module's variables, each shard streamed to its device; without `sharding` onto the first one.

        Raises UserError that lists every tensor that does not fit."""
        shapes = unbox(self.boxed)
        if sharding is not None:
            layout = sharding.tree(shapes, names_of(self.boxed))
            shapes = jax.tree.map(lambda s, l: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=l), shapes, layout)
        target = flat(shapes)
        return nested(self.format.names(self.module).expand(target).read(self.tensors, target, str(self.path)))


def variables(format: Format, module: nn.Module) -> dict[str, Any]:
    """The module's variables as boxed shapes."""
    return jax.eval_shape(module.init, jax.random.key(0), *format.inputs(module))


def opened(path: str | Path, formats: tuple[Format, ...]) -> Found:
    """The model in the folder `path`. Raises UserError where it is of no known family, or not whole."""
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"{path} is no folder with a model in it"
                        + (": the folder that holds the file is meant" if folder.is_file() else ""))
    config = read_config(folder)
    format = next((f for f in formats if f.recognises(config)), None)
    if format is None:
        kind = str(next(filter(None, map(config.get, KINDS)), "of an unknown kind"))
        raise UserError(
            f"{path} holds a model '{kind}', which is not imported{nearest(kind, [f.name for f in formats])}; known "
            f"are {', '.join(f.name for f in formats)}"
        )
    tensors = Tensors(folder)
    try:
        module = format.module(config, tensors)
        pictures = format.pictures(config, module)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"the configuration of {path} is not that of a {format.name}: {error!r}") from None
    return Found(folder, format, module, tensors, pictures)


def read_config(folder: Path) -> dict[str, Any]:
    """What the folder's JSON says of the model, with what it says of pictures under "preprocessor"."""
    for name in CONFIGS:
        if (folder / name).is_file():
            config = read_json(folder / name)
            break
    else:
        raise UserError(f"{folder} has no {' or '.join(CONFIGS)}, which says what the model is")
    if (folder / "preprocessor_config.json").is_file():
        config["preprocessor"] = read_json(folder / "preprocessor_config.json")
    return config


def read_json(file: Path) -> dict[str, Any]:
    """The object that a JSON file holds. UserError where it holds none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {file}: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{file} is not the description of a model")
    return content


def written(format: Format, module: nn.Module, leaves: Mapping[str, Any], dtype: Any) -> dict[str, Lazy]:
    """The tensors of their file, made of our variables."""
    format.check(module)
    leaves = flat(leaves)
    expanded: Expanded = format.names(module).expand(leaves)
    return expanded.written(leaves, dtype)


def default_width(module: nn.Module) -> nn.Module:
    """The module with 0 for a feed-forward width that is its default, its towers too."""
    parts = {f.name: getattr(module, f.name) for f in record.fields(module)}
    parts = {name: default_width(value) for name, value in parts.items() if isinstance(value, nn.Module)}
    width = getattr(module, "mlp_width", 0)
    if width and width == module.clone(mlp_width=0).block.mlp.width:
        parts["mlp_width"] = 0
    return module.clone(**parts)


# What the projects' words have in common.

ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu_exact", "gelu_pytorch_tanh": "gelu", "gelu_new": "gelu",
               "relu": "relu", "silu": "silu", "swish": "silu"}  # fmt: skip


def activation(theirs: str) -> str:
    if theirs not in ACTIVATIONS:
        raise UserError(f"the activation '{theirs}' is unknown{nearest(theirs, ACTIVATIONS)}")
    return ACTIVATIONS[theirs]


def activation_name(ours: str) -> str:
    for theirs, name in ACTIVATIONS.items():
        if name == ours:
            return theirs
    raise UserError(f"the activation '{ours}' has no name there; they are {', '.join(ACTIVATIONS.values())}")


def require(config: Mapping[str, Any], what: str, **wanted: Any) -> None:
    """Raises UserError where the configuration has other values than these."""
    for key, value in wanted.items():
        if config.get(key, value) != value:
            raise UserError(f"{what} with {key} = {config[key]!r} is not imported, only {value!r}")


RESAMPLING = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}   # Pillow's numbers


def preprocessed(
    config: Mapping[str, Any], size: int, mean: tuple[float, ...], std: tuple[float, ...], crop: bool = True
) -> Pictures:
    """What preprocessor_config.json says, or the family's own way."""
    told = config.get("preprocessor", {})
    shown = Pictures(size, tuple(told.get("image_mean", mean)), tuple(told.get("image_std", std)), crop)
    if not told:
        return shown
    filter = RESAMPLING.get(told.get("resample", 3))
    if filter is None:
        raise UserError(f"pictures resized by resample = {told['resample']!r} are not imported, only by "
                        + ", ".join(f"{number} ({name})" for number, name in RESAMPLING.items()))
    kind = str(told.get("image_processor_type") or told.get("feature_extractor_type"))
    if "crop_pct" in told or kind.startswith("ConvNext"):   # whose words are its own: large pictures are squeezed
        crop = size < 384
        resize = int(size / (told.get("crop_pct") or 224 / 256)) if crop else size
    else:
        crop = bool(told.get("do_center_crop", "crop_size" in told))
        edge = told.get("size")
        edge = edge.get("shortest_edge") if isinstance(edge, Mapping) else edge
        resize = edge if crop and isinstance(edge, int) else size
    return dataclasses.replace(shown, crop=crop, resize=resize if resize != size else 0, filter=filter)


def timm_pictures(told: Mapping[str, Any], size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> Pictures:
    """What timm's pretrained_cfg says, or its own way."""
    filter = str(told.get("interpolation", "bicubic"))
    if filter not in RESAMPLING.values():
        raise UserError(f"pictures resized by interpolation = {filter!r} are not imported, only by "
                        + ", ".join(RESAMPLING.values()))
    resize = int(size / told.get("crop_pct", 0.875))
    crop = told.get("crop_mode") != "squash"
    mean, std = tuple(told.get("mean", mean)), tuple(told.get("std", std))
    return Pictures(size, mean, std, crop, resize if resize != size else 0, filter)


def preprocessor(module: nn.Module, pictures: Pictures) -> dict[str, Any]:
    square = {"height": pictures.size, "width": pictures.size}
    size: dict[str, Any] = {"size": square}
    if pictures.crop:   # by the one whose words these are: some models' own would cut out another part, or none
        size = {"size": {"shortest_edge": pictures.resize or pictures.size}, "crop_size": square,
                "image_processor_type": "CLIPImageProcessor"}  # fmt: skip
    if pictures.patches:
        size = {"max_num_patches": pictures.patches, "patch_size": module.image.patch}
    # pictures become patches bilinearly, here and there
    filter = "bilinear" if pictures.patches else pictures.filter
    return {
        "do_resize": True, "do_center_crop": pictures.crop and not pictures.patches, "do_rescale": True,
        "do_normalize": True, "do_convert_rgb": True, **size,
        "resample": next(number for number, name in RESAMPLING.items() if name == filter), "rescale_factor": 1 / 255,
        "image_mean": list(pictures.mean), "image_std": list(pictures.std),
    }  # fmt: skip


IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
OPENAI = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
