"""Pictures as sequences of patches: cutting, positions on the grid, and leaving some out."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Patches(NamedTuple):
    """Pictures of any shape in N places each (NaFlex; Tschannen et al. 2025): the patches of a picture of h rows and w
    columns row by row, then padding."""

    values: Float[Array, "B N P"]
    """Pixels of each patch, as `patchify` orders them."""
    coordinates: Int[Array, "B N 2"]
    """(row, column) of each patch."""
    mask: Bool[Array, "B N"]
    """False for padding."""


def patchify(image: Float[Array, "B H W C"], patch: int) -> Float[Array, "B N P"]:
    """The patches row by row, each with its pixels row by row, channels last. What is left at the right and lower
    edge is cut off, as a convolution without padding does."""
    batch, height, width, channels = image.shape
    rows, columns = height // patch, width // patch
    image = image[:, : rows * patch, : columns * patch]
    image = image.reshape(batch, rows, patch, columns, patch, channels).swapaxes(2, 3)
    return image.reshape(batch, rows * columns, patch * patch * channels)


def grid(rows: int, columns: int) -> Int[Array, "1 N 2"]:
    """(row, column) of each patch of a picture."""
    at = jnp.stack(jnp.meshgrid(jnp.arange(rows), jnp.arange(columns), indexing="ij"), -1)
    return at.reshape(1, rows * columns, 2).astype(jnp.int32)


def unpatchify(patches: Float[Array, "B N P"], rows: int, columns: int, patch: int) -> Float[Array, "B H W C"]:
    """The picture of rows x columns patches: `patchify` undone."""
    x = patches.reshape(patches.shape[0], rows, columns, patch, patch, -1).swapaxes(2, 3)
    return x.reshape(x.shape[0], rows * patch, columns * patch, -1)


def sincos(coordinates: Int[Array, "B N 2"], width: int, shift: int = 1) -> Float[Array, "B N E"]:
    """Sines and cosines of the column and of the row, a quarter of the features each, of periods from 2 pi to
    2 pi 10,000: that one the last (Chen et al. 2021, MoCo v3), or with `shift` = 0 the first left out (He et al. 2022,
    MAE)."""
    frequencies = 10_000.0 ** -(jnp.arange(width // 4) / (width // 4 - shift))
    row, column = jnp.moveaxis(coordinates[..., None] * frequencies, -2, 0)
    return jnp.concatenate([jnp.sin(column), jnp.cos(column), jnp.sin(row), jnp.cos(row)], axis=-1)


def interpolate(
    table: Float[Array, "G G E"], coordinates: Int[Array, "B N 2"], mask: Bool[Array, "B N"]
) -> Float[Array, "B N E"]:
    """A learned table resized to each picture's own rows and columns (bilinear, antialiased, half-pixel centres), and
    read at its coordinates. As a product with the weights of all of the table's places, so that its shape is fixed
    while the pictures' differ."""
    size = table.shape[0]
    extent = jnp.where(mask[..., None], coordinates, 0).max(1, keepdims=True) + 1  # (B, 1, 2): rows, columns
    step = size / extent  # places of the table for one of the picture
    centre = (coordinates + 0.5) * step
    distance = jnp.abs(jnp.arange(size) + 0.5 - centre[..., None]) / jnp.maximum(step, 1.0)[..., None]
    weights = jnp.maximum(1.0 - distance, 0.0)
    row, column = jnp.moveaxis(weights / jnp.maximum(weights.sum(-1, keepdims=True), 1e-6), 2, 0)  # (B, N, G) each
    both = (row[..., :, None] * column[..., None, :]).reshape(*mask.shape, size * size)
    return both.astype(table.dtype) @ table.reshape(size * size, -1)


def choose(keys: Array, keep: int, mask: Bool[Array, "B N"]) -> Int[Array, "B keep"]:
    """Places of `keep` patches of each example, drawn without replacement by its own key; padding comes last."""
    draw = jax.vmap(lambda key: jax.random.uniform(key, (mask.shape[1],)))(keys)
    return jnp.argsort(jnp.where(mask, draw, 2.0), axis=-1)[:, :keep]
