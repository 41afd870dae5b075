"""Attention of packed rows, forward and back, as kernels for GPUs: FlashAttention-2 (arXiv 2307.08691) for documents.

The tokens of a document are next to each other in its row, and each reads those from the document's first one to
itself. So two numbers a token say all: where its document begins and where it ends. A program computes the scores of a
block of queries with a block of keys at a time, and goes through the blocks alone in which there is something to read:
a row of many short documents takes little more time than they would take in rows of their own.

Axes: B rows, N query heads, K key-value heads, G = N / K, T tokens, H head width, Q queries and S keys of a block.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Float, Int

from srlm_jax.model.ops import MASKED

_SMALLEST = 16  # the fewest queries or keys that a matrix unit takes
_LOG2_E = math.log2(math.e)  # powers of 2 are what a GPU computes: exp(x) = exp2(x log2(e))


@dataclasses.dataclass(frozen=True)
class Block:
    """How many queries and keys a program holds at once, and how it is run."""

    queries: int
    keys: int
    warps: int
    stages: int  # blocks that are on their way while one is worked on, and that one

    def within(self, length: int) -> "Block":
        """No larger than what holds a row."""
        most = max(_SMALLEST, pl.next_power_of_2(length))
        return dataclasses.replace(self, queries=min(self.queries, most), keys=min(self.keys, most))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blocks:
    """Of the three kernels; all sizes are powers of two, 16 at least."""

    forward: Block
    of_keys: Block  # the gradients of keys and values
    of_queries: Block  # the gradients of queries


# The fastest of some on an H200 at 128 numbers a head, and of equals the smallest, which fit other GPUs too.
BLOCKS = Blocks(forward=Block(64, 64, 4, 3), of_keys=Block(64, 64, 4, 2), of_queries=Block(64, 64, 4, 3))


def flash_attention(
    q_BNTH: Float[Array, "B N T H"],
    k_BKTH: Float[Array, "B K T H"],
    v_BKTH: Float[Array, "B K T H"],
    segments_BT: Int[Array, "B T"],
    *,
    blocks: Blocks = BLOCKS,
    interpret: bool = False,
) -> Float[Array, "B N T H"]:
    """Softmax attention of every token over its own document up to itself; query head n reads key-value head n // G.

    Args:
      q_BNTH: H is a power of two, 16 at least.
      segments_BT: the number of each token's document. Neighbours of the same number are one document, and padding is
        one as well.

    Differentiable in queries, keys and values; the same numbers each time.
    """
    return _attention(q_BNTH, k_BKTH, v_BKTH, *extents(segments_BT), blocks, interpret)


def extents(segments_BT: Int[Array, "B T"]) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
    """Where each token's document begins, and where its last token is.

    7 7 7 4 4 0   ->   0 0 0 3 3 5,  2 2 2 4 4 5
    """
    T = segments_BT.shape[1]
    index_T = jnp.arange(T, dtype=jnp.int32)
    differs = segments_BT[:, 1:] != segments_BT[:, :-1]
    begins_BT = jnp.pad(differs, ((0, 0), (1, 0)), constant_values=True)
    ends_BT = jnp.pad(differs, ((0, 0), (0, 1)), constant_values=True)
    first_BT = jax.lax.cummax(jnp.where(begins_BT, index_T, 0), axis=1)
    last_BT = jax.lax.cummin(jnp.where(ends_BT, index_T, T), axis=1, reverse=True)
    return first_BT, last_BT


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attention(q_BNTH, k_BKTH, v_BKTH, first_BT, last_BT, blocks, interpret):
    return _forward(q_BNTH, k_BKTH, v_BKTH, first_BT, last_BT, blocks, interpret)[0]


def _forward(q_BNTH, k_BKTH, v_BKTH, first_BT, last_BT, blocks, interpret):
    B, N, T, H = q_BNTH.shape
    G, block = N // k_BKTH.shape[1], blocks.forward.within(T)
    row = pl.BlockSpec((None, T), lambda i, n, b: (b, 0))
    of_query_head = pl.BlockSpec((None, None, T, H), lambda i, n, b: (b, n, 0, 0))
    of_key_head = pl.BlockSpec((None, None, T, H), lambda i, n, b: (b, n // G, 0, 0))
    out_BNTH, lse_BNT = pl.pallas_call(
        functools.partial(_forward_kernel, block=block),
        grid=(pl.cdiv(T, block.queries), N, B),
        in_specs=[row, of_query_head, of_key_head, of_key_head],
        out_specs=[of_query_head, pl.BlockSpec((None, None, T), lambda i, n, b: (b, n, 0))],
        out_shape=[
            jax.ShapeDtypeStruct(q_BNTH.shape, q_BNTH.dtype),
            jax.ShapeDtypeStruct((B, N, T), jnp.float32),
        ],
        compiler_params=_how(block),
        interpret=interpret,
        name="flash_forward",
    )(first_BT, q_BNTH, k_BKTH, v_BKTH)
    return out_BNTH, (q_BNTH, k_BKTH, v_BKTH, first_BT, last_BT, out_BNTH, lse_BNT)


def _backward(blocks, interpret, saved, dout_BNTH):
    q_BNTH, k_BKTH, v_BKTH, first_BT, last_BT, out_BNTH, lse_BNT = saved
    B, N, T, H = q_BNTH.shape
    K = k_BKTH.shape[1]
    G = N // K
    # What the gradient of each score is less by: its softmax adds up to 1.
    delta_BNT = jnp.sum(out_BNTH.astype(jnp.float32) * dout_BNTH.astype(jnp.float32), axis=-1)

    block = blocks.of_keys.within(T)
    row = pl.BlockSpec((None, T), lambda i, h, b: (b, 0))
    of_query_heads = pl.BlockSpec((None, G, T, H), lambda i, h, b: (b, h, 0, 0))
    numbers = pl.BlockSpec((None, G, T), lambda i, h, b: (b, h, 0))
    of_key_head = pl.BlockSpec((None, None, T, H), lambda i, h, b: (b, h, 0, 0))
    dk_BKTH, dv_BKTH = pl.pallas_call(
        functools.partial(_keys_kernel, block=block),
        grid=(pl.cdiv(T, block.keys), K, B),
        in_specs=[row, row, of_query_heads, of_key_head, of_key_head, of_query_heads, numbers, numbers],
        out_specs=[of_key_head, of_key_head],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k_BKTH, v_BKTH)],
        compiler_params=_how(block),
        interpret=interpret,
        name="flash_backward_keys",
    )(first_BT, last_BT, q_BNTH, k_BKTH, v_BKTH, dout_BNTH, lse_BNT, delta_BNT)

    block = blocks.of_queries.within(T)
    of_query_head = pl.BlockSpec((None, None, T, H), lambda i, n, b: (b, n, 0, 0))
    of_key_head = pl.BlockSpec((None, None, T, H), lambda i, n, b: (b, n // G, 0, 0))
    numbers = pl.BlockSpec((None, None, T), lambda i, n, b: (b, n, 0))
    dq_BNTH = pl.pallas_call(
        functools.partial(_queries_kernel, block=block),
        grid=(pl.cdiv(T, block.queries), N, B),
        in_specs=[row, of_query_head, of_key_head, of_key_head, of_query_head, numbers, numbers],
        out_specs=of_query_head,
        out_shape=jax.ShapeDtypeStruct(q_BNTH.shape, q_BNTH.dtype),
        compiler_params=_how(block),
        interpret=interpret,
        name="flash_backward_queries",
    )(first_BT, q_BNTH, k_BKTH, v_BKTH, dout_BNTH, lse_BNT, delta_BNT)
    return dq_BNTH, dk_BKTH, dv_BKTH, None, None


_attention.defvjp(_forward, _backward)


def _how(block: Block) -> pltriton.CompilerParams:
    return pltriton.CompilerParams(num_warps=block.warps, num_stages=block.stages)


# --- kernels ----------------------------------------------------------------------------------------------------------
#
# The log-sum-exp is one of powers of 2 here, between the kernels.


def _forward_kernel(first_ref, q_ref, k_ref, v_ref, out_ref, lse_ref, *, block):
    H = q_ref.shape[1]
    Q, S, scale = block.queries, block.keys, H**-0.5 * _LOG2_E
    start = pl.program_id(0) * Q
    first_Q, q_QH = _load(first_ref, start, Q), _load(q_ref, start, Q)

    def one(j, carry):
        sum_QH, top_Q, total_Q = carry
        k_SH, v_SH = _load(k_ref, j * S, S), _load(v_ref, j * S, S)
        read_QS = _read(first_Q[:, None], _index(start, Q)[:, None], _index(j * S, S)[None])
        scores_QS = jnp.where(read_QS, pltriton.dot(q_QH, k_SH, trans_b=True) * scale, MASKED)
        new_Q = jnp.maximum(top_Q, jnp.max(scores_QS, axis=1))
        # Of a query that has had nothing to read yet, all weights are 1: what comes of that is multiplied by 0 as soon
        # as there is something, itself at the latest. (Scaled later, MASKED would differ from itself by its rounding.)
        weights_QS = jnp.exp2(scores_QS - new_Q[:, None])
        shrunk_Q = jnp.exp2(top_Q - new_Q)
        total_Q = total_Q * shrunk_Q + jnp.sum(weights_QS, axis=1)
        sum_QH = sum_QH * shrunk_Q[:, None] + pltriton.dot(weights_QS.astype(v_SH.dtype), v_SH)
        return sum_QH, new_Q, total_Q

    begin = (jnp.zeros((Q, H), jnp.float32), jnp.full(Q, MASKED, jnp.float32), jnp.zeros(Q, jnp.float32))
    sum_QH, top_Q, total_Q = jax.lax.fori_loop(*_key_blocks(first_ref, start, block), one, begin)
    _store(out_ref, start, sum_QH / total_Q[:, None])
    _store(lse_ref, start, top_Q + jnp.log2(total_Q))


def _keys_kernel(first_ref, last_ref, q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref, dk_ref, dv_ref, *, block):
    """The queries of all heads that read a block of keys, one block after the other: nothing is added in an order that
    depends on which program is faster."""
    G, T, H = q_ref.shape
    Q, S, scale = block.queries, block.keys, H**-0.5 * _LOG2_E
    start = pl.program_id(0) * S
    k_SH, v_SH = _load(k_ref, start, S), _load(v_ref, start, S)

    def one(g, i, carry):
        dk_SH, dv_SH = carry
        q_QH, dout_QH, lse_Q, delta_Q = (_load(ref, i * Q, Q, g) for ref in (q_ref, dout_ref, lse_ref, delta_ref))
        first_Q = _load(first_ref, i * Q, Q)
        read_SQ = _read(first_Q[None], _index(i * Q, Q)[None], _index(start, S)[:, None])
        # Transposed, for no block is turned that was computed here.
        scores_SQ = jnp.where(read_SQ, pltriton.dot(k_SH, q_QH, trans_b=True) * scale, MASKED)
        weights_SQ = jnp.exp2(scores_SQ - lse_Q[None])
        dv_SH += pltriton.dot(weights_SQ.astype(dout_QH.dtype), dout_QH)
        dscores_SQ = weights_SQ * (pltriton.dot(v_SH, dout_QH, trans_b=True) - delta_Q[None])
        dk_SH += pltriton.dot(dscores_SQ.astype(q_QH.dtype), q_QH)
        return dk_SH, dv_SH

    # Documents follow one another: of all tokens of the block the last one's document ends last.
    last = _number(last_ref, jnp.minimum(start + S, T) - 1)
    ends = (jax.lax.div(start, Q), jax.lax.div(last, Q) + 1)
    head = lambda g, carry: jax.lax.fori_loop(*ends, functools.partial(one, g), carry)
    zeros_SH = jnp.zeros((S, H), jnp.float32)
    dk_SH, dv_SH = jax.lax.fori_loop(0, G, head, (zeros_SH, zeros_SH))
    _store(dk_ref, start, dk_SH * H**-0.5)
    _store(dv_ref, start, dv_SH)


def _queries_kernel(first_ref, q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref, dq_ref, *, block):
    H = q_ref.shape[1]
    Q, S, scale = block.queries, block.keys, H**-0.5 * _LOG2_E
    start = pl.program_id(0) * Q
    own = (first_ref, q_ref, dout_ref, lse_ref, delta_ref)
    first_Q, q_QH, dout_QH, lse_Q, delta_Q = (_load(ref, start, Q) for ref in own)

    def one(j, dq_QH):
        k_SH, v_SH = _load(k_ref, j * S, S), _load(v_ref, j * S, S)
        read_QS = _read(first_Q[:, None], _index(start, Q)[:, None], _index(j * S, S)[None])
        scores_QS = jnp.where(read_QS, pltriton.dot(q_QH, k_SH, trans_b=True) * scale, MASKED)
        weights_QS = jnp.exp2(scores_QS - lse_Q[:, None])
        dscores_QS = weights_QS * (pltriton.dot(dout_QH, v_SH, trans_b=True) - delta_Q[:, None])
        return dq_QH + pltriton.dot(dscores_QS.astype(k_SH.dtype), k_SH)

    dq_QH = jax.lax.fori_loop(*_key_blocks(first_ref, start, block), one, jnp.zeros((Q, H), jnp.float32))
    _store(dq_ref, start, dq_QH * H**-0.5)


def _key_blocks(first_ref, start, block):
    """From which block of keys on, and up to which, something is there for the queries from `start` on."""
    # Documents follow one another: of all tokens of the block the first one's document begins first.
    end = jnp.minimum(start + block.queries, first_ref.shape[0])
    return jax.lax.div(_number(first_ref, start), block.keys), jax.lax.div(end + block.keys - 1, block.keys)


def _read(first, query, key):
    """Which queries, whose documents begin at `first`, read which keys."""
    return (first <= key) & (key <= query)


def _index(start, size):
    return start + jnp.arange(size, dtype=jnp.int32)


def _number(ref, at):
    return pltriton.load(ref.at[at])


def _load(ref, start, size, *head):
    """So many tokens from `start` on, of one head where there are several; zeros for those behind the row's end."""
    T, *rest = ref.shape[len(head) :]
    inside = _inside(start, size, T, rest)
    return pltriton.load(ref.at[(*head, pl.ds(start, size))], mask=inside, other=None if inside is None else 0)


def _store(ref, start, x):
    """Puts down what tokens have from `start` on, but for those behind the row's end."""
    T, *rest = ref.shape
    inside = _inside(start, x.shape[0], T, rest)
    pltriton.store(ref.at[pl.ds(start, x.shape[0])], x.astype(ref.dtype), mask=inside)


def _inside(start, size, T, rest):
    """Which of so many tokens are of the row, for all that each has; None: all, wherever they start."""
    return None if T % size == 0 else (_index(start, size) < T).reshape(size, *(1 for _ in rest))
