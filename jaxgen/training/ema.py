"""Moving averages of the parameters: the exponential one, and those by powers of the time, of which any other length is
made afterwards."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from jaxgen.errors import UserError


@dataclasses.dataclass(frozen=True)
class Ema:
    """ema <- d ema + (1 - d) params after each step, from ema = the initial parameters (Polyak & Juditsky 1992).

    In step t (from 0), d = min(decay, (1 + t) / (warmup + t)): early on the average spans about t / (warmup - 1) of
    the newest steps, so that the initial parameters are soon forgotten.
    """

    decay: float = 0.999
    """Largest share of the old average that a step keeps; it then spans about 1 / (1 - decay) steps."""
    warmup: float = 10.0
    """The larger, the sooner the past is forgotten early on; 1 for the full decay from the first step."""

    part: ClassVar[str] = "ema"
    """Where a checkpoint holds what `weights` gives."""

    def __post_init__(self):
        if not 0.0 <= self.decay < 1.0:
            raise UserError(f"The decay of an EMA is at least 0 and below 1, not {self.decay}.")
        if self.warmup < 1.0:
            raise UserError(f"The warmup of an EMA is 1 or more, not {self.warmup}.")

    def init(self, params: PyTree) -> PyTree:
        """The average before the first step: a copy in float32, since the parameters' own buffers are donated."""
        return jax.tree.map(lambda p: jnp.array(p, _dtype(p), copy=True), params)

    def update(self, ema: PyTree, params: PyTree, step: Int[Array, ""] | int) -> PyTree:
        """The average after step `step` (0-based), which left `params`."""
        t = jnp.asarray(step, jnp.float32)
        # 1 - d is formed without the cancellation that 1 - min(...) has in float32 for a decay close to 1.
        rate = jnp.maximum(1 - self.decay, (self.warmup - 1) / (self.warmup + t))
        return jax.tree.map(_moved(rate), ema, params)

    def weights(self, ema: PyTree) -> PyTree:
        """The parameters to evaluate and sample with."""
        return ema

    def like(self, tree: Any) -> Any:
        """The average's structure, for a tree in the structure of the parameters: names, layouts."""
        return tree


@dataclasses.dataclass(frozen=True)
class PowerEma:
    """Averages in which the parameters after step n weigh as n^gamma (Karras et al. 2024, section 3): each spans the
    same share of the run however long that is, and from the checkpoints that a run kept `jaxgen ema` makes the average
    of any other span afterwards.

    With t steps taken, ema <- b ema + (1 - b) params, b = (1 - 1/t)^(gamma + 1).
    """

    stds: tuple[float, ...] = (0.05, 0.1)
    """Width of each average: the standard deviation of the time at which a parameter that it holds was made, as a share
    of the run so far. The first is evaluated and sampled with; others are made from two or more."""

    part: ClassVar[str] = "ema/0"
    """Where a checkpoint holds what `weights` gives."""

    def __post_init__(self):
        if not self.stds:
            raise UserError("A PowerEma has at least one relative standard deviation.")
        for std in self.stds:
            check_std(std)
        if len(set(self.stds)) < len(self.stds):
            raise UserError(f"The relative standard deviations of a PowerEma are each another, not {self.stds}.")

    def init(self, params: PyTree) -> PyTree:
        """The averages before the first step, one tree each, which forget the initial parameters in that step."""
        return tuple(Ema().init(params) for _ in self.stds)

    def update(self, ema: PyTree, params: PyTree, step: Int[Array, ""] | int) -> PyTree:
        """The averages after step `step` (0-based), which left `params`."""
        t = jnp.asarray(step, jnp.float32) + 1
        return tuple(
            # 1 - b, without the cancellation that it has in float32 late in a run
            jax.tree.map(_moved(-jnp.expm1((gamma_of(std) + 1) * jnp.log1p(-1 / t))), average, params)
            for std, average in zip(self.stds, ema, strict=True)
        )

    def weights(self, ema: PyTree) -> PyTree:
        """The parameters to evaluate and sample with: those of the first width."""
        return ema[0]

    def like(self, tree: Any) -> Any:
        """The averages' structure, for a tree in the structure of the parameters: names, layouts."""
        return tuple(tree for _ in self.stds)


# ---- power-function averages, and others made of them (Karras et al. 2024, appendix C) ----


LARGEST_STD = 12**-0.5
"""Width of the average in which all steps count alike (gamma = 0)."""


def check_std(std: float) -> None:
    """Raises UserError for a width that no power function has."""
    if not 0 < std <= LARGEST_STD:
        raise UserError(f"A relative standard deviation is above 0 and at most {LARGEST_STD:.4f}, not {std}.")


def gamma_of(std: float) -> float:
    """The power gamma whose average has this relative standard deviation: the largest root of
    gamma^3 + 7 gamma^2 + (16 - std^-2) gamma + 12 - std^-2."""
    roots = np.roots([1.0, 7.0, 16.0 - std**-2, 12.0 - std**-2])
    return max(float(roots.real.max()), 0.0)


def std_of(gamma: float) -> float:
    """The relative standard deviation of the average by the power gamma."""
    return math.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)))


def combination(
    steps: Sequence[int], stds: Sequence[float], step: int, std: float
) -> tuple[Float[np.ndarray, "n"], float]:
    """(weights, error): the sum of these averages that is nearest to the average at `step` of width `std`.

    steps, stds: when each average was saved, after how many steps, and its width. The weights, whose sum is 1, are
    those for which the profiles (the share that each moment has in an average) differ least in the square; `error` is
    what is left of that difference, as a share of the wanted profile's own norm.
    """
    known = [(float(n), gamma_of(s)) for n, s in zip(steps, stds, strict=True)]
    wanted = (float(step), gamma_of(std))
    products = np.array([[_overlap(a, b) for b in known] for a in known])
    target = np.array([_overlap(a, wanted) for a in known])
    size = np.sqrt(np.diag(products))  # as profiles of norm 1, which is what the solution's accuracy asks for
    # averages are float32: without the ridge, weights grow until its rounding shows
    system = np.zeros((len(known) + 1,) * 2)
    system[:-1, :-1] = products / np.outer(size, size) + 1e-12 * np.eye(len(known))
    system[-1, :-1] = system[:-1, -1] = size.min() / size  # the weights' sum, which is 1: else parameters shrink
    found = np.linalg.solve(system, np.append(target / size, size.min()))[:-1] / size
    left = _overlap(wanted, wanted) - 2 * found @ target + found @ products @ found
    return found, math.sqrt(max(left, 0.0) / _overlap(wanted, wanted))


def combined(averages: Sequence[PyTree], weights: Sequence[float]) -> PyTree:
    """The sum of trees, each times its weight. What is no floating point is the last tree's."""

    def one(*leaves):
        if not jnp.issubdtype(leaves[0].dtype, jnp.floating):
            return leaves[-1]
        return sum(w * leaf for w, leaf in zip(weights, leaves, strict=True))

    return jax.tree.map(one, *averages)


def _overlap(a: tuple[float, float], b: tuple[float, float]) -> float:
    """The inner product of two profiles (t, gamma): the integral over n of (gamma + 1) n^gamma / t^(gamma + 1) of both,
    up to the earlier t."""
    (s, p), (t, q) = a, b
    m = min(s, t)
    return (p + 1) * (q + 1) / (p + q + 1) * (m / s) ** p * (m / t) ** q / max(s, t)


def _dtype(p: Array) -> jnp.dtype:
    return jnp.promote_types(p.dtype, jnp.float32) if jnp.issubdtype(p.dtype, jnp.floating) else p.dtype


def _moved(rate: Float[Array, ""]):
    """What moves an average by this share towards the parameters."""

    def one(e, p):
        return e + rate * (p.astype(e.dtype) - e) if jnp.issubdtype(e.dtype, jnp.floating) else p

    return one
