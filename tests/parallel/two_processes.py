"""One of two processes of one device each: `two_processes.py HOST:PORT NUMBER WHAT`, prints JSON. See test_hosts.py."""

import json
import os
import sys

import jax
import numpy as np
import split_model

from srlm_jax.parallel import hosts, rules
from srlm_jax.parallel.mesh import MeshShape, sample_mesh, train_mesh
from srlm_jax.parallel.reshard import reshard

SHAPE = MeshShape(data=1, fsdp=-1, tensor=1)


def values():
    """Values that cross between the processes in each way there is."""
    me = jax.process_index()
    sharding = rules.sharding(train_mesh(SHAPE), rules.TRAIN, ("batch",))
    rows = np.arange(8.0).reshape(4, 2)
    spread = hosts.spread(rows, sharding)
    assert np.array_equal(spread.addressable_data(0), rows[2 * me : 2 * me + 2])
    hosts.barrier("between")
    return {
        "main": hosts.is_main(),
        "fetched": hosts.fetch(jax.jit(lambda x: 2 * x)(spread)).tolist(),
        "summed": hosts.fetch(jax.jit(lambda x: x.sum())(spread)).tolist(),
        "own": hosts.fetch(jax.numpy.asarray(me)).tolist(),
        "exchanged": [data.decode() for data in hosts.exchange(b"of " + str(me).encode() * (me + 1))],
        "nothing": [data.decode() for data in hosts.exchange(b"x" * me)],
        "sampling for itself": [device.process_index for device in sample_mesh(SHAPE).devices.flat],
    }


def layouts():
    """How far the weights that each process samples with are from those that both train together."""
    whole, train, sample = split_model.model(), train_mesh(SHAPE), sample_mesh(SHAPE)
    assert not sample.is_multi_process
    places = rules.model_shardings(train, rules.TRAIN, whole)
    split = jax.tree.map(lambda x, to: hosts.spread(np.asarray(x), to), whole, places)
    assert not split.blocks.gate[...].is_fully_addressable
    moved = reshard(split, rules.placed(sample, rules.SAMPLE, whole))
    return max(
        jax.tree.leaves(jax.tree.map(lambda x, y: float(abs(np.asarray(x) - np.asarray(y)).max()), moved, whole))
    )


def samples():
    """Greedy and random samples of a model whose every copy is split over both processes."""
    mesh = sample_mesh(MeshShape(data=1, fsdp=-1, tensor=2))
    assert mesh.is_multi_process
    whole = split_model.model()
    places = rules.model_shardings(mesh, rules.SAMPLE, whole)
    return split_model.draw(jax.tree.map(lambda x, to: hosts.spread(np.asarray(x), to), whole, places), mesh)


def other_barrier():
    hosts.barrier(f"of process {jax.process_index()}")


def lost():
    """The second process ends while the first waits for it."""
    hosts.barrier("both are here")
    if jax.process_index() == 1:
        os.kill(os.getpid(), 9)
    wait()


def wait():
    try:
        with hosts.together("stage m2/pairs"):
            hosts.barrier("never")
    except hosts.ProcessLost as error:
        hosts.leave(f"error: {error}")


def failed():
    """The second process gives up while the first waits for it."""
    hosts.barrier("both are here")
    if jax.process_index() == 1:
        hosts.leave("error: no room on the disk")
    wait()


if __name__ == "__main__":
    address, number, what = sys.argv[1:]
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, 2, int(number), heartbeat_timeout_seconds=10, shutdown_timeout_seconds=10)
    print(json.dumps(globals()[what]()))
