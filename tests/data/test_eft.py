import collections
import dataclasses

import pytest

from srlm_jax.data.eft import EftDrop, EftRules, disagreement, eft_examples
from srlm_jax.judge.rubric import Rubric
from srlm_jax.records import JudgedPrompt, JudgedResponse, NoVote, RankedPrompt, Vote

RUBRIC = Rubric(template="<INSTRUCTION_HERE>|<RESPONSE_HERE>", stop=())
RULES = EftRules(min_scored=2, max_tied_share=0.0, draws_per_prompt=10, most_common_share=1.0)


def vote(score, text=None):
    if score is None:
        return Vote(text=text or "mumble", finished=True, score=None, no_vote=NoVote.NO_SCORE)
    return Vote(text=text or f"Score: {score}", finished=True, score=float(score), no_vote=None)


@pytest.mark.parametrize(
    ("ranks", "scores", "change", "expected"),
    [
        ((0, 1, 2), (5, 4, 1), {}, None),
        ((2, 0, 1), (1, 5, 4), {}, None),  # responses stand in any order
        ((0, 1, 2), (1, 4, 5), {}, EftDrop.AGAINST_HUMANS),  # ranks and scores run in opposite directions
        ((0, 1, 2), (5, 1, 4), {}, EftDrop.AGAINST_HUMANS),
        ((0, 1, 2), (5, 4, 4), {}, EftDrop.TOO_MANY_TIES),
        ((0, 1, 2), (5, 4, 4), {"max_tied_share": 0.33}, EftDrop.TOO_MANY_TIES),
        ((0, 1, 2), (5, 4, 4), {"max_tied_share": 0.4}, None),
        ((0, 1), (4, 4), {"max_tied_share": 0.4}, EftDrop.TOO_MANY_TIES),  # two equal scores prove nothing
        ((0, 1), (4, 4), {"max_tied_share": 1.0}, EftDrop.TOO_MANY_TIES),
        ((0, 1, 2), (4, 4, 4), {"max_tied_share": 1.0}, EftDrop.TOO_MANY_TIES),
        ((0, 1, 2), (4, 4, 5), {"max_tied_share": 1.0}, EftDrop.AGAINST_HUMANS),
        ((0, 1, 2, 3), (5, 4, 4, 4), {"max_tied_share": 0.4}, EftDrop.TOO_MANY_TIES),  # 3 of 6 pairs
        ((0, 1, 2, 3), (5, 5, 4, 4), {"max_tied_share": 0.4}, None),  # 2 of 6
        ((0, 1, 2, 3, 4), (5, 5, 4, 4, 3), {"max_tied_share": 0.2}, None),  # 2 of 10
        ((0, 1, 1), (4, 4, 4), {"max_tied_share": 1.0}, EftDrop.TOO_MANY_TIES),
        ((0, 0, 1), (4, 4, None), {}, EftDrop.TOO_FEW_SCORED),  # humans did not order the two that are scored
        ((0, 1, 2), (5, None, 4), {}, None),
        ((0, 1, 2), (5, None, 4), {"min_scored": 3}, EftDrop.TOO_FEW_SCORED),
        ((0, 1, 2), (0, None, 4), {}, EftDrop.AGAINST_HUMANS),
        ((0, 1), (0, None), {}, EftDrop.TOO_FEW_SCORED),  # a missing score is no low score
        ((0, 1, 1), (5, 3, 4), {}, None),  # level with the humans: any order will do
    ],
)
def test_when_a_draw_agrees(ranks, scores, change, expected):
    assert disagreement(ranks, [vote(s) for s in scores], dataclasses.replace(RULES, **change)) == expected


def prompt(name, *draws):
    """A prompt with responses best first; draws[j] are the j-th votes of the responses."""
    texts = tuple(f"r{i}" for i in range(len(draws[0])))
    responses = tuple(
        JudgedResponse(response=text, tokens=1, finished=True, votes=votes, score=None)
        for text, votes in zip(texts, zip(*draws, strict=True), strict=True)
    )
    ranked = RankedPrompt(id=name, prompt=f"q{name}", responses=texts, ranks=tuple(range(len(texts))))
    return ranked, JudgedPrompt(id=name, prompt=f"q{name}", responses=responses)


def make(prompts, rules, seed=0):
    ranked, judged = zip(*prompts, strict=True)
    return eft_examples(ranked, judged[::-1], RUBRIC, rules, seed)


def test_accepted_draws_teach_and_all_else_is_counted():
    good = (vote(5, "a"), vote(None), vote(2, "c"))
    result = make(
        [
            prompt("1", good, (vote(1), vote(2), vote(3)), (vote(4), vote(4), vote(1))),
            prompt("2", (vote(None), vote(4)), (vote(3, "x"), vote(1, "y")), (vote(3, "x"), vote(2, "z"))),
        ],
        RULES,
    )
    assert [(e.id, e.prompt, e.response) for e in result.examples] == [
        ("1/0/0", "q1|r0", "a"),
        ("1/2/0", "q1|r2", "c"),
        ("2/0/1", "q2|r0", "x"),
        ("2/1/1", "q2|r1", "y"),
        ("2/1/2", "q2|r1", "z"),
    ]
    assert result.counts == {
        "prompts": 2,
        "draws": 6,
        "accepted_draws": 3,
        "examples": 5,
        "too_few_scored": 1,
        "against_humans": 1,
        "too_many_ties": 1,
        "duplicate": 1,
        "most_common_score": 0,
    }


def test_draws_per_prompt():
    draws = [(vote(5, f"a{j}"), vote(1, f"b{j}")) for j in range(4)]
    result = make([prompt("1", (vote(1), vote(5)), *draws)], dataclasses.replace(RULES, draws_per_prompt=2))
    assert [e.id for e in result.examples] == ["1/0/1", "1/1/1", "1/0/2", "1/1/2"]
    assert (result.counts["extra_draw"], result.counts["accepted_draws"]) == (2, 2)


def many():
    """Ten prompts, each with scores 4, 4 and one of 0, 1, 2: two thirds of all are 4."""
    return [
        prompt(str(i), (vote(4, f"a{i} Score: 4"), vote(4, f"b{i} Score: 4"), vote(i % 3, f"c{i} Score: {i % 3}")))
        for i in range(10)
    ]


@pytest.mark.parametrize(
    ("share", "fours"),
    [(1.0, 20), (0.9, 20), (0.5, 10), (0.6, 15), (0.4, 6), (0.1, 1)],
)
def test_the_most_common_score_is_thinned_to_its_share(share, fours):
    rules = dataclasses.replace(RULES, max_tied_share=0.4, most_common_share=share)
    result = make(many(), rules)
    scores = collections.Counter(e.response[-1] for e in result.examples)
    # 10 examples have other scores, and k / (k + 10) <= share.
    assert scores == {"4": fours, "0": 4, "1": 3, "2": 3}
    assert result.counts["most_common_score"] == 20 - fours
    ids = [e.id for e in result.examples]
    assert ids == sorted(ids)  # what stays keeps its order


def test_what_is_thinned_out_depends_on_the_seed_alone():
    rules = dataclasses.replace(RULES, max_tied_share=0.4, most_common_share=0.5)

    def chosen(prompts, seed):
        return {e.id for e in make(prompts, rules, seed).examples}

    assert chosen(many(), 1) == chosen(many()[::-1], 1)
    assert chosen(many(), 1) != chosen(many(), 2)


def test_of_two_most_common_scores_the_higher_is_thinned():
    result = make(
        [prompt("1", (vote(4), vote(1))), prompt("2", (vote(4), vote(1)))],
        dataclasses.replace(RULES, most_common_share=0.4),
    )
    assert sorted(e.response for e in result.examples) == ["Score: 1", "Score: 1", "Score: 4"]


def test_a_judge_of_one_score_teaches_nothing():
    rules = dataclasses.replace(RULES, max_tied_share=1.0)
    result = make([prompt("1", (vote(4), vote(4))), prompt("2", (vote(4), vote(4), vote(4)))], rules)
    assert result.examples == []
    assert result.counts["too_many_ties"] == 2


def test_examples_of_one_score_are_thinned_to_nothing():
    draw = (vote(4), dataclasses.replace(vote(1), finished=False))
    result = make([prompt("1", draw)], dataclasses.replace(RULES, most_common_share=0.5))
    assert result.examples == []
    assert result.counts["most_common_score"] == 1


def test_a_cut_judgement_counts_in_its_draw_and_is_no_example():
    result = make([prompt("1", (vote(4), dataclasses.replace(vote(1), finished=False)))], RULES)
    assert [example.id for example in result.examples] == ["1/0/0"]
    assert (result.counts["cut"], result.counts["accepted_draws"]) == (1, 1)


def test_unequal_numbers_of_votes_are_refused():
    ranked, judged = prompt("1", (vote(4), vote(1)), (vote(4), vote(1)))
    short = dataclasses.replace(judged.responses[1], votes=judged.responses[1].votes[:1])
    judged = dataclasses.replace(judged, responses=(judged.responses[0], short))
    with pytest.raises(ValueError, match=r"prompt '1': .*unequal numbers of votes"):
        eft_examples([ranked], [judged], RUBRIC, RULES, 0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("min_scored", 1),
        ("max_tied_share", -0.1),
        ("max_tied_share", 40.0),
        ("draws_per_prompt", 0),
        ("most_common_share", 0.0),
        ("most_common_share", 40.0),
    ],
)
def test_rules_that_make_no_sense(field, value):
    with pytest.raises(ValueError, match=field):
        dataclasses.replace(RULES, **{field: value})
