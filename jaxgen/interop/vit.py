"""Vision transformers: the names and the configurations of transformers and of timm."""

import math
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from jaxgen.errors import UserError, nearest
from jaxgen.interop import layers
from jaxgen.interop.formats import (
    HALF,
    IMAGENET,
    Format,
    activation,
    activation_name,
    default_width,
    preprocessed,
    require,
    timm_pictures,
)
from jaxgen.interop.names import LINEAR, SKIP, NameMap, Rule
from jaxgen.models.vit import ViT

PATCHES = "e c p q -> (p q c) e"


def sizes(vit: ViT) -> dict[str, int]:
    """Sizes of a patch, by which a convolution's kernel is laid out."""
    return {"p": vit.patch, "q": vit.patch, "c": vit.channels}


class ViTFormat(Format):
    """ViTForImageClassification and ViTModel."""

    name = "transformers ViT"

    def recognises(self, config):
        return config.get("model_type") == "vit"

    def module(self, config, tensors):
        require(config, "a ViT", qkv_bias=True)
        labelled = any("ForImageClassification" in a for a in config.get("architectures") or ["ViTModel"])
        return default_width(ViT(
            patch=config.get("patch_size", 16), width=config.get("hidden_size", 768),
            depth=config.get("num_hidden_layers", 12), heads=config.get("num_attention_heads", 12),
            mlp_width=config.get("intermediate_size", 3072), image_size=config.get("image_size", 224),
            channels=config.get("num_channels", 3), out=labels(config) if labelled else 0,
            norm_epsilon=config.get("layer_norm_eps", 1e-12), activation=activation(config.get("hidden_act", "gelu")),
        ))  # fmt: skip

    def names(self, module):
        at = "vit." if module.out else ""
        return NameMap([
            Rule(f"{at}embeddings.cls_token", "params/class_token", "1 1 e -> e"),
            Rule(f"{at}embeddings.position_embeddings", "params/position_embedding/embedding", "1 n e -> n e"),
            *layers.linear(f"{at}embeddings.patch_embeddings.projection", "params/patch_embedding", PATCHES),
            *layers.block(f"{at}encoder.layer.{{layer}}.", "params/blocks", layers.VIT),
            *layers.norm(f"{at}layernorm", "params/final_norm"),
            *layers.linear("classifier", "params/head"),
            # A layer after the pooled features, of some checkpoints without a head: our features are those before it.
            Rule(f"{at}pooler.dense.weight", "params/class_token", constant=SKIP),
            Rule(f"{at}pooler.dense.bias", "params/class_token", constant=SKIP),
        ], **sizes(module))  # fmt: skip

    def config(self, module):
        return {
            "architectures": ["ViTForImageClassification" if module.out else "ViTModel"], "model_type": "vit",
            "patch_size": module.patch, "hidden_size": module.width, "num_hidden_layers": module.depth,
            "num_attention_heads": module.heads, "intermediate_size": module.hidden_width,
            "image_size": module.image_size, "num_channels": module.channels, "qkv_bias": True,
            "layer_norm_eps": module.norm_epsilon, "hidden_act": activation_name(module.activation),
            **label_names(module.out), "dtype": "float32",
        }  # fmt: skip

    def inputs(self, module):
        return (picture(module),)

    def pictures(self, config, module):
        return preprocessed(config, module.image_size, *HALF, crop=False)


def picture(module: Any) -> jnp.ndarray:
    return jnp.zeros((1, module.image_size, module.image_size, module.channels))


def labels(config: Mapping[str, Any]) -> int:
    """How many classes the configuration of a classifier tells (transformers' default is 2)."""
    return config.get("num_labels") or len(config.get("id2label") or ()) or 2


def label_names(count: int) -> dict[str, Any]:
    names = {str(i): f"LABEL_{i}" for i in range(count)}
    return {"id2label": names, "label2id": {name: int(i) for i, name in names.items()}} if count else {}


TIMM_HEADS = {"tiny": 3, "small": 6, "medium": 8, "base": 12, "large": 16, "huge": 16, "giant": 16, "gigantic": 16,
              "so150m": 16, "so400m": 16}  # fmt: skip


class TimmViTFormat(Format):
    """timm's VisionTransformer, read alone: sizes are those of the tensors, heads and activation of the name."""

    name = "timm vit"

    def recognises(self, config):
        return str(config.get("architecture", "")).startswith("vit_")

    def module(self, config, tensors):
        return timm_vit(config["architecture"], config.get("model_args") or {}, tensors, "")

    def names(self, module):
        return NameMap(timm_rules("", "params", "fc_norm" if module.norm_pooled else "norm"), **sizes(module))

    def config(self, module):
        raise UserError("models are not written in timm's form; --format huggingface is")

    def inputs(self, module):
        return (picture(module),)

    def pictures(self, config, module):
        told = config.get("pretrained_cfg") or config
        return timm_pictures(told, module.image_size, *IMAGENET)


def timm_vit(architecture: str, arguments: Mapping[str, Any], tensors: Mapping[str, Any], at: str) -> ViT:
    """The module of timm's VisionTransformer `architecture` whose tensors are called `at`..."""
    if f"{at}patch_embed.proj.weight" not in tensors:
        raise UserError(f"a timm {architecture} has {at}patch_embed.proj.weight"
                        + nearest(f"{at}patch_embed.proj.weight", tensors))
    width, channels, patch, _ = tensors[f"{at}patch_embed.proj.weight"].shape
    size = next((s for s in TIMM_HEADS if f"_{s}_" in f"{architecture}_"), None)
    heads = arguments.get("num_heads") or TIMM_HEADS.get(size or "")
    if not heads:
        raise UserError(f"how many heads a timm {architecture} has is not known: "
                        f"known are {', '.join(TIMM_HEADS)}, and num_heads in model_args")
    for name, what in (("ls1.gamma", "scaled branches"), ("attn.q_norm.weight", "normed queries"),
                       ("mlp.fc1_g.weight", "gates")):  # fmt: skip
        if f"{at}blocks.0.{name}" in tensors:
            raise UserError(f"a timm {architecture} with {what} ({name}) is not imported")
    has_class, registers = f"{at}cls_token" in tensors, tensors.get(f"{at}reg_token")
    pooled = f"{at}attn_pool.latent" in tensors
    rows = tensors[f"{at}pos_embed"].shape[1]
    registers = 0 if registers is None else registers.shape[1]
    side = math.isqrt(rows)
    if rows != side**2 + has_class or (registers and has_class and rows == side**2):
        side = math.isqrt(rows - has_class)
    if rows != side**2 + has_class:
        raise UserError(f"a timm {architecture} with {rows} positions for a square of patches is not imported")
    pool = "attention" if pooled else "class" if has_class else "mean"
    if pool == "class" and f"{at}fc_norm.weight" in tensors:
        raise UserError(f"a timm {architecture} that has a class token and pools the patches is not imported")
    head = tensors.get(f"{at}head.weight")
    siglip, quick = "siglip" in architecture, "quickgelu" in architecture
    return default_width(ViT(
        patch=patch, width=width, depth=count(tensors, rf"{re.escape(at)}blocks\.(\d+)\."), heads=heads,
        mlp_width=tensors[f"{at}blocks.0.mlp.fc1.weight"].shape[0], image_size=side * patch, channels=channels,
        pool=pool, registers=registers, out=0 if head is None else head.shape[0],
        norm_epsilon=1e-5 if "_clip_" in architecture else 1e-6,
        activation="gelu" if siglip else "quick_gelu" if quick else "gelu_exact",
        patch_bias=f"{at}patch_embed.proj.bias" in tensors, pre_norm=f"{at}norm_pre.weight" in tensors,
        head_bias=head is None or f"{at}head.bias" in tensors, norm_pooled=f"{at}fc_norm.weight" in tensors,
    ))  # fmt: skip


def timm_rules(at: str, ours: str, norm: str = "norm") -> list[Rule]:
    """Names of timm's VisionTransformer, whose final norm has another name where it is of the mean."""
    pool = f"{ours}/attention_pool"
    joint = layers.joint_attention(
        pool, f"{at}attn_pool.kv.weight", f"{at}attn_pool.kv.bias", f"{at}attn_pool.proj", ("key", "value")
    )
    return [
        Rule(f"{at}cls_token", f"{ours}/class_token", "1 1 e -> e"),
        Rule(f"{at}reg_token", f"{ours}/register_tokens", "1 n e -> n e"),
        Rule(f"{at}pos_embed", f"{ours}/position_embedding/embedding", "1 n e -> n e"),
        *layers.linear(f"{at}patch_embed.proj", f"{ours}/patch_embedding", PATCHES),
        *layers.norm(f"{at}norm_pre", f"{ours}/embedding_norm"),
        *layers.block(f"{at}blocks.{{layer}}.", f"{ours}/blocks", layers.TIMM),
        *layers.norm(f"{at}{norm}", f"{ours}/final_norm"),
        Rule(f"{at}attn_pool.latent", f"{pool}/probe", "1 1 e -> e"),
        Rule(f"{at}attn_pool.q.weight", f"{pool}/query/kernel", layers.HEADS),
        Rule(f"{at}attn_pool.q.bias", f"{pool}/query/bias", "(h d) -> h d"),
        *joint,
        *layers.norm(f"{at}attn_pool.norm", f"{pool}/norm"),
        *layers.mlp(f"{pool}/mlp", f"{at}attn_pool.mlp.fc1", f"{at}attn_pool.mlp.fc2"),
        *layers.linear(f"{at}head", f"{ours}/head", LINEAR),
    ]


def count(tensors: Mapping[str, Any], pattern: str) -> int:
    """One more than the largest number that the pattern's group finds at the beginning of a name."""
    return max((int(found[1]) for name in tensors if (found := re.match(pattern, name))), default=-1) + 1
