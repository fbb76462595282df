"""The text towers of pipelines: transformers' CLIPTextModel, without a head or with one."""

from typing import Any

import jax.numpy as jnp

from jaxgen.interop import layers
from jaxgen.interop.clip import text_config, transformers_text, transformers_text_rules
from jaxgen.interop.formats import Format
from jaxgen.interop.names import Expanded, NameMap, Renamed

AT = "text_model."
HEAD = "text_projection."


def with_prefix(name: str) -> str:
    """A tensor's name as it was before transformers 5, and is in the files of nearly all who have one."""
    return name if name.startswith((AT, HEAD)) else AT + name


class TextNames(NameMap):
    """Reads the names of files of either age."""

    def expand(self, leaves):
        found = super().expand(leaves)
        return TextLeaves(found.parts, found.constants, found.copies)


class TextLeaves(Expanded):
    def check(self, tensors, where):
        super().check(Renamed(tensors, with_prefix), where)

    def read(self, tensors, target, where="the file"):
        return super().read(Renamed(tensors, with_prefix), target, where)


class ClipTextFormat(Format):
    """CLIPTextModel, and CLIPTextModelWithProjection."""

    name = "transformers CLIPTextModel"
    kinds = ("CLIPTextModel", "CLIPTextModelWithProjection")

    def recognises(self, config):
        return config.get("model_type") == "clip_text_model" or config.get("architectures") in ([k] for k in self.kinds)

    def module(self, config, tensors):
        head = config.get("architectures") == [self.kinds[1]]
        return transformers_text(config, (49408, 512, 77, 8), "quick_gelu", 1e-5, mask="causal", pool="last",
                                 out=config.get("projection_dim", 512) if head else 0, head_bias=False)  # fmt: skip

    def names(self, module):
        return TextNames([*transformers_text_rules("params"), *layers.linear(HEAD[:-1], "params/head")])

    def config(self, module):
        end = max(module.vocab_size - 1, 1)
        return {
            "architectures": [self.kinds[bool(module.out)]], **text_config(module, "clip_text_model"),
            "projection_dim": module.embed_dim, "dtype": "float32", "bos_token_id": end - 1, "eos_token_id": end,
            "pad_token_id": end,
        }  # fmt: skip

    def files(self, module: Any, pictures: Any) -> dict[str, dict[str, Any]]:
        return {"config.json": self.config(module)}

    def inputs(self, module):
        return jnp.zeros((1, module.max_length), jnp.int32), jnp.full((1,), module.max_length, jnp.int32)
