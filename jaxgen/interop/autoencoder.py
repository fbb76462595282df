"""Autoencoders of latent diffusion: the names and the configuration of diffusers' AutoencoderKL."""

import math
import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxgen.errors import UserError
from jaxgen.interop import layers
from jaxgen.interop.diffusers import DiffusersFormat, conv
from jaxgen.interop.formats import require
from jaxgen.interop.names import Expanded, NameMap, Renamed, Rule
from jaxgen.models.autoencoder import Autoencoder

STATISTICS = "latents/"
"""Our leaves that the configuration holds, and no tensor."""
OLD = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""What the attention's projections were called at first."""


def today(name: str) -> str:
    """A tensor's present name."""
    old = re.fullmatch(rf"(.*\.attentions\.\d+)\.({'|'.join(OLD)})\.(weight|bias)", name)
    return f"{old[1]}.{OLD[old[2]]}.{old[3]}" if old else name


class AutoencoderNames(NameMap):
    """The map of an autoencoder's leaves, those of its statistics too, which are made of its fields."""

    def __init__(self, rules, module: Autoencoder):
        super().__init__(rules)
        self.module = module

    def expand(self, leaves):
        found = super().expand({path: leaf for path, leaf in leaves.items() if not path.startswith(STATISTICS)})
        return AutoencoderLeaves(found.parts, found.constants, found.copies, self.module)


class AutoencoderLeaves(Expanded):
    def __init__(self, parts, constants, copies, module: Autoencoder):
        super().__init__(parts, constants, copies)
        self.module = module

    def check(self, tensors, where):
        super().check(Renamed(tensors, today), where)

    def read(self, tensors, target, where="the file"):
        plain = {path: leaf for path, leaf in target.items() if not path.startswith(STATISTICS)}
        found = super().read(Renamed(tensors, today), plain, where)
        mean, std = (np.broadcast_to(np.float32(x), (self.module.latent,)) for x in (self.module.mean, self.module.std))
        told = {"mean": mean, "std": std / np.float32(self.module.scale), "count": np.float32(0)}
        for path in target.keys() - plain.keys():
            place = target[path].sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
            found[path] = jax.device_put(told[path.removeprefix(STATISTICS)], place)
        return found


def residual(theirs: str, ours: str) -> list[Rule]:
    rules = conv(f"{theirs}.conv_shortcut", f"params/{ours}/skip")
    for i in (1, 2):
        rules += conv(f"{theirs}.conv{i}", f"params/{ours}/conv{i}")
        rules += layers.norm(f"{theirs}.norm{i}", f"params/{ours}/norm{i}")
    return rules


def half(name: str) -> list[Rule]:
    """What encoder and decoder have in common."""
    middle = f"{name}.mid_block"
    look = f"{middle}.attentions.0"
    projections = (f"{look}.to_q", f"{look}.to_k", f"{look}.to_v", f"{look}.to_out.0")
    return [
        *conv(f"{name}.conv_in", f"params/{name}/stem"),
        *residual(f"{middle}.resnets.0", f"{name}/middle_0"),
        *residual(f"{middle}.resnets.1", f"{name}/middle_1"),
        *layers.norm(f"{look}.group_norm", f"params/{name}/attention/norm"),
        *layers.attention(f"params/{name}/attention", *projections),
        *layers.norm(f"{name}.conv_norm_out", f"params/{name}/norm"),
        *conv(f"{name}.conv_out", f"params/{name}/out"),
    ]


class AutoencoderFormat(DiffusersFormat):
    """AutoencoderKL of diffusers (Stable Diffusion 1 to 3.5, XL, Flux)."""

    name = "diffusers AutoencoderKL"
    kind = "AutoencoderKL"

    def module(self, config, tensors):
        require(config, "an AutoencoderKL", act_fn="silu")
        features = list(config.get("block_out_channels", (64,)))
        for key, wanted in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
            types = config.get(key, [wanted] * len(features))
            if list(types) != [wanted] * len(features):
                raise UserError(f"an AutoencoderKL with {key} = {types} is not imported, only {wanted} at each level")
        channels = config.get("in_channels", 3)
        if config.get("out_channels", 3) != channels:
            raise UserError(f"an AutoencoderKL of {channels} channels that gives others is not imported")
        quant = config.get("use_quant_conv", True)
        if config.get("use_post_quant_conv", True) != quant:
            raise UserError("an AutoencoderKL with only one of quant_conv and post_quant_conv is not imported")
        width = math.gcd(*features)
        shift = config.get("shift_factor")
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if mean and shift:
            raise UserError("an AutoencoderKL with both shift_factor and latents_mean is not imported")
        return Autoencoder(
            channels, config.get("latent_channels", 4), width, tuple(count // width for count in features),
            config.get("layers_per_block", 1), config.get("mid_block_add_attention", True),
            config.get("norm_num_groups", 32), bool(quant),
            tuple(map(float, mean)) if mean else (float(shift or 0),), tuple(map(float, std)) if std else (1.0,),
            float(config.get("scaling_factor", 0.18215)),
        )  # fmt: skip

    def names(self, module):
        rules, last = [*half("encoder"), *half("decoder")], len(module.multipliers) - 1
        for level in range(last + 1):
            down, up = f"encoder.down_blocks.{level}", f"decoder.up_blocks.{last - level}"
            for i in range(module.blocks):
                rules += residual(f"{down}.resnets.{i}", f"encoder/down_{level}_{i}")
            for i in range(module.blocks + 1):
                rules += residual(f"{up}.resnets.{i}", f"decoder/up_{level}_{i}")
            rules += conv(f"{down}.downsamplers.0.conv", f"params/encoder/halve_{level}")
            rules += conv(f"{up}.upsamplers.0.conv", f"params/decoder/double_{level - 1}") if level else []
        rules += conv("quant_conv", "params/before") + conv("post_quant_conv", "params/after")
        return AutoencoderNames(rules, module)

    def config(self, module):
        shift = module.mean[0] if len(module.mean) == 1 else None
        several = len(module.mean) > 1 or module.std != (1.0,)
        levels = len(module.multipliers)
        return {
            "_class_name": "AutoencoderKL", "_diffusers_version": "0.42.0", "act_fn": "silu",
            "in_channels": module.channels, "out_channels": module.channels, "latent_channels": module.latent,
            "block_out_channels": [module.width * times for times in module.multipliers],
            "down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels,
            "layers_per_block": module.blocks, "norm_num_groups": module.groups,
            "mid_block_add_attention": module.attention, "use_quant_conv": module.quant,
            "use_post_quant_conv": module.quant, "force_upcast": True, "scaling_factor": module.scale,
            "shift_factor": shift if shift and not several else None,
            "latents_mean": _spread(module.mean, module.latent) if several else None,
            "latents_std": _spread(module.std, module.latent) if several else None,
        }  # fmt: skip

    def check(self, module):
        if module.norm_epsilon != 1e-6:
            raise UserError(f"an autoencoder whose norms have an epsilon of {module.norm_epsilon} cannot be written as "
                            f"{self.name}, only of 1e-06")
        super().check(canonical(module))

    def inputs(self, module):
        return (jnp.zeros((1, module.factor, module.factor, module.channels)),)


def canonical(module: Autoencoder) -> Autoencoder:
    """The same network in the words that `AutoencoderFormat` reads: the largest width, statistics of each channel or of
    none."""
    width = module.width * math.gcd(*module.multipliers)
    statistics = {}
    if len(module.mean) > 1 or module.std != (1.0,):
        statistics = {name: tuple(_spread(getattr(module, name), module.latent)) for name in ("mean", "std")}
    multipliers = tuple(module.width * times // width for times in module.multipliers)
    return module.clone(width=width, multipliers=multipliers, **statistics)


def with_statistics(module: Autoencoder, variables: Mapping[str, Any]) -> nn.Module:
    """The module with the mean and standard deviation of latents that its variables hold, for its configuration."""
    if "latents" not in variables:
        return module
    mean, std = (tuple(np.asarray(variables["latents"][name], np.float64).tolist()) for name in ("mean", "std"))
    same = np.allclose(mean, module.mean) and np.allclose(np.asarray(std) * module.scale, module.std)
    return module if same else module.clone(mean=mean, std=std, scale=1.0)


def _spread(values: tuple[float, ...], count: int) -> list[float]:
    return list(values) * (count if len(values) == 1 else 1)
