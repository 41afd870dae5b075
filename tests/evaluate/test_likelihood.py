"""The loss of human answers."""

import pytest

from srlm_jax.evaluate.likelihood import likelihood_metrics


def test_the_loss_is_over_all_tokens_of_all_answers():
    metric = likelihood_metrics([-2.0, -12.0, -4.0], [1, 6, 2])["human_loss"]
    assert metric.value == pytest.approx(18 / 9) and metric.stderr == pytest.approx(0) and metric.n == 3


def test_its_error_is_that_of_a_ratio_over_answers():
    # Linearised: residuals -1, +1 over two answers of two tokens each.
    metric = likelihood_metrics([-3.0, -5.0], [2, 2])["human_loss"]
    assert metric.value == pytest.approx(2.0) and metric.stderr == pytest.approx((2 * 2) ** 0.5 / 4)


def test_one_answer_has_no_error_and_so_no_metric():
    assert likelihood_metrics([-3.0], [2]) == {}
