"""What the benchmarks report, and how they fail. No test looks at how long anything took."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from etils import epath
from xla_flags import xla_flags

from srlm_jax.bench import load, load_once
from srlm_jax.bench.workload import SHAPES
from srlm_jax.model import sources

ROOT = Path(__file__).parents[1]
KNOWN = "load, attention, decode, prefill, judge, sft, dpo, iteration, all, peers"
FIELDS = {field.name for field in dataclasses.fields(load.Load)}


def measure(config, folder=None, peer=None, repeat=1):
    return load.measure(config, folder=folder, peer=peer, repeat=repeat, shard_bytes=8_000)


@pytest.fixture
def half(tiny_config):
    """The configuration of the tiny Llama in bfloat16."""
    return dataclasses.replace(tiny_config, param_dtype="bfloat16", compute_dtype="bfloat16")


def test_the_shape_of_a_billion_parameters():
    assert SHAPES["1b"]().parameters == 1_100_048_384


# --- what is reported -------------------------------------------------------------------------------------------------


def test_a_load_is_measured_and_its_numbers_are_those_of_the_files(half, tmp_path):
    found = measure(half, folder=tmp_path / "new" / "model", repeat=2)
    assert (found["parameters"], found["bytes"], found["dtype"]) == (6_736, 2 * 6_736, "bfloat16")
    assert found["shape"] == {"V": 40, "D": 16, "L": 2, "N": 4, "K": 2, "H": 8, "F": 24}
    tensors = sources.hugging_face(epath.Path(tmp_path / "new" / "model"))
    assert sum(2 * math.prod(tensor.shape) for tensor in tensors.values()) == found["bytes"]
    assert found["files"] == len(list((tmp_path / "new" / "model").glob("*.safetensors"))) > 1
    assert found["loads"].keys() == found["summary"].keys() == {"ours"} and found["ratio"] == {}
    assert len(found["loads"]["ours"]) == 2
    for one in found["loads"]["ours"]:
        assert one.seconds > 0
        assert one.peak_bytes >= one.before_bytes > one.own_before_bytes > 0
        assert one.peak_bytes >= one.own_peak_bytes >= one.own_before_bytes
    assert [entry.name for entry in (tmp_path / "new").iterdir()] == ["model"]


def test_ratios_are_of_medians_and_memory_is_what_came_on_top():
    def one(seconds, peak, own):
        return load.Load(seconds=seconds, before_bytes=100, peak_bytes=peak, own_before_bytes=50, own_peak_bytes=own)

    ours = load.summary([one(1.0, 300, 60), one(4.0, 500, 70), one(2.0, 400, 90)])
    assert ours == {"seconds_median": 2.0, "seconds_min": 1.0, "peak_bytes": 300, "own_peak_bytes": 20}
    theirs = load.summary([one(3.0, 700, 60)])
    assert load.ratio(theirs, ours) == {
        "seconds_median": 1.5, "seconds_min": 3.0, "peak_bytes": 2.0, "own_peak_bytes": 0.5
    }  # fmt: skip


def test_a_checksum_is_of_names_and_numbers_in_any_order():
    one, other = load_once.as_bytes(np.arange(6.0)), load_once.as_bytes(np.arange(3))
    wanted = load_once.checksum([("a", one), ("b", other)])
    assert load_once.checksum([("b", other), ("a", one)]) == wanted
    changed = one.copy()
    changed[17] ^= 1
    assert wanted not in {
        load_once.checksum([("a", changed), ("b", other)]),
        load_once.checksum([("b", one), ("a", other)]),
        load_once.checksum([("a", one)]),
    }


@pytest.mark.parity
def test_transformers_loads_the_same_numbers():
    found = measure(SHAPES["tiny"](), peer="transformers")  # another checksum than the files' would raise
    names = ["transformers", "transformers, copied"]
    assert list(found["loads"]) == ["ours", *names] and list(found["ratio"]) == names
    assert all(len(loads) == 1 and loads[0].seconds > 0 for loads in found["loads"].values())
    assert found["ratio"]["transformers"].keys() == found["summary"]["ours"].keys()
    assert {"transformers", "torch"} < found["versions"].keys()
    assert "\ntransformers, copied / ours" in load.table(found)


# --- what goes wrong --------------------------------------------------------------------------------------------------


def test_a_model_that_is_there_is_used_again_and_another_one_is_left_alone(half, tmp_path):
    first = measure(half, folder=tmp_path / "model")
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "model").iterdir()}
    assert measure(half, folder=tmp_path / "model")["checksum"] == first["checksum"]
    for change in ({"F": 32}, {"param_dtype": "float32", "compute_dtype": "float32"}):
        with pytest.raises(ValueError, match="model holds another model than the one to load: choose another --folder"):
            measure(dataclasses.replace(half, **change), folder=tmp_path / "model")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "model").iterdir()} == written


def test_a_model_that_was_not_finished_is_not_left(half, tmp_path, monkeypatch):
    def fail(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(load.config_files, "to_hf", fail)
    with pytest.raises(KeyboardInterrupt):
        measure(half, folder=tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_other_numbers_than_the_files_hold_are_an_error(half, monkeypatch):
    monkeypatch.setattr(load.load_once, "checksum", lambda named: "0123456789abcdef")
    with pytest.raises(ValueError, match=r"^ours: loaded other numbers than .* holds \(checksum \w{16}, not 01234567"):
        measure(half)


def test_a_load_that_fails_says_why(half, tmp_path, monkeypatch):
    def spoil(named):
        (tmp_path / "model" / "model.safetensors.index.json").unlink()

    monkeypatch.setattr(load.load_once, "checksum", spoil)
    with pytest.raises(ValueError, match=r"^ours: .*/model could not be loaded: .*holds no weights.*$"):
        measure(half, folder=tmp_path / "model")


def test_a_peer_that_is_not_installed_is_named(half, monkeypatch):
    find_spec = load.importlib.util.find_spec
    monkeypatch.setattr(load.importlib.util, "find_spec", lambda name: None if name == "torch" else find_spec(name))
    with pytest.raises(ValueError, match=r"^--vs=transformers needs torch.*: pip install 'srlm_jax\[parity\]'$"):
        measure(half, peer="transformers")


# --- the command line -------------------------------------------------------------------------------------------------


def command(*arguments):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": xla_flags()}
    line = [sys.executable, "-m", "srlm_jax.bench", *map(str, arguments)]
    return subprocess.run(line, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_command_prints_a_table_and_writes_the_same(tmp_path):
    done = command("load", "--shape=tiny", "--dtype=float32", "--repeat=1", f"--json={tmp_path / 'out.json'}")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert done.stdout == load.table(found) + "\n"
    assert (found["command"], found["parameters"], found["bytes"]) == ("load", 869_504, 4 * 869_504)
    assert found["loads"]["ours"][0].keys() == FIELDS
    assert found["summary"]["ours"]["seconds_median"] == found["loads"]["ours"][0]["seconds"]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((), f"error: say what to measure: {KNOWN}, as in: python -m srlm_jax.bench load\n"),
        (("dance",), f"error: say what to measure: {KNOWN}, not 'dance'\n"),
        (("load", "--folder=tests"), "error: tests holds no model: none of manifest.json, config.json, params.json"),
        (("load", "--dtype=int8"), "error: --dtype=int8: give float32 or bfloat16 or float16\n"),
        (("judge", "--vs=tunix"), "error: --vs=tunix: judge is compared with transformers\n"),
        (("attention", "--vs=trl"), "error: --vs=trl: attention is compared with none\n"),
        (("dpo", "--vs=trl", "--peer_python=/no"), "error: --peer_python=/no is not there: make it by python -m"),
        (("decode", "--growth=1,x"), "error: --growth=1,x: give whole numbers from 1, as in 1,2,4,10\n"),
        (("peers",), "error: say which: --make=transformers,trl,tunix\n"),
    ],
    ids=[
        "nothing",
        "unknown",
        "no model",
        "no type",
        "no such comparison",
        "no comparison",
        "no peer",
        "no number",
        "no name",
    ],
)
def test_an_error_is_one_line(arguments, error):
    done = command(*arguments)
    assert done.returncode == 1
    assert done.stderr.startswith(error) and done.stderr.count("\n") == 1
