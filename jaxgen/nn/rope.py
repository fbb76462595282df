"""Rotary position embedding and its scaling to longer contexts."""

import dataclasses
import math
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxgen.errors import UserError


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embedding (Su et al. 2021, eq. 34), in the half-split layout: feature i pairs with i + D/2."""

    theta: float = 10_000.0
    """Base of the wavelengths 2 pi theta^(2i/D)."""
    scaling: Literal["none", "linear", "llama3"] = "none"
    """"linear" divides every frequency by `factor` (Chen et al. 2023); "llama3" only the slow ones (Llama 3.1)."""
    factor: float = 1.0
    low_frequency: float = 1.0
    """llama3: waves of which fewer than this many fit `original_length` are slowed by the whole factor."""
    high_frequency: float = 4.0
    """llama3: waves of which more than this many fit are left alone."""
    original_length: int = 8192

    def frequencies(self, head_dim: int) -> Float[Array, "half"]:
        """Angle per position of each pair of features, in radians."""
        freq = self.theta ** -(jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
        if self.scaling == "linear":
            return freq / self.factor
        if self.scaling == "llama3":
            waves = self.original_length * freq / (2 * math.pi)
            keep = (waves - self.low_frequency) / (self.high_frequency - self.low_frequency)
            keep = jnp.clip(keep, 0.0, 1.0)
            return keep * freq + (1 - keep) * freq / self.factor
        return freq

    def __call__(self, x: Float[Array, "B L H D"], positions: Int[Array, "#B L"]) -> Float[Array, "B L H D"]:
        """Turn each head's features by their position's angles."""
        angle = positions[..., None, None].astype(jnp.float32) * self.frequencies(x.shape[-1])
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class Rope2D:
    """Rotary embedding of rows and columns (axial; Heo et al. 2024): half of a head's features turn by the row, half
    by the column."""

    theta: float = 100.0
    """Base of the wavelengths; small, for there are few rows and columns."""

    def __call__(self, x: Float[Array, "B L H D"], positions: Int[Array, "#B L 2"]) -> Float[Array, "B L H D"]:
        """Turn each head's features by their (row, column)'s angles."""
        rope = Rope(self.theta)
        parts = jnp.split(x, 2, axis=-1)
        return jnp.concatenate([rope(part, positions[..., i]) for i, part in enumerate(parts)], axis=-1)


@dataclasses.dataclass(frozen=True)
class RopeAxes:
    """Rotary embedding along several axes at once, each turning features of its own (Black Forest Labs 2024, FLUX.1),
    in the half-split layout: feature i pairs with i + D/2 whatever its axis."""

    axes: tuple[int, ...] = ()
    """Features of a head that turn by each axis, which are even; () for three axes of which the second and third have
    7/16 of the features each (16, 56 and 56 of 128)."""
    theta: float = 10_000.0
    """Base of the wavelengths of each axis."""

    def sizes(self, head_dim: int) -> tuple[int, ...]:
        """Features of each axis. Raises UserError where they are not those of a head."""
        side = head_dim * 7 // 32 * 2
        sizes = self.axes or (head_dim - 2 * side, side, side)
        if sum(sizes) != head_dim or any(size % 2 or size < 2 for size in sizes):
            raise UserError(f"The rotary axes {sizes} are not even shares of a head's {head_dim} features.")
        return sizes

    def __call__(self, x: Float[Array, "B L H D"], positions: Int[Array, "#B L axes"]) -> Float[Array, "B L H D"]:
        """Turn each head's features by their position along each axis."""
        angles = [
            positions[..., None, i, None].astype(jnp.float32) * Rope(self.theta).frequencies(size)
            for i, size in enumerate(self.sizes(x.shape[-1]))
        ]
        angle = jnp.concatenate(angles, -1)
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1).astype(x.dtype)
