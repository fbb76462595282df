"""Number formats: float32 parameters, and compute in what the device is good at."""

from typing import Literal

import jax
import jax.numpy as jnp

from jaxgen import sharding

DType = Literal["auto", "float32", "bfloat16", "float16"]
"""A compute format; "auto" is bfloat16 on accelerators and float32 on CPU."""


def device() -> jax.Device | None:
    """A device of those that are traced for: of the mesh in force, else JAX's default; None for an abstract mesh that
    stands for others."""
    scope = sharding.current()
    if scope is not None and isinstance(scope.mesh, jax.sharding.Mesh):
        return scope.mesh.devices.flat[0]
    return None if scope is not None and scope.platform else jax.devices()[0]


def platform() -> str:
    """The platform that is traced for: "cpu", "gpu", "tpu"."""
    found = device()
    return sharding.current().platform if found is None else found.platform


def resolve(dtype: DType) -> jnp.dtype:
    """The JAX dtype that a `DType` stands for where it is traced."""
    if dtype == "auto":
        dtype = "float32" if platform() == "cpu" else "bfloat16"
    return jnp.dtype(dtype)
