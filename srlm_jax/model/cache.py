"""The key-value cache: a tree of levels, so that what rows share is stored once and read once.

Everything sampled here is known beforehand to be a tree (judge template -> instruction -> response -> votes, or
prompt -> candidates). The rows of the deepest level that descend from one row of another are adjacent, or told by an
index (`attention.Siblings`). One level is the ordinary cache.

What is kept may be rounded to 8 bits (`int8.Slots`), each slot of a head by itself, so that what it becomes depends on
nothing else. It is read back in products alone: a score counts the key's scale, a weight the value's.

Axes: L layers, R rows of a level, B rows of the leaf, K key-value heads, S slots, H head width, T new tokens.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from srlm_jax.model import int8
from srlm_jax.model.attention import ALL, Part, Readable, Siblings
from srlm_jax.model.config import LlamaConfig
from srlm_jax.model.int8 import Slots


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Level:
    """Keys and values of R rows, each of which has its tokens in its first slots, so many as `length_R` says."""

    k_LRKSH: Float[Array, "L R K S H"] | Slots
    v_LRKSH: Float[Array, "L R K S H"] | Slots
    length_R: Int[Array, "R"]

    def part(self, layer: Int[Array, ""]) -> Part:
        """What attention in one layer reads of it."""
        return Part(self.k_LRKSH, self.v_LRKSH, layer, dataclasses.replace(ALL, length_R=self.length_R))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """What one forward pass reads and writes.

    parents: finished levels whose rows have their readers side by side; a new token reads all of its ancestors.
    shared: finished levels that are read as `siblings` says, which is None where there are none.
    k, v: the leaf level, which receives the T new tokens of all rows at `slot`.
    readable: which slots of the leaf a new token reads, once the new ones are there; None: none of them.
    among_themselves: whether new tokens besides read themselves and those before them in the row, which `readable`
      then leaves out.
    """

    parents: tuple[Level, ...]
    shared: tuple[Level, ...]
    siblings: Siblings | None
    k_LBKSH: Float[Array, "L B K S H"] | Slots
    v_LBKSH: Float[Array, "L B K S H"] | Slots
    slot: Int[Array, ""]
    readable: Readable | None
    among_themselves: bool = dataclasses.field(metadata={"static": True})


def empty(config: LlamaConfig, rows: int, slots: int, cache: str | None) -> Float[Array, "L R K S H"] | Slots:
    """Room for the keys, or the values, of `rows` rows of `slots` tokens, in the dtype that the model computes in or,
    where `cache` is "int8", in 8 bits."""
    shape = (config.L, rows, config.K, slots, config.H)
    if cache is None:
        return jnp.zeros(shape, config.compute_dtype)
    return Slots(jnp.zeros(shape, jnp.int8), jnp.zeros((*shape[:3], 1, slots), jnp.float32))


def write(
    stack: Float[Array, "L B K S H"] | Slots,
    new_BKTH: Float[Array, "B K T H"],
    layer: Int[Array, ""],
    slot: Int[Array, ""],
) -> Float[Array, "L B K S H"] | Slots:
    """A leaf with a layer's new tokens at `slot`, and those after them."""
    if isinstance(stack, Slots):
        values, scale = int8.round_along(new_BKTH, -1, stack.scale.dtype)
        return Slots(
            jax.lax.dynamic_update_slice(stack.values, values[None], (layer, 0, 0, slot, 0)),
            jax.lax.dynamic_update_slice(stack.scale, jnp.swapaxes(scale, -1, -2)[None], (layer, 0, 0, 0, slot)),
        )
    return jax.lax.dynamic_update_slice(stack, new_BKTH[None].astype(stack.dtype), (layer, 0, 0, slot, 0))
