"""Solvers of diffusion: from noise to a picture, through any denoiser, over an array of times.

One step goes from station s of the grid to the next. In the exponential form (Lu et al. 2022) with h the growth of
log(alpha / sigma), a denoised D held over the step gives

    x' = (sigma' / sigma) x + alpha' (1 - exp(-h)) D,    alpha' (1 - exp(-h)) = alpha' - alpha sigma' / sigma,

which is DDIM and finite at both ends, where h is not. Solvers of higher order differ in the D that they put there. At
an end without data (alpha = 0) or noise (sigma' = 0) they take the first order.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxgen.diffusion.denoiser import Denoise, Denoiser, noise_of
from jaxgen.diffusion.paths import Path
from jaxgen.errors import UserError
from jaxgen.sampling.grids import Levels

Picture = Float[Array, "B ..."]


class Station(NamedTuple):
    """One time, as scalars."""

    t: Float[Array, ""]
    alpha: Float[Array, ""]
    sigma: Float[Array, ""]

    @property
    def level(self):
        """Infinite where nothing is left of the data."""
        return self.sigma / self.alpha

    @property
    def log_snr(self):
        """log(alpha / sigma), half the logarithm of the signal-to-noise ratio; infinite at the ends."""
        return jnp.log(self.alpha) - jnp.log(self.sigma)


@dataclasses.dataclass(frozen=True)
class Move:
    """All that a step of a solver has besides x and its history."""

    denoise: Denoise
    path: Path
    condition: Any
    levels: Levels
    i: Int[Array, ""]
    """Number of the station where the step begins."""
    begin: Int[Array, ""]
    """Number of the station where the solver began."""
    steps: Int[Array, ""]
    """Number of the last station."""
    noise: Callable[[int], Picture]
    """Fresh unit noise of this step, by its number within the step."""
    alone: bool = False
    """x was changed at this station from outside, so that the steps before belong to another trajectory."""

    def station(self, ahead: int = 0) -> Station:
        """The station so many after that of the step."""
        return Station(*(x[jnp.maximum(self.i + ahead, 0)] for x in self.levels))

    @property
    def done(self) -> Int[Array, ""]:
        """Steps taken before this one, on the same trajectory."""
        return self.i - (self.i if self.alone else self.begin)

    def at(self, x: Picture, s: Station) -> Picture:
        """The denoised x0 of x at a station."""
        return self.denoise(x, jnp.broadcast_to(s.t, x.shape[:1]), self.condition)

    def on(self, level: Float[Array, ""]) -> Station:
        """A station off the grid, by its noise level."""
        t = self.path.time(level)
        return Station(t, self.path.alpha(t), self.path.sigma(t))


def hold(x: Picture, x0: Picture, s: Station, n: Station) -> Picture:
    """The exact step from s to n for a denoised x0 that does not change."""
    ratio = n.sigma / s.sigma
    return (ratio * x + (n.alpha - ratio * s.alpha) * x0).astype(x.dtype)


class Solver:
    """A subclass is a frozen dataclass that gives `step`, and `start` where it remembers anything."""

    evaluations: ClassVar[int] = 1
    """Calls of the denoiser in a step."""

    def start(self, x: Picture) -> Any:
        """What is remembered before the first step: arrays of fixed shapes."""
        return ()

    def step(self, x: Picture, history: Any, move: Move) -> tuple[Picture, Any]:
        """(x at the next station, what is remembered)."""
        raise NotImplementedError

    def changed(self, history: Any) -> Any:
        """What is still of use of the history after x was changed from outside."""
        return history


# ---- of first order ----


@dataclasses.dataclass(frozen=True)
class Ddim(Solver):
    """DDIM (Song et al. 2021, eq. 12): deterministic for eta = 0; for eta = 1 DDPM's ancestral sampling."""

    eta: float | Float[Array, ""] = 0.0

    def __post_init__(self):
        if isinstance(self.eta, int | float) and not 0 <= self.eta <= 1:
            raise UserError(f"The eta of DDIM is from 0 to 1, not {self.eta}.")

    def step(self, x, history, move):
        s, n = move.station(), move.station(1)
        x0 = move.at(x, s)
        std = self.eta * _posterior(s, n)
        noise = noise_of(x0, x, s.alpha, s.sigma)
        along = jnp.sqrt(jnp.maximum(n.sigma**2 - std**2, 0))
        return (n.alpha * x0 + along * noise + std * move.noise(0)).astype(x.dtype), history


def _posterior(s: Station, n: Station) -> Float[Array, ""]:
    """Standard deviation of x at n given x at s and x0."""
    kept = s.alpha * n.sigma / (n.alpha * s.sigma)
    return n.sigma * jnp.sqrt(jnp.maximum(1 - kept**2, 0))


@dataclasses.dataclass(frozen=True)
class Ddpm(Solver):
    """Ancestral sampling (Ho et al. 2020, algorithm 2)."""

    variance: Literal["small", "large", "learned"] = "small"
    """That of x given x0 (beta-tilde), that of a single datum (beta), or what the network says between the two (Nichol
    & Dhariwal 2021, eq. 15)."""

    def step(self, x, history, move):
        s, n = move.station(), move.station(1)
        v = None
        if self.variance == "learned":
            if not isinstance(move.denoise, Denoiser):
                raise UserError("A learned variance is a network's own: it is sampled without guidance.")
            x0, v = move.denoise.both(x, jnp.broadcast_to(s.t, x.shape[:1]), move.condition)
            if v is None:
                raise UserError("The network has learned no variance; take Ddpm('small') or Ddpm('large').")
        else:
            x0 = move.at(x, s)
        kept = s.alpha / n.alpha  # alpha of s, seen from n
        added = jnp.maximum(s.sigma**2 - (kept * n.sigma) ** 2, 0)
        mean = kept * n.sigma**2 / s.sigma**2 * x + n.alpha * added / s.sigma**2 * x0
        small, large = _posterior(s, n), jnp.sqrt(added)
        if v is not None:
            share = (v + 1) / 2
            tiny = jnp.finfo(x.dtype).tiny
            std = jnp.exp(share * jnp.log(large) + (1 - share) * jnp.log(jnp.maximum(small, tiny)))
        else:
            std = small if self.variance == "small" else large
        std = jnp.where(n.sigma > 0, std, 0)  # the picture itself, not a draw around it
        return (mean + std * move.noise(0)).astype(x.dtype), history


@dataclasses.dataclass(frozen=True)
class Euler(Solver):
    """Euler's method on the probability-flow ODE over the noise level, dx / dlevel = (x - x0) / level for alpha = 1
    (Karras et al. 2022, eq. 4); on any path the same as DDIM with eta = 0."""

    def step(self, x, history, move):
        s = move.station()
        return hold(x, move.at(x, s), s, move.station(1)), history


@dataclasses.dataclass(frozen=True)
class EulerAncestral(Solver):
    """Euler's step down to less noise than the next station has, and noise up to it: of DDPM's variance."""

    def step(self, x, history, move):
        s, n = move.station(), move.station(1)
        up = _posterior(s, n)
        low = n._replace(sigma=jnp.sqrt(jnp.maximum(n.sigma**2 - up**2, 0)))
        return (hold(x, move.at(x, s), s, low) + up * move.noise(0)).astype(x.dtype), history


@dataclasses.dataclass(frozen=True)
class Consistency(Solver):
    """Denoises, and adds new noise for the next station: for consistency models, whose every x0 is a finished picture
    (Song et al. 2023, algorithm 1; Luo et al. 2023)."""

    def step(self, x, history, move):
        n = move.station(1)
        return (n.alpha * move.at(x, move.station()) + n.sigma * move.noise(0)).astype(x.dtype), history


# ---- of second order, two calls a step ----


def _heun(x: Picture, s: Station, n: Station, move: Move, space: str) -> Picture:
    """Heun's step over sigma / scale with x / scale: scale is alpha (noise level), or alpha + sigma (straight line)."""
    scale_s, scale_n = (s.alpha, n.alpha) if space == "level" else (s.alpha + s.sigma, n.alpha + n.sigma)
    first = move.at(x, s)
    guess = hold(x, first, s, n)
    u, u_next = s.sigma / scale_s, n.sigma / scale_n

    def correct(_):
        second = move.at(guess, n)
        slope = 0.5 * ((x / scale_s - first) / u + (guess / scale_n - second) / u_next)
        return (scale_n * (x / scale_s + (u_next - u) * slope)).astype(x.dtype)

    return jax.lax.cond((n.sigma > 0) & (scale_s > 0), correct, lambda _: guess, None)


@dataclasses.dataclass(frozen=True)
class Heun(Solver):
    """Heun's method on the probability-flow ODE (Karras et al. 2022, algorithm 1)."""

    space: Literal["level", "straight"] = "level"
    """Over the noise level as Karras et al., or along the straight path, where a flow's ODE has its own time."""
    evaluations: ClassVar[int] = 2

    def step(self, x, history, move):
        return _heun(x, move.station(), move.station(1), move, self.space), history


@dataclasses.dataclass(frozen=True)
class EdmStochastic(Solver):
    """Heun's method with noise added and taken away again (Karras et al. 2022, algorithm 2)."""

    churn: float | Float[Array, ""] = 40.0
    """Noise added over all steps; 0 is `Heun`."""
    low: float | Float[Array, ""] = 0.05
    high: float | Float[Array, ""] = 50.0
    """Noise levels between which it is added."""
    noise_scale: float | Float[Array, ""] = 1.003
    evaluations: ClassVar[int] = 2

    def step(self, x, history, move):
        s = move.station()
        inside = (s.level >= self.low) & (s.level <= self.high)
        gamma = jnp.where(inside, jnp.minimum(self.churn / (move.steps - move.begin), 2**0.5 - 1), 0.0)
        top = jnp.maximum(move.path.level(jnp.ones_like(s.t)), s.level)
        level = jnp.minimum(s.level * (1 + gamma), top)  # no path goes beyond its end
        up = move.on(level)
        up = Station(*(jnp.where(level > s.level, a, b) for a, b in zip(up, s, strict=True)))
        added = jnp.sqrt(jnp.maximum(level**2 - s.level**2, 0))
        added = jnp.where(jnp.isfinite(added), added, 0) * self.noise_scale
        x = jnp.where(s.alpha > 0, up.alpha * (x / s.alpha + added * move.noise(0)), x)
        return _heun(x.astype(x.dtype), up, move.station(1), move, "level"), history


@dataclasses.dataclass(frozen=True)
class DpmPP2S(Solver):
    """DPM-Solver++(2S): a first-order step to the middle of log(alpha / sigma), whose x0 serves for the whole step (Lu
    et al. 2022, algorithm 1 with r = 1/2)."""

    evaluations: ClassVar[int] = 2

    def step(self, x, history, move):
        s, n = move.station(), move.station(1)
        first = move.at(x, s)
        inner = (n.sigma > 0) & (s.alpha > 0)

        def middle(_):
            m = move.on(jnp.sqrt(s.level * n.level))
            return move.at(hold(x, first, s, m), m).astype(first.dtype)

        return hold(x, jax.lax.cond(inner, middle, lambda _: first, None), s, n), history


# ---- of several steps ----


class Past(NamedTuple):
    """The denoised pictures of the steps before, newest first."""

    x0: tuple[Picture, ...]

    @classmethod
    def of(cls, x: Picture, count: int) -> "Past":
        return cls((jnp.zeros_like(x),) * count)

    def push(self, x0: Picture) -> "Past":
        return Past((x0.astype(self.x0[0].dtype), *self.x0[:-1]))


def _growth(a: Station, b: Station) -> Float[Array, ""]:
    """The growth of log(alpha / sigma) from a to b; infinite where either is at an end."""
    return b.log_snr - a.log_snr


def _ratio(move: Move, back: int) -> Float[Array, ""]:
    """h of the step before the one `back` steps ago, by this step's h; infinite where one of the two has no finite h,
    and what it divides is left out."""
    h = _growth(move.station(), move.station(1))
    before = _growth(move.station(-back - 1), move.station(-back))
    usable = jnp.isfinite(h) & jnp.isfinite(before) & (move.done > back)
    return jnp.where(usable, before / jnp.where(usable, h, 1), jnp.inf)


class _TwoPictures(Solver):
    """Remembers the denoised picture of the step before."""

    def start(self, x):
        return Past.of(x, 1)

    def extrapolated(self, x: Picture, history: Past, move: Move) -> tuple[Picture, Past]:
        """The denoised picture at the middle of the step, along the line through the last two; what is remembered."""
        x0 = move.at(x, move.station())
        return x0 + 0.5 * (x0 - history.x0[0]) / _ratio(move, 0), history.push(x0)


@dataclasses.dataclass(frozen=True)
class DpmPP2M(_TwoPictures):
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2)."""

    def step(self, x, history, move):
        x0, history = self.extrapolated(x, history, move)
        return hold(x, x0, move.station(), move.station(1)), history


@dataclasses.dataclass(frozen=True)
class DpmPP2MSde(_TwoPictures):
    """SDE-DPM-Solver++(2M): the reverse SDE, with the second-order term at the step's middle (Lu et al. 2022, section
    5)."""

    def step(self, x, history, move):
        s, n = move.station(), move.station(1)
        x0, history = self.extrapolated(x, history, move)
        decay = (n.sigma * s.alpha / (n.alpha * s.sigma)) ** 2  # exp(-2 h)
        mean = n.sigma / s.sigma * jnp.sqrt(decay) * x + n.alpha * (1 - decay) * x0
        return (mean + n.sigma * jnp.sqrt(1 - decay) * move.noise(0)).astype(x.dtype), history


@dataclasses.dataclass(frozen=True)
class DpmPP3M(Solver):
    """DPM-Solver++(3M): the exact step (Lu et al. 2022, section 3) for the parabola through the last three denoised
    pictures. Its first steps, of lower order, leave it at order 2 unless they are small or at much noise. (Common
    programs of this name take half of the parabola's square term: of order 2 whatever the start, though often nearer
    with few steps.)"""

    def start(self, x):
        return Past.of(x, 2)

    def step(self, x, history, move):
        s, n = move.station(), move.station(1)
        x0, h = move.at(x, s), _growth(s, n)
        r0, r1 = _ratio(move, 0), _ratio(move, 1)
        near, far = (x0 - history.x0[0]) / r0, (history.x0[0] - history.x0[1]) / r1
        both = jnp.isfinite(r0) & jnp.isfinite(r1)
        a, b = jnp.where(both, r0, 1), jnp.where(both, r1, 1)
        bend = jnp.where(both, (near - far) / (a + b), 0)
        slope = near + a * bend
        safe = jnp.where(jnp.isfinite(h), h, 1)
        first = -jnp.expm1(-safe)  # 1 - exp(-h)
        found = hold(x, x0, s, n)
        if_three = slope * (1 - first / safe) + bend * (1 - 2 * (safe - first) / safe**2)
        change = n.alpha * jnp.where(both, if_three, 0.5 * first * near)
        return (found + jnp.where(jnp.isfinite(h), change, 0)).astype(x.dtype), history.push(x0)


@dataclasses.dataclass(frozen=True)
class Deis(Solver):
    """Exponential integrator with the noise extrapolated by a polynomial in log(sigma / alpha) (Zhang & Chen 2023,
    section 4, "tAB-DEIS" with their time replaced by the logarithm of the noise level)."""

    order: int = 3

    def __post_init__(self):
        if self.order not in (1, 2, 3):
            raise UserError(f"Deis has order 1, 2 or 3, not {self.order}.")

    def start(self, x):
        return Past.of(x, max(self.order - 1, 1))

    def step(self, x, history, move):
        s, n = move.station(), move.station(1)
        x0 = move.at(x, s)
        noise = noise_of(x0, x, s.alpha, s.sigma)
        found = hold(x, x0, s, n)
        order = jnp.minimum(move.done + 1, self.order)
        order = jnp.where(jnp.isfinite(_growth(s, n)), order, 1)
        for back in range(1, self.order):
            order = jnp.where(jnp.isfinite(move.station(-back).log_snr), order, jnp.minimum(order, back))
        for wanted in range(2, self.order + 1):
            noises = (noise, *history.x0[: wanted - 1])
            logs = [-move.station(-k).log_snr for k in range(wanted)]
            logs = [jnp.where(order >= wanted, log, -float(k)) for k, log in enumerate(logs)]
            weights = _lagrange(logs, jnp.where(order >= wanted, -n.log_snr, -1.0))
            moved = n.alpha * (x / s.alpha + sum(w * e for w, e in zip(weights, noises, strict=True)))
            found = jnp.where(order == wanted, moved, found)
        return found.astype(x.dtype), history.push(noise)


def _lagrange(logs: list[Array], end: Array) -> list[Array]:
    """The integrals of the Lagrange polynomials of points log u over u from exp(logs[0]) to exp(end)."""

    def powers(a):
        """The integrals of (log u - a)^k du at u, as functions of log u: u ((v)^k - k I_{k-1}), for k = 0, 1, 2."""
        u, v = jnp.exp(a), a
        return u, u * (v - 1), u * (v**2 - 2 * v + 2)

    begin, until = powers(logs[0]), powers(end)
    moments = [b - a for a, b in zip(begin, until, strict=True)]
    found = []
    for i, point in enumerate(logs):
        others = [p for j, p in enumerate(logs) if j != i]
        scale = 1.0
        for other in others:
            scale = scale * (point - other)
        if len(others) == 1:
            found.append((moments[1] - others[0] * moments[0]) / scale)
        else:
            a, b = others
            found.append((moments[2] - (a + b) * moments[1] + a * b * moments[0]) / scale)
    return found


@dataclasses.dataclass(frozen=True)
class UniPC(Solver):
    """UniPC with B(h) = exp(-h) - 1: predicts, and corrects with the denoised picture of the prediction, which the next
    step needs anyway (Zhao et al. 2023, algorithms 5 and 6, data prediction). The order rises over the first steps, and
    falls over the last ones."""

    order: int = 2

    def __post_init__(self):
        if self.order not in (1, 2, 3):
            raise UserError(f"UniPC has order 1, 2 or 3, not {self.order}.")

    def start(self, x):
        return x, Past.of(x, self.order), jnp.int32(0)

    def step(self, x, history, move):
        before, past, used = history  # x at the station before, denoised there and earlier, order of that step
        s, n = move.station(), move.station(1)
        x0 = move.at(x, s)
        corrected = x
        for order in range(1, self.order + 1):
            corrected = jnp.where(used == order, self._moved(before, past.x0, move, -1, order, x0), corrected)
        order = jnp.minimum(jnp.minimum(move.done + 1, self.order), move.steps - move.i)
        for back in range(self.order):
            order = jnp.where(jnp.isfinite(move.station(-back).log_snr), order, jnp.clip(order, 1, max(back, 1)))
        order = jnp.where(jnp.isfinite(_growth(s, n)), order, 1)
        past = past.push(x0)
        found = hold(corrected, x0, s, n)
        for wanted in range(2, self.order + 1):
            found = jnp.where(order == wanted, self._moved(corrected, past.x0, move, 0, wanted, None), found)
        # a step without a finite h has nothing to correct by
        used = jnp.where(jnp.isfinite(_growth(s, n)), order, 0)
        return found.astype(x.dtype), (corrected, past, used.astype(jnp.int32))

    def changed(self, history):
        return *history[:2], jnp.int32(0)  # the corrector would undo the change

    def _moved(self, x: Picture, x0: tuple[Picture, ...], move: Move, at: int, order: int, ahead: Picture | None):
        """The step from station `at` on; with the denoised picture `ahead` of its end, the corrector."""
        s, n = move.station(at), move.station(at + 1)
        h = _growth(s, n)
        ok = jnp.isfinite(h)
        h = jnp.where(ok, h, 1.0)
        points = [_growth(s, move.station(at - k)) / h for k in range(1, order)]
        points = [jnp.where(jnp.isfinite(p) & (p != 0), p, -float(k + 1)) for k, p in enumerate(points)]
        slopes = [(x0[k + 1] - x0[0]) / p for k, p in enumerate(points)]
        if ahead is not None:
            points, slopes = [*points, jnp.ones_like(h)], [*slopes, ahead - x0[0]]
        if len(points) == 1:
            weights = [jnp.asarray(0.5, h.dtype)]
        else:
            phi, factor, right = jnp.expm1(-h), 1.0, []
            term = phi / -h - 1
            for k in range(1, len(points) + 1):
                factor *= k
                right.append(term * factor / phi)
                term = term / -h - 1 / (factor * (k + 1)) if k < len(points) else term
            matrix = jnp.stack([jnp.stack([p**k for p in points]) for k in range(len(points))])
            weights = list(jnp.linalg.solve(matrix, jnp.stack(right)))
        total = sum(w * d for w, d in zip(weights, slopes, strict=True))
        return hold(x, x0[0], s, n) - n.alpha * jnp.expm1(-h) * total


# ---- the loop ----

Replace = Callable[[Picture, Station, Callable[[int], Picture]], Picture]
"""(x, station, noise) -> x: a change at a station that was reached, given fresh noise by its number."""


def solve(*args: Any, **settings: Any) -> Picture:
    """x alone of `solve_checked`."""
    return solve_checked(*args, **settings)[0]


def solve_checked(
    solver: Solver,
    denoise: Denoise,
    path: Path,
    levels: Levels,
    steps: Int[Array, ""] | int,
    x: Picture,
    keys: Array,
    condition: Any = None,
    begin: Int[Array, ""] | int = 0,
    callback: Callable[[Int[Array, ""], Picture], None] | None = None,
    replace: Replace | None = None,
    repeats: Int[Array, ""] | int = 1,
) -> tuple[Picture, Int[Array, ""]]:
    """x taken from station `begin` to station `steps`; and the first step that left values that are not finite, or -1.

    Args:
      x: at station `begin`: noise of `prior`, or a picture with noise of its level added.
      keys: one for each example, (B,): all randomness of an example is its own key's.
      callback: called on the host with (step, x) after each step.
      replace: changes x at each station it comes to: for inpainting.
      repeats: how often each step is taken with `replace`, with noise back to its beginning in between (Lugmayr et al.
        2022, algorithm 1).
    """
    begin, steps = jnp.asarray(begin, jnp.int32), jnp.asarray(steps, jnp.int32)

    def one(carry):
        i, x, history, bad = carry

        def pass_of(number):
            """The step, and its change, with noise of its own in each pass."""

            def noise(k: int) -> Picture:
                own = jax.vmap(lambda key: jax.random.fold_in(jax.random.fold_in(key, i), k + 1000 * number))
                return normals(own(keys), x)

            return Move(denoise, path, condition, levels, i, begin, steps, noise, alone=replace is not None)

        if replace is None:
            x, history = solver.step(x, history, pass_of(0))
        else:

            def again(number, now):
                x, _ = now
                move = pass_of(number)
                s, n = move.station(), move.station(1)
                kept = s.alpha / n.alpha
                noisier = kept * x + jnp.sqrt(jnp.maximum(s.sigma**2 - (kept * n.sigma) ** 2, 0)) * move.noise(101)
                x = jnp.where(number > 0, noisier, x).astype(x.dtype)
                x, new = solver.step(x, history, move)
                return replace(x, n, lambda k: move.noise(102 + k)).astype(x.dtype), solver.changed(new)

            x, history = jax.lax.fori_loop(0, repeats, again, (x, history))
        if callback is not None:
            jax.debug.callback(callback, i + 1, x)
        bad = jnp.where((bad < 0) & ~jnp.isfinite(x).all(), i + 1, bad)
        return i + 1, x, history, bad

    first = begin, x, solver.start(x), jnp.int32(-1)
    return jax.lax.while_loop(lambda carry: carry[0] < steps, one, first)[1::2]


def normals(keys: Array, like: Picture) -> Picture:
    """Unit noise for each example, of its own key."""
    return jax.vmap(lambda key: jax.random.normal(key, like.shape[1:], like.dtype))(keys)


def prior(keys: Array, like: Picture, levels: Levels, begin: Int[Array, ""] | int = 0) -> Picture:
    """The noise that a solver begins with."""
    return levels.sigma[begin] * normals(jax.vmap(lambda key: jax.random.fold_in(key, 1 << 30))(keys), like)
