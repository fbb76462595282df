"""The compiled program of a run: how its state is laid out, made, and moved by one step."""

import dataclasses
import functools
import operator
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from jaxgen.errors import UserError
from jaxgen.sharding import Sharding, names_of, unbox
from jaxgen.tasks.base import Batch, Context, Loss, Player, Spec, Task, batch_shardings, split
from jaxgen.training import parameters
from jaxgen.training.ema import Ema, PowerEma
from jaxgen.training.optimizers import Optimizer, global_norm, state_axes, updates
from jaxgen.training.state import TrainState


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A task with its optimizers on a mesh. Nothing is computed until `init` or `step` is called."""

    task: Task
    optimizer: Optimizer | Mapping[str, Optimizer]
    sharding: Sharding
    spec: Spec
    """Shapes of the global batch of data."""
    steps: int
    microbatches: int = 1
    ema: Ema | PowerEma | None = None

    def __post_init__(self):
        size = self.batch_size
        if self.microbatches < 1 or size % self.microbatches:
            raise UserError(f"batch_size = {size} is not a multiple of microbatches = {self.microbatches}.")
        if self.microbatches > 1 and self.task.whole_batch:
            raise UserError(f"microbatches = {self.microbatches} cannot be: {self.task.whole_batch}.")
        shards = self.sharding.parts("batch")[0]
        if (size // self.microbatches) % shards:
            whole = "batch_size" if self.microbatches == 1 else "batch_size / microbatches"
            raise UserError(
                f"{whole} = {size // self.microbatches} cannot be divided over the {shards} shards of the batch "
                f"that the mesh makes."
            )
        self.task.check(self.spec)
        names = [player.name for player in self.players]
        if isinstance(self.optimizer, Mapping) and set(self.optimizer) != set(names):
            raise UserError(
                f"The optimizers are for {sorted(self.optimizer)}, and the task's players are {sorted(names)}."
            )

    @property
    def batch_size(self) -> int:
        """Examples that a step learns from."""
        return next(iter(self.collected.values())).shape[0]

    @functools.cached_property
    def collected(self) -> Spec:
        """Shapes of the batch that a step is given: of data, unless the task collects something else from it."""
        return self.task.collected(self.spec)

    @functools.cached_property
    def players(self) -> tuple[Player, ...]:
        return self.task.players()

    # ---- shapes and layout ----

    @functools.cached_property
    def _boxed(self) -> tuple[Any, Any]:
        """(params, state) of the task as shapes, in the boxes that bear their logical names."""
        with self.sharding.use():
            return self._initial.eval_shape(jax.random.key(0))

    @functools.cached_property
    def _initial(self):
        """The task's `init`, traced once: for its names and in `_create`."""
        return jax.jit(self.task.init)

    @functools.cached_property
    def params_shapes(self) -> dict[str, Any]:
        """All parameters by part, as shapes."""
        return unbox(self._boxed[0])

    @functools.cached_property
    def params_names(self) -> dict[str, Any]:
        """Logical axis names of all parameters by part."""
        return names_of(self._boxed[0])

    @functools.cached_property
    def shapes(self) -> TrainState:
        """The state as shapes that carry their shardings: the target of a restore."""
        plain = self._created.eval_shape(jax.random.key_data(jax.random.key(0)))
        return jax.tree.map(lambda s, l: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=l), plain, self._layout(plain))

    @functools.cached_property
    def shardings(self) -> TrainState:
        """The layout of the state on the mesh."""
        return jax.tree.map(lambda s: s.sharding, self.shapes)

    @functools.cached_property
    def batch_shardings(self) -> dict[str, Any]:
        """The layout of a batch of data on the mesh."""
        return batch_shardings(self.task, self.sharding, self.spec)

    @functools.cached_property
    def collected_shardings(self) -> dict[str, Any]:
        """The layout of the batch that a step is given."""
        return batch_shardings(self.task, self.sharding, self.collected)

    def _layout(self, plain: TrainState) -> TrainState:
        names, whole = self.params_names, self.sharding.replicated
        lay = self.sharding.tree

        def of(part):  # the names of a tree that has None in the place of some leaves
            return jax.tree.map(lambda s, n: n if s is not None else None, part, names, is_leaf=lambda x: x is None)

        trainable = of(plain.params)
        return TrainState(
            step=whole,
            key=whole,
            params=lay(plain.params, trainable),
            frozen=lay(plain.frozen, of(plain.frozen)),
            state=lay(plain.state, names_of(self._boxed[1])),
            optimizer={
                player.name: lay(
                    plain.optimizer[player.name],
                    state_axes(plain.optimizer[player.name], _owned(player, trainable), _owned(player, plain.params)),
                )
                for player in self.players
            },
            ema=None if plain.ema is None else lay(plain.ema, self.ema.like(trainable)),
            skipped=whole,
        )

    # ---- the optimizers ----

    def optimizer_of(self, player: Player) -> Optimizer:
        return self.optimizer[player.name] if isinstance(self.optimizer, Mapping) else self.optimizer

    def _split(self, params: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """(trainable, frozen): what an optimizer's patterns freeze, and parts that no player moves, are frozen."""
        cold = jax.tree.map(lambda p: True, params)
        for part in {part for player in self.players for part in _owned(player, params)}:
            cold[part] = jax.tree.map(lambda p: False, params[part])
        for player in self.players:
            found = parameters.match(self.optimizer_of(player).freeze, _owned(player, params), "optimizer.freeze")
            cold |= jax.tree.map(operator.or_, found, _owned(player, cold))
        return (
            jax.tree.map(lambda p, c: None if c else p, params, cold),
            jax.tree.map(lambda p, c: p if c else None, params, cold),
        )

    def _updates(self, player: Player) -> int:
        """How often a player moves in the run: what its schedule goes over."""
        return max(-(-(self.steps - player.start) // player.every), 1)

    def _transform(self, player: Player, trainable: dict[str, Any]) -> optax.GradientTransformation:
        owned, names = _owned(player, trainable), _owned(player, self.params_names)
        names = jax.tree.map(lambda p, n: None if p is None else n, owned, names, is_leaf=lambda x: x is None)
        return self.optimizer_of(player).transform(owned, self._updates(player), names)

    # ---- creation ----

    def _create(self, key_data: Array) -> TrainState:
        with self.sharding.use():
            # one key for the parameters, the other for the steps
            init_key, step_key = jax.random.split(jax.random.wrap_key_data(key_data))
            params, state = self._initial(init_key)
            trainable, frozen = self._split(unbox(params))
            return TrainState(
                step=jnp.zeros((), jnp.int32),
                key=jax.random.key_data(step_key),
                params=trainable,
                frozen=frozen,
                state=unbox(state),
                optimizer={p.name: self._transform(p, trainable).init(_owned(p, trainable)) for p in self.players},
                ema=None if self.ema is None else self.ema.init(trainable),
                skipped=jnp.zeros((2,), jnp.int32),
            )

    @functools.cached_property
    def _created(self):
        """`_create`, traced once: for its shapes, from which the layout follows, and to run."""
        return jax.jit(self._create)

    def init(self, seed: int) -> TrainState:
        """A new state, made in its layout: no device ever holds more than its share."""
        # It runs once, and LLVM would take ten seconds to make it fast.
        on_cpu = self.sharding.mesh.devices.flat[0].platform == "cpu"
        options = {"xla_backend_optimization_level": 0} if on_cpu else None
        create = jax.jit(self._created, out_shardings=self.shardings, compiler_options=options)
        return create(jax.random.key_data(jax.random.key(seed)))

    # ---- the step ----

    def _step(self, train_state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        with self.sharding.use():
            step, before = train_state.step, train_state.skipped
            train_state, metrics = self.task.step(train_state, batch, self._update)
            skipped = train_state.skipped[0]
            in_a_row = jnp.where(skipped > before[0], before[1] + 1, 0)
            ema = train_state.ema
            if self.ema is not None:
                ema = self.ema.update(ema, train_state.params, step)
            metrics |= {"skipped": skipped, "skipped_in_a_row": in_a_row}
            return train_state.replace(step=step + 1, ema=ema, skipped=jnp.stack([skipped, in_a_row])), metrics

    @functools.cached_property
    def step(self):
        """(state, batch) -> (state, metrics), compiled once; the state's buffers are donated."""
        return jax.jit(
            self._step,
            in_shardings=(self.shardings, self.collected_shardings),
            out_shardings=(self.shardings, self.sharding.replicated),
            donate_argnums=0,
        )

    def lower(self):
        """The step lowered for this mesh, from shapes alone."""
        batch = {
            name: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=self.collected_shardings[name])
            for name, s in self.collected.items()
        }
        return self.step.lower(self.shapes, batch)

    def _update(self, train_state: TrainState, batch: Batch, player: Player) -> tuple[TrainState, dict[str, Array]]:
        """One gradient and one update for a player, where it is its turn."""
        if player.every == 1 and player.start == 0:
            return self._move(train_state, batch, player)
        step = train_state.step
        due = (step >= player.start) & ((step - player.start) % player.every == 0)
        shapes = jax.eval_shape(lambda s, b: self._move(s, b, player), train_state, batch)[1]

        def rest(train_state, batch):
            return train_state, {k: jnp.full(s.shape, jnp.nan, s.dtype) for k, s in shapes.items()}

        return jax.lax.cond(due, lambda s, b: self._move(s, b, player), rest, train_state, batch)

    def _move(self, train_state: TrainState, batch: Batch, player: Player) -> tuple[TrainState, dict[str, Array]]:
        trainable = _owned(player, train_state.params)
        loss, grads = self._gradient(train_state, batch, player, trainable)
        value = loss.sum / loss.weight
        norm = global_norm(grads)
        finite = jnp.isfinite(value) & jnp.isfinite(norm)

        transform = self._transform(player, train_state.params)
        done = updates(train_state.optimizer[player.name])
        change, moments = transform.update(grads, train_state.optimizer[player.name], trainable)
        moved = self.task.projected(optax.apply_updates(trainable, change))

        def keep(new, old):
            return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

        train_state = train_state.replace(
            params={**train_state.params, **keep(moved, trainable)},
            state=keep(loss.state, train_state.state),
            optimizer={**train_state.optimizer, player.name: keep(moments, train_state.optimizer[player.name])},
            skipped=train_state.skipped.at[0].add(jnp.where(finite, 0, 1)),
        )
        metrics = {
            "loss": value,
            **{name: total / weight for name, (total, weight) in loss.metrics.items()},
            "gradient_norm": norm,
            "learning_rate": jnp.asarray(self.optimizer_of(player).rate(done, self._updates(player))),
        }
        prefix = f"{player.name}/" if len(self.players) > 1 else ""
        return train_state, {prefix + name: value for name, value in metrics.items()}

    def _gradient(self, train_state: TrainState, batch: Batch, player: Player, trainable) -> tuple[Loss, Any]:
        """(loss, gradient of its mean) over the whole batch, a microbatch at a time."""
        count, number = self.microbatches, [p.name for p in self.players].index(player.name)
        key = jax.random.fold_in(jax.random.wrap_key_data(train_state.key), train_state.step)
        step_key, micro_key = jax.random.split(jax.random.fold_in(key, number))
        ema = None if train_state.ema is None else self.ema.weights(train_state.ema)
        ema = None if ema is None else parameters.merge(ema, train_state.frozen)

        def loss_of(trainable, part, index, micro, state):
            params = parameters.merge({**train_state.params, **trainable}, train_state.frozen)
            own_key = jax.random.fold_in(micro_key, micro)
            context = Context(own_key, step_key, train_state.step, index, state, ema, size=self.batch_size)
            loss = player.loss(params, part, context)
            loss = loss.replace(state=state if loss.state is None else loss.state)
            # the weight of a batch in parts is known at the end alone; else this saves a pass over the gradient
            return (loss.sum / jax.lax.stop_gradient(loss.weight) if count == 1 else loss.sum), loss

        gradient = jax.grad(loss_of, has_aux=True)
        index = jnp.arange(self.batch_size, dtype=jnp.int32)
        if count == 1:
            grads, loss = gradient(trainable, batch, index, 0, train_state.state)
            return loss, grads

        def body(carry, part):
            total, grads = carry
            new_grads, loss = gradient(trainable, *part, total.state)
            add = functools.partial(jax.tree.map, jnp.add)
            total = Loss(total.sum + loss.sum, total.weight + loss.weight, loss.state, add(total.metrics, loss.metrics))
            return (total, add(grads, new_grads)), None

        examples, index = jax.tree.map(lambda x: split(x, count), (dict(batch), index))
        parts = (examples, index, jnp.arange(count))
        first = jax.tree.map(lambda x: x[0], parts)
        shapes = jax.eval_shape(lambda: gradient(trainable, *first, train_state.state))
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        loss, grads = jax.lax.scan(body, (zeros[1].replace(state=train_state.state), zeros[0]), parts)[0]
        return loss, jax.tree.map(lambda g: g / loss.weight, grads)


def _owned(player: Player, tree: dict[str, Any]) -> dict[str, Any]:
    """The parts of a tree that a player owns."""
    return dict(tree) if player.parts is None else {part: tree[part] for part in player.parts}
