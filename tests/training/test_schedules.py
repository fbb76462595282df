"""Schedules against their closed forms, at the corners and between."""

import math

import jax
import numpy as np
import pytest

from jaxgen.errors import UserError
from jaxgen.training.schedules import Constant, Cosine, Linear, WarmupStableDecay


def values(schedule, steps, at):
    return [float(schedule(step, steps)) for step in at]


@pytest.mark.parametrize("schedule", [Constant(4), Cosine(4), Linear(4), WarmupStableDecay(4)], ids=repr)
def test_warmup_rises_in_a_line_to_the_peak(schedule):
    np.testing.assert_allclose(values(schedule, 100, range(5)), [0.2, 0.4, 0.6, 0.8, 1.0], rtol=1e-6)


@pytest.mark.parametrize("schedule", [Constant(), Cosine(), Linear(), WarmupStableDecay()], ids=repr)
def test_without_warmup_the_first_step_has_the_peak(schedule):
    assert float(schedule(0, 100)) == 1.0


def test_corners():
    np.testing.assert_allclose(values(Constant(10), 100, [10, 100, 1000]), [1, 1, 1], rtol=1e-6)
    at = [10, 55, 100, 1000]
    np.testing.assert_allclose(values(Cosine(10, 0.2), 100, at), [1, 0.6, 0.2, 0.2], rtol=1e-5)
    np.testing.assert_allclose(values(Linear(10, 0.2), 100, at), [1, 0.6, 0.2, 0.2], rtol=1e-5)
    wsd = WarmupStableDecay(10, decay=0.2, final=0.1)
    x = [80, 85, 95, 100, 1000]
    fall = [1, *(0.1 + 0.9 * (1 - math.sqrt(f)) for f in (0.25, 0.75)), 0.1, 0.1]
    np.testing.assert_allclose(values(wsd, 100, [10, 79, *x]), [1, 1, *fall], rtol=1e-5)
    line = WarmupStableDecay(10, decay=40.0, shape="linear")
    np.testing.assert_allclose(values(line, 100, [59, 60, 70, 100]), [1, 1, 0.75, 0], atol=1e-6)


def test_cosine_is_the_closed_form_everywhere():
    schedule = Cosine(warmup=20, final=0.1)
    steps = np.arange(20, 201)
    expected = 0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * (steps - 20) / 180))
    np.testing.assert_allclose(jax.vmap(lambda s: schedule(s, 200))(steps), expected, atol=1e-6)


@pytest.mark.parametrize("schedule", [Constant(50), Cosine(50), Linear(50), WarmupStableDecay(50)], ids=repr)
def test_a_run_within_the_warmup_is_the_start_of_a_longer_one(schedule):
    short, long = values(schedule, 20, range(20)), values(schedule, 1000, range(20))
    assert short == long and np.isfinite(values(schedule, 50, [49, 50, 51])).all()


def test_a_decay_longer_than_what_follows_the_warmup_starts_at_its_end():
    schedule = WarmupStableDecay(warmup=50, decay=80.0, shape="linear")
    np.testing.assert_allclose(values(schedule, 100, [50, 75, 100]), [1, 0.5, 0], atol=1e-6)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: Cosine(warmup=-1), "warmup is a number of steps, 0 or more, not -1"),
        (lambda: Linear(final=1.5), "final is a fraction of the peak, from 0 to 1, not 1.5"),
        (lambda: WarmupStableDecay(decay=0.0), "decay is a share of the run or a number of steps, not 0.0"),
    ],
)
def test_bad_fields_are_told(make, words):
    with pytest.raises(UserError, match=words):
        make()


def test_an_unknown_shape_is_told():
    with pytest.raises(Exception, match="cubic"):  # by the run-time type check instead, where that is on
        WarmupStableDecay(shape="cubic")
