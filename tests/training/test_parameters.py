"""Paths, patterns, and trees split in two."""

import jax
import numpy as np
import pytest

from jaxgen.errors import UserError
from jaxgen.training.parameters import match, merge, partition, paths

PARAMS = {
    "model": {"blocks": {"query": {"kernel": np.ones(2), "bias": np.ones(1)}}, "stack": [np.ones(3), (np.ones(4),)]},
    "other": {"scale": None, "kernel": np.ones(5)},
}


def test_paths_are_names_joined():
    assert jax.tree.leaves(paths(PARAMS)) == [
        "model/blocks/query/bias",
        "model/blocks/query/kernel",
        "model/stack/0",
        "model/stack/1/0",
        "other/kernel",
    ]
    assert jax.tree.structure(paths(PARAMS)) == jax.tree.structure(PARAMS)


def test_match_searches_in_the_whole_path():
    assert jax.tree.leaves(match(("kernel$",), PARAMS)) == [False, True, False, False, True]
    assert jax.tree.leaves(match(("^other", "stack/1"), PARAMS)) == [False, False, False, True, True]
    assert jax.tree.leaves(match((), PARAMS)) == [False] * 5


def test_a_pattern_that_matches_nothing_names_the_nearest_path():
    with pytest.raises(UserError) as error:
        match(("kernel", "qeury/bias"), PARAMS, "optimizer.freeze")
    assert str(error.value) == (
        "The pattern 'qeury/bias' of optimizer.freeze matches no parameter; the nearest is 'model/blocks/query/bias'."
    )
    with pytest.raises(UserError, match="'\\(' of optimizer.decay is not a regular expression: "):
        match(("(",), PARAMS, "optimizer.decay")
    with pytest.raises(UserError, match="matches no parameter; there are none to match"):
        match(("kernel",), {})


def test_partition_and_merge_are_inverse():
    trainable, frozen = partition(PARAMS, ("model/blocks", "1/0"))
    assert trainable["model"]["blocks"] == {"query": {"kernel": None, "bias": None}}
    assert frozen["other"] == {"scale": None, "kernel": None}
    assert [x.size for x in jax.tree.leaves(trainable)] == [3, 5]
    assert [x.size for x in jax.tree.leaves(frozen)] == [1, 2, 4]
    for whole in (merge(trainable, frozen), merge(frozen, trainable)):
        assert jax.tree.structure(whole) == jax.tree.structure(PARAMS)
        assert all(a is b for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(PARAMS), strict=True))
    trainable, frozen = partition(PARAMS, ())
    assert jax.tree.leaves(frozen) == [] and jax.tree.structure(trainable) == jax.tree.structure(PARAMS)
    assert merge(PARAMS, None) is PARAMS and merge(None, PARAMS) is PARAMS


def test_a_leaf_in_both_trees_is_a_bug():
    with pytest.raises(ValueError, match="both trees have a leaf at 'a/b'"):
        merge({"a": {"b": 1}}, {"a": {"b": 2}})
