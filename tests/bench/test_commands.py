"""Every command on the smallest work: that what it counts is consistent. No test looks at how long anything took."""

import ast
import dataclasses
import functools
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from srlm_jax.bench import (
    attention,
    batching,
    ceilings,
    commands,
    cost,
    peer_process,
    report,
    sampling,
    sides,
    training,
)
from srlm_jax.bench.ceilings import Ceilings
from srlm_jax.bench.setting import Setting, random_model, sample_mesh, train_mesh
from srlm_jax.bench.sides import OURS, Side
from srlm_jax.bench.workload import CPU, documents
from srlm_jax.storage import jsonl

TOP = Ceilings(
    flops_per_second={"float32": 1e12, "bfloat16": 2e12}, read_bytes_per_second=1e10, copy_bytes_per_second=5e9
)
SMALL = dataclasses.replace(
    CPU, prompts=2, samples=2, votes=2, instruction=4, response_mean=4, judgement_mean=3, before=6, behind=3,
    rows=4, steps=4, batch=2, updates=2,
)  # fmt: skip


@pytest.fixture
def setting(tiny_config):
    """`setting("judge", repeat=2)`: a command on the smallest work."""

    def make(command, **changes):
        chosen = Setting(
            command=command, shape="tiny", config=tiny_config, dtypes=("float32",), workload=SMALL, repeat=1,
            peer=None, peer_python=None, peer_rows=SMALL.rows, unshared=False, saving=False,
        )  # fmt: skip
        return dataclasses.replace(chosen, **changes)

    return make


# --- this package alone -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", list(commands.MEASURES))
def test_a_command_counts_what_it_did(setting, tmp_path, command):
    found = commands.measured(setting(command), TOP)
    (side,) = found["summary"]
    assert (side["name"], side["dtype"], found["ratio"]) == (OURS, "float32", {})
    assert [len(runs) for runs in found["runs"].values()] == [2]  # the first is cold
    assert side["cold_seconds"] > 0 and side["parts"]["seconds"]["tokens_per_second"] > 0
    for part, rates in side["parts"].items():
        # The same work, whatever it is divided by: operations, bytes and shares of the ceilings belong together.
        flops, moved = (rates[f"{name}_per_second"] * side[part] for name in ("flops", "bytes"))
        assert rates["mfu"] == pytest.approx(rates["flops_per_second"] / 1e12)
        assert flops / 1e12 + moved / 1e10 >= rates["roofline"] * side[part] * 0.999
        assert rates["roofline"] * side[part] >= max(flops / 1e12, moved / 1e10) * 0.999
    if command in ("dpo", "iteration"):  # each part has a clock of its own
        parts = side["parts"].keys() - {"seconds"}
        assert sum(side[part] for part in parts) == pytest.approx(side["seconds"], rel=1e-3)
    assert found["units"][0] > 0
    jsonl.write_json(tmp_path / "found.json", found)
    assert f"\n{OURS}, float32" in report.table(found)


def test_judging_shares_and_without_sharing_reads_more(setting):
    found = commands.measured(setting("judge", unshared=True), TOP)
    shared, alone = found["summary"]
    work = found["work"]
    assert shared["prompt_tokens"] == alone["prompt_tokens"] == work["prompt_tokens"]
    assert work["unique_prompt_tokens"] <= shared["prefilled_tokens"] < alone["prefilled_tokens"]
    assert alone["prefilled_tokens"] == work["prompt_tokens"]
    assert shared["sampled_tokens"] == alone["sampled_tokens"] == work["new_tokens"]
    assert found["ratio"]["seconds"].keys() == {"ours, nothing shared"}


def test_attention_reads_less_of_levels_than_of_copies_and_finds_the_same(setting, monkeypatch):
    found = commands.measured(setting("attention", unshared=True), TOP)
    # A template of 6, an instruction of 4, two answers of 4 and what is behind them, half of each of their judgements.
    assert found["work"] == {"steps": 4, "rows": 4, "tokens_of_a_row": 19, "tokens_of_all_rows": 6 + 4 + 2 * 7 + 4 * 2}
    assert [side["name"] for side in found["summary"]] == ["ours", "ours, nothing shared"]
    copies = attention._copies
    monkeypatch.setattr(attention, "_copies", lambda levels, rows: copies([levels[1], *levels[1:]], rows))
    with pytest.raises(ValueError, match="shared levels give other outputs than copies in float32"):
        commands.measured(setting("attention"), TOP)


@pytest.mark.parametrize("command", ["sft", "dpo"])
def test_a_training_that_saves_does_the_same_updates(setting, command):
    found = commands.measured(setting(command, saving=True), TOP)
    alone, saving = found["summary"]
    assert (alone["name"], saving["name"]) == ("ours", "ours, while saving")
    assert 0 < saving["save_held_seconds"] <= saving["save_seconds"]
    assert "save_seconds" not in alone
    assert saving["parts"].keys() == alone["parts"].keys()
    assert "s until the writing begins" in report.table(found)


def test_both_types_are_measured_in_turn(setting):
    found = commands.measured(setting("decode", dtypes=("float32", "bfloat16")), TOP)
    assert list(found["runs"]) == ["ours, float32", "ours, bfloat16"]


@pytest.mark.parametrize(("command", "units"), [("decode", [4, 12]), ("sft", [4, 12])])
def test_growth_does_the_same_so_many_times(setting, command, units):
    grown = commands.grown(setting(command), TOP, [1, 3])
    assert [(row["times"], row["units"]) for row in grown["growth"]] == [(1, units[0]), (3, units[1])]
    assert "\nours, float32" in report.growth_table(grown)


def test_packed_documents_are_all_there(setting):
    rows = documents(dataclasses.replace(SMALL, batch=5, updates=3, response_mean=40), 40)
    made = batching.token_batches(rows, 5)
    assert len({batch.tokens_BT.shape for batch in made}) == 1
    # Which documents share a batch is no matter; each batch has five, and all of them are there.
    counts = [sum(len({*segments.tolist()} - {0}) for segments in batch.segments_BT) for batch in made]
    assert counts == [5, 5, 5]
    assert sum(int(np.sum(batch.segments_BT > 0)) for batch in made) == sum(row.length for row in rows)
    assert sum(int(np.sum(batch.mask_BT)) for batch in made) == sum(len(row.ids) - row.loss_from for row in rows)


def test_ceilings_are_measured_for_each_type():
    found = ceilings.measure(("float32", "bfloat16"), side=32, size=2**16)
    assert found.flops_per_second.keys() == {"float32", "bfloat16"}
    assert min(*found.flops_per_second.values(), found.read_bytes_per_second, found.copy_bytes_per_second) > 0


# --- comparing --------------------------------------------------------------------------------------------------------


def test_sides_take_turns_and_the_first_run_is_apart():
    calls = []

    def run(name, seconds):
        calls.append(name)
        return {"seconds": seconds.pop(0), "half_seconds": 1.0}

    a = Side(name=OURS, dtype="float32", run=functools.partial(run, "a", [9.0, 1.0, 4.0, 2.0]))
    b = Side(name="theirs", dtype="float32", run=functools.partial(run, "b", [9.0, 6.0, 3.0, 8.0]))
    runs = sides.measure([a, b], 3, "title")
    assert calls == ["a", "b"] * 4
    need = cost.Need(tokens=10, flops=1e12, memory_bytes=0.0)
    first, second = (
        sides.summary(side, runs[side.label], {"seconds": [need, need], "absent_seconds": [need]}, TOP)
        for side in (a, b)
    )
    assert (first["seconds"], first["seconds_min"], first["seconds_max"], first["spread"]) == (2.0, 1.0, 4.0, 1.5)
    assert first["parts"].keys() == {"seconds"}
    # Two phases of 1e12 operations at 1e12 a second in 2 seconds; the tokens are those of the last phase.
    whole = first["parts"]["seconds"]
    assert (whole["mfu"], whole["roofline"], whole["tokens_per_second"]) == (1.0, 1.0, 5.0)
    assert sides.ratios([first, second], "seconds") == {"theirs": 3.0}


def test_a_ratio_takes_the_better_type_of_each():
    found = [
        {"name": OURS, "dtype": "float32", "seconds": 4.0},
        {"name": OURS, "dtype": "bfloat16", "seconds": 2.0},
        {"name": "theirs", "dtype": "float32", "seconds": 5.0},
        {"name": "theirs", "dtype": "bfloat16", "seconds": 9.0},
    ]
    assert sides.ratios(found, "seconds") == {"theirs": 2.5}
    assert sides.ratios(found, "train_seconds") == {}


def logits(*tops):
    """One prompt's logits: each step's best tokens by number, highest first, 0.5 apart or as given."""
    found = np.zeros((1, len(tops), 8), np.float32)
    for step, top in enumerate(tops):
        for token, value in top.items():
            found[0, step, token] = value
    return found


def test_the_same_tokens_agree_and_others_do_not():
    along = logits({3: 1.0, 4: 0.5}, {5: 1.0, 6: 0.9995})
    sampling.compare("theirs", [(3, 5)], along, [[3, 5]], along + 5e-4)
    # At the second step two tokens are equal but for rounding: either may be taken, and nothing follows it.
    sampling.compare("theirs", [(3, 5)], along, [[3, 6]], along)
    with pytest.raises(ValueError, match="theirs takes token 4 at step 0 of prompt 0, and this package 3"):
        sampling.compare("theirs", [(3, 5)], along, [[4, 5]], along)
    with pytest.raises(ValueError, match=r"theirs computes other logits than this package: 0\.01 apart"):
        sampling.compare("theirs", [(3, 5)], along, [[3, 5]], along + 1e-2)
    with pytest.raises(ValueError, match="theirs wrote 1 tokens to prompt 0, not 2"):
        sampling.compare("theirs", [(3, 5)], along, [[3]], along)


def test_other_log_probabilities_stop_a_comparison():
    ours = np.asarray([-10.0, -20.0])
    training.check_logprobs("theirs", ours, ours + 0.005, [10, 20])
    with pytest.raises(ValueError, match=r"theirs gives document 1 a log-probability of -19\.9"):
        training.check_logprobs("theirs", ours, np.asarray([-10.0, -19.9]), [10, 20])


def test_a_peer_is_told_how_many_rows_it_may_sample_at_once(setting):
    told = sampling.job(setting("decode", peer="transformers", peer_rows=1), "folder", "float32")
    assert (told["rows"], told["folder"], told["dtype"]) == (1, "folder", "float32")


def test_what_is_sampled_with_lies_where_sampling_has_it(setting):
    """A program must not be given arrays of two meshes, where a kernel runs on one of them."""
    model = random_model(setting("decode").config, "float32")
    meshes = lambda model: {leaf.sharding.mesh for leaf in jax.tree.leaves(model)}
    assert (meshes(model), meshes(sampling.to_sample(model))) == ({train_mesh()}, {sample_mesh()})


def test_rows_of_another_length_stop_a_comparison(setting):
    class Peer:
        name = "theirs"

        def ask(self, **question):
            return {"seconds": 1.0, "complete": question["limits"] == [[2, 3], [4, 1]]}

    right = sampling.Tree((((5, 6),), ((7,),)), (((2, 3),), ((4, 1),)))
    assert sampling.ask(Peer(), "way", right, sampling.DRAW, rows=4) == {"seconds": 1.0}
    with pytest.raises(ValueError, match="theirs, way wrote rows of other lengths than it was to write"):
        sampling.ask(Peer(), "way", right.read_only(), sampling.DRAW, rows=4)


# --- peers ------------------------------------------------------------------------------------------------------------


def test_peers_know_nothing_of_this_package():
    for path in (Path(peer_process.__file__).parent / "peers").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in names if name.split(".")[0] == "srlm_jax"], path


def test_every_peer_that_can_be_named_can_be_made():
    assert {name for command, names in commands.VS.items() if command != "load" for name in names} <= {
        *peer_process.REQUIREMENTS
    }


def test_an_environment_that_cannot_be_made_says_why(monkeypatch):
    with pytest.raises(ValueError, match="--make=nobody: the peers are transformers, trl, tunix"):
        peer_process.make("nobody", sys.executable)
    with pytest.raises(ValueError, match="trl: /no/python cannot be run: No such file or directory"):
        peer_process.make("trl", "/no/python")
    monkeypatch.setitem(peer_process.NEEDS_PYTHON, "tunix", (4, 0))
    with pytest.raises(ValueError, match=r"tunix needs Python 4.0 or later, and .* is 3\.\d+: name another by"):
        peer_process.make("tunix", sys.executable)


def test_a_peer_answers_line_by_line_and_where_it_ends_says_why(monkeypatch, tmp_path):
    monkeypatch.setattr(peer_process, "_SCRIPTS", tmp_path)
    (tmp_path / "parrot.py").write_text(
        "import json\n"
        "print(json.dumps({'versions': json.loads(input())}), flush=True)\n"
        "print(json.dumps({'said': json.loads(input())['word']}), flush=True)\n"
        "input()\n"
        "raise RuntimeError('too\\nmany words')\n"
    )
    with peer_process.started("parrot", Path(sys.executable), {"parrot": "1.0"}) as peer:
        assert peer.versions == {"parrot": "1.0"}
        assert peer.ask(word="hello") == {"said": "hello"}
        with pytest.raises(ValueError, match=r"^parrot ended \(RuntimeError: too\)$"):
            peer.ask(word="again")
    (tmp_path / "parrot.py").write_text("import polly_that_is_not_there\n")
    silent = pytest.raises(ValueError, match=r"^parrot ended \(ModuleNotFoundError: No module named 'polly")
    with silent, peer_process.started("parrot", Path(sys.executable), {}):
        pass
    (tmp_path / "parrot.py").write_text("import os\nos.kill(os.getpid(), 9)\n")
    killed = pytest.raises(ValueError, match=r"^parrot was killed, as where memory runs out: ask for less at once")
    with killed, peer_process.started("parrot", Path(sys.executable), {}):
        pass


def test_an_interpreter_that_is_not_there_is_named():
    with pytest.raises(ValueError, match=r"--peer_python=/no/python is not there: make it by python -m srlm"):
        peer_process.python_of("trl", "/no/python")


@pytest.mark.slow
@pytest.mark.parity
@pytest.mark.parametrize(
    ("command", "peer", "names"),
    [
        ("decode", "transformers", ["transformers, generate", "transformers, generate_batch"]),
        pytest.param("sft", "transformers", ["transformers, forward, backward, AdamW"], marks=pytest.mark.long),
        ("dpo", "trl", ["trl, DPOTrainer", "trl, DPOTrainer, reference first"]),
        pytest.param("iteration", "trl", ["transformers generate, DPOTrainer"], marks=pytest.mark.long),
    ],
)
def test_a_peer_does_the_same_work(setting, command, peer, names):
    # Nothing is timed unless both agree, so that this passes says that they do.
    found = commands.measured(setting(command, peer=peer, peer_python=sys.executable), TOP)
    assert list(found["ratio"]["seconds"]) == names
    assert {"torch", "transformers"} < found["versions"].keys()
    assert all(len(runs) == 2 for runs in found["runs"].values())
