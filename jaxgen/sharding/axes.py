"""Logical axis names, and the rules that turn them into mesh axes.

A model names what an axis *is* ("embed", "heads", "batch"); an experiment's rules say where it goes. The rules in force
are those of the `Sharding` that is entered while a function is traced, so a jitted function that enters its own is
right whatever the caller's context.
"""

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from jaxgen.errors import UserError, nearest

Rules = Mapping[str, tuple[str, ...]]
"""Logical axis name to the mesh axes it is split over; () keeps it whole."""

RULES: dict[str, tuple[str, ...]] = {
    # activations
    "batch": ("data", "fsdp"),
    "length": ("sequence",),
    # parameters, and the activations that carry the same axes
    "vocab": ("tensor",),
    "embed": ("fsdp",),
    "mlp": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "positions": (),
    "norm": (),
    "layers": (),
    "expert": ("expert",),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Sharding:
    """A mesh and the rules that lay logical axes on it."""

    mesh: jax.sharding.Mesh | AbstractMesh
    rules: Rules

    platform: str = ""
    """What an abstract mesh stands for ("tpu"); "" for the platform at hand."""

    def __post_init__(self):
        for name, axes in self.rules.items():
            if len(set(axes)) < len(axes):
                raise UserError(f"The rule for '{name}' names a mesh axis twice: {' '.join(axes)}.")
            for axis in axes:
                if axis not in self.mesh.shape:
                    raise UserError(
                        f"The rule for '{name}' names the mesh axis '{axis}', which does not exist"
                        f"{nearest(axis, self.mesh.shape) or '.'}"
                    )

    def spec(self, names: Sequence[str | None], shape: Sequence[int] | None = None, what: str = "") -> PartitionSpec:
        """The partition of an array with these logical axes.

        A mesh axis is used once, by the first logical axis that asks for it; axes of size 1 are left out. With
        `shape`, a dimension that its mesh axes do not divide raises UserError, naming `what`.
        """
        entries: list[tuple[str, ...]] = []
        used: set[str] = set()
        for i, name in enumerate(names):
            if name is not None and name not in self.rules:
                raise UserError(f"No rule for the logical axis '{name}'{nearest(name, self.rules) or '.'}")
            axes = [a for a in self.rules[name] if a not in used and self.mesh.shape[a] > 1] if name else []
            used.update(axes)
            parts = math.prod(self.mesh.shape[a] for a in axes)
            if shape is not None and shape[i] % parts:
                raise UserError(
                    f"{what or 'An array'} has {shape[i]} along '{name}', which the mesh "
                    f"({', '.join(f'{a} {self.mesh.shape[a]}' for a in axes)}) does not divide."
                )
            entries.append(tuple(axes))
        while entries and not entries[-1]:
            entries.pop()
        return PartitionSpec(*(e[0] if len(e) == 1 else (e or None) for e in entries))

    def named(self, names: Sequence[str | None], shape: Sequence[int] | None = None, what: str = "") -> NamedSharding:
        """`spec` as a sharding on the mesh."""
        return NamedSharding(self.mesh, self.spec(names, shape, what))

    def parts(self, *names: str | None) -> tuple[int, ...]:
        """In how many parts each dimension of an array with these logical axes is split."""
        spec = self.spec(names)
        axes = [() if e is None else (e,) if isinstance(e, str) else e for e in spec]
        axes += [()] * (len(names) - len(spec))
        return tuple(math.prod(self.mesh.shape[a] for a in dim) for dim in axes)

    @property
    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    def tree(self, shapes: Any, names: Any) -> Any:
        """Shardings for a tree of arrays or shapes, given the tree of their logical names (as from `unbox`)."""

        def one(path, leaf, axes):
            return self.named(axes, leaf.shape, what="/".join(jax.tree_util.keystr((k,), simple=True) for k in path))

        return jax.tree_util.tree_map_with_path(one, shapes, names)

    @contextlib.contextmanager
    def use(self) -> Iterator["Sharding"]:
        """Put these rules in force for `constrain`, for what is traced inside."""
        token = _current.set(self)
        try:
            yield self
        finally:
            _current.reset(token)


_current: contextvars.ContextVar[Sharding | None] = contextvars.ContextVar("jaxgen_sharding", default=None)


def current() -> Sharding | None:
    """The sharding in force, or None outside of any."""
    return _current.get()


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Lay an activation out by its logical axis names; outside of any `Sharding` it is returned as it is."""
    sharding = _current.get()
    if sharding is None or math.prod(sharding.mesh.shape.values()) == 1:
        return x
    if len(names) != x.ndim:
        raise ValueError(f"{len(names)} names {names} for an array of shape {x.shape}")
    return jax.lax.with_sharding_constraint(x, sharding.named(names))


def is_split(name: str) -> bool:
    """Whether the rules in force split this logical axis."""
    sharding = _current.get()
    return sharding is not None and sharding.parts(name) != (1,)


def _is_box(x: Any) -> bool:
    return isinstance(x, nn.Partitioned)


def names_of(tree: Any) -> Any:
    """Logical names of a tree from `init`: a tuple of names (or None) for each leaf, all None where a leaf has none."""

    def one(x):
        if _is_box(x):
            return Names(x.names)
        return Names((None,) * x.ndim)

    return jax.tree.map(one, tree, is_leaf=_is_box)


def unbox(tree: Any) -> Any:
    """The arrays of a tree from `init`, without the boxes that carry their logical names."""
    return jax.tree.map(lambda x: x.value if _is_box(x) else x, tree, is_leaf=_is_box)


class Names(tuple):
    """Logical axis names of one array. A leaf of a pytree, where a plain tuple would be a node."""
