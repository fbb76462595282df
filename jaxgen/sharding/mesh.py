"""A mesh of devices, described by its sizes and built from whatever devices there are."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType

from jaxgen.errors import UserError

AXES = ("data", "fsdp", "expert", "sequence", "tensor")
"""Mesh axes, from the slowest links to the fastest: tensor parallelism gets the nearest neighbours."""


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Sizes of the mesh axes; one of them may be -1, "all that is left"."""

    data: int = -1
    """Copies of the model, each with its share of the batch."""
    fsdp: int = 1
    """Shards of the parameters and optimizer state, each also with its share of the batch."""
    tensor: int = 1
    """Shards of the heads, hidden units and vocabulary."""
    sequence: int = 1
    """Shards of the sequence length."""
    expert: int = 1
    """Shards of the experts of a mixture of experts."""
    slices: int = 1
    """TPU slices (or hosts' worth of devices) joined by the data-centre network; they divide the data axis."""

    def sizes(self, devices: int) -> dict[str, int]:
        """Size of each axis on so many devices. Raises UserError where they do not fit."""
        sizes = {axis: getattr(self, axis) for axis in AXES}
        free = [axis for axis, size in sizes.items() if size == -1]
        wrong = [f"mesh.{axis} = {size}" for axis, size in sizes.items() if size < 1 and size != -1]
        if wrong:
            raise UserError(f"{', '.join(wrong)}: a mesh size is at least 1, or -1.")
        if self.slices < 1:
            raise UserError(f"mesh.slices = {self.slices}: there is at least one slice.")
        if len(free) > 1:
            named = f"{', '.join(f'mesh.{a}' for a in free[:-1])} and mesh.{free[-1]}"
            how = "both" if len(free) == 2 else "all"
            raise UserError(f"{named} are {how} -1; only one axis can take what is left.")
        known = math.prod(size for size in sizes.values() if size != -1)
        stated = ", ".join(f"{axis} {size}" for axis, size in sizes.items() if size != 1)
        if free:
            if devices % known:
                raise UserError(f"The mesh ({stated}) needs a multiple of {known} devices, and there are {devices}.")
            sizes[free[0]] = devices // known
        elif known != devices:
            raise UserError(
                f"The mesh ({stated or 'all 1'}) is for {known} device{'s' * (known > 1)}, and there are {devices}; "
                "-1 lets one axis take what is left."
            )
        if sizes["data"] % self.slices:
            raise UserError(f"mesh.data = {sizes['data']} cannot be divided over mesh.slices = {self.slices}.")
        return sizes

    def build(self, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
        """The mesh on the given devices (default: all of every process), near ones adjacent on the inner axes."""
        devices = jax.devices() if devices is None else list(devices)
        sizes = tuple(self.sizes(len(devices)).values())
        known = hasattr(devices[0], "slice_index")  # not those of CPU, or that a program is compiled for elsewhere
        # GPUs of several hosts have one a host, and may do as one mesh all the same
        if known and devices[0].platform == "tpu" and (there := len({d.slice_index for d in devices})) != self.slices:
            raise UserError(f"mesh.slices = {self.slices}, and the devices are of {there} slice{'s' * (there > 1)}.")
        if self.slices > 1:
            inner = (sizes[0] // self.slices, *sizes[1:])
            if known:
                outer = (self.slices, *(1 for _ in inner[1:]))
                grid = mesh_utils.create_hybrid_device_mesh(inner, outer, devices, allow_split_physical_axes=True)
            else:  # devices that know no slices (CPU): equal runs of them stand in
                grid = np.asarray(devices).reshape(self.slices, *inner).reshape(sizes)
        elif devices[0].platform == "tpu":
            grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
        else:
            grid = np.asarray(devices).reshape(sizes)
        return jax.sharding.Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))

    def abstract(self, devices: int) -> AbstractMesh:
        """The same mesh with no devices behind it, for tracing."""
        sizes = tuple(self.sizes(devices).values())
        return AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES))
