"""What a training step makes smaller: supervised fine-tuning and DPO, each a function of a model and a batch.

An objective returns sums, not means, and by what count they are to be divided, so that gradient accumulation over
microbatches gives exactly the gradient of the whole batch.

Axes: B rows, T tokens, P preference pairs, N documents.
"""

import dataclasses
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from srlm_jax.data.batches import PairBatch, TokenBatch
from srlm_jax.model.llama import Llama
from srlm_jax.model.ops import Dropout
from srlm_jax.train import losses

TIE = 1e-3  # nats; a smaller margin is rounding, as all are in the first step, and counts half in reward_accuracy


class Sums(NamedTuple):
    """Totals over a microbatch: divide `loss` and `metrics` by `count`."""

    loss: jax.Array
    count: jax.Array
    metrics: dict[str, jax.Array]


class Objective(Protocol):
    """Hashable, so that one compiled step serves every training that uses it."""

    def __call__(self, model: Llama, batch: TokenBatch | PairBatch, key: jax.Array) -> Sums: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class SftObjective:
    """Negative log-likelihood of the target tokens (paper section 2.4)."""

    dropout: float  # of the attention probabilities; see `Llama`
    logprob_chunk: int  # positions of a row whose logits are held at once

    def __call__(self, model: Llama, batch: TokenBatch, key: jax.Array) -> Sums:
        hidden_BTD, _ = model(
            batch.tokens_BT,
            batch.positions_BT,
            segments_BT=batch.documents,
            cache=None,
            dropout=Dropout(self.dropout, key) if self.dropout > 0 else None,
        )
        logprobs_BT = losses.token_logprobs(
            hidden_BTD, model.head(), batch.targets_BT, batch.mask_BT, self.logprob_chunk
        )
        return Sums(-jnp.sum(logprobs_BT * batch.mask_BT), jnp.sum(batch.mask_BT), {})


@dataclasses.dataclass(frozen=True, kw_only=True)
class DpoObjective:
    """DPO against stored reference log-probabilities (paper section 2.4).

    There is no dropout: the loss compares the policy with a reference that was computed without (TRL and the code of
    the DPO paper switch it off as well).
    """

    beta: float
    logprob_chunk: int

    def __call__(self, model: Llama, batch: PairBatch, key: jax.Array) -> Sums:
        P = batch.ref_chosen_P.shape[0]
        logprobs_N = response_logprobs(model, batch.rows, 2 * P, self.logprob_chunk)
        chosen_P, rejected_P = jnp.split(logprobs_N, 2)
        loss_P = losses.dpo_loss(chosen_P, rejected_P, batch.ref_chosen_P, batch.ref_rejected_P, self.beta)
        margin_P = losses.dpo_margin(chosen_P, rejected_P, batch.ref_chosen_P, batch.ref_rejected_P)
        # KL(policy || reference) is unknown without samples of the policy; over both answers of the pairs, which the
        # reference itself wrote, exp(d) - 1 - d with d = log(policy / reference) estimates KL(reference || policy):
        # it is never negative and its mean is exact where the pairs are an unbiased sample (Schulman 2020, "k3").
        drift_N = jnp.concatenate([chosen_P - batch.ref_chosen_P, rejected_P - batch.ref_rejected_P])
        kl_N = jnp.expm1(jnp.minimum(drift_N, 20.0)) - drift_N
        metrics = {
            "reward_margin": jnp.sum(self.beta * margin_P),
            "reward_accuracy": jnp.sum(jnp.where(jnp.abs(margin_P) < TIE, 0.5, margin_P > 0)),
            "chosen_logprob": jnp.sum(chosen_P),
            "rejected_logprob": jnp.sum(rejected_P),
            "chosen_drift": jnp.sum(chosen_P - batch.ref_chosen_P),
            "rejected_drift": jnp.sum(rejected_P - batch.ref_rejected_P),
            "kl": jnp.sum(kl_N) / 2,
        }
        return Sums(jnp.sum(loss_P), jnp.float32(loss_P.size), metrics)


def response_logprobs(model: Llama, batch: TokenBatch, documents: int, logprob_chunk: int) -> jax.Array:
    """Log-probability of each document's masked-in tokens, float32 [documents], of which there are as many as rows
    where the batch is not packed."""
    hidden_BTD, _ = model(batch.tokens_BT, batch.positions_BT, segments_BT=batch.documents, cache=None, dropout=None)
    if batch.segments_BT is None:
        assert documents == batch.tokens_BT.shape[0]
        return losses.sequence_logprobs(hidden_BTD, model.head(), batch.targets_BT, batch.mask_BT, logprob_chunk)
    logprobs_BT = losses.token_logprobs(hidden_BTD, model.head(), batch.targets_BT, batch.mask_BT, logprob_chunk)
    return losses.document_logprobs(logprobs_BT, batch.mask_BT, batch.segments_BT, documents)


compiled_logprobs = jax.jit(response_logprobs, static_argnames=("documents", "logprob_chunk"))
