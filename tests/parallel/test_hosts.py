"""Two processes of one device each: what crosses between them, and what becomes of one without the other."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def both(what):
    """Both processes' (exit status, JSON that they print, what else they say)."""
    environment = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0", "PYTHONPATH": str(ROOT)}
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, str(Path(__file__).with_name("two_processes.py")), address]
    job = [
        subprocess.Popen(
            [*command, str(number), what],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for number in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=300) for process in job]
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


def says_that_the_other_is_gone(status, errors):
    """It notices by a connection that breaks, and says so itself, or by the other's silence, and JAX ends it."""
    last = [line for line in errors.splitlines() if line.startswith("error: ") or "another task died" in line]
    if last and last[-1].startswith("error: "):
        return status == 1 and "stage m2/pairs: process 0 of 2 cannot go on with the others (" in last[-1]
    return status != 0 and bool(last)


def test_a_process_whose_other_is_gone_says_so():
    (status, _, errors), (other, _, _) = both("lost")
    assert other == -9
    assert says_that_the_other_is_gone(status, errors), errors


def test_a_process_that_gives_up_does_not_keep_the_other_waiting():
    (status, _, errors), (other, _, own) = both("failed")
    assert (other, own.splitlines()[-1]) == (1, "error: no room on the disk")
    assert says_that_the_other_is_gone(status, errors), errors
