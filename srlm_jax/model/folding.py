"""Rows in which documents share their beginnings: the two answers of a preference pair their prompt.

Folded, a token that several documents begin with is there once, and so are the products of all layers for it. Attention
alone needs each document whole: queries, keys and values are unfolded for it, copies where tokens are shared, so that
every kernel that knows documents in a row serves. What it gives is folded again. All of it is exact: a token sees only
what comes before it in its document, so what a shared token gives is the same in each.

Axes: B rows, T tokens of a folded row, U positions of an unfolded one, X whatever a token has.
"""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Folding:
    """Where the tokens of folded rows stand in unfolded ones. No token stands at more than two positions."""

    source_BU: jax.Array  # the token of each position; any one where there is none
    first_BT: jax.Array  # a position of each token; -1: the token is padding
    second_BT: jax.Array  # the other one; -1: it has none
    segments_BU: jax.Array  # the number of each position's document, from 1; 0: there is none

    def unfold(self, x_BTX: jax.Array) -> jax.Array:
        """What tokens have, [B, U, X], at all of their positions."""
        return _unfold(x_BTX, self)

    def fold(self, x_BUX: jax.Array) -> jax.Array:
        """What the first position of each token has, [B, T, X]."""
        return _fold(x_BUX, self)


# Both ways are gathers, and so are their gradients: the transpose that JAX would make of them is a scatter.


@jax.custom_vjp
def _unfold(x_BTX: jax.Array, folding: Folding) -> jax.Array:
    return _taken(x_BTX, folding.source_BU)


def _unfold_gradient(folding: Folding, g_BUX: jax.Array) -> tuple[jax.Array, None]:
    return _taken(g_BUX, folding.first_BT) + _taken(g_BUX, folding.second_BT), None


@jax.custom_vjp
def _fold(x_BUX: jax.Array, folding: Folding) -> jax.Array:
    return _taken(x_BUX, folding.first_BT)


def _fold_gradient(folding: Folding, g_BTX: jax.Array) -> tuple[jax.Array, None]:
    source_BU = folding.source_BU
    there_BU = jnp.arange(source_BU.shape[1])[None]
    is_first_BU = jnp.take_along_axis(folding.first_BT, source_BU, axis=1) == there_BU
    return _taken(g_BTX, jnp.where(is_first_BU, source_BU, -1)), None


_unfold.defvjp(lambda x_BTX, folding: (_unfold(x_BTX, folding), folding), _unfold_gradient)
_fold.defvjp(lambda x_BUX, folding: (_fold(x_BUX, folding), folding), _fold_gradient)


def _taken(x_BTX: jax.Array, index_BI: jax.Array) -> jax.Array:
    """Of each row the tokens with these indices, zeros where an index is -1."""
    # Whole tokens of an array that is in memory: else the compiler makes of it what it was made of, number by number.
    x_BTX = jax.lax.optimization_barrier(x_BTX)
    # Outside the row is nothing, and a negative index would count from its end.
    index_BI = jnp.where(index_BI < 0, x_BTX.shape[1], index_BI)
    return jax.vmap(lambda x, index: jnp.take(x, index, axis=0, mode="fill", fill_value=0))(x_BTX, index_BI)
