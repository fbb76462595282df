"""Attention: what may see what, which kernel computes it, and the layer with its projections."""

import dataclasses
import functools
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxgen import sharding
from jaxgen.nn import kernels
from jaxgen.nn.dtypes import DType
from jaxgen.nn.kernels import Kernel
from jaxgen.nn.linear import Linear, Norm
from jaxgen.nn.rope import Rope, Rope2D


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["prefix", "query_segments", "key_segments", "query_positions"],
    meta_fields=["kind", "window"],
)
@dataclasses.dataclass(frozen=True)
class Mask:
    """Which keys a query may see: those allowed by the kind, within the window, and of its own segment."""

    kind: Literal["causal", "bidirectional", "prefix"] = "causal"
    """"prefix": causal, but the first `prefix` positions are seen by all."""
    window: int = 0
    """How many positions back a query sees, itself included (and as many ahead, when bidirectional); 0 for all."""
    prefix: Int[Array, "B"] | None = None
    query_segments: Int[Array, "B L"] | None = None
    """Document of each query; keys of other documents are not seen. For cross-attention, give the keys' as well."""
    key_segments: Int[Array, "B S"] | None = None
    """Document of each key; by default that of the queries."""
    query_positions: Int[Array, "#B L"] | None = None
    """Place of each query among the keys; by default 0, 1, 2, ... (with a cache, where decoding stands)."""

    @property
    def segments(self) -> tuple[Int[Array, "B L"], Int[Array, "B S"]] | None:
        if self.query_segments is None:
            if self.key_segments is not None:
                raise ValueError("a mask with key_segments needs query_segments as well")
            return None
        return self.query_segments, self.query_segments if self.key_segments is None else self.key_segments

    def allowed(self, queries: int, keys: int) -> Bool[Array, "#B 1 L S"] | None:
        """The mask as an array, or None when every key is seen."""
        q = jnp.arange(queries)[None] if self.query_positions is None else self.query_positions
        back = q[:, None, :, None] - jnp.arange(keys)[None, None, None, :]
        allowed = None
        if self.kind != "bidirectional":
            allowed = back >= 0
            if self.kind == "prefix":
                if self.prefix is None:
                    raise ValueError("a prefix mask needs the length of each prefix")
                allowed |= jnp.arange(keys)[None, None, None, :] < self.prefix[:, None, None, None]
        if self.window:
            near = jnp.abs(back) < self.window
            allowed = near if allowed is None else allowed & near
        if self.segments is not None:
            mine, theirs = self.segments
            same = mine[:, None, :, None] == theirs[:, None, None, :]
            allowed = same if allowed is None else allowed & same
        return allowed


def attention(
    query: Float[Array, "B L H D"],
    key: Float[Array, "B S K D"],
    value: Float[Array, "B S K D"],
    mask: Mask,
    kernel: Kernel = "auto",
    cap: float = 0.0,
) -> Float[Array, "B L H D"]:
    """softmax(q k^T / sqrt(D)) v (Vaswani et al. 2017, eq. 1); H is a multiple of K (grouped queries).

    `cap` > 0 bounds the scores smoothly to (-cap, cap) (Gemma 2). A kernel that was asked for and cannot do it
    raises UserError; "auto" takes the fastest that can. `kernels.choose` tells which, and why.
    """
    chosen = kernels.choose(kernel, query, key, mask, cap)
    return kernels.KERNELS[chosen.name](query, key, value, mask, cap)


class Attention(nn.Module):
    """Multi-head attention with grouped queries, rotary positions, QK-norm and an explicit cache, by choice."""

    heads: int
    kv_heads: int
    head_dim: int
    bias: bool = False
    qk_norm: bool = False
    rope: Rope | Rope2D | None = None
    cap: float = 0.0
    kernel: Kernel = "auto"
    init_std: float = 0.02
    out_std: float = 0.02
    norm_epsilon: float = 1e-5
    dtype: DType = "auto"
    out_bias: bool | None = None
    """Of the output's projection; None for as `bias`."""

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B L E"],
        mask: Mask,
        positions: Int[Array, "#B L *axes"] | None = None,
        cache: tuple[Float[Array, "B S K D"], Float[Array, "B S K D"]] | None = None,
        source: Float[Array, "B T C"] | None = None,
    ) -> tuple[Float[Array, "B L E"], tuple[Float[Array, "B S K D"], Float[Array, "B S K D"]] | None]:
        """Attend from x to itself, to the cache after x was written there at `mask.query_positions`, or to `source`.
        Rotary `positions` are (B, L), or (B, L, 2) for rows and columns."""

        def project(name: str, heads: int, axis: str, x=x if source is None else source):
            axes = (("embed",), (axis, "head_dim"))
            return Linear((heads, self.head_dim), axes, self.bias, self.init_std, self.dtype, name=name)(x)

        query = project("query", self.heads, "heads", x)
        key = project("key", self.kv_heads, "kv_heads")
        value = project("value", self.kv_heads, "kv_heads")
        if self.qk_norm:  # Henry et al. 2020; the RMS form of recent models
            query = Norm("rmsnorm", epsilon=self.norm_epsilon, dtype=self.dtype, name="query_norm")(query)
            key = Norm("rmsnorm", epsilon=self.norm_epsilon, dtype=self.dtype, name="key_norm")(key)
        if self.rope is not None:
            query, key = self.rope(query, positions), self.rope(key, positions)
        query = sharding.constrain(query, "batch", "length", "heads", None)
        length = "length" if source is None else None
        key = sharding.constrain(key, "batch", length, "kv_heads", None)
        value = sharding.constrain(value, "batch", length, "kv_heads", None)
        if cache is not None:
            write = jax.vmap(lambda old, new, at: old.at[at].set(new.astype(old.dtype), mode="drop"))
            cache = tuple(write(old, new, mask.query_positions) for old, new in zip(cache, (key, value), strict=True))
            key, value = (c.astype(query.dtype) for c in cache)
        out = attention(query, key, value, mask, self.kernel, self.cap)
        out = sharding.constrain(out, "batch", "length", "heads", None)
        bias = self.bias if self.out_bias is None else self.out_bias
        axes = (("heads", "head_dim"), ("embed",))
        return Linear((x.shape[-1],), axes, bias, self.out_std, self.dtype, name="out")(out), cache
