"""Attention of one new token a row, as a kernel for GPUs: what `decode_attention` is for TPUs.

Each program works on one row's keys of one head, block after block of those that hold something; where there are too
few rows and heads for all of a GPU, several share the blocks of one (split keys), and their sums are merged afterwards.

Axes: L layers, R rows of a level, K key-value heads, Q queries that read one row's keys of one head, S slots, H head
width, P programs that share a row.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Float, Int

from srlm_jax.model.decode_attention import blocks_read
from srlm_jax.model.int8 import Slots
from srlm_jax.model.ops import MASKED

# Queries that a program holds at once: what a GPU's matrix units take at least, and what its registers hold.
_QUERIES = (16, 32, 64)
_PROGRAMS = 512  # that keep a GPU busy


def block_size(slots: int) -> int | None:
    """Slots that are read at once; None: none that a matrix unit takes divide the level."""
    return next((size for size in (64, 32, 16) if slots % size == 0), None)


def flash_decode(
    q_RKQH: Float[Array, "R K Q H"],
    k_LRKSH: Float[Array, "L R K S H"] | Slots,
    v_LRKSH: Float[Array, "L R K S H"] | Slots,
    layer: Int[Array, ""],
    start_R: Int[Array, "R"],
    length_R: Int[Array, "R"],
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "R K Q H"], Float[Array, "R K Q"]]:
    """As `decode_attention.flash_decode`; H is a power of two, 16 at least."""
    R, K, Q, H = q_RKQH.shape
    S = k_LRKSH.shape[3]
    block = block_size(S)
    queries = next((n for n in _QUERIES if n >= Q), _QUERIES[-1])
    pieces = -(-Q // queries)
    q = jnp.pad(q_RKQH, ((0, 0), (0, 0), (0, pieces * queries - Q), (0, 0)))
    shares = max(1, min(_PROGRAMS // (R * K * pieces), S // (2 * block)))
    whole = lambda x: pl.BlockSpec(x.shape, lambda r, h, piece, share: (0,) * x.ndim)
    scalars, stacks = (layer.reshape(1), start_R, length_R), jax.tree.leaves((k_LRKSH, v_LRKSH))
    sums, tops, totals = pl.pallas_call(
        functools.partial(_kernel, block=block, shares=shares),
        grid=(R, K, pieces, shares),
        in_specs=[
            *map(whole, scalars),
            pl.BlockSpec((None, None, queries, H), lambda r, h, piece, share: (r, h, piece, 0)),
            *map(whole, stacks),
        ],
        out_specs=[
            pl.BlockSpec((None, None, None, queries, H), lambda r, h, piece, share: (share, r, h, piece, 0)),
            pl.BlockSpec((None, None, None, queries), lambda r, h, piece, share: (share, r, h, piece)),
            pl.BlockSpec((None, None, None, queries), lambda r, h, piece, share: (share, r, h, piece)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((shares, *q.shape), jnp.float32),
            jax.ShapeDtypeStruct((shares, *q.shape[:3]), jnp.float32),
            jax.ShapeDtypeStruct((shares, *q.shape[:3]), jnp.float32),
        ],
        compiler_params=pltriton.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="flash_decode",
    )(*scalars, q, *stacks)
    # sum = sum of exp(score - top) v, total = sum of exp(score - top), for each share of the keys.
    top = jnp.max(tops, axis=0, keepdims=True)
    scale = jnp.exp(tops - top)
    total = jnp.sum(totals * scale, axis=0)
    divisor = jnp.where(total == 0, 1, total)
    out = jnp.sum(sums * scale[..., None], axis=0) / divisor[..., None]
    lse = jnp.where(total == 0, MASKED, top[0] + jnp.log(divisor))
    return out[:, :, :Q].astype(q_RKQH.dtype), lse[:, :, :Q]


def _kernel(layer_ref, start_ref, length_ref, q_ref, *refs, block, shares):
    *stacks, sum_ref, top_ref, total_ref = refs
    r, h, share = pl.program_id(0), pl.program_id(1), pl.program_id(3)
    layer, start, length = layer_ref[0], start_ref[r], length_ref[r]
    slots = stacks[0].shape[3]
    blocks = blocks_read(start, length, slots, block)
    each = (blocks + shares - 1) // shares
    q_QH = q_ref[...]
    Q, H = q_QH.shape

    def read(refs, first):
        """A block's numbers and, of what is rounded, the scale of each slot."""
        here = pl.ds(first, block)
        numbers_SH = pltriton.load(refs[0].at[layer, r, h, here, :]).astype(q_QH.dtype)
        return numbers_SH, pltriton.load(refs[1].at[layer, r, h, jnp.int32(0), here]) if len(refs) > 1 else None

    def one(i, carry):
        sum_QH, top_Q, total_Q = carry
        first = (start // block + i) % (slots // block) * block
        half = len(stacks) // 2
        (k_SH, k_scale_S), (v_SH, v_scale_S) = read(stacks[:half], first), read(stacks[half:], first)
        age_S = first + jnp.arange(block) - start
        age_S = jnp.where(age_S < 0, age_S + slots, age_S)
        held_S = (age_S < length)[None]
        scores_QS = pltriton.dot(q_QH, k_SH, trans_b=True)
        scores_QS = scores_QS if k_scale_S is None else scores_QS * k_scale_S[None]
        scores_QS = jnp.where(held_S, scores_QS, MASKED)
        new_Q = jnp.maximum(top_Q, jnp.max(scores_QS, axis=1))
        weights_QS = jnp.where(held_S, jnp.exp(scores_QS - new_Q[:, None]), 0.0)
        shrunk_Q = jnp.exp(top_Q - new_Q)
        total_Q = total_Q * shrunk_Q + jnp.sum(weights_QS, axis=1)
        weights_QS = weights_QS if v_scale_S is None else weights_QS * v_scale_S[None]
        return sum_QH * shrunk_Q[:, None] + pltriton.dot(weights_QS.astype(v_SH.dtype), v_SH), new_Q, total_Q

    begin = (jnp.zeros((Q, H), jnp.float32), jnp.full(Q, MASKED, jnp.float32), jnp.zeros(Q, jnp.float32))
    end = jnp.minimum((share + 1) * each, blocks)
    sum_QH, top_Q, total_Q = jax.lax.fori_loop(share * each, end, one, begin)
    sum_ref[...], top_ref[...], total_ref[...] = sum_QH, top_Q, total_Q
