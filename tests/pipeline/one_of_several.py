"""One process of a job on this machine: HOST:PORT PROCESSES NUMBER TIMEOUT_S WORKDIR [FIELD=VALUE ...].

It runs the main command at the smoke scale up to M3, as `srlm_jax.main` does. `killed=(NUMBER, STAGE)`: that process is
killed when it has done that stage and nobody knows of it.
"""

import ast
import os
import signal
import sys

import jax
from absl import logging

from configs.base import get_config
from srlm_jax.parallel import hosts
from srlm_jax.pipeline.command import run_command


def main(address, processes, number, timeout, workdir, *changes):
    if int(processes) > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(
            address, int(processes), int(number),
            heartbeat_timeout_seconds=int(timeout), shutdown_timeout_seconds=int(timeout),
        )  # fmt: skip
    logging.set_verbosity(logging.ERROR)
    config = get_config("smoke", 3)
    config.workdir = workdir
    for change in changes:
        name, _, value = change.partition("=")
        if name == "killed":
            kill_after(*ast.literal_eval(value))
        else:
            config.update_from_flattened_dict({name: ast.literal_eval(value)})
    with hosts.leaving(False):
        run_command(config.to_dict(), None)


def kill_after(number, stage):
    def barrier(name, barrier=hosts.barrier):
        if (jax.process_index(), f"{stage}: worked") == (number, name):
            os.kill(os.getpid(), signal.SIGKILL)
        barrier(name)

    hosts.barrier = barrier


if __name__ == "__main__":
    main(*sys.argv[1:])
