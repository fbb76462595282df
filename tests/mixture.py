"""The one distribution whose denoiser is known exactly: a mixture of Gaussians, in the plane."""

import jax
import jax.numpy as jnp
import numpy as np

WEIGHTS = np.array([0.5, 0.3, 0.2])
MEANS = np.array([[-0.8, 0.3], [0.7, 0.6], [0.2, -0.9]])
SPREADS = np.array([0.15, 0.25, 0.4])


def constants():
    """New arrays: JAX keeps the format in which it first met one, also from float32 to float64."""
    return np.array(WEIGHTS), np.array(MEANS), np.array(SPREADS)


def denoiser(path):
    """(x (B, 2), t (B,), condition) -> E[x0 | x_t = x]."""

    def denoise(x, t, condition=None):
        weights, means, spreads = constants()
        alpha, sigma = path.alpha(t)[:, None], path.sigma(t)[:, None]
        variance = alpha**2 * spreads**2 + sigma**2
        away = x[:, None] - alpha[..., None] * means
        log = jnp.log(weights) - jnp.sum(away**2, -1) / (2 * variance) - jnp.log(variance)
        each = means + (alpha * spreads**2 / variance)[..., None] * away
        return jnp.sum(jax.nn.softmax(log, -1)[..., None] * each, 1)

    return denoise


def log_density(x, alpha=1.0, sigma=0.0):
    """log p of x_t (B, 2), in nats."""
    weights, means, spreads = constants()
    variance = alpha**2 * spreads**2 + sigma**2
    away = x[:, None] - alpha * means
    log = np.log(weights) - jnp.sum(away**2, -1) / (2 * variance) - jnp.log(2 * np.pi * variance)
    return jax.nn.logsumexp(log, -1)


def draw(rng: np.random.Generator, count: int) -> np.ndarray:
    """Examples of the mixture."""
    kind = rng.choice(3, count, p=WEIGHTS)
    return MEANS[kind] + SPREADS[kind][:, None] * rng.standard_normal((count, 2))


def name(x) -> str:
    """A test's name for a solver, a prediction or a function: the repr of the last is another in every process."""
    return getattr(x, "__name__", None) or repr(x).replace("()", "")
