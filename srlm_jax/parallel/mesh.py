"""Device meshes: which devices hold what, and how several hosts start as one."""

import dataclasses
import os
import socket
import sys
import threading
from collections.abc import Sequence
from typing import Annotated, NoReturn

import jax
import numpy as np
from jax.experimental import mesh_utils

from srlm_jax.errors import BadInput
from srlm_jax.limits import Count, at_least

# How long a process may give no sign of life (it gives two in that time, from a thread that no work holds up) before it
# counts as gone and jax ends the others. Long enough for a network that stalls for some seconds; jax would wait 100,
# while every device of the job is paid for.
SILENCE_S = 60

# How long processes that are done wait for the others on the way out before jax ends them all as failed. All come from
# one barrier, so that they are apart by what the ends of their programs take: seconds. jax would wait 300.
FAREWELL_S = 120


# Where compiled programs are kept unless somebody says otherwise.
PROGRAMS = "~/.cache/srlm_jax/programs"


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshShape:
    """How the devices are split. Two layouts over the same devices: one to train in, one to sample in.

    data: groups of devices that hold whole copies of the weights (across slices). fsdp: devices that share one copy
    and gather weights as they need them. tensor: devices that split each matrix product. Sampling uses `data` and
    `tensor` alone: there the devices of `fsdp` count as `data`. fsdp = -1 takes all devices that are left.

    Where TPUs form several slices, `data` is a multiple of their number, and no group reaches over two: the network
    between slices carries gradients, once a step, never weights. Nodes of GPUs have no such rule: their devices stand
    in order, so that `tensor`, and then `fsdp`, lie within a node where they fit.
    """

    data: Count
    fsdp: Annotated[int, at_least(-1)]
    tensor: Count


def keep_programs(folder: str | None) -> None:
    """Compiled programs that took a second or more are kept in `folder`, and found there by the next process that wants
    them: a run that is started again begins at once. None: they are not kept. Where JAX_COMPILATION_CACHE_DIR, or code
    before, has chosen a folder, that one stays."""
    if folder is not None and jax.config.jax_compilation_cache_dir is None:
        path = folder if "://" in folder else os.path.expanduser(folder)
        jax.config.update("jax_compilation_cache_dir", path)


def start(coordinator: str | None, processes: int | None, process: int | None, timeout_s: int) -> None:
    """Joins this process to the others of the job, before any other JAX call.

    If the others do not connect within `timeout_s`, the process prints a line and exits with status 1. No exception is
    raised: jax would ignore it while it waits, and crash at its end.

    Args:
      coordinator: None: this process is the whole job. "auto": the TPU slices, Slurm or Open MPI that it runs under
        say who the others are. "HOST:PORT": process 0 runs on HOST, and PORT is free there.
      processes: with an address, how many processes the job has.
      process: with an address, which of them this is, from 0.
      timeout_s: how long to wait, in seconds.

    Raises:
      ValueError: the address, the number or the other does not fit; nothing is there that "auto" knows.
      OSError: process 0's port is taken, or the others cannot be asked.
    """
    who = f"config.coordinator is {coordinator}"
    if coordinator in (None, "auto"):
        if processes is not None or process is not None:
            raise BadInput(f"{who}: config.processes and config.process belong to an address, HOST:PORT of process 0")
        if coordinator is None:
            return
        join = {}
    else:
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise BadInput(f"{who}: give HOST:PORT of process 0, or auto on TPU slices and under Slurm")
        if processes is None or process is None or not 0 <= process < processes:
            raise BadInput(
                f"{who}: config.processes, which is {processes}, must say how many processes the job has, and "
                f"config.process, which is {process}, which of them this is, from 0"
            )
        if process == 0:
            _check_free(who, int(port))
        # Without the last, Slurm would be asked for what is not given here, and leave a process one GPU of all.
        join = {"num_processes": processes, "process_id": process, "cluster_detection_method": "deactivate"}
        join["coordinator_address"] = coordinator
    watch = threading.Timer(timeout_s, _give_up, [who, timeout_s])
    watch.daemon = True
    watch.start()
    try:
        jax.distributed.initialize(
            initialization_timeout=timeout_s + 60,  # later than the watch
            heartbeat_timeout_seconds=SILENCE_S,
            shutdown_timeout_seconds=FAREWELL_S,
            **join,
        )
    except ValueError as error:  # of auto: it found nobody to ask
        raise BadInput(
            f"{who}, and this is no host of a TPU slice, no step of Slurm (srun) and no process of Open MPI: give the "
            "address of process 0, config.processes and config.process"
        ) from error
    except RuntimeError as error:
        raise ConnectionError(f"{who}: {str(error).splitlines()[0]}") from error
    finally:
        watch.cancel()


def _check_free(who: str, port: int) -> None:
    """A port that is taken crashes jax."""
    try:
        socket.create_server(("", port)).close()
    except OSError as error:
        raise OSError(f"{who}: process 0 cannot have port {port} here ({error.strerror}); choose another") from error


def _give_up(who: str, timeout_s: int) -> None:
    _end(
        f"error: {who}: the others did not join within {timeout_s} seconds (config.start_timeout_s); is every process "
        "started, with this address and a number of its own, process 0 on that host, and can all reach its port?"
    )


def _end(said: str) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.write(f"{said}\n")
    sys.stderr.flush()
    os._exit(1)


def arrange(shape: MeshShape, devices: Sequence[jax.Device]) -> np.ndarray:
    """The devices as [data, fsdp, tensor]: neighbours where they exchange most.

    Raises:
      ValueError: the axes do not multiply to the number of devices, or do not fit the slices.
    """
    shape = resolve(shape, len(devices))
    sizes = (shape.data, shape.fsdp, shape.tensor)
    # GPUs have a slice_index too, one a node; see MeshShape. Devices of a slice that is only described have none.
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if devices[0].platform == "tpu" else 1
    # A shape that does not follow the torus is slower, and still better than none.
    if slices == 1:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    if shape.data % slices:
        raise BadInput(
            f"mesh.data is {shape.data}, and the devices form {slices} slices, each with whole copies of the weights: "
            f"make mesh.data {slices}, or a multiple"
        )
    within, across = (shape.data // slices, *sizes[1:]), (slices, 1, 1)
    return mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)


def resolve(shape: MeshShape, devices: int) -> MeshShape:
    """`shape` with -1 replaced.

    Raises:
      ValueError: the axes do not multiply to the number of devices.
    """
    fsdp = shape.fsdp
    if fsdp == -1:
        fsdp = devices // (shape.data * shape.tensor)
    if fsdp < 1 or shape.data * fsdp * shape.tensor != devices:
        raise BadInput(
            f"mesh.data x mesh.fsdp x mesh.tensor = {shape.data} x {shape.fsdp} x {shape.tensor} does not make "
            f"{devices} devices: change one of them, or set mesh.fsdp to -1"
        )
    return dataclasses.replace(shape, fsdp=fsdp)


def train_mesh(shape: MeshShape) -> jax.sharding.Mesh:
    """The mesh for training on this job's devices: axes data, fsdp, tensor."""
    return train_mesh_over(shape, jax.devices())


def train_mesh_over(shape: MeshShape, devices: Sequence[jax.Device]) -> jax.sharding.Mesh:
    """The mesh for training on any devices, which may be descriptions alone."""
    return _make(arrange(shape, devices), ("data", "fsdp", "tensor"))


def sample_mesh(shape: MeshShape) -> jax.sharding.Mesh:
    """The mesh for sampling: axes data, tensor. Of several processes each has its own devices where they hold a copy of
    the weights (`tensor` divides their number), and samples for itself; else all share the devices of all."""
    local = jax.local_device_count()
    if jax.process_count() > 1 and local % shape.tensor == 0:
        return _own_mesh(shape.tensor, jax.process_index())
    return sample_mesh_over(shape, jax.devices())


def _own_mesh(tensor: int, process: int) -> jax.sharding.Mesh:
    devices = jax.local_devices(process_index=process)
    return sample_mesh_over(MeshShape(data=len(devices) // tensor, fsdp=1, tensor=tensor), devices)


def beside_one_another(mesh: jax.sharding.Mesh) -> jax.sharding.Mesh:
    """The sampling meshes of all processes as one, where each has one of its own like `mesh`; else `mesh`."""
    if jax.process_count() == 1 or mesh.is_multi_process:
        return mesh
    each = [_own_mesh(mesh.shape["tensor"], process).devices for process in range(jax.process_count())]
    return _make(np.concatenate(each), ("data", "tensor"))


def sample_mesh_over(shape: MeshShape, devices: Sequence[jax.Device]) -> jax.sharding.Mesh:
    """The mesh for sampling on any devices: those of `train_mesh_over` in the same order, so that weights move from
    one to the other within one program."""
    over = arrange(shape, devices)
    return _make(over.reshape(-1, over.shape[-1]), ("data", "tensor"))


def _make(devices: np.ndarray, axes: tuple[str, ...]) -> jax.sharding.Mesh:
    return jax.sharding.Mesh(devices, axes, axis_types=(jax.sharding.AxisType.Auto,) * len(axes))
