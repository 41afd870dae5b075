"""Two processes of one device each: what crosses between them, and what becomes of one without the other."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
from xla_flags import xla_flags

from srlm_jax.parallel import hosts
from srlm_jax.storage.checkpoint import BadCheckpoint

ROOT = Path(__file__).parents[2]


def both(*what, silence_s=60):
    """Both processes' (exit status, JSON that they print, what else they say). One that hangs is killed when the other
    has ended."""
    environment = os.environ | {"XLA_FLAGS": xla_flags(), "PYTHONPATH": str(ROOT)}
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, str(Path(__file__).with_name("two_processes.py")), address]
    job = [
        subprocess.Popen(
            [*command, str(number), str(silence_s), *what],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for number in range(2)
    ]  # fmt: skip
    try:
        while "silent" in what and all(process.poll() is None for process in job):
            time.sleep(0.1)
        if "silent" in what:
            for process in job:
                process.kill()  # which is nothing to one that has ended
        said = [process.communicate(timeout=300) for process in job]
    finally:
        for process in job:
            process.kill()
    return [
        (process.returncode, json.loads(out.splitlines()[-1]) if process.returncode == 0 else None, errors)
        for process, (out, errors) in zip(job, said, strict=True)
    ]


def test_values_cross_between_processes():
    found = [values for _, values, errors in both("values") if values is not None or pytest.fail(errors)]
    rows = [[0, 2], [4, 6], [8, 10], [12, 14]]
    for number, values in enumerate(found):
        assert values == {
            "main": number == 0, "fetched": rows, "summed": 28, "own": number, "exchanged": ["of 0", "of 11"],
            "nothing": ["", "x"], "sampling for itself": [number],
        }  # fmt: skip


def test_each_process_samples_with_the_weights_that_all_train_together():
    for status, difference, errors in both("layouts"):
        assert status == 0, errors
        assert difference == 0


def test_a_model_that_is_split_over_processes_samples_as_one_that_is_not(one_device):
    from split_model import draw, model

    wanted = draw(model(), one_device("data", "tensor"))
    for status, samples, errors in both("samples"):
        assert status == 0, errors
        assert samples == wanted


def test_processes_that_wait_for_different_things_are_told():
    for status, _, errors in both("other_barrier"):
        assert status != 0
        assert "name mismatch ('of process" in errors


def lines(errors):
    return [line for line in errors.splitlines() if line.startswith("error: ") or "another task died" in line]


@pytest.mark.parametrize(
    ("what", "wait"),
    [
        ("killed", "program"), ("killed", "saving"), ("killed", "restoring"), ("killed", "training"),
        ("unable", "barrier"), ("faulty", "exchange"),
    ],
)  # fmt: skip
def test_whatever_a_process_waits_for_it_says_in_a_line_that_the_other_is_gone(tmp_path, what, wait):
    (status, _, errors), (other, _, own) = both("lost", str(tmp_path), "1", what, wait)
    assert (status, len(lines(errors))) == (1, 1), errors
    assert lines(errors)[0].startswith("error: stage m2/pairs: process 0 of 2 cannot go on with the others (")
    assert "Traceback" not in errors
    wanted = {
        "killed": (-signal.SIGKILL, None),
        "unable": (1, "error: no room on the disk"),
        "faulty": (70, "This is a fault of srlm_jax. Please report it with the lines above."),
    }
    assert (other, own.splitlines()[-1] if own and what != "killed" else None) == wanted[what]
    assert ("Traceback" in own) == (what == "faulty")


@pytest.mark.parametrize(("which", "what"), [(0, "killed"), (1, "silent")])
def test_a_process_without_news_of_the_other_ends_too(tmp_path, which, what):
    """With process 0 goes what they are told by, and a host that hangs breaks no connection: then jax ends the rest."""
    found = both("lost", str(tmp_path), str(which), what, "barrier", silence_s=10)
    status, _, errors = found[1 - which]
    assert status in (1, -signal.SIGABRT)
    assert lines(errors), errors


def test_only_what_the_runtime_says_is_a_disconnection(monkeypatch):
    gloo = ValueError("UNKNOWN: Gloo AllGather failed: [external/gloo/pair.cc:538] Connection reset by peer")
    damaged = ValueError('DATA_LOSS: Error opening "zarr" driver')
    told = BadCheckpoint("weights cannot be read")
    told.__cause__ = gloo
    assert hosts.disconnection(told) is None  # alone, nobody is lost
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert hosts.disconnection(told) is gloo and hosts.disconnection(gloo) is gloo
    runtime = jax.errors.JaxRuntimeError("INTERNAL: Barrier failed")
    assert hosts.disconnection(runtime) is runtime
    for other in (None, damaged, ValueError("no such field"), KeyError("b")):
        assert hosts.disconnection(other) is None
