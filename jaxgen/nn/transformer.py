"""The pre-norm transformer block, and a stack of them run as one compiled loop or unrolled."""

import functools
import math
from collections.abc import Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxgen import sharding
from jaxgen.errors import UserError
from jaxgen.nn.attention import Attention, Mask
from jaxgen.nn.dropout import dropout
from jaxgen.nn.dtypes import DType
from jaxgen.nn.feedforward import Activation, FeedForward, is_gated
from jaxgen.nn.kernels import Kernel
from jaxgen.nn.linear import Norm
from jaxgen.nn.rope import Rope, Rope2D
from jaxgen.nn.stack import POLICIES, Remat, stacked

Cache = tuple[Float[Array, "N B S K D"], Float[Array, "N B S K D"]]
"""Keys and values of every layer: N layers, B sequences, S slots, K heads of size D."""


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)) (pre-norm; Radford et al. 2019)."""

    attention: Attention
    mlp: FeedForward
    norm: Norm
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x, mask: Mask, positions=None, cache=None, key=None):
        """(B, L, E) to the same, and the layer's cache; a `key` turns dropout on."""
        keys = (None, None) if key is None else jax.random.split(key)
        h, cache = self.attention(self.norm.copy(name="attention_norm")(x), mask, positions, cache)
        x = x + dropout(h, self.dropout, keys[0])
        x = x + dropout(self.mlp(self.norm.copy(name="mlp_norm")(x)), self.dropout, keys[1])
        return sharding.constrain(x, "batch", "length", None), cache

    def flops_per_token(self, width: int, seen: int | float) -> float:
        """Operations of the forward pass for one token of size `width` that meets `seen` keys: matrix products alone,
        2 per multiply-add."""
        attention, mlp = self.attention, self.mlp
        projections = width * attention.head_dim * (2 * attention.heads + 2 * attention.kv_heads)
        scores = 2 * attention.heads * attention.head_dim * seen
        return 2.0 * (projections + scores + width * mlp.width * (3 if is_gated(mlp.activation) else 2))


def encoder_block(
    width: int,
    depth: int,
    heads: int,
    mlp_width: int = 0,
    activation: Activation = "gelu",
    bias: bool = True,
    qk_norm: bool = False,
    norm: Literal["layernorm", "rmsnorm"] = "layernorm",
    norm_epsilon: float = 1e-6,
    rope: Rope | Rope2D | None = None,
    kernel: Kernel = "auto",
    dtype: DType = "auto",
) -> Block:
    """The block of a tower (ViT, text), initialised by its width and depth as CLIP's (Radford et al. 2021)."""
    std, out_std = width**-0.5, width**-0.5 / math.sqrt(2 * depth)
    return Block(
        Attention(
            heads, heads, width // heads, bias, qk_norm, rope, kernel=kernel, init_std=std, out_std=out_std,
            norm_epsilon=norm_epsilon, dtype=dtype, parent=None,
        ),
        FeedForward(
            mlp_width or hidden_width(width, activation), activation, bias, std / math.sqrt(2), out_std, dtype,
            parent=None,
        ),
        Norm(norm, bias, norm_epsilon, dtype, parent=None),
        parent=None,
    )  # fmt: skip


def hidden_width(width: int, activation: Activation) -> int:
    """Hidden units of a feed-forward layer by default: 4 width, or 8/3 width in steps of 64 when gated."""
    return -(-width * 8 // 3 // 64) * 64 if is_gated(activation) else 4 * width


def init_stack(block: nn.Module, depth: int, width: int, key: jax.Array, **told: Any) -> Any:
    """Boxed parameters of `depth` blocks, stacked along a leading "layers" axis. `block` is a `Block` or one like it,
    and `told` are further arguments of it."""
    block = block.clone(attention=block.attention.clone(kernel="xla", rope=None))  # which hold no parameters
    x = jnp.zeros((1, 1, width))
    return stacked(lambda k: block.init(k, x, Mask(), **told)["params"], depth, key)


def run_stack(
    block: nn.Module,
    params: Any,
    x: Float[Array, "B L E"],
    masks: Sequence[Mask],
    positions: Int[Array, "#B L *axes"] | None = None,
    cache: Cache | None = None,
    keys: Array | None = None,
    scan: bool = True,
    remat: Remat = "none",
    **told: Any,
) -> tuple[Float[Array, "B L E"], Cache | None]:
    """The stacked blocks one after the other, and the cache that they leave.

    `masks` are those of successive layers, repeated to the depth; `keys` turn dropout on, one a layer. `scan` runs the
    blocks as one compiled loop; otherwise they are unrolled (longer to compile, faster to decode). `told` are further
    arguments of the block, the same for each.
    """
    depth, period = jax.tree.leaves(params)[0].shape[0], len(masks)
    blocks = [_apply(block, mask, positions, remat if cache is None else "none", scan, told) for mask in masks]
    layers = (params, cache, keys)
    if not scan:
        kept = []
        for i, layer in enumerate(_unstack(layers, depth)):
            x, c = blocks[i % period](x, *layer)
            kept.append(c)
        return x, jax.tree.map(lambda *c: jnp.stack(c), *kept)

    def body(x, group):
        kept = []
        for run, layer in zip(blocks, _unstack(group, period), strict=True):
            x, c = run(x, *layer)
            kept.append(c)
        return x, jax.tree.map(lambda *c: jnp.stack(c), *kept)

    grouped = jax.tree.map(lambda a: a.reshape(depth // period, period, *a.shape[1:]), layers)
    x, cache = jax.lax.scan(body, x, grouped)
    return x, jax.tree.map(lambda a: a.reshape(depth, *a.shape[2:]), cache)


def _apply(block: nn.Module, mask: Mask, positions, remat: Remat, scan: bool, told: dict[str, Any]):
    """The block as a function of (x, its parameters, its cache, its dropout key), rematerialised by policy."""

    def run(x, params, cache, key):
        return block.apply({"params": params}, x, mask, positions, cache, key, **told)

    if remat == "none":
        return run
    return functools.partial(jax.checkpoint, policy=POLICIES[remat], prevent_cse=not scan)(run)


def _unstack(tree, size: int) -> list:
    """Slices along the leading axis. By one split, whose gradient is one concatenation."""
    leaves, structure = jax.tree.flatten(tree)
    parts = [jax.lax.split(a, (1,) * size) for a in leaves]
    return [structure.unflatten([p[i][0] for p in parts]) for i in range(size)]


def check_length(length: int, what: str) -> None:
    """Raises UserError where the mesh in force splits a sequence of this length and does not divide it."""
    scope = sharding.current()
    parts = 1 if scope is None else scope.parts("length")[0]
    if length % parts:
        raise UserError(
            f"{what} makes sequences of {length}, which mesh.sequence = {parts} does not divide; leave the sequence "
            "whole, or change its length."
        )
