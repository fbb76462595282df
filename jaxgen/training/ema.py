"""The exponential moving average of the parameters."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree

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

        def one(e, p):
            return e + rate * (p.astype(e.dtype) - e) if jnp.issubdtype(e.dtype, jnp.floating) else p

        return jax.tree.map(one, ema, params)

    def weights(self, ema: PyTree) -> PyTree:
        """The parameters to evaluate and sample with."""
        return ema


def _dtype(p: Array) -> jnp.dtype:
    return jnp.promote_types(p.dtype, jnp.float32) if jnp.issubdtype(p.dtype, jnp.floating) else p.dtype
