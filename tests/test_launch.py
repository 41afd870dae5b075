"""The launch scripts pass on what they are given."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


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
