"""The key-value cache: a tree of levels, so that what rows share is stored once and read once.

Everything sampled here is known beforehand to be a tree (judge template -> instruction -> response -> votes, or
prompt -> candidates). Row b of the deepest level descends from row b * R // B of a level with R rows: siblings are
adjacent. One level is the ordinary cache.

Axes: L layers, R rows of a level, B rows of the leaf, K key-value heads, S slots, H head width, T new tokens.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from srlm_jax.model.attention import Readable
from srlm_jax.model.config import LlamaConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Level:
    """Keys and values of R rows, and which of the S slots of each row hold a token."""

    k_LRKSH: Float[Array, "L R K S H"]
    v_LRKSH: Float[Array, "L R K S H"]
    valid_RS: Bool[Array, "R S"]

    @property
    def readable(self) -> Readable:
        return Readable(causal=False, segments_BT=None, valid_RS=self.valid_RS)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """What one forward pass reads and writes.

    parents: finished levels, root first; every new token may read every valid slot of its ancestors.
    k, v: the leaf level, which receives the T new tokens of all rows at `slot`.
    readable: which leaf slots each new token may read, itself included.
    """

    parents: tuple[Level, ...]
    k_LBKSH: Float[Array, "L B K S H"]
    v_LBKSH: Float[Array, "L B K S H"]
    slot: Int[Array, ""]
    readable: Readable


def empty(config: LlamaConfig, rows: int, slots: int) -> Float[Array, "L R K S H"]:
    """Room for the keys, or the values, of `rows` rows of `slots` tokens."""
    return jnp.zeros((config.L, rows, config.K, slots, config.H), config.compute_dtype)
