"""The key-value cache: a tree of levels, so that what rows share is stored once and read once.

Everything sampled here is known beforehand to be a tree (judge template -> instruction -> response -> votes, or
prompt -> candidates). The rows of the deepest level that descend from one row of another are adjacent, or told by an
index (`attention.Siblings`). One level is the ordinary cache.

What is kept may be rounded to 8 bits (`int8.Slots`), each slot of a head by itself, so that what it becomes depends on
nothing else. It is read back in products alone: a score counts the key's scale, a weight the value's.

Axes: L layers, R rows of a level, B rows of the leaf, K key-value heads, S slots, H head width, T new tokens.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from srlm_jax.model import int8
from srlm_jax.model.attention import ALL, Part, Readable, Siblings, Stack
from srlm_jax.model.config import LlamaConfig
from srlm_jax.model.int8 import Slots
from srlm_jax.parallel import rules

# All layers in one stack, or each in one of its own: as the model has them (`Llama.stacks`).
Stacks = tuple[Stack, ...]
ROWS = -4  # the axis of rows in all arrays of a stack


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Level:
    """Keys and values of R rows, each of which has its tokens in its first slots, so many as `length_R` says."""

    k_LRKSH: Stacks
    v_LRKSH: Stacks
    length_R: Int[Array, "R"]

    @property
    def slots(self) -> int:
        """S; 0: no row has a token, and there is nothing to read."""
        return self.k_LRKSH[0].shape[-2]

    def part(self, stack: int, layer: Int[Array, ""]) -> Part:
        """What attention in one layer, of a stack, reads of it."""
        return Part(self.k_LRKSH[stack], self.v_LRKSH[stack], layer, dataclasses.replace(ALL, length_R=self.length_R))


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
    k_LBKSH: Stacks
    v_LBKSH: Stacks
    slot: Int[Array, ""]
    readable: Readable | None
    among_themselves: bool = dataclasses.field(metadata={"static": True})


def empty(config: LlamaConfig, layers: Sequence[int], rows: int, slots: int, cache: str | None) -> Stacks:
    """Room for the keys, or the values, of `rows` rows of `slots` tokens: a stack of each of `layers` many layers, as
    the model's weights are stacked. In the dtype that it computes in or, where `cache` is "int8", in 8 bits."""
    # XLA's CPU backend would turn all of 16-bit keys and values into 32 bits at every token.
    dtype = jnp.float32 if rules.platform() == "cpu" else config.compute_dtype

    def stack(layers: int) -> Stack:
        rows_of = (rows, config.K) if layers == 1 else (layers, rows, config.K)
        if cache is None:
            return jnp.zeros((*rows_of, slots, config.H), dtype)
        return Slots(jnp.zeros((*rows_of, slots, config.H), jnp.int8), jnp.zeros((*rows_of, 1, slots), jnp.float32))

    return tuple(map(stack, layers))


def write(stack: Stack, new_BKTH: Float[Array, "B K T H"], layer: Int[Array, ""], slot: Int[Array, ""]) -> Stack:
    """A stack of a leaf with a layer's new tokens at `slot`, and those after them."""

    def put(old: Array, new: Array, *at: int | Int[Array, ""]) -> Array:
        new = new.astype(old.dtype).reshape((1,) * (old.ndim - 4) + new.shape)
        return jax.lax.dynamic_update_slice(old, new, (layer, 0, 0, *at)[-old.ndim :])

    if isinstance(stack, Slots):
        values, scale = int8.round_along(new_BKTH, -1, stack.scale.dtype)
        return Slots(put(stack.values, values, slot, 0), put(stack.scale, jnp.swapaxes(scale, -1, -2), 0, slot))
    return put(stack, new_BKTH, slot, 0)
