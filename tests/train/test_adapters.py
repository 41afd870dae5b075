"""Training of adapters: the weights are frozen, and all else is as in a training of all weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from step_inputs import BATCHES, DPO, OPTIMIZER, SFT

from srlm_jax.data.batches import Row, padded_batches
from srlm_jax.model import lora
from srlm_jax.model.lora import LoraConfig
from srlm_jax.parallel import rules
from srlm_jax.parallel.mesh import MeshShape, train_mesh
from srlm_jax.storage.checkpoint import TrainCheckpoints, TrainState, model_hash, named_leaves
from srlm_jax.train.loop import TrainConfig, train
from srlm_jax.train.objectives import SftObjective
from srlm_jax.train.optimizer import make_optimizer
from srlm_jax.train.step import init_optimizer, make_train_step

LORA = LoraConfig(rank=2, alpha=4.0)


def on(model, shape):
    mesh = train_mesh(MeshShape(data=shape[0], fsdp=shape[1], tensor=shape[2]))
    return mesh, jax.device_put(model, rules.model_shardings(mesh, rules.TRAIN, model))


def two_updates(model, mesh, objective, accumulate):
    """The adapters of `model` after two steps (the first moves B alone, for it is zero), and the second's metrics."""
    train_step, tx = make_train_step(objective, OPTIMIZER, 10, accumulate)
    adapters, frozen = lora.split(model, LORA, jax.random.key(7), mesh)
    state = init_optimizer(tx, adapters, mesh)
    batch = jax.device_put(BATCHES[objective], rules.sharding(mesh, rules.TRAIN, ("batch",)))
    with jax.set_mesh(mesh):
        for _ in range(2):
            adapters, state, metrics = train_step(adapters, state, frozen, batch, jax.random.key(0))
    return adapters, metrics


@pytest.fixture(scope="module")
def divisible_llama(make_llama):
    return make_llama(N=8, K=4)


@pytest.fixture(scope="module")
def whole(divisible_llama, one_device):
    """The updates on one device without cutting, by objective."""
    mesh = one_device("data", "fsdp", "tensor")
    return {objective: two_updates(divisible_llama, mesh, objective, 1) for objective in BATCHES}


@pytest.mark.parametrize("objective", [SFT, DPO], ids=["sft", "dpo"])
def test_an_update_moves_every_adapter_and_no_weight(divisible_llama, whole, one_device, objective):
    before = model_hash(divisible_llama)
    start, _ = lora.split(divisible_llama, LORA, jax.random.key(7), one_device("data", "fsdp", "tensor"))
    for name, leaf in named_leaves(whole[objective][0]).items():
        assert np.abs(leaf - named_leaves(start)[name]).max() > 1e-4, name
    assert model_hash(divisible_llama) == before


@pytest.mark.parametrize(
    ("objective", "shape", "accumulate"),
    [(SFT, (2, 2, 2), 2), (SFT, (1, 2, 4), 1), (DPO, (1, 4, 2), 1)],
    ids=["sft, microbatches", "sft", "dpo"],
)
def test_8_devices_and_microbatches_give_the_same_update(divisible_llama, whole, objective, shape, accumulate):
    mesh, model = on(divisible_llama, shape)
    found = two_updates(model, mesh, objective, accumulate)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(whole[objective]), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
    _, fsdp, tensor = shape
    assert found[0].gate.a[...].sharding.shard_shape((2, 16, 2)) == (2, 16 // fsdp, 2)
    assert found[0].gate.b[...].sharding.shard_shape((2, 2, 24)) == (2, 2, 24 // tensor)


def test_a_merge_on_8_devices_leaves_weights_where_they_are(divisible_llama, whole):
    mesh, model = on(divisible_llama, (2, 2, 2))
    adapters, _ = whole[SFT]
    wanted = lora.merge(adapters, jax.tree.map(jnp.copy, divisible_llama))
    places = rules.model_shardings(mesh, rules.TRAIN, adapters)
    with jax.set_mesh(mesh):
        found = lora.merge(jax.device_put(adapters, places), model)
    wanted_places = jax.tree.leaves(rules.model_shardings(mesh, rules.TRAIN, divisible_llama))
    for one, other, place in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), wanted_places, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)
        assert one.sharding.is_equivalent_to(place, one.ndim)


def test_weight_decay_draws_adapters_to_zero(tiny_llama):
    adapters = jax.tree.map(jnp.ones_like, lora.init(tiny_llama, LORA, jax.random.key(0)))
    tx = make_optimizer(dataclasses.replace(OPTIMIZER, weight_decay=0.5), 10)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, adapters), tx.init(adapters), adapters)
    assert all((leaf == -0.1 * 0.5).all() for leaf in jax.tree.leaves(updates))


# The loop.

SLOW = dataclasses.replace(OPTIMIZER, learning_rate=3e-2, end_learning_rate=3e-3, eps=1e-8, weight_decay=0.1)
CONFIG = TrainConfig(
    steps=10, batch_size=4, accumulate=2, log_every=5, checkpoint_every=4, first_loss_tolerance=0.02, optimizer=SLOW
)


class Killed(BaseException):
    """Stands for a signal: nothing in the package may catch it."""


@pytest.fixture(scope="module")
def run(tiny_llama, one_device):
    """Trains adapters of a copy of the tiny Llama on a toy task, each number followed by the next."""

    def run(folder, *, killed_at=10**6, model=tiny_llama):
        taken = iter(range(10**6))

        def pass_on(batch):
            if next(taken) == killed_at:
                raise Killed
            return batch

        counting = [Row(tuple((start + i) % 30 for i in range(8)), 1) for start in range(30)]
        return train(
            jax.tree.map(jnp.copy, model),
            SftObjective(dropout=0.1, logprob_chunk=8),
            padded_batches(counting, 8, CONFIG.batch_size, seed=3).map(pass_on),
            config=CONFIG,
            lora=LORA,
            mesh=one_device("data", "fsdp", "tensor"),
            seed=5,
            folder=epath.Path(folder),
            title=folder.name,
            first=None,
        )

    return run


@pytest.fixture(scope="module")
def straight(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    return run(folder), folder


def test_a_training_gives_ordinary_weights_and_changes_projections_alone(straight, tiny_llama):
    trained, _ = straight
    found, before = named_leaves(trained), named_leaves(tiny_llama)
    assert jax.tree.structure(trained) == jax.tree.structure(tiny_llama)
    changed = {name for name, leaf in before.items() if (found[name] != leaf).any()}
    assert changed == {f"blocks/{name}" for name in ("q", "k", "v", "o", "gate", "up", "down")}


@pytest.mark.parametrize("kill", [2, 6])
def test_a_killed_training_ends_with_the_same_weights(run, straight, tmp_path, kill):
    with pytest.raises(Killed):
        run(tmp_path, killed_at=kill)
    assert model_hash(run(tmp_path)) == model_hash(straight[0])


def test_what_is_saved_of_a_training_is_the_adapters_and_two_moments(straight, tiny_llama):
    """Read as the adapters' train state it is complete, and its files hold nothing else."""
    adapters = lora.init(tiny_llama, LORA, jax.random.key(0))
    state = TrainState(adapters, make_optimizer(SLOW, CONFIG.steps).init(adapters))
    counting = [Row((1, 2), 1)] * 8
    with TrainCheckpoints(straight[1] / "train_state") as checkpoints:
        step, found = checkpoints.restore(state, iter(padded_batches(counting, 8, 4, seed=3)))
    assert step == 8 and model_hash(found.trainable) != model_hash(adapters)
    numbers = sum(leaf.size for leaf in jax.tree.leaves((found.trainable, found.opt_state)))
    of_adapters = sum(leaf.size for leaf in jax.tree.leaves(adapters))
    assert 3 * of_adapters <= numbers < 3 * of_adapters + 10
    assert numbers < sum(leaf.size for leaf in jax.tree.leaves(tiny_llama))


def test_weights_may_be_kept_in_half_the_bytes(run, make_llama, tmp_path):
    trained = run(tmp_path, model=make_llama(param_dtype="bfloat16"))
    assert {leaf.dtype for leaf in jax.tree.leaves(trained)} == {jnp.dtype("bfloat16")}
