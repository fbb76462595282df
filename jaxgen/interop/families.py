"""The families whose weights come in and go out, and which of their forms a model is written in."""

from pathlib import Path
from typing import Any

import flax.linen as nn

from jaxgen.errors import UserError
from jaxgen.interop.clip import ClipFormat, OpenClipFormat, Siglip2Format, SiglipFormat
from jaxgen.interop.formats import Format, Found, opened
from jaxgen.interop.resnet import BitFormat, ResNetFormat, TimmResNetFormat
from jaxgen.interop.vit import TimmViTFormat, ViTFormat
from jaxgen.models.clip import CLIP
from jaxgen.models.resnet import ResNet
from jaxgen.models.vit import ViT

FORMATS: tuple[Format, ...] = (
    ClipFormat(), SiglipFormat(), Siglip2Format(), OpenClipFormat(), ViTFormat(), TimmViTFormat(), ResNetFormat(),
    BitFormat(), TimmResNetFormat(),
)  # fmt: skip


def find(path: str | Path, formats: tuple[Format, ...] = FORMATS) -> Found:
    """The model of another project in a folder."""
    return opened(path, formats)


def format_for(module: nn.Module, project: str = "huggingface", naflex: bool = False) -> Format:
    """The form of a project in which a module is written. UserError where it has none."""
    kinds: dict[tuple[Any, str], Format] = {
        (CLIP, "open_clip"): OpenClipFormat(),
        (ViT, "huggingface"): ViTFormat(),
    }
    if isinstance(module, CLIP):
        pair = (Siglip2Format() if naflex else SiglipFormat()) if module.bias else ClipFormat()
        kinds[(CLIP, "huggingface")] = pair
    if isinstance(module, ResNet):
        kinds[(ResNet, "huggingface")] = BitFormat() if module.form == "bit" else ResNetFormat()
    found = kinds.get((type(module), project))
    if found is None:
        raise UserError(f"a {type(module).__name__} cannot be written in the form of {project}")
    return found
