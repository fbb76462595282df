"""Residual networks: the names and the configurations of transformers, and of timm and torchvision."""

import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxgen.errors import UserError
from jaxgen.interop import layers
from jaxgen.interop.formats import HALF, IMAGENET, Format, preprocessed, require, timm_pictures
from jaxgen.interop.names import CONVOLUTION, NameMap, Rule
from jaxgen.interop.vit import label_names, labels
from jaxgen.models.resnet import STAGES, ResNet


class Residuals(Format):
    """What all formats of residual networks share."""

    def inputs(self, module):
        return (jnp.zeros((1, 64, 64, module.channels)),)


def convolution(theirs: str, ours: str) -> list[Rule]:
    return [Rule(f"{theirs}.weight", f"params/{ours}/kernel", CONVOLUTION)]


def batch_norm(theirs: str, ours: str) -> list[Rule]:
    return [
        *layers.norm(theirs, f"params/{ours}"),
        Rule(f"{theirs}.running_mean", f"batch_stats/{ours}/mean"),
        Rule(f"{theirs}.running_var", f"batch_stats/{ours}/var"),
        # counts steps, for an average that nobody uses
        Rule(f"{theirs}.num_batches_tracked", f"batch_stats/{ours}/mean", constant=np.int64(0)),
    ]


def blocks(module: ResNet) -> list[tuple[int, int, str]]:
    """(stage from 0, block from 0, our name) of each block."""
    return [(s, b, f"stage{s + 1}_block{b + 1}") for s, n in enumerate(STAGES[module.depth]) for b in range(n)]


def depth_of(counts: tuple[int, ...], bottleneck: bool) -> int:
    """The network with so many blocks a stage."""
    for depth, known in STAGES.items():
        if known == counts and (depth >= 50) == bottleneck:
            return depth
    kind = "bottleneck" if bottleneck else "basic"
    raise UserError(f"a residual network of {counts} {kind} blocks is not imported; there are "
                    + ", ".join(f"{b} ({d})" for d, b in STAGES.items() if (d >= 50) == bottleneck))


def widths(width: int, bottleneck: bool) -> list[int]:
    """Channels of the four stages."""
    return [width * 2**i * (4 if bottleneck else 1) for i in range(4)]


def same_widths(found: list[int], width: int, bottleneck: bool) -> None:
    if found != widths(width, bottleneck):
        raise UserError(f"a residual network with stages of {found} channels after a stem of {width} is not imported, "
                        f"only of {widths(width, bottleneck)}")


class ResNetFormat(Residuals):
    """ResNetForImageClassification and ResNetModel."""

    name = "transformers ResNet"

    def recognises(self, config):
        return config.get("model_type") == "resnet"

    def module(self, config, tensors):
        require(config, "a ResNet", hidden_act="relu", downsample_in_first_stage=False, downsample_in_bottleneck=False)
        bottleneck = config.get("layer_type", "bottleneck") == "bottleneck"
        width = config.get("embedding_size", 64)
        same_widths(list(config.get("hidden_sizes", (256, 512, 1024, 2048))), width, bottleneck)
        depth = depth_of(tuple(config.get("depths", (3, 4, 6, 3))), bottleneck)
        return ResNet(depth, width=width, channels=config.get("num_channels", 3), out=classes(config))

    def names(self, module):
        at = "resnet." if module.out else ""
        rules = unit(f"{at}embedder.embedder", "stem", "stem_norm") + HEAD
        for s, b, ours in blocks(module):
            theirs = f"{at}encoder.stages.{s}.layers.{b}"
            for i in range(3 if module.bottleneck else 2):
                rules += unit(f"{theirs}.layer.{i}", f"{ours}/conv{i + 1}", f"{ours}/norm{i + 1}")
            rules += unit(f"{theirs}.shortcut", f"{ours}/shortcut", f"{ours}/shortcut_norm")
        return NameMap(rules)

    def config(self, module):
        plain(module, "batch")
        return {
            **described(module, "ResNet", "resnet"),
            "layer_type": "bottleneck" if module.bottleneck else "basic",
            "downsample_in_first_stage": False, "downsample_in_bottleneck": False,
        }  # fmt: skip

    def pictures(self, config, module):
        return preprocessed(config, size_of(config), *IMAGENET)


class BitFormat(Residuals):
    """BitForImageClassification and BitModel: BiT."""

    name = "transformers BiT"

    def recognises(self, config):
        return config.get("model_type") == "bit"

    def module(self, config, tensors):
        require(config, "a BiT", hidden_act="relu", layer_type="preactivation", global_padding=None,
                embedding_dynamic_padding=False, output_stride=32)  # fmt: skip
        width, factor = config.get("embedding_size", 64), config.get("width_factor", 1)
        same_widths([size * factor for size in config.get("hidden_sizes", (256, 512, 1024, 2048))], width, True)
        depth = depth_of(tuple(config.get("depths", (3, 4, 6, 3))), True)
        return ResNet(depth, "bit", width, classes(config), channels=config.get("num_channels", 3),
                      groups=config.get("num_groups", 32))  # fmt: skip

    def names(self, module):
        at = "bit." if module.out else ""
        return NameMap([
            *convolution(f"{at}embedder.convolution", "stem"), *HEAD,
            *layers.norm(f"{at}norm", "params/final_norm"),
            *(rule for s, b, ours in blocks(module) for rule in bit(f"{at}encoder.stages.{s}.layers.{b}", ours)),
        ])  # fmt: skip

    def config(self, module):
        plain(module, "bit")
        return {
            **described(module, "Bit", "bit"), "layer_type": "preactivation", "num_groups": module.groups,
            "global_padding": None, "width_factor": 1, "output_stride": 32, "embedding_dynamic_padding": False,
        }  # fmt: skip

    def pictures(self, config, module):
        return preprocessed(config, size_of(config), *HALF)


def unit(theirs: str, convolved: str, normed: str) -> list[Rule]:
    """transformers' convolution with its batch norm."""
    return convolution(f"{theirs}.convolution", convolved) + batch_norm(f"{theirs}.normalization", normed)


def bit(theirs: str, ours: str) -> list[Rule]:
    """A block of BiT, which all call the same."""
    rules = convolution(f"{theirs}.downsample.conv", f"{ours}/shortcut")
    for i in range(1, 4):
        rules += convolution(f"{theirs}.conv{i}", f"{ours}/conv{i}")
        rules += layers.norm(f"{theirs}.norm{i}", f"params/{ours}/norm{i}")
    return rules


HEAD = layers.linear("classifier.1", "params/head")


def classes(config: Mapping[str, Any]) -> int:
    labelled = any("ForImageClassification" in a for a in config.get("architectures") or ())
    return labels(config) if labelled else 0


def plain(module: ResNet, form: str) -> None:
    if module.form != form:
        raise UserError(f"a ResNet of the form '{module.form}' cannot be written as one of the form '{form}'")


def described(module: ResNet, architecture: str, kind: str) -> dict[str, Any]:
    return {
        "architectures": [f"{architecture}{'ForImageClassification' if module.out else 'Model'}"], "model_type": kind,
        "depths": list(STAGES[module.depth]), "embedding_size": module.width, "num_channels": module.channels,
        "hidden_sizes": widths(module.width, module.bottleneck), "hidden_act": "relu", **label_names(module.out),
        "dtype": "float32",
    }  # fmt: skip


def size_of(config: Mapping[str, Any]) -> int:
    """Pixels along the side of the pictures that a network without a size of its own was trained on."""
    told = config.get("preprocessor", {})
    told = told.get("crop_size") or told.get("size") or 224
    return next(iter(told.values())) if isinstance(told, dict) else told


class TimmResNetFormat(Residuals):
    """timm's ResNet, which are torchvision's names, and its BiT; read alone: sizes are those of the tensors."""

    name = "timm resnet"

    def recognises(self, config):
        return re.match(r"resnet(v2_)?\d+", str(config.get("architecture", ""))) is not None

    def module(self, config, tensors):
        if config["architecture"].startswith("resnetv2_"):
            return self._bit(config["architecture"], tensors)
        if not {"conv1.weight", "layer4.0.conv1.weight"} <= tensors.keys():
            raise UserError(f"a timm {config['architecture']} with a stem of its own is not imported")
        bottleneck = "layer1.0.conv3.weight" in tensors
        width, channels, *_ = tensors["conv1.weight"].shape
        last = 3 if bottleneck else 2
        same_widths([tensors[f"layer{s}.0.conv{last}.weight"].shape[0] for s in range(1, 5)], width, bottleneck)
        counts = tuple(len({n.split(".")[1] for n in tensors if n.startswith(f"layer{s}.")}) for s in range(1, 5))
        out = tensors["fc.weight"].shape[0] if "fc.weight" in tensors else 0
        return ResNet(depth_of(counts, bottleneck), width=width, channels=channels, out=out)

    def _bit(self, architecture: str, tensors: Mapping[str, Any]) -> ResNet:
        if "_bit" not in architecture:
            raise UserError(f"a timm {architecture} is not imported, only BiT's (resnetv2_50x1_bit)")
        width, channels, *_ = tensors["stem.conv.weight"].shape
        same_widths([tensors[f"stages.{s}.blocks.0.conv3.weight"].shape[0] for s in range(4)], width, True)
        counts = tuple(len({n.split(".")[3] for n in tensors if n.startswith(f"stages.{s}.")}) for s in range(4))
        out = tensors["head.fc.weight"].shape[0] if "head.fc.weight" in tensors else 0
        return ResNet(depth_of(counts, True), "bit", width, out, channels=channels)

    def names(self, module):
        if module.form == "bit":
            return NameMap([
                *convolution("stem.conv", "stem"), *layers.norm("norm", "params/final_norm"),
                *layers.linear("head.fc", "params/head", "o i 1 1 -> i o"),
                *(rule for s, b, ours in blocks(module) for rule in bit(f"stages.{s}.blocks.{b}", ours)),
            ])  # fmt: skip
        rules = convolution("conv1", "stem") + batch_norm("bn1", "stem_norm") + layers.linear("fc", "params/head")
        for s, b, ours in blocks(module):
            theirs = f"layer{s + 1}.{b}"
            for i in range(1, 4 if module.bottleneck else 3):
                rules += convolution(f"{theirs}.conv{i}", f"{ours}/conv{i}")
                rules += batch_norm(f"{theirs}.bn{i}", f"{ours}/norm{i}")
            rules += convolution(f"{theirs}.downsample.0", f"{ours}/shortcut")
            rules += batch_norm(f"{theirs}.downsample.1", f"{ours}/shortcut_norm")
        return NameMap(rules)

    def config(self, module):
        raise UserError("models are not written in timm's form; --format huggingface is")

    def pictures(self, config, module):
        told = config.get("pretrained_cfg") or config
        mean, std = HALF if module.form == "bit" else IMAGENET
        return timm_pictures(told, (told.get("input_size") or (3, 224, 224))[-1], mean, std)
