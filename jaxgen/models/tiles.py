"""Pictures too large to be decoded (or encoded) at once, a tile at a time.

Neighbouring tiles overlap. What lies within `margin` of a tile's inner edge, where the picture seems to end, is left
out, and over the rest of the overlap one tile fades into the next, linearly. So the result is exactly the whole one
where a place depends on nothing further away than the margin. The norms and the attention of an `Autoencoder` depend on
everything: there tiles differ a little, and fading makes a slope of what would be a seam.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxgen.errors import UserError
from jaxgen.models.autoencoder import Autoencoder, Gaussian


def tiled_decode(
    module: Autoencoder,
    params: Any,
    latent: Float[Array, "B h w L"],
    tile: int,
    overlap: int,
    margin: int | None = None,
) -> Float[Array, "B H W C"]:
    """`decode` with at most `tile` x `tile` places of the latents at a time.

    Args:
      tile: places along a tile's side; the more, the nearer to the whole.
      overlap: places that neighbours share.
      margin: of these, places left out at each tile's inner edge; None for an eighth of the overlap.
    """

    def decode(part):
        return module.apply({"params": params}, part, method="decode")

    return tiled(decode, latent, tile, overlap, margin, out=module.factor)


def tiled_encode(
    module: Autoencoder,
    params: Any,
    image: Float[Array, "B H W C"],
    tile: int,
    overlap: int,
    margin: int | None = None,
) -> Gaussian:
    """`encode` a tile at a time; sizes are in places of the latents, as in `tiled_decode`."""
    module.check(image.shape[1:])

    def encode(part):
        return jnp.concatenate(module.apply({"params": params}, part, method="encode"), -1)

    found = tiled(encode, image, tile, overlap, margin, step=module.factor)
    return Gaussian(*jnp.split(found, 2, -1))


def tiled(
    function: Callable[[Array], Array],
    x: Float[Array, "B H W C"],
    tile: int,
    overlap: int,
    margin: int | None = None,
    step: int = 1,
    out: int = 1,
) -> Float[Array, "B h w D"]:
    """`function` of a map, computed tile by tile and put together, in float32.

    Args:
      function: of a map whose sides are multiples of `step` to one with `out` / `step` times its sides.
      tile: side of a tile, in places of `step` entries of x.
      overlap, margin: in places too, see above.

    Raises:
      UserError: the overlap is not less than the tile, or the margins leave nothing of it.
    """
    margin = overlap // 8 if margin is None else margin
    if not 0 <= overlap < tile:
        raise UserError(f"Tiles of {tile} places overlap by 0 to {tile - 1}, not by {overlap}.")
    if margin < 0 or (2 * margin >= overlap and margin):
        raise UserError(f"Tiles that overlap by {overlap} places leave out fewer than half of them, not {margin}.")
    sides = [size // step for size in x.shape[1:3]]
    if max(sides) <= tile:
        return function(x).astype(jnp.float32)
    (rows, high), (columns, wide) = (_along(side, tile, overlap, margin, out) for side in sides)
    shape = [min(tile, side) for side in sides]
    places = jnp.asarray([(r, c) for r in rows for c in columns])
    shares = jnp.asarray([np.multiply.outer(a, b)[..., None] for a in high for b in wide], jnp.float32)

    def part(at):
        size = (x.shape[0], shape[0] * step, shape[1] * step, x.shape[3])
        return function(jax.lax.dynamic_slice(x, (0, at[0] * step, at[1] * step, 0), size))

    def add(whole, tile):
        at, share = tile
        corner = (0, at[0] * out, at[1] * out, 0)
        found = part(at) * share
        old = jax.lax.dynamic_slice(whole, corner, found.shape)
        return jax.lax.dynamic_update_slice(whole, old + found, corner), None

    features = jax.eval_shape(part, places[0]).shape[-1]
    empty = jnp.zeros((x.shape[0], sides[0] * out, sides[1] * out, features))
    return jax.lax.scan(add, empty, (places, shares))[0]


def _along(size: int, tile: int, overlap: int, margin: int, out: int) -> tuple[list[int], list[np.ndarray]]:
    """(where tiles begin along one side, each tile's share of the result at its own entries).

    A tile fades in where the one before it fades out, so that the shares at an entry always sum to 1.
    """
    if size <= tile:
        return [0], [np.ones(size * out)]
    count = -(-(size - overlap) // (tile - overlap))
    starts = [round(i * (size - tile) / (count - 1)) for i in range(count)]
    at = (np.arange(size * out) + 0.5) / out
    arrived = [np.ones(size * out)]
    for before, start in zip(starts, starts[1:], strict=False):
        first, last = start + margin, before + tile - margin
        arrived.append(np.clip((at - first) / max(last - first, 1e-9), 0, 1))
    arrived.append(np.zeros(size * out))
    shares = [a - b for a, b in zip(arrived, arrived[1:], strict=False)]
    return starts, [share[start * out : (start + tile) * out] for share, start in zip(shares, starts, strict=True)]
