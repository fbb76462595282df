"""What the tests of diffusion networks share."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from quick import jit
from towers import float64, random_of

from jaxgen.models.conditions import Conditions

LABEL = jnp.asarray([3.0, 741.5])


def normal(seed: int, *shape: int):
    return jax.random.normal(jax.random.key(seed), shape)


def params_of(model, x, told):
    return random_of(model, x, jnp.zeros(x.shape[0]), told)["params"]


@functools.partial(jit, static_argnums=0)
def forward(model, params, x, label, told, key=None):
    return model.apply({"params": params}, x, label, told, key)


def expected_of(reference, model, params, x, label, told):
    """What a reference for one picture gives, for each."""
    p = float64(params)
    given = {name: np.asarray(value) for name, value in vars(told).items() if value is not None}
    given = {name: value if value.dtype.kind in "bi" else np.float64(value) for name, value in given.items()}
    return np.stack([
        reference(model, p, np.float64(x[i]), float(label[i]), **{name: value[i] for name, value in given.items()})
        for i in range(len(x))
    ])  # fmt: skip


class Flat(nn.Module):
    """A network whose conditions are arguments, for helpers that know arrays alone."""

    net: nn.Module
    names: tuple[str, ...]

    @nn.compact
    def __call__(self, x, label, *told):
        return self.net(x, label, Conditions(**dict(zip(self.names, told, strict=True))))


def counted(function, *args) -> float:
    """The compiler's count of operations."""
    return jax.jit(function).lower(*args).cost_analysis()["flops"]
