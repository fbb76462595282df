"""MM-DiT: a transformer of two streams, the picture's and the text's (Esser et al. 2024, Stable Diffusion 3), and of
one stream after them (Black Forest Labs 2024, FLUX.1), by fields."""

from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxgen import sharding
from jaxgen.errors import UserError
from jaxgen.models.conditions import Conditions, Telling, check_out, check_patches, seen_with, sinusoids, with_image
from jaxgen.nn.attention import Mask, attention
from jaxgen.nn.dtypes import DType, resolve
from jaxgen.nn.feedforward import FeedForward
from jaxgen.nn.kernels import Kernel
from jaxgen.nn.linear import Linear, Norm
from jaxgen.nn.modulation import gated, modulated, modulation
from jaxgen.nn.patches import grid, patchify, unpatchify
from jaxgen.nn.rope import RopeAxes
from jaxgen.nn.stack import stacked, through
from jaxgen.nn.transformer import Remat, check_length

EPSILON = 1e-6
PERIODS = 256
"""Cosines and sines by which the time, and the guidance scale, are told."""

Tokens = Float[Array, "B L E"]
Heads = Float[Array, "B L H D"]


class Projections(nn.Module):
    """Queries, keys and values of one stream, and what the attended values are turned into."""

    width: int
    heads: int
    qk_norm: bool
    rope: RopeAxes | None
    dtype: DType

    def setup(self):
        size, std = self.width // self.heads, self.width**-0.5
        axes = (("embed",), ("heads", "head_dim"))
        self.query, self.key, self.value = (
            Linear((self.heads, size), axes, True, std, self.dtype) for _ in range(3)
        )  # fmt: skip
        if self.qk_norm:
            self.query_norm, self.key_norm = (Norm("rmsnorm", epsilon=EPSILON, dtype=self.dtype) for _ in range(2))
        self.out = Linear((self.width,), (("heads", "head_dim"), ("embed",)), True, std, self.dtype)

    def queries(self, x: Tokens, positions: Int[Array, "#B L A"] | None) -> Heads:
        query = self.query(x)
        return self._turned(self.query_norm(query) if self.qk_norm else query, positions)

    def keys_and_values(self, x: Tokens, positions: Int[Array, "#B L A"] | None) -> tuple[Heads, Heads]:
        key = self.key(x)
        return self._turned(self.key_norm(key) if self.qk_norm else key, positions), self.value(x)

    def merged(self, x: Heads) -> Tokens:
        return self.out(x)

    def _turned(self, x, positions):
        x = x if self.rope is None or positions is None else self.rope(x, positions)
        return sharding.constrain(x, "batch", "length", "heads", None)


class Stream(nn.Module):
    """What is one stream's own in a joint block: x + gate1 attention(norm(x)), then x + gate2 mlp(norm(x))."""

    width: int
    heads: int
    mlp_ratio: int
    qk_norm: bool
    rope: RopeAxes | None
    dual: bool = False
    """It also attends to itself alone, and adds that (Stable Diffusion 3.5)."""
    silent: bool = False
    """It is only attended to: nothing comes after it (the text's, in the last block)."""
    dtype: DType = "auto"

    def setup(self):
        # shift, scale and gate of attention, of the feed-forward layer, and of attention to itself; a silent stream
        # has scale and shift, in this order, which is the one of known weights
        self.modulation = modulation(2 if self.silent else 9 if self.dual else 6, self.width, self.dtype)
        attend = Projections(self.width, self.heads, self.qk_norm, self.rope, self.dtype, parent=None)
        self.attention = attend.clone()
        if self.dual:
            self.own = attend.clone()
        if not self.silent:
            hidden = self.mlp_ratio * self.width
            self.mlp = FeedForward(hidden, "gelu", True, self.width**-0.5, hidden**-0.5, self.dtype)

    def normed(self, x: Tokens, told: Float[Array, "B E"], branch: int = 0) -> tuple[Tokens, Float[Array, "B n E"]]:
        """x as attention takes it in (`branch` 2: attention to itself), and all vectors made of what is told."""
        parts = self.modulation(told)
        shift, scale = (parts[:, 1], parts[:, 0]) if self.silent else (parts[:, 3 * branch], parts[:, 3 * branch + 1])
        return modulated(x, shift, scale, epsilon=EPSILON, dtype=self.dtype), parts

    def left(
        self, x: Tokens, attended: Heads, parts: Float[Array, "B n E"], own: Heads | None = None
    ) -> Tokens:
        """x after the block."""
        x = gated(x, parts[:, 2], self.attention.merged(attended))
        if own is not None:
            x = gated(x, parts[:, 8], self.own.merged(own))
        h = self.mlp(modulated(x, parts[:, 3], parts[:, 4], epsilon=EPSILON, dtype=self.dtype))
        return sharding.constrain(gated(x, parts[:, 5], h), "batch", "length", None)


class Joint(nn.Module):
    """A picture and a text that attend to both together, each with weights of its own (Esser et al. 2024, figure 2)."""

    width: int
    heads: int
    mlp_ratio: int = 4
    qk_norm: bool = False
    rope: RopeAxes | None = None
    dual: bool = False
    last: bool = False
    """The text is not needed afterwards."""
    kernel: Kernel = "auto"
    dtype: DType = "auto"

    def setup(self):
        fields = dict(
            width=self.width, heads=self.heads, mlp_ratio=self.mlp_ratio, qk_norm=self.qk_norm, rope=self.rope,
            dtype=self.dtype,
        )  # fmt: skip
        self.picture = Stream(**fields, dual=self.dual)
        self.text = Stream(**fields, silent=self.last)

    def __call__(
        self,
        x: Float[Array, "B N E"],
        text: Float[Array, "B T E"],
        told: Float[Array, "B E"],
        mask: Bool[Array, "B T"] | None = None,
        places: tuple[Int[Array, "#B N A"], Int[Array, "#B T A"]] | tuple[None, None] = (None, None),
    ) -> tuple[Float[Array, "B N E"], Float[Array, "B T E"]]:
        """Both streams after the block; `told` is after its silu."""
        picture, words = self.picture, self.text
        h, parts = picture.normed(x, told)
        t, words_parts = words.normed(text, told)
        of_text = words.attention.keys_and_values(t, places[1])
        both = zip(of_text, picture.attention.keys_and_values(h, places[0]), strict=True)
        keys, values = (jnp.concatenate(pair, 1) for pair in both)

        def attend(queries):  # a stream at a time: the length of one does not decide the other's kernel
            seen = seen_with(mask, x.shape[1])
            if mask is not None:
                ones = jnp.ones(queries.shape[:2], jnp.int32)
                seen = Mask("bidirectional", query_segments=ones, key_segments=seen.query_segments)
            return attention(queries, keys, values, seen, self.kernel)

        own = None
        if self.dual:
            again = modulated(x, parts[:, 6], parts[:, 7], epsilon=EPSILON, dtype=self.dtype)
            queries = picture.own.queries(again, places[0])
            own = attention(
                queries, *picture.own.keys_and_values(again, places[0]), Mask("bidirectional"), self.kernel
            )  # fmt: skip
        x = picture.left(x, attend(picture.attention.queries(h, places[0])), parts, own)
        if not self.last:
            text = words.left(text, attend(words.attention.queries(t, places[1])), words_parts)
        return x, text


class Single(nn.Module):
    """x + gate out(attention(norm(x)), mlp(norm(x))): both side by side (Dehghani et al. 2023, ViT-22B), modulated."""

    width: int
    heads: int
    mlp_ratio: int = 4
    rope: RopeAxes | None = None
    qk_norm: bool = True
    kernel: Kernel = "auto"
    dtype: DType = "auto"

    @nn.compact
    def __call__(
        self,
        x: Tokens,
        told: Float[Array, "B E"],
        mask: Mask = Mask("bidirectional"),
        positions: Int[Array, "#B L A"] | None = None,
    ) -> Tokens:
        """(B, L, E) to the same; `told` is after its silu."""
        width, ratio, std = self.width, self.mlp_ratio, self.width**-0.5
        parts = modulation(3, width, self.dtype, "modulation")(told)
        h = modulated(x, parts[:, 0], parts[:, 1], epsilon=EPSILON, dtype=self.dtype)
        attend = Projections(width, self.heads, self.qk_norm, self.rope, self.dtype, name="attention")
        keys, values = attend.keys_and_values(h, positions)
        attended = attention(attend.queries(h, positions), keys, values, mask, self.kernel)
        # Hidden units as `ratio` times the width: what one device has of them and of the heads then lies together.
        up = Linear((ratio, width), (("embed",), (None, "mlp")), True, std, self.dtype, name="up")
        hidden = jax.checkpoint(jax.nn.gelu)(up(h))
        both = jnp.concatenate([attended.reshape(*x.shape[:2], 1, width), hidden], 2)
        both = sharding.constrain(both, "batch", "length", None, "mlp")
        std = ((1 + ratio) * width) ** -0.5
        out = Linear((width,), ((None, "mlp"), ("embed",)), True, std, self.dtype, name="out")(both)
        return sharding.constrain(gated(x, parts[:, 2], out), "batch", "length", None)


class MMDiT(nn.Module):
    """A diffusion transformer of a picture and a text. The defaults are Stable Diffusion 3 medium's.

    `depth` joint blocks come first, then `single_depth` single ones over both streams together. Where there are none,
    the last joint block leaves the text as it is. Conditions taken: `tokens` (and `mask`), `pooled`, `classes`, `image`
    (beside the picture). Parameters of equal blocks are stacked along a leading "layers" axis.
    """

    out: int = 16
    """Channels of the result; twice the picture's for a learned variance."""
    channels: int = 0
    """Channels that come in, those of a picture beside included; 0: as the first call brings them."""
    patch: int = 2
    """Pixels along a patch's side."""
    width: int = 1536
    """Size of both residual streams."""
    depth: int = 24
    """Joint blocks."""
    single_depth: int = 0
    """Single blocks."""
    heads: int = 24
    mlp_ratio: int = 4
    """Hidden units of the feed-forward layers, as multiples of the width."""
    text: int = 4096
    """Size of the text's embeddings; 0: no text comes in, and one learned token stands in its place."""
    pooled: int = 2048
    """Size of the pooled embedding; 0: the network takes none."""
    classes: int = 0
    """Classes; number `classes` stands for none of them. 0: the network takes no class."""
    guidance: float = 0.0
    """Guidance scale that a distilled network is told where a call tells none (Meng et al. 2023); 0: it takes none."""
    qk_norm: bool = False
    """RMSNorm on every query and key head."""
    dual: int = 0
    """In so many of the first joint blocks the picture attends to itself as well (Stable Diffusion 3.5 medium)."""
    positions: Literal["learned", "sincos", "rope"] = "learned"
    """A table of `table` x `table` places, of which the middle is cut out: learned, or of fixed sines and cosines (from
    which what is learned begins); or rotary rows and columns in every block."""
    table: int = 192
    """Rows, and columns, of the table ..."""
    base: int = 64
    """... whose sines and cosines stand as far apart as those of a table with so many."""
    rope: RopeAxes = RopeAxes()
    """Axes: nothing (or what a caller adds), row and column. The text stands at 0."""
    scan: bool = True
    """Run equal blocks as one compiled loop; False unrolls them."""
    remat: Remat = "none"
    kernel: Kernel = "auto"
    dtype: DType = "auto"
    """Format of the computation; parameters are float32."""

    # Sizes as their authors' configurations state them.

    @classmethod
    def SD3(cls, **fields) -> "MMDiT":  # noqa: N802
        """Stable Diffusion 3 medium (2 billion)."""
        return cls(**fields)

    @classmethod
    def SD35M(cls, **fields) -> "MMDiT":  # noqa: N802
        """Stable Diffusion 3.5 medium (2.2 billion)."""
        return cls(**{"qk_norm": True, "dual": 13, "table": 384} | fields)

    @classmethod
    def SD35L(cls, **fields) -> "MMDiT":  # noqa: N802
        """Stable Diffusion 3.5 large (8.1 billion)."""
        return cls(**{"width": 2432, "depth": 38, "heads": 38, "qk_norm": True} | fields)

    @classmethod
    def Flux(cls, **fields) -> "MMDiT":  # noqa: N802
        """FLUX.1 dev (11.9 billion); schnell has `guidance=0`."""
        return cls(**dict(
            width=3072, depth=19, single_depth=38, heads=24, pooled=768, guidance=3.5, qk_norm=True, positions="rope",
        ) | fields)  # fmt: skip

    def check(self, shape: tuple[int, int, int]) -> None:
        """Raises UserError for sizes that do not fit together, or not pictures of this shape (H, W, C)."""
        if min(self.out, self.patch, self.width, self.heads, self.mlp_ratio) < 1 or self.depth + self.single_depth < 1:
            raise UserError("out, patch, width, heads, mlp_ratio and the blocks of an MMDiT are at least 1.")
        if min(self.depth, self.single_depth, self.channels, self.text, self.pooled, self.classes) < 0:
            raise UserError("No size of an MMDiT is below 0.")
        if self.width % self.heads:
            raise UserError(f"The width {self.width} is not a multiple of the {self.heads} heads.")
        if not 0 <= self.dual <= self.depth:
            raise UserError(f"dual = {self.dual} should be at least 0 and at most the {self.depth} joint blocks.")
        check_patches(self.patch, shape)
        check_out(self.out, shape[2])
        if self.positions == "rope":
            if len(self.rope.sizes(self.width // self.heads)) < 2:
                raise UserError("The rotary axes of an MMDiT are at least two: row and column.")
            return
        if self.width % 4:
            raise UserError(f"Sines and cosines of rows and columns need a width in steps of 4, not {self.width}.")
        if max(shape[:2]) > self.table * self.patch:
            raise UserError(
                f"A picture of {shape[0]} x {shape[1]} has more than {self.table} patches of {self.patch} along a "
                "side; give the network a larger table."
            )

    @property
    def multiple(self) -> int:
        """Of which a picture's sides are multiples."""
        return self.patch

    @property
    def joint(self) -> Joint:
        """A joint block, as a module of its own."""
        return Joint(
            self.width, self.heads, self.mlp_ratio, self.qk_norm, self.rope if self.positions == "rope" else None,
            kernel=self.kernel, dtype=self.dtype, parent=None,
        )  # fmt: skip

    @property
    def single(self) -> Single:
        """A single block, as a module of its own."""
        return Single(
            self.width, self.heads, self.mlp_ratio, self.rope if self.positions == "rope" else None, self.qk_norm,
            self.kernel, self.dtype, parent=None,
        )  # fmt: skip

    @property
    def groups(self) -> dict[str, tuple[int, int]]:
        """The joint blocks by the name of their parameters: (first, how many), in order. The last is not stacked."""
        ends = self.depth - (self.single_depth == 0 and self.depth > 0)
        dual = min(self.dual, ends)
        found = {"dual_blocks": (0, dual), "joint_blocks": (dual, ends - dual), "last_block": (ends, self.depth - ends)}
        return {name: place for name, place in found.items() if place[1]}

    @property
    def telling(self) -> Telling:
        return Telling(self.width, PERIODS, self.classes, self.pooled, dtype=self.dtype, parent=None)

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B H W C"],
        label: Float[Array, "B"],
        conditions: Conditions = Conditions(),
        key: Array | None = None,
        guidance: Float[Array, "B"] | None = None,
    ) -> Float[Array, "B H W D"]:
        """The output for noisy pictures. `label` tells of the time, and `guidance` a distilled network of the guidance
        scale; there is no dropout for `key`. Without `classes` the class is none; text and the pooled embedding have to
        be there where the network takes them."""
        self.check(x.shape[1:])
        x = with_image(x, conditions, "an MMDiT", self.channels)
        dtype, batch = resolve(self.dtype), x.shape[0]
        rows, columns = x.shape[1] // self.patch, x.shape[2] // self.patch
        x = patchify(x, self.patch)
        count, size = x.shape[1:]

        def linear(name: str, x, std: float, axis: str | None = "embed"):
            return Linear((self.width,), ((None,), (axis,)), True, std, self.dtype, name=name)(x)

        x = linear("patch_embedding", x, size**-0.5)
        if self.positions != "rope":
            x = x + self._places(rows, columns).astype(dtype)
        if not self.text:
            text, mask = self._learned_text(batch), None
        elif conditions.tokens is None:
            raise ValueError("the network takes text, and the conditions have no tokens")
        else:
            text, mask = linear("text_embedding", conditions.tokens, self.text**-0.5), conditions.mask
        length = text.shape[1]
        check_length(count, "The MMDiT")
        x = sharding.constrain(x, "batch", "length", None)
        places = (None, None)
        if self.positions == "rope":
            axes = len(self.rope.sizes(self.width // self.heads))
            places = (
                jnp.pad(grid(rows, columns), ((0, 0), (0, 0), (axes - 2, 0))), jnp.zeros((1, length, axes), jnp.int32)
            )  # fmt: skip

        told = self.telling.copy(name="told")(label, conditions)
        if self.guidance:
            scale = jnp.full((batch,), self.guidance) if guidance is None else guidance
            waves = sinusoids(1000 * scale, PERIODS)  # as of a time
            h = jax.nn.silu(linear("guidance_in", waves, 0.02, "mlp"))
            told = told + linear("guidance_out", h, 0.02, "mlp")
        told = jax.nn.silu(told)

        for name, (first, blocks) in self.groups.items():
            block = self.joint.clone(dual=first < self.dual, last=name == "last_block")

            def run(params, streams, block=block):
                return block.apply({"params": params}, *streams, told, mask, places)

            init = self._init(block, 2)
            if name == "last_block":
                params = self.param(name, init)
                x, text = through(run, jax.tree.map(lambda p: p[None], params), (x, text), False, self.remat)
            else:
                params = self.param(name, lambda k, init=init, blocks=blocks: stacked(init, blocks, k))
                x, text = through(run, params, (x, text), self.scan, self.remat)

        if self.single_depth:
            check_length(length + count, "The MMDiT with its text")
            block, seen = self.single, seen_with(mask, count)
            positions = None if places[0] is None else jnp.concatenate(places[::-1], 1)
            params = self.param("single_blocks", lambda k: stacked(self._init(block, 1), self.single_depth, k))
            x = sharding.constrain(jnp.concatenate([text, x], 1), "batch", "length", None)
            x = through(
                lambda params, x: block.apply({"params": params}, x, told, seen, positions),
                params, x, self.scan, self.remat,
            )[:, length:]  # fmt: skip

        two = modulation(2, self.width, self.dtype, "final_modulation")(told)  # scale and shift
        x = modulated(x, two[:, 1], two[:, 0], epsilon=EPSILON, dtype=self.dtype)
        head = Linear((self.patch**2 * self.out,), (("embed",), (None,)), init_std=0.0, dtype=self.dtype, name="head")
        return unpatchify(head(x).astype(jnp.float32), rows, columns, self.patch)

    def _init(self, block: nn.Module, streams: int) -> Callable[[Array], Any]:
        """Makes the boxed parameters of one block."""
        x, told = jnp.zeros((1, 1, self.width)), jnp.zeros((1, self.width))
        bare = block.clone(kernel="xla", rope=None)  # which hold no parameters
        return lambda key: bare.init(key, *[x] * streams, told)["params"]

    def _learned_text(self, batch: int) -> Tokens:
        """The learned token that stands for a text where none comes in."""
        init = nn.with_logical_partitioning(nn.initializers.normal(0.02), (None, "embed"))
        token = self.param("text_token", init, (1, self.width)).astype(resolve(self.dtype))
        return jnp.broadcast_to(token, (batch, 1, self.width))

    def _places(self, rows: int, columns: int) -> Float[Array, "1 N E"]:
        """The middle of the table of positions."""
        shape = (self.table, self.table, self.width)
        if self.positions == "learned":
            init = nn.with_logical_partitioning(lambda _: waves(*shape, self.base), ("positions", None, "embed"))
            table = self.param("position_embedding", init)
        else:
            table = waves(*shape, self.base)
        top, left = (self.table - rows) // 2, (self.table - columns) // 2
        return table[top : top + rows, left : left + columns].reshape(1, rows * columns, self.width)

    def flops_per_example(self, shape: tuple[int, int, int], length: int = 0) -> float:
        """Operations of the forward pass for a picture of this shape (H, W, C), a picture beside it counted among its
        channels, and `length` tokens of text: matrix products alone, 2 per multiply-add."""
        width, ratio, size = self.width, self.mlp_ratio, self.patch**2
        count = (shape[0] // self.patch) * (shape[1] // self.patch)
        length = length if self.text else 1
        every, square = count + length, width**2
        total = 0.0
        for name, (first, blocks) in self.groups.items():
            heard = length if name == "last_block" else 0  # keys and values alone
            one = (4 + 2 * ratio) * every * square + 2 * every * every * width
            one -= (2 + 2 * ratio) * heard * square + 2 * heard * every * width
            vectors = 6 + (2 if name == "last_block" else 6)
            if first < self.dual:
                one += 4 * count * square + 2 * count**2 * width
                vectors += 3
            total += blocks * (one + vectors * square)
        total += self.single_depth * ((4 + 2 * ratio) * every * square + 2 * every**2 * width + 3 * square)
        total += count * size * (shape[2] + self.out) * width + 2 * square
        total += length * self.text * width + (width * (PERIODS + width) if self.guidance else 0)
        return 2.0 * total + self.telling.flops()


def waves(rows: int, columns: int, width: int, base: int) -> Float[Array, "R C E"]:
    """Sines and cosines of the column and of the row, a quarter of the features each, of periods from 2 pi to (less
    than) 2 pi 10,000 (He et al. 2022, MAE); places stand as far apart as `base` of them along the whole."""
    frequencies = 10_000.0 ** -(np.arange(width // 4) / (width // 4))
    row, column = (np.arange(n)[:, None] * base / n * frequencies for n in (rows, columns))
    parts = [np.sin(column)[None], np.cos(column)[None], np.sin(row)[:, None], np.cos(row)[:, None]]
    parts = [jnp.broadcast_to(jnp.asarray(p, jnp.float32), (rows, columns, width // 4)) for p in parts]
    return jnp.concatenate(parts, -1)
