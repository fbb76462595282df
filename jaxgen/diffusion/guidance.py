"""Guidance: from denoisers, a denoiser. Every scale may be a traced array, so that a sweep compiles nothing.

At one x_t and time, x0, the noise and the score are affine in each other with the same coefficients, so that guiding x0
guides all of them.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxgen.diffusion.denoiser import Denoise, Picture
from jaxgen.diffusion.paths import Path, along

Scale = Float[Array, ""] | Float[Array, "B"] | float


def classifier_free(
    denoise: Denoise,
    null: Any,
    scale: Scale,
    interval: tuple[Scale, Scale] = (0.0, 1.0),
    rescale: Scale = 0.0,
) -> Denoise:
    """x0(null) + scale (x0(condition) - x0(null)) (Ho & Salimans 2022, with scale = 1 + their w).

    Args:
      null: the condition of nothing, or what is not wanted (a negative prompt); of the condition's shapes.
      scale: 1 for no guidance.
      interval: guides at times between these alone (Kynkaanniemi et al. 2024).
      rescale: share of the way back to the standard deviation of x0(condition) (Lin et al. 2024, eq. 15-16).
    """

    def guided(x, t, condition):
        both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), condition, null)
        wanted, other = jnp.split(denoise(jnp.concatenate([x, x]), jnp.concatenate([t, t]), both), 2)
        inside = (t >= interval[0]) & (t <= interval[1])
        found = other + along(jnp.where(inside, scale, 1.0), x) * (wanted - other)
        return _rescaled(found, wanted, rescale)

    return guided


def two_scales(
    denoise: Denoise,
    picture: Any,
    nothing: Any,
    text_scale: Scale,
    picture_scale: Scale,
    interval: tuple[Scale, Scale] = (0.0, 1.0),
    rescale: Scale = 0.0,
) -> Denoise:
    """x0(nothing) + picture_scale (x0(picture) - x0(nothing)) + text_scale (x0(condition) - x0(picture)), of a
    condition of a picture and a text (Brooks et al. 2023, eq. 3).

    Args:
      picture: the condition of the picture alone; `nothing`: that of neither; of the condition's shapes.
      interval, rescale: as in `classifier_free`.
    """

    def guided(x, t, condition):
        three = jax.tree.map(lambda *c: jnp.concatenate(c), condition, picture, nothing)
        found = denoise(jnp.concatenate([x] * 3), jnp.concatenate([t] * 3), three)
        wanted, seen, none = jnp.split(found, 3)
        inside = (t >= interval[0]) & (t <= interval[1])
        text, image = (along(jnp.where(inside, scale, 1.0), x) for scale in (text_scale, picture_scale))
        return _rescaled(none + image * (seen - none) + text * (wanted - seen), wanted, rescale)

    return guided


def _rescaled(found: Picture, wanted: Picture, share: Scale) -> Picture:
    """`found` on its way to the standard deviation of `wanted`."""
    axes = tuple(range(1, found.ndim))
    ratio = wanted.std(axes, keepdims=True) / jnp.maximum(found.std(axes, keepdims=True), 1e-12)
    return found * (1 + along(jnp.broadcast_to(share, found.shape[:1]), found) * (ratio - 1))


def autoguidance(denoise: Denoise, weaker: Denoise, scale: Scale) -> Denoise:
    """weaker + scale (x0 - weaker): away from what a worse model of the same data does (Karras et al. 2024)."""

    def guided(x, t, condition):
        worse = weaker(x, t, condition)
        return worse + along(jnp.broadcast_to(scale, t.shape), x) * (denoise(x, t, condition) - worse)

    return guided


def classifier(
    denoise: Denoise,
    log_probability: Callable[[Float[Array, "B ..."], Float[Array, "B"], Any], Float[Array, "B"]],
    path: Path,
    scale: Scale,
) -> Denoise:
    """Adds scale times the gradient of log p(condition | x_t) to the score (Dhariwal & Nichol 2021, algorithm 2).

    Args:
      log_probability: (x_t, t, condition) -> log p, of a classifier that knows noisy pictures.
    """

    def guided(x, t, condition):
        slope = jax.grad(lambda x: jnp.sum(log_probability(x, t, condition)))(x)
        return denoise(x, t, condition) + _toward(path, t, scale, slope)

    return guided


def likeness(
    denoise: Denoise,
    similarity: Callable[[Float[Array, "B ..."], Any], Float[Array, "B"]],
    path: Path,
    scale: Scale,
) -> Denoise:
    """Adds scale times the gradient, by x_t, of a similarity of the denoised picture (such as CLIP's to a text) to the
    score (Bansal et al. 2023, eq. 6; Nichol et al. 2022, section 2.4).

    Args:
      similarity: (x0, condition) -> a number for each example, of a model that knows pictures without noise.
    """

    def guided(x, t, condition):
        def total(x):
            x0 = denoise(x, t, condition)
            return jnp.sum(similarity(x0, condition)), x0

        slope, x0 = jax.grad(total, has_aux=True)(x)
        return x0 + _toward(path, t, scale, slope)

    return guided


def _toward(path: Path, t, scale, slope):
    """The change of x0 that goes with a change `scale slope` of the score: sigma^2 / alpha times it."""
    alpha, sigma = path.alpha(t), path.sigma(t)
    weight = jnp.where(alpha > 0, scale * sigma**2 / jnp.where(alpha > 0, alpha, 1), 0)
    return along(weight, slope) * slope


Bound = float | Float[Array, "..."]
"""A value, or one for each channel."""


def within(denoise: Denoise, low: Bound = -1.0, high: Bound = 1.0) -> Denoise:
    """x0 cut to the values that pictures have."""
    return lambda x, t, condition: jnp.clip(denoise(x, t, condition), low, high)


def dynamic(denoise: Denoise, low: Bound = -1.0, high: Bound = 1.0, share: Scale = 0.995) -> Denoise:
    """As if values were from -1 to 1: each x0 divided by the quantile `share` of its absolute values where that is
    above 1, and cut to -1 and 1 (Saharia et al. 2022, section 2.3: dynamic thresholding)."""
    middle, half = (low + high) / 2, (high - low) / 2

    def cut(x, t, condition):
        x0 = (denoise(x, t, condition) - middle) / half
        flat = jnp.abs(x0.reshape(len(x0), -1))
        bound = along(jnp.maximum(jnp.quantile(flat, share, axis=1), 1.0), x0)
        return jnp.clip(x0, -bound, bound) / bound * half + middle

    return cut
