"""The families whose weights come in and go out, and which of their forms a model is written in."""

from pathlib import Path
from typing import Any

import flax.linen as nn

from jaxgen.errors import UserError, nearest
from jaxgen.interop import mmdit
from jaxgen.interop.autoencoder import AutoencoderFormat
from jaxgen.interop.clip import ClipFormat, OpenClipFormat, Siglip2Format, SiglipFormat
from jaxgen.interop.diffusers import DiTFormat, UNetFormat
from jaxgen.interop.formats import Format, Found, opened, read_json
from jaxgen.interop.resnet import BitFormat, ResNetFormat, TimmResNetFormat
from jaxgen.interop.text import ClipTextFormat
from jaxgen.interop.vit import TimmViTFormat, ViTFormat
from jaxgen.models.autoencoder import Autoencoder
from jaxgen.models.clip import CLIP
from jaxgen.models.dit import DiT
from jaxgen.models.mmdit import MMDiT
from jaxgen.models.resnet import ResNet
from jaxgen.models.text import TextTower
from jaxgen.models.unet import UNet
from jaxgen.models.vit import ViT

PIPELINE = "model_index.json"
FORMATS: tuple[Format, ...] = (
    ClipFormat(), SiglipFormat(), Siglip2Format(), OpenClipFormat(), ViTFormat(), TimmViTFormat(), ResNetFormat(),
    BitFormat(), TimmResNetFormat(), UNetFormat(linear=False), UNetFormat(linear=True), DiTFormat(),
    *mmdit.FORMATS, AutoencoderFormat(), ClipTextFormat(),
)  # fmt: skip


def find(path: str | Path, formats: tuple[Format, ...] = FORMATS) -> Found:
    """The model of another project in a folder."""
    return opened(path, formats)


def component(path: str | Path, name: str, formats: tuple[Format, ...] = FORMATS) -> Found:
    """One part of a pipeline of diffusers, such as its "unet": the folder of that name in its folder `path`, whose
    model_index.json lists them. Raises UserError where there is none, or none that is known."""
    parts = parts_of(path)
    if name not in parts:
        raise UserError(f"the pipeline {path} has no {name}{nearest(name, parts)}; its parts are {', '.join(parts)}")
    return opened(Path(path) / name, formats)


def parts_of(path: str | Path) -> dict[str, str]:
    """The parts of a pipeline of diffusers, each with the name of its class there."""
    file = Path(path) / PIPELINE
    if not file.is_file():
        raise UserError(f"{path} has no {PIPELINE}, which lists the parts of a pipeline")
    told = {part: value for part, value in read_json(file).items() if isinstance(value, list) and len(value) == 2}
    return {part: str(kind) for part, (library, kind) in told.items() if library and kind}


def format_for(module: nn.Module, project: str = "huggingface", naflex: bool = False) -> Format:
    """The form of a project in which a module is written. UserError where it has none."""
    kinds: dict[tuple[Any, str], Format] = {
        (CLIP, "open_clip"): OpenClipFormat(),
        (ViT, "huggingface"): ViTFormat(),
        (DiT, "huggingface"): DiTFormat(),
        (Autoencoder, "huggingface"): AutoencoderFormat(),
        (TextTower, "huggingface"): ClipTextFormat(),
    }
    if isinstance(module, CLIP):
        pair = (Siglip2Format() if naflex else SiglipFormat()) if module.bias else ClipFormat()
        kinds[(CLIP, "huggingface")] = pair
    if isinstance(module, ResNet):
        kinds[(ResNet, "huggingface")] = BitFormat() if module.form == "bit" else ResNetFormat()
    if isinstance(module, MMDiT):
        kinds[(MMDiT, "huggingface")] = mmdit.format_for(module)
    if isinstance(module, UNet):   # the older ones have a number of heads, the newer ones heads of one size
        kinds[(UNet, "huggingface")] = UNetFormat(linear=not module.heads)
    found = kinds.get((type(module), project))
    if found is None:
        raise UserError(f"a {type(module).__name__} cannot be written in the form of {project}")
    return found
