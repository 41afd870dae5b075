"""The whole command at the smoke scale: what it leaves, and that kills, changes and damage do what they should.

One run is made and kept; every other test works on a copy of it.
"""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.base import get_config
from srlm_jax.data import world
from srlm_jax.model import llama
from srlm_jax.parallel import rules
from srlm_jax.pipeline.command import results_table
from srlm_jax.pipeline.settings import read
from srlm_jax.records import Example, JudgedPrompt, PreferencePair, Prompt, RankedPrompt, ReferencePair
from srlm_jax.storage import checkpoint, jsonl
from srlm_jax.text.chat import PLAIN, encode_prompt, encode_response
from srlm_jax.text.tokenizer import WordTokenizer

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
MODELS = ("m0", "sft", "m1", "m2", "m3")
ROUND = ("prompts", "responses", "judgements", "oracle", "pairs", "reference", "train", "eval")
STAGES = (
    "world", "seed", "m0/train", "m0/eval", "sft/train", "sft/eval", "eft/judgements", "eft/examples", "m1/train",
    "m1/eval", *(f"m2/{stage}" for stage in ROUND), *(f"m3/{stage}" for stage in ROUND),
)  # fmt: skip


@pytest.fixture(scope="module")
def start(command_environment):
    """`start(workdir, "--redo=...")`: the command at the smoke scale, running."""

    def start(workdir, *arguments, config="iter3"):
        command = [sys.executable, "-m", "srlm_jax.main", f"--config=configs/{config}.py:smoke"]
        return subprocess.Popen(
            [*command, f"--config.workdir={workdir}", *arguments],
            cwd=ROOT, env=command_environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    return start


@pytest.fixture(scope="module")
def run(start):
    """`run(workdir, ...)`: what the command prints; it must succeed."""

    def run(workdir, *arguments, config="iter3"):
        process = start(workdir, *arguments, config=config)
        printed, errors = process.communicate(timeout=1_200)
        assert process.returncode == 0, errors
        return printed

    return run


@pytest.fixture(scope="module")
def fail(start):
    """`fail(workdir, ...)`: the one line that the command says; it must fail, and without a traceback."""

    def fail(workdir, *arguments):
        process = start(workdir, *arguments)
        _, errors = process.communicate(timeout=600)
        assert process.returncode != 0
        assert "Traceback" not in errors
        last = errors.strip().split("\n")[-1]
        assert last.startswith("error: ")
        return last

    return fail


@pytest.fixture(scope="module")
def finished(run, tmp_path_factory):
    """A finished run's workdir, not to be changed, and what the command printed."""
    workdir = tmp_path_factory.mktemp("smoke") / "run"
    printed = run(workdir)
    return workdir, printed


@pytest.fixture
def copy(finished, tmp_path):
    return Path(shutil.copytree(finished[0], tmp_path / "run"))


def forget(workdir, *stages):
    """Removes stages from the ledger: they are made again, from the files that are there."""
    for stage in stages:
        (workdir / "ledger" / f"{stage.replace('/', '.')}.json").unlink()


def entry(workdir, stage):
    return jsonl.read_json(workdir / "ledger" / f"{stage.replace('/', '.')}.json")


def times(workdir):
    """When each file was written; the last two are written by every start."""
    files = {str(path.relative_to(workdir)): path.stat().st_mtime_ns for path in workdir.rglob("*") if path.is_file()}
    return {name: written for name, written in files.items() if name not in ("results.json", "report.html")}


def contents(workdir):
    """What a run leaves, but for how long it took, TensorBoard's files and how a checkpoint is laid out on disk."""
    found = {}
    for path in workdir.rglob("*"):
        name = path.relative_to(workdir)
        if not path.is_file() or {"tensorboard", "weights"} & {*name.parts} or name.name == "report.html":
            continue
        if name.parts[0] == "ledger":
            found[str(name)] = {key: value for key, value in json.loads(path.read_text()).items() if key != "seconds"}
        elif name.name == "metrics.jsonl":
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            found[str(name)] = [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in lines]
        else:
            found[str(name)] = path.read_bytes()
    return found


@pytest.fixture(scope="module")
def load(one_device):
    """`load(workdir, "m1")`: the model, its weights checked against the manifest."""
    settings = read(get_config("smoke", 3).to_dict())
    shapes = llama.abstract(settings.model.llama)
    places = rules.model_shardings(one_device("data", "fsdp", "tensor"), rules.TRAIN, shapes)
    like = jax.tree.map(lambda x, to: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=to), shapes, places)
    return lambda workdir, name: checkpoint.load_model(workdir / name / "checkpoint", like)


# --- what a run leaves ------------------------------------------------------------------------------------------------


def test_every_stage_is_done_and_every_file_there(finished):
    workdir, _ = finished
    assert {path.name.removesuffix(".json") for path in (workdir / "ledger").iterdir()} == {
        stage.replace("/", ".") for stage in STAGES
    }
    for stage in STAGES:
        assert entry(workdir, stage)["status"] == "done"
        made = {output for output in entry(workdir, stage)["outputs"] if not output.endswith("train_state")}
        assert made and all((workdir / output).exists() for output in made)
    for name in MODELS:
        assert (
            jsonl.read_json(workdir / name / "checkpoint" / "manifest.json")["hash"]
            == entry(workdir, f"{name}/train")["model"]
        )
        assert not (workdir / name / "train_state").exists()
    assert not list(workdir.rglob(".*"))


def test_results_report_and_table_name_all_models(finished):
    workdir, printed = finished
    results = jsonl.read_json(workdir / "results.json")
    assert list(results) == ["M0", "SFT", "M1", "M2", "M3"]
    for metrics in results.values():
        assert {"oracle_score", "perfect", "response_tokens", "pairwise_accuracy"} <= metrics.keys()
        for metric in metrics.values():
            assert metric.keys() == {"value", "stderr", "n"} and metric["stderr"] >= 0 and metric["n"] > 0
    assert results_table(results) in printed
    assert "</html>" in (workdir / "report.html").read_text()


@pytest.mark.parametrize("name", ["m2", "m3"])
def test_pairs_are_the_highest_against_the_lowest(finished, name):
    workdir, _ = finished
    judged = {prompt.id: prompt for prompt in jsonl.read(workdir / name / "judgements", JudgedPrompt)}
    pairs = jsonl.read(workdir / name / "pairs", PreferencePair)
    assert pairs
    for pair in pairs:
        scores = {response.response: set() for response in judged[pair.id].responses}
        for response in judged[pair.id].responses:
            assert all(vote.score is None or 0 <= vote.score <= 5 for vote in response.votes)
            if response.score is not None:
                scores[response.response].add(response.score)
        known = set().union(*scores.values())
        assert (pair.chosen_score, pair.rejected_score) == (max(known), min(known))
        assert pair.chosen_score in scores[pair.chosen] and pair.rejected_score in scores[pair.rejected]


def test_no_prompt_is_trained_on_and_evaluated_on(finished):
    workdir, _ = finished
    evaluated = {prompt.prompt for prompt in jsonl.read(workdir / "seed" / "eft_eval.jsonl", RankedPrompt)}
    held_out = {prompt.text for prompt in jsonl.read(workdir / "world" / "held_out.jsonl", Prompt)}
    ift = [example.prompt for example in jsonl.read(workdir / "seed" / "ift.jsonl", Example)]
    eft = [example.prompt for example in jsonl.read(workdir / "eft" / "examples", Example)]
    assert ift and eft and evaluated and held_out
    questions = [prompt.split("\nquestion: ")[1].split("\nanswer: ")[0] for prompt in eft]
    assert not evaluated & {*ift, *questions}
    assert not held_out & {*ift, *questions, *evaluated}
    trained = {prompt.prompt for prompt in jsonl.read(workdir / "seed" / "eft_train.jsonl", RankedPrompt)}
    assert set(questions) <= trained


@pytest.mark.parametrize(("name", "reference"), [("m2", "m1"), ("m3", "m2")])
def test_reference_logprobs_are_those_of_the_model_before(finished, load, name, reference):
    workdir, _ = finished
    tokenizer, model = WordTokenizer(world.vocabulary()), load(workdir, reference)

    def logprob(prompt, response, finished):
        opening, answer = encode_prompt(tokenizer, PLAIN, prompt), encode_response(tokenizer, PLAIN, response, finished)
        ids = np.asarray([*opening, *answer])
        tokens_BT = np.zeros((1, 96), np.int32)
        tokens_BT[0, : len(ids)] = ids
        positions_BT = np.arange(96, dtype=np.int32)[None]
        hidden_BTD, _ = forward(tokens_BT, positions_BT)
        logprobs = jax.nn.log_softmax(hidden_BTD[0] @ model.head(), axis=-1)
        return sum(float(logprobs[i - 1, ids[i]]) for i in range(len(opening), len(ids)))

    forward = jax.jit(lambda tokens, at: model(tokens, at, segments_BT=None, cache=None, dropout=None))
    for pair in jsonl.read(workdir / name / "reference", ReferencePair)[:6]:
        assert pair.chosen_logprob == pytest.approx(logprob(pair.prompt, pair.chosen, pair.chosen_finished), abs=1e-3)
        assert pair.rejected_logprob == pytest.approx(
            logprob(pair.prompt, pair.rejected, pair.rejected_finished), abs=1e-3
        )


# --- starting again ---------------------------------------------------------------------------------------------------


def test_a_second_start_redoes_nothing(finished, copy, run):
    before = times(copy)
    printed = run(copy)
    assert times(copy) == before
    table = lambda text: text.split("\n\n")[-2].strip("\n")  # below it are the paths
    assert table(printed) == table(finished[1])


def test_killed_anywhere_and_started_again_a_run_ends_the_same(finished, tmp_path, start, run, load):
    workdir, rng = tmp_path / "run", random.Random(0)
    # Three moments: some way into the pretraining, after it was saved, and into two stages drawn by lot.
    chosen = sorted(rng.sample(range(STAGES.index("m0/eval"), len(STAGES) - 1), 2))
    moments = [("m0/train", workdir / "m0" / "train_state" / "50")]
    moments += [(STAGES[i], workdir / "ledger" / f"{STAGES[i].replace('/', '.')}.json") for i in chosen]
    interrupted = []
    for stage, sign in moments:
        delay = rng.uniform(0, 0.5) * entry(finished[0], stage)["seconds"]
        process = start(workdir)
        while not sign.exists() and process.poll() is None:
            time.sleep(0.02)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        _, errors = process.communicate()
        assert process.returncode == -signal.SIGKILL, errors
        entries = [jsonl.read_json(path) for path in (workdir / "ledger").iterdir() if not path.name.startswith(".")]
        interrupted += [entry["stage"] for entry in entries if entry["status"] != "done"]
    assert interrupted  # or every kill fell between two stages
    run(workdir)

    expected, found = contents(finished[0]), contents(workdir)
    assert found.keys() - {name for name in found if name.endswith(".partial")} == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []
    for name in MODELS:
        for a, b in zip(jax.tree.leaves(load(finished[0], name)), jax.tree.leaves(load(workdir, name)), strict=True):
            assert jnp.array_equal(a, b)


def test_redo_makes_again_what_depends_on_it_and_nothing_else(finished, copy, run):
    before = times(copy)
    printed = run(copy, "--redo=m3/pairs")
    assert "removed: m3/eval, m3/pairs, m3/reference, m3/train\n" in printed
    assert contents(copy) == contents(finished[0])
    after = times(copy)
    stale = ("m3/pairs/", "m3/reference/", "m3/checkpoint/", "m3/metrics.jsonl", "m3/first_step.json",
             "m3/tensorboard/", "m3/eval/")  # fmt: skip
    stale += tuple(f"ledger/m3.{stage}.json" for stage in ("pairs", "reference", "train", "eval"))
    kept = {name for name in before if not name.startswith(stale)}
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}
    assert not {name for name in before.keys() & after.keys() - kept if after[name] == before[name]}


def test_the_first_config_stops_at_the_first_model(copy, run):
    for name in ("m2", "m3"):
        shutil.rmtree(copy / name)
        forget(copy, *(stage for stage in STAGES if stage.startswith(name)))
    printed = run(copy, config="iter1")
    assert list(jsonl.read_json(copy / "results.json")) == ["M0", "SFT", "M1"]
    assert "\nM1 " in printed and "\nM2 " not in printed
    assert not (copy / "m2").exists()


# --- compiled programs ------------------------------------------------------------------------------------------------


def test_a_round_compiles_twelve_programs_at_most_and_the_next_one_what_its_pairs_need(copy, command_environment):
    """Of those that read a model's weights; the last file of judgements has fewer groups, and takes two of its own. How
    many rows packed pairs take and how long the longest one is depend on the round's pairs."""
    script = ROOT / "tests" / "pipeline" / "counted_programs.py"
    done = subprocess.run(
        [sys.executable, str(script), str(copy)],
        cwd=ROOT, env=command_environment | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rounds = json.loads(done.stdout.splitlines()[-1])
    assert {"admit", "decode", "response_logprobs", "train_step"} <= {*rounds["m2"]}
    assert len(rounds["m2"]) <= 12
    assert {*rounds["m3"]} <= {"train_step", "response_logprobs"} and len(rounds["m3"]) <= 2


# --- what a user can put right ----------------------------------------------------------------------------------------


def test_a_changed_field_stops_with_field_stage_and_flag(copy, fail):
    before = times(copy), contents(copy)
    message = fail(copy, "--config.dpo.beta=0.2")
    assert "config.dpo.beta was 0.1, is 0.2" in message
    assert "stage m2/train" in message and "--redo=m2/train" in message
    assert (times(copy), contents(copy)) == before


def test_a_cut_shard_stops_with_its_line(copy, fail):
    shard = copy / "m2" / "judgements" / "00001.jsonl"
    shard.write_bytes(shard.read_bytes()[:-40])
    lines = shard.read_bytes().count(b"\n") + 1
    before = contents(copy)
    message = fail(copy, "--redo=m2/pairs")
    assert f"{shard}:{lines}: the line does not end, so the file was cut short" in message
    kept = {name for name in before if not name.startswith(("m3/", "ledger/", "m2/", "results"))}
    assert kept and {name: contents(copy)[name] for name in kept} == {name: before[name] for name in kept}


def test_a_damaged_checkpoint_stops_with_its_folder(copy, fail):
    forget(copy, "m3/prompts")
    shutil.rmtree(copy / "m3" / "candidates")
    weights = max((copy / "m2" / "checkpoint" / "weights").rglob("*"), key=lambda path: path.stat().st_size)
    weights.write_bytes(weights.read_bytes()[:1000] + b"damage" + weights.read_bytes()[1006:])
    message = fail(copy)
    assert f"{copy}/m2/checkpoint" in message and "--redo" in message

    (copy / "m2" / "checkpoint" / "manifest.json").unlink()
    assert f"{copy}/m2/checkpoint holds no finished checkpoint" in fail(copy)


def test_a_workdir_that_cannot_be_written_stops_with_its_name(tmp_path, fail):
    (tmp_path / "file").write_text("")
    message = fail(tmp_path / "file" / "run")
    assert f"config.workdir {tmp_path}/file/run cannot be written" in message and "choose another folder" in message


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("--config.dpo.betta=0.2", "--config.dpo.beta"),
        ("--config.dop.beta=0.2", "--config.dpo.beta"),
    ],
)
def test_an_unknown_override_names_the_nearest_field(tmp_path, fail, override, nearest):
    message = fail(tmp_path / "run", override)
    assert message == f"error: {override.split('=')[0]}: no such field; did you mean {nearest}?"
    assert not (tmp_path / "run").exists()
