"""Likelihood and inversion against a mixture of Gaussians, whose density is known."""

import jax
import jax.numpy as jnp
import mixture
import numpy as np
import pytest

from jaxgen.diffusion.denoiser import Denoiser
from jaxgen.diffusion.paths import Cosine, Flow, Linear, VarianceExploding, along
from jaxgen.diffusion.predictions import Edm, Epsilon, V, Velocity
from jaxgen.sampling import grids, solvers
from jaxgen.sampling.likelihood import bits_per_dim, invert, log_likelihood

pytestmark = pytest.mark.usefixtures("double")


def examples(count=32):
    return jnp.asarray(mixture.draw(np.random.default_rng(0), count))


def keys(count):
    return jax.random.split(jax.random.key(0), count)


def denoiser(path, prediction):
    """The mixture's denoiser as a network of a kind, which knows the time by its label."""

    def network(scaled, label, condition):
        t = path.time(jnp.exp(4 * label)) if isinstance(prediction, Edm) else label / 1000
        alpha, sigma = path.alpha(t), path.sigma(t)
        x = scaled / along(prediction.coefficients(alpha, sigma)[0], scaled)
        return prediction.output(mixture.denoiser(path)(x, t), x, alpha, sigma)

    return Denoiser(network, path, prediction)


KINDS = [(Linear(), Epsilon()), (Cosine(), V()), (Flow(), Velocity()), (VarianceExploding(), Edm())]


@pytest.mark.parametrize(("path", "prediction"), KINDS, ids=lambda x: type(x).__name__)
def test_likelihood(path, prediction):
    x0 = examples()
    found = log_likelihood(denoiser(path, prediction), path, x0, keys(32), steps=96, probes=0, low=1e-3)
    # what the mixture's mean adds to the noise of level 1 / gap is left out of the prior
    gap = 1 / min(path.level(jnp.ones(())), 1e4)
    np.testing.assert_allclose(found, mixture.log_density(x0), atol=5e-4 + gap)


def test_probes_are_right_on_average():
    x0 = jnp.broadcast_to(examples(1), (256, 2))
    found = log_likelihood(mixture.denoiser(Linear()), Linear(), x0, keys(256), steps=48)
    error = found.std() / 16
    assert abs(found.mean() - mixture.log_density(x0[:1])[0]) < 4 * error + 3e-3 and error < 0.1


def test_bits_of_uniform_pixels():
    """Pixels that are equally likely to be any of 256 values hold 8 bits, whatever the scale."""
    density = np.log(1 / 2.0) * 12  # of 12 numbers that are uniform from -1 to 1
    np.testing.assert_allclose(bits_per_dim(jnp.asarray([density]), 12), 8)


def test_inversion_comes_back():
    path, steps = Linear(), 200
    levels = grids.Karras(high=60.0, low=0.01).levels(path, steps, steps)
    x0, denoise = examples(), mixture.denoiser(path)
    noise = invert(denoise, path, levels, steps, x0, solver=solvers.Heun())
    back = solvers.solve(solvers.Heun(), denoise, path, levels, steps, noise, keys(32))
    np.testing.assert_allclose(back, x0, atol=0.02)
    assert np.std(noise / levels.sigma[0]) == pytest.approx(1, abs=0.25)
