"""The kernels for packed rows on GPUs, interpreted, against plain attention; and that they read nothing for nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from srlm_jax.model import attention, flash_triton
from srlm_jax.model.attention import CAUSAL, alone
from srlm_jax.model.flash_triton import BLOCKS, Block, Blocks

# Each kernel has more queries than keys in one of them, and more keys than queries in the other.
SMALL = Blocks(forward=Block(32, 16, 4, 2), of_keys=Block(16, 32, 4, 2), of_queries=Block(16, 32, 4, 2))
OTHER = Blocks(forward=Block(16, 32, 4, 2), of_keys=Block(32, 16, 4, 2), of_queries=Block(32, 16, 4, 2))


def normal(seed, shape, dtype):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def rows(*lengths):
    """Documents of these lengths, in no order of numbers; what has the number 0 is padding."""
    return jnp.array([np.concatenate([np.full(length, number) for number, length in row]) for row in lengths])


def outputs_and_gradients(attend, q, k, v, weights):
    def total(q, k, v):
        out = attend(q, k, v)
        return jnp.sum(out.astype(jnp.float32) * weights), out

    (_, out), gradients = jax.value_and_grad(total, (0, 1, 2), has_aux=True)(q, k, v)
    return out, *gradients


CASES = {
    "documents longer and shorter than a block, and an empty row": (
        (4, 2, 96, 16), SMALL, "float32", rows([(3, 5), (9, 50), (2, 37), (0, 4)], [(0, 96)]),
    ),
    "a last block that is not full": ((2, 1, 77, 16), OTHER, "float32", rows([(1, 33), (2, 1), (7, 40), (0, 3)])),
    "heads that share no keys": ((2, 2, 64, 32), SMALL, "float32", rows([(1, 31), (2, 33)])),
    "fewer tokens than a block has": ((2, 1, 9, 16), BLOCKS, "float32", rows([(1, 4), (2, 3), (0, 2)])),
    "16 bits": ((4, 1, 70, 32), OTHER, "bfloat16", rows([(4, 40), (5, 30)])),
}  # fmt: skip


@pytest.mark.parametrize(("shape", "blocks", "dtype", "segments"), CASES.values(), ids=CASES)
def test_outputs_and_gradients_are_those_of_plain_attention(shape, blocks, dtype, segments):
    (N, K, T, H), B = shape, len(segments)
    q, k, v = (normal(seed, (B, heads, T, H), dtype) for seed, heads in enumerate((N, K, K)))
    weights = normal(3, q.shape, jnp.float32)
    readable = dataclasses.replace(CAUSAL, segments_BT=segments)
    found = outputs_and_gradients(
        lambda *arrays: flash_triton.flash_attention(*arrays, segments, blocks=blocks, interpret=True), q, k, v, weights
    )
    exact = (x.astype(jnp.float32) for x in (q, k, v))
    wanted = outputs_and_gradients(
        lambda q, k, v: attention.plain(q, alone(k, v, readable), with_lse=False)[0], *exact, weights
    )
    close = 2e-5 if dtype == "float32" else 4e-2
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape and one.dtype == dtype
        np.testing.assert_allclose(one.astype(jnp.float32), other, rtol=close, atol=close)


def test_no_block_of_other_documents_is_read():
    """All that the second of three documents has nothing to do with is NaN, which any use of it would spread."""
    segments = rows([(1, 64), (2, 64), (3, 64)])
    shape, own = (1, 2, 192, 16), np.s_[:, :, 64:128]
    clean = [normal(seed, shape, "float32") for seed in range(4)]
    poisoned = [jnp.full(shape, jnp.nan).at[own].set(x[own]) for x in clean]
    attend = lambda q, k, v: flash_triton.flash_attention(q, k, v, segments, blocks=SMALL, interpret=True)
    found, wanted = (
        (out, *vjp(weights))
        for (out, vjp), weights in ((jax.vjp(attend, *arrays[:3]), arrays[3]) for arrays in (poisoned, clean))
    )
    for one, other in zip(found, wanted, strict=True):
        assert np.isnan(one[:, :, :64]).all() and np.isnan(one[:, :, 128:]).all()
        np.testing.assert_array_equal(one[own], other[own])


def test_where_documents_begin_and_end():
    first, last = flash_triton.extents(jnp.array([[7, 7, 7, 4, 4, 0], [0] * 6, [1, 2, 2, 2, 2, 2]]))
    assert first.tolist() == [[0, 0, 0, 3, 3, 5], [0] * 6, [0, 1, 1, 1, 1, 1]]
    assert last.tolist() == [[2, 2, 2, 4, 4, 5], [5] * 6, [0, 5, 5, 5, 5, 5]]


def test_a_block_is_no_larger_than_what_holds_a_row():
    within = lambda length: dataclasses.astuple(Block(128, 64, 8, 3).within(length))
    assert [within(length)[:2] for length in (1, 16, 17, 100, 4096)] == [
        (16, 16), (16, 16), (32, 32), (128, 64), (128, 64),
    ]  # fmt: skip
