"""Helpers for the tests of image and text models."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import jit

from jaxgen.sharding import RULES, Mesh, Sharding, names_of, unbox


def shapes_of(model, *inputs):
    """Shapes of all variables."""
    return unbox(jax.eval_shape(model.init, jax.random.key(0), *inputs))


def random_of(model, *inputs):
    """Random variables of which none is 0 or 1, so that each one's place matters; matrices keep sizes as they are."""
    random = np.random.default_rng(1)

    def one(path, leaf):
        if path[-1].key in ("scale", "var"):
            return jnp.asarray(random.uniform(0.5, 1.5, leaf.shape), jnp.float32)
        std = max(0.1, math.prod(leaf.shape[:-1]) ** -0.5) if path[-1].key == "kernel" and leaf.ndim == 4 else 0.2
        return jnp.asarray(random.normal(0, std, leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(one, shapes_of(model, *inputs))


def size_of(model, *inputs) -> int:
    """Parameters in all."""
    return sum(x.size for x in jax.tree.leaves(shapes_of(model, *inputs)["params"]))


def float64(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def close(found, expected, tolerance=1e-5):
    """Leaf by leaf, within a share of its largest entry; what is nothing beside the tree's largest (the gradient of a
    key's bias is exactly 0) within a share of that."""
    top = max(np.abs(x).max() for x in jax.tree.leaves(expected))

    def one(a, b):
        np.testing.assert_allclose(a, b, atol=tolerance * max(np.abs(b).max(), 1e-2 * top))

    jax.tree.map(one, found, expected)


def on_mesh(function, model, variables, inputs, **sizes):
    """`function(variables, *inputs)` on a mesh of these sizes, with the variables laid out by their logical names and
    the inputs split along the batch; and how many of the variables are split."""
    devices = math.prod(sizes.values())
    sharding = Sharding(Mesh(**{"data": 1} | sizes).build(jax.devices()[:devices]), RULES)
    names = names_of(jax.eval_shape(model.init, jax.random.key(0), *inputs))
    laid = sharding.tree(shapes_of(model, *inputs), names)
    placed = jax.device_put(variables, laid)
    given = [jax.device_put(x, sharding.named(("batch",) + (None,) * (x.ndim - 1))) for x in inputs]

    def run(variables, *inputs):
        with sharding.use():
            return function(variables, *inputs)

    split = sum(not x.sharding.is_fully_replicated for x in jax.tree.leaves(placed))
    return jit(run)(placed, *given), split
