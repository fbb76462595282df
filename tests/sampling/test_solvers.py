"""Every solver against the denoiser of a Gaussian mixture, which is known exactly."""

import functools

import jax
import jax.numpy as jnp
import mixture
import numpy as np
import pytest

from jaxgen.diffusion.denoiser import Denoiser
from jaxgen.diffusion.paths import Cosine, Flow, Linear, Table, VarianceExploding, along
from jaxgen.diffusion.predictions import X0, Edm, Epsilon, Score, V, Velocity
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
    (solvers.EdmStochastic(churn=0.0), 2), (solvers.DpmPP2M(), 2), (solvers.DpmPP2S(), 2), (solvers.DpmPP3M(), 2),
    (solvers.UniPC(1), 2), (solvers.UniPC(2), 2), (solvers.UniPC(3), 2), (solvers.Deis(2), 2), (solvers.Deis(3), 2),
]  # fmt: skip
"""Those of several steps begin with one of order 1, whose error is of order 2."""
STOCHASTIC = [
    solvers.Ddim(1.0), solvers.Ddpm("small"), solvers.Ddpm("large"), solvers.EulerAncestral(), solvers.DpmPP2MSde(),
    solvers.EdmStochastic(churn=20.0, noise_scale=1.0),
]  # fmt: skip


def spread(path, steps, high=3.0, low=0.3):
    """Levels equally spread in log(sigma / alpha), the last of which has noise left."""
    t = path.time(jnp.asarray(np.geomspace(high, low, steps + 1)))
    return Levels(t, path.alpha(t), path.sigma(t))


def keys(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


def start(path, levels, count=16):
    """Noisy examples of the mixture at the first station; the same on each path but for alpha."""
    rng = np.random.default_rng(0)
    x0, noise = mixture.draw(rng, count), rng.standard_normal((count, 2))
    return levels.alpha[0] * (x0 + levels.sigma[0] / levels.alpha[0] * noise)


@functools.cache
def exact(path):
    """Where the ODE leads, by 4,096 steps of Heun's method with Richardson's extrapolation."""
    ends = []
    for steps in (2048, 4096):
        levels = spread(path, steps)
        run = jax.jit(lambda x, levels=levels, steps=steps: solvers.solve(
            solvers.Heun(), mixture.denoiser(path), path, levels, steps, x, keys(16)))
        ends.append(run(start(path, levels)))
    return np.asarray(ends[1] + (ends[1] - ends[0]) / 3)


@pytest.mark.parametrize(("solver", "order"), ORDERS, ids=mixture.name)
def test_order(solver, order):
    """Twice the steps divide the error by 2 to the power of the order."""
    path, errors = Linear(), []
    for steps in (32, 64):
        levels = spread(path, steps)
        found = solvers.solve(solver, mixture.denoiser(path), path, levels, steps, start(path, levels), keys(16))
        errors.append(np.abs(found - exact(path)).mean())
    assert np.log2(errors[0] / errors[1]) > order - 0.35, errors
    assert errors[1] < 0.05


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


@pytest.mark.parametrize("solver", [s for s, _ in ORDERS if s != solvers.Heun("straight")], ids=mixture.name)
def test_paths_change_nothing(solver):
    """From the same noise levels each path goes the same way, up to alpha."""
    found = {}
    for kind, path in PATHS.items():
        levels = spread(path, 10)
        x = solvers.solve(solver, mixture.denoiser(path), path, levels, 10, start(path, levels), keys(16))
        found[kind] = x / levels.alpha[-1]
    for kind, x in found.items():
        np.testing.assert_allclose(x, found["linear"], atol=2e-6, err_msg=kind)


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
