import itertools
import math
import random

import pytest

from srlm_jax.judge.rubric import Rubric
from srlm_jax.judge.score import POINTS, expected_points, judge, matched, mean_score
from srlm_jax.records import (
    Completion,
    JudgedPrompt,
    JudgedResponse,
    NoVote,
    RankedPrompt,
    Request,
    Responses,
    SamplingParams,
    Vote,
    WatchedCompletion,
)

RUBRIC = Rubric(template="<INSTRUCTION_HERE>|<RESPONSE_HERE>", stop=("END",))
PARAMS = SamplingParams(samples=3, temperature=0.7, top_p=0.9, max_new_tokens=50, stop=("STOP",))
PLAIN = {"prefix": "", "by_expected": False}


def vote(score):
    return Vote(text="", finished=True, score=score, no_vote=None if score is not None else NoVote.NO_SCORE)


def test_the_mean_is_of_the_votes_with_a_score_and_not_floored():
    assert mean_score([vote(4.0), vote(4.0), vote(5.0)]) == 13 / 3
    assert mean_score([vote(4.0), vote(None), vote(5.0)]) == 4.5
    assert mean_score([vote(None), vote(None)]) is None
    assert mean_score([]) is None
    assert mean_score([vote(0.0), vote(None)]) == 0.0


def test_the_mean_does_not_depend_on_the_order_of_votes():
    # 4.1 + 4.2 + 4.3 in floats gives two different sums, depending on the order.
    scores = (4.1, 4.2, 4.3)
    assert len({sum(order) for order in itertools.permutations(scores)}) > 1
    assert len({mean_score([vote(s) for s in order]) for order in itertools.permutations(scores)}) == 1


def answer(name, *texts):
    completions = tuple(Completion(text=text, tokens=len(text), finished=text != "cut") for text in texts)
    return Responses(id=name, prompt=f"q{name}", completions=completions)


def test_every_response_is_judged_and_only_the_completion_is_parsed():
    calls = []

    def generate(requests, params, report):
        calls.append((requests, params))
        report(1, 10)
        # A judgement names the prompt it is of, its own number as score; the second sample gives none.
        return [
            tuple(
                tuple(
                    Completion(text="no" if k == 1 else f"{prompt}\nScore: {j + k / 2}", tokens=5, finished=True)
                    for k in range(params.samples)
                )
                for j, prompt in enumerate(request.prompts)
            )
            for request in requests
        ]

    reports = []
    # Ids whose order as strings is not their order here: results must follow the answers. A response that scores
    # itself must not be heard.
    answers = [answer("10", "Score: 5", "cut"), answer("9", "b")]
    judged = judge(generate, RUBRIC, answers, PARAMS, lambda *args: reports.append(args), **PLAIN)

    ((requests, params),) = calls
    assert requests == [
        Request(id="10", prompts=("q10|Score: 5", "q10|cut"), chat=True, opening="", watched=POINTS),
        Request(id="9", prompts=("q9|b",), chat=True, opening="", watched=POINTS),
    ]
    assert (params.samples, params.stop) == (3, ("STOP", "END"))
    assert reports == [(1, 10)]
    assert [prompt.id for prompt in judged] == ["10", "9"]
    assert [[r.score for r in prompt.responses] for prompt in judged] == [[0.5, 1.5], [0.5]]
    assert [v.score for v in judged[0].responses[0].votes] == [0.0, None, 1.0]
    cut = judged[0].responses[1]
    assert (cut.response, cut.tokens, cut.finished) == ("cut", 3, False)
    assert cut.votes[0].text == "q10|cut\nScore: 1.0"


def test_an_unfinished_judgement_gives_no_vote():
    def generate(requests, params, report):
        return [((Completion(text="It is", tokens=2, finished=False),),) for _ in requests]

    ((response,),) = [p.responses for p in judge(generate, RUBRIC, [answer("1", "a")], PARAMS, print, **PLAIN)]
    assert response.score is None
    assert response.votes[0].no_vote == NoVote.UNFINISHED
    assert not response.votes[0].finished


def test_two_answers_with_one_id_are_refused():
    with pytest.raises(ValueError, match="'1' occurs twice"):
        judge(lambda *_: [], RUBRIC, [answer("1", "a"), answer("1", "b")], PARAMS, print, **PLAIN)


def test_a_generator_that_loses_a_result_is_caught():
    with pytest.raises(ValueError, match="zip"):
        judge(lambda *_: [], RUBRIC, [answer("1", "a")], PARAMS, print, **PLAIN)


def drawn(text, probabilities, finished=True):
    """A completion whose token behind any "Score:" has these probabilities, and what was asked about it."""
    asked = []

    def at(start, skipped):
        asked.append((start, skipped))
        return probabilities

    return WatchedCompletion(text=text, tokens=4, finished=finished, probabilities=at), asked


def judged_once(completion, **changes):
    ((result,),) = [
        prompt.responses
        for prompt in judge(
            lambda requests, *_: [((completion,),)], RUBRIC, [answer("1", "a")], PARAMS, print, **PLAIN | changes
        )
    ]
    return result


SURE_OF_FOUR, FLAT = (0, 0, 0, 0, 1, 0), (1 / 60,) * 6


@pytest.mark.parametrize(
    ("probabilities", "expected"),
    [
        (SURE_OF_FOUR, 4),
        (FLAT, 2.5),
        ((0.1, 0, 0, 0, 0, 0.3), 3.75),
        ((0, 0, 0, 0, 1e-300, 1e-300), 4.5),
        ((0,) * 6, None),
        ((math.nan,) * 6, None),
    ],
)
def test_the_expected_score_is_the_mean_of_the_points(probabilities, expected):
    found = expected_points(probabilities)
    assert found == (None if expected is None else pytest.approx(expected, abs=1e-12))


def test_expected_scores_stay_between_0_and_5():
    rng = random.Random(0)
    for _ in range(1_000):
        probabilities = [rng.random() ** rng.choice((1, 40)) for _ in POINTS]
        assert 0 <= expected_points(probabilities) <= 5
        assert expected_points([0, 0, 0, 0, 0, probabilities[0]]) == 5


@pytest.mark.parametrize("by_expected", [False, True])
def test_both_scores_are_recorded_and_one_counts(by_expected):
    completion, asked = drawn("It is good.\nScore: 3", (0, 0, 0, 0.5, 0.25, 0.25))
    result = judged_once(completion, by_expected=by_expected)
    assert (result.votes[0].score, result.votes[0].expected, result.expected) == (3, 3.75, 3.75)
    assert result.score == (3.75 if by_expected else 3)
    assert asked[0][0] == len("It is good.\nScore:")


@pytest.mark.parametrize("text", ["It is good.\nScore: four", "It is good.\nScore: 9", "It is good.\nScore:"])
def test_a_verdict_that_does_not_parse_still_has_an_expected_score(text):
    result = judged_once(drawn(text, SURE_OF_FOUR, finished=not text.endswith(":"))[0], by_expected=True)
    assert (result.votes[0].score, result.score) == (None, 4)


def test_a_verdict_without_a_head_has_no_expected_score():
    completion, asked = drawn("It is good.", SURE_OF_FOUR)
    result = judged_once(completion, by_expected=True)
    assert (result.votes[0].expected, result.score, asked) == (None, None, [])


def test_a_cut_before_the_points_leaves_no_expected_score():
    assert judged_once(drawn("Score:", None, finished=False)[0], by_expected=True).score is None


def test_a_server_s_verdict_has_no_expected_score():
    result = judged_once(Completion(text="Score: 3", tokens=1, finished=True))
    assert (result.score, result.expected) == (3, None)


def test_a_prefix_is_part_of_the_verdict_and_the_model_goes_on_after_it():
    completion, asked = drawn("4\nIt is good.", SURE_OF_FOUR)
    calls = []

    def generate(requests, params, report):
        calls.extend(requests)
        return [((completion,),)]

    ((result,),) = [
        p.responses
        for p in judge(generate, RUBRIC, [answer("1", "a")], PARAMS, print, prefix="Score: ", by_expected=False)
    ]
    assert calls[0].opening == "Score: "
    assert (result.votes[0].text, result.score) == ("Score: 4\nIt is good.", 4)
    assert asked[0][0] == 0  # in what the model wrote


def ranked(name, *responses):
    return RankedPrompt(id=name, prompt=f"q{name}", responses=responses, ranks=tuple(range(len(responses))))


def verdict(name, *responses):
    judged = tuple(JudgedResponse(response=r, tokens=1, finished=True, votes=(), score=None) for r in responses)
    return JudgedPrompt(id=name, prompt=f"q{name}", responses=judged)


def test_rankings_and_verdicts_are_joined_by_id():
    pairs = matched([ranked("2", "a"), ranked("10", "b")], [verdict("10", "b"), verdict("2", "a")])
    assert [(r.id, v.id) for r, v in pairs] == [("2", "2"), ("10", "10")]


@pytest.mark.parametrize(
    ("rankings", "verdicts", "message"),
    [
        ([ranked("1", "a")], [], "ranked or judged but not both.*'1'"),
        ([], [verdict("1", "a")], "ranked or judged but not both.*'1'"),
        ([ranked("1", "a"), ranked("1", "a")], [verdict("1", "a")], "'1' occurs twice"),
        ([ranked("1", "a", "b")], [verdict("1", "b", "a")], "prompt '1': the judged texts"),
        (
            [RankedPrompt(id="1", prompt="q1", responses=("a",), ranks=(0, 1))],
            [verdict("1", "a")],
            "1 responses but 2 ranks",
        ),
    ],
)
def test_rankings_and_verdicts_that_do_not_match(rankings, verdicts, message):
    with pytest.raises(ValueError, match=message):
        matched(rankings, verdicts)
