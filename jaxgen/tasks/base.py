"""What is learned: a task owns its models and gives a pure loss."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Int

from jaxgen.sharding import Sharding

Params = dict[str, Any]
"""Parameters by part; a part bears the name of the task's field that holds its module."""
Batch = Mapping[str, Array]
"""Arrays of a batch by name, examples along the first axis."""
Spec = Mapping[str, jax.ShapeDtypeStruct]
"""The shapes of a batch."""


@flax.struct.dataclass
class Context:
    """What a loss may know besides parameters and batch."""

    key: Array
    """Random key of (seed, step, microbatch): for what is too large to key by example, such as dropout."""
    step_key: Array
    """Random key of (seed, step), from which `keys` are folded."""
    step: Int[Array, ""]
    index: Int[Array, "B"]
    """Place of each example in the whole batch, whatever microbatch it stands in."""
    state: Any
    """What changes without a gradient; an update goes into `Loss.state`."""
    ema: Any
    """The moving average of all parameters (by part), or None when the experiment keeps none."""
    train: bool = flax.struct.field(pytree_node=False, default=True)
    """False in evaluation: no dropout, no augmentation."""
    size: int = flax.struct.field(pytree_node=False, default=0)
    """Examples of the whole batch; 0 for those at hand."""

    def keys(self) -> Array:
        """A random key for each example, from (seed, step, index) alone: (B,)."""
        return jax.vmap(lambda i: jax.random.fold_in(self.step_key, i))(self.index)


@flax.struct.dataclass
class Loss:
    """A sum over examples with its weight, so that means over microbatches, packing and hosts are exact."""

    sum: Float[Array, ""]
    weight: Float[Array, ""]
    """What `sum` is divided by, over the whole batch: the number of examples, or of tokens."""
    state: Any = None
    """The new state; None keeps the old one."""
    metrics: dict[str, tuple[Float[Array, ""], Float[Array, ""]]] = flax.struct.field(default_factory=dict)
    """Further means, as (sum, weight) by name."""


@dataclasses.dataclass(frozen=True)
class Player:
    """One who takes a gradient step: a loss, the parts it moves, and when. A GAN has two."""

    name: str
    loss: Callable[[Params, Batch, Context], Loss]
    parts: tuple[str, ...] | None = None
    """Parts of the parameters that this player owns; None for all."""
    every: int = 1
    """Moves in every so many steps ..."""
    start: int = 0
    """... from this step on."""


class Task:
    """What is learned. A subclass is a frozen dataclass whose fields hold its Linen modules.

    `loss` is given all parameters, the trainable and the frozen; the gradient is taken of the player's trainable ones.
    """

    collect_every: int = 1
    """Steps that one collected batch feeds."""
    whole_batch: ClassVar[str] = ""
    """Why a batch cannot be taken in microbatches, and what to do instead; empty where it can."""

    def init(self, key: Array) -> tuple[Params, Any]:
        """(parameters by part, state). Leaves may be boxed by `nn.with_logical_partitioning`, whose names say how they
        are laid out; state that changes without a gradient is laid out and saved like parameters. What of it belongs to
        a part's module, such as batch statistics, is a tree under that part's name: a `Pretrained` brings its own."""
        raise NotImplementedError

    def loss(self, params: Params, batch: Batch, context: Context) -> Loss:
        """The loss of the one player of most tasks. Pure."""
        raise NotImplementedError

    def players(self) -> tuple[Player, ...]:
        """Who moves in a step, in order."""
        return (Player("model", self.loss),)

    def step(self, train_state: Any, batch: Batch, update: Callable) -> tuple[Any, dict[str, Array]]:
        """One training step, inside jit: each player in order takes one gradient and one update.

        `update(train_state, batch, player) -> (train_state, metrics)`.
        """
        metrics = {}
        for player in self.players():
            train_state, new = update(train_state, batch, player)
            metrics |= new
        return train_state, metrics

    def projected(self, params: Params) -> Params:
        """What is kept of a player's parameters (None where frozen) after its update, such as weights of one length.
        Pure."""
        return params

    def collect(self, train_state: Any, batch: Batch, key: Array) -> Batch:
        """Turn a batch of data into what the steps learn from (rollouts, a teacher's outputs), outside jit, on the
        same mesh. May call samplers and host code; a function of its arguments alone. Where it changes names, shapes
        or formats, `collected` says so."""
        return batch

    def collected(self, spec: Spec) -> Spec:
        """Shapes of what `collect` makes of a batch of these shapes: what the loss is given."""
        return spec

    def stored(self, data: Any, params: Params, state: Any, progress: Any = None) -> Any:
        """Data whose training batches are what `collect` would make of them, computed once and kept; None, as for most
        tasks, where there is nothing to keep. Every process calls it."""
        return None

    def check(self, spec: Spec) -> None:
        """Raises UserError when batches of these shapes cannot be learned from."""

    def check_data(self, data: Any) -> None:
        """Raises UserError when the prepared data is not for this task's models."""

    def check_training(self, spec: Spec) -> None:
        """Raises UserError for what can be measured but not trained, on the mesh in use (`sharding.current()`)."""

    def axes(self, spec: Spec) -> dict[str, tuple[str | None, ...]]:
        """Logical axis names of each array of a batch, of data or collected."""
        return {name: ("batch", *(None,) * (s.ndim - 1)) for name, s in spec.items()}

    def units(self, spec: Spec) -> tuple[str, int]:
        """What throughput is counted in, and how many of them a batch has."""
        return "examples", next(iter(spec.values())).shape[0]

    def flops(self, spec: Spec) -> float | None:
        """Analytic floating-point operations of one training step (forward and backward); None if unknown."""
        return None

    def notes(self, spec: Spec) -> dict[str, str]:
        """What the run should say of itself at its start, such as which attention kernel runs and why."""
        return {}


def mean(values: Float[Array, "..."], weights: Float[Array, "..."] | None = None) -> tuple[Array, Array]:
    """(sum, weight) of values, for `Loss.metrics`."""
    weights = jnp.ones_like(values) if weights is None else weights
    return jnp.sum(values * weights), jnp.sum(weights)


def split(x: Array, count: int) -> Array:
    """(B, ...) to (count, B / count, ...), every device keeping its own examples."""
    return jnp.moveaxis(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 1, 0)


def batch_shardings(task: Task, sharding: Sharding, spec: Spec) -> dict[str, NamedSharding]:
    """The layout of a batch of these shapes."""
    axes = task.axes(spec)
    return {name: sharding.named(axes[name], s.shape, f"The batch's {name}") for name, s in spec.items()}
