"""What tests of a training step are made with: an optimizer, the objectives, and a batch for each."""

import jax
import jax.numpy as jnp
import numpy as np

from srlm_jax.data.batches import PairBatch, Row, token_batch
from srlm_jax.train.objectives import DpoObjective, SftObjective
from srlm_jax.train.optimizer import OptimizerConfig

# A large eps makes AdamW's first step nearly proportional to the gradient, so that an error in it cannot hide.
OPTIMIZER = OptimizerConfig(
    learning_rate=0.1, end_learning_rate=0.01, warmup_steps=0,
    b1=0.9, b2=0.99, eps=1e-2, weight_decay=0.0, clip_norm=1.0,
)  # fmt: skip
SFT = SftObjective(dropout=0.0, logprob_chunk=4)
DPO = DpoObjective(beta=0.1, dropout=0.0, logprob_chunk=4)


def rows(seed):
    """Eight documents with answers of 1 to 8 tokens."""
    rng = np.random.default_rng(seed)
    return token_batch([Row(tuple(rng.integers(1, 40, 3 + n).tolist()), 3) for n in range(1, 9)], 12)


BATCHES = {
    SFT: jax.tree.map(jnp.asarray, rows(0)),
    DPO: jax.tree.map(jnp.asarray, PairBatch(rows(0), rows(1), -10.0 * np.ones(8), -12.0 * np.ones(8))),
}
