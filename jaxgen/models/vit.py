"""ViT: a vision transformer, from its first form to SigLIP 2's, by fields."""

from typing import Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxgen import sharding
from jaxgen.errors import UserError
from jaxgen.nn.attention import Mask, attention
from jaxgen.nn.dtypes import DType, resolve
from jaxgen.nn.feedforward import Activation, FeedForward, is_gated
from jaxgen.nn.kernels import Kernel
from jaxgen.nn.linear import Embedding, Linear, Norm
from jaxgen.nn.patches import Patches, choose, grid, interpolate, patchify, sincos
from jaxgen.nn.rope import Rope2D
from jaxgen.nn.transformer import Block, Remat, check_length, encoder_block, hidden_width, init_stack, run_stack


class AttentionPool(nn.Module):
    """A learned probe attends to all tokens, then h + mlp(norm(h)) (Zhai et al. 2022, section 3.1)."""

    heads: int
    mlp: FeedForward
    norm: Norm
    bias: bool = True
    dtype: DType = "auto"

    @nn.compact
    def __call__(self, x: Float[Array, "B N E"], mask: Bool[Array, "B N"] | None = None) -> Float[Array, "B E"]:
        batch, _, width = x.shape
        std = width**-0.5
        probe = self.param("probe", nn.with_logical_partitioning(nn.initializers.normal(std), ("embed",)), (width,))

        def project(name: str, x):
            axes = (("embed",), ("heads", "head_dim"))
            return Linear((self.heads, width // self.heads), axes, self.bias, std, self.dtype, name=name)(x)

        query = project("query", probe[None, None].astype(resolve(self.dtype)))
        query = jnp.broadcast_to(query, (batch, *query.shape[1:]))  # the same for all examples
        seen = Mask("bidirectional")
        if mask is not None:
            seen = Mask("bidirectional", query_segments=jnp.ones((batch, 1), jnp.int32), key_segments=mask.astype(int))
        out = attention(query, project("key", x), project("value", x), seen, "xla")
        h = Linear((width,), (("heads", "head_dim"), ("embed",)), self.bias, std, self.dtype, name="out")(out)
        return (h + self.mlp(self.norm(h)))[:, 0]


class ViT(nn.Module):
    """A vision transformer (Dosovitskiy et al. 2021).

    The defaults are its ViT-B/16. CLIP's has `pre_norm=True, patch_bias=False, activation="quick_gelu",
    norm_epsilon=1e-5, head_bias=False` (Radford et al. 2021); SigLIP's `pool="attention"` (Zhai et al. 2023), and its
    NaFlex form (Tschannen et al. 2025) is the same given `Patches` in place of a picture. Tokens stand in the order
    class, registers, patches. Parameters of the blocks are stacked along a leading "layers" axis.
    """

    patch: int = 16
    """Pixels along a patch's side."""
    width: int = 768
    """Size of the residual stream."""
    depth: int = 12
    """Blocks."""
    heads: int = 12
    mlp_width: int = 0
    """Hidden units of the feed-forward layer; 0 for 4 width, or 8/3 width in steps of 64 when gated."""
    image_size: int = 224
    """Pixels along the side of the pictures for which the table of learned positions is laid out. For pictures of
    other sizes it is resized."""
    channels: int = 3
    positions: Literal["learned", "sincos", "rope", "none"] = "learned"
    """Learned table, fixed sines and cosines of row and column, or rotary rows and columns in every block."""
    rope: Rope2D = Rope2D()
    pool: Literal["class", "mean", "attention"] = "class"
    """What stands for the picture: a token of its own, the patches' mean, or a learned query's attention to them."""
    registers: int = 0
    """Further tokens that stand for nothing (Darcet et al. 2023)."""
    patch_dropout: float = 0.0
    """Share of the patches left out in training (FLIP; Li et al. 2022)."""
    out: int = 0
    """Size of the result: classes, or of a shared embedding; 0 for the pooled features as they are."""
    head_bias: bool = True
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    norm_epsilon: float = 1e-6
    activation: Activation = "gelu"
    bias: bool = True
    """Biases in linear layers and LayerNorm."""
    patch_bias: bool = True
    pre_norm: bool = False
    """A norm before the first block."""
    norm_pooled: bool = False
    """With `pool="mean"`, the final norm is of the mean and not of each token (He et al. 2022, MAE)."""
    qk_norm: bool = False
    """RMSNorm on every query and key head."""
    scan: bool = True
    """Run the blocks as one compiled loop; False unrolls them: a few run up to a fifth faster so on a CPU."""
    remat: Remat = "none"
    kernel: Kernel = "auto"
    dtype: DType = "auto"
    """Format of the computation; parameters are float32."""

    # Sizes of Touvron et al. 2021 (Ti, S), Dosovitskiy et al. 2021 (B, L, H), Zhai et al. 2022 (g),
    # Alabdulmohsin et al. 2023 (So400m).

    @classmethod
    def Ti(cls, patch: int = 16, **fields) -> "ViT":  # noqa: N802
        return cls(**{"patch": patch, "width": 192, "depth": 12, "heads": 3} | fields)

    @classmethod
    def S(cls, patch: int = 16, **fields) -> "ViT":  # noqa: N802
        return cls(**{"patch": patch, "width": 384, "depth": 12, "heads": 6} | fields)

    @classmethod
    def B(cls, patch: int = 16, **fields) -> "ViT":  # noqa: N802
        return cls(**{"patch": patch, "width": 768, "depth": 12, "heads": 12} | fields)

    @classmethod
    def L(cls, patch: int = 16, **fields) -> "ViT":  # noqa: N802
        return cls(**{"patch": patch, "width": 1024, "depth": 24, "heads": 16} | fields)

    @classmethod
    def H(cls, patch: int = 14, **fields) -> "ViT":  # noqa: N802
        return cls(**{"patch": patch, "width": 1280, "depth": 32, "heads": 16} | fields)

    @classmethod
    def g(cls, patch: int = 14, **fields) -> "ViT":
        return cls(**{"patch": patch, "width": 1408, "depth": 40, "heads": 16, "mlp_width": 6144} | fields)

    @classmethod
    def So400m(cls, patch: int = 14, **fields) -> "ViT":  # noqa: N802
        return cls(**{"patch": patch, "width": 1152, "depth": 27, "heads": 16, "mlp_width": 4304} | fields)

    def check(self) -> None:
        """Raises UserError for sizes that do not fit together."""
        if min(self.patch, self.width, self.depth, self.heads, self.channels) < 1:
            raise UserError("patch, width, depth, heads and channels of a ViT are at least 1.")
        if self.width % self.heads:
            raise UserError(f"The width {self.width} is not a multiple of the {self.heads} heads.")
        if self.image_size < self.patch:
            raise UserError(f"A picture of {self.image_size} pixels has no patch of {self.patch}.")
        if self.positions == "rope" and self.width // self.heads % 4:
            raise UserError(
                f"Rotary rows and columns need a head size that is a multiple of 4, not {self.width // self.heads}."
            )
        if self.positions == "sincos" and (self.width % 4 or self.width < 8):
            raise UserError(
                f"Sinusoidal rows and columns need a width that is a multiple of 4, and at least 8, not {self.width}."
            )
        if self.norm_pooled and self.pool != "mean":
            raise UserError(f'norm_pooled is for pool="mean", not "{self.pool}".')
        if not 0 <= self.patch_dropout < 1:
            raise UserError(f"patch_dropout = {self.patch_dropout} should be at least 0 and below 1.")

    @property
    def embed_dim(self) -> int:
        """Size of the result."""
        return self.out or self.width

    @property
    def hidden_width(self) -> int:
        return self.mlp_width or hidden_width(self.width, self.activation)

    @property
    def side(self) -> int:
        """Rows, and columns, of the table of learned positions."""
        return self.image_size // self.patch

    @property
    def extra(self) -> int:
        """Tokens before those of the patches."""
        return (self.pool == "class") + self.registers

    @property
    def block(self) -> Block:
        """A block, as a module of its own."""
        return encoder_block(
            self.width, self.depth, self.heads, self.mlp_width, self.activation, self.bias, self.qk_norm, self.norm,
            self.norm_epsilon, self.rope if self.positions == "rope" else None, self.kernel, self.dtype,
        )  # fmt: skip

    def setup(self):
        self.check()
        size, std = self.patch**2 * self.channels, self.width**-0.5
        axes = ((None,), ("embed",))
        self.patch_embedding = Linear((self.width,), axes, self.patch_bias, size**-0.5, self.dtype)
        init = nn.initializers.normal(std)
        if self.pool == "class":
            boxed = nn.with_logical_partitioning(init, ("embed",))
            self.class_token = self.param("class_token", boxed, (self.width,))
        if self.registers:
            boxed = nn.with_logical_partitioning(init, (None, "embed"))
            self.register_tokens = self.param("register_tokens", boxed, (self.registers, self.width))
        if self.positions == "learned":
            rows = (self.pool == "class") + self.side**2  # the first for the class token
            self.position_embedding = Embedding(rows, self.width, ("positions", "embed"), init, self.dtype)
        norm = Norm(self.norm, self.bias, self.norm_epsilon, self.dtype, parent=None)
        if self.pre_norm:
            self.embedding_norm = norm.clone()
        self.blocks = self.param("blocks", lambda key: init_stack(self.block, self.depth, self.width, key))
        self.final_norm = norm.clone()
        if self.pool == "attention":
            mlp = self.block.mlp
            self.attention_pool = AttentionPool(
                self.heads, mlp.clone(out_std=mlp.init_std), norm.clone(), self.bias, self.dtype
            )
        if self.out:
            self.head = Linear((self.out,), (("embed",), (None,)), self.head_bias, std, self.dtype)

    def __call__(
        self, image: Float[Array, "B H W C"] | Patches, key: Array | None = None, train: bool = False
    ) -> Float[Array, "B D"]:
        """The result for each picture. `key` (B,), one an example, turns patch dropout on; `train` changes nothing (it
        is there for models with batch statistics)."""
        features = self.features(image, key)
        return self.head(features) if self.out else features

    def patches(
        self,
        patches: Float[Array, "B N P"],
        coordinates: Int[Array, "B N 2"],
        mask: Bool[Array, "B N"],
        key: Array | None = None,
    ) -> Float[Array, "B D"]:
        """The result for pictures of any shape, given as patches."""
        return self(Patches(patches, coordinates, mask), key)

    def features(self, image: Float[Array, "B H W C"] | Patches, key: Array | None = None) -> Float[Array, "B E"]:
        """The pooled features, before the head."""
        x, mask = self._encode(image, key)
        if self.pool == "class":
            return x[:, 0]
        x = x[:, self.extra :]
        if self.pool == "attention":
            return self.attention_pool(x, mask)
        if mask is None:
            x = x.mean(1)
        else:
            x = (x * mask[..., None]).sum(1) / jnp.maximum(mask.sum(1, keepdims=True), 1).astype(x.dtype)
        return self.final_norm(x) if self.norm_pooled else x

    def tokens(self, image: Float[Array, "B H W C"] | Patches, key: Array | None = None) -> Float[Array, "B N E"]:
        """The normed residual stream at each patch (as it is, where the norm is of the mean)."""
        return self._encode(image, key)[0][:, self.extra :]

    def _encode(self, image, key):
        """(what `tokens` gives of all tokens, the patches' mask or None)."""
        values, coordinates, mask = image if isinstance(image, Patches) else (image, None, None)
        if mask is None:
            if values.shape[-1] != self.channels:
                raise UserError(f"A picture of {values.shape[-1]} channels does not fit a ViT of {self.channels}.")
            rows, columns = (size // self.patch for size in values.shape[1:3])
            if not rows * columns:
                raise UserError(
                    f"A picture of {values.shape[1]} x {values.shape[2]} pixels has no patch of {self.patch} pixels."
                )
            values, coordinates = patchify(values, self.patch), grid(rows, columns)
            standard = rows == columns == self.side
        else:
            standard = False
        if values.shape[-1] != self.patch**2 * self.channels:
            raise UserError(
                f"Patches of {values.shape[-1]} numbers do not fit a ViT of {self.patch} x {self.patch} pixels of "
                f"{self.channels} channels."
            )
        batch, count = values.shape[:2]
        at = self._embed_positions(coordinates, mask, standard)  # for one, or each example
        if key is not None and self.patch_dropout:
            chosen = choose(key, self.kept(count), jnp.ones((batch, count), bool) if mask is None else mask)

            def take(x):
                x = jnp.broadcast_to(x, (batch, *x.shape[1:]))
                return jnp.take_along_axis(x, chosen.reshape(*chosen.shape, *(1,) * (x.ndim - 2)), axis=1)

            values, coordinates, mask, at = (None if x is None else take(x) for x in (values, coordinates, mask, at))
        x = self.patch_embedding(values)
        x = x if at is None else x + at
        x = self._prepend(x)
        check_length(x.shape[1], "The ViT")
        x = sharding.constrain(x, "batch", "length", None)
        if self.pre_norm:
            x = self.embedding_norm(x)
        if self.positions == "rope":  # what is not a patch is not turned
            coordinates = jnp.pad(coordinates, ((0, 0), (self.extra, 0), (0, 0)))
        else:
            coordinates = None
        segments = None
        if mask is not None:  # padding sees padding, which nobody reads
            segments = jnp.pad(mask, ((0, 0), (self.extra, 0)), constant_values=True).astype(jnp.int32)
        seen = Mask("bidirectional", query_segments=segments)
        x, _ = run_stack(self.block, self.blocks, x, [seen], coordinates, scan=self.scan, remat=self.remat)
        return x if self.norm_pooled else self.final_norm(x), mask

    def _embed_positions(self, coordinates, mask, standard: bool):
        if self.positions == "sincos":
            return sincos(coordinates, self.width).astype(resolve(self.dtype))
        if self.positions != "learned":
            return None
        table = self.position_embedding.embedding[self.pool == "class" :]
        if standard:
            return table[None].astype(resolve(self.dtype))
        mask = jnp.ones(coordinates.shape[:2], bool) if mask is None else mask
        table = table.reshape(self.side, self.side, self.width)
        return interpolate(table, coordinates, mask).astype(resolve(self.dtype))

    def _prepend(self, x):
        """x after the class token and the registers."""
        extra = []
        if self.pool == "class":
            token = self.class_token
            if self.positions == "learned":
                token = token + self.position_embedding.embedding[0]
            extra.append(token[None])
        if self.registers:
            extra.append(self.register_tokens)
        if not extra:
            return x
        extra = jnp.concatenate(extra)[None].astype(x.dtype)
        return jnp.concatenate([jnp.broadcast_to(extra, (x.shape[0], *extra.shape[1:])), x], axis=1)

    def kept(self, count: int) -> int:
        """How many of so many patches are left after patch dropout."""
        return max(1, round(count * (1 - self.patch_dropout)))

    def flops_per_example(self, shape: tuple[int, ...], train: bool = False) -> float:
        """Operations of the forward pass for a picture of this shape, (H, W, C) or patches (N, P): matrix products
        alone, 2 per multiply-add. `train` leaves out what patch dropout does."""
        naflex, width = len(shape) == 2, self.width
        count = shape[0] if naflex else (shape[0] // self.patch) * (shape[1] // self.patch)
        resized = count * self.side**2 if naflex and self.positions == "learned" else 0
        count = self.kept(count) if train else count
        tokens = count + self.extra
        blocks = self.depth * tokens * self.block.flops_per_token(width, tokens)
        embedding = width * (count * self.patch**2 * self.channels + resized)
        pool = 0
        if self.pool == "attention":
            mlp = width * self.hidden_width * (3 if is_gated(self.activation) else 2)
            pool = 2 * count * width**2 + 2 * count * width + width**2 + mlp
        return blocks + 2.0 * (embedding + pool + width * self.out)


