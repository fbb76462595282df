"""Fields of a dataclass tree changed from the command line: `--task.model.depth 24 --optimizer.learning-rate 3e-4`.

tyro reads the types, the defaults and the docstrings from the tree itself. This module adds errors of one sentence.
"""

import contextlib
import dataclasses
import difflib
import io
import types
import typing
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from jaxgen.errors import UserError, nearest
from jaxgen.record import fields, is_node

T = TypeVar("T")


class Leaf(NamedTuple):
    """A value that can be overridden: its dotted path, the value, and its annotation."""

    path: str
    value: Any
    type: Any


def override(tree: T, args: Sequence[str]) -> T:
    """`tree` with the fields that `args` name replaced, each value read by the type of its field.

    `--a.b value`, `--a.b=value`; hyphens and underscores are the same; a boolean field is `--a.b`, `--a.no-b` or
    `--a.b True|False`. Raises UserError of one sentence for an unknown field (with the nearest), for a value of the
    wrong type and for an invalid choice.
    """
    if not args:
        return tree
    known = {_plain(leaf.path): leaf for leaf in leaves(tree)}
    options = list(_options(args))
    for name, values in options:
        _check(tree, name, known)
        leaf = known.get(_plain(name))
        if leaf is not None and _is_flag(leaf) and len(values) == 1 and values[0].lower() in ("true", "false"):
            values[:] = [values[0].lower()]
    given = [_positive(name, known) for name, _ in options]
    if twice := next((name for i, name in enumerate(given) if name in given[:i]), None):
        raise UserError(f"{_flag(twice)} is given twice")
    flat = [_spell(name, values, known) for name, values in options]
    try:
        return _tyro(tree, [word for option in flat for word in option])
    except SystemExit:
        pass
    for (name, values), option in zip(options, flat, strict=True):
        try:
            _tyro(tree, option)
        except SystemExit:
            raise UserError(_wrong(known[_positive(name, known)], values)) from None
    raise UserError(f"the overrides {' '.join(args)} cannot be read together")


def document(tree: Any, prog: str) -> None:
    """Prints every field of the tree with its type, its description and its value here (`--help`)."""
    try:
        _tyro(tree, ["--help"], prog=prog, console_outputs=True)
    except SystemExit:
        pass


def leaves(tree: Any, path: str = "", annotation: Any = None) -> Iterator[Leaf]:
    """Every field below `tree` that is no tree itself."""
    children = _children(tree)
    if children is None:
        yield Leaf(path, tree, annotation)
        return
    for name, value, kind in children:
        yield from leaves(value, f"{path}.{name}" if path else name, kind)


def _children(tree: Any) -> list[tuple[str, Any, Any]] | None:
    if is_node(tree):
        hints = _hints(type(tree))
        return [(f.name, getattr(tree, f.name), hints.get(f.name, Any)) for f in fields(tree)]
    if isinstance(tree, Mapping) and tree:
        return [(str(k), v, type(v)) for k, v in tree.items()]
    if isinstance(tree, tuple) and any(_children(x) is not None for x in tree):
        return [(str(i), x, type(x)) for i, x in enumerate(tree)]
    return None


def _hints(cls: type) -> dict[str, Any]:
    try:
        return typing.get_type_hints(cls)
    except Exception:   # an annotation that cannot be evaluated: tyro will say so if the field is used
        return {}


def _tyro(tree: T, args: Sequence[str], prog: str = "jaxgen", console_outputs: bool = False) -> T:
    import tyro

    quiet = contextlib.redirect_stderr(io.StringIO()) if not console_outputs else contextlib.nullcontext()
    with warnings.catch_warnings(), quiet:
        # a Pretrained stands where a module is annotated
        warnings.filterwarnings("ignore", message="(?s).*default value", category=UserWarning)
        return tyro.cli(
            type(tree), prog=prog, args=args, default=tree, console_outputs=console_outputs,
            config=(tyro.conf.AvoidSubcommands,), description="",
        )


def _options(args: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Groups the words: `("task.model.windows", ["3", "4"])`."""
    name, values = "", []
    for word in args:
        if word.startswith("--") and len(word) > 2:
            if name:
                yield name, values
            name, equals, value = word[2:].partition("=")
            values = [value] if equals else []
        elif not name:
            raise UserError(f"{word!r} is not an override: fields are given as --field value")
        else:
            values.append(word)
    if name:
        yield name, values


def _check(tree: Any, name: str, known: dict[str, Leaf]) -> None:
    if _positive(name, known) in known:
        return
    node, walked = tree, []
    for part in name.replace("-", "_").split("."):
        children = {n.replace("-", "_"): (n, value) for n, value, _ in _children(node) or ()}
        if part not in children:
            break
        walked.append(children[part][0])
        node = children[part][1]
    place = ".".join(walked)
    if len(walked) == len(name.split(".")):
        inside = [_flag(leaf.path) for leaf in known.values() if leaf.path.startswith(place + ".")]
        what = f"has fields of its own: {', '.join(inside[:4])}" if inside else "is empty in this experiment"
        raise UserError(f"--{name} is not one value; it {what}")
    if _children(node) is None:
        raise UserError(
            f"there is no field --{name}: {place} is {node!r} in this experiment, which has no fields; "
            "set it in the experiment file"
        )
    near = _repair(tree, name)
    hint = f"; did you mean {_flag(near)}?" if near else ""
    ends = [_flag(leaf.path) for leaf in known.values() if leaf.path.endswith("." + _plain(name))]
    if ends and not walked:
        hint = f"; did you mean {' or '.join(ends[:3])}?"
    of = f" in {place} ({type(node).__name__})" if place else ""
    if not hint:
        hint = f"{of}; the fields there are {', '.join(n for n, _, _ in _children(node) or ())}"
    raise UserError(f"there is no field --{name}{hint}")


def _repair(tree: Any, name: str) -> str:
    """The path closest to `name`, part by part; an empty string where a part has nothing near."""
    node, path = tree, []
    for part in _plain(name).split("."):
        children = {n: value for n, value, _ in _children(node) or ()}
        found = [part] if part in children else difflib.get_close_matches(part, children, n=1, cutoff=0.5)
        if not found:
            return ""
        path.append(found[0])
        node = children[found[0]]
    return ".".join(path)


def _positive(name: str, known: dict[str, Leaf]) -> str:
    """The plain name of the field that `name` sets: `a.no-b` sets `a.b` where `a.b` is a flag."""
    plain = _plain(name)
    head, _, last = plain.rpartition(".")
    if plain not in known and last.startswith("no_"):
        other = f"{head}.{last[3:]}" if head else last[3:]
        if other in known and _is_flag(known[other]):
            return other
    return plain


def _flag(path: str) -> str:
    return f"--{path.replace('_', '-')}"


def _plain(name: str) -> str:
    return name.replace("-", "_")


def _is_flag(leaf: Leaf) -> bool:
    return isinstance(leaf.value, bool) and leaf.type is bool


def _spell(name: str, values: list[str], known: dict[str, Leaf]) -> list[str]:
    """The words as tyro reads them."""
    leaf = known[_positive(name, known)]
    if _is_flag(leaf) and values in (["true"], ["false"]):
        head, _, last = leaf.path.rpartition(".")
        last = last if values == ["true"] else f"no-{last}"
        return [f"--{head}.{last}" if head else f"--{last}"]
    return [f"--{name}", *values]


def _wrong(leaf: Leaf, values: list[str]) -> str:
    expected = _expected(leaf.type)
    if expected is None:
        return f"{_flag(leaf.path)} cannot be set on the command line (it is {leaf.value!r}): set it in the file"
    if not values:
        return f"{_flag(leaf.path)} needs a value: {expected}"
    text = " ".join(values)
    near = nearest(text, choices) if (choices := _choices(leaf.type)) else ""
    return f"{_flag(leaf.path)} is {text!r}, which should be {expected}{near}"


def _choices(kind: Any) -> list[str]:
    if typing.get_origin(kind) is typing.Literal:
        return [str(x) for x in typing.get_args(kind)]
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return [c for k in typing.get_args(kind) for c in _choices(k)]
    return []


def _expected(kind: Any) -> str | None:
    """A type in words; None for one that no word on a command line can give."""
    words = {int: "a whole number", float: "a number", str: "text", bool: "True or False", type(None): "None"}
    if kind in words:
        return words[kind]
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return f"one of {', '.join(map(str, args))}"
    if origin in (typing.Union, types.UnionType):
        parts = [e for a in args if (e := _expected(a)) is not None]
        return " or ".join(parts) if parts != ["None"] else None
    if origin is tuple or origin is list:
        if len(args) == 2 and args[1] is Ellipsis or origin is list:
            inner = _expected(args[0])
            return inner and "any number of values, each " + inner
        parts = [_expected(a) for a in args]
        return None if None in parts else f"{len(parts)} values: {', '.join(map(str, parts))}"
    if dataclasses.is_dataclass(kind) or kind is Any or not isinstance(kind, type):
        return None
    return f"a {kind.__name__}"
