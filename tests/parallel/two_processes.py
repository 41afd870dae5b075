"""One of two processes of one device each: `two_processes.py HOST:PORT NUMBER SILENCE_S WHAT [ARGUMENT ...]`, prints
JSON. See test_hosts.py."""

import itertools
import json
import os
import signal
import sys
from types import SimpleNamespace

import jax
import numpy as np
import split_model

from srlm_jax.parallel import hosts, rules
from srlm_jax.parallel.mesh import MeshShape, sample_mesh, train_mesh
from srlm_jax.parallel.reshard import reshard
from srlm_jax.storage import checkpoint

SHAPE = MeshShape(data=1, fsdp=-1, tensor=1)


def rows_on_both():
    rows = np.arange(8.0).reshape(4, 2)
    return rows, hosts.spread(rows, rules.sharding(train_mesh(SHAPE), rules.TRAIN, ("batch",)))


def values():
    """Values that cross between the processes in each way there is."""
    me = jax.process_index()
    rows, spread = rows_on_both()
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


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


def silent():
    os.kill(os.getpid(), signal.SIGSTOP)  # its connections stay open


def unable():
    raise OSError("no room on the disk")


def faulty():
    raise KeyError("a fault of the program")


def lost(folder, which, what, wait):
    """Process `which` is killed, say, while the other waits for it, in a barrier, say."""
    model = {"weight": rows_on_both()[1]}
    checkpoint.save_model(f"{folder}/saved", model, {})
    hosts.barrier("saved")
    steps = itertools.count(1)

    def program():
        jax.device_get(jax.jit(lambda x: x.sum())(model["weight"]))

    def train(end):
        with checkpoint.TrainCheckpoints(f"{folder}/train_state") as states:
            states.save(next(steps), checkpoint.TrainState(model, {}), SimpleNamespace(get_state=dict))
            end()
            program()

    ways = {
        "barrier": lambda end: (end(), hosts.barrier("never")),
        "exchange": lambda end: (end(), hosts.exchange(b"mine")),
        "program": lambda end: (end(), program()),
        "saving": lambda end: (end(), checkpoint.save_model(f"{folder}/saved", model, {})),
        "restoring": lambda end: (end(), checkpoint.load_model(f"{folder}/saved", model)),
        "training": train,
    }
    ends = {"killed": killed, "silent": silent, "unable": unable, "faulty": faulty}
    with hosts.leaving(False), hosts.together("stage m2/pairs"):
        ways[wait](lambda: None)  # all is compiled, and the processes are connected
        ways[wait](ends[what] if jax.process_index() == int(which) else lambda: None)


if __name__ == "__main__":
    address, number, silence_s, what, *arguments = sys.argv[1:]
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        address, 2, int(number), heartbeat_timeout_seconds=int(silence_s), shutdown_timeout_seconds=int(silence_s)
    )
    ways = {"values": values, "layouts": layouts, "samples": samples, "other_barrier": other_barrier, "lost": lost}
    print(json.dumps(ways[what](*arguments)))
