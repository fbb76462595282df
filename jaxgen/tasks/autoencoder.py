"""The first stage of latent diffusion: an autoencoder that reconstructs what people see, with a discriminator against
it."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from jaxgen.errors import UserError
from jaxgen.models.autoencoder import Autoencoder, Gaussian
from jaxgen.models.discriminator import Discriminator
from jaxgen.models.perceptual import LPIPS, Features
from jaxgen.pretrained import Pretrained
from jaxgen.tasks import vision
from jaxgen.tasks.base import Batch, Context, Loss, Params, Player, Task, mean

LAST = ("decoder", "out", "kernel")
"""The autoencoder's last layer, where gradients are weighed against each other."""
SMALLEST = 1e-6
"""Added to the norm that is divided by (delta of Esser et al. 2021, eq. 7)."""


@dataclasses.dataclass(frozen=True)
class Autoencoding(Task):
    """Reconstruction, a little KL divergence, and a discriminator (Rombach et al. 2022, section 3.1 and appendix G).

    The autoencoder minimises, for each picture of D numbers,

        error / exp(s) + s + kl_weight KL / D + w adversarial,

    where the error is the mean distance of its numbers plus the perceptual distance, s a log-variance, and w such that
    the adversarial gradient at the last layer is `adversarial_weight` times as long as the error's (Esser et al. 2021,
    eq. 7). It is not the mean but a draw of the latents that is decoded.

    A batch has `image` (B, H, W, C) of 0 to 255, and where they matter `weights` (B,). Parameters are by part `model`,
    `discriminator`, `perceptual`, which nobody moves, and `log_variance`. The state of `model` is {"latents": {mean,
    std, count}}: of each channel of the latents, over the pictures trained on. With `microbatches` the adversarial
    weight, and a discriminator's batch statistics, are of each of them.
    """

    model: Autoencoder | Pretrained = Autoencoder()
    discriminator: Discriminator | Pretrained | None = Discriminator()
    """Tells pictures from reconstructions; None for none."""
    perceptual: LPIPS | Features | None = None
    """Another distance of pictures, beside that of their pixels."""
    distance: Literal["l1", "l2"] = "l1"
    """Of pixels from -1 to 1: the absolute or the squared difference."""
    perceptual_weight: float = 1.0
    kl_weight: float = 1e-6
    """Of the latents' KL divergence beside the sum (and not the mean) of all pixels' distances, in nats."""
    log_variance: float = 0.0
    """s at first ..."""
    learned_variance: bool = False
    """... which is then learned; False keeps it."""
    adversarial_weight: float = 0.5
    start: int = 50_000
    """The step from which the discriminator moves, and the adversarial weight rises from 0 ..."""
    ramp: int = 5_000
    """... to its full size in so many steps."""
    most: float = 1e4
    """Bound of the ratio of gradients."""
    measure: bool = True
    """The latents' mean and standard deviation are measured; False keeps what the model says."""
    momentum: float = 0.999
    """Share of the statistics that a step keeps, once it has seen so many that the mean of all keeps more."""

    mean: ClassVar[tuple[float, ...]] = (0.5,)
    """Of pixels between 0 and 1: the autoencoder takes them from -1 to 1."""
    std: ClassVar[tuple[float, ...]] = (0.5,)

    def init(self, key):
        keys = jax.random.split(key, 3)
        with vision.unsplit():
            image = vision.example(self.model)
            found = {"model": dict(vision.for_init(self.model).init(keys[0], image))}
            if self.discriminator is not None:
                side = max(image.shape[1], 3 * 2**self.discriminator.depth)
                shown = jnp.zeros((1, side, side, image.shape[3]))
                found["discriminator"] = dict(self.discriminator.init(keys[1], shown))
            if self.perceptual is not None:
                found["perceptual"] = dict(self.perceptual.create(keys[2]))
        params = {part: variables.pop("params") for part, variables in found.items()}
        if self.learned_variance:
            params["log_variance"] = {"value": jnp.asarray(self.log_variance, jnp.float32)}
        return params, {part: variables for part, variables in found.items() if variables}

    def players(self):
        parts = ("model", "log_variance") if self.learned_variance else ("model",)
        model = Player("model", self.loss, parts)
        if self.discriminator is None:
            return (model,)
        return model, Player("discriminator", self.loss_of_discriminator, ("discriminator",), start=self.start)

    # ---- the autoencoder's loss ----

    def loss(self, params: Params, batch: Batch, context: Context) -> Loss:
        image = vision.pixels(batch, self.mean, self.std)
        weights = batch.get("weights", jnp.ones(len(image)))
        total = jnp.sum(weights)
        shares = weights / jnp.maximum(total, 1e-9)
        posterior, latent = self._latents(params, image, context)
        found, pull = self._decoded(params["model"], latent)
        # The errors are functions of what was decoded, cut off from how: their gradients there are at hand before that
        # of the network, for their ratio, and are computed once.
        held = jax.lax.stop_gradient(found)
        s = params["log_variance"]["value"] if self.learned_variance else jnp.float32(self.log_variance)

        def error(x):
            pixels, perceptual = self._errors(params, context.state, x, image)
            errors = pixels + self.perceptual_weight * perceptual
            return jnp.sum(shares * errors) * jnp.exp(-jax.lax.stop_gradient(s)), (pixels, perceptual)

        if context.train:
            push, (pixels, perceptual) = jax.grad(error, has_aux=True)(held)
        else:
            pixels, perceptual = error(held)[1]
        kl = posterior.kl()
        errors = (pixels + self.perceptual_weight * perceptual) * jnp.exp(-s) + s
        loss = jnp.sum(weights * (errors + self.kl_weight * kl / image[0].size))
        metrics = {
            "reconstruction": mean(pixels, weights),
            "psnr": mean(psnr(held, image), weights),
            "kl": mean(kl, weights),
        }
        if self.perceptual is not None:
            metrics["perceptual"] = mean(perceptual, weights)
        if self.learned_variance:
            metrics["log_variance"] = (s * total, total)
        if not context.train:
            return Loss(loss, total, None, metrics)
        if self.discriminator is not None:
            weight, value, back = self._adversarial(params, held, shares, push, pull, context)
            loss += weight * value * total
            push += weight * back
            metrics |= {"adversarial": (value * total, total), "adversarial_weight": (weight * total, total)}
        along = jnp.sum(found * jax.lax.stop_gradient(push)) * total
        loss += along - jax.lax.stop_gradient(along)  # 0, and its gradient is theirs
        state = context.state
        if self.measure:
            latents = measured(state["model"]["latents"], posterior, weights, self.momentum)
            state = {**state, "model": {**state["model"], "latents": latents}}
        return Loss(loss, total, state, metrics)

    def _latents(self, params, image, context: Context) -> tuple[Gaussian, Float[Array, "B h w L"]]:
        """(the latents' distribution, a draw of each; in evaluation their means)."""
        posterior = self._encoded(params, image)
        return posterior, posterior.sample(context.keys()) if context.train else posterior.mean

    def _encoded(self, params, image) -> Gaussian:
        return self.model.apply({"params": params["model"]}, image, method="encode")

    def _decoded(self, params: Any, latent: Array) -> tuple[Float[Array, "B H W C"], Callable]:
        """Pictures, and the function from a gradient there to that of the last layer's kernel."""
        first, second, third = LAST

        def decode(kernel):
            layer = {**params[first][second], third: kernel}
            whole = {**params, first: {**params[first], second: layer}}
            return self.model.apply({"params": whole}, latent, method="decode")

        found, pull = jax.vjp(decode, params[first][second][third])
        return found, lambda gradient: jax.lax.stop_gradient(pull(gradient)[0])

    def _errors(self, params, state, x, image) -> tuple[Float[Array, "B"], Float[Array, "B"]]:
        """(mean distance of pixels, perceptual distance) of each picture."""
        difference = x - image
        pixels = jnp.abs(difference) if self.distance == "l1" else jnp.square(difference)
        pixels = pixels.reshape(len(x), -1).mean(1)
        if self.perceptual is None:
            return pixels, jnp.zeros_like(pixels)
        variables = {"params": params["perceptual"], **state.get("perceptual", {})}
        return pixels, self.perceptual.distance(variables, x, image)

    def _adversarial(self, params, x, shares, push, pull, context: Context) -> tuple[Array, Array, Array]:
        """(its weight, the mean of -D(x), the gradient of that at x); all 0 until the discriminator moves."""
        since = (context.step - self.start).astype(jnp.float32)
        rising = self.adversarial_weight * jnp.clip(since / max(self.ramp, 1), 0, 1)

        def value(x):
            logits = self._judged(params, context.state.get("discriminator", {}), x, context.train)[0]
            return -jnp.sum(shares * logits.mean((1, 2)))

        def nothing(x):
            return jnp.float32(0), jnp.zeros_like(x)

        found, back = jax.lax.cond(rising > 0, jax.value_and_grad(value), nothing, x)
        return rising * adaptive_weight(pull(push), pull(back), self.most), found, back

    # ---- the discriminator's ----

    def loss_of_discriminator(self, params: Params, batch: Batch, context: Context) -> Loss:
        """The hinge loss (Lim & Ye 2017, eq. 12), halved: pictures above 1, reconstructions below -1."""
        image = vision.pixels(batch, self.mean, self.std)
        _, latent = self._latents(params, image, context)
        found = self.model.apply({"params": params["model"]}, latent, method="decode")
        state = context.state.get("discriminator", {})
        real, state = self._judged(params, state, image, context.train)
        fake, state = self._judged(params, state, found, context.train)
        losses = 0.5 * (jax.nn.relu(1 - real) + jax.nn.relu(1 + fake)).mean((1, 2))
        right = 0.5 * ((real > 0).astype(jnp.float32) + (fake < 0)).mean((1, 2))
        weights = batch.get("weights")
        total, weight = mean(losses, weights)
        metrics = {"accuracy": mean(right, weights)}
        for name, logits in (("real", real), ("fake", fake)):
            metrics[name] = mean(logits.mean((1, 2)), weights)
        new = {**context.state, "discriminator": state} if context.train and state else None
        return Loss(total, weight, new, metrics)

    def _judged(self, params, state, image, train: bool) -> tuple[Float[Array, "B h w"], dict[str, Any]]:
        """(logits of the patches, new state)."""
        variables, changes = {"params": params["discriminator"], **state}, list(state) if train else []
        logits, new = self.discriminator.apply(variables, image, train, mutable=changes)
        return logits, dict(new) if changes else state

    # ---- latents ----

    def encode(
        self, params: Params, state: Any, batch: Batch, keys: Array | None = None
    ) -> Float[Array, "B h w L"]:
        """Latents of a batch's pictures with mean 0 and standard deviation 1 in each channel: the distribution's means,
        or draws by keys (B,)."""
        found = self._encoded(params, vision.pixels(batch, self.mean, self.std))
        latent = found.mean if keys is None else found.sample(keys)
        return self.model.apply(self._variables(params, state), latent, method="normalise")

    def decode(self, params: Params, state: Any, latent: Float[Array, "B h w L"]) -> Float[Array, "B H W C"]:
        """Pictures, from -1 to 1 or a little beyond, of such latents."""
        variables = self._variables(params, state)
        latent = self.model.apply(variables, latent, method="restore")
        return self.model.apply(variables, latent, method="decode")

    def reconstruct(self, params: Params, state: Any, batch: Batch) -> UInt8[Array, "B H W C"]:
        """A batch's pictures, encoded and decoded."""
        return self.pictures(self.model.apply({"params": params["model"]}, vision.pixels(batch, self.mean, self.std)))

    def pictures(self, x: Float[Array, "B H W C"]) -> UInt8[Array, "B H W C"]:
        """Values from -1 to 1 as pictures."""
        return jnp.clip(jnp.round((x + 1) * 127.5), 0, 255).astype(jnp.uint8)

    def _variables(self, params, state) -> dict[str, Any]:
        return {"params": params["model"], **(state or {}).get("model", {})}

    # ---- what is said and refused ----

    def check(self, spec):
        self.model.check()
        vision.check(spec, self.model, self.mean, self.std, "task.model")
        shape = vision.shape(spec)
        self.model.check(shape)
        for part in (self.discriminator, self.perceptual):
            if part is not None:
                part.check(shape)
        for name in ("perceptual_weight", "kl_weight", "adversarial_weight", "start", "ramp", "most"):
            if getattr(self, name) < 0:
                raise UserError(f"task.{name} is 0 or more, not {getattr(self, name)}.")
        if not 0 <= self.momentum < 1:
            raise UserError(f"task.momentum is at least 0 and below 1, not {self.momentum}.")

    def flops(self, spec):
        size, shape = spec["image"].shape[0], vision.shape(spec)
        total = 3 * self.model.flops_per_example(shape)
        if self.perceptual is not None:  # of both pictures, and back to one
            total += 3 * self.perceptual.flops_per_example(shape)
        if self.discriminator is not None:  # against the model; the reconstruction again, and both judged
            total += self.model.flops_per_example(shape) + 8 * self.discriminator.flops_per_example(shape)
        return size * total

    def notes(self, spec):
        parts = [self.distance]
        if self.perceptual is not None:
            seen = self.perceptual
            kind = seen.weights if isinstance(seen, LPIPS) else type(seen.tower).__name__
            parts.append(f"{self.perceptual_weight:g} perceptual ({kind})")
        parts.append(f"{self.kl_weight:g} KL")
        if self.discriminator is not None:
            parts.append(
                f"{self.adversarial_weight:g} adversarial from step {self.start}, in full from {self.start + self.ramp}"
            )
        height, width = (side // self.model.factor for side in vision.shape(spec)[:2])
        return {"loss": " + ".join(parts), "latents": f"{height} x {width} x {self.model.latent}"}


def adaptive_weight(error: Array, adversarial: Array, most: float) -> Float[Array, ""]:
    """The ratio of two gradients' lengths, at most `most` (Esser et al. 2021, eq. 7)."""
    long, short = (jnp.sqrt(jnp.sum(jnp.square(g.astype(jnp.float32)))) for g in (error, adversarial))
    return jnp.clip(long / (short + SMALLEST), 0, most)


def psnr(x: Float[Array, "B H W C"], image: Float[Array, "B H W C"]) -> Float[Array, "B"]:
    """The peak signal-to-noise ratio of each picture from -1 to 1, in dB; what is beyond is cut off."""
    error = jnp.square(jnp.clip(x, -1, 1) - image).reshape(len(x), -1).mean(1)
    return 10 * jnp.log10(4 / jnp.maximum(error, 4e-10))


def measured(
    before: dict[str, Array], posterior: Gaussian, weights: Float[Array, "B"], momentum: float
) -> dict[str, Array]:
    """Statistics {mean, std, count} with a batch's latents added: the mean over all batches so far, and once they are
    more than 1 / (1 - momentum), an exponential one."""
    posterior = jax.lax.stop_gradient(posterior)
    shares = weights / jnp.maximum(weights.sum(), 1e-9)

    def over(x):  # the weighted mean over pictures and places
        return jnp.einsum("b,bhwl->l", shares, x) / (x.shape[1] * x.shape[2])

    middle = over(posterior.mean)
    variance = over(jnp.square(posterior.mean - middle) + jnp.exp(posterior.log_variance))
    kept = jnp.minimum(before["count"] / (before["count"] + 1), momentum)
    apart = jnp.square(before["mean"] - middle)
    variance = kept * jnp.square(before["std"]) + (1 - kept) * variance + kept * (1 - kept) * apart
    return {
        "mean": kept * before["mean"] + (1 - kept) * middle,
        "std": jnp.sqrt(jnp.maximum(variance, 1e-12)),
        "count": before["count"] + 1,
    }
