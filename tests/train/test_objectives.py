"""The two objectives on a small model: what they count, and where they stand at the reference."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from srlm_jax.data.batches import PairBatch, PairRow, Row, folded_batch, packed_batch, token_batch
from srlm_jax.data.packing import Shape
from srlm_jax.train.objectives import DpoObjective, SftObjective, response_logprobs

SFT = SftObjective(dropout=0.0, logprob_chunk=4)
DPO = DpoObjective(beta=0.1, logprob_chunk=4)


CHOSEN = [Row((1, 5, 6, 7, 2), 3), Row((1, 9, 8, 2), 2)]
REJECTED = [Row((1, 5, 6, 3, 3, 3, 2), 3), Row((1, 9, 2), 2)]
TWO = [PairRow(chosen, rejected, 0.0, 0.0) for chosen, rejected in zip(CHOSEN, REJECTED, strict=True)]


def batch(rows):
    return jax.tree.map(jnp.asarray, token_batch(rows, 8))


# Four documents of 4, 3, 6 and 2 positions: each in a row of its own, or the first and last pair of answers together.
LAYOUTS = {
    "rows of their own": batch(CHOSEN + REJECTED),
    "packed": jax.tree.map(jnp.asarray, packed_batch(CHOSEN + REJECTED, [[3, 2], [0, 1]], Shape(3, 10))),
    "prompts shared": jax.tree.map(jnp.asarray, folded_batch(TWO, [[1, 0]], Shape(2, 14), 18)),
}
layouts = pytest.mark.parametrize("layout", LAYOUTS)


def pairs(layout, logprobs):
    return PairBatch(LAYOUTS[layout], *logprobs)


@pytest.fixture(scope="module")
def logprobs(tiny_llama):
    """The log-probabilities of the answers above, token by token through the plain definition."""

    @jax.jit
    def one(tokens_BT, targets_BT, mask_BT):
        positions = jnp.broadcast_to(jnp.arange(8), tokens_BT.shape)
        hidden, _ = tiny_llama(tokens_BT, positions, segments_BT=None, cache=None, dropout=None)
        table = jax.nn.log_softmax(hidden @ tiny_llama.head(), axis=-1)
        return (jnp.take_along_axis(table, targets_BT[..., None], axis=-1)[..., 0] * mask_BT).sum(axis=-1)

    return tuple(one(rows.tokens_BT, rows.targets_BT, rows.mask_BT) for rows in map(batch, (CHOSEN, REJECTED)))


@layouts
def test_response_logprobs_are_sums_over_the_answer(tiny_llama, logprobs, layout):
    found = response_logprobs(tiny_llama, LAYOUTS[layout], 4, 4)
    np.testing.assert_allclose(found, jnp.concatenate(logprobs), rtol=1e-5)


def test_a_document_that_is_in_no_row_adds_nothing(tiny_llama, logprobs):
    found = response_logprobs(tiny_llama, LAYOUTS["packed"], 6, 4)
    np.testing.assert_allclose(found, [*jnp.concatenate(logprobs), 0, 0], rtol=1e-5)


def test_sft_sums_over_answers_and_counts_their_tokens(tiny_llama, logprobs):
    sums = SFT(tiny_llama, batch(CHOSEN), jax.random.key(0))
    np.testing.assert_allclose(sums.loss, -logprobs[0].sum(), rtol=1e-5)
    assert sums.count == 2 + 2  # 7 and the end token; 8 and the end token


@layouts
def test_dpo_at_the_reference_is_log_2_a_pair(tiny_llama, logprobs, layout):
    sums = DPO(tiny_llama, pairs(layout, logprobs), jax.random.key(0))
    assert sums.count == 2
    assert abs(sums.loss / 2 - math.log(2)) < 1e-6
    for name in ("reward_margin", "chosen_drift", "rejected_drift", "kl"):
        np.testing.assert_allclose(sums.metrics[name], 0.0, atol=1e-4, err_msg=name)
    assert sums.metrics["reward_accuracy"] == 1  # half of each pair, whichever way rounding falls


@layouts
def test_dpo_metrics_by_hand(tiny_llama, logprobs, layout):
    """Against a reference that gave the first pair's chosen 3 nats less and the second pair's rejected 1 less."""
    chosen, rejected = logprobs
    reference = (chosen - jnp.array([3.0, 0.0]), rejected - jnp.array([0.0, 1.0]))
    sums = DPO(tiny_llama, pairs(layout, reference), jax.random.key(0))
    wanted = {
        "reward_margin": 0.1 * (3 - 1),
        "reward_accuracy": 1.0,
        "chosen_logprob": float(chosen.sum()),
        "rejected_logprob": float(rejected.sum()),
        "chosen_drift": 3.0,
        "rejected_drift": 1.0,
        "kl": (math.exp(3) - 4 + math.exp(1) - 2) / 2,
    }
    assert sums.metrics.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(sums.metrics[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
    loss = math.log1p(math.exp(-0.3)) + math.log1p(math.exp(0.1))
    np.testing.assert_allclose(sums.loss, loss, rtol=1e-5)


def test_dropout_acts_where_it_is_set(tiny_llama):
    data = batch(CHOSEN)
    dropping = jax.jit(dataclasses.replace(SFT, dropout=0.1))
    losses = [float(dropping(tiny_llama, data, jax.random.key(seed)).loss) for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("objective", [SFT, DPO], ids=["sft", "dpo"])
def test_without_dropout_nothing_is_drawn(tiny_llama, logprobs, objective):
    data = batch(CHOSEN) if objective is SFT else pairs("packed", logprobs)
    plain = [float(objective(tiny_llama, data, jax.random.key(seed)).loss) for seed in (0, 1)]
    assert plain[0] == plain[1]


def test_dpo_has_no_dropout():
    assert {field.name for field in dataclasses.fields(DpoObjective)} == {"beta", "logprob_chunk"}
