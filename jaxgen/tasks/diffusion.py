"""Diffusion: a network learns to take noise away, and makes pictures of noise."""

import dataclasses
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8

from jaxgen.diffusion.denoiser import Model
from jaxgen.diffusion.paths import Cosine, Path, along
from jaxgen.diffusion.predictions import Prediction, V
from jaxgen.diffusion.weightings import Times, Uniform, UniformTimes, Weighting, uniforms
from jaxgen.errors import UserError
from jaxgen.models import edm2
from jaxgen.models.autoencoder import Autoencoder, Gaussian
from jaxgen.models.conditions import Conditions
from jaxgen.models.edm2 import EDM2
from jaxgen.models.text import TextTower
from jaxgen.pretrained import Pretrained
from jaxgen.sampling.diffusion import Edit, Sampling, generate
from jaxgen.sampling.likelihood import bits_per_dim, log_likelihood
from jaxgen.tasks import latents, vision
from jaxgen.tasks.base import Batch, Context, Loss, Params, Player, Task, mean
from jaxgen.tasks.beside import Beside

VARIANCE_STEPS = 1000  # for which a learned variance is trained, as Nichol & Dhariwal 2021's
VARIANCE_WEIGHT = 0.001  # of its bound beside the loss (their lambda)


@dataclasses.dataclass(frozen=True)
class Diffusion(Task):
    """The mean squared error of a network's output for data with noise of a random time (Ho et al. 2020, and after).

    A batch has `image` (B, H, W, C) of 0 to 255, or `points` (B, D) as they are; with `label` (B,) for a network with
    classes, and `tokens` (B, L) with `lengths` (B,) where there is a text tower; and where they matter `weights` (B,).
    With an autoencoder the network knows its latents in the pictures' place, brought to mean 0 and deviation 1.
    """

    network: nn.Module | Pretrained
    path: Path = Cosine()
    prediction: Prediction = V()
    weighting: Weighting = Uniform()
    times: Times = UniformTimes()
    text: TextTower | Pretrained | None = None
    """Encodes captions: the network attends to its hidden states, and is told its result where it takes a pooled
    embedding."""
    autoencoder: Autoencoder | Pretrained | None = None
    """Makes latents of pictures, and pictures of latents; stays as it is."""
    beside: Beside | None = None
    """A picture that the network sees beside the noisy one: what a mask leaves, one to be edited, a small one."""
    cached: bool = False
    """The latents of training pictures are computed once and kept; flipped ones too, where data.augment is Flip."""
    drop: float = 0.1
    """Share of examples whose class or caption is left out in training, so that the network can be guided."""
    kept: int = 0
    """Tokens at a caption's beginning that an empty caption has too (1 for CLIP's start of text)."""
    padding: int | None = None
    """Token that fills an empty caption after its end; None for the end itself."""
    masked: bool = True
    """The network sees a caption's own tokens alone; False: padding too, as Stable Diffusion does."""
    learned_variance: bool = False
    """The network has twice the data's channels and learns its variance as well (Nichol & Dhariwal 2021, eq. 16)."""
    locked: tuple[Literal["text"], ...] = ()
    """Parts that stay as they are."""
    mean: tuple[float, ...] = (0.5,)
    """Subtracted from pixels between 0 and 1, which are then divided by `std`: one for each channel, or one for all."""
    std: tuple[float, ...] = (0.5,)

    @property
    def model(self) -> Model:
        return Model(self.network, self.path, self.prediction)

    # ---- parameters ----

    def init(self, key):
        keys = jax.random.split(key, 3)
        params = {}
        with vision.unsplit():
            told = None
            if self.text is not None:
                text = vision.for_init(self.text)
                params["text"] = text.init(keys[1], jnp.zeros((1, 2), jnp.int32), jnp.ones((1,), jnp.int32))["params"]
                width = getattr(self.text, "embed_dim", 0)
                told = Conditions(tokens=jnp.zeros((1, 2, self.text.width)), pooled=jnp.zeros((1, width)))
            told = told or Conditions()
            example = self._example()
            if self.beside is not None:
                channels = self.beside.channels(example.shape[-1])
                told = told.replace(image=jnp.zeros((*example.shape[:-1], channels)))
            network = vision.for_init(self.network)
            params["network"] = network.init(keys[0], example, jnp.zeros((1,)), told)["params"]
            state = {}
            if self.autoencoder is not None:
                side = self.autoencoder.factor
                picture = jnp.zeros((1, side, side, self.autoencoder.channels))
                found = dict(vision.for_init(self.autoencoder).init(keys[2], picture))
                params["autoencoder"] = found.pop("params")
                state["autoencoder"] = found
        return params, state

    def _example(self) -> Array:
        """Data to initialise the network with."""
        if hasattr(self.network, "example"):
            return self.network.example()
        side = getattr(self.network, "multiple", 1)  # of which sides are multiples
        return jnp.zeros((1, side, side, self.network.out // self._outs))

    @property
    def _outs(self) -> int:
        """Channels of the network's output for one of its input."""
        return 2 if self.learned_variance else 1

    def players(self):
        moved = tuple(k for k in ("network", "text") if k not in self.locked and getattr(self, k) is not None)
        return (Player("model", self.loss, moved),)

    def projected(self, params):
        if isinstance(self.network, EDM2) and "network" in params:
            return {**params, "network": edm2.normalised(params["network"])}
        return params

    @property
    def _bounds(self) -> tuple[Array, Array]:
        """Black and white, as the network knows them."""
        mean, std = jnp.asarray(self.mean, jnp.float32), jnp.asarray(self.std, jnp.float32)
        return (0.0 - mean) / std, (1.0 - mean) / std

    # ---- latents that are kept ----

    def collected(self, spec):
        if not self.cached or "image" not in spec:
            return spec
        image = spec["image"].shape
        shape = (image[0], *self._latent(image[1:])[:2], 2 * self.autoencoder.latent)
        return {"latents": jax.ShapeDtypeStruct(shape, jnp.float16)} | {k: v for k, v in spec.items() if k != "image"}

    def stored(self, data, params, state, progress=None):
        if not self.cached:
            return None

        def encode(variables, image):
            pixels = vision.pixels({"image": image}, self.mean, self.std)
            found = self.autoencoder.apply({"params": variables}, pixels, method="encode")
            return jnp.concatenate([found.mean, found.log_variance], -1)

        return latents.stored(data, encode, latents.on_host(params["autoencoder"]), progress)

    # ---- the loss ----

    def loss(self, params: Params, batch: Batch, context: Context) -> Loss:
        keys = jax.vmap(lambda key: jax.random.split(key, 3))(context.keys())  # (B, 3)
        x0 = jax.lax.stop_gradient(self.values(params, context.state, batch, keys[:, 2]))
        size = context.size or len(context.index)
        t = self.times.at(uniforms(jax.random.fold_in(context.step_key, 1), context.index, size), self.path)
        noise = jax.vmap(lambda key: jax.random.normal(key, x0.shape[1:]))(keys[:, 0])
        condition = self.told(params, batch, context, keys[:, 1])
        alpha, sigma = self.path.alpha(t), self.path.sigma(t)
        x = self.path.add(x0, noise, t)
        denoiser = self.model.denoiser(params["network"], context.key if context.train else None)
        output, v = denoiser.raw(x, t, condition)
        error = (output - self.prediction.target(x0, noise, alpha, sigma)) ** 2
        error = error.reshape(len(t), -1).mean(1)
        out = self.prediction.coefficients(alpha, sigma)[2]
        losses = self.weighting.of_output(out, alpha, sigma) * error
        metrics = {"error": mean(error, batch.get("weights"))}
        if v is not None:
            held = jax.lax.stop_gradient(self.prediction.denoised(output, x, alpha, sigma))
            bound = variational_bound(self.path, x0, held, x, v, t, VARIANCE_STEPS)
            losses += VARIANCE_WEIGHT * VARIANCE_STEPS / 1000 * bound
            metrics["bound"] = mean(bound, batch.get("weights"))
        total, weight = mean(losses, batch.get("weights"))
        return Loss(total, weight, None, metrics)

    def told(self, params: Params, batch: Batch, context: Context, keys: Array) -> Conditions:
        """What the network is told of a batch's examples; in training, nothing of those that are dropped by keys
        (B,)."""
        share = jax.vmap(jax.random.uniform)(keys)
        condition = self.condition(params, batch, share < (self.drop if context.train else 0.0))
        if self.beside is None:
            return condition
        own = jax.vmap(lambda key: jax.random.fold_in(key, 3))(context.keys())
        given = self.beside.given(batch, own, context.train)
        image = jax.lax.stop_gradient(self.seen_beside(params, context.state, given, own))
        if context.train and self.beside.drop:
            first = self.drop - self.beside.both  # of those without text, the last lose the picture too
            left = (share >= first) & (share < first + self.beside.drop)
            image = jnp.where(along(left, image), 0, image)
        return condition.replace(image=image)

    def values(
        self, params: Params, state: Any, batch: Batch, keys: Array | None = None
    ) -> Float[Array, "B ..."]:
        """A batch's data as the network knows it: pixels from -1 to 1, latents (draws by keys (B,), or their means), or
        points."""
        if "points" in batch:
            return batch["points"]
        if "latents" in batch:
            moments = Gaussian(*jnp.split(batch["latents"].astype(jnp.float32), 2, -1))
            return self._coded(params, state, moments.mean if keys is None else moments.sample(keys), "normalise")
        return self._known(params, state, vision.pixels(batch, self.mean, self.std), keys)

    def _known(self, params: Params, state: Any, pixels: Array, keys: Array | None = None) -> Array:
        """Pixels from -1 to 1, or their latents."""
        if self.autoencoder is None:
            return pixels
        found = self._coded(params, state, pixels, "encode")
        return self._coded(params, state, found.mean if keys is None else found.sample(keys), "normalise")

    def seen_beside(self, params: Params, state: Any, given: Batch, keys: Array) -> Float[Array, "B H W K"]:
        """What stands beside the noisy pictures for what is given (`beside.given`); keys (B,) are of its noise."""
        x = vision.pixels({"image": given[self.beside.picture]}, self.mean, self.std)
        return self.beside.seen(x, given, keys, lambda x: self._known(params, state, x))

    def _coded(self, params: Params, state: Any, x: Array, method: str) -> Any:
        variables = {"params": params["autoencoder"], **(state or {}).get("autoencoder", {})}
        return self.autoencoder.apply(variables, x, method=method)

    def _latent(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of what the network makes for data of this shape."""
        if self.autoencoder is None:
            return shape
        side = self.autoencoder.factor
        return shape[0] // side, shape[1] // side, self.autoencoder.latent

    def condition(self, params: Params, batch: Batch, dropped: Bool[Array, "B"] | None = None) -> Conditions:
        """What the network is told of a batch's examples, or nothing of those `dropped`."""
        found = {}
        if getattr(self.network, "classes", 0) and "label" in batch:
            label = jnp.asarray(batch["label"], jnp.int32)
            found["classes"] = label if dropped is None else jnp.where(dropped, self.network.classes, label)
        if self.text is not None:
            tokens, lengths = jnp.asarray(batch["tokens"]), jnp.asarray(batch["lengths"])
            if dropped is not None:
                empty = emptied(tokens, lengths, self.kept, self.padding)
                tokens = jnp.where(dropped[:, None], empty[0], tokens)
                lengths = jnp.where(dropped, empty[1], lengths)
            variables = {"params": params["text"]}
            found["tokens"] = self.text.apply(variables, tokens, lengths, method="hidden")
            if self.masked:
                found["mask"] = jnp.arange(tokens.shape[1]) < lengths[:, None]
            if getattr(self.network, "pooled", 0):
                found["pooled"] = self.text.apply(variables, tokens, lengths)
        return Conditions(**found)

    # ---- pictures ----

    def sample(
        self,
        params: Params,
        state: Any,
        batch: Batch,
        keys: Array,
        sampling: Sampling = Sampling(),
        unwanted: Batch | None = None,
        edit: Edit | None = None,
        **more: Any,
    ) -> UInt8[Array, "B H W C"] | Array:
        """Pictures, of the data's kind, for the conditions of a batch.

        Args:
          batch: `label`, or `tokens` and `lengths`, or neither; and what `beside` wants (`before`, `mask`, `small`),
            which else is made of `image` as in training. An `image` otherwise gives the shape alone.
          keys: (B,), one a picture.
          unwanted: conditions to be guided away from; by default those of nothing.
          more: for `sampling.diffusion.generate`: guidance of another kind, and a callback.

        Raises:
          UserError: for values that are not finite, with step and time; inside jit they go on instead.
        """
        condition, null, nothing, given = self.condition(params, batch), None, None, {}
        if self.beside is not None:
            own = jax.vmap(lambda key: jax.random.fold_in(key, 3))(keys)
            given = self.beside.given(batch, own)
        shape = sampling.shape or (
            self.beside.shape(given) if given
            else next(batch[name].shape[1:] for name in ("image", "points") if name in batch)
        )  # fmt: skip
        alone = sampling.image_guidance == 1.0
        if not alone and not (self.beside is not None and self.beside.drop):
            raise UserError(
                f"An image guidance of {sampling.image_guidance:g} is for a network that was trained with and without "
                "a picture beside the noisy one (task.beside.drop), which this one was not."
            )
        if sampling.guidance != 1.0 and unwanted is None:
            told = self.text is not None or getattr(self.network, "classes", 0)
            if not (told and self.drop):
                why = "of which some were left out (task.drop), which this one was not" if told else "which has none"
                raise UserError(f"A guidance of {sampling.guidance:g} is for a network with classes or texts, {why}.")
        if sampling.guidance != 1.0 or not alone:
            dropped = jnp.ones(len(keys), bool)
            null = self.condition(params, batch, dropped) if unwanted is None else self.condition(params, unwanted)
        if self.beside is not None:
            image = self.seen_beside(params, state, given, own)
            condition = condition.replace(image=image)
            if not alone:
                nothing = null.replace(image=jnp.zeros_like(image))
            null = null and null.replace(image=image)
        if sampling.threshold == "auto":
            pixels = len(shape) == 3 and self.autoencoder is None
            sampling = dataclasses.replace(sampling, threshold="clip" if pixels else "none")
        found, bad = generate(
            self.model, params["network"], keys, self._latent(shape), sampling, condition, null, edit,
            nothing=nothing, bounds=self._bounds, **more,
        )  # fmt: skip
        if not isinstance(bad, jax.core.Tracer) and int(bad) >= 0:
            levels = sampling.grid.levels(self.path, sampling.steps, sampling.steps)
            raise UserError(
                f"The network's values are not finite in step {int(bad)} of {sampling.steps} (time "
                f"{float(levels.t[int(bad) - 1]):.4f}); its weights are damaged, or what it is told is too large."
            )
        drawn = self.pictures(params, state, found)
        return drawn if self.beside is None else self.beside.finished(drawn, given)

    def pictures(self, params: Params, state: Any, x: Float[Array, "B ..."]) -> UInt8[Array, "B H W C"] | Array:
        """Pictures of what the network makes; points as they are."""
        if x.ndim != 4:
            return x
        return jnp.clip(jnp.round(self.shown(params, state, x)), 0, 255).astype(jnp.uint8)

    def shown(self, params: Params, state: Any, x: Float[Array, "B ..."]) -> Float[Array, "B H W C"]:
        """The same before it is rounded and cut to 0 and 255."""
        if self.autoencoder is not None:
            x = self._coded(params, state, self._coded(params, state, x, "restore"), "decode")
        return (x * jnp.asarray(self.std) + jnp.asarray(self.mean)) * 255

    def bits_per_dim(
        self, params: Params, state: Any, batch: Batch, keys: Array, steps: int = 64, probes: int = 1
    ) -> Float[Array, "B"]:
        """Bits for each number of a batch's pictures, of integers from 0 to 255 with uniform noise between (Song et al.
        2021, section 4.3)."""
        if self.autoencoder is not None:
            raise UserError("Latents have no likelihood of the pictures that were encoded.")
        keys = jax.vmap(jax.random.split)(keys)
        image = batch["image"].astype(jnp.float32)
        image += jax.vmap(lambda key: jax.random.uniform(key, image.shape[1:]))(keys[:, 0])
        x0 = (image / 256 - jnp.asarray(self.mean)) / jnp.asarray(self.std)
        denoise = self.model.denoiser(params["network"])
        condition = self.condition(params, batch)
        if self.beside is not None:
            condition = condition.replace(
                image=self.seen_beside(params, state, self.beside.given(batch, keys[:, 0]), keys[:, 0])
            )
        found = log_likelihood(denoise, self.path, x0, keys[:, 1], condition, steps, probes)
        size = x0[0].size
        return bits_per_dim(found, size, 256, 1 / float(np.exp(np.log(self.std).mean())))

    # ---- what is said and refused ----

    def check(self, spec):
        if "points" not in spec:
            if "image" not in spec:
                raise UserError(f"The data has {', '.join(spec)}, and the task needs image (or points).")
            vision.check_scale(self.mean, self.std, spec["image"].shape[-1])
            if self.learned_variance and {*self.mean, *self.std} != {0.5}:
                raise UserError(
                    "task.learned_variance is for pictures of -1 to 1: task.mean and task.std are 0.5, not "
                    f"{self.mean} and {self.std}."
                )
            if not 0 <= self.drop < 1:
                raise UserError(f"task.drop is at least 0 and below 1, not {self.drop}.")
        if self.cached and self.autoencoder is None:
            raise UserError("task.cached keeps latents, and there is no task.autoencoder that makes them.")
        shape = next(spec[name].shape[1:] for name in ("image", "points") if name in spec)
        self.check_shape(shape)
        if self.beside is not None:
            if "points" in spec or self.cached:
                have = "the data has points" if "points" in spec else "task.cached keeps latents alone"
                raise UserError(f"task.beside is made of pictures, and {have}.")
            self.beside.check(spec, self.drop)
        if getattr(self.network, "classes", 0) and "label" not in spec:
            raise UserError(f"The data has {', '.join(spec)}, and a network with classes needs label.")
        wanted, width = getattr(self.network, "text", 0), getattr(self.text, "width", 0)
        if wanted != width:
            have = f"task.text.width is {width}" if width else "there is no text tower, task.text"
            raise UserError(f"task.network.text is {wanted}, and {have}; they should be the same.")
        if self.text is not None:
            if missing := [name for name in ("tokens", "lengths") if name not in spec]:
                raise UserError(f"The data has {', '.join(spec)}, and task.text needs {' and '.join(missing)} too.")
            self.text.check()
            if spec["tokens"].shape[1] > self.text.max_length:
                raise UserError(
                    f"Captions of {spec['tokens'].shape[1]} tokens (data.length) do not fit the text tower: "
                    f"task.text.max_length is {self.text.max_length}."
                )
        if "text" in self.locked and self.text is None:
            raise UserError("task.locked names 'text', and the task has no text tower.")
        self.prediction.check(self.path)

    def check_shape(self, shape: tuple[int, ...]) -> None:
        """Raises UserError for pictures (H, W, C), or points (D,), that the networks cannot take."""
        what = "data"
        if self.autoencoder is not None:
            if shape[-1] != self.autoencoder.channels:
                raise UserError(
                    f"The data has {shape[-1]} channels and task.autoencoder.channels is {self.autoencoder.channels}; "
                    "they should be the same."
                )
            self.autoencoder.check(shape)
            shape, what = self._latent(shape), "autoencoder"
        if self.network.out != shape[-1] * self._outs:
            twice = ", twice as many for task.learned_variance" if self.learned_variance else ""
            raise UserError(
                f"The {what} has {shape[-1]} channels and task.network.out is {self.network.out}; it should be "
                f"{shape[-1] * self._outs}{twice}."
            )
        beside = 0 if self.beside is None else self.beside.channels(shape[-1])
        if getattr(self.network, "channels", 0) not in (0, shape[-1] + beside):
            what = f"{beside} of task.beside" if beside else "none beside them (there is no task.beside)"
            raise UserError(
                f"task.network.channels is {self.network.channels}, and it sees {shape[-1]} channels of the noisy "
                f"picture and {what}; it should be {shape[-1] + beside}, or 0."
            )
        if hasattr(self.network, "check"):
            self.network.check(shape)

    def check_data(self, data):
        classes, wanted = len(getattr(data, "classes", ())), getattr(self.network, "classes", 0)
        if classes > wanted > 0:
            raise UserError(
                f"The data has {classes} classes and task.network.classes is {wanted}; it should be at least as many."
            )
        tokenizer = getattr(data, "tokenizer", None)
        if self.text is not None and tokenizer is not None and tokenizer.vocab_size > self.text.vocab_size:
            raise UserError(
                f"The tokenizer has {tokenizer.vocab_size} tokens and task.text.vocab_size is {self.text.vocab_size}; "
                "it should be at least as many."
            )

    def flops(self, spec):
        name = "image" if "image" in spec else "points"
        size, shape = spec[name].shape[0], spec[name].shape[1:]
        length = spec["tokens"].shape[1] if self.text is not None else 0
        *sides, channels = self._latent(shape)
        beside = 0 if self.beside is None else self.beside.channels(channels)
        total = 3 * self.network.flops_per_example((*sides, channels + beside), length)
        if self.autoencoder is not None and not self.cached:
            total += self.autoencoder.encoder_flops(shape) * (1 if self.beside is None else 2)
        if self.text is not None:
            total += (1 if "text" in self.locked else 3) * self.text.flops_per_example((length,))
        return size * total


def emptied(
    tokens: Int[Array, "B L"], lengths: Int[Array, "B"], kept: int = 0, padding: int | None = None
) -> tuple[Int[Array, "B L"], Int[Array, "B"]]:
    """Tokens and lengths of empty captions: each row's first `kept` tokens, its end, and padding (None: its end)."""
    end = jnp.take_along_axis(tokens, lengths[:, None] - 1, 1)
    places = jnp.arange(tokens.shape[1])
    after = end if padding is None else jnp.where(places > kept, padding, end)
    return jnp.where(places < kept, tokens, after), jnp.full_like(lengths, kept + 1)


def variational_bound(
    path: Path,
    x0: Float[Array, "B ..."],
    found: Float[Array, "B ..."],
    x: Float[Array, "B ..."],
    v: Float[Array, "B ..."],
    t: Float[Array, "B"],
    steps: int,
) -> Float[Array, "B"]:
    """The step's term of the variational bound, in bits for each number (Ho et al. 2020, eq. 5).

    Of one of `steps` equal steps of time, from t: the divergence of x given x0 from the network's x, whose mean is of
    `found` and whose variance of `v` (Nichol & Dhariwal 2021, eq. 15); for the last, the log-likelihood of x0.
    """
    after = jnp.maximum(t - 1 / steps, 0)
    last = along(t <= 1 / steps, x)
    (a, s), (b, n) = ((along(path.alpha(u), x), along(path.sigma(u), x)) for u in (t, after))
    kept = a / b
    added = jnp.maximum(s**2 - (kept * n) ** 2, 1e-20)  # beta
    small = jnp.maximum(added * n**2 / s**2, 1e-20)  # beta-tilde
    small = jnp.where(last, added, small)  # beta-tilde of the last step is 0: its own variance stands in
    log_variance = 0.5 * (v + 1) * jnp.log(added) + 0.5 * (1 - v) * jnp.log(small)
    difference = b * added / s**2 * (found - x0)  # of the means
    divergence = 0.5 * (
        log_variance - jnp.log(small) - 1 + (small + difference**2) * jnp.exp(-log_variance)
    )
    # 8-bit pixels are bins 2 / 255 wide
    width, std = 1 / 255, jnp.exp(0.5 * log_variance)
    above, below = ((x0 - found + edge) / std for edge in (width, -width))
    above = jnp.where(x0 > 0.999, jnp.inf, above)
    below = jnp.where(x0 < -0.999, -jnp.inf, below)
    inside = jnp.maximum(jax.scipy.stats.norm.cdf(above) - jax.scipy.stats.norm.cdf(below), 1e-12)
    nats = jnp.where(last, -jnp.log(inside), divergence)
    return nats.reshape(len(nats), -1).mean(1) / jnp.log(2.0)
