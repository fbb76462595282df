"""Optimizers as data: frozen dataclasses that build optax transformations."""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from jaxtyping import Array, Float, Int, PyTree

from jaxgen.errors import UserError
from jaxgen.sharding.axes import Names
from jaxgen.training import parameters
from jaxgen.training.schedules import Cosine, Schedule

MATRICES = (r"(^|/)(kernel|embedding)$",)
"""Weight matrices by name: in a stack of scanned layers a vector has two axes too, so their number cannot tell."""

Dtype = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """What all optimizers share: update = -rate (direction(clipped gradient) + weight_decay parameter).

    Weight decay is decoupled from the gradient (Loshchilov & Hutter 2019) and multiplied by the learning rate, as in
    PyTorch. Patterns are regular expressions searched in a parameter's path, such as "blocks/attention/query/kernel";
    one that matches nothing is an error.
    """

    learning_rate: float = 3e-4
    """Peak learning rate."""
    schedule: Schedule = Cosine()
    """Fraction of the peak over the run."""
    weight_decay: float = 0.1
    """Share of a decayed parameter that is taken off in a step, times the learning rate."""
    decay: tuple[str, ...] = ()
    """Patterns of the parameters to decay; () for the matrices: those named `kernel` or `embedding`."""
    clip: float = 1.0
    """Largest global norm of the gradient (Pascanu et al. 2013, algorithm 1); 0 for no clipping."""
    freeze: tuple[str, ...] = ()
    """Patterns of the parameters to leave as they are, with no gradient and no optimizer state."""

    def __post_init__(self):
        for field in ("learning_rate", "adam_learning_rate", "weight_decay", "clip", "clip_update", "rms"):
            if not getattr(self, field, 0.0) >= 0:
                raise UserError(f"optimizer.{field} is 0 or more, not {getattr(self, field)}.")
        for field in ("b1", "b2", "momentum"):
            if not 0 <= getattr(self, field, 0.0) < 1:
                raise UserError(f"optimizer.{field} is at least 0 and below 1, not {getattr(self, field)}.")
        if (dtype := getattr(self, "moment_dtype", "float32")) not in ("float32", "bfloat16"):
            raise UserError(f"optimizer.moment_dtype is 'float32' or 'bfloat16', not '{dtype}'.")

    def rate(self, step: Int[Array, ""] | int, steps: int) -> Float[Array, ""]:
        """Learning rate at a step (0-based) of a run of `steps`."""
        return self.learning_rate * self.schedule(step, steps)

    def transform(self, params: PyTree, steps: int, axes: PyTree | None = None) -> optax.GradientTransformation:
        """The optax transformation for these trainable parameters.

        Args:
            params: arrays or shapes, with None in the place of what is frozen; only names and shapes are read.
            steps: updates in the run, over which the schedule goes. Updates are counted in the optimizer's own state.
            axes: logical axis names (tuples) in a tree of the shape of params, in which "layers" marks the axis of a
                stack of scanned layers; needed by the optimizers that treat a matrix as a whole.
        """
        if not jax.tree.leaves(params):
            raise UserError("The optimizer has nothing to train: optimizer.freeze leaves no parameter.")
        parameters.match(self.decay, params, "optimizer.decay")
        return _chain(
            clip_by_global_norm(self.clip) if self.clip else None,
            self._descent(params, steps, axes),
        )

    def _descent(self, params: PyTree, steps: int, axes: PyTree | None) -> optax.GradientTransformation:
        return self._decayed(self._direction(params, axes), self.learning_rate, steps)

    def _direction(self, params: PyTree, axes: PyTree | None) -> optax.GradientTransformation:
        """Clipped gradients to what is taken off the parameters, but for the learning rate."""
        raise NotImplementedError

    def _decayed(self, direction: optax.GradientTransformation, peak: float, steps: int):
        """The direction with weight decay, times -peak and the schedule."""
        # Found by name at each call, since optax.partition hands over trees in which the others' leaves are masked.
        patterns = self.decay or MATRICES
        return _chain(
            direction,
            optax.add_decayed_weights(self.weight_decay, lambda tree: parameters.search(patterns, tree))
            if self.weight_decay
            else None,
            optax.scale_by_learning_rate(lambda count: peak * self.schedule(count, steps)),
        )


@dataclasses.dataclass(frozen=True)
class AdamW(Optimizer):
    """Adam (Kingma & Ba 2015, algorithm 1) with decoupled weight decay (Loshchilov & Hutter 2019, algorithm 2)."""

    b1: float = 0.9
    """Decay of the gradients' mean."""
    b2: float = 0.95
    """Decay of the squared gradients' mean."""
    eps: float = 1e-8
    """Added to the root of the latter."""
    moment_dtype: Dtype = "float32"
    """Of the gradients' mean, as it is kept."""

    def _direction(self, params, axes):
        return optax.scale_by_adam(self.b1, self.b2, self.eps, mu_dtype=self.moment_dtype)


@dataclasses.dataclass(frozen=True)
class Lion(Optimizer):
    """The sign of a momentum (Chen et al. 2023, arXiv:2302.06675, algorithm 2): a third to a tenth of AdamW's learning
    rate, and as many times its weight decay."""

    learning_rate: float = 1e-4
    weight_decay: float = 0.3
    b1: float = 0.9
    """Share of the momentum in the mean with the gradient whose sign is the step."""
    b2: float = 0.99
    """Decay of the momentum."""
    moment_dtype: Dtype = "float32"
    """Of the momentum, as it is kept."""

    def _direction(self, params, axes):
        return optax.scale_by_lion(self.b1, self.b2, mu_dtype=self.moment_dtype)


@dataclasses.dataclass(frozen=True)
class SGD(Optimizer):
    """Stochastic gradient descent with heavy-ball or Nesterov momentum (Sutskever et al. 2013, in PyTorch's form)."""

    learning_rate: float = 0.1
    weight_decay: float = 0.0
    clip: float = 0.0
    momentum: float = 0.9
    """Decay of the gradients' sum; 0 for none."""
    nesterov: bool = False
    """Look ahead by one step of the momentum."""
    moment_dtype: Dtype = "float32"
    """Of the momentum, as it is kept."""

    def _direction(self, params, axes):
        if not self.momentum:
            return optax.identity()
        return optax.trace(self.momentum, self.nesterov, accumulator_dtype=self.moment_dtype)


@dataclasses.dataclass(frozen=True)
class Adafactor(Optimizer):
    """Second moments of a matrix as one vector for its rows and one for its columns (Shazeer & Stern 2018,
    arXiv:1804.04235, algorithms 4 and 5), with a learning rate relative to each parameter's size.

    Each layer of a scanned stack is treated on its own, as if it were not stacked; weight decay is decoupled.
    """

    learning_rate: float = 1e-2
    weight_decay: float = 0.0
    clip: float = 0.0
    decay_rate: float = 0.8
    """The second moments' decay in step t is 1 - t^-decay_rate (section 7.2)."""
    clip_update: float = 1.0
    """Largest root mean square of one parameter's update (section 6); 0 for no such clipping."""
    relative: bool = True
    """Scale each update by the root mean square of its parameter, 1e-3 at least (section 8)."""
    momentum: float = 0.0
    """Decay of the updates' mean; 0 for none."""
    min_factored: int = 128
    """Factor where the two largest axes have at least this size."""
    eps: float = 1e-30
    """Added to the squared gradients."""
    moment_dtype: Dtype = "float32"
    """Of the momentum, as it is kept."""

    def _direction(self, params, axes):
        direction = _chain(
            optax.scale_by_factored_rms(True, self.decay_rate, 0, self.min_factored, self.eps),
            optax.clip_by_block_rms(self.clip_update) if self.clip_update else None,
            optax.scale_by_param_block_rms() if self.relative else None,
            optax.ema(self.momentum, debias=False, accumulator_dtype=self.moment_dtype) if self.momentum else None,
        )
        return _by_layer(direction, params, axes)


@dataclasses.dataclass(frozen=True)
class Muon(Optimizer):
    """Momentum orthogonalised by Newton-Schulz iterations (Jordan et al. 2024, kellerjordan.github.io/posts/muon) for
    the matrices, AdamW for embeddings, the head, norms and biases.

    A matrix is a `kernel` that does not produce the vocabulary. Its axes other than "layers" and "expert" are taken as
    inputs by outputs: the first by the rest where the first is "embed" (query: embed by heads x head_dim), else all but
    the last by the last (attention's output: heads x head_dim by embed; a convolution: window x inputs by outputs).
    The momentum is optax's: with Nesterov, and corrected for its start as in Adam.
    """

    learning_rate: float = 0.02
    """Peak learning rate of the matrices."""
    adam_learning_rate: float = 3e-4
    """Peak learning rate of all else, on the same schedule."""
    weight_decay: float = 0.01
    adam: tuple[str, ...] = ()
    """Patterns of further parameters that AdamW takes."""
    momentum: float = 0.95
    """Decay of the matrices' mean gradient."""
    nesterov: bool = True
    """Look ahead by one step of the momentum."""
    iterations: int = 5
    """Newton-Schulz iterations."""
    rms: float = 0.0
    """Scale updates by rms sqrt(max(inputs, outputs)), their root mean square then being about `rms` for any shape: 0.2
    gives them AdamW's size, to be used with AdamW's learning rate and weight decay (Liu et al. 2025, arXiv:2502.16982).
    0 for Jordan's sqrt(max(1, outputs / inputs))."""
    b1: float = 0.9
    """AdamW's."""
    b2: float = 0.95
    """AdamW's."""
    eps: float = 1e-8
    """AdamW's."""
    moment_dtype: Dtype = "float32"
    """Of the momentum and of AdamW's first moment, as they are kept."""

    def _descent(self, params, steps, axes):
        matrices = self._matrices(params, axes)

        def scale(leaf, dims):
            inputs, outputs = (math.prod(leaf.shape[i] for i in side) for side in dims)
            return self.rms * math.sqrt(max(inputs, outputs)) if self.rms else math.sqrt(max(1.0, outputs / inputs))

        def is_dims(x):
            return isinstance(x, optax.contrib.MuonDimensionNumbers)

        if not any(map(is_dims, jax.tree.leaves(matrices, is_leaf=is_dims))):
            raise UserError("Muon found no matrix (a parameter named kernel) to train; AdamW would be right here.")
        # optax.partition puts a MaskedNode where a leaf is not its own; so do these trees, to be of the same shape.
        dims = jax.tree.map(lambda d: d if is_dims(d) else optax.MaskedNode(), matrices, is_leaf=is_dims)
        scales = jax.tree.map(lambda p, d: scale(p, d) if is_dims(d) else optax.MaskedNode(), params, matrices)
        muon = _chain(
            optax.contrib.scale_by_muon(
                ns_steps=self.iterations,
                beta=self.momentum,
                nesterov=self.nesterov,
                mu_dtype=self.moment_dtype,
                weight_dimension_numbers=dims,
            ),
            optax.stateless(lambda updates, _: jax.tree.map(lambda u, s: s * u, updates, scales)),
        )
        adam = optax.scale_by_adam(self.b1, self.b2, self.eps, mu_dtype=self.moment_dtype)
        return optax.partition(
            {
                "muon": self._decayed(muon, self.learning_rate, steps),
                "adam": self._decayed(adam, self.adam_learning_rate, steps),
            },
            jax.tree.map(lambda d: "muon" if is_dims(d) else "adam", matrices, is_leaf=is_dims),
        )

    def _matrices(self, params: PyTree, axes: PyTree | None) -> PyTree:
        """For each leaf, which axes are its inputs and which its outputs, or "adam" for what is no matrix."""
        parameters.match(self.adam, params, "optimizer.adam")
        names = _names(axes)

        def one(path, leaf, adam):
            path = parameters.join(path)
            if adam or path.split("/")[-1] != "kernel" or leaf.ndim < 2:
                return "adam"
            if axes is None and leaf.ndim > 2:
                raise ValueError(f"'{path}' has {leaf.ndim} axes: Muon needs their logical names")
            here = names.get(path, (None,) * leaf.ndim)
            inner = [i for i, name in enumerate(here) if name not in ("layers", "expert")]
            if "vocab" in here or len(inner) < 2:
                return "adam"
            cut = 1 if here[inner[0]] == "embed" else len(inner) - 1
            return optax.contrib.MuonDimensionNumbers(tuple(inner[:cut]), tuple(inner[cut:]))

        return jax.tree_util.tree_map_with_path(one, params, parameters.search(self.adam, params))


def _by_layer(
    transform: optax.GradientTransformation, params: PyTree, axes: PyTree | None
) -> optax.GradientTransformation:
    """The transformation applied to each layer of a stack ("layers" as first axis) as to a parameter of its own."""
    names = _names(axes)

    def depth(path, leaf):
        return f"layers_{leaf.shape[0]}" if names.get(parameters.join(path), ())[:1] == ("layers",) else "single"

    depths = jax.tree_util.tree_map_with_path(depth, params)
    stacked = optax.GradientTransformation(jax.vmap(transform.init), jax.vmap(transform.update))
    groups = sorted(set(jax.tree.leaves(depths)))
    return optax.partition({g: transform if g == "single" else stacked for g in groups}, depths)


def global_norm(tree: PyTree) -> Float[Array, ""]:
    """Square root of the sum of all squares, each array's as an inner product with itself: XLA computes those on all
    cores of a CPU, where a sum to one number runs on a single one (four times as long)."""

    def square(x):
        axes = tuple(range(x.ndim))
        return jax.lax.dot_general(x, x, ((axes, axes), ((), ())), preferred_element_type=jnp.float32)

    return jnp.sqrt(sum(map(square, jax.tree.leaves(tree))))


def clip_by_global_norm(limit: float) -> optax.GradientTransformation:
    """Gradients scaled down to a global norm of `limit` where theirs is larger (Pascanu et al. 2013, algorithm 1)."""

    def clip(updates, _):
        scale = jnp.minimum(1.0, limit / jnp.maximum(global_norm(updates), 1e-30))
        return jax.tree.map(lambda g: (g * scale).astype(g.dtype), updates)

    return optax.stateless(clip)


def _chain(*transforms: optax.GradientTransformation | None) -> optax.GradientTransformation:
    return optax.chain(*(t for t in transforms if t is not None))


def is_names(x: Any) -> bool:
    """Whether x is a tuple of logical axis names, as against a tuple that is a node of a tree."""
    return type(x) in (tuple, Names) and all(name is None or isinstance(name, str) for name in x)


def _names(axes: PyTree | None) -> dict[str, tuple[str | None, ...]]:
    """Logical axis names by path."""
    return {parameters.join(path): x for path, x in jax.tree_util.tree_leaves_with_path(axes, is_leaf=is_names)}


def updates(state: PyTree) -> Int[Array, ""]:
    """Updates made so far, by the optimizer's own count: `rate` of it is the learning rate of the next one."""
    is_count = lambda x: isinstance(x, optax.ScaleByScheduleState)  # noqa: E731
    return next(x.count for x in jax.tree.leaves(state, is_leaf=is_count) if is_count(x))


def state_axes(state: PyTree, axes: PyTree, params: PyTree) -> PyTree[Names]:
    """Logical axis names for every leaf of an optimizer's state.

    A leaf whose path ends in the path of a parameter is laid out as that parameter is: with its names where the shape
    is the same, without one of them where one axis is missing (Adafactor's factors). All else is replicated.

    Args:
        state: arrays or shapes, as from `jax.eval_shape(transform.init, params)`.
        axes: tuples of logical names, in a tree of the shape of the parameters.
        params: arrays or shapes of the parameters.
    """
    names = _names(axes)
    shapes = {parameters.join(path): x.shape for path, x in jax.tree_util.tree_leaves_with_path(params)}

    def one(path, leaf):
        keys = parameters.join(path).split("/")
        owner = next((n for i in range(len(keys)) if (n := "/".join(keys[i:])) in shapes and n in names), None)
        if owner is not None and leaf.shape == shapes[owner]:
            return Names(names[owner])
        axis = None if owner is None else _missing(shapes[owner], leaf.shape, names[owner], rows="v_row" in keys)
        return Names((None,) * leaf.ndim if axis is None else names[owner][:axis] + names[owner][axis + 1 :])

    return jax.tree_util.tree_map_with_path(one, state)


def _missing(shape: tuple[int, ...], part: tuple[int, ...], names: tuple[str | None, ...], rows: bool) -> int | None:
    """The axis without which `shape` is `part`, or None. Of several of one size Adafactor's rows lack the last and its
    columns the one before it; a stack's axis is never lacking."""
    found = [i for i in range(len(shape)) if shape[:i] + shape[i + 1 :] == part and names[i] != "layers"]
    return None if not found else found[-1] if rows or len(found) == 1 else found[-2]
