"""Device meshes: which devices hold what, and how several hosts start as one."""

import dataclasses
from collections.abc import Sequence

import jax
from jax.experimental import mesh_utils


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshShape:
    """How the devices are split. Two layouts over the same devices: one to train in, one to sample in.

    data: groups of devices that hold whole copies of the weights (across slices). fsdp: devices that share one copy
    and gather weights as they need them. tensor: devices that split each matrix product. Sampling uses `data` and
    `tensor` alone: there the devices of `fsdp` count as `data`. fsdp = -1 takes all devices that are left.
    """

    data: int
    fsdp: int
    tensor: int


def start(coordinator: str | None) -> None:
    """Joins this host to the others of the job, before any other JAX call. None: one host, nothing to join."""
    if coordinator is not None:
        jax.distributed.initialize(None if coordinator == "auto" else coordinator)


def _make(sizes: dict[str, int], devices: Sequence[jax.Device]) -> jax.sharding.Mesh:
    # Where an axis is longer than those of the slice (8 chips of a 4 x 4 x 4), one of these is split.
    placed = mesh_utils.create_device_mesh(tuple(sizes.values()), devices, allow_split_physical_axes=True)
    return jax.sharding.Mesh(placed, tuple(sizes), axis_types=(jax.sharding.AxisType.Auto,) * len(sizes))


def resolve(shape: MeshShape, devices: int) -> MeshShape:
    """`shape` with -1 replaced.

    Raises:
      ValueError: the axes do not multiply to the number of devices.
    """
    fsdp = shape.fsdp
    if fsdp == -1:
        fsdp = devices // (shape.data * shape.tensor)
    if fsdp < 1 or shape.data * fsdp * shape.tensor != devices:
        raise ValueError(
            f"mesh.data x mesh.fsdp x mesh.tensor = {shape.data} x {shape.fsdp} x {shape.tensor} does not make "
            f"{devices} devices: change one of them, or set mesh.fsdp to -1"
        )
    return dataclasses.replace(shape, fsdp=fsdp)


def train_mesh(shape: MeshShape) -> jax.sharding.Mesh:
    """The mesh for training on this job's devices: axes data, fsdp, tensor."""
    return train_mesh_over(shape, jax.devices())


def train_mesh_over(shape: MeshShape, devices: Sequence[jax.Device]) -> jax.sharding.Mesh:
    """The mesh for training on any devices, which may be descriptions alone."""
    shape = resolve(shape, len(devices))
    return _make({"data": shape.data, "fsdp": shape.fsdp, "tensor": shape.tensor}, devices)


def sample_mesh(shape: MeshShape) -> jax.sharding.Mesh:
    """The mesh for sampling, over the same devices: axes data, tensor."""
    return sample_mesh_over(shape, jax.devices())


def sample_mesh_over(shape: MeshShape, devices: Sequence[jax.Device]) -> jax.sharding.Mesh:
    """The mesh for sampling on any devices: those of `train_mesh_over` in the same order, so that weights move from
    one to the other within one program."""
    over = train_mesh_over(shape, devices).devices
    axis_types = (jax.sharding.AxisType.Auto,) * 2
    return jax.sharding.Mesh(over.reshape(-1, over.shape[-1]), ("data", "tensor"), axis_types=axis_types)
