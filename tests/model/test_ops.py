"""The mathematics of a block against hand-worked values and plain definitions."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from srlm_jax.model import ops
from srlm_jax.model.config import RopeScaling


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def plain_attention(q_BNTH, k_BKSH, v_BKSH, mask_BTS):
    """Softmax attention as it is defined: every query head gets its own copy of its key-value head."""
    repeats = q_BNTH.shape[1] // k_BKSH.shape[1]
    k, v = jnp.repeat(k_BKSH, repeats, axis=1), jnp.repeat(v_BKSH, repeats, axis=1)
    scores = jnp.einsum("bnth,bnsh->bnts", q_BNTH, k) / math.sqrt(q_BNTH.shape[-1])
    weights = jax.nn.softmax(jnp.where(mask_BTS[:, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("bnts,bnsh->bnth", weights, v)


def test_rms_norm_by_hand():
    # The mean square of (3, 4) is 12.5.
    found = ops.rms_norm(jnp.array([[3.0, 4.0]]), jnp.array([1.0, 2.0]), 0.0)
    np.testing.assert_allclose(found, [[3 / math.sqrt(12.5), 2 * 4 / math.sqrt(12.5)]], rtol=1e-6)


def test_rms_norm_adds_eps_to_the_mean_square():
    np.testing.assert_allclose(ops.rms_norm(jnp.array([1.0, 1.0]), jnp.ones(2), 3.0), [0.5, 0.5], rtol=1e-6)
    np.testing.assert_array_equal(ops.rms_norm(jnp.zeros(2), jnp.ones(2), 1e-5), [0.0, 0.0])


def test_rms_norm_of_bfloat16_takes_its_mean_in_float32():
    # In bfloat16, 1e20 squared is fine but 4096 ones cannot be added: their sum stops at 256.
    found = ops.rms_norm(jnp.ones(4096, jnp.bfloat16), jnp.ones(4096, jnp.bfloat16), 0.0)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found.astype(jnp.float32), np.ones(4096))


def test_rope_by_hand():
    # Head width 4 and theta 100: pair 0 turns by position, pair 1 by position / 10. Element i is paired with i + 2.
    cos, sin = ops.rope_angles(jnp.array([[3]]), 4, 100.0, None)
    np.testing.assert_allclose(cos, [[[math.cos(3), math.cos(0.3)]]], rtol=1e-6)
    np.testing.assert_allclose(sin, [[[math.sin(3), math.sin(0.3)]]], rtol=1e-6)
    found = ops.rotate(jnp.array([1.0, 10.0, 0.0, 0.0]).reshape(1, 1, 1, 4), cos, sin)
    wanted = [math.cos(3), 10 * math.cos(0.3), math.sin(3), 10 * math.sin(0.3)]
    np.testing.assert_allclose(found.reshape(4), wanted, rtol=1e-6)


def test_rope_leaves_position_0_alone():
    x = normal(0, 1, 2, 3, 8)
    np.testing.assert_array_equal(ops.rotate(x, *ops.rope_angles(jnp.zeros((1, 3), int), 8, 100.0, None)), x)


def test_rope_scores_depend_on_the_distance_alone():
    q, k = normal(0, 1, 1, 1, 8), normal(1, 1, 1, 1, 8)

    def score(query_position, key_position):
        turned = [
            ops.rotate(x, *ops.rope_angles(jnp.array([[position]]), 8, 100.0, None))
            for x, position in ((q, query_position), (k, key_position))
        ]
        return float((turned[0] * turned[1]).sum())

    assert score(7, 4) == pytest.approx(score(103, 100), rel=1e-4)
    assert score(7, 4) != pytest.approx(score(7, 5), rel=1e-2)


def test_rope_scaling_by_hand():
    # Head width 8, theta 10^4: pairs turn by 1, 0.1, 0.01 and 0.001 a position, so 100, 10, 1 and 0.1 times in 200 pi
    # positions. More than 4 turns are kept, fewer than 1 become 8 times slower; here 10 is kept for being more than 4.
    scaling = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=628)
    cos, sin = ops.rope_angles(jnp.array([[1]]), 8, 10_000.0, scaling)
    found = np.arctan2(sin, cos)[0, 0]
    np.testing.assert_allclose(found, [1, 0.1, 0.01 / 8, 0.001 / 8], rtol=2e-3)
    # Half way between 1 and 19 turns, half of the angle is kept and half slowed down.
    scaling = dataclasses.replace(scaling, high_freq_factor=19.0)
    cos, sin = ops.rope_angles(jnp.array([[1]]), 8, 10_000.0, scaling)
    assert np.arctan2(sin, cos)[0, 0, 1] == pytest.approx(0.1 / 2 + 0.1 / 8 / 2, rel=2e-3)


def test_swiglu_by_hand():
    # x gate = 1, x up = 6; silu(1) = 1 / (1 + 1/e).
    found = ops.swiglu(
        jnp.array([[[1.0, 2.0]]]), jnp.array([[1.0], [0.0]]), jnp.array([[0.0], [3.0]]), jnp.array([[2.0, -1.0]])
    )
    silu = 1 / (1 + math.exp(-1))
    np.testing.assert_allclose(found, [[[12 * silu, -6 * silu]]], rtol=1e-6)


def test_attention_by_hand():
    # One query of head width 4: scores 2 * log(3) / sqrt(4) = log 3 and 0, so weights 3/4 and 1/4.
    q, k = jnp.array([2 * math.log(3), 0, 0, 0]).reshape(1, 1, 1, 4), jnp.eye(2, 4).reshape(1, 1, 2, 4)
    v = jnp.array([[4.0, 0, 0, 0], [8.0, 0, 0, 0]]).reshape(1, 1, 2, 4)
    out, lse = ops.attend(q, k, v, jnp.ones((1, 1, 1, 2), bool))
    np.testing.assert_allclose(out[0, 0, 0], [5.0, 0, 0, 0], rtol=1e-6)
    np.testing.assert_allclose(lse, [[[math.log(4)]]], rtol=1e-6)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
def test_attention_is_the_plain_definition(heads):
    N, K = heads
    q, k, v = normal(0, 2, N, 3, 8), normal(1, 2, K, 5, 8), normal(2, 2, K, 5, 8)
    mask = jnp.tril(jnp.ones((3, 5), bool), 2)[None].repeat(2, axis=0).at[1, :, 0].set(False)
    out, _ = ops.attend(q, k, v, mask[:, None])
    np.testing.assert_allclose(out, plain_attention(q, k, v, mask), rtol=1e-5, atol=1e-6)


def test_siblings_read_the_keys_of_their_row():
    # Four rows in two groups of two: row b reads keys b // 2. Each row has its own mask.
    q, k, v = normal(0, 4, 4, 3, 8), normal(1, 2, 2, 5, 8), normal(2, 2, 2, 5, 8)
    mask = jax.random.bernoulli(jax.random.key(3), 0.6, (4, 3, 5)).at[:, :, 0].set(True)
    out, _ = ops.attend(q, k, v, mask.reshape(2, 2, 3, 5))
    wanted = plain_attention(q, jnp.repeat(k, 2, axis=0), jnp.repeat(v, 2, axis=0), mask)
    np.testing.assert_allclose(out, wanted, rtol=1e-5, atol=1e-6)


def test_merged_attention_is_attention_over_the_union():
    q, k, v = normal(0, 2, 4, 3, 8), normal(1, 2, 2, 9, 8), normal(2, 2, 2, 9, 8)
    mask = jax.random.bernoulli(jax.random.key(3), 0.5, (2, 3, 9)).at[:, :, 0].set(True)
    cuts = (slice(0, 4), slice(4, 5), slice(5, 9))
    parts = [ops.attend(q, k[:, :, cut], v[:, :, cut], mask[:, None, :, cut]) for cut in cuts]
    merged = ops.merge_attention(*map(list, zip(*parts, strict=True)))
    np.testing.assert_allclose(merged, plain_attention(q, k, v, mask), rtol=1e-5, atol=1e-6)


def test_a_part_with_nothing_to_attend_to_has_no_weight():
    q, k, v = normal(0, 1, 2, 3, 8), normal(1, 1, 2, 4, 8), normal(2, 1, 2, 4, 8)
    full = ops.attend(q, k, v, jnp.ones((1, 1, 3, 4), bool))
    nothing = ops.attend(q, k, 1e6 * v, jnp.zeros((1, 1, 3, 4), bool))
    merged = ops.merge_attention([full[0], nothing[0]], [full[1], nothing[1]])
    np.testing.assert_array_equal(merged, full[0])


def test_attention_to_nothing_has_finite_gradients():
    q, k, v = normal(0, 1, 2, 3, 8), normal(1, 1, 2, 4, 8), normal(2, 1, 2, 4, 8)
    gradient = jax.grad(lambda q: ops.attend(q, k, v, jnp.zeros((1, 1, 3, 4), bool))[0].sum())(q)
    assert np.isfinite(gradient).all()


def test_dropout_drops_its_share_and_keeps_the_mean():
    dropped = np.asarray(ops.Dropout(0.25, jax.random.key(0))(jnp.full((400, 400), 3.0)))
    assert sorted(set(dropped.ravel().tolist())) == [0.0, 4.0]
    # 160,000 coins: the standard deviation of the share is 0.0011, and 6 of them are never exceeded.
    assert abs((dropped == 0).mean() - 0.25) < 0.0065
    assert abs(dropped.mean() - 3) < 4 * 0.0065


def test_dropout_depends_on_its_key_alone():
    x, dropout = jnp.ones(64), ops.Dropout(0.5, jax.random.key(0))
    np.testing.assert_array_equal(dropout(x), dropout(x))
    assert (dropout.fold(0)(x) != dropout.fold(1)(x)).any()
    assert dropout.fold(1).rate == 0.5


def test_dropout_of_attention_drops_its_share_of_probabilities_and_keeps_the_mean():
    # 4,000 equal probabilities and values of 1: the output of a query is the share that is kept over 1 - rate.
    q, k, v = jnp.zeros((1, 1, 300, 4)), jnp.ones((1, 1, 4_000, 4)), jnp.ones((1, 1, 4_000, 4))
    out, lse = ops.attend(q, k, v, jnp.ones((1, 1, 1, 4_000), bool), ops.Dropout(0.25, jax.random.key(0)))
    # Of 4,000 coins: a standard deviation of 0.0091 for a query, and 0.00053 for the mean of 300.
    assert abs(float(out.mean()) - 1) < 6 * 0.00053
    assert abs(float(out[..., 0].std()) / 0.0091 - 1) < 0.25
    np.testing.assert_allclose(lse, math.log(4_000), rtol=1e-6)


def test_dropout_of_attention_is_the_definition():
    q, k, v = normal(0, 1, 2, 3, 8), normal(1, 1, 2, 5, 8), normal(2, 1, 2, 5, 8)
    dropout = ops.Dropout(0.4, jax.random.key(3))
    kept = dropout(jnp.ones((1, 2, 3, 5)))
    probabilities = jax.nn.softmax(jnp.einsum("bnth,bnsh->bnts", q, k) * 8**-0.5, axis=-1)
    wanted = jnp.einsum("bnts,bnsh->bnth", probabilities * kept, v)
    found, _ = ops.attend(q, k, v, jnp.ones((1, 1, 3, 5), bool), dropout)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("jit", [False, True], ids=["an operation at a time", "compiled"])
def test_products_of_16_bits_and_their_gradients_are_those_of_32_rounded(jit):
    """x w and both gradients, 300 rows: sums are made in 32 bits, so only the result is rounded."""
    x, w, g = (
        jax.random.normal(jax.random.key(i), shape, jnp.bfloat16)
        for i, shape in enumerate([(3, 100, 48), (48, 40), (3, 100, 40)])
    )

    def both(x, w, g):
        out, back = jax.vjp(ops.linear, x, w)
        return out, *back(g)

    found = (jax.jit(both) if jit else both)(x, w, g)
    with jax.default_matmul_precision("highest"):
        wanted = both(*(a.astype(jnp.float32) for a in (x, w, g)))
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == jnp.bfloat16
        np.testing.assert_allclose(one.astype(jnp.float32), other, rtol=2**-8, atol=2**-8 * 20)
