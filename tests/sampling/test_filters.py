"""Membership in the nucleus against its definition by sorting, and the draw against exact probabilities."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from srlm_jax.sampling import filters
from srlm_jax.sampling.filters import UNDRAWN

draw = jax.jit(filters.draw, static_argnames=("temperature", "top_p"))


@functools.partial(jax.jit, static_argnames="top_p")
def nucleus(probs_BV, top_p):
    """Every token asked for by itself; the probabilities of those that are in it, 0 for the others."""
    ask = lambda token: filters.in_nucleus(probs_BV, jnp.full(probs_BV.shape[0], token), top_p)
    return jnp.where(jax.lax.map(ask, jnp.arange(probs_BV.shape[1])).T, probs_BV, 0)


def keys(n):
    return jax.random.split(jax.random.key(0), n)


def sorted_nucleus(probs, top_p):
    """The definition: add the most probable until their mass reaches top_p; the last one's equals come too."""
    descending = np.sort(probs)[::-1].astype(np.float64)
    count = 1 + int(np.argmax(np.cumsum(descending) >= top_p * descending.sum()))
    return np.where(probs >= descending[count - 1], probs, 0)


# Small integers and thresholds of eighths make every sum exact, so that a mass that just reaches top_p does reach it.
@settings(deadline=None, max_examples=300)
@given(st.lists(st.integers(0, 6), min_size=12, max_size=12).filter(any), st.integers(1, 8))
def test_the_nucleus_is_the_one_found_by_sorting_with_ties(weights, eighths):
    probs = np.array(weights, np.float32)
    found = nucleus(jnp.array(probs)[None], eighths / 8)[0]
    np.testing.assert_array_equal(found, sorted_nucleus(probs, eighths / 8))


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 0.99])
def test_the_nucleus_of_many_unlike_rows_is_the_one_found_by_sorting(top_p):
    logits = np.random.default_rng(0).standard_normal((16, 1000)) * np.linspace(0.1, 9, 16)[:, None]
    probs = np.asarray(jax.nn.softmax(jnp.array(logits, jnp.float32), axis=-1))
    found = np.asarray(nucleus(jnp.array(probs), top_p))
    for row, kept in zip(probs, found, strict=True):
        np.testing.assert_array_equal(kept, sorted_nucleus(row, top_p))


def test_the_nucleus_by_hand():
    probs = jnp.array([[0.1, 0.5, 0.15, 0.25], [0.25, 0.25, 0.25, 0.25]])
    np.testing.assert_array_equal(nucleus(probs, 0.75), [[0, 0.5, 0, 0.25], [0.25, 0.25, 0.25, 0.25]])
    np.testing.assert_array_equal(nucleus(probs, 0.8)[0], np.array([0, 0.5, 0.15, 0.25], np.float32))


def test_a_top_p_of_1_keeps_every_token():
    probs = jax.nn.softmax(jax.random.normal(jax.random.key(0), (8, 500)), axis=-1)
    np.testing.assert_array_equal(nucleus(probs, 1.0), probs)


@pytest.mark.parametrize("top_p", [1e-6, 0.5, 1.0])
def test_a_certain_token_is_its_own_nucleus(top_p):
    probs = jnp.eye(5)[jnp.array([3, 0])]
    np.testing.assert_array_equal(nucleus(probs, top_p), probs)


def test_the_tiniest_top_p_keeps_the_most_probable_token_alone():
    probs = jnp.array([[0.2, 0.5, 0.3]])
    np.testing.assert_array_equal(nucleus(probs, 1e-6), [[0, 0.5, 0]])


def test_temperature_0_takes_the_most_probable_token_whatever_the_key():
    logits = jnp.array([[0.0, 2.0, 1.0], [5.0, 4.0, 5.0]])
    for key in keys(20):
        assert draw(logits, jnp.stack([key, key]), temperature=0.0, top_p=0.9).tolist() == [1, 0]


LOGITS = np.array([2.0, 1.5, 1.5, 1.0, 0.0, -1.0, -2.0, -20.0], np.float32)
DRAWS = 40_000


def frequencies(temperature, top_p):
    drawn = draw(jnp.broadcast_to(LOGITS, (DRAWS, 8)), keys(DRAWS), temperature=temperature, top_p=top_p)
    return np.bincount(drawn, minlength=8)


def probabilities(temperature, top_p):
    exponentials = np.exp(LOGITS.astype(np.float64) / temperature)
    kept = sorted_nucleus(exponentials / exponentials.sum(), top_p)
    return kept / kept.sum()


@pytest.mark.parametrize(("temperature", "top_p", "kept"), [(0.7, 0.9, 4), (1.0, 1.0, 8), (2.0, 0.5, 3)])
def test_tokens_come_as_often_as_their_probability_says(temperature, top_p, kept):
    """A chi-square test. With another seed a correct sampler fails once in a million times; with this one, never."""
    counts, expected = frequencies(temperature, top_p), DRAWS * probabilities(temperature, top_p)
    assert (expected > 0).sum() == kept
    assert counts[expected == 0].sum() == 0
    likely = expected > 5
    statistic = ((counts - expected)[likely] ** 2 / expected[likely]).sum()
    assert statistic < stats.chi2.isf(1e-6, likely.sum() - 1)


def test_that_chi_square_test_notices_a_slightly_wrong_temperature():
    counts, expected = frequencies(0.75, 0.9), DRAWS * probabilities(0.7, 0.9)
    likely = expected > 5
    assert ((counts - expected)[likely] ** 2 / expected[likely]).sum() > stats.chi2.isf(1e-6, likely.sum() - 1)


@pytest.mark.parametrize("V", [1, 7, 96, 320])
def test_every_token_of_a_vocabulary_of_any_size_is_drawn(V):
    """Alike probable, a token fails to come in 40 V draws once in e^40."""
    n = 40 * V
    drawn = draw(jnp.zeros((n, V)), keys(n), temperature=1.0, top_p=1.0)
    assert set(drawn.tolist()) == set(range(V))


def test_logits_that_are_not_finite_end_the_draw_and_harm_no_other_row():
    logits = jnp.array([[0.0, jnp.nan, 1.0], [jnp.inf, 0.0, 1.0], [-jnp.inf, 9.0, -jnp.inf]])
    assert draw(logits, keys(3), temperature=0.7, top_p=0.9).tolist() == [UNDRAWN, UNDRAWN, 1]
    assert draw(logits, keys(3), temperature=0.0, top_p=0.9).tolist() == [UNDRAWN, UNDRAWN, 1]


@pytest.mark.parametrize("temperature", [1e-45, 1e-40, 1e-30, 1e-6])
def test_the_lowest_temperatures_take_the_most_probable_token(temperature):
    """Logits that were divided by them first became infinite, and the token 0."""
    logits = jnp.array([[100.0, 300.0, 200.0], [-3e4, -1e4, -2e4]])
    assert draw(logits, keys(2), temperature=temperature, top_p=0.9).tolist() == [1, 1]


@pytest.mark.parametrize("top_p", [0.0, 1e-50, 1e-46])
def test_a_top_p_too_small_for_float32_ends_too(top_p):
    """Nothing was in the nucleus, and the draw went on for ever."""
    logits = jnp.array([[0.0, 2.0, 1.0]])
    assert draw(logits, keys(1), temperature=0.7, top_p=top_p).tolist() == [1]


def test_a_row_s_token_depends_on_its_logits_and_key_alone():
    logits = jax.random.normal(jax.random.key(1), (30, 50))
    drawn = draw(logits, keys(30), temperature=0.7, top_p=0.9)
    turned = draw(logits[::-1], keys(30)[::-1], temperature=0.7, top_p=0.9)
    assert turned.tolist() == drawn.tolist()[::-1]
    assert len(set(draw(logits[:1].repeat(30, axis=0), keys(30), temperature=0.7, top_p=0.9).tolist())) > 1
