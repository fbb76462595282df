"""The mesh: its sizes on so many devices, its order, and what is said of one that does not fit."""

import jax
import numpy as np
import pytest

from jaxgen.errors import UserError
from jaxgen.sharding import AXES, Mesh


def test_one_axis_takes_what_is_left():
    assert Mesh().sizes(8) == {"data": 8, "fsdp": 1, "expert": 1, "sequence": 1, "tensor": 1}
    assert Mesh(data=1, fsdp=-1, tensor=2).sizes(8)["fsdp"] == 4
    assert Mesh(data=2, tensor=2).sizes(4)["data"] == 2


@pytest.mark.parametrize(
    ("mesh", "words"),
    [
        (Mesh(data=3), "The mesh (data 3) is for 3 devices, and there are 8; -1 lets one axis take what is left."),
        (Mesh(data=1), "The mesh (all 1) is for 1 device, and there are 8; -1 lets one axis take what is left."),
        (Mesh(tensor=3), "The mesh (data -1, tensor 3) needs a multiple of 3 devices, and there are 8."),
        (Mesh(fsdp=-1), "mesh.data and mesh.fsdp are both -1; only one axis can take what is left."),
        (Mesh(fsdp=-1, tensor=-1),
         "mesh.data, mesh.fsdp and mesh.tensor are all -1; only one axis can take what is left."),
        (Mesh(fsdp=0, tensor=-2), "mesh.fsdp = 0, mesh.tensor = -2: a mesh size is at least 1, or -1."),
        (Mesh(slices=0), "mesh.slices = 0: there is at least one slice."),
        (Mesh(fsdp=4, slices=4), "mesh.data = 2 cannot be divided over mesh.slices = 4."),
    ],
)  # fmt: skip
def test_a_mesh_that_does_not_fit(mesh, words):
    with pytest.raises(UserError) as caught:
        mesh.build()
    assert str(caught.value) == words


def test_inner_axes_have_near_devices():
    built = Mesh(data=2, fsdp=2, tensor=2).build()
    assert built.axis_names == AXES and built.devices.shape == (2, 2, 1, 1, 2)
    ids = np.vectorize(lambda d: d.id)(built.devices)
    np.testing.assert_array_equal(ids.ravel(), np.arange(8))


def test_a_part_of_the_devices():
    assert Mesh().build(jax.devices()[:4]).shape["data"] == 4


class Slice:
    """A device that knows its slice, as TPUs do."""

    platform, device_kind, process_index = "tpu", "TPU v5p", 0

    def __init__(self, id, slice_index):
        self.id, self.slice_index, self.coords, self.core_on_chip = id, slice_index, (id % 4, 0, 0), 0


def test_slices_split_the_data_axis(monkeypatch):
    """Devices along the other axes, and neighbours along data, are of one slice, in whatever order they are listed."""
    monkeypatch.setattr(jax.sharding, "Mesh", lambda grid, *_, **__: grid)
    devices = [Slice(i, i // 4) for i in range(8)]
    for order in (devices, devices[::-1]):
        grid = Mesh(data=4, tensor=2, slices=2).build(order)
        of = np.vectorize(lambda d: d.slice_index)(grid).reshape(4, 2)
        np.testing.assert_array_equal(of, [[0, 0], [0, 0], [1, 1], [1, 1]])


@pytest.mark.parametrize(("there", "slices"), [(1, 2), (2, 1), (4, 2)])
def test_slices_that_are_not_those_of_the_devices(there, slices):
    devices = [Slice(i, i * there // 8) for i in range(8)]
    with pytest.raises(UserError, match=f"mesh.slices = {slices}, and the devices are of {there} slice"):
        Mesh(data=8, slices=slices).build(devices)


def test_slices_are_simulated_where_devices_know_none():
    ids = np.vectorize(lambda d: d.id)(Mesh(data=4, tensor=2, slices=2).build().devices)
    np.testing.assert_array_equal(ids.reshape(2, 4), [[0, 1, 2, 3], [4, 5, 6, 7]])


def test_abstract_mesh_has_the_same_shape():
    mesh = Mesh(fsdp=2, tensor=2)
    assert mesh.abstract(8).shape == mesh.build().shape
