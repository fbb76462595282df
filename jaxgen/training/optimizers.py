"""Optimizers as data: frozen dataclasses that build optax transformations."""

import dataclasses
from typing import Any, Literal

import jax
import optax
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
    decay: tuple[str, ...] = ()
    """Patterns of the parameters to decay; () for the matrices: those named `kernel` or `embedding`."""
    clip: float = 1.0
    """Largest global norm of the gradient (Pascanu et al. 2013, algorithm 1); 0 for no clipping."""
    freeze: tuple[str, ...] = ()
    """Patterns of the parameters to leave as they are, with no gradient and no optimizer state."""

    def __post_init__(self):
        for field in ("learning_rate", "weight_decay", "clip"):
            if not getattr(self, field) >= 0:
                raise UserError(f"optimizer.{field} is 0 or more, not {getattr(self, field)}.")
        for field in ("b1", "b2", "momentum", "decay_rate"):
            if not 0 <= getattr(self, field, 0.0) < 1:
                raise UserError(f"optimizer.{field} is at least 0 and below 1, not {getattr(self, field)}.")

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
            optax.clip_by_global_norm(self.clip) if self.clip else None,
            self._descent(params, steps, axes),
        )

    def _descent(self, params: PyTree, steps: int, axes: PyTree | None) -> optax.GradientTransformation:
        return self._decayed(self._direction(params, axes), steps)

    def _direction(self, params: PyTree, axes: PyTree | None) -> optax.GradientTransformation:
        """Clipped gradients to steps of about unit size, of the gradient's sign."""
        raise NotImplementedError

    def _decayed(self, direction: optax.GradientTransformation, steps: int, factor: float = 1.0):
        """The direction with weight decay, times -rate."""
        # Found by name at each call, since optax.partition hands over trees in which the others' leaves are masked.
        patterns = self.decay or MATRICES
        return _chain(
            direction,
            optax.add_decayed_weights(self.weight_decay, lambda tree: parameters.search(patterns, tree))
            if self.weight_decay
            else None,
            optax.scale_by_learning_rate(lambda count: factor * self.rate(count, steps)),
        )


@dataclasses.dataclass(frozen=True)
class AdamW(Optimizer):
    """Adam (Kingma & Ba 2015, algorithm 1) with decoupled weight decay (Loshchilov & Hutter 2019, algorithm 2)."""

    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    moment_dtype: Dtype = "float32"
    """Of the first moment."""

    def _direction(self, params, axes):
        return optax.scale_by_adam(self.b1, self.b2, self.eps, mu_dtype=self.moment_dtype)


def _chain(*transforms: optax.GradientTransformation | None) -> optax.GradientTransformation:
    return optax.chain(*(t for t in transforms if t is not None))


def is_names(x: Any) -> bool:
    """Whether x is a tuple of logical axis names, as against a tuple that is a node of a tree."""
    return type(x) in (tuple, Names) and all(name is None or isinstance(name, str) for name in x)


def state_axes(state: PyTree, axes: PyTree, params: PyTree | None = None) -> PyTree[Names]:
    """Logical axis names for every leaf of an optimizer's state.

    A leaf whose path ends in the path of a parameter is laid out as that parameter is: with its names where the number
    of axes (and the shape, if `params` is given) is the same, without one of them where one axis is missing
    (Adafactor's factors; this needs `params`). All else is replicated.

    Args:
        state: arrays or shapes, as from `jax.eval_shape(transform.init, params)`.
        axes: tuples of logical names, in a tree of the shape of the parameters.
        params: arrays or shapes of the parameters.
    """
    names = {parameters.join(path): x for path, x in jax.tree_util.tree_leaves_with_path(axes, is_leaf=is_names)}
    shapes = {parameters.join(path): x.shape for path, x in jax.tree_util.tree_leaves_with_path(params)}

    def one(path, leaf):
        keys = parameters.join(path).split("/")
        owner = next((n for i in range(len(keys)) if (n := "/".join(keys[i:])) in names), None)
        if owner is not None:
            if leaf.ndim == len(names[owner]) and shapes.get(owner, leaf.shape) == leaf.shape:
                return Names(names[owner])
            if leaf.ndim == len(names[owner]) - 1 > 0:
                if params is None:
                    raise ValueError(f"'{'/'.join(keys)}' lacks an axis of its parameter: give params to tell which")
                axis = _missing(shapes[owner], leaf.shape, names[owner], last="v_row" in keys)
                if axis is not None:
                    return Names(names[owner][:axis] + names[owner][axis + 1 :])
        return Names((None,) * leaf.ndim)

    return jax.tree_util.tree_map_with_path(one, state)


def _missing(shape: tuple[int, ...], part: tuple[int, ...], names: tuple, last: bool) -> int | None:
    """The axis without which `shape` is `part`. Of several of one size, Adafactor's rows lack the last, its columns the
    one before it, and a stack of layers is never averaged over."""
    found = [i for i in range(len(shape)) if shape[:i] + shape[i + 1 :] == part and names[i] != "layers"]
    return None if not found else found[-1] if last or len(found) == 1 else found[-2]
