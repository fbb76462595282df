"""The text tower of contrastive models: a transformer that turns a caption into a vector."""

from typing import Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxgen import sharding
from jaxgen.errors import UserError
from jaxgen.nn.attention import Mask
from jaxgen.nn.dtypes import DType
from jaxgen.nn.feedforward import Activation
from jaxgen.nn.kernels import Kernel
from jaxgen.nn.linear import Embedding, Linear, Norm
from jaxgen.nn.transformer import Block, Remat, check_length, encoder_block, init_stack, run_stack


class TextTower(nn.Module):
    """A transformer over a caption, pooled.

    The defaults are CLIP's (Radford et al. 2021; `activation="quick_gelu"` for the released weights). SigLIP's has
    `mask="bidirectional", pool="final", head_bias=True, norm_epsilon=1e-6` (Zhai et al. 2023).
    """

    vocab_size: int = 49408
    """Rows of the token table; at least the tokenizer's."""
    width: int = 512
    """Size of the residual stream."""
    depth: int = 12
    """Blocks."""
    heads: int = 8
    mlp_width: int = 0
    """Hidden units of the feed-forward layer; 0 for 4 width, or 8/3 width in steps of 64 when gated."""
    max_length: int = 77
    """Positions of the learned table, and the longest caption that is taken."""
    mask: Literal["causal", "bidirectional"] = "causal"
    pool: Literal["last", "final", "first", "mean"] = "last"
    """Whose features stand for the caption: the last real token's (the end of text), the final position's (padding is
    then seen like text, as in SigLIP), the first's, or the mean of the real ones."""
    out: int = 512
    """Size of the result; 0 for the pooled features as they are."""
    head_bias: bool = False
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    norm_epsilon: float = 1e-5
    activation: Activation = "gelu"
    bias: bool = True
    """Biases in linear layers and LayerNorm."""
    qk_norm: bool = False
    """RMSNorm on every query and key head."""
    scan: bool = True
    """Run the blocks as one compiled loop; False unrolls them: a few run up to a fifth faster so on a CPU."""
    remat: Remat = "none"
    kernel: Kernel = "auto"
    dtype: DType = "auto"
    """Format of the computation; parameters are float32."""

    def check(self) -> None:
        """Raises UserError for sizes that do not fit together."""
        if min(self.vocab_size, self.width, self.depth, self.heads, self.max_length) < 1:
            raise UserError("vocab_size, width, depth, heads and max_length of a TextTower are at least 1.")
        if self.width % self.heads:
            raise UserError(f"The width {self.width} is not a multiple of the {self.heads} heads.")
        if self.pool == "first" and self.mask == "causal":
            raise UserError(
                'The first token of a causal tower sees no other: pool="first" needs mask="bidirectional".'
            )

    @property
    def embed_dim(self) -> int:
        """Size of the result."""
        return self.out or self.width

    @property
    def block(self) -> Block:
        """A block, as a module of its own."""
        return encoder_block(
            self.width, self.depth, self.heads, self.mlp_width, self.activation, self.bias, self.qk_norm, self.norm,
            self.norm_epsilon, None, self.kernel, self.dtype,
        )  # fmt: skip

    def setup(self):
        self.check()
        self.token_embedding = Embedding(self.vocab_size, self.width, dtype=self.dtype)
        positions = nn.initializers.normal(0.01)
        self.position_embedding = Embedding(
            self.max_length, self.width, ("positions", "embed"), positions, self.dtype
        )
        self.blocks = self.param("blocks", lambda key: init_stack(self.block, self.depth, self.width, key))
        self.final_norm = Norm(self.norm, self.bias, self.norm_epsilon, self.dtype)
        if self.out:
            self.head = Linear((self.out,), (("embed",), (None,)), self.head_bias, self.width**-0.5, self.dtype)

    def __call__(self, tokens: Int[Array, "B L"], lengths: Int[Array, "B"]) -> Float[Array, "B D"]:
        """The result for each caption of `lengths` real tokens, the end of text included."""
        features = self.features(tokens, lengths)
        return self.head(features) if self.out else features

    def features(self, tokens: Int[Array, "B L"], lengths: Int[Array, "B"]) -> Float[Array, "B E"]:
        """The pooled features, before the head."""
        x = self.hidden(tokens, lengths)
        if self.pool == "last":
            return jnp.take_along_axis(x, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)[:, 0]
        if self.pool == "mean":
            real = (jnp.arange(x.shape[1]) < lengths[:, None]).astype(x.dtype)
            return (x * real[..., None]).sum(1) / jnp.maximum(real.sum(1, keepdims=True), 1)
        return x[:, -1 if self.pool == "final" else 0]

    def hidden(self, tokens: Int[Array, "B L"], lengths: Int[Array, "B"]) -> Float[Array, "B L E"]:
        """The normed residual stream at each token."""
        length = tokens.shape[1]
        if length > self.max_length:
            raise UserError(f"A caption of {length} tokens is longer than the tower's max_length {self.max_length}.")
        check_length(length, "The text tower")
        x = self.token_embedding(tokens) + self.position_embedding(jnp.arange(length))
        x = sharding.constrain(x, "batch", "length", None)
        segments = None
        if self.mask == "bidirectional" and self.pool != "final":
            segments = (jnp.arange(length) < lengths[:, None]).astype(jnp.int32)
        mask = Mask(self.mask, query_segments=segments)
        x, _ = run_stack(self.block, self.blocks, x, [mask], scan=self.scan, remat=self.remat)
        return self.final_norm(x)

    def flops_per_example(self, shape: tuple[int, ...], train: bool = False) -> float:
        """Operations of the forward pass for a caption of shape (L,): matrix products alone, 2 per multiply-add, with
        every query meeting every key. The same in training."""
        length = shape[0]
        return length * self.depth * self.block.flops_per_token(self.width, length) + 2.0 * self.width * self.out
