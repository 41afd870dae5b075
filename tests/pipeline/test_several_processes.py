"""Two processes do what one does, and go on together or not at all.

One job of each kind is made and kept; what kills something works on a copy. `pytest -m long` kills in every stage.
"""

import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from xla_flags import xla_flags

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
DEVICES = 4  # of all processes
TIMEOUT_S = 20  # after which a process that is silent counts as gone
CLOCK = ("seconds", "tokens_per_second")

# All stages but those of the last round, which are as those of the one before.
STAGES = (
    "world", "seed", "m0/train", "m0/eval", "sft/train", "sft/eval", "eft/judgements", "eft/examples", "m1/train",
    "m1/eval", "m2/prompts", "m2/responses", "m2/judgements", "m2/oracle", "m2/pairs", "m2/reference", "m2/train",
    "m2/eval",
)  # fmt: skip


@pytest.fixture(scope="module")
def start(command_environment):
    """`start(workdir, processes, ...)`: four devices, shared by so many processes, which make all models up to M3."""

    def start(workdir, processes, *changes):
        environment = command_environment | {
            "XLA_FLAGS": xla_flags(DEVICES // processes),
            "PYTHONPATH": str(ROOT),
        }
        with socket.create_server(("127.0.0.1", 0)) as free:
            address = f"127.0.0.1:{free.getsockname()[1]}"
        command = [sys.executable, str(Path(__file__).with_name("one_of_several.py")), address, str(processes)]
        job = []
        for number in range(processes):
            with log(workdir, number).open("w") as said:
                arguments = [str(number), str(TIMEOUT_S), str(workdir), *changes]
                job.append(
                    subprocess.Popen([*command, *arguments], cwd=ROOT, env=environment, stdout=said, stderr=said)
                )
        return job

    return start


def log(workdir, number):
    """What a process says, the last time that it was started."""
    return workdir.parent / f"{workdir.name}.{number}.log"


@pytest.fixture(scope="module")
def run(start):
    """As `start`, to the end, which must be a good one."""

    def run(workdir, processes):
        job = start(workdir, processes)
        ends = [process.wait(timeout=1_800) for process in job]
        assert ends == [0] * processes, "\n".join(log(workdir, number).read_text() for number in range(processes))
        return workdir

    return run


@pytest.fixture(scope="module")
def one(run, tmp_path_factory):
    return run(tmp_path_factory.mktemp("one") / "run", 1)


@pytest.fixture(scope="module")
def two(run, tmp_path_factory):
    return run(tmp_path_factory.mktemp("two") / "run", 2)


def records(workdir):
    """The documents of every file of records, by name, but for those that hold computed floats. Expected scores, which
    are computed too, are left out."""
    names = {path: path.relative_to(workdir) for path in workdir.rglob("*.jsonl")}
    computed = {"metrics.jsonl", "reference"}
    read = lambda path: [json.loads(line, object_hook=drawn) for line in path.read_text().splitlines()]
    return {str(name): read(path) for path, name in names.items() if not computed & {*name.parts}}


def drawn(fields):
    return {name: value for name, value in fields.items() if name != "expected"}


def expected_scores(document):
    """Every expected score of a JSON document, in its order."""
    if isinstance(document, list):
        return [score for item in document for score in expected_scores(item)]
    if not isinstance(document, dict):
        return []
    own = [document["expected"]] if document.get("expected") is not None else []
    return own + expected_scores(list(document.values()))


def numbers(workdir):
    """(name, line, field) -> value, of the losses, the reference's log-probabilities and the expected scores."""
    found = {}
    for path in [*workdir.rglob("metrics.jsonl"), *workdir.rglob("reference/*.jsonl")]:
        for at, line in enumerate(path.read_text().splitlines()):
            fields = {key: value for key, value in json.loads(line).items() if isinstance(value, int | float)}
            found |= {(str(path.relative_to(workdir)), at, key): x for key, x in fields.items() if key not in CLOCK}
    for path in workdir.rglob("judgements/*.jsonl"):
        scores = expected_scores([json.loads(line) for line in path.read_text().splitlines()])
        found |= {(str(path.relative_to(workdir)), at, "expected"): score for at, score in enumerate(scores)}
    return found


def assert_same(workdir, wanted):
    assert records(workdir).keys() == records(wanted).keys()
    assert [name for name, data in records(workdir).items() if data != records(wanted)[name]] == []
    same_numbers(numbers(workdir), numbers(wanted))


def same_numbers(found, expected):
    assert found.keys() == expected.keys()
    for place, value in expected.items():
        np.testing.assert_allclose(found[place], value, rtol=1e-3, atol=1e-4, err_msg=str(place))


def test_two_processes_draw_judge_and_pair_as_one_does(one, two):
    assert {f"{name}/{stage}/00000.jsonl" for name in ("m2", "m3") for stage in ("prompts", "responses", "pairs")} <= (
        records(two).keys()
    )
    assert records(two).keys() == records(one).keys()
    # M2's weights are the same but for rounding, since gradients are added up in another order. What M2 writes is then
    # the same as long as no number decides by less than that, which is chance: the first round is compared.
    first = lambda found: {place: value for place, value in found.items() if "m3" not in str(place)}
    assert first(records(two)) == first(records(one))
    same_numbers(first(numbers(two)), first(numbers(one)))


def entry(workdir, stage):
    return workdir / "ledger" / f"{stage.replace('/', '.')}.json"


def begun(workdir, stage):
    """Whether a stage is being worked on, and a training has saved its state once."""
    if not entry(workdir, stage).exists() or json.loads(entry(workdir, stage).read_text())["status"] != "started":
        return False
    states = workdir / stage.partition("/")[0] / "train_state"
    return not stage.endswith("/train") or any((states / step).exists() for step in ("10", "50"))


# These take milliseconds, in which no kill from outside would meet them: it comes when their work is done and nobody
# knows of it.
SHORT = ("world", "seed", "examples", "oracle", "pairs")


def stop(start, workdir, stage, killed):
    """Starts two processes and kills one of them in the middle of a stage; the other must end, and say why."""
    if short := stage.rpartition("/")[2] in SHORT:
        job = start(workdir, 2, f"killed={(killed, stage)}")
    else:
        job = start(workdir, 2)
        while not begun(workdir, stage) and all(process.poll() is None for process in job):
            time.sleep(0.01)
        job[killed].send_signal(signal.SIGKILL)
    # Not how fast it is, but that it ends at all: twice its own patience, and time to end in; where the other kills
    # itself, time to come there too.
    status = job[1 - killed].wait(timeout=2 * TIMEOUT_S + (1_800 if short else 60))
    assert job[killed].wait(timeout=60) == -signal.SIGKILL, log(workdir, killed).read_text()
    assert status != 0
    said = log(workdir, 1 - killed).read_text()
    # It notices by a connection that breaks, and says so itself, or by the other's silence, and JAX ends it.
    ours = f"error: stage {stage}: process {1 - killed} of 2 cannot go on with the others ("
    assert ours in said or "another task died" in said, said
    assert json.loads(entry(workdir, stage).read_text())["status"] == "started"


@pytest.mark.parametrize(
    ("stage", "killed", "processes"),
    [
        pytest.param("m3/prompts", 1, 2, marks=pytest.mark.long),
        ("m3/judgements", 1, 2),
        pytest.param("m3/judgements", 0, 2, marks=pytest.mark.long),
        pytest.param("m3/pairs", 1, 2, marks=pytest.mark.long),
        pytest.param("m3/reference", 1, 2, marks=pytest.mark.long),
        pytest.param("m3/train", 1, 2, marks=pytest.mark.long),
        ("m3/train", 0, 1),
    ],
)
def test_a_process_that_is_killed_stops_the_other_and_the_next_start_goes_on(
    two, start, run, tmp_path, stage, killed, processes
):
    workdir = Path(shutil.copytree(two, tmp_path / "run"))
    remove(workdir, stage)
    if processes == 1:
        # What is left of a training goes on with one process as well; its weights are the same to float tolerance, not
        # to the bit, so that their evaluation is made again.
        remove(workdir, stage.replace("/train", "/eval"))
    stop(start, workdir, stage, killed)
    run(workdir, processes)
    assert_same(workdir, two)


@pytest.mark.long
def test_a_job_that_is_killed_in_every_stage_makes_the_same(two, start, run, tmp_path):
    """Now the one process, now the other; every start goes on where the one before was stopped."""
    workdir = tmp_path / "run"
    for number, stage in enumerate(STAGES):
        stop(start, workdir, stage, 1 - number % 2)
    run(workdir, 2)
    assert_same(workdir, two)
    assert (workdir / "results.json").read_bytes() == (two / "results.json").read_bytes()


def remove(workdir, stage):
    """Takes a stage out, as if it had never been begun; what depends on it stays."""
    for output in json.loads(entry(workdir, stage).read_text())["outputs"]:
        path = workdir / output
        if path.is_dir():
            shutil.rmtree(path)
        elif path.exists():
            path.unlink()
    entry(workdir, stage).unlink()
