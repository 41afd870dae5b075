"""Several processes that work as one job: who writes, where they wait for one another, how values cross between them.

One process is a job of one: then all of this is nothing. What all processes call together, they call in the same order.

Where one of them is gone, the others end, in whatever stage, with a status that is not 0, and by one of two ways:

- What they wait for breaks: a value, a barrier, a checkpoint that all of them write. It does so at once where a process
  was killed and its connections were closed (gloo, on CPUs, notices that); then `together` says it in a line.
- Nothing breaks: a host is switched off or hangs, or they do work of their own, or wait for devices whose network tells
  nothing (NCCL, ICI). Then the process counts as gone after `mesh.SILENCE_S` seconds without a sign of life, and jax
  ends the others from a thread of its own: no exception, so no line of ours, but an abort (SIGABRT, status 134) and on
  stderr "Terminating process because the JAX distributed service detected fatal errors. This most likely indicates that
  another task died". With process 0 goes the service by which they know of one another, and then this comes at once: it
  may be there before our line.
"""

import os
import re
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from srlm_jax.errors import UserError

Tree = TypeVar("Tree")

# Process 0 hosts the coordination service, so it ends last: the others can then print an error that all of them share.
_LAST_WORDS_S = 3.0

# The exit status of a fault of this package: EX_SOFTWARE of sysexits.h.
FAULT = 70

# How the runtime's errors begin where they come as a ValueError. Those of damaged files begin otherwise.
_STATUS = re.compile("(UNKNOWN|UNAVAILABLE|INTERNAL|ABORTED|CANCELLED|DEADLINE_EXCEEDED): ")


class ProcessLost(UserError, ConnectionError):
    """The processes of a job could not go on together; what was done until then stays."""


def is_main() -> bool:
    """Whether this is the process that writes what is one file."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits until every process is here. `name` must be the same in all: another is an error, not a deadlock."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def disconnection(error: BaseException | None) -> BaseException | None:
    """What an error comes from, itself perhaps, that says that the processes of a job cannot go on together; None where
    it comes from something else, or there is one process.

    The runtime says so by a JaxRuntimeError where a value or one of Orbax's barriers is waited for; by a ValueError
    where a program fails as it is called, which `barrier` and `exchange` do.
    """
    while error is not None:
        told = isinstance(error, ValueError) and _STATUS.match(str(error))
        if told or isinstance(error, jax.errors.JaxRuntimeError):
            return error if jax.process_count() > 1 else None
        error = error.__cause__
    return None


@contextmanager
def together(what: str) -> Iterator[None]:
    """What the processes do inside fails in one line where one of them is gone.

    Raises ProcessLost in place of the runtime's error, or of what was made of it, with more than one process.
    """
    try:
        yield
    except Exception as error:
        if (cause := disconnection(error)) is None:
            raise
        raise ProcessLost(
            f"{what}: process {jax.process_index()} of {jax.process_count()} cannot go on with the others "
            f"({str(cause).splitlines()[0]}). Where another has ended, its own last line says why; start all of them "
            "again, and the run goes on where it stopped"
        ) from error


@contextmanager
def leaving(debug: bool) -> Iterator[None]:
    """Ends this process if an error is raised inside.

    A `UserError`, an OSError or a full device memory is printed in one line, and the status is 1; `debug` adds the
    traceback. Any other error is a fault of this package: its traceback is printed, and the status is 70.
    """
    try:
        yield
    except (UserError, OSError) as error:
        leave(_told(f"error: {error}", debug), 1)
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            leave(traceback.format_exc().rstrip(), FAULT)  # of the devices or of their driver, not of this package
        reason = str(error).partition("\n")[0] or "the host's memory is full"
        leave(_told(f"error: out of memory: {reason}", debug), 1)
    except Exception:
        leave(f"{traceback.format_exc()}\nThis is a fault of srlm_jax. Please report it with the lines above.", FAULT)
    except BaseException:  # SystemExit and KeyboardInterrupt
        if not jax.distributed.is_initialized():
            raise
        leave(traceback.format_exc().rstrip(), 1)


def _told(line: str, debug: bool) -> str:
    return f"{traceback.format_exc()}\n{line}" if debug else line


def leave(message: str, status: int) -> NoReturn:
    """Prints a message on stderr and ends this process at once.

    The other processes of the job notice a closed connection at once, and a silent process only after a while.
    """
    sys.stdout.flush()
    print(message, file=sys.stderr, flush=True)
    if not jax.distributed.is_initialized():
        sys.exit(status)
    if is_main():
        time.sleep(_LAST_WORDS_S)
    os._exit(status)  # sys.exit would wait for the other processes, and crash if one is gone


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
