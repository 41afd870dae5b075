"""What is refused before the first stage: bad settings and what they name, with nothing written and nothing removed."""

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from config_trees import put
from etils import epath

from configs.base import get_config
from srlm_jax.errors import UserError
from srlm_jax.pipeline import checks, command
from srlm_jax.pipeline.command import run_command
from srlm_jax.pipeline.effects import without_effect
from srlm_jax.pipeline.run import make_run
from srlm_jax.pipeline.settings import BadConfig, read
from srlm_jax.storage import jsonl

ROOT = Path(__file__).parents[2]


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """The smoke scale in a workdir that is not there; no stage of it may begin."""

    def begun(run):
        raise AssertionError("a stage has begun")

    monkeypatch.setattr(command, "self_reward", begun)
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    for name, text in {
        "broken.jsonl": '{"prompt": "name two fruits ."}\n{"prompt": ',
        "blank.jsonl": '{"prompt": " "}\n',
        "other.jsonl": '{"question": "name two fruits ."}\n',
        "prompts.jsonl": '{"prompt": "name two fruits ."}\n',
    }.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "empty").mkdir()
    return get_config("smoke", 2).to_dict() | {"workdir": str(tmp_path / "run")}


SERVER = {"url": "http://localhost:9/v1", "model": "{name}"}
OWN = {f"seed_data.{name}": "prompts.jsonl" for name in ("ift", "eft_train", "eft_eval")}

# (what is changed, what the message begins with); a name that ends in .jsonl, or "empty", lies in the test's folder.
BAD = [
    ({"responses.temperature": -1.0}, "config.responses.temperature is -1.0: it must be at least 0"),
    ({"responses.temperature": math.nan}, "config.responses.temperature is nan: it must be a finite number"),
    ({"judging.temperature": math.inf}, "config.judging.temperature is inf: it must be a finite number"),
    ({"responses.top_p": 0.0}, "config.responses.top_p is 0.0: it must be above 0 and be at most 1"),
    ({"judging.top_p": 1.5}, "config.judging.top_p is 1.5: it must be above 0 and be at most 1"),
    ({"responses.max_new_tokens": 0}, "config.responses.max_new_tokens is 0: it must be at least 1"),
    ({"judging.stop": ("",)}, "config.judging.stop[0] is '': it must not be empty"),
    ({"responses.samples": 1}, "config.responses.samples is 1: a pair needs at least 2"),
    ({"sft.dropout": 1.5}, "config.sft.dropout is 1.5: it must be at least 0 and be below 1"),
    ({"dpo.beta": -1.0}, "config.dpo.beta is -1.0: it must be above 0"),
    ({"dpo.beta": 0.0}, "config.dpo.beta is 0.0: it must be above 0"),
    ({"dpo.beta": "0.1"}, "config.dpo.beta must be float, not '0.1'"),
    ({"dpo.train.optimizer.learning_rate": -1e-5}, "config.dpo.train.optimizer.learning_rate is -1e-05: it must be"),
    ({"sft.train.optimizer.end_learning_rate": 1.0}, "config.sft.train.optimizer: end_learning_rate is 1.0"),
    ({"sft.train.optimizer.warmup_steps": 20}, "config.sft.train: warmup_steps (20) must leave two"),
    ({"dpo.train.accumulate": 3}, "config.dpo.train: batch_size (8) must be a multiple of accumulate (3)"),
    ({"dpo.train.batch_size": 12}, "config.dpo.train.batch_size is 12, which 8 groups of devices"),
    ({"reference_batch": 12}, "config.reference_batch is 12, which 8 groups of devices"),
    ({"reference_batch": 0}, "config.reference_batch is 0: it must be at least 1"),
    ({"engine.rows": 0}, "config.engine.rows is 0: it must be at least 1"),
    ({"engine.cache": "int4"}, "config.engine.cache is 'int4': it must be 'int8'"),
    ({"shard_prompts": 0}, "config.shard_prompts is 0: it must be at least 1"),
    ({"context_length": 0}, "config.context_length is 0: it must be at least 1"),
    ({"context_length": 100}, "the judge's prompt cannot be held"),
    ({"self_instruction.from_seeds": 40}, "the prompt for new instructions cannot be held"),
    ({"models": 0}, "config.models is 0: it must be at least 1"),
    ({"models": -1}, "config.models is -1: it must be at least 1"),
    ({"seed": -1}, "config.seed is -1: it must be at least 0"),
    ({"mesh.tensor": 3}, "mesh.data x mesh.fsdp x mesh.tensor"),
    ({"mesh.data": 0}, "config.mesh.data is 0: it must be at least 1"),
    ({"lora.rank": 65}, "config.lora: rank is 65, more than the 64"),
    ({"chat": "chatml"}, "config.chat: "),
    ({"model.V": 64}, "config.model.V: the tokenizer has "),
    ({"model.K": 3}, "config.model: model.N "),
    ({"model.path": "empty"}, "config.model.path is given, and no human data"),
    ({"model.path": "empty", "seed_data.trees": "other.jsonl"}, "config.model.path: "),
    ({"world.held_out": 1}, "config.world.held_out is 1: it must be at least 2"),
    ({"seed_data.rules.ift_prompts": 5}, "config.seed_data.rules.ift_prompts is 5: self-instruction shows 8"),
    ({"seed_data.rules.ift_prompts": 0, "models": 1}, "config.seed_data.rules.ift_prompts is 0: the SFT baseline"),
    ({"seed_data.rules.eft_train_prompts": 0}, "config.seed_data.rules.eft_train_prompts is 0, and"),
    ({"seed_data.rules.eft_train_prompts": 0, "seed_data.eft": "ranks"}, "config.seed_data.rules.eft_train_prompts is"),
    ({"seed_data.rules.eft_eval_prompts": 0}, "config.seed_data.rules.eft_eval_prompts is 0: judges are measured on"),
    ({"seed_data.trees": "missing.jsonl"}, "config.seed_data.trees: "),
    ({"seed_data.trees": "broken.jsonl"}, "config.seed_data.trees: "),
    ({"seed_data.ift": "prompts.jsonl"}, "config.seed_data.eft_train is not given"),
    (OWN, "config.seed_data.ift: "),
    ({"self_instruction.prompts_file": "missing.jsonl"}, "config.self_instruction.prompts_file: "),
    ({"self_instruction.prompts_file": "broken.jsonl"}, "config.self_instruction.prompts_file: "),
    ({"self_instruction.prompts_file": "other.jsonl"}, "config.self_instruction.prompts_file: "),
    ({"self_instruction.prompts_file": "blank.jsonl"}, "config.self_instruction.prompts_file: "),
    ({"self_instruction.generator": "m7"}, "config.self_instruction.generator: 'm7' is neither 'current'"),
    ({"self_instruction.generator": "empty"}, "config.self_instruction.generator: "),
    (
        {f"self_instruction.endpoint.{name}": value for name, value in SERVER.items()}
        | {"self_instruction.endpoint.key_variable": "NO_SUCH_KEY"},
        "config.self_instruction.endpoint: the environment variable NO_SUCH_KEY",
    ),
    ({"endpoint.url": "http://localhost:9/v1", "endpoint.model": "m1"}, "config.endpoint.model is 'm1': it must hold"),
    ({"endpoint.url": "localhost:9", "endpoint.model": "{name}"}, "config.endpoint: url must be like"),
    ({"validation.endpoint.url": "http://localhost:9/v1", "validation.endpoint.model": "judge"}, "config.validation.e"),
    ({"processes": 2}, "config.coordinator is None: config.processes and config.process belong to"),
    ({"coordinator": "here"}, "config.coordinator is here: give HOST:PORT"),
    ({"coordinator": "here:65536", "processes": 2, "process": 0}, "config.coordinator is here:65536: give HOST:PORT"),
    ({"workdir": " "}, "config.workdir is ' ': it must not be blank"),
    ({"workdir": "prompts.jsonl/run"}, "config.workdir "),
    ({"workdir": "https://host/run"}, "config.workdir: https://host/run is an address and no path"),
    (
        {"model.path": "https://host/model", "seed_data.trees": "prompts.jsonl"},
        "config.model.path: https://host/model is an address and no path",
    ),
    ({"self_instruction.generator": "file:///model"}, "config.self_instruction.generator: file:///model is an address"),
    ({"self_instruction.prompts_file": "https://h/x"}, "config.self_instruction.prompts_file: https://h/x is an addre"),
]


@pytest.mark.parametrize(("changes", "said"), BAD, ids=[", ".join(map(str, changes)) for changes, _ in BAD])
def test_a_bad_setting_is_refused_before_anything_is_written(tree, tmp_path, changes, said):
    there = [name for value in changes.values() if isinstance(value, str) for name in (value, value.split("/")[0])]
    for name in {name for name in there if name.endswith(".jsonl") or name == "empty"}:
        changes = {
            field: str(tmp_path / value) if isinstance(value, str) and value.split("/")[0] == name else value
            for field, value in changes.items()
        }
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises((UserError, OSError)) as raised:
        run_command(put(tree, changes), None)
    assert str(raised.value).startswith(said)
    assert "\n" not in str(raised.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_redo_with_a_bad_setting_removes_nothing(tree, tmp_path):
    """A mistyped file once cost sixteen stages, and was refused after that."""
    entry = {"status": "done", "stage": "m2/prompts", "inputs": {}, "outputs": ["m2/prompts"], "config": {}}
    jsonl.write_json(tmp_path / "run" / "ledger" / "m2.prompts.json", entry | {"code": "1"})
    jsonl.write_json(tmp_path / "run" / "m2" / "prompts" / "0.json", {})
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    changes = {"self_instruction.prompts_file": str(tmp_path / "mistyped.jsonl")}
    with pytest.raises(BadConfig, match=r"^config\.self_instruction\.prompts_file: .*mistyped"):
        run_command(put(tree, changes), "m2/prompts")
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_a_writer_with_another_models_tokenizer_is_refused(tree, tmp_path, stories260k, llama2_folder):
    folder = tmp_path / "writer"
    folder.mkdir()
    for path in (stories260k / "hf").iterdir():
        if not path.name.startswith(("tokenizer", "special")):
            shutil.copyfile(path, folder / path.name)
    shutil.copyfile(llama2_folder / "tokenizer.model", folder / "tokenizer.model")
    run = make_run(read(put(tree, {"self_instruction.generator": str(folder)})), "test")
    with pytest.raises(BadConfig, match=r"^config\.self_instruction\.generator: the tokenizer has 32000 ids"):
        checks.check_writer(run)


def test_human_data_that_were_read_are_not_read_again(tree, tmp_path, monkeypatch):
    trees = tmp_path / "trees.jsonl"
    trees.write_text("{}\n")
    run = make_run(read(put(tree, {"seed_data.trees": str(trees)})), "test")
    with pytest.raises(BadConfig, match=r"^config\.seed_data\.trees: .*trees\.jsonl:1"):
        checks.check_sources(run, [])
    entry = {"status": "done", "stage": "seed", "inputs": {}, "outputs": ["seed"], "code": "test"}
    entry |= {"config": checks.seeding.seed_config(run)}
    jsonl.write_json(epath.Path(tmp_path) / "run" / "ledger" / "seed.json", entry)
    checks.check_sources(run, [])
    trees.write_text('{"changed": 1}\n')
    with pytest.raises(BadConfig, match=r"^config\.seed_data\.trees: .*trees\.jsonl:1"):
        checks.check_sources(run, [])


def test_human_data_are_read_again_where_they_are_divided_otherwise(tree, tmp_path):
    """With --redo=seed and other rules, the stages were removed before the rules were refused."""
    trees = tmp_path / "trees.jsonl"
    trees.write_text("{}\n")
    tree = put(tree, {"seed_data.trees": str(trees)})
    before = make_run(read(put(tree, {"seed_data.rules.eft_eval_prompts": 3})), "test")
    entry = {"status": "done", "stage": "seed", "inputs": {}, "outputs": ["seed"], "code": "test"}
    entry |= {"config": checks.seeding.seed_config(before)}
    jsonl.write_json(epath.Path(tmp_path) / "run" / "ledger" / "seed.json", entry)
    checks.check_sources(before, [])
    with pytest.raises(BadConfig, match=r"^config\.seed_data\.trees: .*trees\.jsonl:1"):
        checks.check_sources(make_run(read(put(tree, {"seed_data.rules.eft_eval_prompts": 4})), "test"), [])


def test_servers_are_asked_until_the_last_model_is_evaluated(tree, tmp_path, monkeypatch):
    """results.json is there after the first stage: a run that went on asked no server before its stages did."""
    asked = []
    monkeypatch.setattr(
        checks, "EndpointGenerate", lambda server, field: SimpleNamespace(check=lambda *_: asked.append(field))
    )
    server = {"judging.endpoint.url": "http://localhost:9/v1", "judging.endpoint.model": "judge"}
    run = make_run(read(put(tree, server)), "test")
    jsonl.write_json(epath.Path(tmp_path) / "run" / "results.json", {})
    checks.check_servers(run, [])
    assert asked == ["config.judging.endpoint"]
    entry = {"status": "done", "stage": "m2/eval", "inputs": {}, "outputs": ["m2/eval"], "config": {}, "code": "test"}
    jsonl.write_json(epath.Path(tmp_path) / "run" / "ledger" / "m2.eval.json", entry)
    checks.check_servers(run, [])
    assert asked == ["config.judging.endpoint"]
    checks.check_servers(run, ["m2/eval"])  # which --redo is about to remove
    assert asked == ["config.judging.endpoint"] * 2


# --- fields without effect --------------------------------------------------------------------------------------------


GIVEN_MODEL = {"model.path": "folder", "seed_data.trees": "trees"}


@pytest.mark.parametrize(
    ("changes", "given", "reason"),
    [
        ({"self_instruction.prompts_file": "p"}, "self_instruction.filters.min_words", "prompts_file is given"),
        ({"self_instruction.prompts_file": "p"}, "self_instruction.prompts_file", None),
        (GIVEN_MODEL, "world.trees", "config.model.path is given"),
        (GIVEN_MODEL, "pretraining.train.steps", "config.model.path is given"),
        (GIVEN_MODEL, "model.D", "the folder has its own numbers"),
        (GIVEN_MODEL, "model.compute_dtype", None),
        (GIVEN_MODEL, "validation.prompts_file", None),
        ({}, "model.D", None),
        ({}, "validation.prompts_file", "the oracle of the embedded world"),
        ({}, "lora.alpha", "config.lora.rank is not given"),
        ({"lora.rank": 4}, "lora.alpha", None),
        ({}, "endpoint.patience_s", "config.endpoint.url is not given"),
        ({f"endpoint.{name}": value for name, value in SERVER.items()}, "endpoint.patience_s", None),
        ({f"endpoint.{name}": value for name, value in SERVER.items()}, "engine.rows", "no model samples here"),
        (
            {f"endpoint.{name}": value for name, value in SERVER.items()} | {"self_instruction.generator": "folder"},
            "engine.rows",
            None,
        ),
        ({}, "seed_data.rules.lang", None),
        ({"seed_data.ift": "a", "seed_data.eft_train": "b", "seed_data.eft_eval": "c"}, "seed_data.rules.lang", "ift"),
        ({}, "start_timeout_s", "config.coordinator is not given"),
        ({"models": 1}, "dpo.beta", "there is no round"),
        ({"models": 1}, "responses.temperature", None),  # the evaluation draws answers by it
        ({}, "dpo.beta", None),
    ],
)
def test_a_field_that_changes_nothing_is_named_with_the_reason(changes, given, reason):
    settings = read(put(get_config("smoke", 2).to_dict(), changes))
    idle = without_effect(settings, [f"config.{given}", "config.seed"])
    if reason is None:
        assert idle == {}
    else:
        assert list(idle) == [f"config.{given}"] and reason in idle[f"config.{given}"]


def test_fields_without_effect_are_printed_in_one_line(tree, monkeypatch, capsys):
    monkeypatch.setattr(command, "self_reward", lambda run: [])
    run_command(tree, None, ["config.lora.alpha", "config.dpo.beta", "config.endpoint.patience_s"])
    assert (
        "\nno effect in this run: config.lora.alpha (config.lora.rank is not given); config.endpoint.patience_s "
        "(config.endpoint.url is not given)\n"
    ) in "\n" + capsys.readouterr().out


# --- as commands ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--config.dpo.beta=-1"], "error: config.dpo.beta is -1.0: it must be above 0\n"),
        (
            ["--config.judging.temperature=nan"],
            "error: config.judging.temperature is nan: it must be a finite number\n",
        ),
        (["--config.self_instruction.prompts_file=mistyped"], "error: config.self_instruction.prompts_file: "),
        (["--redo=m1/train"], "error: --redo=m1/train: "),  # there is no workdir yet
        (["--config.dpo.bta=1"], "error: --config.dpo.bta: no such field; did you mean --config.dpo.beta?\n"),
    ],
)
def test_the_command_says_it_in_a_line(tmp_path, flags, said):
    ran = subprocess.run(
        [
            sys.executable, "-m", "srlm_jax.main", "--config=configs/iter2.py:smoke",
            f"--config.workdir={tmp_path / 'run'}", *flags,
        ],
        cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True,
    )  # fmt: skip
    assert (ran.returncode, ran.stdout) == (1, "")
    assert ran.stderr.startswith(said) and ran.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
