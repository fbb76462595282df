"""Trees as named leaves, and the Orbax items that hold them."""

import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from jaxgen.errors import nearest


def named(tree: Any) -> dict[str, Any]:
    """Leaves by name, as "params/model/kernel": keys, fields and indices joined by "/", in the tree's own order.

    None and empty containers have no leaves. Python numbers become arrays.
    """
    leaves = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = "/".join(map(_component, path))
        if name in leaves:
            raise ValueError(f"two leaves are named {name}")
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            leaf = np.asarray(leaf)
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            raise ValueError(f"{name} is a typed random key; save jax.random.key_data of it")
        leaves[name] = leaf
    return leaves


def _component(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):   # "/" joins names here and "." in Orbax: escape them as JSON pointers do
            return str(getattr(key, attribute)).replace("~", "~0").replace("/", "~1").replace(".", "~2")
    raise TypeError(f"a key path of this kind is not known: {key!r}")


def item(name: str) -> str:
    """The Orbax item that holds a leaf: its top field, or "leaves" for what is a leaf of the tree itself."""
    top, _, rest = name.partition("/")
    return top if rest and re.fullmatch(r"[A-Za-z][\w-]*", top) else "leaves"


def items(leaves: Mapping[str, Any]) -> dict[str, dict]:
    """Item -> nested dict of its leaves. Empty arrays, which Orbax refuses, are left to the manifest."""
    trees: dict[str, dict] = {}
    for name, leaf in leaves.items():
        if 0 in leaf.shape:
            continue
        *above, last = name.split("/")
        node = trees.setdefault(item(name), {})
        for component in above:
            node = node.setdefault(component, {})
        node[last] = leaf
    return trees


def pick(trees: Mapping[str, Any], name: str) -> Any:
    """A leaf of what `items` gave."""
    return functools.reduce(lambda node, component: node[component], name.split("/"), trees[item(name)])


def below(leaves: Mapping[str, Any], part: str) -> dict[str, Any]:
    """The leaves at or below the path `part`; all for an empty one."""
    return {name: leaf for name, leaf in leaves.items() if not part or name == part or name.startswith(part + "/")}


def parts(names: Iterable[str]) -> set[str]:
    """Every path that `below` knows."""
    return {name[:end] for name in names for end in [at.start() for at in re.finditer("/", name)] + [len(name)]}


def described(leaf: Any) -> dict[str, Any]:
    """A leaf in a manifest."""
    return {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}


def differences(wanted: Mapping[str, Any], saved: Mapping[str, dict], dtypes: bool = True) -> str:
    """How the leaves `wanted` are not those `saved` (as in a manifest); empty when they are."""
    left = [name for name in saved if name not in wanted]
    texts = [f"{name} is not in it{nearest(name, left or saved)}" for name in wanted if name not in saved]
    texts += [f"{name} is left over" for name in left]
    for name in [name for name in wanted if name in saved]:
        there, here = saved[name], described(wanted[name])
        if there["shape"] != here["shape"]:
            texts.append(f"{name} has shape {tuple(there['shape'])} in it and {tuple(here['shape'])} here")
        elif dtypes and there["dtype"] != here["dtype"]:
            texts.append(f"{name} is {there['dtype']} in it and {here['dtype']} here")
    return "; ".join(texts[:12]) + (f"; and {len(texts) - 12} more" if len(texts) > 12 else "")


def restore_args(leaf: Any) -> ocp.RestoreArgs:
    """How Orbax reads a leaf: numpy arrays as such, others straight into their sharding."""
    if isinstance(leaf, np.ndarray | np.generic):
        return ocp.RestoreArgs(restore_type=np.ndarray, dtype=leaf.dtype)
    return ocp.ArrayRestoreArgs(sharding=_sharding(leaf), global_shape=leaf.shape, dtype=leaf.dtype)


def empty(leaf: Any) -> Any:
    """The array without elements that `leaf` describes."""
    value = np.zeros(leaf.shape, leaf.dtype)
    if isinstance(leaf, np.ndarray | np.generic):
        return value
    return jax.make_array_from_callback(leaf.shape, _sharding(leaf), lambda index: value[index])


def _sharding(leaf: Any) -> jax.sharding.Sharding:
    return leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
