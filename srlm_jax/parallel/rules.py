"""Logical axis -> mesh axis: the one table, and the only place where a PartitionSpec is made."""

import math
from collections.abc import Mapping
from typing import TypeVar

import jax
from flax import nnx

Tree = TypeVar("Tree")

MeshAxes = tuple[str, ...]  # the mesh axes that one logical axis is split over; () keeps it whole

# Training: weights are split over fsdp along the width and over tensor along heads, MLP and vocabulary.
TRAIN: Mapping[str, MeshAxes] = {
    "batch": ("data", "fsdp"),
    "layers": (),
    "norm": (),
    "embed": ("fsdp",),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head": (),
    "mlp": ("tensor",),
    "slots": (),  # of a key-value cache
}

# What is computed, in either layout: rows over all devices that hold different ones, and the width whole, so that a
# block's weights come to the rows and not the rows to the weights.
ACTIVATIONS: Mapping[str, MeshAxes] = TRAIN | {"tokens": (), "embed": ()}

# Sampling: every data group holds the weights it reads at each step, split over tensor alone.
SAMPLE: Mapping[str, MeshAxes] = TRAIN | {"batch": ("data",), "embed": ()}


def sharding(
    mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh, rules: Mapping[str, MeshAxes], axes: tuple[str, ...]
) -> jax.sharding.NamedSharding:
    """Where an array with these logical axes lives.

    Raises:
      ValueError: an axis that the table does not know, or two axes of one array that claim the same mesh axis.
    """
    claimed: dict[str, str] = {}
    entries: list[str | tuple[str, ...] | None] = []
    for axis in axes:
        if axis not in rules:
            raise ValueError(f"unknown logical axis {axis!r} in {axes}: the table knows {sorted(rules)}")
        for mesh_axis in rules[axis]:
            if mesh_axis in claimed:
                raise ValueError(
                    f"axes {claimed[mesh_axis]!r} and {axis!r} of {axes} both claim mesh axis {mesh_axis!r}"
                )
            claimed[mesh_axis] = axis
        entries.append(rules[axis] or None)
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*entries))


def constrain(x: jax.Array, *axes: str) -> jax.Array:
    """Says to the compiler how `x`, an array inside a compiled function, is to be split, by logical axes.

    Left alone the compiler prefers at times to split the width and to hold every row on every device. Nothing is said
    where no mesh is set (`jax.set_mesh`), of a mesh axis that the mesh lacks, and of an axis that it does not divide.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    rules: dict[str, MeshAxes] = {}
    for axis, size in zip(axes, x.shape, strict=True):
        split = tuple(name for name in ACTIVATIONS[axis] if name in mesh.shape)
        rules[axis] = split if size % math.prod(mesh.shape[name] for name in split) == 0 else ()
    return jax.lax.with_sharding_constraint(x, sharding(mesh, rules, axes))


def replicated(mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
    """Every device holds the whole array."""
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


def model_shardings(mesh: jax.sharding.Mesh, rules: Mapping[str, MeshAxes], model: Tree) -> Tree:
    """For each weight of a tree (arrays or their shapes), where it lives, by the axes it was made with.

    The tree may be a module or what an optimizer keeps of one; what is no weight (a count, say) every device holds.

    Raises:
      ValueError: as `sharding`, or a dimension that the mesh does not divide.
    """

    def place(path: tuple, weight: nnx.Param | jax.Array) -> nnx.Param | jax.sharding.NamedSharding:
        if not isinstance(weight, nnx.Param):
            return replicated(mesh)
        placed = sharding(mesh, rules, weight.axes)
        try:
            placed.shard_shape(weight.shape)
        except ValueError as error:
            name = jax.tree_util.keystr(path)
            raise ValueError(f"weight {name} of shape {weight.shape} does not fit mesh {dict(mesh.shape)}") from error
        return weight.replace(placed)

    return jax.tree_util.tree_map_with_path(place, model, is_leaf=lambda node: isinstance(node, nnx.Param))
