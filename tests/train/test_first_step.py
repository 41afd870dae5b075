"""The first step of a training is that of the model it starts from, or the training stops and says what differs."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from step_inputs import DPO, PAIRS, SFT, folded, packed, rows

from srlm_jax.data import batches
from srlm_jax.data.batches import PairRow, padded_batches, padded_pairs
from srlm_jax.data.packing import Packing
from srlm_jax.model.lora import LoraConfig
from srlm_jax.train import first_step, loop
from srlm_jax.train.first_step import BadFirstStep, FirstStep
from srlm_jax.train.loop import Diverged, TrainConfig, train
from srlm_jax.train.optimizer import OptimizerConfig

OPTIMIZER = OptimizerConfig(
    learning_rate=1e-2, end_learning_rate=1e-3, warmup_steps=0,
    b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.0, clip_norm=1.0,
)  # fmt: skip
CONFIG = TrainConfig(
    steps=2, batch_size=4, accumulate=2, log_every=1, checkpoint_every=1, first_loss_tolerance=0.02, optimizer=OPTIMIZER
)
LORA = LoraConfig(rank=2, alpha=4.0)


class Killed(BaseException):
    """Stands for a signal: nothing in the package may catch it."""


@pytest.fixture(scope="module")
def mesh(one_device):
    return one_device("data", "fsdp", "tensor")


def with_reference(model, mesh):
    """The pairs with what the model gives their answers."""
    chosen, rejected = (
        first_step.row_logprobs(model, [getattr(pair, side) for pair in PAIRS], 16, 8, 4, mesh)
        for side in ("chosen", "rejected")
    )
    return [
        PairRow(pair.chosen, pair.rejected, float(c), float(r))
        for pair, c, r in zip(PAIRS, chosen, rejected, strict=True)
    ]


@pytest.fixture(scope="module")
def referenced(tiny_llama, mesh):
    return with_reference(tiny_llama, mesh)


@pytest.fixture
def run(tiny_llama, mesh, tmp_path):
    def run(objective, dataset, *, pairs=(), lora=None, model=tiny_llama, tolerance=0.02):
        names = {(pair.chosen.ids, pair.rejected.ids): f"pair-{i}" for i, pair in enumerate(pairs)}
        first = FirstStep(tolerance=tolerance, accumulate=CONFIG.accumulate, rows=2, logprob_chunk=4, names=names)
        train(
            jax.tree.map(jnp.copy, model), objective, dataset, config=CONFIG, lora=lora, mesh=mesh, seed=5,
            folder=epath.Path(tmp_path), title="m2: training", first=first,
        )  # fmt: skip
        found = json.loads((tmp_path / "first_step.json").read_text())
        line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
        assert found["loss"] == line["loss"]
        return found

    return run


def packing(lengths):
    return Packing(
        lengths=np.asarray(lengths), batch_size=4, accumulate=2, most=40, length_multiple=4, rows_multiple=1, seed=0
    )


def sft_batches(kind):
    documents = rows(0)
    if kind == "padded":
        return padded_batches(documents, 12, 4, seed=3)
    return batches.packed_batches(documents, packing([[row.length] for row in documents]), 2)


def dpo_batches(kind, pairs, monkeypatch):
    if kind == "padded":
        return padded_pairs(pairs, 12, 4, seed=3)
    monkeypatch.setattr(batches, "_WORTH", 2.0 if kind == "folded" else 0.0)
    return batches.packed_pairs(pairs, packing([[pair.chosen.length, pair.rejected.length] for pair in pairs]), 2)


@pytest.mark.parametrize(("kind", "lora"), [("padded", LORA), ("packed", None)], ids=["adapters", "packed"])
def test_the_first_loss_of_sft_is_that_of_a_plain_forward_pass(run, kind, lora):
    found = run(SFT, sft_batches(kind), lora=lora)
    assert abs(found["loss"] - found["expected"]) < 1e-5
    assert abs(found["expected"] - math.log(2)) > 0.1


@pytest.mark.parametrize(
    ("kind", "lora"),
    [("padded", None), ("packed", None), ("folded", LORA)],
    ids=["padded", "packed", "folded, adapters"],
)
def test_the_first_loss_of_dpo_is_log_2(run, referenced, kind, lora, monkeypatch):
    found = run(DPO, dpo_batches(kind, referenced, monkeypatch), pairs=referenced, lora=lora)
    assert found["expected"] == math.log(2)
    assert abs(found["loss"] - math.log(2)) < 1e-5


def test_computed_in_16_bits_the_first_losses_are_within_the_tolerance(run, make_llama, mesh, monkeypatch):
    model = make_llama(compute_dtype="bfloat16")
    pairs = with_reference(model, mesh)
    run(DPO, dpo_batches("folded", pairs, monkeypatch), pairs=pairs, model=model)


@pytest.mark.parametrize("kind", ["padded", "packed", "folded"])
@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_a_stored_log_probability_of_another_model_is_named(run, referenced, kind, side, monkeypatch, tmp_path):
    off = [dataclasses.replace(pair, **{f"ref_{side}": getattr(pair, f"ref_{side}") - 1}) for pair in referenced]
    with pytest.raises(BadFirstStep, match=rf"^pair 'pair-\d': the stored log-probability of its {side} answer of \d"):
        run(DPO, dpo_batches(kind, off, monkeypatch), pairs=off)
    assert not list((tmp_path / "train_state").glob("[0-9]*"))


def test_an_adapter_that_is_not_zero_is_named(run, monkeypatch):
    split = loop.split

    def other(*arguments):
        adapters, frozen = split(*arguments)
        return jax.tree.map(lambda x: x + 0.3, adapters), frozen

    monkeypatch.setattr(loop, "split", other)
    with pytest.raises(BadFirstStep, match=r"^m2: training: the first loss is .*: the adapter is not zero"):
        run(SFT, sft_batches("padded"), lora=LORA)


@dataclasses.dataclass(frozen=True)
class Mixed:
    """SFT in whose packed rows a document sees those before it."""

    def __call__(self, model, batch, key):
        return SFT(model, batch._replace(segments_BT=jnp.ones_like(batch.segments_BT)), key)


def test_packed_documents_that_see_one_another_are_named(run):
    with pytest.raises(BadFirstStep, match=r"packed rows give other log-probabilities"):
        run(Mixed(), sft_batches("packed"))


def test_what_dropout_changes_gives_a_warning(run, capsys):
    found = run(dataclasses.replace(SFT, dropout=0.5), sft_batches("packed"))
    assert abs(found["loss"] - found["expected"]) > 0.02
    said = f"dropout changes the first loss from {found['expected']:.3f} to {found['loss']:.3f}"
    assert f"warning: m2: training: {said}" in capsys.readouterr().err


def test_a_training_that_goes_on_is_not_checked_again(run):
    taken = iter(range(10))

    def pass_on(batch):
        if next(taken) == 1:
            raise Killed
        return batch

    with pytest.raises(Killed):
        run(SFT, sft_batches("packed").map(pass_on))
    run(SFT, sft_batches("packed"), tolerance=-1.0)  # which no first step would meet


@pytest.mark.parametrize("made", [packed, folded], ids=["packed", "folded"])
def test_unpacked_documents_are_those_that_were_packed(made):
    batch = jax.tree.map(np.asarray, made(PAIRS))
    assert batches.unpacked(batch.rows) == batches.documents(PAIRS)


def test_unpacked_rows_of_their_own_are_without_padding():
    documents = [*rows(0), batches.Row((3, 4, 5), 3)]
    found = batches.unpacked(batches.token_batch(documents, 12))
    assert found[:-1] == documents[:-1]
    assert found[-1].loss_from == len(found[-1].ids)  # nothing of it is learnt


def test_a_loss_that_is_no_number_is_not_the_first_steps_affair(run):
    @dataclasses.dataclass(frozen=True)
    class Nan:
        def __call__(self, model, batch, key):
            sums = SFT(model, batch, key)
            return sums._replace(loss=sums.loss * jnp.nan)

    with pytest.raises(Diverged, match="loss is nan at step 1 "):
        run(Nan(), sft_batches("padded"))
