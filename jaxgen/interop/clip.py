"""CLIP, SigLIP and SigLIP 2: the names and the configurations of transformers and of open_clip."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from jaxgen.errors import UserError
from jaxgen.interop import layers
from jaxgen.interop.formats import (
    HALF,
    OPENAI,
    RESAMPLING,
    Format,
    Pictures,
    activation,
    activation_name,
    default_width,
    preprocessed,
)
from jaxgen.interop.names import LINEAR, SKIP, NameMap, Rule
from jaxgen.interop.vit import PATCHES, picture, sizes, timm_rules, timm_vit
from jaxgen.models.clip import CLIP
from jaxgen.models.text import TextTower
from jaxgen.models.vit import ViT


class Pair(Format):
    """What all formats of two towers share."""

    mean_std = OPENAI
    crop = True

    def inputs(self, module):
        length = module.text.max_length
        return picture(module.image), jnp.zeros((1, length), jnp.int32), jnp.full((1,), length, jnp.int32)

    def pictures(self, config, module):
        return preprocessed(config, module.image.image_size, *self.mean_std, self.crop)


class ClipFormat(Pair):
    """CLIPModel."""

    name = "transformers CLIP"

    def recognises(self, config):
        return config.get("model_type") == "clip"

    def module(self, config, tensors):
        text, vision = part(config, "text"), part(config, "vision")
        out = config.get("projection_dim", 512)
        return CLIP(
            image=transformers_vision(vision, 32, "quick_gelu", 1e-5, pool="class", pre_norm=True, patch_bias=False,
                                      out=out, head_bias=False),
            text=transformers_text(text, (49408, 512, 77, 8), "quick_gelu", 1e-5, mask="causal", pool="last", out=out,
                                   head_bias=False),
        )  # fmt: skip

    def names(self, module):
        return NameMap([
            Rule("logit_scale", "params/temperature/scale"),
            *transformers_text_rules(), *layers.linear("text_projection", "params/text/head"),
            *transformers_vision_rules(PATCHES),
            Rule("vision_model.embeddings.class_embedding", "params/image/class_token"),
            *layers.norm("vision_model.pre_layrnorm", "params/image/embedding_norm"),   # their spelling
            *layers.linear("visual_projection", "params/image/head"),
        ], **sizes(module.image))  # fmt: skip

    def config(self, module):
        end = max(module.text.vocab_size - 1, 1)
        return {
            "architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": module.text.out,
            "logit_scale_init_value": 2.6592, "dtype": "float32",
            "text_config": {
                **text_config(module.text, "clip_text_model"), "projection_dim": module.text.out,
                # whose place is found by the largest id, unless it is told
                "bos_token_id": end - 1, "eos_token_id": end, "pad_token_id": end,
            },
            "vision_config": {
                **vision_config(module.image, "clip_vision_model"), "image_size": module.image.image_size,
                "projection_dim": module.image.out,
            },
        }  # fmt: skip


class SiglipFormat(Pair):
    """SiglipModel: SigLIP, and SigLIP 2 for pictures of one size."""

    name = "transformers SigLIP"
    kind = "siglip"
    patches = PATCHES
    mean_std = HALF
    crop = False   # the whole picture, squeezed

    def recognises(self, config):
        return config.get("model_type") == self.kind

    def module(self, config, tensors):
        text, vision = part(config, "text"), part(config, "vision")
        if not vision.get("vision_use_head", True):
            raise UserError("a SigLIP without a pooling head is not imported")
        return CLIP(
            image=transformers_vision(self.sized(vision), 16, "gelu_pytorch_tanh", 1e-6, pool="attention"),
            text=transformers_text(text, (32000, 768, 64, 12), "gelu_pytorch_tanh", 1e-6, mask="bidirectional",
                                   pool="final", out=text.get("projection_size", text.get("hidden_size", 768)),
                                   head_bias=True),
            bias=True,
        )  # fmt: skip

    def sized(self, vision: Mapping[str, Any]) -> Mapping[str, Any]:
        """The configuration of the picture's tower with `image_size`."""
        return vision

    def size(self, image: ViT) -> dict[str, int]:
        return {"image_size": image.image_size}

    def names(self, module):
        at, pool = "vision_model.head", "params/image/attention_pool"
        return NameMap([
            Rule("logit_scale", "params/temperature/scale", "1 ->"),
            Rule("logit_bias", "params/temperature/bias", "1 ->"),
            *transformers_text_rules(), *layers.linear("text_model.head", "params/text/head"),
            *transformers_vision_rules(self.patches),
            Rule(f"{at}.probe", f"{pool}/probe", "1 1 e -> e"),
            *layers.joint_attention(pool, f"{at}.attention.in_proj_weight", f"{at}.attention.in_proj_bias",
                                    f"{at}.attention.out_proj"),
            *layers.norm(f"{at}.layernorm", f"{pool}/norm"),
            *layers.mlp(f"{pool}/mlp", f"{at}.mlp.fc1", f"{at}.mlp.fc2"),
        ], **sizes(module.image))  # fmt: skip

    def config(self, module):
        return {
            "architectures": [f"{self.kind.capitalize()}Model"], "model_type": self.kind, "dtype": "float32",
            "text_config": {
                **text_config(module.text, f"{self.kind}_text_model"), "projection_size": module.text.out,
                "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 1,
            },
            "vision_config": {
                **vision_config(module.image, f"{self.kind}_vision_model"), **self.size(module.image),
                "vision_use_head": True,
            },
        }  # fmt: skip


class Siglip2Format(SiglipFormat):
    """Siglip2Model: the NaFlex form, whose pictures are patches with their places."""

    name = "transformers SigLIP 2 (NaFlex)"
    kind = "siglip2"
    patches = LINEAR

    def sized(self, vision):
        side = math.isqrt(vision.get("num_patches", 256))
        return {**vision, "image_size": side * vision.get("patch_size", 16)}

    def size(self, image):
        return {"num_patches": image.side**2}

    def pictures(self, config, module):
        told = config.get("preprocessor", {}).get("max_num_patches") or module.image.side**2
        shown = super().pictures(config, module)
        return dataclasses.replace(shown, crop=False, resize=0, filter="bilinear", patches=told)


def part(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The configuration of one tower: old files have a second one, which counts."""
    return {**(config.get(f"{name}_config") or {}), **(config.get(f"{name}_config_dict") or {})}


def transformers_vision(config: Mapping[str, Any], patch: int, act: str, epsilon: float, **fields: Any) -> ViT:
    return default_width(ViT(
        patch=config.get("patch_size", patch), width=config.get("hidden_size", 768),
        depth=config.get("num_hidden_layers", 12), heads=config.get("num_attention_heads", 12),
        mlp_width=config.get("intermediate_size", 3072), image_size=config.get("image_size", 224),
        channels=config.get("num_channels", 3), norm_epsilon=config.get("layer_norm_eps", epsilon),
        activation=activation(config.get("hidden_act", act)), **fields,
    ))  # fmt: skip


def transformers_text(
    config: Mapping[str, Any], defaults: tuple[int, int, int, int], act: str, epsilon: float, **fields: Any
) -> TextTower:
    vocab, width, length, heads = defaults
    width = config.get("hidden_size", width)
    return default_width(TextTower(
        vocab_size=config.get("vocab_size", vocab), width=width, depth=config.get("num_hidden_layers", 12),
        heads=config.get("num_attention_heads", heads), mlp_width=config.get("intermediate_size", 4 * defaults[1]),
        max_length=config.get("max_position_embeddings", length), norm_epsilon=config.get("layer_norm_eps", epsilon),
        activation=activation(config.get("hidden_act", act)), **fields,
    ))  # fmt: skip


def tower_config(tower: ViT | TextTower) -> dict[str, Any]:
    return {
        "hidden_size": tower.width, "intermediate_size": tower.block.mlp.width, "num_hidden_layers": tower.depth,
        "num_attention_heads": tower.heads, "layer_norm_eps": tower.norm_epsilon,
        "hidden_act": activation_name(tower.activation), "attention_dropout": 0.0,
    }  # fmt: skip


def vision_config(image: ViT, kind: str) -> dict[str, Any]:
    return {**tower_config(image), "model_type": kind, "patch_size": image.patch, "num_channels": image.channels}


def text_config(text: TextTower, kind: str) -> dict[str, Any]:
    return {**tower_config(text), "model_type": kind, "vocab_size": text.vocab_size,
            "max_position_embeddings": text.max_length}  # fmt: skip


def transformers_text_rules(ours: str = "params/text") -> list[Rule]:
    at = "text_model"
    return [
        Rule(f"{at}.embeddings.token_embedding.weight", f"{ours}/token_embedding/embedding"),
        Rule(f"{at}.embeddings.position_embedding.weight", f"{ours}/position_embedding/embedding"),
        Rule(f"{at}.embeddings.position_ids", f"{ours}/position_embedding/embedding", constant=SKIP),
        *layers.block(f"{at}.encoder.layers.{{layer}}.", f"{ours}/blocks", layers.CLIP),
        *layers.norm(f"{at}.final_layer_norm", f"{ours}/final_norm"),
    ]


def transformers_vision_rules(patches: str) -> list[Rule]:
    at, ours = "vision_model", "params/image"
    return [
        *layers.linear(f"{at}.embeddings.patch_embedding", f"{ours}/patch_embedding", patches),
        Rule(f"{at}.embeddings.position_embedding.weight", f"{ours}/position_embedding/embedding"),
        Rule(f"{at}.embeddings.position_ids", f"{ours}/position_embedding/embedding", constant=SKIP),
        *layers.block(f"{at}.encoder.layers.{{layer}}.", f"{ours}/blocks", layers.CLIP),
        *layers.norm(f"{at}.post_layernorm", f"{ours}/final_norm"),
    ]


class OpenClipFormat(Pair):
    """open_clip's CLIP, and with a picture's tower of timm its SigLIP (that one is read alone)."""

    name = "open_clip"
    weights = "open_clip_model.safetensors"

    def recognises(self, config):
        return "model_cfg" in config

    def module(self, config, tensors):
        config = config["model_cfg"]
        vision, text, out = config["vision_cfg"], config["text_cfg"], config["embed_dim"]
        act = "quick_gelu" if config.get("quick_gelu") else "gelu_exact"
        if not isinstance(vision.get("layers", 12), int):
            raise UserError("an open_clip model with a ResNet of its own (attention pooling) is not imported")
        for odd, told in (("hf_model_name", text), ("attentional_pool", vision), ("embed_cls", text)):
            if told.get(odd):
                raise UserError(f"an open_clip model with {odd} is not imported")
        image = self._timm(vision, tensors, out) if vision.get("timm_model_name") else self._image(vision, out, act)
        return CLIP(image, self._text(text, out, act), bias=config.get("init_logit_bias") is not None)

    def _image(self, config: Mapping[str, Any], out: int, act: str) -> ViT:
        width = config.get("width", 768)
        return default_width(ViT(
            patch=config.get("patch_size", 16), width=width, depth=config.get("layers", 12),
            heads=width // config.get("head_width", 64), mlp_width=int(width * config.get("mlp_ratio", 4.0)),
            image_size=config.get("image_size", 224), pool="class", out=out, head_bias=False, norm_epsilon=1e-5,
            activation=act, patch_bias=False, pre_norm=not config.get("no_ln_pre", False),
        ))  # fmt: skip

    def _timm(self, config: Mapping[str, Any], tensors: Mapping[str, Any], out: int) -> ViT:
        pool, proj = config.get("timm_pool", "avg"), config.get("timm_proj", "linear")
        if pool not in ("map", "") or proj not in ("none", "", None):
            raise UserError(f"an open_clip model with timm_pool {pool!r} and timm_proj {proj!r} is not imported")
        image = timm_vit(config["timm_model_name"], {**config.get("timm_model_args", {}), **_heads(config)}, tensors,
                         "visual.trunk.")  # fmt: skip
        if image.embed_dim != out:
            raise UserError(f"the picture's tower gives {image.embed_dim} numbers, and embed_dim is {out}")
        return image

    def _text(self, config: Mapping[str, Any], out: int, act: str) -> TextTower:
        width = config.get("width", 512)
        final = config.get("pool_type", "argmax") == "last"
        tanh = (config.get("act_kwargs") or {}).get("approximate") == "tanh"
        return default_width(TextTower(
            vocab_size=config.get("vocab_size", 49408), width=width, depth=config.get("layers", 12),
            heads=config.get("heads", 8), mlp_width=int(width * config.get("mlp_ratio", 4.0)),
            max_length=config.get("context_length", 77), pool="final" if final else "last",
            mask="bidirectional" if config.get("no_causal_mask") else "causal",
            out=out, head_bias=config.get("proj_bias", False), activation="gelu" if tanh else act,
            norm_epsilon=(config.get("norm_kwargs") or {}).get("eps", 1e-5),
        ))  # fmt: skip

    def names(self, module):
        custom = module.bias   # the text's tower is a module of its own there
        at, ours, image = "text." if custom else "", "params/text", "params/image"
        head = layers.linear(f"{at}text_projection", f"{ours}/head") if module.text.head_bias else [
            Rule(f"{at}text_projection", f"{ours}/head/kernel")
        ]
        return NameMap([
            Rule("logit_scale", "params/temperature/scale"),
            Rule("logit_bias", "params/temperature/bias"),
            Rule(f"{at}token_embedding.weight", f"{ours}/token_embedding/embedding"),
            Rule(f"{at}positional_embedding", f"{ours}/position_embedding/embedding"),
            Rule(f"{at}attn_mask", f"{ours}/position_embedding/embedding", constant=SKIP),
            *layers.block(f"{at}transformer.resblocks.{{layer}}.", f"{ours}/blocks", layers.OPEN_CLIP),
            *layers.norm(f"{at}ln_final", f"{ours}/final_norm"),
            *head,
            *(timm_rules("visual.trunk.", image) if module.image.pool == "attention" else [
                Rule("visual.class_embedding", f"{image}/class_token"),
                Rule("visual.positional_embedding", f"{image}/position_embedding/embedding"),
                *layers.linear("visual.conv1", f"{image}/patch_embedding", PATCHES),
                *layers.norm("visual.ln_pre", f"{image}/embedding_norm"),
                *layers.block("visual.transformer.resblocks.{layer}.", f"{image}/blocks", layers.OPEN_CLIP),
                *layers.norm("visual.ln_post", f"{image}/final_norm"),
                Rule("visual.proj", f"{image}/head/kernel"),
            ]),
        ], **sizes(module.image))  # fmt: skip

    def config(self, module):
        image, text = module.image, module.text
        if module.bias:
            raise UserError("a SigLIP is not written in open_clip's form; --format huggingface is")
        vision = {
            "image_size": image.image_size, "layers": image.depth, "width": image.width, "patch_size": image.patch,
            "head_width": image.width // image.heads, "mlp_ratio": image.hidden_width / image.width,
        }  # fmt: skip
        words = {
            "context_length": text.max_length, "vocab_size": text.vocab_size, "width": text.width,
            "heads": text.heads, "layers": text.depth, "mlp_ratio": text.block.mlp.width / text.width,
        }  # fmt: skip
        if not image.pre_norm:
            vision["no_ln_pre"] = True
        quick = {"quick_gelu": True} if image.activation == "quick_gelu" else {}
        return {"model_cfg": {"embed_dim": text.out, **quick, "vision_cfg": vision, "text_cfg": words}}

    def files(self, module, pictures):
        told = {"mean": list(pictures.mean), "std": list(pictures.std), "interpolation": pictures.filter,
                "resize_mode": "shortest" if pictures.crop else "squash"}  # fmt: skip
        return {"open_clip_config.json": {**self.config(module), "preprocess_cfg": told}}

    def pictures(self, config, module):
        told = config.get("preprocess_cfg") or {}
        mean, std = HALF if module.bias and not told else OPENAI
        crop = told.get("resize_mode", "squash" if module.bias else "shortest") == "shortest"
        filter = told.get("interpolation", "bicubic")   # "random" is for training
        return Pictures(module.image.image_size, tuple(told.get("mean", mean)), tuple(told.get("std", std)), crop,
                        filter=filter if filter in RESAMPLING.values() else "bicubic")  # fmt: skip


def _heads(config: Mapping[str, Any]) -> dict[str, int]:
    """Heads that the configuration of a timm tower says, where its name does not."""
    found = (config.get("timm_model_kwargs") or {}).get("num_heads")
    return {"num_heads": found} if found else {}
