"""Live weights from the training layout into the sampling layout."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from srlm_jax.model import llama
from srlm_jax.parallel import reshard as resharding
from srlm_jax.parallel import rules
from srlm_jax.parallel.mesh import MeshShape, sample_mesh, sample_mesh_over, train_mesh
from srlm_jax.parallel.reshard import reshard

SHAPES = [(1, 8, 1), (1, 4, 2), (2, 2, 2), (4, 1, 2), (8, 1, 1)]


def laid_out(model, shape):
    mesh = train_mesh(MeshShape(data=shape[0], fsdp=shape[1], tensor=shape[2]))
    return jax.device_put(model, rules.model_shardings(mesh, rules.TRAIN, model))


def wanted(config, mesh, dtype):
    return rules.placed(mesh, rules.SAMPLE, llama.abstract(dataclasses.replace(config, param_dtype=dtype)))


def to_sample(config, shape, dtype):
    return wanted(config, sample_mesh(MeshShape(data=shape[0], fsdp=shape[1], tensor=shape[2])), dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_weights_are_the_same_in_other_places(make_llama, shape, dtype):
    model = laid_out(make_llama(), shape)
    like = to_sample(model.config, shape, dtype)
    moved = reshard(model, like)
    assert jax.tree.structure(moved) == jax.tree.structure(like)
    for old, new, place in zip(*map(jax.tree.leaves, (model, moved, like)), strict=True):
        assert new.dtype == dtype
        assert new.sharding == place.sharding
        np.testing.assert_array_equal(new, old.astype(dtype))  # the old one is there still


def test_devices_may_stand_in_another_order(make_llama):
    model = laid_out(make_llama(), (1, 4, 2))
    mesh = sample_mesh_over(MeshShape(data=4, fsdp=1, tensor=2), jax.devices()[::-1])
    moved = reshard(model, wanted(model.config, mesh, "bfloat16"))
    assert moved.blocks.gate[...].sharding.mesh == mesh
    for old, new in zip(jax.tree.leaves(model), jax.tree.leaves(moved), strict=True):
        np.testing.assert_array_equal(new, old.astype("bfloat16"))


def test_what_is_in_its_place_is_not_copied(make_llama):
    model = laid_out(make_llama(), (8, 1, 1))
    moved = reshard(model, to_sample(model.config, (8, 1, 1), "float32"))
    address = lambda x: [part.data.unsafe_buffer_pointer() for part in x.addressable_shards]
    assert jax.tree.map(address, jax.tree.leaves(moved)) == jax.tree.map(address, jax.tree.leaves(model))


def test_weights_are_narrow_before_they_travel(make_llama):
    """In the program as it is handed to the compiler: XLA's own for CPUs widens every exchange of bfloat16."""
    model = laid_out(make_llama(), (1, 4, 2))
    like = to_sample(model.config, (1, 4, 2), "bfloat16")
    kept, places = (tuple(x.sharding for x in jax.tree.leaves(tree)) for tree in (model, like))
    text = resharding.relaid.lower(model, kept, places, (jnp.dtype("bfloat16"),) * len(kept)).as_text()
    placed = re.findall(r"@Sharding|sdy.sharding_constraint.*?: tensor<\S*?x?(f32|bf16)>", text)
    assert placed and set(placed) == {"bf16"}
