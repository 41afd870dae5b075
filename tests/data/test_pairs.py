import dataclasses
import itertools

import pytest

from srlm_jax.data.pairs import preference_pair
from srlm_jax.judge.score import mean_score
from srlm_jax.records import JudgedPrompt, JudgedResponse, PairDrop, Vote


def judged(*responses):
    return JudgedPrompt(
        id="p",
        prompt="q",
        responses=tuple(
            JudgedResponse(response=text, tokens=1, finished=True, votes=(), score=score) for text, score in responses
        ),
    )


def test_best_against_worst():
    pair = preference_pair(judged(("a", 3.0), ("b", 13 / 3), ("c", 0.0), ("d", 4.0)))
    assert (pair.id, pair.prompt) == ("p", "q")
    assert (pair.chosen, pair.chosen_score) == ("b", 13 / 3)
    assert (pair.rejected, pair.rejected_score) == ("c", 0.0)


def test_which_answers_were_cut_travels_with_the_pair():
    for finished in itertools.product((False, True), repeat=2):
        two = judged(("a", 3.0), ("b", 4.0))
        answers = [dataclasses.replace(it, finished=flag) for it, flag in zip(two.responses, finished, strict=True)]
        pair = preference_pair(dataclasses.replace(two, responses=tuple(answers)))
        assert (pair.rejected_finished, pair.chosen_finished) == finished


def test_a_response_without_a_score_is_not_the_worst():
    pair = preference_pair(judged(("a", 5.0), ("b", None), ("c", 4.0)))
    assert (pair.chosen, pair.rejected) == ("a", "c")


def test_of_several_best_or_worst_the_first_counts():
    pair = preference_pair(judged(("a", 2.0), ("b", 4.0), ("c", 4.0), ("d", 2.0)))
    assert (pair.chosen, pair.rejected) == ("b", "a")


@pytest.mark.parametrize(
    ("responses", "reason"),
    [
        ([], PairDrop.UNPARSEABLE),
        ([("a", None), ("b", None)], PairDrop.UNPARSEABLE),
        ([("a", 4.0), ("b", None)], PairDrop.ONE_SCORE),
        ([("a", 4.0), ("b", 4.0), ("c", None)], PairDrop.TIE),
        ([("a", 0.0), ("b", 0.0)], PairDrop.TIE),
        ([("a", 4.0), ("a", 4.0)], PairDrop.TIE),
        ([("a", 4.0), ("b", 3.0), ("a", 2.0)], PairDrop.SAME_TEXT),
    ],
)
def test_why_there_is_no_pair(responses, reason):
    assert preference_pair(judged(*responses)) == reason


def test_votes_in_another_order_are_a_tie():
    # Summed as floats in the order they come, 4.1 + 4.2 + 4.3 differs between orders by one rounding.
    means = [
        mean_score([Vote(text="", finished=True, score=score, no_vote=None) for score in order])
        for order in itertools.permutations((4.1, 4.2, 4.3))
    ]
    assert preference_pair(judged(*((str(i), mean) for i, mean in enumerate(means)))) == PairDrop.TIE
