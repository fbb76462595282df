"""Networks of diffusion in the words of diffusers: Stable Diffusion's U-Nets (1.x, 2.x, XL) and DiT.

What the formats of diffusers share is `DiffusersFormat`; autoencoders and MM-DiT have files of their own beside this
one. The parts of a pipeline's folder (unet, transformer, vae) are folders of this kind: `families.component`.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from jaxgen.errors import UserError, nearest
from jaxgen.interop import layers
from jaxgen.interop.formats import Format, Pictures, default_width, require
from jaxgen.interop.names import CONVOLUTION, LINEAR, SKIP, NameMap, Rule
from jaxgen.interop.vit import PATCHES
from jaxgen.models.conditions import example
from jaxgen.models.dit import DiT
from jaxgen.models.unet import UNet

CONVOLUTION_1X1 = "o i 1 1 -> i o"   # which is a matrix here
VECTORS = "(n w) e -> e n w"   # several vectors made of one


class DiffusersFormat(Format):
    """A family of models in the words of diffusers."""

    weights = "diffusion_pytorch_model.safetensors"
    kind: ClassVar[str]
    """Its class there."""

    def recognises(self, config):
        return config.get("_class_name") == self.kind

    def pictures(self, config, module):
        """`size` is the side of what the network was trained on; 0 where it is not said."""
        size = config.get("sample_size")
        return Pictures(size if isinstance(size, int) else 0)

    def files(self, module, pictures):
        size = {"sample_size": pictures.size} if pictures.size else {}
        return {"config.json": {**self.config(module), **size}}


def conv(theirs: str, ours: str, layout: str = CONVOLUTION) -> list[Rule]:
    """`Conv`."""
    return layers.linear(theirs, ours, layout)


class UNetFormat(DiffusersFormat):
    """UNet2DConditionModel of Stable Diffusion 1.x, 2.x and XL, and what was made of them.

    Where a transformer of a U-Net begins and ends, the newer ones have a matrix, as `linear` says, and the older ones a
    convolution of one place, which is the same; and the newer ones have heads of one size, the older a number of heads.
    """

    name = "diffusers UNet2DConditionModel"
    kind = "UNet2DConditionModel"

    def __init__(self, linear: bool = False):
        self.linear = linear

    def recognises(self, config):
        return super().recognises(config) and bool(config.get("use_linear_projection")) == self.linear

    def module(self, config, tensors):
        require(
            config, "a U-Net", center_input_sample=False, flip_sin_to_cos=True, freq_shift=0, downsample_padding=1,
            mid_block_type="UNetMidBlock2DCrossAttn", only_cross_attention=False, mid_block_only_cross_attention=None,
            mid_block_scale_factor=1, act_fn="silu", dual_cross_attention=False, encoder_hid_dim=None,
            encoder_hid_dim_type=None, num_attention_heads=None, class_embed_type=None, resnet_skip_time_act=False,
            resnet_out_scale_factor=1, time_embedding_type="positional", time_embedding_dim=None,
            time_embedding_act_fn=None, timestep_post_act=None, time_cond_proj_dim=None, conv_in_kernel=3,
            conv_out_kernel=3, attention_type="default", class_embeddings_concat=False, cross_attention_norm=None,
            reverse_transformer_layers_per_block=None,
        )  # fmt: skip
        down = config.get("down_block_types", (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"))
        up = config.get("up_block_types", ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3))
        if set(down) - {"CrossAttnDownBlock2D", "DownBlock2D"}:
            raise UserError(f"a U-Net with down_block_types = {list(down)} is not imported")
        if [kind.replace("Up", "Down") for kind in reversed(up)] != list(down):
            raise UserError(f"a U-Net with up_block_types = {list(up)} is not imported: they are not those of the way "
                            "down")  # fmt: skip
        features = config.get("block_out_channels", (320, 640, 1280, 1280))
        width = features[0]
        if any(size % width for size in features):
            raise UserError(f"a U-Net with block_out_channels = {list(features)} is not imported: they are not "
                            "multiples of the first")  # fmt: skip
        reads = [kind.startswith("Cross") for kind in down]
        depths = _each(config.get("transformer_layers_per_block", 1), len(down))
        readers = tuple(depth if read else 0 for depth, read in zip(depths, reads, strict=True))
        if depths[-1] != next((depth for depth in reversed(readers) if depth), 0):
            raise UserError(f"a U-Net with transformer_layers_per_block = {depths} is not imported: the middle's are "
                            "not those of the deepest level that reads text")  # fmt: skip
        return UNet(
            out=config.get("out_channels", 4), width=width, multipliers=tuple(size // width for size in features),
            blocks=_same(config.get("layers_per_block", 2), "layers_per_block"), attention=(), readers=readers,
            **self._heads(config.get("attention_head_dim", 8), features),
            classes=(config.get("num_class_embeds") or 1) - 1,
            text=_same(config.get("cross_attention_dim", 1280), "cross_attention_dim"), **self._told(config),
            channels=_beside(config.get("in_channels", 4), config.get("out_channels", 4)),
            scale_shift=config.get("resnet_time_scale_shift", "default") == "scale_shift",
            dropout=config.get("dropout", 0.0), groups=config.get("norm_num_groups", 32),
            norm_epsilon=config.get("norm_eps", 1e-5),
        )  # fmt: skip

    def _heads(self, heads: int | list[int], features: list[int]) -> dict[str, int]:
        """Numbers of heads (which the configuration calls their size) as ours."""
        if isinstance(heads, int):
            return {"heads": heads}
        sizes = {size // count for size, count in zip(features, heads, strict=False)}
        return {"head_dim": sizes.pop()} if len(sizes) == 1 else {"heads": _same(heads, "attention_head_dim")}

    def _told(self, config: Mapping[str, Any]) -> dict[str, int]:
        """What is told besides the time. How much of it is the pooled embedding, whose size the configuration does not
        say, is concluded: SDXL's is of 1280, and six sizes are told beside it (the refiner: five)."""
        kind = config.get("addition_embed_type")
        if kind is None:
            return {}
        if kind != "text_time":
            raise UserError(f"a U-Net with addition_embed_type = {kind!r} is not imported, only 'text_time'")
        whole, periods = config["projection_class_embeddings_input_dim"], config["addition_time_embed_dim"]
        sizes = (whole - 1280) // periods if whole > 1280 and (whole - 1280) % periods == 0 else 6
        if whole <= sizes * periods:
            raise UserError(f"projection_class_embeddings_input_dim = {whole} has no room for {sizes} sizes of "
                            f"{periods} numbers and a text's embedding")  # fmt: skip
        return {"pooled": whole - sizes * periods, "sizes": sizes, "size_periods": periods}

    def names(self, module):
        rules = [
            *conv("conv_in", "params/in"), *layers.linear("time_embedding.linear_1", "params/told/time_in"),
            *layers.linear("time_embedding.linear_2", "params/told/time_out"),
            Rule("class_embedding.weight", "params/told/classes/embedding"),
            *layers.linear("add_embedding.linear_1", "params/told/pooled_in"),
            *layers.linear("add_embedding.linear_2", "params/told/pooled_out"),
            *residual("mid_block.resnets.{i}", "params/middle_{i}"),
            *reader("mid_block.attentions.{i}", "params/middle_{i}_text", self.linear),
            *layers.norm("conv_norm_out", "params/norm"), *conv("conv_out", "params/out"),
        ]  # fmt: skip
        for level in range(len(module.multipliers)):
            for way, at in (("down", level), ("up", len(module.multipliers) - 1 - level)):
                theirs, ours = f"{way}_blocks.{at}", f"params/{way}_{level}"
                rules += [
                    *residual(f"{theirs}.resnets.{{i}}", f"{ours}_{{i}}"),
                    *reader(f"{theirs}.attentions.{{i}}", f"{ours}_{{i}}_text", self.linear),
                    *conv(f"{theirs}.{way}samplers.0.conv", ours),
                ]
        return NameMap(rules)

    def config(self, module):
        reads, features = [bool(module.reader_depth(level)) for level in range(len(module.multipliers))], module.levels
        depths = [module.reader_depth(level) or 1 for level in range(len(reads))]
        depths[-1] = module.reader_depth(None)   # the middle's
        same = {depth for depth, read in zip(depths, reads, strict=True) if read} == {depths[-1]}
        heads = module.heads or [size // module.head_dim for size in features]
        whole = module.pooled + module.sizes * module.size_periods
        return {
            "_class_name": self.kind, "in_channels": module.channels or module.out, "out_channels": module.out,
            "block_out_channels": features, "layers_per_block": module.blocks,
            "down_block_types": ["CrossAttnDownBlock2D" if read else "DownBlock2D" for read in reads],
            "mid_block_type": "UNetMidBlock2DCrossAttn",
            "up_block_types": ["CrossAttnUpBlock2D" if read else "UpBlock2D" for read in reversed(reads)],
            "transformer_layers_per_block": depths[-1] if same else depths, "attention_head_dim": heads,
            "cross_attention_dim": module.text, "use_linear_projection": self.linear,
            "num_class_embeds": module.classes + 1 if module.classes else None,
            "addition_embed_type": "text_time" if whole else None,
            "addition_time_embed_dim": module.size_periods if whole else None,
            "projection_class_embeddings_input_dim": whole or None,
            "resnet_time_scale_shift": "scale_shift" if module.scale_shift else "default",
            "dropout": module.dropout, "norm_num_groups": module.groups, "norm_eps": module.norm_epsilon,
            "act_fn": "silu", "flip_sin_to_cos": True, "freq_shift": 0, "center_input_sample": False,
            "downsample_padding": 1, "mid_block_scale_factor": 1,
        }  # fmt: skip

    def inputs(self, module):
        return example(module)


def residual(theirs: str, ours: str) -> list[Rule]:
    """ResnetBlock2D."""
    return [
        *layers.norm(f"{theirs}.norm1", f"{ours}/norm1"), *conv(f"{theirs}.conv1", f"{ours}/conv1"),
        *layers.linear(f"{theirs}.time_emb_proj", f"{ours}/told"),
        *layers.norm(f"{theirs}.norm2", f"{ours}/norm2"), *conv(f"{theirs}.conv2", f"{ours}/conv2"),
        *conv(f"{theirs}.conv_shortcut", f"{ours}/skip"),
    ]  # fmt: skip


def reader(theirs: str, ours: str, linear: bool) -> list[Rule]:
    """Transformer2DModel with a text."""
    block, mine = f"{theirs}.transformer_blocks.{{layer}}", f"{ours}/blocks"
    ends = LINEAR if linear else CONVOLUTION_1X1
    rules = [
        *layers.norm(f"{theirs}.norm", f"{ours}/norm"), *conv(f"{theirs}.proj_in", f"{ours}/in", ends),
        *conv(f"{theirs}.proj_out", f"{ours}/out", ends),
        *layers.norm(f"{block}.norm1", f"{mine}/attention_norm"), *layers.norm(f"{block}.norm2", f"{mine}/text_norm"),
        *layers.norm(f"{block}.norm3", f"{mine}/mlp_norm"),
        Rule(f"{block}.ff.net.0.proj.weight", (f"{mine}/mlp/up/kernel", f"{mine}/mlp/gate/kernel"), "(n o) i -> n i o"),
        Rule(f"{block}.ff.net.0.proj.bias", (f"{mine}/mlp/up/bias", f"{mine}/mlp/gate/bias"), "(n o) -> n o"),
        *layers.linear(f"{block}.ff.net.2", f"{mine}/mlp/down"),
    ]  # fmt: skip
    for name, attends in (("attn1", "attention"), ("attn2", "text_attention")):
        rules += attention(f"{block}.{name}", f"{mine}/{attends}")
    return rules


def attention(theirs: str, ours: str) -> list[Rule]:
    """Attention."""
    parts = (f"{theirs}.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0"))
    return layers.attention(ours, *parts)


def _beside(channels: int, out: int) -> int:
    """Channels of the input, or 0 where they are those of the result."""
    return 0 if channels == out else channels


def _each(value: Any, levels: int) -> list[int]:
    return list(value) if isinstance(value, list | tuple) else [value] * levels


def _same(value: Any, what: str) -> int:
    """The one value of all levels."""
    values = set(_each(value, 1))
    if len(values) != 1:
        raise UserError(f"a U-Net with {what} = {value} is not imported, only one for all levels")
    return values.pop()


ACTIVATIONS = {"gelu-approximate": "gelu", "gelu": "gelu_exact"}


class DiTFormat(DiffusersFormat):
    """DiTTransformer2DModel. Each block has a copy there of what makes one vector of time and class."""

    name = "diffusers DiTTransformer2DModel"
    kind = "DiTTransformer2DModel"

    def module(self, config, tensors):
        require(config, "a DiT", attention_bias=True, norm_type="ada_norm_zero", norm_elementwise_affine=False,
                dropout=0.0)  # fmt: skip
        act = config.get("activation_fn", "gelu-approximate")
        if act not in ACTIVATIONS:
            raise UserError(f"a DiT with activation_fn = {act!r} is not imported{nearest(act, ACTIVATIONS)}")
        if config.get("norm_eps", 1e-5) not in (1e-5, 1e-6):   # of one of the norms; that of the others is 1e-6
            raise UserError(f"a DiT with norm_eps = {config['norm_eps']!r} is not imported, only 1e-05 and 1e-06")
        channels, heads = config.get("in_channels", 4), config.get("num_attention_heads", 16)
        out = config.get("out_channels") or channels
        return default_width(DiT(
            out=out, patch=config.get("patch_size", 2),
            width=heads * config.get("attention_head_dim", 72), depth=config.get("num_layers", 28), heads=heads,
            classes=config.get("num_embeds_ada_norm", 1000), channels=_beside(channels, out), period_shift=1,
            activation=ACTIVATIONS[act],
        ))  # fmt: skip

    def names(self, module):
        block, ours = "transformer_blocks.{layer}", "params/blocks"
        told = "transformer_blocks.{copy}.norm1.emb"
        copied = [
            *layers.linear(f"{told}.timestep_embedder.linear_1", "params/told/time_in"),
            *layers.linear(f"{told}.timestep_embedder.linear_2", "params/told/time_out"),
            Rule(f"{told}.class_embedder.embedding_table.weight", "params/told/classes/embedding"),
        ]
        return NameMap([
            *layers.linear("pos_embed.proj", "params/patch_embedding", PATCHES),
            Rule("pos_embed.pos_embed", "params/patch_embedding/bias", constant=SKIP),   # of older files
            *(Rule(rule.theirs, rule.ours, rule.layout, copies=module.depth) for rule in copied),
            Rule(f"{block}.norm1.linear.weight", f"{ours}/modulation/kernel", VECTORS),
            Rule(f"{block}.norm1.linear.bias", f"{ours}/modulation/bias", "(n w) -> n w"),
            *attention(f"{block}.attn1", f"{ours}/attention"),
            *layers.mlp(f"{ours}/mlp", f"{block}.ff.net.0.proj", f"{block}.ff.net.2"),
            Rule("proj_out_1.weight", "params/final_modulation/kernel", VECTORS),
            Rule("proj_out_1.bias", "params/final_modulation/bias", "(n w) -> n w"),
            *layers.linear("proj_out_2", "params/head"),
        ], p=module.patch, q=module.patch, c=module.channels or module.out)  # fmt: skip

    def config(self, module):
        names = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
        if not module.classes:
            raise UserError(f"a DiT without classes cannot be written as {self.name}")
        if module.activation not in names:
            raise UserError(f"the activation '{module.activation}' has no name there; they are {', '.join(names)}")
        return {
            "_class_name": self.kind, "num_attention_heads": module.heads,
            "attention_head_dim": module.width // module.heads, "in_channels": module.channels or module.out,
            "out_channels": module.out, "num_layers": module.depth, "patch_size": module.patch,
            "activation_fn": names[module.activation], "num_embeds_ada_norm": module.classes, "attention_bias": True,
            "norm_type": "ada_norm_zero", "norm_elementwise_affine": False, "norm_eps": 1e-5, "dropout": 0.0,
        }  # fmt: skip

    def inputs(self, module):
        return example(module)
