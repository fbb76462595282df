"""Paths, predictions, weightings and guidance against closed forms, in float64."""

import jax
import jax.numpy as jnp
import mixture
import numpy as np
import pytest

from jaxgen.diffusion import guidance
from jaxgen.diffusion.denoiser import Denoiser, noise_of
from jaxgen.diffusion.paths import Cosine, Flow, Interpolant, Linear, Table, VarianceExploding
from jaxgen.diffusion.predictions import X0, Edm, Epsilon, Score, V, Velocity
from jaxgen.diffusion.weightings import (
    P2,
    EdmWeight,
    LogitNormal,
    LogNormal,
    MinSnr,
    Snr,
    Steps,
    Uniform,
    UniformTimes,
    VelocityWeight,
    uniforms,
)
from jaxgen.errors import UserError

pytestmark = pytest.mark.usefixtures("double")
ANGLE = Interpolant(lambda t: 1 - t**2, lambda t: jnp.sqrt(1 - (1 - t**2) ** 2))
PATHS = {
    "linear": Linear(), "cosine": Cosine(), "exploding": VarianceExploding(), "flow": Flow(), "shifted": Flow(3.0),
    "table": Table.linear(100), "zero snr": Table.scaled_linear(100).zero_terminal_snr(), "own": ANGLE,
}  # fmt: skip
PREDICTIONS = [Epsilon(), X0(), V(), Velocity(), Score(), Edm()]
T = np.array([0.02, 0.1, 0.35, 0.5, 0.77, 0.99])


# ---- paths ----


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_time_is_the_inverse_of_the_level(path):
    level = path.level(jnp.asarray(T))
    assert (np.diff(level) > 0).all()
    np.testing.assert_allclose(level, path.sigma(T) / path.alpha(T), rtol=1e-12)
    np.testing.assert_allclose(path.time(level), T, rtol=1e-9)


@pytest.mark.parametrize("kind", ["linear", "cosine", "table", "zero snr", "own"])
def test_variance_is_preserved(kind):
    path = PATHS[kind]
    np.testing.assert_allclose(path.alpha(jnp.asarray(T)) ** 2 + path.sigma(jnp.asarray(T)) ** 2, 1, rtol=1e-12)


def test_linear_solves_its_equation():
    """alpha = exp(-1/2 of the integral of beta), by quadrature; and float32 is exact where sigma is small."""
    path, t = Linear(), 0.6
    s = (np.arange(100_000) + 0.5) / 100_000 * t
    lost = np.mean(0.1 + s * 19.9) * t
    np.testing.assert_allclose(path.alpha(jnp.asarray(t)), np.exp(-lost / 2), rtol=1e-9)
    lost = 1e-6 * 0.1 + 1e-12 * 9.95
    np.testing.assert_allclose(path.sigma(jnp.float32(1e-6)), np.sqrt(-np.expm1(-lost)), rtol=1e-6)


@pytest.mark.parametrize("make", [Table.linear, Table.scaled_linear, Table.cosine], ids=lambda f: f.__name__)
def test_table_is_ddpm_s(make):
    """At step i of N, alpha^2 is the product of 1 - beta up to i, and the label is i."""
    path = make(1000)
    i = np.array([0, 1, 10, 499, 998, 999])
    t = jnp.asarray((i + 1) / 1000, jnp.float32)
    kept = np.cumprod(1 - np.asarray(path.betas))[i]
    np.testing.assert_allclose(path.alpha(t) ** 2, kept, rtol=1e-5)
    np.testing.assert_allclose(path.sigma(t) ** 2, 1 - kept, rtol=1e-5)
    np.testing.assert_array_equal(path.label(t), i)
    assert path.sigma(jnp.zeros(())) == 0


def test_named_tables():
    ddpm, stable = np.asarray(Table.linear().betas), np.asarray(Table.scaled_linear().betas)
    assert (ddpm[0], ddpm[-1]) == (1e-4, 0.02) and stable[-1] == pytest.approx(0.012)
    level = Table.scaled_linear().level(jnp.ones(()))
    np.testing.assert_allclose(level, 14.6146, rtol=1e-4)  # Karras et al. 2022's sigma of Stable Diffusion's last step


def test_zero_terminal_snr():
    """Nothing is left at the end, the first step is kept, and what is between is scaled (Lin et al. 2024)."""
    plain = Table.scaled_linear(1000)
    path, first = plain.zero_terminal_snr(), jnp.asarray(0.001)
    assert path.alpha(jnp.ones(())) == 0 and path.sigma(jnp.ones(())) == 1
    np.testing.assert_allclose(path.alpha(first), plain.alpha(first), rtol=1e-9)
    old = [np.asarray(plain.alpha(jnp.asarray(t))) for t in (0.001, 0.5, 1.0)]
    np.testing.assert_allclose(
        path.alpha(jnp.asarray(0.5)), (old[1] - old[2]) * old[0] / (old[0] - old[2]), rtol=1e-9
    )
    assert path.time(jnp.asarray(jnp.inf)) == 1


def test_flow_shifts_with_the_size():
    """The signal-to-noise ratio of n pixels' mean stays (Esser et al. 2024, eq. 23)."""
    path = Flow().for_size(1024 * 1024, 256 * 256)
    assert path == Flow(4.0)
    np.testing.assert_allclose(path.level(T), 4 * Flow().level(T), rtol=1e-12)


def test_adds_noise_by_example():
    x0, noise = np.random.default_rng(0).standard_normal((2, 3, 4, 4, 1))
    t = jnp.asarray([0.1, 0.5, 0.9])
    found = Linear().add(jnp.asarray(x0), jnp.asarray(noise), t)
    a, s = np.asarray(Linear().alpha(t)), np.asarray(Linear().sigma(t))
    np.testing.assert_allclose(found[1], a[1] * x0[1] + s[1] * noise[1], rtol=1e-12)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Linear(5.0, 1.0), "beta_min is at least 0 and below beta_max; here they are 5 and 1"),
        (lambda: VarianceExploding(0.0), "sigma_min is above 0"),
        (lambda: Flow(-1.0), "shift of a flow is above 0, not -1"),
        (lambda: Table((0.1, 1.0, 0.2)), "betas of a path are above 0 and below 1"),
        (lambda: Epsilon().check(Cosine()), "Cosine leaves nothing of the data at t = 1"),
        (lambda: Epsilon().check(Flow()), r"Flow leaves nothing of the data at t = 1, where Epsilon .*take V\(\)"),
        (lambda: Score().check(PATHS["zero snr"]), "Table leaves nothing of the data"),
    ],
)
def test_mistakes(make, message):
    with pytest.raises(UserError, match=message):
        make()


# ---- predictions ----


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("prediction", PREDICTIONS, ids=mixture.name)
def test_target_gives_the_picture_back(path, prediction):
    rng = np.random.default_rng(0)
    x0, noise = jnp.asarray(rng.standard_normal((2, 6, 3)))
    t = jnp.asarray(T)
    alpha, sigma, x = path.alpha(t), path.sigma(t), path.add(x0, noise, t)
    target = prediction.target(x0, noise, alpha, sigma)
    np.testing.assert_allclose(prediction.denoised(target, x, alpha, sigma), x0, atol=1e-9)
    np.testing.assert_allclose(prediction.output(x0, x, alpha, sigma), target, atol=1e-8)
    np.testing.assert_allclose(noise_of(x0, x, alpha, sigma), noise, atol=1e-9)


def test_definitions():
    """What each F is, from its paper."""
    path, t = Linear(), jnp.asarray([0.4])
    x0, noise = jnp.asarray([[0.3, -1.0]]), jnp.asarray([[0.5, 0.2]])
    a, s = path.alpha(t), path.sigma(t)
    found = [p.target(x0, noise, a, s) for p in PREDICTIONS]
    score = jax.grad(lambda x: jnp.sum(-((x - a * x0) ** 2) / (2 * s**2)))(path.add(x0, noise, t))
    wanted = [noise, x0, a * noise - s * x0, noise - x0, score]
    for one, other in zip(found, wanted, strict=False):
        np.testing.assert_allclose(one, other, rtol=1e-10)


def test_edm_is_table_1_of_karras():
    sigma, data = jnp.asarray([0.01, 0.5, 40.0]), 0.5
    c_in, skip, out = Edm(data).coefficients(jnp.ones(3), sigma)
    root = np.sqrt(sigma**2 + data**2)
    np.testing.assert_allclose(c_in, 1 / root)
    np.testing.assert_allclose(skip, data**2 / root**2)
    np.testing.assert_allclose(out, sigma * data / root)
    path = VarianceExploding()
    np.testing.assert_allclose(Edm().label(path, path.time(sigma)), np.log(sigma) / 4)
    # inputs and targets have variance 1 on any path
    x0, noise = jnp.asarray(np.random.default_rng(0).standard_normal((2, 200_000, 1)))
    x0 = data * x0
    for path in (VarianceExploding(), Cosine()):
        t = jnp.full(200_000, 0.6)
        a, s = path.alpha(t), path.sigma(t)
        assert np.std(Edm(data).target(x0, noise, a, s)) == pytest.approx(1, abs=0.01)
        assert np.std(Edm(data).coefficients(a, s)[0][:, None] * path.add(x0, noise, t)) == pytest.approx(1, abs=0.01)


def test_learned_variance_is_split_off():
    network = lambda x, label, condition: jnp.concatenate([x, 7 + x], -1)  # noqa: E731
    denoiser, x = Denoiser(network, Linear(), X0()), jnp.ones((2, 3))
    assert denoiser(x, jnp.ones(2)).shape == x.shape
    np.testing.assert_array_equal(denoiser.both(x, jnp.ones(2))[1], 7 + x)


# ---- weightings ----


@pytest.mark.parametrize(
    ("weighting", "of_x0"),
    [
        (Snr(), lambda snr: snr),
        (Snr(1.0), lambda snr: np.maximum(snr, 1)),
        (MinSnr(5.0), lambda snr: np.minimum(snr, 5)),
        (P2(1.0, 0.5), lambda snr: snr / (1 + snr) ** 0.5),
        (EdmWeight(0.5), lambda snr: snr + 4),
    ],
    ids=mixture.name,
)
@pytest.mark.parametrize("prediction", PREDICTIONS, ids=mixture.name)
def test_a_weighting_is_of_the_picture_s_error(weighting, of_x0, prediction):
    """Whatever is predicted, the same error of x0 costs the same."""
    path, t = Linear(), jnp.asarray(T)
    a, s = path.alpha(t), path.sigma(t)
    _, _, out = prediction.coefficients(a, s)
    error = 0.01 / out  # of the output, which is an error of 0.01 of x0
    found = weighting.of_output(out, a, s) * error**2
    np.testing.assert_allclose(found, of_x0(np.asarray((a / s) ** 2)) * 1e-4, rtol=1e-9)


def test_simple_losses():
    """Epsilon's simple loss is SNR weighting; Edm's own weights make the output's error count alike."""
    a, s = Linear().alpha(jnp.asarray(T)), Linear().sigma(jnp.asarray(T))
    np.testing.assert_allclose(VelocityWeight(0).of_output(Velocity().coefficients(a, s)[2], a, s), 1, rtol=1e-9)
    np.testing.assert_allclose(VelocityWeight(2.0).of_x0(a, s), (a + s) ** 2 / 4, rtol=1e-9)
    np.testing.assert_allclose(Snr().of_output(Epsilon().coefficients(a, s)[2], a, s), 1, rtol=1e-9)
    np.testing.assert_allclose(EdmWeight().of_output(Edm().coefficients(a, s)[2], a, s), 1, rtol=1e-9)
    np.testing.assert_array_equal(Uniform().of_output(a, a, s), np.ones(6))


@pytest.mark.parametrize("times", [UniformTimes(), LogitNormal(0.5, 0.7), LogNormal(), Steps(10)], ids=mixture.name)
def test_times_have_their_distribution(times):
    path, u = VarianceExploding(), jnp.asarray((np.arange(20_000) + 0.5) / 20_000)
    t = np.asarray(times.at(u, path))
    assert (np.diff(t) >= 0).all()
    if isinstance(times, LogitNormal):
        logit = np.log(t / (1 - t))
        assert (logit.mean(), logit.std()) == (pytest.approx(0.5, abs=1e-3), pytest.approx(0.7, abs=1e-3))
    elif isinstance(times, LogNormal):
        log = np.log(path.level(jnp.asarray(t)))
        assert (log.mean(), log.std()) == (pytest.approx(-1.2, abs=1e-3), pytest.approx(1.2, abs=1e-3))
    elif isinstance(times, Steps):
        np.testing.assert_allclose(np.unique(t), np.arange(1, 11) / 10)
    else:
        assert (t.mean(), t.max()) == (pytest.approx(0.5, abs=1e-3), pytest.approx(1.0, abs=1e-3))


def test_times_are_spread_over_the_batch():
    """Every eighth of the range has one of eight examples, whatever the key; each alone is uniform."""
    keys = jax.random.split(jax.random.key(0), 4000)
    found = jax.vmap(lambda key: uniforms(key, jnp.arange(8), 8))(keys)
    assert (np.sort(np.floor(found * 8), 1) == np.arange(8)).all()
    for one in found.T:
        assert np.abs(np.sort(one) - (np.arange(4000) + 0.5) / 4000).max() < 0.03


# ---- guidance ----


def conditioned(x, t, condition):
    return condition[:, None] * x + 1.0


def test_classifier_free():
    x, t = jnp.asarray([[1.0, 2.0], [3.0, 4.0]]), jnp.asarray([0.2, 0.8])
    wanted, null = jnp.asarray([2.0, 3.0]), jnp.zeros(2)
    a, b = conditioned(x, t, wanted), conditioned(x, t, null)
    found = guidance.classifier_free(conditioned, null, 4.0)(x, t, wanted)
    np.testing.assert_allclose(found, b + 4 * (a - b))
    np.testing.assert_allclose(guidance.classifier_free(conditioned, null, 1.0)(x, t, wanted), a)
    within = guidance.classifier_free(conditioned, null, 4.0, (0.5, 1.0))(x, t, wanted)
    np.testing.assert_allclose(within, jnp.stack([a[0], found[1]]))
    same = guidance.classifier_free(conditioned, null, 4.0, rescale=1.0)(x, t, wanted)
    np.testing.assert_allclose(same.std(1), a.std(1))


def test_two_scales():
    """none + 3 (picture - none) + 5 (wanted - picture); with one for the picture as guided by the text alone."""
    x, t = jnp.asarray([[1.0, 2.0], [3.0, 4.0]]), jnp.asarray([0.2, 0.8])
    wanted, picture, none = jnp.asarray([2.0, 3.0]), jnp.asarray([0.5, 0.7]), jnp.zeros(2)
    a, b, c = (conditioned(x, t, told) for told in (wanted, picture, none))
    found = guidance.two_scales(conditioned, picture, none, 5.0, 3.0)(x, t, wanted)
    np.testing.assert_allclose(found, c + 3 * (b - c) + 5 * (a - b))
    np.testing.assert_allclose(guidance.two_scales(conditioned, picture, none, 1.0, 1.0)(x, t, wanted), a)
    one = guidance.two_scales(conditioned, picture, none, 5.0, 1.0)(x, t, wanted)
    np.testing.assert_allclose(one, guidance.classifier_free(conditioned, picture, 5.0)(x, t, wanted))
    within = guidance.two_scales(conditioned, picture, none, 5.0, 3.0, (0.5, 1.0))(x, t, wanted)
    np.testing.assert_allclose(within, jnp.stack([a[0], found[1]]))
    same = guidance.two_scales(conditioned, picture, none, 5.0, 3.0, rescale=1.0)(x, t, wanted)
    np.testing.assert_allclose(same.std(1), a.std(1))


def test_autoguidance():
    x, t = jnp.ones((2, 3)), jnp.ones(2)
    found = guidance.autoguidance(lambda x, t, c: 3 * x, lambda x, t, c: 2 * x, 2.5)(x, t, None)
    np.testing.assert_allclose(found, 4.5 * x)


def test_a_classifier_s_guidance_is_bayes_rule():
    """The mixture, guided to its first component by the exact posterior, is denoised as that component alone."""
    path, t = Linear(), jnp.full(5, 0.4)
    alpha, sigma = path.alpha(t[0]), path.sigma(t[0])
    variance = alpha**2 * mixture.SPREADS**2 + sigma**2

    def log_probability(x, t, condition):
        away = x[:, None] - alpha * mixture.MEANS
        log = np.log(mixture.WEIGHTS) - jnp.sum(away**2, -1) / (2 * variance) - jnp.log(variance)
        return jax.nn.log_softmax(log, -1)[:, 0]

    x = jnp.asarray(np.random.default_rng(0).standard_normal((5, 2)))
    found = guidance.classifier(mixture.denoiser(path), log_probability, path, 1.0)(x, t, None)
    alone = mixture.MEANS[0] + alpha * mixture.SPREADS[0] ** 2 / variance[0] * (x - alpha * mixture.MEANS[0])
    np.testing.assert_allclose(found, alone, rtol=1e-9)


def test_likeness_climbs():
    path, x, t = Cosine(), jnp.ones((3, 2)), jnp.full(3, 0.5)
    denoise = lambda x, t, c: 0.5 * x  # noqa: E731
    found = guidance.likeness(denoise, lambda x0, c: x0[:, 0], path, 2.0)(x, t, None)
    step = 2.0 * path.sigma(t[0]) ** 2 / path.alpha(t[0]) * 0.5
    np.testing.assert_allclose(found, 0.5 * x + step * jnp.asarray([1.0, 0.0]))


def test_cuts():
    x = jnp.asarray([[0.1, -3.0, 2.0, 0.5], [0.1, 0.2, 0.3, 0.4]])
    same = lambda x, t, c: x  # noqa: E731
    np.testing.assert_allclose(guidance.within(same)(x, None, None), np.clip(x, -1, 1))
    found = guidance.dynamic(same, share=1.0)(x, None, None)
    np.testing.assert_allclose(found, [x[0] / 3, x[1]])
    low, high = jnp.asarray([0.0, -5.0, 0.0, 0.0]), jnp.asarray([1.0, 3.0, 1.0, 1.0])   # a channel's own
    np.testing.assert_allclose(guidance.within(same, low, high)(x, None, None), np.clip(x, low, high))
    found = guidance.dynamic(lambda x, t, c: 2 * x + 0.5, -1.5, 2.5, share=1.0)(x, None, None)  # told otherwise
    np.testing.assert_allclose(found, jnp.asarray([x[0] / 3, x[1]]) * 2 + 0.5, rtol=1e-6)
