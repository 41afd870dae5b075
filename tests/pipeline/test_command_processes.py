"""What one process of a job does for all of them: two real processes of the command, without the making of models."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from etils import epath
from xla_flags import xla_flags

from srlm_jax.storage import jsonl

ROOT = Path(__file__).parents[2]
COMMAND = """
import sys, time
import jax
from configs.base import get_config
from srlm_jax.errors import UserError
from srlm_jax.pipeline import command, ledger

address, process, workdir, redo = sys.argv[1:]
config = get_config("smoke", 1).to_dict() | {"workdir": workdir, "start_timeout_s": 100}
config |= {"coordinator": address, "processes": 2, "process": int(process)}

def slowly(what):
    def do(*arguments):
        time.sleep(1)
        return what(*arguments)
    return do

def self_reward(run):
    left = run.ledger.entry("m1/eval")
    print(f"{process} makes, m1/eval is {left and left['status']}", file=sys.stderr)
    return ["m0", "sft"]

command.self_reward = self_reward
ledger.Ledger._remove = slowly(ledger.Ledger._remove)
if process == "1":  # it would see what the first has removed already
    ledger.Ledger.redo = slowly(ledger.Ledger.redo)
for name in ("collect_results", "write_report", "results_table"):
    def told(*arguments, name=name, was=getattr(command, name)):
        print(process, name, file=sys.stderr)
        return was(*arguments)
    setattr(command, name, told)
try:
    command.run_command(config, redo or None)
except (UserError, OSError) as error:
    print(f"error: {error}", file=sys.stderr)
jax.distributed.shutdown()
"""


@pytest.fixture
def pair(tmp_path):
    """`pair(redo, workdirs)`: the statuses, and the lines on stdout and stderr, of two processes of one command."""
    processes = []

    def run(redo, workdirs):
        with socket.create_server(("localhost", 0)) as server:
            port = server.getsockname()[1]
        environment = os.environ | {"XLA_FLAGS": xla_flags(4)}
        for number, workdir in enumerate(workdirs):
            arguments = [f"localhost:{port}", str(number), str(workdir), redo]
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-c", COMMAND, *arguments],
                    cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                )
            )  # fmt: skip
        said = [process.communicate(timeout=100) for process in processes]
        assert [process.returncode for process in processes] == [0, 0], said
        # Gloo reports its connections on stdout.
        return [[line for line in out.splitlines() if "peer ranks" not in line] for out, _ in said], [
            err.splitlines() for _, err in said
        ]

    yield run
    for process in processes:
        process.kill()


@pytest.fixture
def made(tmp_path):
    """A workdir in which two models are made and evaluated, and M1 evaluated too."""
    metrics = {"oracle_score": {"value": 3.5, "stderr": 0.25, "n": 8}}
    for name in ("m0", "sft", "m1"):
        jsonl.write_json(epath.Path(tmp_path) / name / "eval" / "metrics.json", metrics)
    entry = {"status": "done", "stage": "m1/eval", "inputs": {}, "outputs": ["m1/eval"], "config": {}, "code": "1"}
    jsonl.write_json(tmp_path / "ledger" / "m1.eval.json", entry)
    return tmp_path


def test_the_first_process_redoes_writes_and_tells_for_all(pair, made):
    printed, said = pair("m1/eval", [made, made])
    # Both go on only when all is removed.
    assert said[1] == ["1 makes, m1/eval is None"]
    assert said[0] == [
        "0 makes, m1/eval is None", "0 collect_results", "0 write_report", "0 results_table"
    ]  # fmt: skip
    assert not (made / "m1" / "eval").exists()
    assert printed[0][0] == "removed: m1/eval" and printed[0][-1] == str(made / "report.html")
    assert printed[1] == []
    assert not [path.name for path in made.iterdir() if path.name.startswith(".")]


def test_a_redo_of_no_stage_stops_all_processes_alike(pair, made):
    printed, said = pair("m9/eval", [made, made])
    assert printed == [[], []]
    assert said[0] == said[1] == [f"error: --redo=m9/eval: {made} has no such stage; it has m1/eval"]


def test_folders_that_are_not_one_are_refused_by_all_processes(pair, tmp_path):
    workdirs = [tmp_path / "disk0", tmp_path / "disk1"]
    _, said = pair("", workdirs)
    for number, workdir in enumerate(workdirs):
        wanted = (
            f"error: config.workdir {workdir} is not one folder for all processes: process {number} does not see what"
        )
        assert len(said[number]) == 1 and said[number][0].startswith(wanted)
        assert list(workdir.iterdir()) == []
