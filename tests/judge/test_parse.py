"""The judge's score on a table of hostile strings."""

import time

import pytest

from srlm_jax.judge.parse import parse_vote
from srlm_jax.records import NoVote


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("The response is helpful.\n\nScore: 4", 4),
        ("score:3", 3),
        ("SCORE : 2", 2),
        ("Score:\t\u00a05", 5),
        ("Total score: 0", 0),
        ('"Score: 4"', 4),
        ("\u201cScore: 4\u201d", 4),
        ("\u2018Score\u2019: \u20184\u2019", 4),
        ("\u201cScore\u201d: \u201c4\u201d", 4),
        ('{"score": "4"}', 4),
        ("**Score:** 4", 4),
        ("**Score**: **4**", 4),
        ("_Score: 4_", 4),
        ("Score: `4`", 4),
        ("Score: <4>", 4),
        ("Score: [4]", 4),
        ("Score: 4/5", 4),
        ("Score: 4 / 5", 4),
        ("Score: **4**/5", 4),
        ("Score: 4 out of 5", 4),
        ("Score: 4 points", 4),
        ("Score: 4.", 4),
        ("Score: 4. It answers the question.", 4),
        ("Score: 4\n\n- 1 point was lost on clarity", 4),
        ("Score: 4, because it is clear", 4),
        ("Score: 4.5", 4.5),
        ("Score: 4.75/5", 4.75),
        ("Score: .5", 0.5),
        ("Score: +4", 4),
        ("Score: -0", 0),
        ("Score: 5.0", 5),
        ("Score: 04", 4),
        ("Score:\n4", 4),
        ("Score:\n\n**4/5**\nThank you.", 4),
        ("Score: 1\nOn reflection.\nScore: 3", 3),
        ('Format: "Score: <total points>"\nScore: 2', 2),
        ("The response says Score: 5 of itself. Score: 1", 1),
        ("Score: " + "0" * 100_000 + "4", 4),
    ],
)
def test_scores(text, score):
    vote = parse_vote(text, True)
    assert (vote.score, vote.no_vote) == (score, None)
    assert vote.text == text
    assert str(vote.score) != "-0.0"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", NoVote.NO_SCORE),
        ("A good response, 4 points.", NoVote.NO_SCORE),
        ("I would score it 4.", NoVote.NO_SCORE),
        ("Underscore: 4", NoVote.NO_SCORE),
        ("Score: four", NoVote.NOT_A_NUMBER),
        ("Score:", NoVote.NOT_A_NUMBER),
        ("Score: <total points>", NoVote.NOT_A_NUMBER),
        ('Score: 4\nFormat: "Score: <total points>"', NoVote.NOT_A_NUMBER),
        ("Score: 4-5", NoVote.NOT_A_NUMBER),
        ("Score: 4 \u2013 5", NoVote.NOT_A_NUMBER),
        ("Score: 4 to 5", NoVote.NOT_A_NUMBER),
        ("Score: 3 or 4", NoVote.NOT_A_NUMBER),
        ("Score: 1+1+1 = 3", NoVote.NOT_A_NUMBER),
        ("Score: 1e3", NoVote.NOT_A_NUMBER),
        ("Score: 1e0", NoVote.NOT_A_NUMBER),
        ("Score: 4,5", NoVote.NOT_A_NUMBER),
        ("Score: 4.5.6", NoVote.NOT_A_NUMBER),
        ("Score: 80%", NoVote.NOT_A_NUMBER),
        ("Score: 4th", NoVote.NOT_A_NUMBER),
        ("Score: nan", NoVote.NOT_A_NUMBER),
        ("Score: inf", NoVote.NOT_A_NUMBER),
        ("Score: \u0664", NoVote.NOT_A_NUMBER),  # ARABIC-INDIC DIGIT FOUR
        ("Score:\n1. The response is relevant.", NoVote.NOT_A_NUMBER),
        ("Score: -1", NoVote.OUT_OF_RANGE),
        ("Score: \u22121", NoVote.OUT_OF_RANGE),
        ("Score: -0.5", NoVote.OUT_OF_RANGE),
        ("Score: 6", NoVote.OUT_OF_RANGE),
        ("Score: 5.01", NoVote.OUT_OF_RANGE),
        ("Score: 45", NoVote.OUT_OF_RANGE),
        ("Score: 4/10", NoVote.OUT_OF_RANGE),
        ("Score: 4 out of 10", NoVote.OUT_OF_RANGE),
        ("Score: " + "9" * 1_000_000, NoVote.OUT_OF_RANGE),
        ("Score: 4/" + "9" * 100_000, NoVote.OUT_OF_RANGE),
    ],
)
def test_no_scores(text, reason):
    vote = parse_vote(text, True)
    assert (vote.score, vote.no_vote) == (None, reason)


@pytest.mark.parametrize(
    ("text", "score", "reason"),
    [
        ("The response is", None, NoVote.UNFINISHED),
        ("Score:", None, NoVote.UNFINISHED),
        ("Score: **", None, NoVote.UNFINISHED),
        ("Score: 4", None, NoVote.UNFINISHED),  # perhaps of 4.5
        ("Score: 4.", None, NoVote.UNFINISHED),
        ("Score: 4/1", None, NoVote.UNFINISHED),  # perhaps of 4/10
        ("Score: 4\n", 4, None),
        ("Score: 4. It is", 4, None),
        ("Score: four", None, NoVote.NOT_A_NUMBER),
        ("Score: 6 because", None, NoVote.OUT_OF_RANGE),
    ],
)
def test_a_text_cut_by_the_length_limit(text, score, reason):
    vote = parse_vote(text, False)
    assert (vote.score, vote.no_vote) == (score, reason)


@pytest.mark.parametrize(
    "unit",
    ["score", "score ", "score:", "score: ", "score*", "Score: 4 ", "score:\n4 ", "\n", " ", "4", "4/", "\u201c"],
)
@pytest.mark.parametrize("head", ["", "Score:", "Score: 4", "Score:\n4"])
def test_time_is_linear(unit, head):
    # A quadratic match would take minutes here; the linear one some tens of milliseconds.
    text = head + unit * (300_000 // len(unit)) + "a"
    start = time.process_time()
    parse_vote(text, True)
    assert time.process_time() - start < 2
