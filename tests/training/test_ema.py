"""The moving average against its closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.errors import UserError
from jaxgen.training.ema import Ema


def run(ema, values):
    """The averages after each of the values of a parameter, from a parameter of 0."""
    average, seen = ema.init({"w": jnp.zeros(2), "hole": None}), []
    update = jax.jit(ema.update)
    for step, value in enumerate(values):
        average = update(average, {"w": jnp.full(2, value, jnp.float32), "hole": None}, step)
        seen.append(float(ema.weights(average)["w"][0]))
    return seen


def test_a_constant_decay_has_the_closed_form():
    d = 0.9
    np.testing.assert_allclose(run(Ema(d, warmup=1.0), [1.0] * 8), 1 - d ** np.arange(1, 9), rtol=1e-5)
    values = [3.0, -1.0, 2.0, 5.0]
    expected = sum((1 - d) * d ** (3 - i) * v for i, v in enumerate(values))
    np.testing.assert_allclose(run(Ema(d, warmup=1.0), values)[-1], expected, rtol=1e-5)


def test_warmup_forgets_the_start():
    # With d_t = (1 + t) / (w + t) in every step, what is left of the start after n steps is the product of the d_t,
    # n! (w - 1)! / (n + w - 1)!.
    left = np.cumprod([(1 + t) / (10 + t) for t in range(20)])
    np.testing.assert_allclose(run(Ema(0.9999), [1.0] * 20), 1 - left, rtol=1e-5)
    assert left[-1] < 1e-6


def test_the_decay_bounds_the_warmup():
    expected, average = [], 0.0
    for t in range(30):
        d = min(0.5, (1 + t) / (4 + t))
        average = d * average + (1 - d) * t
        expected.append(average)
    np.testing.assert_allclose(run(Ema(0.5, warmup=4.0), range(30)), expected, rtol=1e-5)


def test_a_slow_decay_keeps_its_rate_in_float32():
    ema = Ema(0.999999, warmup=1.0)
    after = ema.update({"w": jnp.zeros(())}, {"w": jnp.ones(())}, 10**6)
    np.testing.assert_allclose(after["w"], 1e-6, rtol=1e-5)


def test_the_average_is_a_float32_copy():
    params = {"w": jnp.ones(3, jnp.bfloat16), "n": jnp.arange(2), "hole": None}
    average = Ema().init(params)
    assert average["w"].dtype == jnp.float32 and average["n"].dtype == params["n"].dtype and average["hole"] is None
    assert average["n"].unsafe_buffer_pointer() != params["n"].unsafe_buffer_pointer()
    after = Ema().update(average, {"w": params["w"], "n": params["n"] + 5, "hole": None}, 0)
    assert after["w"].dtype == jnp.float32 and after["n"].tolist() == [5, 6]


@pytest.mark.parametrize(
    "make, words", [(lambda: Ema(1.0), "below 1, not 1.0"), (lambda: Ema(warmup=0.0), "1 or more, not 0.0")]
)
def test_bad_fields_are_told(make, words):
    with pytest.raises(UserError, match=words):
        make()
