"""Numbers in 8 bits: whole ones from -127 to 127, and what each of them counts."""

import dataclasses

import jax
import jax.numpy as jnp


def round_along(x: jax.Array, axes: int | tuple[int, ...], dtype: jnp.dtype | str) -> tuple[jax.Array, jax.Array]:
    """(whole numbers, scale): their product is `x`, off by half a scale at most.

    Args:
      axes: all numbers along these have one scale, which keeps them with size 1.
      dtype: of the scale, which is rounded to it before the numbers are to whole ones. One that is not finite says
        that a number was not.
    """
    x32 = x.astype(jnp.float32)
    scale = (jnp.max(jnp.abs(x32), axis=axes, keepdims=True) / 127).astype(dtype)
    scale = jnp.where(scale == 0, 1, scale)  # nothing but zeros
    whole = jnp.clip(jnp.round(x32 / scale.astype(jnp.float32)), -127, 127)
    return whole.astype(jnp.int8), scale


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """Keys, or values, in 8 bits: stands for the array that they are a rounded copy of.

    values: [..., S, H].
    scale: [..., 1, S] in float32, one for the H numbers of a slot of a head. Slots come last, as they do in scores, and
      before them an axis of size 1: a TPU cuts the last two axes into whole tiles alone, and heads are to be free.
    """

    values: jax.Array
    scale: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def dtype(self) -> jnp.dtype:
        return self.values.dtype

    def multiplied(self, dtype: jnp.dtype) -> jax.Array:
        """The array."""
        return (self.values.astype(jnp.float32) * jnp.swapaxes(self.scale, -1, -2)).astype(dtype)
