"""The compiled sampler: what is traced, what a picture depends on, editing; with the exact denoiser of a mixture."""

import dataclasses

import jax
import jax.numpy as jnp
import mixture
import numpy as np
import pytest

from jaxgen.diffusion.denoiser import Model
from jaxgen.diffusion.paths import Flow, Linear
from jaxgen.diffusion.predictions import X0
from jaxgen.errors import UserError
from jaxgen.sampling import grids, solvers
from jaxgen.sampling.diffusion import Edit, Sampling, bucket, generate, interpolate, keys_of

PATH = Linear()


@dataclasses.dataclass(frozen=True)
class Exact:
    """Stands for a network that predicts x0 of the mixture, moved by the condition; counts its traces."""

    poison: float = 2.0
    """The time below which it gives NaN, where the condition is 7."""
    traces = []

    def apply(self, variables, x, label, condition, key=None):
        self.traces.append(x.shape)
        t = label / 1000
        found = mixture.denoiser(PATH)(x, t) * variables["params"]["scale"]
        if condition is None:
            return found
        bad = (condition == 7) & (t < self.poison)
        return jnp.where(bad[:, None], jnp.nan, found + 0.1 * condition[:, None])


PARAMS = {"scale": jnp.float32(1)}


def drawn(sampling=Sampling(steps=8), count=4, seed=0, index=None, model=Model(Exact(), PATH, X0()), **more):
    keys = keys_of(seed, jnp.arange(count) if index is None else jnp.asarray(index))
    x, bad = generate(model, PARAMS, keys, (2,), sampling, **more)
    return np.asarray(x), int(bad)


def told(value, count=4):
    return jnp.full((count,), float(value))


def test_nothing_that_a_person_sweeps_compiles_again():
    Exact.traces.clear()
    start = jnp.zeros((4, 2))
    found = []
    for steps, scale, seed, strength, grid, eta in [
        (5, 2.0, 0, 1.0, grids.UniformGrid(), 0.0),
        (16, 3.5, 1, 0.4, grids.Karras(), 0.5),
        (1, 1e6, 2, 0.0, grids.Exponential(), 1.0),
        (9, 0.0, 3, 0.7, grids.Shifted(2.0), 0.2),
    ]:
        sampling = Sampling(solvers.Ddim(eta), grid, steps, scale, (0.1 * eta, 1.0), 0.3 * eta)
        found.append(drawn(sampling, 4, seed, condition=told(1), null=told(0), edit=Edit(start, strength))[0])
        if len(found) == 1:
            first = len(Exact.traces)
    assert len(Exact.traces) == first > 0
    assert bucket(16) == 16 and bucket(17) == 32
    for a in range(4):
        for b in range(a):
            assert np.abs(found[a] - found[b]).max() > 1e-3  # and yet each of them counts
    drawn(Sampling(solvers.Ddim(0.1), steps=17, guidance=2.0), condition=told(1), null=told(0), edit=Edit(start))
    assert len(Exact.traces) > first


def test_a_picture_depends_on_its_seed_and_number_alone():
    sampling = Sampling(solvers.Ddpm(), steps=8)
    whole = drawn(sampling, 6, seed=3)[0]
    np.testing.assert_allclose(drawn(sampling, index=[4], seed=3)[0][0], whole[4], atol=1e-6)
    np.testing.assert_allclose(drawn(sampling, index=[5, 0], seed=3)[0], whole[[5, 0]], atol=1e-6)
    assert np.abs(drawn(sampling, 6, seed=4)[0] - whole).min() > 1e-4


@pytest.mark.parametrize("solver", [solvers.Ddim(), solvers.DpmPP2M(), solvers.UniPC(), solvers.EdmStochastic()],
                         ids=mixture.name)
def test_one_step_works(solver):
    found, bad = drawn(Sampling(solver, steps=1))
    np.testing.assert_allclose(found, np.tile(mixture.WEIGHTS @ mixture.MEANS, (4, 1)), atol=0.05)  # the mean of all
    assert bad == -1


def test_samples_have_the_mixture_s_moments():
    found = drawn(Sampling(solvers.DpmPP2M(), steps=24), 4000)[0]
    mean = mixture.WEIGHTS @ mixture.MEANS
    spread = mixture.WEIGHTS @ (mixture.MEANS**2 + mixture.SPREADS[:, None] ** 2) - mean**2
    np.testing.assert_allclose(found.mean(0), mean, atol=4 * np.sqrt(spread.max() / 4000))
    np.testing.assert_allclose(found.var(0), spread, rtol=0.08)


def test_guidance():
    """Away from the null: the difference of the two conditions, as often as the scale says."""
    for scale in (1.0, 3.0):
        sampling = Sampling(solvers.Ddim(), steps=1, guidance=scale)
        found = drawn(sampling, condition=told(2), null=told(-1))[0] - drawn(sampling)[0]
        np.testing.assert_allclose(found, -0.1 + scale * 0.3, atol=1e-5)
    outside = Sampling(solvers.Ddim(), steps=1, guidance=3.0, interval=(0.0, 0.5))
    plain = drawn(Sampling(solvers.Ddim(), steps=1))[0]
    np.testing.assert_allclose(drawn(outside, condition=told(2), null=told(-1))[0] - plain, 0.2, atol=1e-5)
    high = drawn(Sampling(steps=8, guidance=1e6, threshold="clip"), condition=told(2), null=told(-1))
    assert np.isfinite(high[0]).all() and high[1] == -1


@pytest.mark.parametrize(("threshold", "value"), [("clip", 1.0), ("dynamic", 1.0), ("none", 90.0)])
def test_thresholds(threshold, value):
    sampling = Sampling(solvers.Ddim(), steps=1, threshold=threshold)
    np.testing.assert_allclose(drawn(sampling, condition=told(900))[0], value, rtol=0.02)


def test_more_guidance_by_a_function():
    def guide(denoise, by):
        return lambda x, t, condition: denoise(x, t, condition) + by

    sampling = Sampling(solvers.Ddim(), steps=1)
    np.testing.assert_allclose(
        drawn(sampling, guide=guide, guide_args=jnp.float32(0.25))[0] - drawn(sampling)[0], 0.25, atol=1e-6
    )


def test_values_that_are_not_finite_are_placed():
    model = Model(Exact(poison=0.6), PATH, X0())
    _, bad = drawn(Sampling(solvers.Ddim(), steps=10), condition=jnp.array([0.0, 7, 0, 0]), model=model)
    assert bad == 6  # 1.0, 0.9, 0.8, 0.7, 0.6, and then 0.5


def test_editing():
    start = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (4, 2)).astype(np.float32))
    np.testing.assert_allclose(drawn(edit=Edit(start, 0.0))[0], start, atol=1e-6)
    sampling = Sampling(solvers.Ddim(), steps=20)
    away = [np.abs(drawn(sampling, edit=Edit(start, s))[0] - start).mean() for s in (0.05, 0.3, 0.9)]
    assert away[0] < away[1] < away[2]


@pytest.mark.parametrize("solver", [solvers.Ddim(), solvers.DpmPP2M(), solvers.UniPC(2), solvers.EulerAncestral()],
                         ids=mixture.name)
@pytest.mark.parametrize("repeats", [1, 10])
def test_inpainting(solver, repeats):
    """One coordinate is kept and the other follows: of the mixture along x = 0.7, 80 % are within 0.5 of y = 0.6."""
    count = 512
    start = jnp.broadcast_to(jnp.array([0.7, 0.0]), (count, 2))
    edit = Edit(start, 1.0, jnp.broadcast_to(jnp.array([0.0, 1.0]), (count, 2)), repeats)
    found = drawn(Sampling(solver, steps=30), count, edit=edit)[0]
    np.testing.assert_allclose(found[:, 0], 0.7, atol=1e-6)
    near = (np.abs(found[:, 1] - 0.6) < 0.5).mean()
    assert abs(near - 0.80) < (0.06 if repeats > 1 else 0.25), near


def test_frames_come_in_order():
    seen = []
    drawn(Sampling(steps=5), callback=lambda step, x: seen.append((int(step), x.shape)))
    jax.effects_barrier()
    assert sorted(seen) == [(k, (4, 2)) for k in range(1, 6)]


def test_between_two_noises():
    a, b = (jnp.asarray(np.random.default_rng(s).standard_normal((3, 400)), jnp.float32) for s in (0, 1))
    b = b * (jnp.linalg.norm(a, axis=1) / jnp.linalg.norm(b, axis=1))[:, None]
    np.testing.assert_allclose(interpolate(a, b, 0.0), a, atol=1e-5)
    np.testing.assert_allclose(interpolate(a, b, 1.0), b, atol=1e-5)
    half = interpolate(a, b, 0.5)
    np.testing.assert_allclose(jnp.linalg.norm(half, axis=1), jnp.linalg.norm(a, axis=1), rtol=1e-5)
    np.testing.assert_allclose(interpolate(a, a, 0.3), a, atol=1e-5)


def test_on_a_mesh():
    from jaxgen.sharding import RULES, Mesh, Sharding

    alone = drawn(Sampling(solvers.Ddpm(), steps=4), 8)[0]
    with Sharding(Mesh(data=8).build(jax.devices()), RULES).use():
        np.testing.assert_allclose(drawn(Sampling(solvers.Ddpm(), steps=4), 8)[0], alone, atol=1e-6)


def test_mistakes():
    for make, said in [
        (lambda: Sampling(steps=0), "at least one step, not 0"),
        (lambda: Sampling(interval=(0.6, 0.2)), "the lower first"),
        (lambda: Sampling(guidance=float("nan")), "guidance scale is nan"),
        (lambda: Edit(jnp.zeros((1, 4, 4, 3)), 1.2), "from 0 to 1, not 1.2"),
        (lambda: Edit(jnp.zeros((1, 4, 4, 3)), 1.0, jnp.zeros((1, 4, 5, 1))), r"\(1, 4, 5, 1\), and the picture wants"),
        (lambda: Edit(jnp.zeros((1, 4, 4, 3)), repeats=0), "at least once"),
    ]:
        with pytest.raises(UserError, match=said):
            make()


def test_the_shift_of_a_flow_is_in_grid_and_path_alike():
    """Sampling with a shifted path at uniform times is sampling with the plain path at shifted times."""
    plain, shifted = Flow(), Flow(3.0)
    t = np.linspace(0.05, 0.95, 7)
    by_grid = grids.Shifted(3.0).at(plain, jnp.asarray(np.arange(10.0)), 10)
    by_path = shifted.sigma(grids.UniformGrid().at(shifted, jnp.asarray(np.arange(10.0)), 10))
    np.testing.assert_allclose(by_grid, by_path, rtol=1e-5)
    np.testing.assert_allclose(shifted.sigma(t) + shifted.alpha(t), 1, rtol=1e-6)
