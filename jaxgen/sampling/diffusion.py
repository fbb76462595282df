"""Pictures from noise, or from other pictures: one compiled program, whatever the steps, scales, seed and time grid."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxgen import sharding
from jaxgen.diffusion import guidance
from jaxgen.diffusion.denoiser import Denoise, Model
from jaxgen.errors import UserError
from jaxgen.sampling.grids import Grid, UniformGrid
from jaxgen.sampling.solvers import DpmPP2M, Picture, Solver, Station, prior, solve_checked

MOST = 1e9  # a guidance scale, beyond which float32 ends
Threshold = Literal["auto", "none", "clip", "dynamic"]


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How pictures are drawn. Numbers are traced: another value compiles nothing, and another number of steps only
    where it leaves the bucket (up to 16, 32, 64, ... steps)."""

    solver: Solver = DpmPP2M()
    grid: Grid = UniformGrid()
    steps: int = 20
    guidance: float = 1.0
    """Scale of classifier-free guidance; 1 for none, which takes half the time."""
    interval: tuple[float, float] = (0.0, 1.0)
    """Times between which it guides (Kynkaanniemi et al. 2024)."""
    rescale: float = 0.0
    """Share of the way back to the unguided standard deviation (Lin et al. 2024)."""
    threshold: Threshold = "auto"
    """What is done with denoised values that no picture has, beyond -1 and 1: cut ("clip"), cut beyond their 99.5 %
    quantile and scaled by it ("dynamic", Saharia et al. 2022), or nothing. "auto" cuts those of pixels, and leaves
    latents."""
    shape: tuple[int, ...] = ()
    """(H, W, C) of the pictures; by default those of the batch's own."""
    image_guidance: float = 1.0
    """The scale of a picture to be edited, beside that of its instruction; 1 for none, which takes two thirds."""

    def __post_init__(self):
        if self.steps < 1:
            raise UserError(f"Sampling takes at least one step, not {self.steps}.")
        if not 0 <= self.interval[0] <= self.interval[1] <= 1:
            raise UserError(f"Guidance is between two times from 0 to 1, the lower first, not {self.interval}.")
        if self.steps != int(self.steps):
            raise UserError(f"Sampling takes whole steps, not {self.steps}.")
        for scale in (self.guidance, self.image_guidance):
            if not abs(scale) <= MOST:
                raise UserError(f"The guidance scale is {scale}, which should be a number of at most {MOST:g}.")
        if not 0 <= self.rescale <= 1:
            raise UserError(f"The rescale of guidance is a share from 0 to 1, not {self.rescale}.")


@dataclasses.dataclass(frozen=True)
class Edit:
    """A picture to begin with, in the values that the network knows: of pixels from -1 to 1, or latents."""

    start: Float[Array | np.ndarray, "B ..."]
    strength: float = 1.0
    """Share of the steps that are taken: 0 gives the picture back, 1 begins with noise (Meng et al. 2022, SDEdit)."""
    mask: Float[Array | np.ndarray, "B ..."] | None = None
    """(B, H, W, 1): 1 where something new is wanted, 0 where the picture stays (inpainting by replacement)."""
    repeats: int = 1
    """How often each step is taken with a mask, going back to its noise in between (Lugmayr et al. 2022, RePaint)."""

    def __post_init__(self):
        if not 0 <= self.strength <= 1:
            raise UserError(f"The strength of an edit is from 0 to 1, not {self.strength:g}.")
        if self.repeats < 1:
            raise UserError(f"Each step is taken at least once, not {self.repeats} times.")
        *sides, channels = self.start.shape
        if self.mask is not None and self.mask.shape not in ((*sides, 1), (*sides, channels)):
            raise UserError(f"The mask is of shape {self.mask.shape}, and the picture wants {(*sides, 1)}.")


def bucket(steps: int) -> int:
    """The size of the array of times for so many steps: a power of two, at least 16."""
    return max(16, 1 << (steps - 1).bit_length())


def keys_of(seed: Int[Array, ""] | int, index: Int[Array, "B"]) -> Array:
    """A key for each picture, of (seed, index) alone, (B,)."""
    key = jax.random.key(seed)
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(index)


def generate(
    model: Model,
    params: Any,
    keys: Array,
    shape: tuple[int, ...],
    sampling: Sampling,
    condition: Any = None,
    null: Any = None,
    edit: Edit | None = None,
    guide: Callable[[Denoise, Any], Denoise] | None = None,
    guide_args: Any = None,
    callback: Callable[[int, np.ndarray], None] | None = None,
    nothing: Any = None,
    bounds: tuple[guidance.Bound, guidance.Bound] = (-1.0, 1.0),
) -> tuple[Float[Array, "B ..."], Int[Array, ""]]:
    """Pictures of one key each, and the step after which values were first not finite (-1 where all are).

    Args:
      shape: of one picture, or latent.
      condition: what the network is told, examples first; `null` the same for nothing, or for what is not wanted.
        Without `null` there is no classifier-free guidance.
      guide: (denoise, guide_args) -> denoise: further guidance, such as by a classifier or a weaker model.
      callback: called on the host with (step, x) after each step.
      nothing: what the network is told of neither picture nor text, where `null` still has the picture: then both have
        a scale.
      bounds: the least and the greatest value of a picture, for `sampling.threshold`.
    """
    size = bucket(sampling.steps)
    levels = sampling.grid.levels(model.path, sampling.steps, size)
    solver, numbers = _parted(sampling.solver)
    scales = [sampling.guidance, *sampling.interval, sampling.rescale, sampling.image_guidance]
    scales = jnp.asarray(scales, jnp.float32)
    begin, source = 0, None
    if edit is not None:
        begin = round(sampling.steps * (1 - edit.strength))
        source = edit.start, edit.mask, jnp.int32(edit.repeats if edit.mask is not None else 1)
    return _generate(
        model, solver, shape, sampling.threshold, guide, callback,
        params, numbers, keys, levels, jnp.int32(sampling.steps), jnp.int32(begin), scales, condition, null, nothing,
        source, guide_args, tuple(jnp.asarray(b, jnp.float32) for b in bounds),
    )  # fmt: skip


@functools.partial(jax.jit, static_argnums=range(6))
def _generate(
    model, solver, shape, threshold, guide, callback,
    params, numbers, keys, levels, steps, begin, scales, condition, null, nothing, source,
    guide_args, bounds,
):  # fmt: skip
    solver = dataclasses.replace(solver, **numbers)
    denoise = model.denoiser(params)
    if null is not None:
        scale, low, high, rescale, image_scale = scales
        if nothing is None:
            denoise = guidance.classifier_free(denoise, null, scale, (low, high), rescale)
        else:
            denoise = guidance.two_scales(denoise, null, nothing, scale, image_scale, (low, high), rescale)
    if guide is not None:
        denoise = guide(denoise, guide_args)
    if threshold in ("clip", "dynamic"):
        denoise = (guidance.within if threshold == "clip" else guidance.dynamic)(denoise, *bounds)
    x = prior(keys, jnp.zeros((len(keys), *shape)), levels, begin)
    replace, repeats = None, 1
    if source is not None:
        start, mask, repeats = source
        x = levels.alpha[begin] * start + x
        if mask is not None:

            def replace(x: Picture, at: Station, noise: Callable[[int], Picture]) -> Picture:
                return mask * x + (1 - mask) * (at.alpha * start + at.sigma * noise(0))

    x = sharding.constrain(x, "batch", *(None,) * len(shape))
    return solve_checked(
        solver, denoise, model.path, levels, steps, x, keys, condition, begin, callback, replace, repeats
    )


def _parted(solver: Solver) -> tuple[Solver, dict[str, Array]]:
    """A solver without its numbers, to compile for, and these."""
    numbers = {f.name: getattr(solver, f.name) for f in dataclasses.fields(solver)}
    numbers = {name: value for name, value in numbers.items() if isinstance(value, float | jax.Array)}
    return dataclasses.replace(solver, **dict.fromkeys(numbers, 0.0)), {k: jnp.float32(v) for k, v in numbers.items()}


def interpolate(a: Picture, b: Picture, share: Float[Array, "B"] | float) -> Picture:
    """Between two noises along the sphere, which keeps their length (slerp; Song et al. 2021, appendix D.5)."""
    flat_a, flat_b = a.reshape(len(a), -1), b.reshape(len(b), -1)
    cosine = jnp.sum(flat_a * flat_b, 1) / (jnp.linalg.norm(flat_a, axis=1) * jnp.linalg.norm(flat_b, axis=1))
    angle = jnp.arccos(jnp.clip(cosine, -1, 1))
    share = jnp.broadcast_to(share, angle.shape)
    near = jnp.sin(angle) < 1e-4
    safe = jnp.where(near, 1.0, jnp.sin(angle))
    first = jnp.where(near, 1 - share, jnp.sin((1 - share) * angle) / safe)
    second = jnp.where(near, share, jnp.sin(share * angle) / safe)
    wide = (len(a), *(1,) * (a.ndim - 1))
    return first.reshape(wide) * a + second.reshape(wide) * b
