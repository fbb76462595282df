"""Distances between sets of pictures, as points of a feature space, and scores of one set.

Features are arrays on the host, (N, D). What is quadratic in N runs on the mesh: one side is split over it, and at most
`chunk` x `chunk` distances exist at a time. Sums end in float64 on the host.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxgen.evaluation import whole
from jaxgen.sharding import RULES, Mesh, Sharding

CHUNK = 4096
"""Points of either side whose distances are held at a time."""
KID_SUBSETS, KID_SIZE = 100, 1000
PRECISION_K, DENSITY_K = 3, 5
SPLITS = 10
SIGMA, CMMD_SCALE = 10.0, 1000.0
CLIP_WEIGHT = 2.5

Features = Float[np.ndarray, "N D"]


# --- moments -------------------------------------------------------------------------------------------------------


class Moments(NamedTuple):
    """Of a set of points, in float64."""

    count: float
    mean: Float[np.ndarray, "D"]
    scatter: Float[np.ndarray, "D D"]
    """The sum of (x - mean)(x - mean)^T."""

    @property
    def covariance(self) -> Float[np.ndarray, "D D"]:
        """Unbiased: over count - 1."""
        return self.scatter / max(self.count - 1, 1)

    def merged(self, other: "Moments") -> "Moments":
        """Of both sets together (Chan, Golub & LeVeque 1979, eq. 2.1)."""
        count = self.count + other.count
        if not self.count or not other.count:
            return self if self.count else other
        away = other.mean - self.mean
        mean = self.mean + away * (other.count / count)
        scatter = self.scatter + other.scatter + np.outer(away, away) * (self.count * other.count / count)
        return Moments(count, mean, scatter)


def batch_moments(features: Float[Array, "B D"], weights: Float[Array, "B"]) -> dict[str, Array]:
    """Sums over the batch's examples whose weight is not 0, inside jit, for `moments_of`.

    The scatter is about the batch's own mean, so that float32 loses nothing to features far from 0.
    """
    real = (weights > 0)[:, None]
    x = jnp.where(real, features.astype(jnp.float32), 0)
    count = jnp.sum(real, dtype=jnp.float32)
    mean = jnp.sum(x, 0) / jnp.maximum(count, 1)
    away = jnp.where(real, x - mean, 0)
    scatter = jnp.matmul(away.T, away, precision="highest")
    return {"count": count, "mean": mean, "rest": jnp.sum(away, 0), "scatter": scatter}


def moments_of(part: dict[str, Any]) -> Moments:
    """What `batch_moments` found of a batch, with the mean's rounding taken out."""
    count, mean, rest, scatter = (np.asarray(part[k], np.float64) for k in ("count", "mean", "rest", "scatter"))
    rest = rest / max(float(count), 1)
    return Moments(float(count), mean + rest, scatter - count * np.outer(rest, rest))


def moments(features: Features) -> Moments:
    """Of points on the host."""
    x = np.asarray(features, np.float64)
    mean = x.mean(0)
    return Moments(float(len(x)), mean, (x - mean).T @ (x - mean))


def frechet_distance(a: Moments, b: Moments) -> float:
    """Squared 2-Wasserstein distance of the Gaussians of these moments (Heusel et al. 2017, eq. 6; FID on Inception's
    features):

        |m_a - m_b|^2 + tr(C_a) + tr(C_b) - 2 tr((C_a C_b)^(1/2))

    With C = R R^T, the last trace is the sum of the singular values of R_a^T R_b, which exist for singular covariances
    too. NaN where the moments are not numbers. Fewer points give a larger value: compare equal numbers alone.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"moments of {a.mean.shape} and {b.mean.shape} numbers")
    covariances = a.covariance, b.covariance
    if not all(np.isfinite(x).all() for x in (a.mean, b.mean, *covariances)):
        return float("nan")
    roots = [_root(c) for c in covariances]
    shared = np.linalg.svd(roots[0].T @ roots[1], compute_uv=False).sum() if all(r.size for r in roots) else 0.0
    away = a.mean - b.mean
    return float(away @ away + sum(np.trace(c) for c in covariances) - 2 * shared)


def _root(covariance: Float[np.ndarray, "D D"]) -> Float[np.ndarray, "D R"]:
    """R of the matrix R R^T, a column for each direction in which it is not 0."""
    values, vectors = np.linalg.eigh(covariance)
    kept = values > max(values.max(initial=0), 0) * len(values) * np.finfo(np.float64).eps
    return vectors[:, kept] * np.sqrt(values[kept])


# --- kernels -------------------------------------------------------------------------------------------------------


def kid(
    x: Features,
    y: Features,
    subsets: int = KID_SUBSETS,
    size: int = KID_SIZE,
    seed: int = 0,
    sharding: Sharding | None = None,
) -> tuple[float, float]:
    """Kernel Inception distance (Binkowski et al. 2018, section 4): the unbiased estimate of the squared maximum mean
    discrepancy (Gretton et al. 2012, eq. 3) with k(a, b) = (a . b / D + 1)^3.

    Returns its mean over `subsets` of `size` points each, drawn without replacement, and the standard error of that
    mean as if they were independent. Unbiased: it does not depend on the number of points, and may be negative. Where
    each subset is all points there is one, and the error is NaN.
    """
    size = min(size, len(x), len(y))
    if size < 2:
        raise ValueError("a kernel distance needs two points of each set")
    if size == len(x) == len(y):
        subsets = 1
    random = np.random.default_rng(seed)
    values = []
    for _ in range(subsets):
        a, b = (z[np.sort(random.choice(len(z), size, replace=False))] for z in (x, y))
        same = [_kernel_sum(_cubic, z, z, sharding, own=True) / (size * (size - 1)) for z in (a, b)]
        values.append(sum(same) - 2 * _kernel_sum(_cubic, a, b, sharding) / size**2)
    error = np.std(values, ddof=1) / np.sqrt(subsets) if subsets > 1 else np.nan
    return float(np.mean(values)), float(error)


def cmmd(
    x: Features,
    y: Features,
    sigma: float = SIGMA,
    scale: float = CMMD_SCALE,
    sharding: Sharding | None = None,
    chunk: int = CHUNK,
) -> float:
    """CLIP's maximum mean discrepancy (Jayasumana et al. 2024, section 4): `scale` times the squared one of unit
    vectors with k(a, b) = exp(-|a - b|^2 / (2 sigma^2)).

    The estimate is the biased one, of all pairs, as in the authors' program: 0 for a set and itself.
    """
    x, y = unit(x), unit(y)
    kernel = functools.partial(_gaussian, np.float32(1 / (2 * sigma**2)))
    sums = [_kernel_sum(kernel, a, b, sharding, chunk=chunk) / (len(a) * len(b)) for a, b in ((x, x), (y, y), (x, y))]
    return float(scale * (sums[0] + sums[1] - 2 * sums[2]))


def _cubic(a: Float[Array, "M D"], b: Float[Array, "N D"]) -> Float[Array, "M N"]:
    """(u + 1)^3 - 1. A constant is the same in all three means, which cancel, and would cost digits."""
    u = jnp.matmul(a, b.T, precision="highest") / a.shape[1]
    return u * (3 + u * (3 + u))


def _gaussian(gamma: Any, a: Float[Array, "M D"], b: Float[Array, "N D"]) -> Float[Array, "M N"]:
    """exp(-gamma |a - b|^2) - 1."""
    return jnp.expm1(-gamma * _squared(a, b))


def _kernel_sum(kernel: Callable, x: Features, y: Features, sharding: Sharding | None, own: bool = False,
                chunk: int = CHUNK) -> float:
    """The sum of the kernel over all pairs; `own`: over those of different points of one set."""
    rows = _over(functools.partial(_add, _hashable(kernel), own), np.float32(0), x, y, sharding, chunk)
    return float(rows.astype(np.float64).sum())


def _hashable(kernel: Callable) -> tuple[Callable, float | None]:
    """A kernel as a static argument: partials of equal functions are not equal."""
    return (kernel.func, float(kernel.args[0])) if isinstance(kernel, functools.partial) else (kernel, None)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _add(kernel, own, total, x, y):
    function, value = kernel
    found = function(x.points, y.points) if value is None else function(value, x.points, y.points)
    return total + jnp.sum(jnp.where(_pairs(x, y, own), found, 0), 1)


# --- nearest neighbours --------------------------------------------------------------------------------------------


def precision_recall(
    real: Features, fake: Features, k: int = PRECISION_K, sharding: Sharding | None = None, chunk: int = CHUNK
) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019, eq. 1 and 2).

    Precision is the share of generated points in a ball about a real one that reaches to its k-th nearest real
    neighbour; recall is the same with the sets exchanged.
    """
    real, fake = _centred(real, fake)

    def covered(points, centres):
        counts = _inside(points, centres, _radii(centres, k, sharding, chunk), sharding, chunk, of="y", closed=True)
        return float(np.mean(counts > 0))

    return covered(fake, real), covered(real, fake)


def density_coverage(
    real: Features, fake: Features, k: int = DENSITY_K, sharding: Sharding | None = None, chunk: int = CHUNK
) -> tuple[float, float]:
    """Density and coverage (Naeem et al. 2020, eq. 5 and 6), with the same balls, less their boundary as in the
    authors' program: both are 1 for a set and itself.

    Density is the mean number of real points' balls that a generated point is in, over k, and may exceed 1. Coverage is
    the share of real points with a generated one in their ball.
    """
    real, fake = _centred(real, fake)
    radii = _radii(real, k, sharding, chunk)
    counts = _inside(fake, real, radii, sharding, chunk, of="y", closed=False)
    filled = _inside(real, fake, radii, sharding, chunk, of="x", closed=False)
    return float(counts.astype(np.float64).mean() / k), float(np.mean(filled > 0))


def neighbour_distances(
    points: Features, k: int, sharding: Sharding | None = None, chunk: int = CHUNK
) -> Float[np.ndarray, "N"]:
    """Distance of each point to the k-th nearest of the others."""
    points, _ = _centred(points, points)
    return np.sqrt(_radii(points, k, sharding, chunk))


def _centred(*sets: Features) -> list[Features]:
    """Moved by the mean of the first set: distances stay, and float32 tells more of them."""
    mean = sets[0].mean(0, dtype=np.float64)
    return [(x - mean).astype(np.float32) for x in sets]


def _radii(points: Features, k: int, sharding: Sharding | None, chunk: int) -> Float[np.ndarray, "N"]:
    """Squared distance of each point to the k-th nearest of the others."""
    if len(points) <= k:
        raise ValueError(f"{len(points)} points have no {k}-th neighbours")
    nearest = _over(_nearer, np.full(k, np.inf, np.float32), points, points, sharding, chunk)
    return nearest[:, -1]


def _inside(points: Features, centres: Features, radii: np.ndarray, sharding: Sharding | None, chunk: int, of: str,
            closed: bool) -> np.ndarray:  # fmt: skip
    """How many of the centres are within the radius (squared), of either the centre ("y") or the point ("x")."""
    own = {"x_extra" if of == "x" else "y_extra": radii}
    return _over(functools.partial(_count, of, closed), np.int32(0), points, centres, sharding, chunk, **own)


@jax.jit
def _nearer(best, x, y):
    """The k smallest of those found before and the distances to the piece."""
    found = jnp.where(_pairs(x, y, True), _squared(x.points, y.points), jnp.inf)
    return -jax.lax.top_k(-jnp.concatenate([best, found], 1), best.shape[1])[0]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _count(of, closed, count, x, y):
    distance = _squared(x.points, y.points)
    radius = x.extra[:, None] if of == "x" else y.extra[None]
    # what float32 cannot tell from the boundary is on it
    near = whole.NEAR * (jnp.sum(x.points**2, 1)[:, None] + jnp.sum(y.points**2, 1)[None])
    inside = distance <= radius + near if closed else distance < radius - near
    return count + jnp.sum(inside & _pairs(x, y, False), 1, dtype=jnp.int32)


def _squared(a: Float[Array, "M D"], b: Float[Array, "N D"]) -> Float[Array, "M N"]:
    """|a - b|^2."""
    product = jnp.matmul(a, b.T, precision="highest")
    return jnp.maximum(jnp.sum(a * a, 1)[:, None] + jnp.sum(b * b, 1)[None] - 2 * product, 0)


# --- all pairs, piece by piece -------------------------------------------------------------------------------------


class _Piece(NamedTuple):
    """Some points of a set, on the mesh."""

    points: Any
    number: Any
    """Of each in its set; -1 for padding."""
    extra: Any
    """A number that each brings along."""


def _pairs(x: _Piece, y: _Piece, own: bool) -> Array:
    """Which pairs are of real points; `own`: and not of a point with itself."""
    real = jnp.broadcast_to(y.number[None] >= 0, (x.number.shape[0], y.number.shape[0]))
    return real & (x.number[:, None] != y.number[None]) if own else real


def _over(step: Callable, begin: np.ndarray, x: Features, y: Features, sharding: Sharding | None, chunk: int,
          x_extra: np.ndarray | None = None, y_extra: np.ndarray | None = None) -> np.ndarray:  # fmt: skip
    """For each x, what `step(found, piece of x, piece of y)` makes of `begin` over all pieces of y."""
    if sharding is None:
        sharding = Sharding(Mesh(data=1).build(jax.local_devices()[:1]), RULES)
    rows, columns = whole.whole_rows(sharding, min(chunk, len(x))), min(chunk, len(y))
    results = []
    for piece, count in _pieces(x, x_extra, rows):
        laid = _Piece(*(whole.place(sharding, a, "batch", *(None,) * (a.ndim - 1)) for a in piece))
        found = np.broadcast_to(begin, (rows, *np.shape(begin)))
        found = whole.place(sharding, found, "batch", *(None,) * (found.ndim - 1))
        for other, _ in _pieces(y, y_extra, columns):
            found = step(found, laid, _Piece(*(whole.place(sharding, a, *(None,) * a.ndim) for a in other)))
        results.append(np.asarray(_gathered(found, sharding.replicated))[:count])
    return np.concatenate(results)


@functools.partial(jax.jit, static_argnums=1)
def _gathered(x, replicated):
    return jax.lax.with_sharding_constraint(x, replicated)


def _pieces(points: Features, extra: np.ndarray | None, size: int) -> Iterator[tuple[_Piece, int]]:
    """(piece, how many of its points are real), all of one shape."""
    for first in range(0, len(points), size):
        part = np.asarray(points[first : first + size], np.float32)
        number = np.arange(first, first + len(part), dtype=np.int32)
        own = np.zeros(len(part), np.float32) if extra is None else extra[first : first + size].astype(np.float32)
        yield _Piece(whole.padded(part, size), whole.padded(number, size, -1), whole.padded(own, size)), len(part)


def unit(x: Features) -> Features:
    """Unit vectors."""
    return (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)).astype(np.float32)


# --- scores --------------------------------------------------------------------------------------------------------


def inception_score(probabilities: Float[np.ndarray, "N C"], splits: int = SPLITS) -> tuple[float, float]:
    """exp(E_x KL(p(c | x) || p(c))), with p(c) the mean over the split (Salimans et al. 2016, section 4): its mean and
    standard deviation over `splits` parts of the pictures, in their order."""
    count = len(probabilities)
    splits = min(splits, count)
    values = []
    for i in range(splits):
        p = np.asarray(probabilities[i * count // splits : (i + 1) * count // splits], np.float64)
        mean = p.mean(0)
        ratio = np.log(np.where(p > 0, p, 1)) - np.log(np.where(mean > 0, mean, 1))
        values.append(np.exp(np.mean(np.sum(p * ratio, 1))))
    return float(np.mean(values)), float(np.std(values))


def clip_score(images: Features, texts: Features, weight: float = CLIP_WEIGHT) -> float:
    """The mean of `weight` * max(cos(image, its text), 0) (Hessel et al. 2021, eq. 1)."""
    a, b = (np.asarray(unit(x), np.float64) for x in (images, texts))
    return float(np.mean(weight * np.maximum(np.sum(a * b, 1), 0)))


def merged(parts: Iterable[Moments]) -> Moments:
    """Of all sets together."""
    return functools.reduce(Moments.merged, parts)
