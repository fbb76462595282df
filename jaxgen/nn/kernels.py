"""The kernels that can compute attention, and the choice among them."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import TYPE_CHECKING, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxgen import sharding
from jaxgen.errors import UserError
from jaxgen.nn.dtypes import device, platform

if TYPE_CHECKING:
    from jaxgen.nn.attention import Mask

Kernel = Literal["auto", "xla", "chunked", "cudnn", "splash"]

Shaped = jax.Array | jax.ShapeDtypeStruct

CHUNK = 1024
"""Queries at a time in the chunked kernel."""
BLOCKS = 4
"""Blocks of causal queries in the plain kernel."""


class Choice(NamedTuple):
    """The kernel that runs, and why it and not a faster one."""

    name: str
    reason: str


def choose(kernel: Kernel, query: Shaped, key: Shaped, mask: Mask, cap: float) -> Choice:
    """Which kernel computes this attention, from the shapes and formats of query (B, L, H, D) and key (B, S, K, D).
    Raises UserError when the one asked for cannot."""
    if kernel == "auto":
        where = platform()
        best = {"tpu": "splash", "gpu": "cudnn", "cuda": "cudnn"}.get(where)
        problem = _obstacle(best, query, key, mask, cap) if best else f"no fused kernel for {where}"
        if best and not problem:
            return Choice(best, f"the fused kernel of {where}")
        plain = "chunked" if query.shape[1] > CHUNK and query.shape[1] % CHUNK == 0 else "xla"
        return Choice(plain, f"{best} cannot: {problem}" if best else problem)
    problem = _obstacle(kernel, query, key, mask, cap)
    if problem:
        raise UserError(f"The attention kernel '{kernel}' cannot run here: {problem}; 'auto' takes one that can.")
    return Choice(kernel, "asked for")


def _obstacle(kernel: str, query, key, mask: Mask, cap: float) -> str:
    """Why a kernel cannot compute this, or an empty string."""
    length, keys, head_dim = query.shape[1], key.shape[1], query.shape[3]
    if kernel == "chunked" and length % min(CHUNK, length):
        return f"the length {length} is not a multiple of {CHUNK}"
    if kernel in ("cudnn", "splash") and (mask.query_positions is not None or mask.kind == "prefix"):
        return "it knows no prefix masks and no cache positions"
    if kernel == "cudnn":
        if platform() not in ("gpu", "cuda"):
            return f"it is for NVIDIA GPUs, and this is {platform()}"
        if not _is_ampere():
            return "it needs an NVIDIA GPU of compute capability 8.0 or newer"
        if query.dtype not in (jnp.bfloat16, jnp.float16):
            return f"it computes in bfloat16 or float16, not {query.dtype}"
        if cap:
            return "it has no soft cap on scores"
        if mask.segments is not None:
            return "it has no document masks"
        if mask.window and mask.kind != "causal":
            return "its window is causal"
        if head_dim % 8 or head_dim > 128:
            return f"it takes head sizes up to 128 in steps of 8, not {head_dim}"
        if sharding.is_split("length"):
            return "the sequence is split over devices"
    if kernel == "splash":
        if platform() != "tpu":
            return f"it is for TPUs, and this is {platform()}"
        scope = sharding.current()
        mine = length if scope is None else length / scope.parts("batch", "length")[1]
        if mine % 128 or keys % 128:
            return f"it takes lengths in steps of 128 on each device, not {mine:g} and {keys}"
        if head_dim % 64:
            return f"it takes head sizes in steps of 64, not {head_dim}"
    return ""


def _is_ampere() -> bool:
    """Whether the GPU is NVIDIA's, of that generation or a newer one; AMD's names of its own hold no such number."""
    number = str(getattr(device(), "compute_capability", "")).partition(".")[0]
    return number.isdecimal() and int(number) >= 8


def _xla(query, key, value, mask: Mask, cap: float):
    """Plain attention, softmax in float32. Long causal self-attention goes in blocks of queries, each with the keys up
    to its own end, which leaves out most of what the mask would."""
    length, split = query.shape[1], sharding.is_split("length")
    if split:  # queries stay split, every device sees all keys
        key = sharding.constrain(key, "batch", None, "kv_heads", None)
        value = sharding.constrain(value, "batch", None, "kv_heads", None)
    plain = mask.kind == "causal" and mask.query_positions is None and length == key.shape[1]
    if split or not plain or length < 128 or length % BLOCKS:
        return _attend(query, key, value, mask, cap)
    ends = range(length // BLOCKS, length + 1, length // BLOCKS)
    parts = [(slice(end - length // BLOCKS, end), slice(0, end)) for end in ends]
    return jnp.concatenate(
        [_attend(query[:, rows], key[:, seen], value[:, seen], _part(mask, rows, seen), cap) for rows, seen in parts], 1
    )


def _part(mask: Mask, rows: slice, seen: slice) -> Mask:
    """The mask of some queries and some keys of a self-attention."""
    if mask.segments is not None:
        mine, theirs = mask.segments
        mask = dataclasses.replace(mask, query_segments=mine[:, rows], key_segments=theirs[:, seen])
    return dataclasses.replace(mask, query_positions=jnp.arange(rows.start, rows.stop)[None])


# Backward makes the scores again: they are large, and cheaper to compute than to keep and read.
@functools.partial(jax.checkpoint, static_argnums=(4,))
def _attend(query, key, value, mask: Mask, cap: float):
    batch, length, heads, head_dim = query.shape
    keys, kv_heads = key.shape[1:3]
    # heads first, those of a group as further rows: each product is one matrix product a head
    query = (query * (head_dim**-0.5)).reshape(batch, length, kv_heads, heads // kv_heads, head_dim)
    query = query.transpose(0, 2, 3, 1, 4).reshape(batch, kv_heads, -1, head_dim)
    key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)
    scores = jnp.einsum("bkld,bksd->bkls", query, key, preferred_element_type=jnp.float32)
    if cap:
        scores = cap * jnp.tanh(scores / cap)
    allowed = mask.allowed(length, keys)
    if allowed is not None:
        grid = scores.reshape(batch, kv_heads, -1, length, keys)
        scores = jnp.where(allowed[:, :, None], grid, -0.7 * jnp.finfo(jnp.float32).max).reshape(scores.shape)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
    out = jnp.einsum("bkls,bksd->bkld", weights.astype(value.dtype), value, preferred_element_type=jnp.float32)
    out = (out / weights.sum(-1, keepdims=True)).astype(value.dtype)
    out = out.reshape(batch, kv_heads, heads // kv_heads, length, head_dim)
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, head_dim)


def _chunked(query, key, value, mask: Mask, cap: float):
    """Plain attention a few queries at a time, recomputed backward: memory grows with L, not L^2."""
    batch, length = query.shape[:2]
    size = min(CHUNK, length)
    positions = mask.query_positions
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(length), (batch, length))
    segments = None if mask.segments is None else mask.segments[0]

    @jax.checkpoint
    def block(part):
        q, at, mine = part
        theirs = None if mask.segments is None else mask.segments[1]
        return _xla(q, key, value, dataclasses.replace(
            mask, query_positions=at, query_segments=mine, key_segments=theirs), cap)

    def split(x):
        return None if x is None else jnp.moveaxis(x.reshape(batch, size, length // size, *x.shape[2:]), 2, 0)

    out = jax.lax.map(block, (split(query), split(positions), split(segments)))
    return jnp.moveaxis(out, 0, 2).reshape(query.shape)


def _cudnn(query, key, value, mask: Mask, cap: float):
    """NVIDIA's fused attention, through jax.nn."""
    window = (mask.window - 1, 0) if mask.window else None
    return jax.nn.dot_product_attention(
        query, key, value, is_causal=mask.kind == "causal", local_window_size=window, implementation="cudnn"
    )


def _splash(query, key, value, mask: Mask, cap: float, interpret: bool = False):
    """The block-sparse flash attention of TPUs (Pallas), inside shard_map: each device has its sequences and heads.

    Where the sequence is split, every device sees all keys and its own queries' rows of the mask.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    batch, length, heads, head_dim = query.shape
    keys = key.shape[1]
    scope = sharding.current()
    _, splits, head_splits, _ = (1,) * 4 if scope is None else scope.parts("batch", "length", "heads", None)
    kv_axis = "kv_heads"
    if scope is not None and scope.parts("batch", None, kv_axis, None)[2] != head_splits:
        # fewer key heads than devices: each query head gets its own copy, or a device's would not belong together
        key, value, kv_axis = (*(jnp.repeat(x, heads // x.shape[2], axis=2) for x in (key, value)), "heads")

    shape = (length, keys)
    if mask.kind == "causal":
        one = masks.LocalMask(shape, (mask.window - 1, 0), 0) if mask.window else masks.CausalMask(shape)
    elif mask.window:
        one = masks.LocalMask(shape, (mask.window - 1, mask.window - 1), 0)
    else:
        one = masks.FullMask(shape)
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([one] * heads), head_shards=head_splits, q_seq_shards=splits,
        attn_logits_soft_cap=cap or None, interpret=interpret,
    )

    def local(kernel, q, k, v, mine, theirs):
        ids = None if mine is None else splash.SegmentIds(q=mine, kv=theirs)
        q, k, v = (x.swapaxes(1, 2) for x in (q * (head_dim**-0.5), k, v))
        axes = (0, 0, 0, None if ids is None else 0)
        return jax.vmap(kernel, in_axes=axes)(q, k, v, ids).swapaxes(1, 2)

    mine, theirs = mask.segments or (None, None)
    if scope is None or math.prod(scope.mesh.shape.values()) == 1:
        return local(kernel, query, key, value, mine, theirs)
    q_spec = scope.spec(("batch", "length", "heads", None))
    k_spec = scope.spec(("batch", None, kv_axis, None))
    ids = scope.spec(("batch", "length")), scope.spec(("batch",))
    grid = scope.spec(("heads", "length"))
    grid = NamedSharding(scope.mesh, PartitionSpec(*grid, *(None,) * (2 - len(grid))))
    run = jax.shard_map(
        local, mesh=scope.mesh, check_vma=False, out_specs=q_spec,
        in_specs=(kernel.manual_sharding_spec(grid), q_spec, k_spec, k_spec,
                  *((PartitionSpec(), PartitionSpec()) if mine is None else ids)),
    )
    return run(kernel, query, key, value, mine, theirs)


KERNELS = {"xla": _xla, "chunked": _chunked, "cudnn": _cudnn, "splash": _splash,
           "splash_interpret": functools.partial(_splash, interpret=True)}
