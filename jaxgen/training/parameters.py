"""Parameters by name: their paths, patterns over them, and trees split in two, None standing for what is missing."""

import difflib
import re
from typing import Any

import jax
from jaxtyping import PyTree

from jaxgen.errors import UserError


def paths(tree: PyTree) -> PyTree[str]:
    """The tree with each leaf replaced by its path, such as "model/blocks/attention/query/kernel"."""
    return jax.tree_util.tree_map_with_path(lambda path, _: join(path), tree)


def join(path: tuple[Any, ...]) -> str:
    """A key path of `jax.tree_util` as names joined by "/"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def search(patterns: tuple[str, ...], tree: PyTree) -> PyTree[bool]:
    """Whether any of the regular expressions is found in a leaf's path; those that are found nowhere are let pass."""
    return jax.tree.map(lambda path: any(re.search(p, path) for p in patterns), paths(tree))


def match(patterns: tuple[str, ...], tree: PyTree, what: str = "") -> PyTree[bool]:
    """Whether any of the regular expressions is found in a leaf's path.

    A pattern that is found in no path, or is no regular expression, raises UserError, naming `what` asked for it (such
    as "optimizer.freeze") and the path that is nearest.
    """
    names = jax.tree.leaves(paths(tree))
    of = f" of {what}" if what else ""
    for pattern in patterns:
        try:
            found = any(re.search(pattern, name) for name in names)
        except re.error as error:
            raise UserError(f"The pattern '{pattern}'{of} is not a regular expression: {error}.") from None
        if not found:
            raise UserError(f"The pattern '{pattern}'{of} matches no parameter; {_nearest(pattern, names)}.")
    return search(patterns, tree)


def _nearest(pattern: str, names: list[str]) -> str:
    """The path of which some part is closest to the pattern: patterns are rarely whole paths."""
    parts: dict[str, str] = {}
    for name in names:
        keys = name.split("/")
        for i in range(len(keys)):
            for j in range(len(keys), i, -1):
                parts.setdefault("/".join(keys[i:j]), name)
    found = difflib.get_close_matches(pattern, parts, n=1, cutoff=0.0)
    return f"the nearest is '{parts[found[0]]}'" if found else "there are none to match"


def partition(params: PyTree, patterns: tuple[str, ...], what: str = "optimizer.freeze") -> tuple[PyTree, PyTree]:
    """(trainable, frozen): two trees of the shape of `params`, frozen holding the leaves that a pattern matches; each
    has None where the other has a leaf. What is None in `params` stays None in both."""
    frozen = match(patterns, params, what)
    return (
        jax.tree.map(lambda leaf, cold: None if cold else leaf, params, frozen),
        jax.tree.map(lambda leaf, cold: leaf if cold else None, params, frozen),
    )


def merge(a: PyTree, b: PyTree) -> PyTree:
    """The tree that `partition` split, from its parts in either order; None alone stands for a part with nothing."""
    if a is None or b is None:
        return b if a is None else a

    def one(path, x, y):
        if x is not None and y is not None:
            raise ValueError(f"both trees have a leaf at '{join(path)}'")
        return y if x is None else x

    return jax.tree_util.tree_map_with_path(one, a, b, is_leaf=lambda x: x is None)
