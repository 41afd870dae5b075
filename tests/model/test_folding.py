"""Rows in which documents share their beginnings: the way there and back, and its gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from srlm_jax.model.folding import Folding

# Tokens 0 and 1 begin both documents, 2 and 3 are the first one's, 4 the second one's, 5 is padding.
FOLDING = Folding(
    source_BU=jnp.array([[0, 1, 2, 3, 0, 1, 4, 0]]),
    first_BT=jnp.array([[0, 1, 2, 3, 6, -1]]),
    second_BT=jnp.array([[4, 5, -1, -1, -1, -1]]),
    segments_BU=jnp.array([[1, 1, 1, 1, 2, 2, 2, 0]]),
)
X = jax.random.normal(jax.random.key(0), (1, 6, 3))
WIDE = jax.random.normal(jax.random.key(1), (1, 8, 3))


def test_unfolded_a_token_is_at_all_of_its_positions():
    assert FOLDING.unfold(X)[0, :7].tolist() == X[0, jnp.array([0, 1, 2, 3, 0, 1, 4])].tolist()


def test_folded_a_token_has_what_its_first_position_has():
    assert FOLDING.fold(WIDE)[0].tolist() == [*WIDE[0, jnp.array([0, 1, 2, 3, 6])].tolist(), [0.0] * 3]


def test_folding_undoes_unfolding():
    np.testing.assert_array_equal(FOLDING.fold(FOLDING.unfold(X))[:, :5], X[:, :5])


def test_what_a_token_gets_back_is_the_sum_over_its_positions_but_nothing_of_padding():
    _, back = jax.vjp(FOLDING.unfold, X)
    (found,) = back(WIDE)
    (wanted,) = jax.vjp(lambda x: x[:, jnp.array([0, 1, 2, 3, 0, 1, 4])], X)[1](WIDE[:, :7])
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_what_positions_get_back_is_their_tokens_where_it_was_taken_from():
    _, back = jax.vjp(FOLDING.fold, WIDE)
    (found,) = back(X)
    (wanted,) = jax.vjp(lambda x: x[:, jnp.array([0, 1, 2, 3, 6])], WIDE)[1](X[:, :5])
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


@pytest.mark.parametrize("way", ["unfold", "fold"])
def test_gradients_are_no_scatters(way):
    x = X if way == "unfold" else WIDE
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(getattr(FOLDING, way)(x) ** 2)))
    assert "scatter" not in gradient.lower(x).as_text()
