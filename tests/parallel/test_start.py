"""How processes become one job, in processes of their own."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from srlm_jax.errors import BadInput, MissingExtra
from srlm_jax.parallel.hosts import leave, leaving
from srlm_jax.parallel.mesh import FAREWELL_S, SILENCE_S, start
from srlm_jax.pipeline.endpoint import EndpointError
from srlm_jax.pipeline.settings import BadConfig

ROOT = Path(__file__).parents[2]
JOIN = """
import sys
from srlm_jax.parallel.mesh import MeshShape, sample_mesh, start, train_mesh

coordinator, *numbers = (None if argument == "None" else argument for argument in sys.argv[1:])
try:
    start(coordinator, *(n and int(n) for n in numbers))
except (ValueError, OSError) as error:
    sys.exit(f"error: {error}")

import jax
import numpy as np

mesh = train_mesh(MeshShape(data=2, fsdp=2, tensor=2))
rows = jax.make_array_from_process_local_data(
    jax.NamedSharding(mesh, jax.P(("data", "fsdp"))), np.full((2,), 10.0 ** jax.process_index()), (4,)
)
total = float(jax.jit(sum)(rows))
count = (jax.process_index(), jax.process_count(), jax.local_device_count(), jax.device_count())
groups = [[device.process_index for device in group.ravel()] for group in mesh.devices]
# Gloo reports its connections on stdout.
print(*count, total, groups, len(sample_mesh(MeshShape(data=2, fsdp=2, tensor=2)).devices), file=sys.stderr)
"""


LEAVE = """
import sys
from srlm_jax.parallel.hosts import leave, leaving
from srlm_jax.parallel.mesh import start

start(sys.argv[1], *map(int, sys.argv[2:]))

import jax
from jax.experimental import multihost_utils

multihost_utils.sync_global_devices("all are here")
if jax.process_index() == 1:
    leave("error: config.dpo.beta is odd", 1)
try:
    multihost_utils.sync_global_devices("process 1 never comes here")
except Exception as error:
    leave(f"error: {error}", 1)
"""


def process(*arguments, script=JOIN, **environment):
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4", **environment}
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def ended(process):
    """Its exit status, and the lines it wrote to stderr."""
    said = process.communicate(timeout=120)[1]
    return process.returncode, said.splitlines()


@pytest.fixture
def address():
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    return f"localhost:{port}"


def test_two_processes_of_four_devices_are_one_job_of_eight(address):
    both = [process(address, 2, number, 100) for number in (0, 1)]
    for number, found in enumerate(map(ended, both)):
        assert found == (0, [f"{number} 2 4 8 22.0 [[0, 0, 0, 0], [1, 1, 1, 1]] 2"])


@pytest.mark.parametrize("number", [0, 1])
def test_a_process_whose_partner_never_comes_says_so_in_one_line(address, number):
    status, said = ended(process(address, 2, number, 2))
    assert (status, len(said)) == (1, 1)
    assert said[0].startswith(f"error: config.coordinator is {address}: the others did not join within 2 seconds")


def test_a_process_that_leaves_says_why_and_the_others_do_not_wait_for_it(address):
    both = [process(address, 2, number, 100, script=LEAVE) for number in (0, 1)]
    (status, said), left = map(ended, both)
    assert left == (1, ["error: config.dpo.beta is odd"])
    assert status != 0 and said  # the runtime tells it either by an error or by an abort, whichever comes first


def test_alone_it_leaves_as_any_program_does(capsys):
    with pytest.raises(SystemExit, match=r"^3$"):
        leave("error: config.dpo.beta is odd", 3)
    assert capsys.readouterr().err == "error: config.dpo.beta is odd\n"


def left(error, debug, capsys):
    """The status that an error ends a command with, and what is printed."""
    with pytest.raises(SystemExit) as ended, leaving(debug):
        raise error
    return ended.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        BadInput("config.dpo.beta is odd"),
        BadConfig("config.dpo.beta is odd"),
        MissingExtra("config.dpo.beta is odd"),
        EndpointError("config.dpo.beta is odd"),
        OSError("config.dpo.beta is odd"),
    ],
)
def test_an_error_of_the_user_is_one_line(error, capsys):
    assert left(error, False, capsys) == (1, "error: config.dpo.beta is odd\n")
    status, said = left(error, True, capsys)
    assert status == 1 and said.startswith("Traceback") and said.endswith("\nerror: config.dpo.beta is odd\n")


@pytest.mark.parametrize(
    "error", [KeyError("beta"), TypeError("odd"), AssertionError(), ValueError("odd"), ImportError("jx"), IndexError()]
)
def test_a_fault_of_the_program_keeps_its_traceback(error, capsys):
    """Every ValueError was once printed as the user's mistake."""
    status, said = left(error, False, capsys)
    assert status == 70 and said.startswith("Traceback")
    assert said.endswith("This is a fault of srlm_jax. Please report it with the lines above.\n")


def test_a_full_memory_is_one_line(capsys):
    full = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 80 bytes.\nBufferAssignment: 3")
    assert left(full, False, capsys) == (
        1,
        "error: out of memory: RESOURCE_EXHAUSTED: Out of memory allocating 80 bytes.\n",
    )
    status, said = left(jax.errors.JaxRuntimeError("INTERNAL: no such stream"), False, capsys)
    assert status == 70 and said.startswith("Traceback") and "fault of srlm_jax" not in said


def test_an_interrupt_is_raised_as_it_is():
    with pytest.raises(KeyboardInterrupt), leaving(False):
        raise KeyboardInterrupt


def test_a_port_that_is_taken_is_told_before_jax_crashes_over_it():
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        status, said = ended(process(f"localhost:{port}", 2, 0, 100))
    assert (status, len(said)) == (1, 1)
    wanted = (
        f"error: config.coordinator is localhost:{port}: process 0 cannot have port {port} here (Address already in"
    )
    assert said[0].startswith(wanted)


def test_slurm_names_the_others(tmp_path):
    """One task a node, and all of its devices: the second line is what launch/slurm.sbatch adds."""
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    job = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0"}
    job |= {"JAX_LOCAL_DEVICE_IDS": "0,1,2,3", "JAX_COORDINATOR_PORT": str(port)}
    both = [process("auto", None, None, 100, **job, SLURM_PROCID=str(number)) for number in (0, 1)]
    for number, found in enumerate(map(ended, both)):
        assert found == (0, [f"{number} 2 4 8 22.0 [[0, 0, 0, 0], [1, 1, 1, 1]] 2"])


def test_auto_where_nothing_names_the_others_is_refused_in_one_line():
    alone = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "OMPI", "TPU"))}
    ran = subprocess.run(
        [sys.executable, "-c", JOIN, "auto", "None", "None", "100"], cwd=ROOT, env=alone, capture_output=True, text=True
    )
    wanted = r"error: config\.coordinator is auto, and this is no host of a TPU slice, no step of Slurm .*\n"
    assert ran.returncode == 1 and re.fullmatch(wanted, ran.stderr)


@pytest.mark.parametrize(
    ("coordinator", "processes", "process", "message"),
    [
        ("10.0.0.1", 2, 0, "give HOST:PORT of process 0, or auto"),
        ("10.0.0.1:", 2, 0, "give HOST:PORT of process 0, or auto"),
        (":1234", 2, 0, "give HOST:PORT of process 0, or auto"),
        ("10.0.0.1:1234", None, 0, "config.processes, which is None, must say how many"),
        ("10.0.0.1:1234", 2, None, "config.process, which is None, which of them this is, from 0"),
        ("10.0.0.1:1234", 2, 2, "config.process, which is 2, which of them this is, from 0"),
        ("10.0.0.1:1234", 2, -1, "config.process, which is -1, which"),
        ("auto", 2, 0, "config.processes and config.process belong to an address"),
        (None, 2, 0, "config.coordinator is None: config.processes and config.process belong to an address"),
        (None, None, 0, "belong to an address"),
    ],
)
def test_what_cannot_make_a_job_is_refused(coordinator, processes, process, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        start(coordinator, processes, process, 1)


def test_one_process_is_a_job():
    start(None, None, None, 1)


def test_jax_is_told_how_long_to_wait_for_a_process_that_is_gone(monkeypatch):
    asked = {}
    monkeypatch.setattr(jax.distributed, "initialize", lambda **arguments: asked.update(arguments))
    start("10.0.0.1:1234", 2, 1, 5)
    assert asked["heartbeat_timeout_seconds"] == SILENCE_S
    assert asked["shutdown_timeout_seconds"] == FAREWELL_S
    assert asked["initialization_timeout"] > 5
