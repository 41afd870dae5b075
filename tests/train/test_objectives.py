"""The two objectives on a small model: what they count, and where they stand at the reference."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from srlm_jax.data.batches import PairBatch, Row, token_batch
from srlm_jax.train.objectives import DpoObjective, SftObjective, response_logprobs

SFT = SftObjective(dropout=0.0, logprob_chunk=4)
DPO = DpoObjective(beta=0.1, dropout=0.0, logprob_chunk=4)


def batch(*rows):
    return jax.tree.map(jnp.asarray, token_batch([Row(ids, loss_from) for ids, loss_from in rows], 8))


CHOSEN = batch(((1, 5, 6, 7, 2), 3), ((1, 9, 8, 2), 2))
REJECTED = batch(((1, 5, 6, 3, 3, 3, 2), 3), ((1, 9, 2), 2))


@pytest.fixture(scope="module")
def logprobs(tiny_llama):
    """The log-probabilities of the answers above, token by token through the plain definition."""

    @jax.jit
    def one(tokens_BT, targets_BT, mask_BT):
        positions = jnp.broadcast_to(jnp.arange(8), tokens_BT.shape)
        hidden, _ = tiny_llama(tokens_BT, positions, segments_BT=None, cache=None, dropout=None)
        table = jax.nn.log_softmax(hidden @ tiny_llama.head(), axis=-1)
        return (jnp.take_along_axis(table, targets_BT[..., None], axis=-1)[..., 0] * mask_BT).sum(axis=-1)

    return tuple(one(rows.tokens_BT, rows.targets_BT, rows.mask_BT) for rows in (CHOSEN, REJECTED))


def test_response_logprobs_are_sums_over_the_answer(tiny_llama, logprobs):
    np.testing.assert_allclose(response_logprobs(tiny_llama, CHOSEN, 4, None), logprobs[0], rtol=1e-5)
    np.testing.assert_allclose(response_logprobs(tiny_llama, REJECTED, 4, None), logprobs[1], rtol=1e-5)


def test_sft_sums_over_answers_and_counts_their_tokens(tiny_llama, logprobs):
    sums = SFT(tiny_llama, CHOSEN, jax.random.key(0))
    np.testing.assert_allclose(sums.loss, -logprobs[0].sum(), rtol=1e-5)
    assert sums.count == 2 + 2  # 7 and the end token; 8 and the end token


def test_dpo_at_the_reference_is_log_2_a_pair(tiny_llama, logprobs):
    sums = DPO(tiny_llama, PairBatch(CHOSEN, REJECTED, *logprobs), jax.random.key(0))
    assert sums.count == 2
    np.testing.assert_allclose(sums.loss / 2, math.log(2), rtol=1e-5)
    for name in ("reward_margin", "chosen_drift", "rejected_drift", "kl"):
        np.testing.assert_allclose(sums.metrics[name], 0.0, atol=1e-4, err_msg=name)


def test_dpo_metrics_by_hand(tiny_llama, logprobs):
    """Against a reference that gave the first pair's chosen 3 nats less and the second pair's rejected 1 less."""
    chosen, rejected = logprobs
    reference = (chosen - jnp.array([3.0, 0.0]), rejected - jnp.array([0.0, 1.0]))
    sums = DPO(tiny_llama, PairBatch(CHOSEN, REJECTED, *reference), jax.random.key(0))
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


@pytest.mark.parametrize("objective", [SFT, DPO], ids=["sft", "dpo"])
def test_dropout_acts_where_it_is_set(tiny_llama, logprobs, objective):
    data = CHOSEN if objective is SFT else PairBatch(CHOSEN, REJECTED, *logprobs)
    dropping = jax.jit(dataclasses.replace(objective, dropout=0.1))
    losses = [float(dropping(tiny_llama, data, jax.random.key(seed)).loss) for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]
    plain = [float(objective(tiny_llama, data, jax.random.key(seed)).loss) for seed in (0, 1)]
    assert plain[0] == plain[1]
