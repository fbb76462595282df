"""From pictures back to noise, along the probability-flow ODE: inversion, and exact likelihood."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxgen.diffusion.denoiser import Denoise
from jaxgen.diffusion.paths import Path
from jaxgen.sampling.grids import Levels
from jaxgen.sampling.solvers import Euler, Picture, Solver, solve


def invert(
    denoise: Denoise,
    path: Path,
    levels: Levels,
    steps: Int[Array, ""] | int,
    x0: Picture,
    condition: Any = None,
    solver: Solver = Euler(),
) -> Picture:
    """The noise at station 0 from which a deterministic solver comes back to x0 (Song et al. 2021, section 5.4).

    Goes through the stations backwards, from the last that has noise, which the picture is taken for.
    """
    steps = jnp.asarray(steps)
    back = Levels(*(x[jnp.clip(steps - 1 - jnp.arange(len(x)), 0)] for x in levels))
    keys = jax.random.split(jax.random.key(0), len(x0))
    return solve(solver, denoise, path, back, steps - 1, (back.alpha[0] * x0).astype(x0.dtype), keys, condition)


def log_likelihood(
    denoise: Denoise,
    path: Path,
    x0: Picture,
    keys: Array,
    condition: Any = None,
    steps: Int[Array, ""] | int = 64,
    probes: int = 1,
    low: float = 1e-3,
    high: float | None = None,
) -> Float[Array, "B"]:
    """log p(x0) in nats, of the density that the probability-flow ODE turns noise into (Song et al. 2021, eq. 39).

    Along the straight path y = x / (alpha + sigma), s = sigma / (alpha + sigma), where dy / ds = (y - x0) / s, by the
    classical Runge-Kutta method of fourth order with equal steps of log(s / (1 - s)).

    Args:
      keys: one for each example, for the probes of the divergence.
      probes: random directions of +-1 (Hutchinson) of which the mean is taken; 0 for the exact divergence, which costs
        as many passes as there are pixels.
      low, high: noise levels sigma / alpha between which the ODE is solved; by default to the path's own, at most 1e4.
    """
    size = int(np.prod(x0.shape[1:]))
    top = jnp.minimum(path.level(jnp.ones((), x0.dtype)), 1e4) if high is None else jnp.asarray(high, x0.dtype)
    begin, end = jnp.log(jnp.asarray(low, x0.dtype)), jnp.log(top)
    signs = jax.vmap(lambda key: jax.random.rademacher(key, (max(probes, 1), *x0.shape[1:]), x0.dtype))(keys)

    def slope(y, log_level):
        """(dy, d log-density) by the logarithm of the level."""
        level = jnp.exp(log_level)
        s = level / (1 + level)
        t = path.time(level)
        scale = path.alpha(t) + path.sigma(t)

        def velocity(y):
            found = denoise(scale * y, jnp.broadcast_to(t, y.shape[:1]), condition)
            return (y - found) / s

        if probes:
            def along_one(v):
                moved, change = jax.jvp(velocity, (y,), (v,))
                return moved, jnp.sum((change * v).reshape(len(v), -1), 1)

            moved, traces = jax.lax.map(along_one, jnp.moveaxis(signs, 1, 0))
            moved, trace = moved[0], traces.mean(0)
        else:
            moved = velocity(y)
            single = lambda flat, i: velocity(y.at[i].set(flat.reshape(y.shape[1:])))[i].reshape(-1)  # noqa: E731
            trace = jax.lax.map(
                lambda i: jnp.trace(jax.jacfwd(single)(y[i].reshape(-1), i)), jnp.arange(len(y))
            )
        ds = s * (1 - s)  # of s by the logarithm of the level
        return moved * ds, trace * ds

    steps = jnp.asarray(steps)
    h = (end - begin) / steps

    def one(i, carry):
        y, total = carry
        u = begin + i * h
        k1, d1 = slope(y, u)
        k2, d2 = slope(y + 0.5 * h * k1, u + 0.5 * h)
        k3, d3 = slope(y + 0.5 * h * k2, u + 0.5 * h)
        k4, d4 = slope(y + h * k3, u + h)
        return y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4), total + h / 6 * (d1 + 2 * d2 + 2 * d3 + d4)

    first = x0 / (1 + low)
    y, total = jax.lax.fori_loop(0, steps, one, (first, jnp.zeros(len(x0), x0.dtype)))
    s = top / (1 + top)
    square = jnp.sum((y / s).reshape(len(y), -1) ** 2, 1)
    prior = -0.5 * square - size * (0.5 * np.log(2 * np.pi) + jnp.log(s))
    return prior + total - size * np.log1p(low)


def bits_per_dim(log_p: Float[Array, "B"], size: int, levels: int = 256, span: float = 2.0) -> Float[Array, "B"]:
    """Bits for each of `size` numbers that were one of `levels` integers, spread over `span` (from -1 to 1)."""
    return -log_p / (size * np.log(2)) - np.log2(span / levels)
