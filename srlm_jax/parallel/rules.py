"""Logical axis -> mesh axis: the one table, and the only place where a PartitionSpec is made."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import jax
from flax import nnx

from srlm_jax.errors import BadInput

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
    "rank": (),  # of an adapter
    "slots": (),  # of a key-value cache
}

# What is computed, in either layout: rows over all devices that hold different ones, and the width whole, so that a
# block's weights come to the rows and not the rows to the weights.
ACTIVATIONS: Mapping[str, MeshAxes] = TRAIN | {"tokens": (), "embed": (), "stored_tokens": ("tensor",)}

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


def of_a_layer(stacked: jax.sharding.NamedSharding) -> jax.sharding.NamedSharding:
    """Where one layer of an array lives whose first axis is that of the layers."""
    return jax.sharding.NamedSharding(stacked.mesh, jax.sharding.PartitionSpec(*stacked.spec[1:]))


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


def platform() -> str:
    """Where the function that is being traced will run: "cpu", "gpu" or "tpu".

    The mesh knows, also where its devices are descriptions alone and this process has none of their kind.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return jax.default_backend() if mesh.empty else mesh.abstract_device.platform


def on_each_device(function: Callable, arrays: Sequence[jax.Array], axes: Sequence[tuple[str, ...]]) -> jax.Array:
    """`function(*arrays)`, run by each device on its own parts of them, for what the compiler cannot split; the result
    is as the first of them.

    `axes` are the logical axes of each array. An axis is split where it is longer than 1, alike in all arrays, and in
    none where the mesh does not divide one of them. Without a mesh (`jax.set_mesh`), the function itself.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return function(*arrays)
    sizes: dict[str, set[int]] = {}
    for array, named in zip(arrays, axes, strict=True):
        for axis, size in zip(named, array.shape, strict=True):
            sizes.setdefault(axis, set()).add(size)
    rules: dict[str, MeshAxes] = {}
    for axis, found in sizes.items():
        split = tuple(name for name in ACTIVATIONS[axis] if name in mesh.shape)
        over = math.prod(mesh.shape[name] for name in split)
        rules[axis] = split if all(size == 1 or size % over == 0 for size in found) else ()
    specs = []
    for array, named in zip(arrays, axes, strict=True):
        whole = {axis: () for axis, size in zip(named, array.shape, strict=True) if size == 1}
        specs.append(sharding(mesh, rules | whole, named).spec)
    # Kernels do not say over which axes of the mesh their results differ: check_vma.
    return jax.shard_map(function, in_specs=tuple(specs), out_specs=specs[0], check_vma=False)(*arrays)


def replicated(mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
    """Every device holds the whole array."""
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


def model_shardings(mesh: jax.sharding.Mesh, rules: Mapping[str, MeshAxes], model: Tree) -> Tree:
    """For each weight of a module (arrays or their shapes), where it lives, by the axes it was made with; so too for
    an optimizer's state, whose moments have the axes of their weights, and whose other numbers are whole everywhere.

    Raises:
      ValueError: as `sharding`, or an axis of a weight that the mesh does not divide; the message has the sizes that
        would work for the whole model.
    """
    weights = jax.tree_util.tree_leaves_with_path(model, is_leaf=_is_weight)
    for path, weight in weights:
        for mesh_axis, axis, size in _split(rules, weight):
            if size % mesh.shape[mesh_axis]:
                whole = math.gcd(*(n for _, w in weights for to, _, n in _split(rules, w) if to == mesh_axis))
                fitting = [n for n in range(1, mesh.size + 1) if whole % n == 0 and mesh.size % n == 0]
                raise BadInput(
                    f"mesh.{mesh_axis} is {mesh.shape[mesh_axis]}, which does not divide axis {axis!r} of size "
                    f"{size} of weight {jax.tree_util.keystr(path)} {tuple(weight.shape)}: of {mesh.size} devices, "
                    f"mesh.{mesh_axis} can be {' or '.join(map(str, fitting))} for this model"
                )

    def place(weight: nnx.Param | jax.Array) -> nnx.Param | jax.sharding.NamedSharding:
        return weight.replace(sharding(mesh, rules, weight.axes)) if _is_weight(weight) else replicated(mesh)

    return jax.tree.map(place, model, is_leaf=_is_weight)


def placed(mesh: jax.sharding.Mesh, rules: Mapping[str, MeshAxes], model: Tree) -> Tree:
    """The shapes of a tree of weights, each with its place by `model_shardings`."""
    places = model_shardings(mesh, rules, model)
    return jax.tree.map(lambda x, to: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=to), model, places)


def keep_in_place(rules: Mapping[str, MeshAxes], model: Tree) -> Tree:
    """Inside a compiled function, under `jax.set_mesh`: leaves weights, or an optimizer's state, where
    `model_shardings` puts them; without a mesh, where the compiler does.

    Else the first step's results lie a little otherwise than its arguments, and the second step is compiled anew.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return model if mesh.empty else jax.lax.with_sharding_constraint(model, model_shardings(mesh, rules, model))


def _is_weight(node: object) -> bool:
    return isinstance(node, nnx.Param)


def _split(rules: Mapping[str, MeshAxes], weight: nnx.Param | jax.Array) -> list[tuple[str, str, int]]:
    """(mesh axis, logical axis, size) for each axis of a weight that is split."""
    if not _is_weight(weight):
        return []
    # An axis that the table does not know has its own message, in `sharding`.
    sizes = zip(weight.axes, weight.shape, strict=True)
    return [(mesh_axis, axis, size) for axis, size in sizes for mesh_axis in rules.get(axis, ())]
