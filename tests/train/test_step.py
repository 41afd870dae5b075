"""One update is the same however it is cut into microbatches and over devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from srlm_jax.data.batches import PairBatch, Row, token_batch
from srlm_jax.parallel import rules
from srlm_jax.parallel.mesh import MeshShape, train_mesh
from srlm_jax.train.objectives import DpoObjective, SftObjective
from srlm_jax.train.optimizer import OptimizerConfig
from srlm_jax.train.step import make_train_step

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


def update(model, objective, accumulate, batch):
    """Weights and metrics after one step from a copy of `model`."""
    train_step, tx = make_train_step(objective, OPTIMIZER, 10, accumulate)
    model = jax.tree.map(jnp.copy, model)
    model, _, metrics = train_step(model, jax.jit(tx.init)(model), batch, jax.random.key(0))
    return model, metrics


@pytest.fixture(scope="module")
def whole(tiny_llama):
    """The updates without cutting, by objective."""
    return {objective: update(tiny_llama, objective, 1, batch) for objective, batch in BATCHES.items()}


def assert_same(found, wanted):
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("objective", [SFT, DPO], ids=["sft", "dpo"])
def test_an_update_moves_every_weight(tiny_llama, whole, objective):
    model, _ = whole[objective]
    for before, after in zip(jax.tree.leaves(tiny_llama), jax.tree.leaves(model), strict=True):
        assert np.abs(before - after).max() > 1e-3


@pytest.mark.parametrize("accumulate", [2, 8])
@pytest.mark.parametrize("objective", [SFT, DPO], ids=["sft", "dpo"])
def test_microbatches_of_unequal_token_counts_give_the_same_update(tiny_llama, whole, objective, accumulate):
    # Microbatch i of 2 holds rows i, i + 2, ...: 16 and 20 tokens. Averaging the means would weigh them equally.
    assert_same(update(tiny_llama, objective, accumulate, BATCHES[objective]), whole[objective])


def test_the_loss_is_the_mean_over_tokens_before_the_update(tiny_llama, whole):
    sums = SFT(tiny_llama, BATCHES[SFT], jax.random.key(0))
    assert sums.count == sum(range(1, 9))
    np.testing.assert_allclose(whole[SFT][1]["loss"], sums.loss / sums.count, rtol=1e-5)


def test_every_microbatch_draws_its_own_dropout(tiny_llama):
    dropping, key = SftObjective(dropout=0.2, logprob_chunk=4), jax.random.key(0)
    same_row = jax.tree.map(lambda x: jnp.repeat(x[7:], 2, axis=0), BATCHES[SFT])
    train_step, tx = make_train_step(dropping, OPTIMIZER, 10, 2)
    model = jax.tree.map(jnp.copy, tiny_llama)
    _, _, metrics = train_step(model, jax.jit(tx.init)(model), same_row, key)
    one_row, objective = jax.tree.map(lambda x: x[:1], same_row), jax.jit(dropping)
    losses = [float(objective(tiny_llama, one_row, jax.random.fold_in(key, i)).loss) / 8 for i in range(2)]
    np.testing.assert_allclose(metrics["loss"], np.mean(losses), rtol=1e-5)
    assert abs(losses[0] - losses[1]) > 1e-2


@pytest.mark.parametrize("objective", [SFT, DPO], ids=["sft", "dpo"])
def test_weights_and_rows_split_over_8_devices_give_the_same_update(tiny_llama, whole, objective):
    mesh = train_mesh(MeshShape(data=2, fsdp=2, tensor=2))
    model = jax.device_put(tiny_llama, rules.model_shardings(mesh, rules.TRAIN, tiny_llama))
    batch = jax.device_put(BATCHES[objective], rules.sharding(mesh, rules.TRAIN, ("batch",)))
    assert model.blocks.gate[...].sharding.shard_shape((2, 16, 24)) == (2, 8, 12)
    found, metrics = update(model, objective, 2, batch)
    assert found.blocks.gate[...].sharding.is_equivalent_to(model.blocks.gate[...].sharding, 3)
    assert_same((found, metrics), whole[objective])
