"""SFT and a round's DPO with adapters: the stages leave what they leave without, and other commands read it."""

import json
import math

import jax
import numpy as np
import pytest
from etils import epath

from configs.base import get_config
from srlm_jax.convert import convert
from srlm_jax.model import llama, sources
from srlm_jax.parallel import rules
from srlm_jax.pipeline import training
from srlm_jax.pipeline.ledger import Outcome, StaleStage
from srlm_jax.pipeline.run import make_run
from srlm_jax.pipeline.settings import read
from srlm_jax.records import Example, PreferencePair
from srlm_jax.storage import jsonl
from srlm_jax.storage.checkpoint import named_leaves

pytestmark = pytest.mark.slow


def open_run(workdir, **lora):
    """A run of the smoke scale, its trainings of a few steps, its M0 random weights."""
    tree = get_config("smoke", 2).to_dict() | {"workdir": str(workdir)}
    tree["lora"] |= lora
    for part in ("sft", "dpo"):
        tree[part]["train"] |= {"steps": 3, "batch_size": 8, "checkpoint_every": 2, "log_every": 1}
        tree[part]["train"]["optimizer"] |= {"warmup_steps": 0, "learning_rate": 1e-2, "end_learning_rate": 1e-3}
    run = make_run(read(tree), "test")
    for name in ("seed", "m2/pairs"):
        run.ledger.run(name, lambda: Outcome({}, None), config={}, inputs=(), outputs=())
    config = run.settings.model.llama
    places = rules.model_shardings(run.train_mesh, rules.TRAIN, llama.abstract(config))

    def make_base():
        model = jax.jit(lambda: llama.init(config, jax.random.key(0)), out_shardings=places)()
        return Outcome({}, training._save(run, "m0", model))

    run.ledger.run("m0/train", make_base, config={}, inputs=(), outputs=("m0/checkpoint",))
    return run


def go(run):
    """M1 by SFT from M0, then M2 by DPO from M1."""
    asked = "list three fruits ."
    jsonl.write(
        run.workdir / "ift.jsonl",
        [Example(id=str(i), prompt=asked, response="plum , fig", finished=True) for i in range(8)],
    )
    training.fine_tune(run, "m1", ["ift.jsonl"], ["seed", "m0/train"])
    pairs = [
        PreferencePair(
            id=str(i),
            prompt=asked,
            chosen="kiwi",
            rejected="fig , fig",
            chosen_finished=True,
            rejected_finished=True,
            chosen_score=4,
            rejected_score=1,
        )
        for i in range(8)
    ]
    jsonl.write(jsonl.shard(run.workdir / "m2" / "pairs", 0), pairs)
    training.reference_logprobs(run, "m2", "m1")
    training.train_on_preferences(run, "m2", "m1")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    run = open_run(tmp_path_factory.mktemp("adapters"), rank=4)
    go(run)
    return run


@pytest.mark.parametrize(("name", "before"), [("m1", "m0"), ("m2", "m1")])
def test_each_model_is_the_one_before_with_other_projections(finished, name, before):
    models = {part: named_leaves(finished.to_train(part)) for part in (name, before)}
    changed = {leaf for leaf, weight in models[before].items() if (models[name][leaf] != weight).any()}
    assert changed == {f"blocks/{projection}" for projection in ("q", "k", "v", "o", "gate", "up", "down")}
    assert not (finished.workdir / name / "train_state").exists()


def test_a_round_starts_where_policy_and_reference_agree(finished):
    """New adapters change nothing of the merged M1, which the reference is taken from: the first loss is log 2."""
    lines = (finished.workdir / "m2" / "metrics.jsonl").read_text().splitlines()
    first, *_, last = map(json.loads, lines)
    assert first["step"] == 1
    np.testing.assert_allclose([first["loss"], first["reward_margin"]], [math.log(2), 0], atol=1e-4)
    assert last["loss"] < 0.6


def test_the_last_model_exports_as_any_other(finished, tmp_path):
    source = finished.workdir / "m2" / "checkpoint"
    convert(source, tmp_path / "hf", to="hf", dtype=None, shard_bytes=10**9)
    exported = sources.hugging_face(epath.Path(tmp_path / "hf"))
    model = finished.to_train("m2")
    down = exported["model.layers.1.mlp.down_proj.weight"].whole()
    np.testing.assert_array_equal(down, np.asarray(model.blocks.down[1]).T)


def test_trainings_depend_on_the_rank_and_others_do_not(finished):
    entries = {name: finished.ledger.entry(name)["config"] for name in ("m1/train", "m2/train", "m2/reference")}
    assert entries["m1/train"]["config.lora.rank"] == entries["m2/train"]["config.lora.rank"] == 4
    assert not any(name.startswith("config.lora") for name in entries["m2/reference"])
    other = open_run(finished.workdir, rank=8)
    with pytest.raises(StaleStage, match=r"config\.lora\.rank was 4, is 8"):
        training.fine_tune(other, "m1", ["ift.jsonl"], ["seed", "m0/train"])
