"""Attention of one new token a row, as a kernel for TPUs: it reads the slots that hold something and no others.

XLA's own attention reads whole levels of a cache, however little of them is used, and copies a level before it hands it
to any kernel. Here the stack of all layers stays where it is, and blocks of one layer's slots come to the chip while
those before them are worked on (flash decoding; a softmax is taken piece by piece: Milakov and Gimelshein, arXiv
1805.02867). Rows that read the same keys are so many more queries of one matrix product (Hydragen, arXiv 2402.05099).
What is kept in 8 bits is not multiplied out: a score counts the key's scale, and a weight the value's.

Axes: L layers, R rows of a level, K key-value heads, Q queries that read one row's keys of one head, S slots, H head
width.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from srlm_jax.model.int8 import Slots
from srlm_jax.model.ops import MASKED

# What the kernel's arrays may take of a chip's fast memory, of which the compiler gives a kernel 16 MiB.
_FAST_BYTES = 8 * 2**20
_BLOCK_BYTES = 2**18
_LANES = 128  # what the last axis of an array is filled up to there
_WHOLE = 1_024  # slots of a row that are read at once at most


def block_size(slots: int, slot_bytes: int) -> int | None:
    """Slots that are read at once, `slot_bytes` of keys each: a power of two that divides the level into pieces, large
    enough to keep memory busy and no larger, since the last block is read whole; None: none that a TPU likes."""
    return next((n for n in (128, 64, 32, 16) if slots % n == 0 and (n == 16 or n * slot_bytes <= _BLOCK_BYTES)), None)


def block_of(stack: jax.Array | Slots) -> int | None:
    """Slots of a stack [..., R, K, S, H] that are read at once; None: none that a TPU likes. In 8 bits their scales lie
    along the lanes of a register, so that whole registers are read, or all of a row."""
    K, S, H = stack.shape[-3:]
    if not isinstance(stack, Slots):
        return block_size(S, K * H * stack.dtype.itemsize)
    if S % _LANES == 0:
        return _LANES
    return S if S % 32 == 0 and S <= _WHOLE else None


def blocks_read(start: Int[Array, "..."], length: Int[Array, "..."], slots: int, block: int) -> Int[Array, "..."]:
    """How many blocks hold the `length` slots from `start` on, around the ring."""
    return jnp.where(length > 0, jnp.minimum((start % block + length + block - 1) // block, slots // block), 0)


def flash_decode(
    q_RKQH: Float[Array, "R K Q H"],
    k_LRKSH: Float[Array, "L R K S H"] | Slots,
    v_LRKSH: Float[Array, "L R K S H"] | Slots,
    layer: Int[Array, ""],
    start_R: Int[Array, "R"],
    length_R: Int[Array, "R"],
    *,
    interpret: bool | pltpu.InterpretParams = False,
) -> tuple[Float[Array, "R K Q H"], Float[Array, "R K Q"]]:
    """Attention over `length_R` slots from `start_R` on, modulo S, and the log-sum-exp of its scores in float32.

    Where a row has no slot to read its log-sum-exp is MASKED, and its output 0. The queries are scaled already.
    """
    R, K, Q, H = q_RKQH.shape
    S = k_LRKSH.shape[3]
    block = block_of(k_LRKSH)
    scaled = isinstance(k_LRKSH, Slots)
    # Keys and values, queries and outputs are there twice, one being moved; sums, and some arrays of scores, once; and
    # of what is rounded a copy in the type that is computed in.
    wide = k_LRKSH.dtype.itemsize + (q_RKQH.dtype.itemsize if scaled else 0)
    per_query = (4 * q_RKQH.dtype.itemsize + 4) * H + 4 * 4 * _LANES + 3 * 4 * max(block, _LANES)
    per_head = 4 * block * H * wide + -(-Q // 16) * 16 * per_query
    heads = next(n for n in range(K, 0, -1) if K % n == 0 and (n == 1 or n * per_head <= _FAST_BYTES))

    def queries(r, h, i, *_):
        return r, h, 0, 0

    def keys(r, h, i, layer, start, length):
        # Behind the last block it stays where it is, and nothing more is read.
        last = jnp.maximum(blocks_read(start[r], length[r], S, block) - 1, 0)
        return layer[0], r, h, (start[r] // block + jnp.minimum(i, last)) % (S // block), 0

    def scales(*indices):
        layer, r, h, i, _ = keys(*indices)
        return layer, r, h, 0, i

    stacks = jax.tree.leaves((k_LRKSH, v_LRKSH))
    if not interpret:
        # Where fast memory has room, the compiler would bring all layers of a small level there for each of them.
        stacks = [pltpu.with_memory_space_constraint(stack, pltpu.HBM) for stack in stacks]
    of_keys = pl.BlockSpec((1, 1, heads, block, H), keys)
    of_scales = [pl.BlockSpec((1, 1, heads, 1, block), scales)] if scaled else []
    out, lse = pl.pallas_call(
        functools.partial(_kernel, slots=S),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(R, K // heads, S // block),
            in_specs=[pl.BlockSpec((1, heads, Q, H), queries), *2 * [of_keys, *of_scales]],
            out_specs=[pl.BlockSpec((1, heads, Q, H), queries), pl.BlockSpec((1, heads, Q, 1), queries)],
            scratch_shapes=[
                pltpu.VMEM((heads, Q, H), jnp.float32),
                pltpu.VMEM((heads, Q, 1), jnp.float32),
                pltpu.VMEM((heads, Q, 1), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((R, K, Q, H), q_RKQH.dtype),
            jax.ShapeDtypeStruct((R, K, Q, 1), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
        name="flash_decode",
    )(layer.reshape(1), start_R, length_R, q_RKQH, *stacks)
    return out, lse[..., 0]


def _kernel(layer, start, length, q_ref, *refs, slots: int):
    del layer
    *keys_and_values, out_ref, lse_ref, sum_ref, top_ref, total_ref = refs
    if len(keys_and_values) == 2:
        (k_ref, v_ref), k_scale_ref, v_scale_ref = keys_and_values, None, None
    else:
        k_ref, k_scale_ref, v_ref, v_scale_ref = keys_and_values
    r, i = pl.program_id(0), pl.program_id(2)
    block = k_ref.shape[3]

    @pl.when(i == 0)
    def _():
        sum_ref[...] = jnp.zeros(sum_ref.shape, jnp.float32)
        top_ref[...] = jnp.full(top_ref.shape, MASKED, jnp.float32)
        total_ref[...] = jnp.zeros(total_ref.shape, jnp.float32)

    @pl.when(i < blocks_read(start[r], length[r], slots, block))
    def _():
        q_KQH = q_ref[0]
        k_KSH, v_KSH = (ref[0, 0] if k_scale_ref is None else ref[0, 0].astype(q_KQH.dtype) for ref in (k_ref, v_ref))
        over_heads = lambda a, b, axis: jax.lax.dot_general(
            a, b, (((2,), (axis,)), ((0,), (0,))), preferred_element_type=jnp.float32
        )
        scores_KQS = over_heads(q_KQH, k_KSH, 2)
        if k_scale_ref is not None:
            scores_KQS *= k_scale_ref[0, 0]
        first = (start[r] // block + i) % (slots // block) * block
        age_KQS = first + jax.lax.broadcasted_iota(jnp.int32, scores_KQS.shape, 2) - start[r]
        age_KQS = jnp.where(age_KQS < 0, age_KQS + slots, age_KQS)
        scores_KQS = jnp.where(age_KQS < length[r], scores_KQS, MASKED)
        old_KQ1 = top_ref[...]
        top_KQ1 = jnp.maximum(old_KQ1, jnp.max(scores_KQS, axis=-1, keepdims=True))
        weights_KQS = jnp.where(age_KQS < length[r], jnp.exp(scores_KQS - top_KQ1), 0)
        shrunk_KQ1 = jnp.exp(old_KQ1 - top_KQ1)
        top_ref[...] = top_KQ1
        total_ref[...] = total_ref[...] * shrunk_KQ1 + jnp.sum(weights_KQS, axis=-1, keepdims=True)
        if v_scale_ref is not None:
            weights_KQS *= v_scale_ref[0, 0]
        sum_ref[...] = sum_ref[...] * shrunk_KQ1 + over_heads(weights_KQS.astype(v_KSH.dtype), v_KSH, 1)

    @pl.when(i == pl.num_programs(2) - 1)
    def _():
        total_KQ1 = total_ref[...]
        none_KQ1 = total_KQ1 == 0
        out_ref[0] = jnp.where(none_KQ1, 0, sum_ref[...] / jnp.where(none_KQ1, 1, total_KQ1)).astype(out_ref.dtype)
        lse_ref[0] = jnp.where(none_KQ1, MASKED, top_ref[...] + jnp.log(jnp.where(none_KQ1, 1, total_KQ1)))
