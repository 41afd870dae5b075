"""Weights that live on the devices, from one layout into another: through no file and no host."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from srlm_jax.parallel import mesh as meshes
from srlm_jax.parallel.rules import Tree

Places = tuple[jax.sharding.NamedSharding, ...]


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
        moved = relaid(leaves, kept, places, dtypes)
    else:  # no program reads its arguments in one order of the devices and leaves its results in another
        moved = jax.device_put(relaid(leaves, kept, kept, dtypes), list(places))
    moved = [_part(x, y.sharding) for x, y in zip(moved, wanted, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(like), moved)


@functools.partial(jax.jit, static_argnames=("kept", "places", "dtypes"))
def relaid(leaves: Sequence[jax.Array], kept: Places, places: Places, dtypes: tuple[jnp.dtype, ...]) -> list[jax.Array]:
    """Arrays that lie as `kept`, in other dtypes and places: cast where they are, so that the narrower ones travel."""
    cast = [
        jax.lax.with_sharding_constraint(x.astype(dtype), place)
        for x, place, dtype in zip(leaves, kept, dtypes, strict=True)
    ]
    return list(jax.lax.with_sharding_constraint(tuple(cast), places))


def _over(mesh: jax.sharding.Mesh, sharding: jax.sharding.NamedSharding) -> jax.sharding.NamedSharding:
    return jax.sharding.NamedSharding(mesh, sharding.spec)


def _same(x: jax.Array, place: jax.sharding.NamedSharding) -> bool:
    return x.sharding.is_equivalent_to(place, x.ndim)


def _order(mesh: jax.sharding.Mesh) -> list[int]:
    return [device.id for device in mesh.devices.flat]


def _part(x: jax.Array, place: jax.sharding.NamedSharding) -> jax.Array:
    """`x`, or what of it lies on this process's devices, as an array that lies as `place`."""
    return jax.make_array_from_single_device_arrays(x.shape, place, [part.data for part in x.addressable_shards])
