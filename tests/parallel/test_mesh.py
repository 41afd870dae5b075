"""How devices are split."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from srlm_jax.parallel import mesh
from srlm_jax.parallel.mesh import MeshShape, arrange, resolve, sample_mesh, train_mesh


@pytest.mark.parametrize(
    ("shape", "devices", "fsdp"), [((1, -1, 1), 8, 8), ((2, -1, 2), 8, 2), ((2, 2, 2), 8, 2), ((1, -1, 1), 1, 1)]
)
def test_the_devices_that_are_left_go_to_fsdp(shape, devices, fsdp):
    data, asked, tensor = shape
    assert resolve(MeshShape(data=data, fsdp=asked, tensor=tensor), devices) == MeshShape(
        data=data, fsdp=fsdp, tensor=tensor
    )


@pytest.mark.parametrize(("shape", "devices"), [((1, 2, 2), 8), ((3, -1, 1), 8), ((16, -1, 1), 8), ((1, 0, 8), 8)])
def test_a_shape_that_does_not_make_the_devices_is_refused(shape, devices):
    data, fsdp, tensor = shape
    with pytest.raises(ValueError, match=rf"does not make {devices} devices: change one of them, or set"):
        resolve(MeshShape(data=data, fsdp=fsdp, tensor=tensor), devices)


def test_sampling_counts_the_devices_of_fsdp_as_data():
    shape = MeshShape(data=2, fsdp=-1, tensor=2)
    assert dict(train_mesh(shape).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert dict(sample_mesh(shape).shape) == {"data": 4, "tensor": 2}
    assert train_mesh(shape).devices.ravel().tolist() == sample_mesh(shape).devices.ravel().tolist()


# Several slices.


@dataclasses.dataclass(frozen=True)
class Chip:
    """What arranging reads of a device."""

    id: int
    slice_index: int
    coords: tuple[int, int, int]
    platform: str
    device_kind: str = "of a test"
    core_on_chip: int = 0
    process_index: int = 0


def chips(slices, platform):
    """`slices` slices of 4 x 2 chips, named in an order of no use."""
    torus = list(itertools.product(range(4), range(2)))
    found = [
        Chip(id=8 * i + j, slice_index=i, coords=(x, y, 0), platform=platform)
        for j, (x, y) in enumerate(torus)
        for i in range(slices)
    ]
    return found[::-1]


def slices_of(devices):
    return np.vectorize(lambda device: device.slice_index)(devices)


@pytest.mark.parametrize("shape", [(2, 8, 1), (2, 4, 2), (2, -1, 8), (4, 2, 2), (4, -1, 1), (16, 1, 1)])
def test_groups_of_data_lie_within_a_slice(shape):
    data, fsdp, tensor = shape
    devices = arrange(MeshShape(data=data, fsdp=fsdp, tensor=tensor), chips(2, "tpu"))
    assert devices.shape == (data, 16 // data // tensor, tensor)
    assert {device.id for device in devices.ravel()} == set(range(16))
    found = slices_of(devices).reshape(data, -1)
    assert (found == found[:, :1]).all()
    assert found[:, 0].tolist() == sorted(found[:, 0])  # and slice after slice: sampling's groups of data follow suit


def test_neighbours_on_an_axis_are_neighbours_on_the_torus():
    devices = arrange(MeshShape(data=2, fsdp=4, tensor=2), chips(2, "tpu"))
    coords = np.array([device.coords for device in devices.ravel()]).reshape(2, 4, 2, 3)
    assert (np.abs(np.diff(coords, axis=2)).sum(-1) == 1).all()
    assert (np.abs(np.diff(coords, axis=1)).sum(-1) == 1).all()


def test_a_shape_that_does_not_follow_the_torus_is_made_all_the_same():
    devices = arrange(MeshShape(data=2, fsdp=1, tensor=4), chips(1, "tpu"))  # half an axis and a whole one
    assert {device.id for device in devices.ravel()} == set(range(8))


@pytest.mark.parametrize("shape", [(1, -1, 1), (1, 6, 4), (2, -1, 1), (4, -1, 2)])
def test_a_group_that_would_reach_over_slices_is_refused(shape):
    data, fsdp, tensor = shape
    with pytest.raises(ValueError, match=rf"mesh\.data is {data}, .* 3 slices, .*: make mesh\.data 3, or a multiple"):
        arrange(MeshShape(data=data, fsdp=fsdp, tensor=tensor), chips(3, "tpu"))


@pytest.mark.parametrize("platform", ["gpu", "cpu"])
def test_fsdp_may_reach_over_nodes_of_gpus_and_tensor_stays_within_one(platform):
    nodes = sorted(chips(2, platform), key=lambda chip: chip.id)
    devices = arrange(MeshShape(data=1, fsdp=-1, tensor=8), nodes if platform == "cpu" else nodes[::-1])
    assert slices_of(devices).tolist() == [[[0] * 8, [1] * 8]]


# --- compiled programs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chosen", "folder", "kept"),
    [
        (None, "~/programs", "/home/somebody/programs"),
        (None, "gs://bucket/programs", "gs://bucket/programs"),
        (None, None, None),
        ("/chosen/before", "~/programs", "/chosen/before"),
    ],
)
def test_where_compiled_programs_are_kept(monkeypatch, chosen, folder, kept):
    monkeypatch.setenv("HOME", "/home/somebody")
    before = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_compilation_cache_dir", chosen)
        mesh.keep_programs(folder)
        assert jax.config.jax_compilation_cache_dir == kept
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
