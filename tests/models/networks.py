"""What the tests of diffusion networks share."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import jit
from towers import close, float64, random_of, shapes_of

from jaxgen.errors import UserError
from jaxgen.models.conditions import Conditions
from jaxgen.sharding import unbox

LABEL = jnp.asarray([3.0, 741.5])


def normal(seed: int, *shape: int):
    return jax.random.normal(jax.random.key(seed), shape)


def params_of(model, x, told=Conditions()):
    """Random parameters of a network, drawn once for all tests."""
    shapes = jax.eval_shape(lambda *inputs: inputs, x, jnp.zeros(len(x)), told)
    leaves, tree = jax.tree.flatten(shapes)
    return _drawn(model, tree, *leaves)


@functools.cache
def _drawn(model, tree, *leaves):
    return random_of(model, *jax.tree.unflatten(tree, leaves))["params"]


@functools.partial(jit, static_argnums=0)
def forward(model, params, x, label, told=Conditions(), key=None, **more):
    return model.apply({"params": params}, x, label, told, key, **more)


def expected_of(reference, model, params, x, label, told, **more):
    """What a reference for one picture gives, for each."""
    p = float64(params)
    given = {name: np.asarray(value) for name, value in (vars(told) | more).items() if value is not None}
    given = {name: value if value.dtype.kind in "bi" else np.float64(value) for name, value in given.items()}
    return np.stack([
        reference(model, p, np.float64(x[i]), float(label[i]), **{name: value[i] for name, value in given.items()})
        for i in range(len(x))
    ])  # fmt: skip


def agrees(reference, model, x, label, told, tolerance):
    """Whether a network gives what a reference does; its result."""
    params = params_of(model, x, told)
    expected = expected_of(reference, model, params, x, label, told)
    assert expected.std() > 0.05
    found = forward(model, params, x, label, told)
    close(found, expected, tolerance)
    return found


def gradient_at_first(model, x, told=Conditions()):
    """The gradient by a network's first parameters, with which the result is nothing, whatever comes."""
    started = unbox(jit(model.init)(jax.random.key(0), x, LABEL, told)["params"])
    assert not np.any(forward(model, started, x, LABEL, told))
    return jit(jax.grad(lambda p: jnp.square(model.apply({"params": p}, x, LABEL, told) - x).sum()))(started)


def agrees_in_bfloat16(model, x, told):
    params = params_of(model, x, told)
    found = forward(model.clone(dtype="bfloat16"), params, x, LABEL, told)
    assert found.dtype == jnp.float32
    close(found, forward(model, params, x, LABEL, told), 0.1)


def counts_its_operations(model, x, told=Conditions(), gradient=True):
    """Whether a network tells what the compiler counts of the unrolled program, within 3 %."""
    label = jnp.zeros(len(x))
    params = shapes_of(model, x, label, told)["params"]
    length = 0 if told.tokens is None else told.tokens.shape[1]
    analytic = len(x) * model.flops_per_example(x.shape[1:], length)

    def total(params, x, told):
        return model.apply({"params": params}, x, label, told).sum()

    for function, times in ((total, 1), (jax.grad(total, argnums=(0, 1)), 3))[: 2 if gradient else 1]:
        counted = jax.jit(function).lower(params, x, told).cost_analysis()["flops"]
        assert counted == pytest.approx(times * analytic, rel=0.03)


def refuses(model, shape, words):
    """Whether sizes that do not fit, or not pictures of this shape, are told of in these words."""
    with pytest.raises(UserError) as caught:
        model.check(shape)
    assert str(caught.value) == words


class Flat(nn.Module):
    """A network whose conditions are arguments, for helpers that know arrays alone."""

    net: nn.Module
    names: tuple[str, ...]

    @nn.compact
    def __call__(self, x, label, *told):
        return self.net(x, label, Conditions(**dict(zip(self.names, told, strict=True))))


def squares(model, variables, *inputs):
    """The mean square of a network's result, and its gradient."""
    return jax.value_and_grad(lambda v: jnp.square(model.apply(v, *inputs)).mean())(variables)
