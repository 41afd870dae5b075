"""What tests of a training step are made with: an optimizer, the objectives, and a batch for each."""

import jax
import jax.numpy as jnp
import numpy as np

from srlm_jax.data.batches import PairRow, Row, folded_batch, packed_batch, pair_batch, token_batch
from srlm_jax.data.packing import Shape
from srlm_jax.train.objectives import DpoObjective, SftObjective
from srlm_jax.train.optimizer import OptimizerConfig

# A large eps makes AdamW's first step nearly proportional to the gradient, so that an error in it cannot hide.
OPTIMIZER = OptimizerConfig(
    learning_rate=0.1, end_learning_rate=0.01, warmup_steps=0,
    b1=0.9, b2=0.99, eps=1e-2, weight_decay=0.0, clip_norm=1.0,
)  # fmt: skip
SFT = SftObjective(dropout=0.0, logprob_chunk=4)
DPO = DpoObjective(beta=0.1, logprob_chunk=4)


def rows(seed):
    """Eight documents with answers of 1 to 8 tokens."""
    rng = np.random.default_rng(seed)
    return [Row(tuple(rng.integers(1, 40, 3 + n).tolist()), 3) for n in range(1, 9)]


def paired(chosen, rejected):
    """A pair whose answers have the prompt of the first."""
    return PairRow(chosen, Row(chosen.ids[:3] + rejected.ids[3:], 3), -10.0, -12.0)


PAIRS = [paired(chosen, rejected) for chosen, rejected in zip(rows(0), rows(1), strict=True)]
BATCHES = {
    SFT: jax.tree.map(jnp.asarray, token_batch(rows(0), 12)),
    DPO: jax.tree.map(jnp.asarray, pair_batch(PAIRS, 12)),
}


def packed(pairs):
    """Pairs whose answers share 8 rows, in no order."""
    documents = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    groups = [[15 - i, i] for i in range(8)]
    batch = pair_batch(pairs, 12)
    return jax.tree.map(jnp.asarray, batch._replace(rows=packed_batch(documents, groups, Shape(8, 24))))


def folded(pairs):
    """Pairs whose answers share their prompt, each in a row of its own or two in one, in no order."""
    assert all(pair.shared == 2 for pair in pairs)
    groups = [[0, 3], [5], [], [7], [1, 2], [4], [6], []]
    batch = pair_batch(pairs, 12)
    return jax.tree.map(jnp.asarray, batch._replace(rows=folded_batch(pairs, groups, Shape(8, 20), 24)))
