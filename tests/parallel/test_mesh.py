"""How devices are split."""

import pytest

from srlm_jax.parallel.mesh import MeshShape, resolve, sample_mesh, train_mesh


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
