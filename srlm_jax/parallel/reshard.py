"""Weights that live on the devices, from one layout into another: through no file and no host."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from srlm_jax.parallel import mesh as meshes
from srlm_jax.parallel import rules
from srlm_jax.parallel.rules import Tree

Place = jax.sharding.NamedSharding
Places = tuple[Place, ...]


def reshard(model: Tree, like: Tree) -> Tree:
    """`model` in the dtypes and places of `like`, a tree of shapes with shardings; `model` stays as it is.

    `like` lies on the same devices; or, of several processes, each wants the whole model on its own. What is there
    already is not copied.
    """
    leaves, wanted = jax.tree.leaves(model), jax.tree.leaves(like)
    own = wanted[0].sharding.mesh
    over = meshes.beside_one_another(own)
    kept, places = tuple(x.sharding for x in leaves), tuple(_over(over, x.sharding) for x in wanted)
    dtypes = tuple(x.dtype for x in wanted)
    if [x.dtype for x in leaves] == list(dtypes) and all(map(_same, leaves, places)):
        moved = leaves
    elif _order(over) == _order(kept[0].mesh):
        moved = relaid(model, kept, places, dtypes)
    else:  # no program reads its arguments in one order of the devices and leaves its results in another
        moved = jax.device_put(relaid(model, kept, kept, dtypes), list(places))
    moved = [_part(x, y.sharding) for x, y in zip(moved, wanted, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(like), moved)


@functools.partial(jax.jit, static_argnames=("kept", "places", "dtypes"))
def relaid(model: Tree, kept: Places, places: Places, dtypes: tuple[jnp.dtype, ...]) -> list[jax.Array]:
    """The arrays of a tree that lies as `kept`, in other dtypes and places.

    Weights that are stacked over layers go a layer at a time, so that nothing but the result is ever whole; and each is
    cast where it is, so that the narrower one travels.
    """

    def laid(x: jax.Array, old: Place, new: Place, dtype: jnp.dtype) -> jax.Array:
        return jax.lax.with_sharding_constraint(jax.lax.with_sharding_constraint(x.astype(dtype), old), new)

    def layer_by_layer(stacked: jax.Array, old: Place, new: Place, dtype: jnp.dtype) -> jax.Array:
        one = lambda x: laid(x, rules.of_a_layer(old), rules.of_a_layer(new), dtype)
        return jax.lax.with_sharding_constraint(jax.lax.map(one, stacked), new)

    moves = [layer_by_layer if is_stacked else laid for is_stacked in _stacked(model)]
    return [move(*each) for move, *each in zip(moves, jax.tree.leaves(model), kept, places, dtypes, strict=True)]


def _stacked(model: Tree) -> list[bool]:
    """Of each weight, whether its first axis is that of the layers."""
    weights = jax.tree.leaves(model, is_leaf=lambda node: isinstance(node, nnx.Param))
    return [isinstance(weight, nnx.Param) and weight.axes[0] == "layers" for weight in weights]


def _over(mesh: jax.sharding.Mesh, place: Place) -> Place:
    return jax.sharding.NamedSharding(mesh, place.spec)


def _same(x: jax.Array, place: Place) -> bool:
    return x.sharding.is_equivalent_to(place, x.ndim)


def _order(mesh: jax.sharding.Mesh) -> list[int]:
    return [device.id for device in mesh.devices.flat]


def _part(x: jax.Array, place: Place) -> jax.Array:
    """`x`, or what of it lies on this process's devices, as an array that lies as `place`."""
    return jax.make_array_from_single_device_arrays(x.shape, place, [part.data for part in x.addressable_shards])
