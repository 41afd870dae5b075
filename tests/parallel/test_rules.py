"""Logical axes become mesh axes by one table, which knows them all."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from srlm_jax.model import llama
from srlm_jax.model.config import PRESETS
from srlm_jax.parallel import rules
from srlm_jax.parallel.mesh import MeshShape, sample_mesh, train_mesh

P = jax.sharding.PartitionSpec
MESH = MeshShape(data=2, fsdp=2, tensor=2)


def test_axes_are_placed_as_the_table_says():
    placed = rules.sharding(train_mesh(MESH), rules.TRAIN, ("layers", "embed", "heads", "head"))
    assert placed.spec == P(None, ("fsdp",), ("tensor",), None)
    assert rules.sharding(train_mesh(MESH), rules.TRAIN, ("batch", "norm")).spec == P(("data", "fsdp"), None)
    assert rules.sharding(sample_mesh(MESH), rules.SAMPLE, ("batch", "embed")).spec == P(("data",), None)


def test_an_unknown_axis_is_named():
    with pytest.raises(ValueError, match=r"unknown logical axis 'head_dim' in \('embed', 'head_dim'\): the table"):
        rules.sharding(train_mesh(MESH), rules.TRAIN, ("embed", "head_dim"))


def test_two_axes_that_claim_one_mesh_axis_are_named():
    with pytest.raises(ValueError, match=r"axes 'heads' and 'mlp' of .* both claim mesh axis 'tensor'"):
        rules.sharding(train_mesh(MESH), rules.TRAIN, ("heads", "mlp"))
    with pytest.raises(ValueError, match=r"axes 'batch' and 'embed' of .* both claim mesh axis 'fsdp'"):
        rules.sharding(train_mesh(MESH), rules.TRAIN, ("batch", "embed"))


@pytest.mark.parametrize(
    ("changes", "shape", "message"),
    [
        ({}, (1, 2, 4), "mesh.tensor is 4, which does not divide axis 'kv_heads' of size 2 .* can be 1 or 2 for"),
        ({"V": 39}, (1, 4, 2), "mesh.tensor is 2, which does not divide axis 'vocab' of size 39 .* can be 1 for"),
        (
            {"F": 25},
            (2, 2, 2),
            r"mesh.tensor is 2, .* 'mlp' of size 25 of weight .*down \(2, 25, 16\): of 8 devices, .* can be 1 for",
        ),
        ({"D": 12}, (1, 8, 1), "mesh.fsdp is 8, which does not divide axis 'embed' of size 12 .* can be 1 or 2 or 4"),
    ],
    ids=["KV heads", "an odd vocabulary", "MLP", "width"],
)
def test_an_axis_that_the_mesh_does_not_divide_is_told_with_the_sizes_that_work(tiny_config, changes, shape, message):
    odd = llama.abstract(dataclasses.replace(tiny_config, **changes))
    data, fsdp, tensor = shape
    mesh = train_mesh(MeshShape(data=data, fsdp=fsdp, tensor=tensor))
    with pytest.raises(ValueError, match=rf"^{message}"):
        rules.model_shardings(mesh, rules.TRAIN, odd)


def test_the_sizes_that_are_said_to_work_do_and_no_others(tiny_config):
    model, works = llama.abstract(tiny_config), []
    for size in (1, 2, 4, 8):
        mesh = train_mesh(MeshShape(data=8 // size, fsdp=1, tensor=size))
        try:
            rules.model_shardings(mesh, rules.TRAIN, model)
            works.append(size)
        except ValueError as error:
            refusal = str(error)
    assert f"can be {' or '.join(map(str, works))} for this model" in refusal


def test_every_weight_of_every_preset_has_a_place():
    for make in PRESETS.values():
        config = make()
        shape = MESH if config.K % MESH.tensor == 0 else dataclasses.replace(MESH, fsdp=4, tensor=1)
        for mesh, table in ((train_mesh(shape), rules.TRAIN), (sample_mesh(shape), rules.SAMPLE)):
            model = llama.abstract(config)
            placed = rules.model_shardings(mesh, table, model)
            assert len(jax.tree.leaves(placed)) == len(jax.tree.leaves(model))


def test_the_large_weights_are_split_over_fsdp_and_tensor_in_training_and_over_tensor_in_sampling(tiny_config):
    model = llama.abstract(tiny_config)
    for mesh, table, parts in ((train_mesh(MESH), rules.TRAIN, 4), (sample_mesh(MESH), rules.SAMPLE, 2)):
        placed = rules.model_shardings(mesh, table, model)
        for weight, to in zip(jax.tree.leaves(model), jax.tree.leaves(placed), strict=True):
            held = jax.numpy.zeros(to.shard_shape(weight.shape)).size
            assert weight.size // held == (parts if weight.size > 100 else 1)


def test_replicated_arrays_are_whole_everywhere():
    placed = rules.replicated(train_mesh(MESH))
    assert placed.shard_shape((3, 5)) == (3, 5)
    assert len(placed.device_set) == 8


def constrained_shape(shape, *axes):
    """What each device holds of an array that a compiled function made under these axes."""
    x = jax.jit(lambda: rules.constrain(jnp.zeros(shape), *axes))()
    return x.sharding.shard_shape(x.shape)


def test_results_are_split_by_rows_and_heads_and_never_by_width():
    with jax.set_mesh(train_mesh(MESH)):
        assert constrained_shape((8, 6, 16), "batch", "tokens", "embed") == (2, 6, 16)
        assert constrained_shape((8, 4, 6, 2), "batch", "heads", "tokens", "head") == (2, 2, 6, 2)
    with jax.set_mesh(sample_mesh(MESH)):
        assert constrained_shape((8, 1, 16), "batch", "tokens", "embed") == (2, 1, 16)


def test_an_axis_that_the_mesh_does_not_divide_stays_whole():
    with jax.set_mesh(train_mesh(MESH)):
        assert constrained_shape((6, 32), "batch", "vocab") == (6, 16)


def test_without_a_mesh_nothing_is_said():
    assert "sharding" not in str(jax.make_jaxpr(lambda x: rules.constrain(x, "batch", "embed"))(jnp.zeros((8, 4))))


def test_what_an_optimizer_keeps_lies_where_its_weights_do():
    mesh, shapes = train_mesh(MESH), llama.abstract(PRESETS["tiny"]())
    weights = rules.model_shardings(mesh, rules.TRAIN, shapes)
    kept = rules.model_shardings(mesh, rules.TRAIN, (shapes, jax.ShapeDtypeStruct((), jnp.int32)))
    assert jax.tree.leaves(kept[0]) == jax.tree.leaves(weights)
    assert kept[1] == rules.replicated(mesh)
