"""Means of exact scores with their standard errors, one unit a prompt."""

import math

import pytest

from srlm_jax.evaluate.oracle import oracle_metrics
from srlm_jax.records import Completion, OracleScores, Responses


def measure(*rows):
    """Metrics of prompts given as [(score, tokens), ...]; answers of 9 tokens are cut."""
    answers = [
        Responses(
            id=str(i),
            prompt="",
            completions=tuple(Completion(text="", tokens=tokens, finished=tokens != 9) for _, tokens in row),
        )
        for i, row in enumerate(rows)
    ]
    return oracle_metrics(answers, [OracleScores(id=str(i), scores=tuple(s for s, _ in r)) for i, r in enumerate(rows)])


def test_means_over_prompts():
    metrics = measure([(5, 4)], [(2, 8)], [(5, 6)], [(0, 6)])
    assert {name: metric.value for name, metric in metrics.items()} == {
        "oracle_score": 3.0,
        "perfect": 0.5,
        "response_tokens": 6.0,
        "cut": 0.0,
    }
    # Squares of 2, 1, 2 and 3 add to 18; the variance is 18 / 3, that of the mean a quarter of it.
    assert metrics["oracle_score"].stderr == pytest.approx(math.sqrt(6 / 4))
    assert metrics["perfect"].stderr == pytest.approx(math.sqrt((4 * 0.25 / 3) / 4))
    assert {metric.n for metric in metrics.values()} == {4}


def test_several_answers_to_a_prompt_are_one_unit():
    metrics = measure([(5, 2), (1, 4)], [(3, 3), (3, 3)])
    assert (metrics["oracle_score"].value, metrics["oracle_score"].stderr, metrics["oracle_score"].n) == (3.0, 0.0, 2)
    assert metrics["perfect"].value == 0.25


def test_an_answer_without_a_score_counts_neither_way_but_has_a_length():
    metrics = measure([(None, 9), (4, 3)], [(None, 6)])
    assert (metrics["oracle_score"].value, metrics["oracle_score"].n) == (4.0, 1)
    assert (metrics["response_tokens"].value, metrics["response_tokens"].n) == (6.0, 2)
    assert (metrics["cut"].value, metrics["cut"].n) == (0.25, 2)


def test_one_prompt_has_no_spread():
    assert measure([(4, 3)])["oracle_score"].stderr == 0.0
