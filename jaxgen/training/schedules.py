"""Learning rates over a run, as the fraction of the peak that each step has."""

import dataclasses
import math
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxgen.errors import UserError

Step = Int[Array, ""] | int


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A linear warm-up, then what a subclass says, then the fraction `final` for good.

    Step n (from 0) of the warm-up has (n + 1) / (warmup + 1) of the peak, so that the first update is not lost and step
    `warmup` is the first at the peak (as in nanoGPT). A run no longer than its warm-up has only that.
    """

    warmup: int = 0
    """Steps before the peak."""

    def __post_init__(self):
        if self.warmup < 0:
            raise UserError(f"A schedule's warmup is a number of steps, 0 or more, not {self.warmup}.")
        final = getattr(self, "final", 0.0)
        if not 0.0 <= final <= 1.0:
            raise UserError(f"A schedule's final is a fraction of the peak, from 0 to 1, not {final}.")

    def __call__(self, step: Step, steps: int) -> Float[Array, ""]:
        """Fraction of the peak at `step` (0-based, may be traced) of a run of `steps`; its end holds after it."""
        step = jnp.asarray(step, jnp.float32)
        return jnp.where(step < self.warmup, (step + 1) / (self.warmup + 1), self.after(step, steps))

    def after(self, step: Float[Array, ""], steps: int) -> Float[Array, ""]:
        """Fraction of the peak at a step after the warm-up."""
        raise NotImplementedError

    def _progress(self, step: Float[Array, ""], start: int, end: int) -> Float[Array, ""]:
        """How much of start..end has gone by: 0 at start, 1 at end and after."""
        return jnp.clip((step - start) / max(end - start, 1), 0.0, 1.0)


@dataclasses.dataclass(frozen=True)
class Constant(Schedule):
    """The peak throughout, after the warm-up."""

    def after(self, step: Float[Array, ""], steps: int) -> Float[Array, ""]:
        return jnp.ones_like(step)


@dataclasses.dataclass(frozen=True)
class Cosine(Schedule):
    """Half a cosine from the peak down to `final` at step `steps` (Loshchilov & Hutter 2017, eq. 5)."""

    final: float = 0.1
    """Fraction of the peak at the end."""

    def after(self, step: Float[Array, ""], steps: int) -> Float[Array, ""]:
        fall = 0.5 * (1 + jnp.cos(math.pi * self._progress(step, self.warmup, steps)))
        return self.final + (1 - self.final) * fall


@dataclasses.dataclass(frozen=True)
class Linear(Schedule):
    """A straight line from the peak down to `final` at step `steps`."""

    final: float = 0.0
    """Fraction of the peak at the end."""

    def after(self, step: Float[Array, ""], steps: int) -> Float[Array, ""]:
        return self.final + (1 - self.final) * (1 - self._progress(step, self.warmup, steps))


@dataclasses.dataclass(frozen=True)
class WarmupStableDecay(Schedule):
    """The peak until the last `decay` of the run, then down to `final` (WSD: Hu et al. 2024, arXiv:2404.06395).

    The fall is 1 - sqrt(x) (Hägele et al. 2024, arXiv:2405.18392) or 1 - x, for x from 0 to 1 over the decay.
    """

    decay: float = 0.2
    """Length of the decay: a fraction of the run up to 1, a number of steps above."""
    final: float = 0.0
    """Fraction of the peak at the end."""
    shape: Literal["1-sqrt", "linear"] = "1-sqrt"

    def __post_init__(self):
        super().__post_init__()
        if self.decay <= 0:
            raise UserError(f"A schedule's decay is a share of the run or a number of steps, not {self.decay}.")
        if self.shape not in ("1-sqrt", "linear"):
            raise UserError(f"A schedule's shape is '1-sqrt' or 'linear', not '{self.shape}'.")

    def after(self, step: Float[Array, ""], steps: int) -> Float[Array, ""]:
        length = round(self.decay * steps) if self.decay <= 1 else round(self.decay)
        x = self._progress(step, max(self.warmup, steps - length), steps)
        return self.final + (1 - self.final) * (1 - (jnp.sqrt(x) if self.shape == "1-sqrt" else x))
