"""Reference and DPO with answers that share rows: what they are without, in fewer positions."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.base import get_config
from srlm_jax.data import batches
from srlm_jax.data.batches import PairBatch, TokenBatch
from srlm_jax.model import llama
from srlm_jax.parallel import hosts, rules
from srlm_jax.pipeline import training
from srlm_jax.pipeline.ledger import Outcome
from srlm_jax.pipeline.run import make_run
from srlm_jax.pipeline.settings import read
from srlm_jax.records import Example, PreferencePair, ReferencePair
from srlm_jax.storage import jsonl

spread = hosts.spread
FRUIT = ("plum", "fig", "kiwi", "pear")


def open_run(workdir, **changes):
    """A run of the smoke scale in float32 with a random M0 and M1, its trainings of two steps."""
    tree = get_config("smoke", 2).to_dict() | {"workdir": str(workdir)} | changes
    for part in ("sft", "dpo"):
        tree[part]["train"] |= {"steps": 2, "batch_size": 16, "accumulate": 2, "checkpoint_every": 2, "log_every": 1}
        tree[part]["train"]["optimizer"] |= {"warmup_steps": 0}
    run = make_run(read(tree), "test")
    for name in ("seed", "m2/pairs", "m0/train", "m1/train"):
        run.ledger.run(name, lambda: Outcome({}, None), config={}, inputs=(), outputs=())
    return run


def random_model(run, name):
    """Keeps random weights as the model `name`."""
    config = run.settings.model.llama
    places = rules.model_shardings(run.train_mesh, rules.TRAIN, llama.abstract(config))
    run.keep(name, jax.jit(lambda: llama.init(config, jax.random.key(0)), out_shardings=places)())


def pairs(count):
    """Whose answers have 1 to 18 words."""
    rng = np.random.default_rng(0)
    answer = lambda: " , ".join(rng.choice(FRUIT, rng.integers(1, 10)))
    return [
        PreferencePair(
            id=str(i),
            prompt="list three fruits .",
            chosen=answer(),
            rejected=answer(),
            chosen_finished=i % 3 > 0,
            rejected_finished=i % 5 > 0,
            chosen_score=4,
            rejected_score=1,
        )
        for i in range(count)
    ]


def referenced(run, count):
    """The reference's pairs, and the first loss of a DPO from the same weights."""
    jsonl.write(jsonl.shard(run.workdir / "m2" / "pairs", 0), pairs(count))
    random_model(run, "m1")
    training.reference_logprobs(run, "m2", "m1")
    training.train_on_preferences(run, "m2", "m1")
    first = json.loads((run.workdir / "m2" / "metrics.jsonl").read_text().splitlines()[0])
    return jsonl.read(run.workdir / "m2" / "reference", ReferencePair), first


@pytest.fixture(scope="module")
def padded(tmp_path_factory):
    return referenced(open_run(tmp_path_factory.mktemp("padded")), 37)


def test_a_round_whose_answers_have_rows_of_their_own_starts_at_log_2(padded):
    assert abs(padded[1]["loss"] - math.log(2)) < 1e-6


@pytest.mark.parametrize("shard", [256, 10], ids=["one shard", "shards"])
@pytest.mark.parametrize("worth", [2.0, 0.0], ids=["prompts shared", "prompts apart"])
def test_packing_changes_neither_the_reference_nor_where_a_round_starts(padded, tmp_path, monkeypatch, shard, worth):
    made = []
    monkeypatch.setattr(batches, "_WORTH", worth)
    monkeypatch.setattr(hosts, "spread", lambda batch, place: made.append(batch) or spread(batch, place))
    found, first = referenced(open_run(tmp_path, packed=True, shard_prompts=shard, reference_batch=8), 37)
    of_training = [batch for batch in made if isinstance(batch, PairBatch)]
    # The check of the first step has a row for each document.
    of_reference = [batch for batch in made if isinstance(batch, TokenBatch) and batch.segments_BT is not None]
    assert {batch.folding is not None for batch in of_reference} == {worth > 0}
    assert {batch.rows.folding is not None for batch in of_training} == {worth > 0}
    assert [pair.id for pair in found] == [pair.id for pair in padded[0]]
    for field in ("chosen_logprob", "rejected_logprob"):
        one, other = ([getattr(pair, field) for pair in all_pairs] for all_pairs in (found, padded[0]))
        np.testing.assert_allclose(one, other, rtol=1e-5)
        assert len(set(one)) > 30
    assert abs(first["loss"] - math.log(2)) < 1e-6
    np.testing.assert_allclose(first["chosen_drift"], 0, atol=1e-5)


def test_the_reference_of_a_cut_answer_is_without_the_end_token(padded, tmp_path):
    run = open_run(tmp_path, packed=False)
    random_model(run, "m1")
    model = run.to_train("m1")
    end = run.tokenizer.eos
    for pair in padded[0][:6]:
        for side in ("chosen", "rejected"):
            text, finished = getattr(pair, side), getattr(pair, f"{side}_finished")
            row = training.example_row(run, pair.prompt, text, finished)
            assert (row.ids[-1] == end) == finished
            ids = np.asarray(row.ids)
            at = np.arange(len(ids) - 1)[None]
            hidden, _ = model(jnp.asarray(ids[None, :-1]), jnp.asarray(at), segments_BT=None, cache=None, dropout=None)
            logprobs = jax.nn.log_softmax(hidden[0] @ model.head(), axis=-1)
            own = range(row.loss_from, len(ids))
            wanted = sum(float(logprobs[i - 1, ids[i]]) for i in own)
            np.testing.assert_allclose(getattr(pair, f"{side}_logprob"), wanted, rtol=1e-4)


def test_fewer_examples_than_a_batch_come_several_times(tmp_path):
    run = open_run(tmp_path, packed=True)
    jsonl.write(
        run.workdir / "ift.jsonl",
        [Example(id=str(i), prompt="what ?", response=FRUIT[i], finished=True) for i in range(3)],
    )
    random_model(run, "m0")
    training.fine_tune(run, "sft", ["ift.jsonl"], ["seed", "m0/train"])
    counts = run.ledger.entry("sft/train")["counts"]
    assert abs(counts.pop("first_loss") - counts.pop("expected_first_loss")) < 1e-5
    assert counts == {"examples": 3, "too_many_tokens": 0}
    assert len((run.workdir / "sft" / "metrics.jsonl").read_text().splitlines()) == 2
