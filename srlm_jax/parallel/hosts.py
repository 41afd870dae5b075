"""Several processes that work as one job: who writes, where they wait for one another, how values cross between them.

One process is a job of one: then all of this is nothing. What all processes call together, they call in the same order.
"""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

Tree = TypeVar("Tree")

# What stops all processes alike, each says itself: with the first process goes the service that they live by.
_LAST_WORDS_S = 3.0


class ProcessLost(ConnectionError):
    """The processes of a job could not go on together; what was done until then stays."""


def is_main() -> bool:
    """Whether this is the process that writes what is one file."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits until every process is here. `name` must be the same in all: another is an error, not a deadlock."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


@contextmanager
def together(what: str) -> Iterator[None]:
    """What the processes do inside fails in one line where one of them is gone.

    Raises ProcessLost in place of the runtime's error, with more than one process.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        raise ProcessLost(
            f"{what}: process {jax.process_index()} of {jax.process_count()} cannot go on with the others "
            f"({str(error).splitlines()[0]}). Where another has ended, its own last line says why; start all of them "
            "again, and the run goes on where it stopped"
        ) from error


def leave(message: str) -> NoReturn:
    """Ends this process with a message and status 1, at once: where others of the job wait for it, they learn so that
    it is gone, and need not find out by its silence."""
    if not jax.distributed.is_initialized():
        sys.exit(message)
    sys.stdout.flush()
    print(message, file=sys.stderr, flush=True)
    if is_main():
        time.sleep(_LAST_WORDS_S)
    os._exit(1)  # the ordinary way out waits for all the others, and crashes where one is gone


def fetch(tree: Tree) -> Tree:
    """Arrays on the host, whole on every process, wherever their parts are."""

    def whole(x: jax.Array) -> jax.Array | np.ndarray:
        here = x.is_fully_addressable or x.is_fully_replicated
        return x if here else multihost_utils.process_allgather(x, tiled=True)

    return jax.device_get(jax.tree.map(whole, tree))


def spread(tree: Tree, sharding: jax.sharding.Sharding) -> Tree:
    """Arrays of the host, the same on every process, on the devices: each takes its part and no more."""

    def place(x: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(lambda x: place(np.asarray(x)), tree)


def exchange(data: bytes) -> list[bytes]:
    """What each process gives, by its number, to all of them."""
    if jax.process_count() == 1:
        return [data]
    lengths = multihost_utils.process_allgather(np.asarray(len(data), np.int32)).reshape(-1)
    padded = np.zeros(max(1, lengths.max()), np.uint8)
    padded[: len(data)] = np.frombuffer(data, np.uint8)
    rows = multihost_utils.process_allgather(padded)
    return [row[:length].tobytes() for row, length in zip(rows, lengths, strict=True)]
