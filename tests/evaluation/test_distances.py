"""Distances between sets of features, against float64 NumPy and closed forms; in pieces and on a mesh as whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from jaxgen.evaluation import distances
from jaxgen.evaluation.distances import Moments, moments
from jaxgen.sharding import RULES, Mesh, Sharding

RNG = np.random.default_rng(0)
MIX = RNG.normal(size=(5, 5))
REAL = (RNG.normal(size=(61, 5)) @ MIX + 3).astype(np.float32)
FAKE = (1.3 * RNG.normal(size=(47, 5)) @ MIX + 3.5).astype(np.float32)
LAYOUTS = [("one", 4096), ("one", 16), ("mesh", 16), ("mesh", 4096)]


def sharding(which):
    if which == "one":
        return None
    return Sharding(Mesh(data=2, fsdp=2, tensor=2).build(jax.devices()[:8]), RULES)


def apart(x, y):
    """Distances of all pairs, a pair at a time, in float64."""
    x, y = np.float64(x), np.float64(y)
    return np.array([[np.sqrt(np.sum((a - b) ** 2)) for b in y] for a in x])


# --- moments -------------------------------------------------------------------------------------------------------


@jax.jit
def summed(x, weights):
    return distances.batch_moments(x, weights)


@pytest.mark.parametrize("which", ["one", "mesh"])
@pytest.mark.parametrize("far", [0, 1e4])
def test_moments_of_a_stream_are_those_of_the_whole(which, far):
    """Also of features far from 0, where plain sums of squares in float32 are lost; weights of 0 do not count."""
    random = np.random.default_rng(1)
    x = np.float32(random.normal(size=(64, 4)) * [1, 0.5, 2, 1] + far)
    weights = np.float32(random.random(64) < 0.8)
    place = sharding(which)
    found = Moments(0, np.zeros(4), np.zeros((4, 4)))
    for first in range(0, 64, 16):
        part = [np.asarray(a[first : first + 16]) for a in (x, weights)]
        if place is not None:
            part = [jax.device_put(a, place.named(("batch", None)[: a.ndim])) for a in part]
        found = found.merged(distances.moments_of(jax.device_get(summed(*part))))
    kept = np.float64(x[weights > 0])
    np.testing.assert_allclose(found.mean, kept.mean(0), rtol=1e-9, atol=1e-7)
    np.testing.assert_allclose(found.covariance, np.cov(kept.T), rtol=1e-5, atol=1e-5)
    assert found.count == len(kept) < 64
    whole = moments(kept)
    np.testing.assert_allclose(whole.covariance, np.cov(kept.T), rtol=1e-10)


def test_merging_in_any_order_and_with_nothing():
    parts = [moments(REAL[:20]), moments(REAL[20:21]), moments(REAL[21:])]
    nothing = Moments(0, np.zeros(5), np.zeros((5, 5)))
    for order in (parts, parts[::-1], [nothing, *parts, nothing]):
        found = distances.merged(order)
        np.testing.assert_allclose(found.mean, REAL.mean(0, dtype=np.float64), rtol=1e-12)
        np.testing.assert_allclose(found.covariance, np.cov(np.float64(REAL).T), rtol=1e-10)


def by_sqrtm(a, b):
    """Heusel et al. 2017, eq. 6, as it stands."""
    away = a.mean - b.mean
    root = scipy.linalg.sqrtm(a.covariance @ b.covariance)
    return away @ away + np.trace(a.covariance + b.covariance - 2 * root.real)


def test_frechet_distance():
    a, b = moments(REAL), moments(FAKE)
    assert distances.frechet_distance(a, b) == pytest.approx(by_sqrtm(a, b), rel=1e-9)
    assert distances.frechet_distance(a, b) == pytest.approx(distances.frechet_distance(b, a), rel=1e-12)
    assert abs(distances.frechet_distance(a, a)) < 1e-10
    assert distances.frechet_distance(a, b) > 1


def test_frechet_distance_of_two_gaussians():
    """With covariances that commute, |m - n|^2 + the sum of (s_i - t_i)^2."""
    random = np.random.default_rng(2)
    basis = np.linalg.qr(random.normal(size=(6, 6)))[0]
    s, t = np.array([2, 1, 0.5, 0.1, 0, 0]), np.array([1, 1, 0, 3, 0.2, 0])   # of which some are 0 in either
    m, n = random.normal(size=(2, 6))
    a, b = (Moments(11.0, mean, 10 * basis @ np.diag(x**2) @ basis.T) for mean, x in ((m, s), (n, t)))
    assert distances.frechet_distance(a, b) == pytest.approx(np.sum((m - n) ** 2) + np.sum((s - t) ** 2), abs=1e-7)
    assert abs(distances.frechet_distance(a, a)) < 1e-10


def test_frechet_distance_of_fewer_points_than_features():
    """Singular covariances: the trace is the sum over the roots of the eigenvalues of the product."""
    x, y = np.random.default_rng(3).normal(size=(2, 7, 40))
    a, b = moments(x), moments(y)
    roots = np.sqrt(np.clip(np.linalg.eigvals(a.covariance @ b.covariance).real, 0, None))
    expected = np.sum((a.mean - b.mean) ** 2) + np.trace(a.covariance + b.covariance) - 2 * roots.sum()
    assert distances.frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)
    assert abs(distances.frechet_distance(a, a)) < 1e-9
    alone = moments(np.ones((3, 4)))
    assert distances.frechet_distance(alone, moments(np.zeros((5, 4)))) == 4


def test_moments_that_are_no_numbers():
    broken = moments(np.where(np.arange(5) == 2, np.nan, REAL))
    assert np.isnan(distances.frechet_distance(moments(REAL), broken))
    with pytest.raises(ValueError, match="moments of"):
        distances.frechet_distance(moments(REAL), moments(REAL[:, :3]))


# --- kernels -------------------------------------------------------------------------------------------------------


def unbiased(x, y):
    """Binkowski et al. 2018, eq. 4, with the cubic kernel, a pair at a time."""

    def k(a, b):
        return (np.float64(a) @ np.float64(b) / len(a) + 1) ** 3

    m, n = len(x), len(y)
    xx = sum(k(x[i], x[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    yy = sum(k(y[i], y[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    return xx + yy - 2 * sum(k(a, b) for a in x for b in y) / (m * n)


@pytest.mark.parametrize("which", ["one", "mesh"])
def test_kid(which):
    """Of all points where a subset is that large, and over subsets its mean and standard error."""
    x, y = REAL[:20] - 3, FAKE[:20] - 3
    value, error = distances.kid(x, y, subsets=3, sharding=sharding(which))
    assert value == pytest.approx(unbiased(x, y), rel=1e-5) and np.isnan(error)
    value, error = distances.kid(x, y, subsets=4, size=9, seed=5, sharding=sharding(which))
    random, each = np.random.default_rng(5), []
    for _ in range(4):
        a, b = (z[random.choice(20, 9, replace=False)] for z in (x, y))
        each.append(unbiased(a, b))
    assert value == pytest.approx(np.mean(each), rel=1e-5)
    assert error == pytest.approx(np.std(each, ddof=1) / 2, rel=1e-4)


def test_kid_of_one_distribution_is_nothing_on_the_average():
    x = np.float32(np.random.default_rng(4).normal(size=(2000, 3)))
    value, error = distances.kid(x[:1000], x[1000:], subsets=30, size=50)
    assert abs(value) < 4 * error < 0.2
    with pytest.raises(ValueError, match="two points"):
        distances.kid(x[:1], x)


@pytest.mark.parametrize(("which", "chunk"), LAYOUTS)
def test_cmmd(which, chunk):
    """1000 times the biased estimate with exp(-|a - b|^2 / 200) of unit vectors."""
    a, b = (np.float64(x) / np.linalg.norm(np.float64(x), axis=1, keepdims=True) for x in (REAL, FAKE))
    xx, yy, xy = (np.exp(-(apart(*pair) ** 2) / 200).mean() for pair in ((a, a), (b, b), (a, b)))
    found = distances.cmmd(REAL, FAKE, sharding=sharding(which), chunk=chunk)
    assert found == pytest.approx(1000 * (xx + yy - 2 * xy), rel=2e-4) and found > 0.01
    assert abs(distances.cmmd(REAL, 2 * REAL, sharding=sharding(which), chunk=chunk)) < 1e-5


# --- nearest neighbours --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("which", "chunk"), LAYOUTS)
def test_neighbour_distances(which, chunk):
    found = distances.neighbour_distances(REAL, 3, sharding(which), chunk)
    np.testing.assert_allclose(found, np.sort(apart(REAL, REAL), 1)[:, 3], rtol=1e-4)


@pytest.mark.parametrize(("which", "chunk"), LAYOUTS)
def test_precision_recall(which, chunk):
    def covered(points, centres):
        radii = np.sort(apart(centres, centres), 1)[:, 3]
        return np.mean([any(d <= r for d, r in zip(row, radii, strict=True)) for row in apart(points, centres)])

    found = distances.precision_recall(REAL, FAKE, 3, sharding(which), chunk)
    assert found == pytest.approx((covered(FAKE, REAL), covered(REAL, FAKE)))
    assert 0 < found[0] < found[1] < 1


@pytest.mark.parametrize(("which", "chunk"), LAYOUTS)
def test_density_coverage(which, chunk):
    radii, far = np.sort(apart(REAL, REAL), 1)[:, 5], apart(FAKE, REAL)
    density = np.mean([sum(d < r for d, r in zip(row, radii, strict=True)) for row in far]) / 5
    coverage = np.mean([min(column) < r for column, r in zip(far.T, radii, strict=True)])
    found = distances.density_coverage(REAL, FAKE, 5, sharding(which), chunk)
    assert found == pytest.approx((density, coverage))
    assert 0 < density != coverage < 1


@pytest.mark.parametrize(("which", "chunk"), [("one", 4096), ("mesh", 16)])
def test_a_set_and_itself_and_sets_far_apart(which, chunk):
    place = sharding(which)
    assert distances.precision_recall(REAL, REAL, 3, place, chunk) == (1, 1)
    assert distances.density_coverage(REAL, REAL, 5, place, chunk) == pytest.approx((1, 1))
    assert distances.precision_recall(REAL, REAL + 1000, 3, place, chunk) == (0, 0)
    assert distances.density_coverage(REAL, REAL + 1000, 5, place, chunk) == (0, 0)


def test_too_few_points():
    with pytest.raises(ValueError, match="3 points have no 3-th neighbours"):
        distances.precision_recall(REAL[:3], FAKE)


# --- scores --------------------------------------------------------------------------------------------------------


def test_inception_score():
    p = np.random.default_rng(5).dirichlet(np.full(6, 0.3), 23)
    p[3] = np.eye(6)[2]   # a probability of 0 adds nothing
    values = []
    for i in range(4):
        part = p[i * 23 // 4 : (i + 1) * 23 // 4]
        terms = [sum(a * np.log(a / m) for a, m in zip(row, part.mean(0), strict=True) if a > 0) for row in part]
        values.append(np.exp(np.mean(terms)))
    assert distances.inception_score(p, 4) == pytest.approx((np.mean(values), np.std(values)), rel=1e-9)
    assert distances.inception_score(np.full((20, 6), 1 / 6)) == pytest.approx((1, 0))
    assert distances.inception_score(np.tile(np.eye(6), (10, 1))[:60], 10) == pytest.approx((6, 0))


def test_clip_score():
    images, texts = np.float32([[2, 0], [0, 3], [1, 0], [1, 1]]), np.float32([[5, 0], [0, -1], [1, 1], [1, 0]])
    assert distances.clip_score(images, texts) == pytest.approx(2.5 * (1 + 0 + 0.5**0.5 + 0.5**0.5) / 4)


def test_within_jit_and_float32():
    found = summed(jnp.asarray(REAL), jnp.ones(len(REAL)))
    assert {k: x.dtype for k, x in found.items()} == dict.fromkeys(found, jnp.float32)
