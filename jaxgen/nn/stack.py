"""Equal blocks one after the other: parameters stacked along a leading "layers" axis, run as one compiled loop."""

import functools
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
from jaxtyping import Array, PyTree

Remat = Literal["none", "full", "dots"]
"""What the backward pass finds saved: everything, only each block's input, or that and the matrix products."""

POLICIES = {"full": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}


def stacked(init: Callable[[Array], PyTree], depth: int, key: Array) -> PyTree:
    """Boxed parameters of `depth` blocks, each made by `init(key)`."""
    layers = jax.vmap(init)(jax.random.split(key, depth))
    stack = lambda box: box.replace(names=("layers", *box.names))  # noqa: E731
    return jax.tree.map(stack, layers, is_leaf=lambda x: isinstance(x, nn.Partitioned))


def through(
    block: Callable[[PyTree, Any], Any], params: PyTree, x: Any, scan: bool = True, remat: Remat = "none"
) -> Any:
    """x after every block, each `block(its parameters, x) -> x`; x is an array or a tree of them. `scan` False unrolls
    them: longer to compile."""
    if remat != "none":
        block = functools.partial(jax.checkpoint, policy=POLICIES[remat], prevent_cse=not scan)(block)
    if scan:
        return jax.lax.scan(lambda x, layer: (block(layer, x), None), x, params)[0]
    for i in range(jax.tree.leaves(params)[0].shape[0]):
        x = block(jax.tree.map(lambda leaf, i=i: leaf[i], params), x)
    return x
