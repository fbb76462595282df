"""MM-DiT: the names and the configurations of diffusers' SD3Transformer2DModel and FluxTransformer2DModel."""

from typing import Any

import numpy as np

from jaxgen.errors import UserError
from jaxgen.interop import layers
from jaxgen.interop.diffusers import VECTORS, DiffusersFormat
from jaxgen.interop.formats import Format, require
from jaxgen.interop.names import NameMap, Rule
from jaxgen.interop.vit import PATCHES
from jaxgen.models.conditions import example
from jaxgen.models.mmdit import MMDiT, RopeAxes

TURNED = "(h j t) e -> e h (t j)"   # rotary features: theirs side by side in pairs, ours in two halves
GUIDANCE = 3.5   # what is told where nobody says: the scale that FLUX.1 dev's makers advise


class MMDiTFormat(DiffusersFormat):
    """What both have in common."""

    def inputs(self, module):
        return example(module)

    def check(self, module):
        """Axes that are said though they are the default, and the scale that is told by default, are no difference."""
        if module.positions == "rope":
            module = module.clone(rope=_default(module.rope, module.width // module.heads))
        super().check(module.clone(guidance=GUIDANCE if module.guidance else 0.0))


class SD3Format(MMDiTFormat):
    """SD3Transformer2DModel: Stable Diffusion 3 and 3.5."""

    name = "diffusers SD3Transformer2DModel"
    kind = "SD3Transformer2DModel"

    def module(self, config, tensors):
        heads, size = config.get("num_attention_heads", 18), config.get("attention_head_dim", 64)
        width, patch, out = heads * size, config.get("patch_size", 2), config.get("out_channels")
        channels = config.get("in_channels", 16)
        out = channels if out is None else out
        if config.get("caption_projection_dim", 1152) != width:
            raise UserError(f"{self.name} with caption_projection_dim = {config.get('caption_projection_dim', 1152)} "
                            f"is not imported, only with the width, {width}")
        norm = config.get("qk_norm")
        if norm not in (None, "rms_norm"):
            raise UserError(f"{self.name} with qk_norm = {norm!r} is not imported, only None and 'rms_norm'")
        dual = list(config.get("dual_attention_layers") or ())
        if dual != list(range(len(dual))):
            raise UserError(f"{self.name} with dual_attention_layers = {dual} is not imported, only the first few")
        return MMDiT(
            out=out, channels=0 if channels == out else channels, patch=patch, width=width,
            depth=config.get("num_layers", 18), heads=heads, text=config.get("joint_attention_dim", 4096),
            pooled=config.get("pooled_projection_dim", 2048), qk_norm=norm is not None, dual=len(dual),
            table=config.get("pos_embed_max_size", 96), base=config.get("sample_size", 128) // patch,
        )  # fmt: skip

    def names(self, module):
        return NameMap([
            *layers.linear("pos_embed.proj", "params/patch_embedding", PATCHES),
            Rule("pos_embed.pos_embed", "params/position_embedding", "1 (g k) e -> g k e"),
            *layers.linear("proj_out", "params/head"), *common(module, ""),
        ], p=module.patch, q=module.patch, c=module.channels or module.out, g=module.table, h=module.heads)  # fmt: skip

    def config(self, module):
        return {
            "_class_name": self.kind, "attention_head_dim": module.width // module.heads,
            "caption_projection_dim": module.width, "dual_attention_layers": list(range(module.dual)),
            "in_channels": module.channels or module.out, "joint_attention_dim": module.text,
            "num_attention_heads": module.heads, "num_layers": module.depth, "out_channels": module.out,
            "patch_size": module.patch, "pooled_projection_dim": module.pooled,
            "pos_embed_max_size": module.table, "qk_norm": "rms_norm" if module.qk_norm else None,
            "sample_size": module.base * module.patch,
        }  # fmt: skip


class FluxFormat(MMDiTFormat):
    """FluxTransformer2DModel: FLUX.1, whose patches of 2 x 2 are cut outside of the model there."""

    name = "diffusers FluxTransformer2DModel"
    kind = "FluxTransformer2DModel"

    def module(self, config, tensors):
        require(config, self.name, patch_size=1)
        heads, size = config.get("num_attention_heads", 24), config.get("attention_head_dim", 128)
        channels, out = config.get("in_channels", 64), config.get("out_channels")
        out = channels if out is None else out
        if channels % 4 or out % 4:
            raise UserError(f"{self.name} of {channels} channels in and {out} out is not of patches of 2 x 2")
        return MMDiT(
            out=out // 4, channels=0 if channels == out else channels // 4, patch=2, width=heads * size,
            depth=config.get("num_layers", 19), single_depth=config.get("num_single_layers", 38), heads=heads,
            text=config.get("joint_attention_dim", 4096), pooled=config.get("pooled_projection_dim", 768),
            guidance=GUIDANCE if config.get("guidance_embeds", False) else 0.0, qk_norm=True, positions="rope",
            rope=_default(RopeAxes(tuple(config.get("axes_dims_rope", (16, 56, 56)))), size),
        )  # fmt: skip

    def names(self, module):
        at, ours, attend = "single_transformer_blocks.{layer}", "params/single_blocks", "params/single_blocks/attention"
        return NameMap([
            *layers.linear("x_embedder", "params/patch_embedding", "e (c p q) -> (p q c) e"),
            Rule("proj_out.weight", "params/head/kernel", "(f p q) e -> e (p q f)"),
            Rule("proj_out.bias", "params/head/bias", "(f p q) -> (p q f)"),
            *mlp("time_text_embed.guidance_embedder", "params/guidance"),
            *common(module, "turned"),
            *vectors(f"{at}.norm.linear", f"{ours}/modulation"),
            *heads(f"{at}.attn", attend, ("to_q", "to_k", "to_v"), ("norm_q", "norm_k"), True),
            Rule(f"{at}.proj_mlp.weight", f"{ours}/up/kernel", "(r o) i -> i r o"),
            Rule(f"{at}.proj_mlp.bias", f"{ours}/up/bias", "(r o) -> r o"),
            Rule(f"{at}.proj_out.weight", f"{ours}/out/kernel", "e (r o) -> r o e"),
            Rule(f"{at}.proj_out.bias", f"{ours}/out/bias"),
        ], p=2, q=2, t=2, h=module.heads)  # fmt: skip

    def config(self, module):
        size = module.width // module.heads
        return {
            "_class_name": self.kind, "attention_head_dim": size, "axes_dims_rope": list(module.rope.sizes(size)),
            "guidance_embeds": module.guidance > 0, "in_channels": 4 * (module.channels or module.out),
            "joint_attention_dim": module.text, "num_attention_heads": module.heads,
            "num_layers": module.depth, "num_single_layers": module.single_depth, "out_channels": 4 * module.out,
            "patch_size": 1, "pooled_projection_dim": module.pooled,
        }  # fmt: skip


FORMATS: tuple[Format, ...] = (SD3Format(), FluxFormat())


def format_for(module: MMDiT) -> Format:
    """The form in which a module is written."""
    return FluxFormat() if module.single_depth else SD3Format()


def _default(rope: RopeAxes, head_dim: int) -> RopeAxes:
    """The axes with nothing for those that are the default."""
    return RopeAxes(theta=rope.theta) if rope.axes == RopeAxes().sizes(head_dim) else rope


def common(module: MMDiT, turned: str) -> list[Rule]:
    """What is told, the text, the joint blocks and the end. `turned`: queries and keys have rotary features."""
    rules = [
        *layers.linear("context_embedder", "params/text_embedding"),
        *mlp("time_text_embed.timestep_embedder", "params/told/time"),
        *mlp("time_text_embed.text_embedder", "params/told/pooled"),
        *vectors("norm_out.linear", "params/final_modulation"),
    ]
    for name, (first, _) in module.groups.items():
        at = f"transformer_blocks.{first}" if name == "last_block" else f"transformer_blocks.{{layer+{first}}}"
        rules += joint(at, f"params/{name}", bool(turned))
        if name == "last_block":
            rules += unheard(at, f"params/{name}", module)
    return rules


def joint(theirs: str, ours: str, turned: bool) -> list[Rule]:
    """A joint block."""
    picture, text = f"{ours}/picture", f"{ours}/text"
    return [
        *vectors(f"{theirs}.norm1.linear", f"{picture}/modulation"),
        *heads(f"{theirs}.attn", f"{picture}/attention", ("to_q", "to_k", "to_v"), ("norm_q", "norm_k"), turned),
        *layers.attention_out(f"{picture}/attention", f"{theirs}.attn.to_out.0"),
        *heads(f"{theirs}.attn2", f"{picture}/own", ("to_q", "to_k", "to_v"), ("norm_q", "norm_k"), turned),
        *layers.attention_out(f"{picture}/own", f"{theirs}.attn2.to_out.0"),
        *layers.mlp(f"{picture}/mlp", f"{theirs}.ff.net.0.proj", f"{theirs}.ff.net.2"),
        *vectors(f"{theirs}.norm1_context.linear", f"{text}/modulation"),
        *heads(f"{theirs}.attn", f"{text}/attention", ("add_q_proj", "add_k_proj", "add_v_proj"),
               ("norm_added_q", "norm_added_k"), turned),
        *layers.attention_out(f"{text}/attention", f"{theirs}.attn.to_add_out"),
        *layers.mlp(f"{text}/mlp", f"{theirs}.ff_context.net.0.proj", f"{theirs}.ff_context.net.2"),
    ]  # fmt: skip


def unheard(theirs: str, ours: str, module: MMDiT) -> list[Rule]:
    """The text's queries in the last block, which are computed there and thrown away: passed over, and written as 0."""
    at, width = f"{ours}/text/attention/key/kernel", module.width
    empty = np.broadcast_to(np.float32(0), (width, width))   # takes no memory
    rules = [Rule(f"{theirs}.attn.add_q_proj.weight", at, constant=empty),
             Rule(f"{theirs}.attn.add_q_proj.bias", at, constant=empty[0])]  # fmt: skip
    if module.qk_norm:
        rules.append(Rule(f"{theirs}.attn.norm_added_q.weight", at, constant=np.ones(width // module.heads, "f4")))
    return rules


def heads(theirs: str, ours: str, names: Any, norms: Any, turned: bool) -> list[Rule]:
    """Queries, keys and values, and the norms of the first two."""
    weight, bias, scale = (TURNED, "(h j t) -> h (t j)", "(j t) -> (t j)") if turned else (
        layers.HEADS, "(h d) -> h d", "")  # fmt: skip
    rules = []
    for name, part in zip(names[:2], ("query", "key"), strict=True):
        rules += [Rule(f"{theirs}.{name}.weight", f"{ours}/{part}/kernel", weight),
                  Rule(f"{theirs}.{name}.bias", f"{ours}/{part}/bias", bias)]  # fmt: skip
    rules += [Rule(f"{theirs}.{names[2]}.weight", f"{ours}/value/kernel", layers.HEADS),
              Rule(f"{theirs}.{names[2]}.bias", f"{ours}/value/bias", "(h d) -> h d")]  # fmt: skip
    for name, part in zip(norms, ("query_norm", "key_norm"), strict=True):
        rules.append(Rule(f"{theirs}.{name}.weight", f"{ours}/{part}/scale", scale))
    return rules


def mlp(theirs: str, ours: str) -> list[Rule]:
    """Two linear layers that make a vector of a number or of another vector."""
    return [*layers.linear(f"{theirs}.linear_1", f"{ours}_in"), *layers.linear(f"{theirs}.linear_2", f"{ours}_out")]


def vectors(theirs: str, ours: str) -> list[Rule]:
    """A linear layer whose result is several vectors."""
    return [Rule(f"{theirs}.weight", f"{ours}/kernel", VECTORS), Rule(f"{theirs}.bias", f"{ours}/bias", "(n o) -> n o")]
