"""Every solver against the denoiser of a Gaussian mixture, which is known exactly."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import mixture
import numpy as np
import pytest
from jax import jit

from jaxgen.diffusion.denoiser import Denoiser
from jaxgen.diffusion.paths import Cosine, Flow, Linear, Path, Table, VarianceExploding, along
from jaxgen.diffusion.predictions import X0, Edm, Epsilon, Prediction, Score, V, Velocity
from jaxgen.sampling import grids, solvers
from jaxgen.sampling.grids import Levels

pytestmark = pytest.mark.usefixtures("double")
PATHS = {
    "linear": Linear(), "cosine": Cosine(), "exploding": VarianceExploding(), "flow": Flow(), "shifted": Flow(3.0),
    "table": Table.linear(1000),
}  # fmt: skip
PREDICTIONS = [Epsilon(), X0(), V(), Velocity(), Score(), Edm()]
ORDERS = [
    (solvers.Ddim(), 1), (solvers.Euler(), 1), (solvers.Heun(), 2), (solvers.Heun("straight"), 2),
    (solvers.EdmStochastic(churn=0.0), 2), (solvers.DpmPP2M(), 2), (solvers.DpmPP2S(), 2), (solvers.DpmPP3M(), 3),
    (solvers.UniPC(1), 2), (solvers.UniPC(2), 3), (solvers.UniPC(3), 4),  # the corrector adds one
    (solvers.Deis(1), 1), (solvers.Deis(2), 2), (solvers.Deis(3), 3),
]  # fmt: skip
STOCHASTIC = [
    solvers.Ddim(1.0), solvers.Ddpm("small"), solvers.Ddpm("large"), solvers.EulerAncestral(), solvers.DpmPP2MSde(),
    solvers.EdmStochastic(churn=20.0, noise_scale=1.0),
]  # fmt: skip
PATHLESS = [solver for solver in STOCHASTIC if solver != solvers.Ddpm("large")] + [solvers.Consistency()]
"""All but that whose variance is the path's own."""


def spread(path, steps, high=3.0, low=0.3):
    """Levels equally spread in log(sigma / alpha), the last of which has noise left."""
    t = path.time(jnp.asarray(np.geomspace(high, low, steps + 1)))
    return Levels(t, path.alpha(t), path.sigma(t))


def eased(path, steps, size):
    """The same ends, with steps that are of order 1 / steps in the middle and of order 1 / steps^2 at both ends, where
    solvers of several steps take lower orders: these then limit nothing up to order 4. `size` + 1 stations."""
    share = jnp.minimum(jnp.arange(size + 1) / steps, 1.0)
    t = path.time(3.0 * 0.1 ** (share**2 * (3 - 2 * share)))
    return Levels(t, path.alpha(t), path.sigma(t))


def keys(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


def start(path, levels, count=16):
    """Noisy examples of the mixture at the first station; the same on each path but for alpha."""
    rng = np.random.default_rng(0)
    x0, noise = mixture.draw(rng, count), rng.standard_normal((count, 2))
    return levels.alpha[0] * (x0 + levels.sigma[0] / levels.alpha[0] * noise)


@functools.partial(jit, static_argnums=(0, 1))
def solved(solver, path, levels, steps):
    return solvers.solve(solver, mixture.denoiser(path), path, levels, steps, start(path, levels), keys(16))


@functools.cache
def exact(path):
    """Where the ODE leads, by 4,096 steps of Heun's method with Richardson's extrapolation."""
    ends = [solved(solvers.Heun(), path, eased(path, steps, 4096), steps) for steps in (2048, 4096)]
    return np.asarray(ends[1] + (ends[1] - ends[0]) / 3)


@pytest.mark.parametrize(("solver", "order"), ORDERS, ids=mixture.name)
def test_order(solver, order):
    """Twice the steps divide the error by 2 to the power of the order."""
    path = Linear()
    errors = [np.abs(solved(solver, path, eased(path, n, 256), n) - exact(path)).mean() for n in (128, 256)]
    assert np.log2(errors[0] / errors[1]) > order - 0.25, errors
    assert errors[1] < 0.02


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("prediction", PREDICTIONS, ids=mixture.name)
def test_predictions_change_nothing(path, prediction):
    """The mixture's denoiser as a network of each kind, on each path."""
    levels, denoise = spread(path, 8), mixture.denoiser(path)

    def network(scaled, label, t):
        alpha, sigma = path.alpha(t), path.sigma(t)
        x = scaled / along(prediction.coefficients(alpha, sigma)[0], scaled)
        return prediction.output(denoise(x, t), x, alpha, sigma)

    x, t = start(path, levels), jnp.full(16, levels.t[2])
    np.testing.assert_allclose(Denoiser(network, path, prediction)(x, t, t), denoise(x, t), atol=1e-9)


class EveryPrediction(Prediction):
    """Of example i the kind i, and so on in turn."""

    def _own(self, numbers):
        """(B,) of each kind's numbers."""
        numbers = jnp.stack(numbers)
        i = jnp.arange(numbers.shape[1])
        return numbers[i % len(PREDICTIONS), i]

    def coefficients(self, alpha, sigma):
        kinds = zip(*(kind.coefficients(alpha, sigma) for kind in PREDICTIONS), strict=True)
        return tuple(map(self._own, kinds))

    def label(self, path, t):
        return self._own([kind.label(path, t) for kind in PREDICTIONS])


@dataclasses.dataclass(frozen=True, eq=False)
class EveryPath(Path):
    """The path of a number, which may be traced."""

    number: Any

    def _own(self, of, x):
        return jnp.stack([of(path, x) for path in PATHS.values()])[self.number]

    def alpha(self, t):
        return self._own(lambda path, t: path.alpha(t), t)

    def sigma(self, t):
        return self._own(lambda path, t: path.sigma(t), t)

    def time(self, level):
        return self._own(lambda path, level: path.time(level), level)

    def label(self, t):
        return self._own(lambda path, t: path.label(t), t)

    def time_told(self, label):
        """The time, by the path's label alone."""

        def of(path, label):
            if isinstance(path, Flow):   # which tells sigma
                return label / (1000 * path.shift - (path.shift - 1) * label)
            return (label + 1) / 1000 if isinstance(path, Table) else label / 1000

        return self._own(of, label)


def every_network(path: EveryPath):
    """The mixture's denoiser as a network of each kind, which knows no more than a network is told."""
    kinds = EveryPrediction()

    def network(scaled, label, condition):
        t = path.time_told(label)
        for i, kind in enumerate(PREDICTIONS):   # EDM's tells the noise level
            if isinstance(kind, Edm):
                t = jnp.where(jnp.arange(len(t)) % len(PREDICTIONS) == i, path.time(jnp.exp(4 * label)), t)
        alpha, sigma = path.alpha(t), path.sigma(t)
        x = scaled / along(kinds.coefficients(alpha, sigma)[0], scaled)
        return kinds.output(mixture.denoiser(path)(x, t), x, alpha, sigma)

    return Denoiser(network, path, kinds)


@pytest.mark.parametrize("solver", [*(s for s, _ in ORDERS), *PATHLESS], ids=mixture.name)
def test_paths_and_predictions_change_nothing(solver):
    """From the same noise levels each path goes the same way, up to alpha, with a network of each kind; and so does a
    stochastic solver, by the same noise."""
    few = [spread(path, 10) for path in PATHS.values()]
    levels = Levels(*map(jnp.stack, zip(*few, strict=True)))
    begin = jnp.repeat(start(Linear(), few[0], 3) / few[0].alpha[0], len(PREDICTIONS), 0)
    own = jnp.repeat(keys(3), len(PREDICTIONS))

    @jit
    @jax.vmap
    def run(number, levels):
        path = EveryPath(number)
        x = solvers.solve(solver, every_network(path), path, levels, 10, levels.alpha[0] * begin, own)
        return x / levels.alpha[-1]

    found = run(jnp.arange(len(PATHS)), levels).reshape(len(PATHS), 3, len(PREDICTIONS), 2)
    wanted = found[0, :, PREDICTIONS.index(X0()), None]
    assert np.ptp(wanted) > 1 and np.abs(wanted).max() < 3
    for kind, x in zip(PATHS, found, strict=True):
        np.testing.assert_allclose(x, jnp.broadcast_to(wanted, x.shape), atol=2e-6, err_msg=kind)


@pytest.mark.parametrize("solver", [*(s for s, _ in ORDERS), *STOCHASTIC, solvers.Consistency()], ids=mixture.name)
@pytest.mark.parametrize("path", [Linear(), Flow(), Cosine(), VarianceExploding()], ids=mixture.name)
def test_ends_at_pictures(solver, path):
    """From pure noise, where some paths leave nothing of the data, to no noise; one step gives the mean."""
    levels = grids.UniformGrid().levels(path, 12, 16)
    denoise = mixture.denoiser(path)
    first = solvers.prior(keys(64), jnp.zeros((64, 2)), levels)
    run = jax.jit(lambda steps, levels: solvers.solve(solver, denoise, path, levels, steps, first, keys(64)))
    found = run(12, levels)
    assert np.isfinite(found).all()
    assert mixture.log_density(found).mean() > -6
    one = run(1, grids.UniformGrid().levels(path, 1, 16))
    np.testing.assert_allclose(one, denoise(first, jnp.ones(64)), atol=1e-9)
    assert run._cache_size() == 1, "another number of steps compiles nothing"


@pytest.mark.parametrize("solver", STOCHASTIC, ids=mixture.name)
def test_marginals(solver):
    """What stochastic solvers draw has the mixture's moments and density."""
    path, count, steps = Linear(), 4000, 200
    levels = grids.Karras(high=30.0, low=0.02).levels(path, steps, steps)
    first = solvers.prior(keys(count), jnp.zeros((count, 2)), levels)
    found = np.asarray(solvers.solve(solver, mixture.denoiser(path), path, levels, steps, first, keys(count)))
    real = mixture.draw(np.random.default_rng(1), 100_000)
    np.testing.assert_allclose(found.mean(0), real.mean(0), atol=0.05)
    np.testing.assert_allclose(np.cov(found.T), np.cov(real.T), atol=0.04)
    assert mixture.log_density(found).mean() == pytest.approx(float(mixture.log_density(real).mean()), abs=0.1)


def test_an_example_is_its_own_key():
    path = Linear()
    levels = grids.UniformGrid().levels(path, 6, 8)

    def run(keys):
        first = solvers.prior(keys, jnp.zeros((len(keys), 2)), levels)
        return solvers.solve(solvers.Ddpm(), mixture.denoiser(path), path, levels, 6, first, keys)

    np.testing.assert_allclose(run(keys(8))[5:6], run(keys(8)[5:6]), atol=1e-12)
