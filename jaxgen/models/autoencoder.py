"""The autoencoder of latent diffusion (Rombach et al. 2022, section 3.1): pictures to a small map of latents, and
back."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxgen import sharding
from jaxgen.errors import UserError
from jaxgen.models.conditions import check_levels
from jaxgen.nn.attention import Mask, attention
from jaxgen.nn.convolution import Conv, GroupNorm, doubled
from jaxgen.nn.dtypes import DType
from jaxgen.nn.kernels import Kernel
from jaxgen.nn.linear import Linear
from jaxgen.nn.transformer import POLICIES, Remat

Map = Float[Array, "B h w C"]
Made = Float[Array, "B y x F"]
"""What a layer makes of a map."""

LOWEST, HIGHEST = -30.0, 20.0
"""Bounds of the log-variance."""


class Gaussian(NamedTuple):
    """A normal distribution of independent numbers at each place."""

    mean: Float[Array, "B h w L"]
    log_variance: Float[Array, "B h w L"]

    def sample(self, keys: Array) -> Float[Array, "B h w L"]:
        """A draw for each example, by keys (B,)."""
        noise = jax.vmap(lambda key: jax.random.normal(key, self.mean.shape[1:]))(keys)
        return self.mean + jnp.exp(0.5 * self.log_variance) * noise

    def kl(self) -> Float[Array, "B"]:
        """KL(this || N(0, 1)) of each example, in nats (Kingma & Welling 2014, appendix B)."""
        terms = jnp.square(self.mean) + jnp.exp(self.log_variance) - 1 - self.log_variance
        return 0.5 * terms.sum((1, 2, 3))


class Residual(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x))))))."""

    features: int
    groups: int
    epsilon: float
    dtype: DType

    @nn.compact
    def __call__(self, x: Map) -> Made:
        h = x
        for i in (1, 2):
            h = GroupNorm(self.groups, self.epsilon, True, self.dtype, name=f"norm{i}")(h)
            h = Conv(self.features, bias=True, scale=1.0, dtype=self.dtype, name=f"conv{i}")(h)
        if x.shape[-1] != self.features:
            x = Conv(self.features, 1, bias=True, scale=1.0, dtype=self.dtype, name="skip")(x)
        return sharding.constrain(x + h, "batch", None, None, None)

    def flops(self, channels: int, height: int, width: int) -> float:
        """Operations of the forward pass for one map of so many channels."""
        conv = Conv(self.features, parent=None)
        skip = channels != self.features
        return (
            conv.flops(channels, height, width)
            + conv.flops(self.features, height, width)
            + skip * Conv(self.features, 1, parent=None).flops(channels, height, width)
        )


class SelfAttention(nn.Module):
    """x + attention(norm(x)): every place looks at all others, with one head."""

    groups: int
    epsilon: float
    kernel: Kernel
    dtype: DType

    @nn.compact
    def __call__(self, x: Map) -> Made:
        batch, height, width, features = x.shape
        h = GroupNorm(self.groups, self.epsilon, dtype=self.dtype, name="norm")(x)
        h, std = h.reshape(batch, height * width, features), features**-0.5

        def project(name: str):  # a single head is not split
            return Linear((1, features), (("embed",), (None, None)), True, std, self.dtype, name=name)(h)

        found = attention(project("query"), project("key"), project("value"), Mask("bidirectional"), self.kernel)
        out = Linear((features,), ((None, None), ("embed",)), True, std, self.dtype, name="out")(found)
        return x + out.reshape(x.shape)


class Half(nn.Module):
    """What encoder and decoder share. Level 0 has the picture's resolution, each further one half of that before."""

    out: int
    """Channels of the result."""
    width: int
    multipliers: tuple[int, ...]
    blocks: int
    attention: bool
    groups: int
    epsilon: float
    remat: Remat
    kernel: Kernel
    dtype: DType

    @property
    def features(self) -> tuple[int, ...]:
        """Channels at each level."""
        return tuple(self.width * times for times in self.multipliers)

    def _conv(self, name: str, x: Map, features: int, **fields) -> Made:
        scale = features / x.shape[-1]  # keeps variances, however many channels come in
        return Conv(features, bias=True, scale=scale, dtype=self.dtype, name=name, **fields)(x)

    def _residual(self, name: str, x: Map, features: int) -> Made:
        return self._kept(Residual)(features, self.groups, self.epsilon, self.dtype, name=name)(x)

    def _kept(self, kind: type[nn.Module]) -> type[nn.Module]:
        return kind if self.remat == "none" else nn.remat(kind, policy=POLICIES[self.remat])

    def _middle(self, x: Map) -> Made:
        x = self._residual("middle_0", x, x.shape[-1])
        if self.attention:
            attend = self._kept(SelfAttention)
            x = attend(self.groups, self.epsilon, self.kernel, self.dtype, name="attention")(x)
        return self._residual("middle_1", x, x.shape[-1])

    def _end(self, x: Map) -> Made:
        x = GroupNorm(self.groups, self.epsilon, True, self.dtype, name="norm")(x)
        return self._conv("out", x, self.out, out_axis=None)

    def _flops_of_middle(self, height: int, width: int) -> float:
        last, places = self.features[-1], height * width
        residual = Residual(last, self.groups, self.epsilon, self.dtype, parent=None)
        attend = self.attention * (8.0 * places * last**2 + 4.0 * places**2 * last)
        return 2 * residual.flops(last, height, width) + attend

    def _flops_of_level(self, blocks: int, channels: int, level: int, height: int, width: int) -> float:
        features = self.features[level]
        residual = Residual(features, self.groups, self.epsilon, self.dtype, parent=None)
        first = residual.flops(channels, height, width)
        return first + (blocks - 1) * residual.flops(features, height, width)


class Encoder(Half):
    """Pictures to maps, by residual blocks and convolutions with stride 2."""

    @nn.compact
    def __call__(self, x: Map) -> Made:
        x = self._conv("stem", x, self.features[0], axis=None)
        for level, features in enumerate(self.features):
            for i in range(self.blocks):
                x = self._residual(f"down_{level}_{i}", x, features)
            if level < len(self.features) - 1:
                x = self._conv(f"halve_{level}", x, features, stride=2, padding=(0, 1))
        return self._end(self._middle(x))

    def flops(self, channels: int, height: int, width: int) -> float:
        """Operations of the forward pass for one picture of this shape."""
        total, channels = Conv(self.features[0], parent=None).flops(channels, height, width), self.features[0]
        for level, features in enumerate(self.features):
            total += self._flops_of_level(self.blocks, channels, level, height, width)
            channels = features
            if level < len(self.features) - 1:
                halve = Conv(features, stride=2, padding=(0, 1), parent=None)
                total += halve.flops(features, height, width)
                height, width = height // 2, width // 2
        end = Conv(self.out, parent=None).flops(channels, height, width)
        return total + self._flops_of_middle(height, width) + end


class Decoder(Half):
    """Maps to pictures, by residual blocks and places repeated twice each way."""

    @nn.compact
    def __call__(self, x: Map) -> Made:
        x = self._middle(self._conv("stem", x, self.features[-1], axis=None))
        for level in reversed(range(len(self.features))):
            for i in range(self.blocks + 1):
                x = self._residual(f"up_{level}_{i}", x, self.features[level])
            if level:
                x = self._conv(f"double_{level - 1}", doubled(x), self.features[level])
        return self._end(x)

    def flops(self, channels: int, height: int, width: int) -> float:
        """Operations of the forward pass for one map of this shape."""
        total = Conv(self.features[-1], parent=None).flops(channels, height, width)
        total, channels = total + self._flops_of_middle(height, width), self.features[-1]
        for level in reversed(range(len(self.features))):
            total += self._flops_of_level(self.blocks + 1, channels, level, height, width)
            channels = self.features[level]
            if level:
                height, width = 2 * height, 2 * width
                total += Conv(channels, parent=None).flops(channels, height, width)
        return total + Conv(self.out, parent=None).flops(channels, height, width)


class Autoencoder(nn.Module):
    """The KL autoencoder of latent diffusion; the defaults are Stable Diffusion's (KL-f8).

    Stable Diffusion 3's and Flux's have `latent=16, quant=False` with a mean and a scale of the latents. The collection
    "latents" {mean, std, count} holds what latents are normalised by: at first what the fields say, later what a task
    measures. Without it, the fields do.
    """

    channels: int = 3
    latent: int = 4
    """Channels of the latents."""
    width: int = 128
    """Features at the full resolution ..."""
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    """... and how many times as many each level has, each at half the resolution of the one before."""
    blocks: int = 2
    """Residual blocks a level (one more in the decoder)."""
    attention: bool = True
    """Every place looks at all others where the resolution is lowest."""
    groups: int = 32
    """Of the norms."""
    quant: bool = True
    """A linear layer on each side of the latents."""
    mean: tuple[float, ...] = (0.0,)
    """Subtracted from latents, for each channel or for all ..."""
    std: tuple[float, ...] = (1.0,)
    """... which are then divided by this ..."""
    scale: float = 1.0
    """... and multiplied by this (0.18215 for Stable Diffusion 1 and 2)."""
    norm_epsilon: float = 1e-6
    remat: Remat = "none"
    """Compute blocks again in the backward pass rather than keep them."""
    kernel: Kernel = "auto"
    dtype: DType = "auto"
    """Format of the computation; parameters are float32."""

    @property
    def factor(self) -> int:
        """Pixels along the side of a latent's place."""
        return 2 ** (len(self.multipliers) - 1)

    def check(self, shape: tuple[int, ...] | None = None) -> None:
        """Raises UserError for sizes that do not fit together, or pictures (H, W, C) that do not fit them."""
        if min(self.channels, self.latent, self.width, self.blocks, len(self.multipliers), *self.multipliers) < 1:
            raise UserError("channels, latent, width, multipliers and blocks of an Autoencoder are at least 1.")
        for level, times in enumerate(self.multipliers):
            if self.width * times % self.groups:
                raise UserError(
                    f"Level {level} of the autoencoder has {self.width * times} features, no multiple of the "
                    f"{self.groups} groups of its norms."
                )
        for name in ("mean", "std"):
            if len(getattr(self, name)) not in (1, self.latent):
                raise UserError(
                    f"{name} of an Autoencoder has {len(getattr(self, name))} numbers, which should be 1 or "
                    f"{self.latent}: one for each channel of the latents."
                )
        if min(self.std) <= 0 or self.scale <= 0:
            raise UserError("std and scale of an Autoencoder are above 0.")
        if shape is not None:
            check_levels(f"An autoencoder of {len(self.multipliers)} levels", self.factor, shape)

    def setup(self):
        self.check()
        same = (self.width, self.multipliers, self.blocks, self.attention, self.groups, self.norm_epsilon, self.remat)
        self.encoder = Encoder(2 * self.latent, *same, self.kernel, self.dtype)
        self.decoder = Decoder(self.channels, *same, self.kernel, self.dtype)
        if self.quant:
            plain = dict(size=1, bias=True, scale=1.0, axis=None, out_axis=None, dtype=self.dtype)
            self.before, self.after = Conv(2 * self.latent, **plain), Conv(self.latent, **plain)
        if self.is_initializing():
            mean, std = self._told()
            self.variable("latents", "mean", lambda: mean)
            self.variable("latents", "std", lambda: std)
            self.variable("latents", "count", lambda: jnp.zeros(()))

    def __call__(self, image: Float[Array, "B H W C"], keys: Array | None = None) -> Float[Array, "B H W C"]:
        """Pictures from -1 to 1 encoded and decoded: by the latents' means, or by draws with keys (B,)."""
        found = self.encode(image)
        return self.decode(found.mean if keys is None else found.sample(keys))

    def encode(self, image: Float[Array, "B H W C"]) -> Gaussian:
        """The latents' distribution for pictures from -1 to 1, in float32."""
        if image.shape[-1] != self.channels:
            raise UserError(f"A picture of {image.shape[-1]} channels does not fit an autoencoder of {self.channels}.")
        self.check(image.shape[1:])
        moments = self.encoder(image)
        if self.quant:
            moments = self.before(moments)
        mean, log_variance = jnp.split(moments.astype(jnp.float32), 2, -1)
        return Gaussian(mean, jnp.clip(log_variance, LOWEST, HIGHEST))

    def decode(self, latent: Float[Array, "B h w L"]) -> Float[Array, "B H W C"]:
        """Pictures, from -1 to 1 or a little beyond, of latents as `encode` gives them; in float32."""
        return self.decoder(self.after(latent) if self.quant else latent).astype(jnp.float32)

    def normalise(self, latent: Float[Array, "B h w L"]) -> Float[Array, "B h w L"]:
        """Latents with mean 0 and standard deviation 1, as diffusion wants them."""
        mean, std = self.statistics()
        return (latent - mean) / std

    def restore(self, latent: Float[Array, "B h w L"]) -> Float[Array, "B h w L"]:
        """The latents that `normalise` made this of."""
        mean, std = self.statistics()
        return latent * std + mean

    def statistics(self) -> tuple[Float[Array, "L"], Float[Array, "L"]]:
        """(mean, standard deviation) of each channel: of the collection "latents", else of the fields."""
        if self.has_variable("latents", "mean"):
            return self.get_variable("latents", "mean"), self.get_variable("latents", "std")
        return self._told()

    def _told(self) -> tuple[Array, Array]:
        mean, std = (jnp.broadcast_to(jnp.asarray(x, jnp.float32), (self.latent,)) for x in (self.mean, self.std))
        return mean, std / self.scale

    def flops_per_example(self, shape: tuple[int, ...]) -> float:
        """Operations of the forward pass for a picture of this shape (H, W, C), both ways: convolutions and matrix
        products alone, 2 per multiply-add."""
        return self.encoder_flops(shape) + self.decoder_flops(shape)

    def encoder_flops(self, shape: tuple[int, ...]) -> float:
        """Those of `encode`."""
        (height, width), places = shape[:2], shape[0] * shape[1] // self.factor**2
        quant = self.quant * 2.0 * places * (2 * self.latent) ** 2
        return self._half(Encoder, 2 * self.latent).flops(self.channels, height, width) + quant

    def decoder_flops(self, shape: tuple[int, ...]) -> float:
        """Those of `decode`."""
        height, width = (side // self.factor for side in shape[:2])
        quant = self.quant * 2.0 * height * width * self.latent**2
        return self._half(Decoder, self.channels).flops(self.latent, height, width) + quant

    def _half(self, kind: type[Half], out: int) -> Half:
        return kind(
            out, self.width, self.multipliers, self.blocks, self.attention, self.groups, self.norm_epsilon, self.remat,
            self.kernel, self.dtype, parent=None,
        )  # fmt: skip
