"""Name maps: the tensors of another project and the leaves of our parameter trees, line by line, in both directions.

    Rule("encoder.layers.{layer}.q_proj.weight", "params/blocks/query/kernel", "(h d) e -> e h d")

says where a tensor stands here and how its axes lie. A number in braces that our path lacks is a leading axis here,
along which theirs are stacked ({layer}; two, such as {layer} and {expert}, are two axes); where theirs begin at
another number than 0, {layer+13} says which. A rule with several of our paths has them as parts of one tensor of
theirs, along the first axis on the right: `"(n h d) e -> n e h d"`.
"""

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxgen.errors import UserError, nearest
from jaxgen.interop.safetensors import Lazy

LINEAR = "o i -> i o"
CONVOLUTION = "o i h w -> h w i o"


@dataclasses.dataclass(frozen=True)
class Rule:
    """One line of a name map."""

    theirs: str
    """Name of their tensor, numbers in braces."""
    ours: str | tuple[str, ...]
    """Path of our leaf; or of several, which are one tensor there."""
    layout: str = ""
    """Their axes and ours, such as "o i -> i o"; empty where they are the same."""
    constant: Any = None
    """Their tensor has always this value, and stands for nothing here: passed over in reading, where it may be missing,
    and written (unless it is `SKIP`)."""
    copies: int = 0
    """Theirs stands there so many times over, {copy} in its name being 0, 1, ..., and is one here."""

    @property
    def paths(self) -> tuple[str, ...]:
        return (self.ours,) if isinstance(self.ours, str) else self.ours


SKIP = object()


class NameMap:
    """Rules, and sizes of axes that the shapes of our leaves do not tell."""

    def __init__(self, rules: Iterable[Rule], **sizes: int):
        self.rules = tuple(rules)
        self.sizes = sizes

    def expand(self, leaves: Mapping[str, Any]) -> "Expanded":
        """The map for these leaves (path to anything with a shape). ValueError where one has no rule, or several."""
        found: dict[str, Part] = {}
        constants: dict[str, Any] = {}
        copies: dict[str, str] = {}
        for path, leaf in leaves.items():
            rules = [(rule, i, m) for rule in self.rules for i, ours in enumerate(rule.paths)
                     if (m := _pattern(ours).fullmatch(path))]  # fmt: skip
            for rule, _, match in rules:
                if rule.constant is not None:
                    _, names = _names(rule.theirs, match.groupdict(), leaf.shape)
                    constants |= dict.fromkeys(names, rule.constant)
            rules = [entry for entry in rules if entry[0].constant is None]
            if len(rules) != 1:
                told = " and ".join(rule.theirs for rule, _, _ in rules) or "nothing"
                raise ValueError(f"the name map has {told} for {path}")
            (rule, index, match), = rules
            axes, names = _names(rule.theirs.replace("{copy}", "0"), match.groupdict(), leaf.shape)
            for n in range(1, rule.copies):
                _, others = _names(rule.theirs.replace("{copy}", str(n)), match.groupdict(), leaf.shape)
                copies |= dict(zip(others, names, strict=True))
            several = len(rule.paths) if len(rule.paths) > 1 else 0
            layout = Layout.of(rule.layout, (several,) * bool(several) + leaf.shape[axes:], self.sizes)
            found[path] = Part(names, leaf.shape[:axes], layout, index if several else None)
        return Expanded(found, constants, copies)


@dataclasses.dataclass(frozen=True)
class Part:
    """Where one of our leaves stands among their tensors."""

    names: tuple[str, ...]
    """Of their tensors that are stacked in it, in order."""
    stack: tuple[int, ...]
    """Our leading axes along which they are."""
    layout: "Layout"
    index: int | None
    """Which part of each of their tensors it is; None for the whole."""

    def take(self, tensors: Mapping[str, np.ndarray], index: tuple[slice, ...], dtype: Any) -> np.ndarray:
        """A slice of our leaf, read from their tensors, of which no more is read."""
        outer, inner = index[: len(self.stack)], index[len(self.stack) :]
        chosen = np.arange(len(self.names)).reshape(self.stack)[outer]
        parts = []
        for n in chosen.flat:
            view = self.layout.ours(tensors[self.names[n]])
            parts.append((view if self.index is None else view[self.index])[inner].astype(dtype))
        return np.stack(parts).reshape(*chosen.shape, *parts[0].shape) if self.stack else parts[0]


class Expanded:
    """A name map for the leaves of one model: what is read from where, and what is written as what."""

    def __init__(self, parts: dict[str, Part], constants: dict[str, Any], copies: dict[str, str]):
        self.parts = parts
        self.constants = constants
        self.copies = copies
        self.shapes = {name: part.layout.theirs_shape for part in parts.values() for name in part.names}
        self.shapes |= {copy: self.shapes[name] for copy, name in copies.items()}

    def check(self, tensors: Mapping[str, np.ndarray], where: str) -> None:
        """Raises UserError that lists every tensor that is missing, left over, of another shape or kind, or other than
        what it should be a copy of."""
        known = [n for n, value in self.constants.items() if n in tensors]
        missing = [name for name in self.shapes if name not in tensors]
        left = [name for name in tensors if name not in self.shapes and name not in known]
        lines = [f"{name} is missing{hint}" for name, hint in _nearest(missing, left)]
        lines += [f"{name} is left over{hint}" for name, hint in _nearest(left, missing)]
        for name, shape in self.shapes.items():
            if name not in tensors:
                continue
            there = tensors[name]
            if there.shape != shape:
                lines.append(f"{name} has the shape {there.shape}, and {shape} is wanted")
            elif not jax.numpy.issubdtype(there.dtype, np.floating):
                lines.append(f"{name} has the format {there.dtype}, and floating point is wanted")
            elif (first := self.copies.get(name)) in tensors and not np.array_equal(there, tensors[first]):
                lines.append(f"{name} is not the same as {first}, and the model has one of them")
        if lines:
            raise UserError(f"the weights of {where} do not fit the model in {len(lines)} places:\n  "
                            + "\n  ".join(lines))

    def read(self, tensors: Mapping[str, np.ndarray], target: Mapping[str, jax.ShapeDtypeStruct],
             where: str = "the file") -> dict[str, jax.Array]:
        """Our leaves by path, each shard read by the device that holds it; `check`ed first."""
        self.check(tensors, where)
        leaves = {}
        for path, leaf in target.items():
            sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
            take = functools.partial(self.parts[path].take, tensors, dtype=leaf.dtype)
            leaves[path] = jax.make_array_from_callback(leaf.shape, sharding, take)
        return leaves

    def written(self, leaves: Mapping[str, Any], dtype: Any = np.float32) -> dict[str, Lazy]:
        """Their tensors by name, made from ours one by one as they are wanted."""
        sources: dict[str, list[tuple[str, int, int | None]]] = {}
        for path, part in self.parts.items():
            for n, name in enumerate(part.names):
                sources.setdefault(name, []).append((path, n, part.index))
        made = {}
        for name, places in sources.items():
            part = self.parts[places[0][0]]
            make = functools.partial(self._make, leaves, sorted(places, key=lambda place: place[2] or 0))
            made[name] = Lazy(part.layout.theirs_shape, np.dtype(dtype), make)
        made |= {copy: made[name] for copy, name in self.copies.items()}
        for name, value in self.constants.items():
            if value is not SKIP:
                value = np.asarray(value)
                made[name] = Lazy(value.shape, value.dtype, functools.partial(np.asarray, value))
        return made

    def _make(self, leaves: Mapping[str, Any], places: Sequence[tuple[str, int, int | None]]) -> np.ndarray:
        values = []
        for path, n, _ in places:
            part = self.parts[path]
            at = np.unravel_index(n, part.stack) if part.stack else ()
            values.append(np.asarray(leaves[path][tuple(map(int, at))]))
        whole = values[0] if places[0][2] is None else np.stack(values)
        return self.parts[places[0][0]].layout.theirs(whole)


class Renamed(Mapping[str, np.ndarray]):
    """Tensors by the names that they have today: `today` makes one of any."""

    def __init__(self, tensors: Mapping[str, np.ndarray], today: Callable[[str], str]):
        self._tensors, self._names = tensors, {today(name): name for name in tensors}

    def __getitem__(self, name: str) -> np.ndarray:
        return self._tensors[self._names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _nearest(names: Sequence[str], choices: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Each name with a hint at the nearest choice: of those with the same numbers (the same layer) where there are any,
    since comparing all with all takes minutes for a large model."""
    same: dict[tuple[str, ...], list[str]] = {}
    for choice in choices:
        same.setdefault(tuple(re.findall(r"\d+", choice)), []).append(choice)
    for name in names:
        near = same.get(tuple(re.findall(r"\d+", name)), ())
        yield name, nearest(name, near) or nearest(name, choices if len(choices) < 50 else ())


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the axes of one tensor lie there and here: a reshape, a transpose and a reshape, all of known sizes."""

    left: tuple[tuple[str, ...], ...]
    right: tuple[tuple[str, ...], ...]
    sizes: Mapping[str, int]

    @classmethod
    def of(cls, layout: str, shape: tuple[int, ...], known: Mapping[str, int]) -> "Layout":
        """The layout "(h d) e -> e h d" of one of our tensors of this shape; 1 stands for an axis of that size."""
        if not layout:
            axes = tuple((f"a{i}",) for i in range(len(shape)))
            return cls(axes, axes, {f"a{i}": size for i, size in enumerate(shape)})
        left, right = (_groups(side) for side in layout.split("->"))
        if len(right) != len(shape):
            raise ValueError(f"'{layout}' has {len(right)} axes on the right, and our shape is {shape}")
        sizes = {"1": 1}
        for group, size in zip(right, shape, strict=True):
            unknown = [name for name in group if name not in known and name != "1"]
            rest = math.prod(known.get(name, 1) for name in group)
            if len(unknown) > 1 or size % rest or (not unknown and size != rest):
                raise ValueError(f"the axis ({' '.join(group)}) of '{layout}' is {size} here, and known are {known}")
            sizes |= {name: known[name] for name in group if name in known} | dict.fromkeys(unknown, size // rest)
        names = lambda side: sorted(n for group in side for n in group if n != "1")  # noqa: E731
        if names(left) != names(right):
            raise ValueError(f"'{layout}' has not the same axes on both sides")
        return cls(left, right, sizes)

    def ours(self, theirs: np.ndarray) -> np.ndarray:
        """Their tensor as ours: a view, where that is possible."""
        return self._turn(theirs, self.left, self.right)

    def theirs(self, ours: np.ndarray) -> np.ndarray:
        """Our tensor as theirs."""
        return self._turn(ours, self.right, self.left)

    @property
    def theirs_shape(self) -> tuple[int, ...]:
        return tuple(math.prod(self.sizes[name] for name in group) for group in self.left)

    def _turn(self, x: np.ndarray, source, goal) -> np.ndarray:
        flat, wanted = ([n for group in side for n in group if n != "1"] for side in (source, goal))
        x = x.reshape([self.sizes[name] for name in flat]).transpose([flat.index(name) for name in wanted])
        return x.reshape([math.prod(self.sizes[name] for name in group) for group in goal])


def _groups(side: str) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(word.strip("()").split()) for word in re.findall(r"\([^)]*\)|\S+", side))


@functools.lru_cache(maxsize=4096)
def _pattern(template: str) -> re.Pattern[str]:
    """`"blocks/{layer}/scale"` as a regular expression with a named group for each number."""
    parts = re.split(r"\{(\w+)\}", template)
    return re.compile("".join(re.escape(p) if i % 2 == 0 else rf"(?P<{p}>\d+)" for i, p in enumerate(parts)))


def _names(template: str, numbers: Mapping[str, str], shape: tuple[int, ...]) -> tuple[int, tuple[str, ...]]:
    """How many leading axes of ours are stacks of theirs, and the names of those."""
    stacked = [name for name in re.findall(r"\{(\w+)(?:\+\d+)?\}", template) if name not in numbers]
    if len(stacked) > len(shape):
        raise ValueError(f"{template} is stacked along {stacked}, and our shape is {shape}")
    every = itertools.product(*(range(size) for size in shape[: len(stacked)]))
    return len(stacked), tuple(_filled(template, {**numbers, **dict(zip(stacked, at, strict=True))}) for at in every)


def _filled(template: str, numbers: Mapping[str, Any]) -> str:
    """The name with its numbers, each raised by what its place says."""
    return re.sub(r"\{(\w+)(?:\+(\d+))?\}", lambda at: str(int(numbers[at[1]]) + int(at[2] or 0)), template)


def flat(tree: Any) -> dict[str, Any]:
    """A tree of dicts as leaves by path, "params/blocks/kernel"."""
    leaves = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        leaves["/".join(str(key.key) for key in path)] = leaf
    return leaves


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The tree of dicts whose leaves these are."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *above, last = path.split("/")
        node = tree
        for key in above:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree
