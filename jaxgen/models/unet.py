"""U-Nets of diffusion: DDPM's (Ho et al. 2020), ADM's (Dhariwal & Nichol 2021), and Stable Diffusion's with attention
to text (Rombach et al. 2022), by fields."""

from collections.abc import Iterator

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxgen import sharding
from jaxgen.errors import UserError
from jaxgen.models.conditions import Conditions, Telling, check_levels, check_out, with_image
from jaxgen.nn.attention import Attention, Mask
from jaxgen.nn.convolution import Conv, GroupNorm, doubled
from jaxgen.nn.dropout import dropout
from jaxgen.nn.dtypes import DType
from jaxgen.nn.feedforward import FeedForward
from jaxgen.nn.kernels import Kernel
from jaxgen.nn.linear import Linear, Norm
from jaxgen.nn.transformer import POLICIES, Remat, init_stack, run_stack

Map = Float[Array, "B H W C"]


class Residual(nn.Module):
    """x + conv(dropout(silu(norm(conv(silu(norm(x))) + t)))), where t is made of what is told; or t scales and shifts
    the second norm's result (Dhariwal & Nichol 2021, eq. 8)."""

    features: int
    groups: int
    scale_shift: bool
    dropout: float
    epsilon: float
    dtype: DType

    @nn.compact
    def __call__(self, x: Map, told: Float[Array, "B E"], key: Array | None = None) -> Float[Array, "B H W F"]:
        """`told` is after its silu."""

        def conv(name: str, x, size: int = 3, scale: float = 1.0):
            return Conv(self.features, size, bias=True, scale=scale, dtype=self.dtype, name=name)(x)

        def norm(name: str):
            return GroupNorm(self.groups, self.epsilon, True, self.dtype, name=name)

        size = (2 if self.scale_shift else 1) * self.features
        axes = (("embed",), ("mlp",))
        t = Linear((size,), axes, init_std=told.shape[-1] ** -0.5, dtype=self.dtype, name="told")(told)
        h = conv("conv1", norm("norm1")(x))
        if self.scale_shift:
            h = norm("norm2")(h, *jnp.split(t, 2, -1))
        else:
            h = norm("norm2")(h + t[:, None, None])
        h = conv("conv2", dropout(h, self.dropout, key), scale=0.0)
        if x.shape[-1] != self.features:
            x = conv("skip", x, 1)
        return sharding.constrain(x + h, "batch", None, None, None)

    def flops(self, told: int, channels: int, height: int, width: int) -> float:
        """Operations of the forward pass for a map of this shape: convolutions and matrix products, 2 per
        multiply-add."""
        conv, skip = Conv(self.features, parent=None), Conv(self.features, 1, parent=None)
        total = conv.flops(channels, height, width) + conv.flops(self.features, height, width)
        total += skip.flops(channels, height, width) if channels != self.features else 0
        return total + 2.0 * told * self.features * (2 if self.scale_shift else 1)


class SelfAttention(nn.Module):
    """x + attention(norm(x)) over all places of the map."""

    heads: int
    groups: int
    epsilon: float
    kernel: Kernel
    dtype: DType

    @nn.compact
    def __call__(self, x: Map) -> Map:
        batch, height, width, features = x.shape
        h = GroupNorm(self.groups, self.epsilon, dtype=self.dtype, name="norm")(x)
        attention = Attention(
            self.heads, self.heads, features // self.heads, bias=True, kernel=self.kernel,
            init_std=features**-0.5, out_std=0.0, dtype=self.dtype, name="attention",
        )  # fmt: skip
        h, _ = attention(h.reshape(batch, height * width, features), Mask("bidirectional"))
        return x + h.reshape(x.shape)

    def flops(self, channels: int, height: int, width: int) -> float:
        places = height * width
        return 2.0 * places * (4 * channels**2 + 2 * channels * places)


class ReaderBlock(nn.Module):
    """x + attention(norm(x)), x + attention(norm(x), text), x + mlp(norm(x)) (Rombach et al. 2022, appendix E.2.1)."""

    attention: Attention
    mlp: FeedForward
    norm: Norm

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B N C"],
        mask: Mask,
        positions=None,
        cache=None,
        key=None,
        *,
        text: Float[Array, "B L E"],
        there: Bool[Array, "B L"] | None = None,
    ):
        """(B, N, C) to the same, and no cache. `there` tells which tokens of the text are there."""
        h, _ = self.attention(self.norm.copy(name="attention_norm")(x), mask)
        x = x + h
        seen = Mask("bidirectional")
        if there is not None:
            ones = jnp.ones(x.shape[:2], jnp.int32)
            seen = Mask("bidirectional", query_segments=ones, key_segments=there.astype(jnp.int32))
        h, _ = self.attention.copy(name="text_attention")(self.norm.copy(name="text_norm")(x), seen, source=text)
        if there is not None:  # attention to nothing would be to padding
            h = jnp.where(there.any(-1)[:, None, None], h, 0)
        x = x + h
        return x + self.mlp(self.norm.copy(name="mlp_norm")(x)), None

    def flops(self, width: int, places: int, length: int, text: int) -> float:
        own = places * (4 * width**2 + 2 * width * places)
        read = places * (2 * width**2 + 2 * width * length) + 2 * length * text * width
        return 2.0 * (own + read + places * 3 * width * self.mlp.width)


class Reader(nn.Module):
    """x + blocks over the places of the map, which attend to each other and to a text (Rombach et al. 2022, section
    3.3)."""

    heads: int
    depth: int
    groups: int
    scan: bool
    remat: Remat
    kernel: Kernel
    dtype: DType

    def block(self, width: int) -> ReaderBlock:
        std, hidden = width**-0.5, 4 * width
        return ReaderBlock(
            Attention(
                self.heads, self.heads, width // self.heads, bias=False, kernel=self.kernel, init_std=std,
                out_std=std, dtype=self.dtype, out_bias=True, parent=None,
            ),
            FeedForward(hidden, "geglu_exact", True, std, hidden**-0.5, self.dtype, parent=None),
            Norm("layernorm", True, 1e-5, self.dtype, parent=None),
            parent=None,
        )  # fmt: skip

    @nn.compact
    def __call__(self, x: Map, text: Float[Array, "B L E"], there: Bool[Array, "B L"] | None = None) -> Map:
        batch, height, width, features = x.shape

        def linear(name: str, x, axes, std: float):
            return Linear((features,), axes, True, std, self.dtype, name=name)(x)

        h = GroupNorm(self.groups, 1e-6, dtype=self.dtype, name="norm")(x).reshape(batch, height * width, features)
        h = linear("in", h, (("mlp",), ("embed",)), features**-0.5)
        block = self.block(features)
        told = jnp.zeros((1, 1, text.shape[-1]))
        blocks = self.param("blocks", lambda key: init_stack(block, self.depth, features, key, text=told))
        h, _ = run_stack(
            block, blocks, h, [Mask("bidirectional")], scan=self.scan, remat=self.remat, text=text, there=there
        )
        return x + linear("out", h, (("embed",), ("mlp",)), 0.0).reshape(x.shape)

    def flops(self, channels: int, height: int, width: int, length: int, text: int) -> float:
        places = height * width
        blocks = self.depth * self.block(channels).flops(channels, places, length, text)
        return 4.0 * places * channels**2 + blocks


class UNet(nn.Module):
    """A convolutional network from pictures to pictures of the same size, with a connection at each resolution.

    Conditions taken: `classes`, `tokens` and `mask` where a level has a reader, `pooled`, `sizes`, `image` (put beside
    the picture).
    """

    out: int = 3
    """Channels of the result; twice the picture's for a learned variance."""
    width: int = 128
    """Features at the full resolution ..."""
    multipliers: tuple[int, ...] = (1, 2, 2, 2)
    """... and how many times as many each level has, each at half the resolution of the one before."""
    blocks: int = 2
    """Residual blocks a level (one more on the way up)."""
    attention: tuple[int, ...] = (1,)
    """Levels at which places attend to each other."""
    readers: tuple[int, ...] = ()
    """Transformer blocks by which each level reads the text, in place of that; 0 for none. () for no level."""
    heads: int = 0
    """Heads at every level; 0 for as many as have `head_dim` features each."""
    head_dim: int = 64
    classes: int = 0
    """Classes; number `classes` stands for none of them. 0: the network takes no class."""
    text: int = 0
    """Size of the text's embeddings."""
    pooled: int = 0
    """Size of the pooled embedding; 0: the network takes none."""
    sizes: int = 0
    """How many numbers about sizes are told; 0: the network takes none."""
    size_periods: int = 256
    """Cosines and sines for each of them."""
    channels: int = 0
    """Channels of the input, those of a picture beside it among them; 0 for whatever comes."""
    scale_shift: bool = True
    """What is told scales and shifts (ADM); False: it shifts alone (DDPM, Stable Diffusion)."""
    dropout: float = 0.0
    groups: int = 32
    norm_epsilon: float = 1e-5
    scan: bool = True
    """Run a reader's blocks as one compiled loop; False unrolls them."""
    remat: Remat = "none"
    kernel: Kernel = "auto"
    dtype: DType = "auto"
    """Format of the computation; parameters are float32."""

    @property
    def multiple(self) -> int:
        """What the sides of pictures are multiples of."""
        return 2 ** (len(self.multipliers) - 1)

    @property
    def levels(self) -> list[int]:
        """Features of each level."""
        return [self.width * times for times in self.multipliers]

    @property
    def telling(self) -> Telling:
        return Telling(
            4 * self.width, self.width, self.classes, self.pooled, self.sizes, self.size_periods, dtype=self.dtype,
            parent=None,
        )  # fmt: skip

    def reader_depth(self, level: int | None) -> int:
        """Blocks of the readers at a level, None being the middle, which reads like the deepest that does."""
        if level is not None:
            return self.readers[level] if self.readers else 0
        return next((depth for depth in reversed(self.readers) if depth), 0)

    def check(self, shape: tuple[int, int, int]) -> None:
        """Raises UserError for sizes that do not fit together, or not pictures of this shape (H, W, C)."""
        if not self.multipliers or min(self.out, self.width, self.blocks, self.groups, *self.multipliers) < 1:
            raise UserError("out, width, blocks, groups and multipliers of a U-Net are at least 1.")
        if self.readers and len(self.readers) != len(self.multipliers):
            raise UserError(f"{len(self.readers)} readers are not one for each of {len(self.multipliers)} levels.")
        if any(self.readers) and not self.text:
            raise UserError("A U-Net with readers needs the size of the text's embeddings (text).")
        for level in self.attention:
            if not 0 <= level < len(self.multipliers):
                raise UserError(f"There is no level {level} for attention: there are {len(self.multipliers)}, from 0.")
        for level, features in enumerate(self.levels):
            if features % self.groups:
                raise UserError(
                    f"Level {level} has {features} features, no multiple of the {self.groups} groups of its norms."
                )
            attends = level in self.attention or self.reader_depth(level)
            if level == len(self.levels) - 1:  # the middle's too
                attends = self.attention or self.reader_depth(None)
            if attends and features % (self.heads or self.head_dim):
                what = f"{self.heads} heads" if self.heads else f"head size {self.head_dim}"
                raise UserError(f"Level {level} has {features} features, no multiple of its {what}.")
        check_levels(f"A U-Net of {len(self.multipliers)} levels", self.multiple, shape)
        check_out(self.out, shape[2])

    @nn.compact
    def __call__(
        self,
        x: Map,
        label: Float[Array, "B"],
        conditions: Conditions = Conditions(),
        key: Array | None = None,
    ) -> Float[Array, "B H W D"]:
        """The output for noisy pictures. `label` tells of the time; `key` turns dropout on. Without `classes` the class
        is none; text, pooled embedding and sizes have to be there where the network takes them."""
        self.check(x.shape[1:])
        x = with_image(x, conditions, "a U-Net", self.channels)
        return self._run(_Modules(self, conditions, label, key), x).astype(jnp.float32)

    def flops_per_example(self, shape: tuple[int, int, int], length: int = 0) -> float:
        """Operations of the forward pass for a picture of this shape (H, W, C), a picture beside it counted among its
        channels, and `length` tokens of text: convolutions and matrix products alone, 2 per multiply-add, with none
        for padding."""
        counter = _Operations(self, length)
        self._run(counter, shape)
        return counter.total + self.telling.flops()

    def _run(self, made, x):
        """The network's layers in order, as modules on a map or as counts for its shape."""
        x, last = made.conv("in", x, self.width), len(self.multipliers) - 1
        kept = [x]
        for level, features in enumerate(self.levels):
            for i in range(self.blocks):
                x = made.look(f"down_{level}_{i}", made.residual(f"down_{level}_{i}", x, features), level)
                kept.append(x)
            if level < last:
                x = made.conv(f"down_{level}", x, features, stride=2)
                kept.append(x)
        x = made.residual("middle_0", x, self.levels[-1])
        x = made.residual("middle_1", made.look("middle_0", x, None), self.levels[-1])
        for level in reversed(range(last + 1)):
            for i in range(self.blocks + 1):
                x = made.residual(f"up_{level}_{i}", made.join(x, kept.pop()), self.levels[level])
                x = made.look(f"up_{level}_{i}", x, level)
            if level:
                x = made.conv(f"up_{level}", made.doubled(x), self.levels[level])
        return made.conv("out", made.norm("norm", x), self.out, scale=0.0)

    def _attending(self, level: int | None, features: int, name: str | None, **options):
        """What attends at a level, None being the middle; None where nothing does."""
        heads = self.heads or features // self.head_dim
        if depth := self.reader_depth(level):
            more = (self.scan, self.remat, self.kernel, self.dtype)
            return Reader(heads, depth, self.groups, *more, name=name and f"{name}_text", **options)
        if level in self.attention or (level is None and self.attention):
            more = (self.groups, self.norm_epsilon, self.kernel, self.dtype)
            return SelfAttention(heads, *more, name=name and f"{name}_attention", **options)
        return None

    def _residual(self, features: int, kind=Residual, **options):
        return kind(features, self.groups, self.scale_shift, self.dropout, self.norm_epsilon, self.dtype, **options)


class _Modules:
    """The layers of a network, run on a map."""

    doubled = staticmethod(doubled)

    def __init__(self, net: UNet, conditions: Conditions, label, key):
        self.net, self.conditions = net, conditions
        self.told = jax.nn.silu(net.telling.copy(name="told")(label, conditions))
        self.keys = _keys(key if net.dropout else None)
        if any(net.readers) and conditions.tokens is None:
            raise ValueError("the network takes text, and the conditions have no tokens")
        self.kind = Residual
        if net.remat != "none":
            self.kind = nn.remat(Residual, policy=POLICIES[net.remat])

    def conv(self, name: str, x, features: int, stride: int = 1, scale: float = 1.0):
        axes = dict(axis=None if name == "in" else "embed", out_axis=None if name == "out" else "mlp")
        return Conv(features, stride=stride, bias=True, scale=scale, **axes, dtype=self.net.dtype, name=name)(x)

    def residual(self, name: str, x, features: int):
        return self.net._residual(features, self.kind, name=name)(x, self.told, next(self.keys))

    def look(self, name: str, x, level: int | None):
        module = self.net._attending(level, x.shape[-1], name)
        if isinstance(module, Reader):
            return module(x, self.conditions.tokens, self.conditions.mask)
        return x if module is None else module(x)

    def norm(self, name: str, x):
        return GroupNorm(self.net.groups, self.net.norm_epsilon, True, self.net.dtype, name=name)(x)

    def join(self, x, y):
        return jnp.concatenate([x, y], -1)


def _keys(key: Array | None) -> Iterator[Array | None]:
    """As many as are wanted."""
    i = 0
    while True:
        yield None if key is None else jax.random.fold_in(key, i)
        i += 1


class _Operations:
    """The layers of a network, counted for maps of shape (H, W, C)."""

    def __init__(self, net: UNet, length: int):
        self.net, self.length, self.total = net, length, 0.0

    def conv(self, name: str, x, features: int, stride: int = 1, scale: float = 1.0):
        height, width, channels = x
        self.total += Conv(features, stride=stride, parent=None).flops(channels, height, width)
        return height // stride, width // stride, features

    def residual(self, name: str, x, features: int):
        height, width, channels = x
        told = 4 * self.net.width
        self.total += self.net._residual(features, parent=None).flops(told, channels, height, width)
        return height, width, features

    def look(self, name: str, x, level: int | None):
        height, width, channels = x
        module = self.net._attending(level, channels, None, parent=None)
        if module is not None:
            text = (self.length, self.net.text) if isinstance(module, Reader) else ()
            self.total += module.flops(channels, height, width, *text)
        return x

    def norm(self, name: str, x):
        return x

    def join(self, x, y):
        return *x[:2], x[2] + y[2]

    def doubled(self, x):
        return 2 * x[0], 2 * x[1], x[2]
