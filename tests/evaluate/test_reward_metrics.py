import math
import random
import statistics

import pytest
from scipy import stats

from srlm_jax.evaluate.reward_metrics import kendall_tau_b, reward_metrics, spearman_rho
from srlm_jax.records import JudgedPrompt, JudgedResponse, NoVote, RankedPrompt, Vote


def one_vote(score):
    return (Vote(text="", finished=True, score=score, no_vote=NoVote.NO_SCORE if score is None else None),)


def prompts(*rows):
    """Rows of (ranks, scores) -> the arguments of reward_metrics, the verdicts in another order."""
    ranked, judged = [], []
    for index, (ranks, scores) in enumerate(rows):
        texts = tuple(f"r{i}" for i in range(len(ranks)))
        responses = tuple(
            JudgedResponse(response=text, tokens=1, finished=True, votes=one_vote(score), score=score)
            for text, score in zip(texts, scores, strict=True)
        )
        ranked.append(RankedPrompt(id=str(index), prompt="q", responses=texts, ranks=tuple(ranks)))
        judged.append(JudgedPrompt(id=str(index), prompt="q", responses=responses))
    return ranked, judged[::-1]


def values(*rows):
    return {name: metric.value for name, metric in reward_metrics(*prompts(*rows)).items()}


def test_by_hand():
    metrics = reward_metrics(
        *prompts(
            ((0, 1, 2), (5.0, 3.0, 1.0)),  # 3 of 3 pairs, whole order; its 5 is the best
            ((1, 0), (5.0, 2.0)),  # 0 of 1 pairs; its 5 is not the best
            ((0, 1), (4.0, 4.0)),  # a tie: half of 1 pair, not the whole order, correlation 0
        )
    )
    assert {name: metric.value for name, metric in metrics.items()} == pytest.approx(
        {
            "pairwise_accuracy": 3.5 / 5,
            "five_best": 1 / 2,
            "exact_match": 1 / 3,
            "spearman": 0.0,  # (1 - 1 + 0) / 3
            "kendall_tau_b": 0.0,
            "scored": 1.0,
        }
    )
    assert {name: metric.n for name, metric in metrics.items()} == {
        "pairwise_accuracy": 3,
        "five_best": 2,
        "exact_match": 3,
        "spearman": 3,
        "kendall_tau_b": 3,
        "scored": 3,
    }
    # Ratio R = 0.7: residuals 3 - 2.1, 0 - 0.7 and 0.5 - 0.7, so sqrt(3 / 2 * (0.81 + 0.49 + 0.04)) / 5.
    assert metrics["pairwise_accuracy"].stderr == pytest.approx(math.sqrt(1.5 * 1.34) / 5)
    assert metrics["exact_match"].stderr == pytest.approx(statistics.stdev([1, 0, 0]) / math.sqrt(3))
    assert metrics["spearman"].stderr == pytest.approx(1 / math.sqrt(3))


def test_a_judge_like_the_humans_and_its_opposite():
    ranks = (2, 0, 3, 1)
    best = values(*[(ranks, tuple(5.0 - rank for rank in ranks))] * 3)
    assert best == pytest.approx(dict.fromkeys(best, 1.0))
    worst = values(*[(ranks, tuple(2.0 + rank for rank in ranks))] * 3)
    assert worst == pytest.approx(
        {"pairwise_accuracy": 0, "five_best": 0, "exact_match": 0, "spearman": -1, "kendall_tau_b": -1, "scored": 1}
    )


def test_a_constant_judge_has_learnt_nothing():
    constant = values(*[((0, 1, 2), (4.0, 4.0, 4.0))] * 4)
    assert constant == {
        "pairwise_accuracy": 0.5,
        "exact_match": 0.0,
        "spearman": 0.0,
        "kendall_tau_b": 0.0,
        "scored": 1.0,
    }


def test_a_missing_score_is_left_out_and_not_a_low_one():
    # The best response has no score: as a low score it would make two pairs wrong.
    result = values(((0, 1, 2), (None, 4.0, 3.0)), ((0, 1, 2), (5.0, 4.0, 3.0)))
    assert result == pytest.approx(
        {"pairwise_accuracy": 1, "exact_match": 0.5, "spearman": 1, "kendall_tau_b": 1, "scored": 5 / 6}
    )


def test_the_humans_best_counts_though_the_judge_gave_it_no_score():
    # Among the scored responses rank 1 is the best, but a 5 for it is still not the humans' best.
    assert values(((0, 1, 2), (None, 5.0, 3.0)), ((0, 1, 2), (5.0, 5.0, 3.0)))["five_best"] == pytest.approx(1 / 3)


def test_only_a_full_five_is_perfect():
    result = reward_metrics(*prompts(*[((0, 1), (14 / 3, 1.0))] * 3))
    assert "five_best" not in result


def test_a_metric_of_fewer_than_two_prompts_is_left_out():
    rows = [((0, 1), (5.0, None)), ((0, 1), (4.0, None)), ((0, 1), (None, None))]
    assert set(reward_metrics(*prompts(*rows))) == {"exact_match", "scored"}
    assert reward_metrics(*prompts(((0, 1), (4.0, 3.0)))) == {}
    assert reward_metrics([], []) == {}


def test_prompts_with_one_response_say_nothing():
    rows = [((0, 1), (4.0, 3.0))] * 2
    assert reward_metrics(*prompts(*rows, ((0,), (5.0,)))) == reward_metrics(*prompts(*rows))


def test_humans_level_are_no_pair():
    result = values(*[((0, 1, 1), (5.0, 4.0, 3.0))] * 2)
    assert result["pairwise_accuracy"] == 1.0
    assert result["exact_match"] == 0.0  # the judge sees a difference where humans see none


def test_correlations_against_scipy():
    rng = random.Random(0)
    for _ in range(200):
        n = rng.randint(2, 7)
        x = [rng.randint(0, 5) / 2 for _ in range(n)]
        y = rng.choice([rng.sample(range(n), n), [rng.randint(0, 3) for _ in range(n)]])
        if len(set(x)) == 1 or len(set(y)) == 1:
            assert (spearman_rho(x, y), kendall_tau_b(x, y)) == (0.0, 0.0)
        else:
            assert spearman_rho(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)
            assert kendall_tau_b(x, y) == pytest.approx(stats.kendalltau(x, y).statistic)


def test_standard_errors_are_of_prompts_and_not_of_pairs():
    # The prompts are wholly right or wholly wrong, 6 pairs each: as if there were 6 times the prompts, a standard error
    # over pairs would be too small by sqrt(6).
    right, wrong = ((0, 1, 2, 3), (4.0, 3.0, 2.0, 1.0)), ((0, 1, 2, 3), (1.0, 2.0, 3.0, 4.0))
    metric = reward_metrics(*prompts(*[right] * 30, *[wrong] * 10))["pairwise_accuracy"]
    assert metric.n == 40
    assert metric.stderr == pytest.approx(statistics.stdev([1] * 30 + [0] * 10) / math.sqrt(40))


def test_prompts_that_do_not_match_are_refused():
    ranked, judged = prompts(((0, 1), (4.0, 3.0)), ((0, 1), (4.0, 3.0)))
    with pytest.raises(ValueError, match="not both"):
        reward_metrics(ranked, judged[:1])


def test_scored_is_the_share_of_judgements_and_not_of_answers():
    ranked, judged = prompts(((0, 1), (4.0, 2.0)), ((0, 1), (3.0, 1.0)))
    votes = (*one_vote(4.0), *one_vote(None), *one_vote(None))
    half = [
        JudgedPrompt(
            **vars(p) | {"responses": tuple(JudgedResponse(**vars(r) | {"votes": votes}) for r in p.responses)}
        )
        for p in judged
    ]
    assert reward_metrics(ranked, half)["scored"].value == pytest.approx(1 / 3)
