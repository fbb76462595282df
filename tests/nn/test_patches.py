"""Cutting pictures, positions on the grid, and leaving patches out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import vision_reference as reference

from jaxgen.nn.patches import choose, grid, interpolate, patchify, sincos


def test_patchify():
    image = np.random.default_rng(0).normal(size=(2, 13, 9, 3)).astype(np.float32)
    found = np.asarray(patchify(jnp.asarray(image), 4))
    for one, patches in zip(image, found, strict=True):
        rows, columns, expected = reference.cut(one, 4)
        assert (rows, columns) == (3, 2)  # the edge that makes no whole patch is left out
        np.testing.assert_array_equal(patches, expected)
    assert grid(3, 2)[0].tolist() == [[r, c] for r in range(3) for c in range(2)]


def test_sincos():
    found = np.asarray(sincos(grid(5, 7), 24))[0]
    expected = [reference.sincos(r, c, 24) for r in range(5) for c in range(7)]
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("shapes", [((5, 3), (2, 12)), ((6, 6), (1, 1)), ((13, 2), (4, 6))], ids=str)
def test_interpolation(shapes):
    """Larger and smaller than the table, one beside the other in one shape; padding is told apart by the mask alone."""
    places, table = 36, np.random.default_rng(0).normal(size=(6, 6, 5))
    at = np.full((2, places, 2), 99, np.int32)
    for i, (rows, columns) in enumerate(shapes):
        at[i, : rows * columns] = grid(rows, columns)[0]
    mask = at[..., 0] < 99
    found = np.asarray(jax.jit(interpolate)(jnp.asarray(table, jnp.float32), at, mask))
    assert np.isfinite(found).all()
    for i, (rows, columns) in enumerate(shapes):
        down, across = reference.resampling(6, rows), reference.resampling(6, columns)
        expected = np.einsum("rg,gke,ck->rce", down, table, across).reshape(rows * columns, 5)
        np.testing.assert_allclose(found[i, : rows * columns], expected, atol=1e-5)
    if shapes[0] == (6, 6):
        np.testing.assert_allclose(found[0], table.reshape(36, 5), atol=1e-6)


def test_choice_of_patches():
    """Without replacement, as likely one as another, by the example's own key, and padding last."""
    keys = jax.random.split(jax.random.key(0), 2000)
    mask = jnp.ones((2000, 8), bool).at[1000:, 5:].set(False)
    chosen = np.asarray(choose(keys, 4, mask))
    assert all(len(set(row)) == 4 for row in chosen)
    counts = np.stack([(chosen == i).sum(1) for i in range(8)], 1)
    np.testing.assert_allclose(counts[:1000].mean(0), 0.5, atol=0.06)
    np.testing.assert_allclose(counts[1000:, :5].mean(0), 0.8, atol=0.06)
    assert (chosen[1000:] < 5).all()
    np.testing.assert_array_equal(choose(keys[7:8], 4, mask[7:8])[0], chosen[7])
