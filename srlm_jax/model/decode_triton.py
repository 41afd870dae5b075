"""Attention over a part of a cache, as a kernel for GPUs: what `decode_attention` is for TPUs, and for the many queries
of a prefill too.

Each program works on some of the queries that read one row's keys of one head, block after block of the slots that hold
something; where there are too few rows and heads for all of a GPU, several share the blocks of one (split keys), and
what they find is merged afterwards.

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
from srlm_jax.model.ops import MASKED, merge_attention

# Queries that a program holds at once: what a GPU's matrix units take at least, and what its registers hold.
_QUERIES = (16, 32, 64)
_PROGRAMS = 512  # that keep a GPU busy
_BLOCKS = 8  # of a row's keys that a program has at least: with fewer it takes longer to merge what several found


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
    shares = max(1, min(_PROGRAMS // (R * K * pieces), S // (_BLOCKS * block)))
    arrays = (layer.reshape(1), start_R, length_R, q_RKQH, *jax.tree.leaves((k_LRKSH, v_LRKSH)))
    made = (
        # What several found is rounded once it is one.
        jax.ShapeDtypeStruct((shares, R, K, Q, H), q_RKQH.dtype if shares == 1 else jnp.float32),
        jax.ShapeDtypeStruct((shares, R, K, Q), jnp.float32),
    )
    # Whole arrays: each program takes what it needs of them.
    whole = lambda x: pl.BlockSpec(x.shape, lambda r, h, piece, share: (0,) * x.ndim)
    outs, lses = pl.pallas_call(
        functools.partial(_kernel, block=block, queries=queries, shares=shares),
        grid=(R, K, pieces, shares),
        in_specs=[*map(whole, arrays)],
        out_specs=[*map(whole, made)],
        out_shape=made,
        # Few queries wait for memory, and are worked on by few threads so that many programs wait at once.
        compiler_params=pltriton.CompilerParams(num_warps=queries // 8, num_stages=3),
        interpret=interpret,
        name="flash_decode",
    )(*arrays)
    out = merge_attention(list(outs), list(lses)).astype(q_RKQH.dtype)
    return out, lses[0] if shares == 1 else jnp.maximum(jax.nn.logsumexp(lses, axis=0), MASKED)


def _kernel(layer_ref, start_ref, length_ref, q_ref, *refs, block, queries, shares):
    *stacks, out_ref, lse_ref = refs
    r, h, piece, share = map(pl.program_id, range(4))
    layer, start, length = layer_ref[0], start_ref[r], length_ref[r]
    slots, H = stacks[0].shape[3:]
    blocks = blocks_read(start, length, slots, block)
    each = (blocks + shares - 1) // shares
    own = pl.ds(piece * queries, queries)
    there_Q = piece * queries + jnp.arange(queries) < q_ref.shape[2]
    q_QH = pltriton.load(q_ref.at[r, h, own, :], mask=there_Q[:, None], other=0.0)

    def read(refs, first, held_S):
        """A block's numbers and, of what is rounded, the scale of each slot. What does not count does not leave memory,
        though its block is worked on."""
        here = pl.ds(first, block)
        numbers_SH = pltriton.load(refs[0].at[layer, r, h, here, :], mask=held_S[:, None], other=0).astype(q_QH.dtype)
        if len(refs) == 1:
            return numbers_SH, None
        return numbers_SH, pltriton.load(refs[1].at[layer, r, h, jnp.int32(0), here], mask=held_S, other=0)

    def one(i, carry):
        sum_QH, top_Q, total_Q = carry
        first = (start // block + i) % (slots // block) * block
        half = len(stacks) // 2
        age_S = first + jnp.arange(block) - start
        held_S = jnp.where(age_S < 0, age_S + slots, age_S) < length
        (k_SH, k_scale_S), (v_SH, v_scale_S) = (read(refs, first, held_S) for refs in (stacks[:half], stacks[half:]))
        scores_QS = pltriton.dot(q_QH, k_SH, trans_b=True)
        scores_QS = scores_QS if k_scale_S is None else scores_QS * k_scale_S[None]
        scores_QS = jnp.where(held_S[None], scores_QS, MASKED)
        new_Q = jnp.maximum(top_Q, jnp.max(scores_QS, axis=1))
        weights_QS = jnp.where(held_S[None], jnp.exp(scores_QS - new_Q[:, None]), 0.0)
        shrunk_Q = jnp.exp(top_Q - new_Q)
        total_Q = total_Q * shrunk_Q + jnp.sum(weights_QS, axis=1)
        weights_QS = weights_QS if v_scale_S is None else weights_QS * v_scale_S[None]
        return sum_QH * shrunk_Q[:, None] + pltriton.dot(weights_QS.astype(v_SH.dtype), v_SH), new_Q, total_Q

    zeros_Q = jnp.zeros(queries, jnp.float32)
    begin = (jnp.zeros((queries, H), jnp.float32), jnp.full(queries, MASKED, jnp.float32), zeros_Q)
    end = jnp.minimum((share + 1) * each, blocks)
    sum_QH, top_Q, total_Q = jax.lax.fori_loop(share * each, end, one, begin)
    none_Q = total_Q == 0
    divisor_Q = jnp.where(none_Q, 1.0, total_Q)
    lse_Q = jnp.where(none_Q, MASKED, top_Q + jnp.log(divisor_Q))
    out_QH = (sum_QH / divisor_Q[:, None]).astype(out_ref.dtype)
    pltriton.store(out_ref.at[share, r, h, own, :], out_QH, mask=there_Q[:, None])
    pltriton.store(lse_ref.at[share, r, h, own], lse_Q, mask=there_Q)
