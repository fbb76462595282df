"""GPT: a decoder-only transformer, from GPT-2's form to today's, by fields."""

import math
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxgen import sharding
from jaxgen.errors import UserError
from jaxgen.nn.attention import Attention, Mask
from jaxgen.nn.dropout import dropout
from jaxgen.nn.dtypes import DType, resolve
from jaxgen.nn.feedforward import Activation, FeedForward
from jaxgen.nn.kernels import Kernel
from jaxgen.nn.linear import Embedding, Linear, Norm
from jaxgen.nn.rope import Rope
from jaxgen.nn.transformer import Block, Cache, Remat, hidden_width, init_stack, run_stack


class GPT(nn.Module):
    """A decoder-only transformer.

    The defaults are GPT-2's form (Radford et al. 2019); today's is `positions="rope", norm="rmsnorm",
    activation="swiglu", bias=False, tied=False` with fewer `kv_heads` (Touvron et al. 2023). Parameters of the blocks
    are stacked along a leading "layers" axis whether they are scanned or unrolled.
    """

    vocab_size: int = 50304
    """Rows of the token table; at least the tokenizer's, and better a multiple of 128."""
    depth: int = 12
    """Blocks."""
    width: int = 768
    """Size of the residual stream."""
    heads: int = 12
    """Query heads."""
    kv_heads: int = 0
    """Key and value heads, shared by groups of query heads; 0 for as many as `heads`."""
    head_dim: int = 0
    """Size of a head; 0 for width / heads."""
    mlp_width: int = 0
    """Hidden units of the feed-forward layer; 0 for 4 width, or 8/3 width in steps of 64 when gated."""
    max_length: int = 1024
    """Positions of the learned table, and the longest sequence that is taken."""
    positions: Literal["learned", "rope", "none"] = "learned"
    rope: Rope = Rope()
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    norm_epsilon: float = 1e-5
    activation: Activation = "gelu"
    bias: bool = True
    """Biases in linear layers and LayerNorm."""
    qk_norm: bool = False
    """RMSNorm on every query and key head."""
    tied: bool = True
    """The head is the token table."""
    attention_cap: float = 0.0
    """Soft cap on attention scores; 0 for none (Gemma 2: 50)."""
    logit_cap: float = 0.0
    """Soft cap on the output logits; 0 for none (Gemma 2: 30)."""
    windows: tuple[int, ...] = (0,)
    """Sliding windows of successive layers, repeated to the depth; 0 is full attention."""
    dropout: float = 0.0
    """On embeddings and both branches of each block."""
    scan: bool = True
    """Run the blocks as one compiled loop; False unrolls them (longer to compile, faster to decode)."""
    remat: Remat = "none"
    kernel: Kernel = "auto"
    dtype: DType = "auto"
    """Format of the computation; parameters are float32."""

    def check(self) -> None:
        """Raises UserError for sizes that do not fit together."""
        if min(self.depth, self.width, self.heads, self.vocab_size, self.max_length) < 1:
            raise UserError("depth, width, heads, vocab_size and max_length of a GPT are at least 1.")
        for name in ("kv_heads", "head_dim", "mlp_width", "attention_cap", "logit_cap"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} of a GPT is {getattr(self, name)}, which should be at least 0.")
        if self.windows and min(self.windows) < 0:
            raise UserError(f"The windows of a GPT are {self.windows}, and none should be less than 0.")
        if not 0 <= self.dropout < 1:
            raise UserError(f"The dropout of a GPT is {self.dropout}, which should be at least 0 and less than 1.")
        if not self.norm_epsilon >= 0 or not self.rope.factor > 0:
            raise UserError("norm_epsilon of a GPT is at least 0, and the factor of its rope is more than 0.")
        if not self.head_dim and self.width % self.heads:
            raise UserError(f"The width {self.width} is not a multiple of the {self.heads} heads.")
        if self.kv_heads and self.heads % self.kv_heads:
            raise UserError(f"The {self.heads} heads are not a multiple of the {self.kv_heads} kv_heads.")
        if self.positions == "rope" and self.key_dim % 2:
            raise UserError(f"Rotary positions need an even head size, not {self.key_dim}.")
        if not self.windows or self.depth % len(self.windows):
            raise UserError(f"The depth {self.depth} is not a multiple of the {len(self.windows)} windows' pattern.")

    @property
    def key_dim(self) -> int:
        return self.head_dim or self.width // self.heads

    @property
    def hidden_width(self) -> int:
        return self.mlp_width or hidden_width(self.width, self.activation)

    @property
    def block(self) -> Block:
        """A block, as a module of its own."""
        out_std = 0.02 / math.sqrt(2 * self.depth)  # GPT-2's scaling of what adds to the residual stream
        kv_heads = self.kv_heads or self.heads
        rope = self.rope if self.positions == "rope" else None
        return Block(
            Attention(
                self.heads, kv_heads, self.key_dim, self.bias, self.qk_norm, rope, self.attention_cap, self.kernel,
                out_std=out_std, norm_epsilon=self.norm_epsilon, dtype=self.dtype, parent=None,
            ),
            FeedForward(self.hidden_width, self.activation, self.bias, out_std=out_std, dtype=self.dtype, parent=None),
            Norm(self.norm, self.bias, self.norm_epsilon, self.dtype, parent=None),
            self.dropout, parent=None,
        )  # fmt: skip

    def setup(self):
        self.check()
        self.token_embedding = Embedding(self.vocab_size, self.width, dtype=self.dtype)
        if self.positions == "learned":
            self.position_embedding = Embedding(self.max_length, self.width, ("positions", "embed"), dtype=self.dtype)
        self.final_norm = Norm(self.norm, self.bias, self.norm_epsilon, self.dtype)
        if not self.tied:
            self.head = Linear((self.vocab_size,), (("embed",), ("vocab",)), bias=False, dtype=self.dtype)
        self.blocks = self.param("blocks", lambda key: init_stack(self.block, self.depth, self.width, key))

    def __call__(self, tokens: Int[Array, "B L"], **options) -> Float[Array, "B L V"]:
        """Logits of the next token at every position; options as of `hidden`."""
        return self.logits(self.hidden(tokens, **options)[0])

    def hidden(
        self,
        tokens: Int[Array, "B L"],
        segments: Int[Array, "B L"] | None = None,
        positions: Int[Array, "B L"] | None = None,
        cache: Cache | None = None,
        key: jax.Array | None = None,
    ) -> tuple[Float[Array, "B L E"], Cache | None]:
        """The normed residual stream, and the cache with these tokens in it.

        Tokens see earlier ones of their own segment. `positions` count within a document (default 0, 1, 2, ...); with
        a `cache` they are also the slots that are written. A `key` turns dropout on.
        """
        length = tokens.shape[1]
        if self.positions == "learned" and length > self.max_length:
            raise UserError(f"A sequence of {length} tokens is longer than the model's max_length {self.max_length}.")
        write = positions if cache is not None else None
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), tokens.shape)
        x = self.token_embedding(tokens)
        if self.positions == "learned":
            x = x + self.position_embedding(positions)
        x = sharding.constrain(x, "batch", "length", None)
        keys = None
        if key is not None and self.dropout:
            key, *keys = jax.random.split(key, self.depth + 1)
            x, keys = dropout(x, self.dropout, key), jnp.stack(keys)

        masks = [Mask("causal", window, query_segments=segments, query_positions=write) for window in self.windows]
        x, cache = run_stack(self.block, self.blocks, x, masks, positions, cache, keys, self.scan, self.remat)
        return self.final_norm(x), cache

    def logits(self, hidden: Float[Array, "B L E"]) -> Float[Array, "B L V"]:
        """Logits of the next token from the normed residual stream."""
        out = self.token_embedding.attend(hidden) if self.tied else self.head(hidden)
        out = sharding.constrain(out, "batch", "length", "vocab")
        if self.logit_cap:
            out = self.logit_cap * jnp.tanh(out.astype(jnp.float32) / self.logit_cap)
        return out

    def empty_cache(self, batch: int, length: int) -> Cache:
        """A cache of zeros for `batch` sequences of up to `length` tokens, in the compute format."""
        shape = (self.depth, batch, length, self.kv_heads or self.heads, self.key_dim)
        names = ("layers", "batch", None, "kv_heads", None)
        return tuple(sharding.constrain(jnp.zeros(shape, resolve(self.dtype)), *names) for _ in range(2))

    def flops_per_token(self, length: int) -> float:
        """Floating-point operations of the forward pass for one token of a sequence of `length`.

        Matrix products alone, 2 per multiply-add, with every query meeting every key of its window (the convention of
        Chowdhery et al. 2022, appendix B, which does not halve for causality). Training takes three times as many.
        """
        seen = sum(min(w or length, length) for w in self.windows) / len(self.windows)
        return self.depth * self.block.flops_per_token(self.width, seen) + 2.0 * self.width * self.vocab_size
