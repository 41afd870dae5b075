"""One update is the same however it is cut into microbatches and over devices."""

import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from step_inputs import BATCHES, DPO, OPTIMIZER, PAIRS, SFT, folded, packed

from srlm_jax.data.batches import PairBatch, TokenBatch
from srlm_jax.parallel import rules
from srlm_jax.parallel.mesh import MeshShape, train_mesh
from srlm_jax.train.objectives import DpoObjective, SftObjective, response_logprobs
from srlm_jax.train.optimizer import make_optimizer
from srlm_jax.train.step import init_optimizer, make_train_step


def update(model, objective, accumulate, batch):
    """Weights and metrics after one step from a copy of `model`."""
    train_step, tx = make_train_step(objective, OPTIMIZER, 10, accumulate)
    model = jax.tree.map(jnp.copy, model)
    model, _, metrics = train_step(model, jax.jit(tx.init)(model), None, batch, jax.random.key(0))
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
    _, _, metrics = train_step(model, jax.jit(tx.init)(model), None, same_row, key)
    one_row, objective = jax.tree.map(lambda x: x[:1], same_row), jax.jit(dropping)
    losses = [float(objective(tiny_llama, one_row, jax.random.fold_in(key, i)).loss) / 8 for i in range(2)]
    np.testing.assert_allclose(metrics["loss"], np.mean(losses), rtol=1e-5)
    assert abs(losses[0] - losses[1]) > 1e-2


@pytest.mark.parametrize("objective", [SFT, DPO], ids=["sft", "dpo"])
def test_weights_wider_than_their_products_get_the_gradients_that_are_taken_of_themselves(make_llama, objective):
    model = make_llama(compute_dtype="bfloat16")
    assert {str(x.dtype) for x in jax.tree.leaves(model)} == {"float32"}
    batch = BATCHES[objective]

    def loss(model):
        sums = objective(model, batch, jax.random.key(0))
        return sums.loss, sums.count

    grads, count = jax.jit(jax.grad(loss, has_aux=True))(model)
    grads = jax.tree.map(lambda g: g / count, grads)
    tx = make_optimizer(OPTIMIZER, 10)
    updates, _ = tx.update(grads, tx.init(model), model)
    found, metrics = update(model, objective, 1, batch)
    np.testing.assert_allclose(metrics["gradient_norm"], optax.tree.norm(grads), rtol=1e-5)
    assert_same(found, optax.apply_updates(model, updates))


# The same on many devices.


@pytest.fixture(scope="module")
def divisible_llama(make_llama):
    """A Llama whose every axis eight devices divide."""
    return make_llama(N=8, K=8, L=1)


@jax.jit
def losses_and_gradients(model, sft, dpo):
    """Of both objectives, and the log-probabilities of the documents: one program for each way to split devices."""
    loss = lambda model, objective, batch: objective(model, batch, jax.random.key(0)).loss
    found = [jax.value_and_grad(loss)(model, objective, batch) for objective, batch in ((SFT, sft), (DPO, dpo))]
    return *found, response_logprobs(model, dpo.rows, 16, 4)


@pytest.fixture(scope="module")
def on_one_device(divisible_llama):
    return losses_and_gradients(divisible_llama, BATCHES[SFT], BATCHES[DPO])


@pytest.fixture(scope="module", params=[packed, folded], ids=["packed", "folded"])
def packing(request):
    return request.param


@pytest.fixture(scope="module")
def packed_on_one_device(divisible_llama, packing):
    return losses_and_gradients(divisible_llama, BATCHES[SFT], packing(PAIRS))


def shapes(devices):
    """Every data x fsdp x tensor that makes so many devices."""
    sizes = [n for n in range(1, devices + 1) if devices % n == 0]
    return [shape for shape in itertools.product(sizes, repeat=3) if math.prod(shape) == devices]


@pytest.mark.parametrize("shape", shapes(8), ids=str)
def test_losses_gradients_and_log_probabilities_are_the_same_on_8_devices_split_any_way(
    divisible_llama, on_one_device, shape
):
    data, fsdp, tensor = shape
    mesh = train_mesh(MeshShape(data=data, fsdp=fsdp, tensor=tensor))
    model = jax.device_put(divisible_llama, rules.model_shardings(mesh, rules.TRAIN, divisible_llama))
    assert model.blocks.gate[...].sharding.shard_shape((1, 16, 24)) == (1, 16 // fsdp, 24 // tensor)
    sharding = rules.sharding(mesh, rules.TRAIN, ("batch",))
    sft, dpo = (jax.device_put(BATCHES[objective], sharding) for objective in (SFT, DPO))
    assert sft.tokens_BT.sharding.shard_shape((8, 12)) == (8 // (data * fsdp), 12)
    assert_same(losses_and_gradients(model, sft, dpo), on_one_device)


def test_packed_pairs_have_the_losses_gradients_and_log_probabilities_of_rows_of_their_own(
    on_one_device, packed_on_one_device
):
    assert_same(packed_on_one_device, on_one_device)


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2), (1, 4, 2)], ids=str)
def test_rows_of_packed_pairs_may_lie_on_any_device(divisible_llama, packed_on_one_device, packing, shape):
    """The answers of most pairs are then on devices apart, but for those that share their prompt."""
    mesh = train_mesh(MeshShape(data=shape[0], fsdp=shape[1], tensor=shape[2]))
    model = jax.device_put(divisible_llama, rules.model_shardings(mesh, rules.TRAIN, divisible_llama))
    sft, dpo = jax.device_put((BATCHES[SFT], packing(PAIRS)), rules.sharding(mesh, rules.TRAIN, ("batch",)))
    with jax.set_mesh(mesh):
        assert_same(losses_and_gradients(model, sft, dpo), packed_on_one_device)


@pytest.mark.parametrize("objective", [SFT, DPO], ids=["sft", "dpo"])
def test_weights_and_rows_split_over_8_devices_give_the_same_update(tiny_llama, whole, objective):
    mesh = train_mesh(MeshShape(data=2, fsdp=2, tensor=2))
    model = jax.device_put(tiny_llama, rules.model_shardings(mesh, rules.TRAIN, tiny_llama))
    batch = jax.device_put(BATCHES[objective], rules.sharding(mesh, rules.TRAIN, ("batch",)))
    assert model.blocks.gate[...].sharding.shard_shape((2, 16, 24)) == (2, 8, 12)
    found, metrics = update(model, objective, 2, batch)
    assert found.blocks.gate[...].sharding.is_equivalent_to(model.blocks.gate[...].sharding, 3)
    assert_same((found, metrics), whole[objective])


def test_an_optimizers_moments_live_where_their_weights_do(divisible_llama, caplog):
    # Otherwise one device would hold all of them until the first step is done, and the second be compiled anew.
    mesh = train_mesh(MeshShape(data=2, fsdp=2, tensor=2))
    model = jax.device_put(divisible_llama, rules.model_shardings(mesh, rules.TRAIN, divisible_llama))
    train_step, tx = make_train_step(SFT, OPTIMIZER, 10, 1)
    batch = jax.device_put(BATCHES[SFT], rules.sharding(mesh, rules.TRAIN, ("batch",)))
    state = init_optimizer(tx, model, mesh)

    def assert_in_place(trained, state):
        wanted = jax.tree.leaves(rules.model_shardings(mesh, rules.TRAIN, (trained, state)))
        for leaf, place in zip(jax.tree.leaves((trained, state)), wanted, strict=True):
            assert leaf.sharding.is_equivalent_to(place, leaf.ndim)

    assert_in_place(model, state)
    held = sum(leaf.addressable_shards[0].data.size for leaf in jax.tree.leaves(state))
    assert held < 0.6 * sum(leaf.size for leaf in jax.tree.leaves(model))  # of two moments a fourth, but for the norms
    model = jax.tree.map(jnp.copy, model)
    with jax.set_mesh(mesh), jax.log_compiles():
        for _ in range(2):
            model, state, _ = train_step(model, state, None, batch, jax.random.key(0))
            assert_in_place(model, state)
    assert caplog.text.count("Finished XLA compilation of jit(train_step)") == 1


# What a step holds.


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("objective", [SFT, DPO], ids=["sft", "dpo"])
def test_a_step_writes_over_one_set_of_weights_and_moments_and_is_given_no_other(tiny_llama, objective, accumulate):
    """So no second model is in a step of DPO: the reference is two numbers a pair."""
    train_step, tx = make_train_step(objective, OPTIMIZER, 10, accumulate)
    state, batch = jax.eval_shape(tx.init, tiny_llama), BATCHES[objective]
    said = train_step.lower(tiny_llama, state, None, batch, jax.random.key(0)).compile().memory_analysis()
    nbytes = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
    held, given = nbytes((tiny_llama, state)), nbytes(batch)
    assert said.alias_size_in_bytes >= 0.99 * held
    assert held <= said.argument_size_in_bytes <= held + given + 100


def test_log_probabilities_take_a_sixteenth_of_the_memory_of_all_logits(make_llama):
    """32,000 tokens to choose from, 64 rows of 64 positions: all logits are half a gigabyte."""
    model = make_llama(V=32_000, L=1, remat="full")
    train_step, tx = make_train_step(DpoObjective(beta=0.1, logprob_chunk=1), OPTIMIZER, 10, 1)
    batch = PairBatch(TokenBatch(*(jnp.zeros((64, 64), t) for t in "iifii")), jnp.zeros(32), jnp.zeros(32))
    compiled = train_step.lower(model, jax.eval_shape(tx.init, model), None, batch, jax.random.key(0)).compile()
    logits = 64 * 64 * 32_000 * 4
    weights = sum(x.nbytes for x in jax.tree.leaves(model))
    # Gradients take as much as weights, and are clipped into as much again.
    assert compiled.memory_analysis().temp_size_in_bytes - 2 * weights <= logits / 16
    sizes = re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", compiled.as_text())
    assert max(math.prod(map(int, size.split(","))) for size in sizes) <= logits / 4 / 16
