"""DiT: a transformer over the patches of a noisy picture, told of time and conditions by adaLN-zero (Peebles & Xie
2023)."""

import math
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxgen import sharding
from jaxgen.errors import UserError
from jaxgen.models.conditions import Conditions, Telling, check_out, check_patches, seen_with, with_image
from jaxgen.nn.attention import Attention, Mask
from jaxgen.nn.dropout import dropout
from jaxgen.nn.dtypes import DType, resolve
from jaxgen.nn.feedforward import Activation, FeedForward
from jaxgen.nn.kernels import Kernel
from jaxgen.nn.linear import Linear, Norm
from jaxgen.nn.modulation import gated, modulated, modulation
from jaxgen.nn.patches import grid, patchify, sincos, unpatchify
from jaxgen.nn.rope import Rope2D
from jaxgen.nn.transformer import Block, Remat, check_length, hidden_width, init_stack, run_stack


class AdaptiveBlock(Block):
    """x + gate1 attention(norm(x)), then x + gate2 mlp(norm(x)), each norm scaled and shifted: six vectors made of what
    is told, zeros at first (adaLN-zero). `norm` says of what kind; it has no parameters."""

    @nn.compact
    def __call__(self, x, mask: Mask, positions=None, cache=None, key=None, *, told: Float[Array, "B E"]):
        """(B, L, E) to the same, and the layer's cache; a `key` turns dropout on. `told` is after its silu."""
        keys = (None, None) if key is None else jax.random.split(key)
        norm, width = self.norm, x.shape[-1]
        six = modulation(6, width, norm.dtype, "modulation")(told)
        shift1, scale1, gate1, shift2, scale2, gate2 = (six[:, i] for i in range(6))
        h = modulated(x, shift1, scale1, norm.kind, norm.epsilon, norm.dtype)
        h, cache = self.attention(h, mask, positions, cache)
        x = gated(x, gate1, dropout(h, self.dropout, keys[0]))
        h = self.mlp(modulated(x, shift2, scale2, norm.kind, norm.epsilon, norm.dtype))
        x = gated(x, gate2, dropout(h, self.dropout, keys[1]))
        return sharding.constrain(x, "batch", "length", None), cache


class DiT(nn.Module):
    """A diffusion transformer. The defaults are DiT-XL/2 for latents of 4 channels, without classes.

    Conditions taken: `classes`, `tokens` (further tokens of the same sequence, before the patches), `pooled`, `image`
    (beside the picture). Parameters of the blocks are stacked along a leading "layers" axis.
    """

    out: int = 4
    """Channels of the result; twice the picture's for a learned variance."""
    patch: int = 2
    """Pixels along a patch's side."""
    width: int = 1152
    """Size of the residual stream."""
    depth: int = 28
    """Blocks."""
    heads: int = 16
    classes: int = 0
    """Classes; number `classes` stands for none of them. 0: the network takes no class."""
    text: int = 0
    """Size of the text's embeddings; 0: the network takes no text."""
    pooled: int = 0
    """Size of the pooled embedding; 0: the network takes none."""
    channels: int = 0
    """Channels of the input, those of a picture beside it among them; 0 for whatever comes."""
    positions: Literal["sincos", "rope", "none"] = "sincos"
    """Fixed sines and cosines of row and column, or rotary rows and columns in every block."""
    rope: Rope2D = Rope2D()
    periods: int = 256
    """Cosines and sines by which the time is told."""
    period_shift: int = 0
    """Of the time's periods (see `conditions.sinusoids`): 0 as the paper's code has it, 1 as diffusers."""
    mlp_width: int = 0
    """Hidden units of the feed-forward layer; 0 for 4 width, or 8/3 width in steps of 64 when gated."""
    activation: Activation = "gelu"
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    norm_epsilon: float = 1e-6
    qk_norm: bool = False
    """RMSNorm on every query and key head."""
    bias: bool = True
    """Biases in the blocks' attention and feed-forward layers."""
    dropout: float = 0.0
    """On both branches of each block."""
    scan: bool = True
    """Run the blocks as one compiled loop; False unrolls them: a few run up to a fifth faster so on a CPU."""
    remat: Remat = "none"
    kernel: Kernel = "auto"
    dtype: DType = "auto"
    """Format of the computation; parameters are float32."""

    # Sizes of the paper's table 1.

    @classmethod
    def S(cls, patch: int = 2, **fields) -> "DiT":  # noqa: N802
        return cls(**{"patch": patch, "width": 384, "depth": 12, "heads": 6} | fields)

    @classmethod
    def B(cls, patch: int = 2, **fields) -> "DiT":  # noqa: N802
        return cls(**{"patch": patch, "width": 768, "depth": 12, "heads": 12} | fields)

    @classmethod
    def L(cls, patch: int = 2, **fields) -> "DiT":  # noqa: N802
        return cls(**{"patch": patch, "width": 1024, "depth": 24, "heads": 16} | fields)

    @classmethod
    def XL(cls, patch: int = 2, **fields) -> "DiT":  # noqa: N802
        return cls(**{"patch": patch, "width": 1152, "depth": 28, "heads": 16} | fields)

    def check(self, shape: tuple[int, int, int]) -> None:
        """Raises UserError for sizes that do not fit together, or not pictures of this shape (H, W, C)."""
        if min(self.out, self.patch, self.width, self.depth, self.heads) < 1:
            raise UserError("out, patch, width, depth and heads of a DiT are at least 1.")
        if self.width % self.heads:
            raise UserError(f"The width {self.width} is not a multiple of the {self.heads} heads.")
        if self.positions == "rope" and self.width // self.heads % 4:
            raise UserError(
                f"Rotary rows and columns need a head size that is a multiple of 4, not {self.width // self.heads}."
            )
        if self.positions == "sincos" and self.width % 4:
            raise UserError(f"Sinusoidal rows and columns need a width that is a multiple of 4, not {self.width}.")
        check_patches(self.patch, shape)
        check_out(self.out, shape[2])

    @property
    def multiple(self) -> int:
        """What the sides of pictures are multiples of."""
        return self.patch

    @property
    def hidden_width(self) -> int:
        return self.mlp_width or hidden_width(self.width, self.activation)

    @property
    def block(self) -> AdaptiveBlock:
        """A block, as a module of its own; with Xavier's variances, as in the paper."""
        width, hidden = self.width, self.hidden_width
        mlp_std = math.sqrt(2 / (width + hidden))
        return AdaptiveBlock(
            Attention(
                self.heads, self.heads, width // self.heads, self.bias, self.qk_norm,
                self.rope if self.positions == "rope" else None, kernel=self.kernel,
                init_std=math.sqrt(2 / (4 * width)),  # of the three projections as one matrix
                out_std=math.sqrt(2 / (2 * width)), norm_epsilon=self.norm_epsilon, dtype=self.dtype, parent=None,
            ),
            FeedForward(hidden, self.activation, self.bias, mlp_std, mlp_std, self.dtype, parent=None),
            Norm(self.norm, False, self.norm_epsilon, self.dtype, parent=None),
            self.dropout, parent=None,
        )  # fmt: skip

    @property
    def telling(self) -> Telling:
        return Telling(
            self.width, self.periods, self.classes, self.pooled, period_shift=self.period_shift, dtype=self.dtype,
            parent=None,
        )  # fmt: skip

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B H W C"],
        label: Float[Array, "B"],
        conditions: Conditions = Conditions(),
        key: Array | None = None,
    ) -> Float[Array, "B H W D"]:
        """The output for noisy pictures. `label` tells of the time; `key` turns dropout on. Without `classes` the class
        is none; text and the pooled embedding have to be there where the network takes them."""
        self.check(x.shape[1:])
        x = with_image(x, conditions, "a DiT", self.channels)
        rows, columns = x.shape[1] // self.patch, x.shape[2] // self.patch
        places, before = grid(rows, columns), 0
        x = patchify(x, self.patch)
        count, size = x.shape[1:]

        def linear(name: str, x, std: float):
            return Linear((self.width,), ((None,), ("embed",)), True, std, self.dtype, name=name)(x)

        x = linear("patch_embedding", x, math.sqrt(2 / (size + self.width)))
        if self.positions == "sincos":
            x = x + sincos(places, self.width, shift=0).astype(resolve(self.dtype))
        seen = Mask("bidirectional")
        if self.text:
            if conditions.tokens is None:
                raise ValueError("the network takes text, and the conditions have no tokens")
            text = linear("text_embedding", conditions.tokens, self.text**-0.5)
            before, seen = text.shape[1], seen_with(conditions.mask, count)
            x = jnp.concatenate([text, x], 1)
        check_length(x.shape[1], "The DiT")
        x = sharding.constrain(x, "batch", "length", None)
        positions = None
        if self.positions == "rope":  # what is not a patch is not turned
            positions = jnp.pad(places, ((0, 0), (before, 0), (0, 0)))

        told = jax.nn.silu(self.telling.copy(name="told")(label, conditions))
        keys = jax.random.split(key, self.depth) if key is not None and self.dropout else None
        blocks = self.param(
            "blocks", lambda k: init_stack(self.block, self.depth, self.width, k, told=jnp.zeros((1, self.width)))
        )
        x, _ = run_stack(
            self.block, blocks, x, [seen], positions, keys=keys, scan=self.scan, remat=self.remat, told=told
        )
        two = modulation(2, self.width, self.dtype, "final_modulation")(told)
        x = modulated(x[:, before:], two[:, 0], two[:, 1], self.norm, self.norm_epsilon, self.dtype)
        head = Linear((self.patch**2 * self.out,), (("embed",), (None,)), init_std=0.0, dtype=self.dtype, name="head")
        return unpatchify(head(x).astype(jnp.float32), rows, columns, self.patch)

    def flops_per_example(self, shape: tuple[int, int, int], length: int = 0) -> float:
        """Operations of the forward pass for a picture of this shape (H, W, C), a picture beside it counted among its
        channels, and `length` tokens of text: matrix products alone, 2 per multiply-add."""
        width, size = self.width, self.patch**2
        count = (shape[0] // self.patch) * (shape[1] // self.patch)
        length = length if self.text else 0
        blocks = self.depth * (count + length) * self.block.flops_per_token(width, count + length)
        ends = count * size * (shape[2] + self.out) * width + length * self.text * width
        vectors = (6 * self.depth + 2) * width**2
        return blocks + 2.0 * (ends + vectors) + self.telling.flops()
