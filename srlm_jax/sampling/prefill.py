"""Reading prompts into levels of the cache: rows of all lengths through one program, and little to fill them up.

Axes: R rows, T tokens, D groups of devices with R / D rows of their own, X = R / D places for them.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from srlm_jax.model import cache as kv
from srlm_jax.model.attention import ALL, Siblings
from srlm_jax.model.cache import Cache, Level
from srlm_jax.model.llama import Llama

# Tokens of a row that are read at once. Where rows may be longer they are read piece by piece, for as long as one goes
# on, so that a row is filled up by less than this and not to the longest that there may be.
CHUNK = 128
# How often the rows that go on are halved: once fewer than half of them have tokens left, only that half is read.
HALVINGS = 2


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Below:
    """A level whose rows are not read side by side: row b of a group of devices stands at `place_DX[b]` of the X places
    of its group, of which each row of the level is read from as many."""

    level: Level
    place_DX: Int[Array, "D X"]

    def siblings(self, rows: int) -> Siblings:
        """Where the first `rows` rows of each group stand."""
        place_DB = self.place_DX[:, :rows]
        D, X = self.place_DX.shape
        stand = lambda place_B: jnp.full(X, rows, jnp.int32).at[place_B].set(jnp.arange(rows))
        return Siblings(jax.vmap(stand)(place_DB), place_DB.reshape(D * rows))


def prefill(
    model: Llama,
    parents: tuple[Level, ...],
    below: Below | None,
    tokens_RT: Int[Array, "R T"],
    lengths_R: Int[Array, "R"],
    start_R: Int[Array, "R"],
    *,
    data: int,
    chunk: int,
    halvings: int,
    cache: str | None,
) -> Level:
    """The level of rows of tokens.

    Args:
      parents: what all rows come after, each level read as in `model.cache.Cache`.
      below: besides, a level that rows of it descend from in any order; None: there is none.
      tokens_RT: filled up on the right; where they are longer than `chunk`, to a multiple of it. T may be 0.
      lengths_R: how many tokens each row has. With `halvings`, those of each of the `data` groups in falling order.
      start_R: the place of a row's first token in its document.
      chunk: how many tokens of a row are read at once.
      halvings: how often half of the rows is left out, once it has ended.
      cache: how keys and values are kept; see `cache.empty`.
    """
    R, T = tokens_RT.shape
    own = R // data
    below = None if below is None or below.level.slots == 0 else below

    def leading(x: Array, rows: int, axis: int) -> Array:
        """The first `rows` rows of each group."""
        axis = axis % x.ndim
        groups = x.reshape(*x.shape[:axis], data, own, *x.shape[axis + 1 :])
        first = jax.lax.slice_in_dim(groups, 0, rows, axis=axis + 1)
        return first.reshape(*x.shape[:axis], data * rows, *x.shape[axis + 1 :])

    def back(x: Array, first: Array, rows: int) -> Array:
        """A stack of layers, with other first rows."""
        layers, row = x.shape[: kv.ROWS], x.shape[kv.ROWS + 1 :]
        groups = x.reshape(*layers, data, own, *row)
        return groups.at[..., :rows, :, :, :].set(first.reshape(*layers, data, rows, *row)).reshape(x.shape)

    def read(at: Int[Array, ""], leaf: tuple, rows: int, length: int) -> tuple:
        tokens = jax.lax.dynamic_slice_in_dim(leading(tokens_RT, rows, 0), at, length, axis=1)
        before = Cache(
            parents=parents,
            shared=() if below is None else (below.level,),
            siblings=None if below is None else below.siblings(rows),
            k_LBKSH=leaf[0],
            v_LBKSH=leaf[1],
            slot=at,
            # What fills a row up lies to the right of its tokens, so that none of them reads it.
            readable=None if length == T else dataclasses.replace(ALL, length_R=jnp.full(data * rows, at)),
            among_themselves=True,
        )
        positions = leading(start_R, rows, 0)[:, None] + at + jnp.arange(length)[None]
        _, after = model(tokens, positions, segments_BT=None, cache=before, dropout=None)
        return after.k_LBKSH, after.v_LBKSH

    empty = lambda: kv.empty(model.config, model.layers, R, T, cache)
    at, leaf = jnp.int32(0), (empty(), empty())
    if T == 0:
        return Level(*leaf, lengths_R)
    if chunk >= T:
        return Level(*read(at, leaf, own, T), lengths_R)
    for rows, fewer in _widths(own, halvings):
        until = jnp.max(lengths_R.reshape(data, own)[:, fewer] if fewer else lengths_R)
        part = leaf if rows == own else jax.tree.map(lambda x, rows=rows: leading(x, rows, kv.ROWS), leaf)
        goes_on = lambda carry, until=until: carry[0] < until
        step = lambda carry, rows=rows: (carry[0] + chunk, read(*carry, rows, chunk))
        at, part = jax.lax.while_loop(goes_on, step, (at, part))
        leaf = part if rows == own else jax.tree.map(lambda x, first, rows=rows: back(x, first, rows), leaf, part)
    return Level(*leaf, lengths_R)


def _widths(rows: int, halvings: int) -> list[tuple[int, int]]:
    """(rows that are read, rows that are left when that ends): of 8, (8, 4), (4, 2) and (2, 0)."""
    widths = sorted({max(1, rows >> times) for times in range(halvings + 1)}, reverse=True)
    return list(zip(widths, [*widths[1:], 0], strict=True))


def positions_read(lengths_DX: np.ndarray, slots: int, halvings: int) -> int:
    """How many positions `prefill` computes for rows of these lengths, those that fill up rows among them."""
    D, X = lengths_DX.shape
    if slots <= CHUNK:
        return D * X * slots
    longest_X = np.sort(lengths_DX, axis=1)[:, ::-1].max(axis=0)
    at = found = 0
    for rows, fewer in _widths(X, halvings):
        chunks = max(0, -(-(int(longest_X[fewer]) - at) // CHUNK))
        at, found = at + chunks * CHUNK, found + D * rows * chunks * CHUNK
    return found


@functools.partial(jax.jit, static_argnames="cache")
def prefill_prefix(
    model: Llama, tokens_1T: Int[Array, "1 T"], length_1: Int[Array, "1"], *, cache: str | None
) -> Level:
    """The level of the tokens that all prompts begin with, filled up behind; kept as `cache` says."""
    start_1, whole = jnp.zeros(1, jnp.int32), tokens_1T.shape[1]
    return prefill(
        model, (), None, tokens_1T, length_1, start_1, data=1, chunk=whole, halvings=0, cache=cache
    )  # fmt: skip
