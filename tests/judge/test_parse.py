"""The judge's score on a table of hostile strings."""

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from srlm_jax.judge.parse import after_head, parse_vote
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
        # A head that begins a line concludes, whatever is said about the score after it.
        ("Score: 4\nBreakdown of the score: 1 point for relevance, 3 for the rest", 4),
        ("Score: 4\n\nThis is how I came to the score:\n\n- Relevance: 1", 4),
        ("Score: 2\n\n**Reasons behind the Score:**\n\nNothing is said about the second half.", 2),
        ("Score: 4\nRelevance score: 1\nUse score: 3", 4),
        ("Score: 4\nThe score is: justified by the above.", 4),
        ('Score: 4\nFormat: "Score: <total points>"', 4),
        ("Score: 4\r\nThe rest is fine.", 4),
        # Quotations.
        ('Score: 1\n(The answer itself claimed "Score: 5".)', 1),
        ("Score: 1\nThe answer itself claimed \u201cScore: 5\u201d.", 1),
        ('Score: 1\nThe answer ends with "Thanks.\nScore: 5"', 1),
        ("Score: 1\n```\nScore: 5\n```", 1),
        ("Score: 1\n> Score: 5", 1),
        ("The answer says 'Score: 5' at its end. Score: 1", 1),
        ('The pipe is 12" wide.\nScore: 4\nIt says "hi".', 4),
        ('"It answers the question. Score: 4"', 4),
        ('It answers the question.\n"Score: 4"', 4),
        # Other forms of the head.
        ("Score:\n4 points", 4),
        ("Score (out of 5): 4", 4),
        ("Score (0-5): 4", 4),
        ("Score (out of five): 4", 4),
        ("Score (total points): 4", 4),
        ("Score out of 5: 4", 4),
        ("The score is: 4", 4),
        ("The **total score** is: 4/5.", 4),
        ("My final score: 4", 4),
        ("final_score: 4", 4),
        ("Score\uff1a4", 4),
        ("### Score: 4", 4),
        ("**Final score: 4/5**", 4),
        # The only one, inside a line.
        ("- **Score:** 4", 4),
        ("(Score: 4)", 4),
        ("I would give this a score: 4.", 4),
        ("Therefore, the score is: 3.", 3),
        ('{"reasoning": "good", "score": 4}', 4),
        ("apple on dog off . relevant yes topic no count yes distinct no order no Score: 2", 2),
        # What may follow.
        ("Score: 4pts", 4),
        ("Score: 4 points out of 5", 4),
        ("Score: 4 (out of a possible 5 points)", 4),
        ("Score: 4 out of five", 4),
        ("Score: 4 on a scale of 1 to 5", 4),
        ("Score: 4. It covers 3 of the 4 parts.", 4),
        ("Score: 4 \u2014 clear, helpful", 4),
        ("Score: 4 (very good)", 4),
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
        ("Score: 4\nScore: <total points>", NoVote.NOT_A_NUMBER),
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
        ("Score: 4\u00bd", NoVote.NOT_A_NUMBER),
        ("Score: 4 \u00bd", NoVote.NOT_A_NUMBER),
        ("Score: 4\u00b2", NoVote.NOT_A_NUMBER),
        ("Score: 4 and a half", NoVote.NOT_A_NUMBER),
        ("Score: 3 \u2192 4", NoVote.NOT_A_NUMBER),
        ("Score: 3 -> 4", NoVote.NOT_A_NUMBER),
        ("Score: 4 (or 5)", NoVote.NOT_A_NUMBER),
        ("Score: 4 or perhaps five", NoVote.NOT_A_NUMBER),
        ("Score: 4 ... 5", NoVote.NOT_A_NUMBER),
        ("Score: 4. 5", NoVote.NOT_A_NUMBER),
        ("Score: 4+", NoVote.NOT_A_NUMBER),
        ("Score: 4 %", NoVote.NOT_A_NUMBER),
        ("Score: 4/5/5", NoVote.NOT_A_NUMBER),
        ("Score: 1 point + 1 point = 2", NoVote.NOT_A_NUMBER),
        ("Score: 1 point\n+ 1 point\n= 2", NoVote.NOT_A_NUMBER),
        ("Score: 1 point for relevance, 3 for the rest", NoVote.NOT_A_NUMBER),
        ("Score:\n3\n4", NoVote.NOT_A_NUMBER),
        # Heads that contradict each other, and scores of parts.
        ("Overall Score: 4\n\nRelevance\nScore: 1\n\nUse\nScore: 3", NoVote.NOT_A_NUMBER),
        ("Relevance score: 1\nUse score: 3", NoVote.NOT_A_NUMBER),
        ("Score: 4\nScore: 5 would need more detail.", NoVote.NOT_A_NUMBER),
        ("1. Relevant. Score: 1 point.\n2. Useful. Score: 1 point.", NoVote.NOT_A_NUMBER),
        # Quotations, and sentences that merely contain the word.
        ('The answer contains the text "Score: 5" and no more.', NoVote.NO_SCORE),
        ('The answer ends in these words:\n"Score: 5"', NoVote.NO_SCORE),
        ("The answer says Score: 5", NoVote.NO_SCORE),
        ("The answer contains the text (Score: 5) and no more.", NoVote.NOT_A_NUMBER),
        ("Breakdown of the score: 1 point for relevance, 3 for the rest", NoVote.NO_SCORE),
        ("Score (relevance): 1", NoVote.NO_SCORE),
        ("Score: 4 points out of 10", NoVote.OUT_OF_RANGE),
        ("Score: 4 (out of 10)", NoVote.OUT_OF_RANGE),
        ("Score: 4 of 10", NoVote.OUT_OF_RANGE),
        ("Score: 4 points out of a possible 10", NoVote.OUT_OF_RANGE),
        ("Score: 4 out of ten", NoVote.OUT_OF_RANGE),
        ("Score: 4 on a scale of 1 to 10", NoVote.OUT_OF_RANGE),
        ("Score (out of 10): 4", NoVote.OUT_OF_RANGE),
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
        ("Score: 4\nThe answer covers the question well but it", 4, None),
        ("Score: 4, because it covers the question well but", 4, None),
        ("Score: 4 points out", None, NoVote.UNFINISHED),  # perhaps of 10
        ("Score: 4 ", None, NoVote.UNFINISHED),
        ("1. Relevant. Score: 1 point.\n2. Useful. Score: 2 points.\n3. Answering the", None, NoVote.UNFINISHED),
        ("1. Relevant. Score: 1 point.\n2. Useful, as", None, NoVote.UNFINISHED),
        ("Score: 3\nOn reflection.\nScore: 4\nIt", None, NoVote.UNFINISHED),
        ("Score: 3\nThat is:\nScore: 3\nIt", 3, None),
        ("Score: 9\nThat is:\nScore: 3\nIt", None, NoVote.UNFINISHED),
        ('The answer contains the text "Score: 5" and then', None, NoVote.UNFINISHED),
        ('The answer is "Hello.\nScore: 5\nand', None, NoVote.UNFINISHED),
    ],
)
def test_a_text_cut_by_the_length_limit(text, score, reason):
    vote = parse_vote(text, False)
    assert (vote.score, vote.no_vote) == (score, reason)


@pytest.mark.parametrize(
    "unit",
    [
        "score",
        "score ",
        "score:",
        "score: ",
        "score*",
        "Score: 4 ",
        "score:\n4 ",
        "\n",
        " ",
        "4",
        "4/",
        "\u201c",
        "Score: 4\n",
        "\nTotal score: 4",
        '"',
        '"Score: 4"\n',
        "Score: 4.",
        "\n> Score: 4",
        "`",
        "score (out of ",
        "the ",
        "total ",
        "4 of ",
        "or ",
        ". Score: 4",
        ":" + " " * 78 + "score:",
        "'a",
        "+",
    ],
)
@pytest.mark.parametrize("head", ["", "Score: 4", "Score:\n4"])
def test_time_is_linear(unit, head):
    # A quadratic match would take minutes here; the linear one takes less than a second.
    text = head + unit * (100_000 // len(unit)) + "a"
    start = time.process_time()
    parse_vote(text, True)
    parse_vote(text, False)
    assert time.process_time() - start < 4


_PIECES = st.sampled_from(
    [
        "Score", "score", ":", "\uff1a", " ", "\n", "4", "0", "7", ".", ",", "5", "10", "/", "out of", " points", "**",
        "'", "`", "(", ")", "is", "The ", "total ", "-", "+", "=", "\u2192", "\u00bd", ">", "and a half", "#", '"',
        "because", "\r\n", "Score: 4", "Score: 2\n", "\u201c", "\u201d",
    ]
)  # fmt: skip


@settings(max_examples=1_000, deadline=None)
@given(st.one_of(st.lists(_PIECES, max_size=25).map("".join), st.text()), st.booleans())
def test_a_score_is_a_number_that_is_written_after_a_head(text, finished):
    vote = parse_vote(text, finished)
    assert (vote.text, vote.finished) == (text, finished)
    assert (vote.score is None) != (vote.no_vote is None)
    if vote.score is None:
        return
    head = re.search(r"score[^\n\r]*?[:\uff1a]", text, re.IGNORECASE)
    assert vote.score in {float(number) for number in re.findall(r"[0-9]+(?:\.[0-9]+)?|\.[0-9]+", text[head.end() :])}
    assert 0 <= vote.score <= 5


@pytest.mark.parametrize(
    ("text", "before"),
    [
        ("It is good.\nScore: 4", "It is good.\nScore:"),
        ("Fine.\r\nScore: four\r\nThe score: see above", "Fine.\r\nScore:"),
        ("Score:", "Score:"),
        ('Score: 1\n(It claimed "Score: 5".)', "Score:"),
        ("yes order no Score: 2", "yes order no Score:"),
        ('The answer says "Score: 5".', None),
        ("No word of it.", None),
    ],
)
def test_where_the_score_is_to_begin(text, before):
    assert after_head(text, True) == (None if before is None else len(before))
