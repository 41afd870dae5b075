import itertools

import pytest

from srlm_jax.judge.rubric import Rubric
from srlm_jax.judge.score import judge, matched, mean_score
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
)

RUBRIC = Rubric(template="<INSTRUCTION_HERE>|<RESPONSE_HERE>", stop=("END",))
PARAMS = SamplingParams(samples=3, temperature=0.7, top_p=0.9, max_new_tokens=50, stop=("STOP",))


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
                    Completion(text="no" if k == 1 else f"{prompt} Score: {j + k / 2}", tokens=5, finished=True)
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
    judged = judge(generate, RUBRIC, answers, PARAMS, lambda *args: reports.append(args))

    ((requests, params),) = calls
    assert requests == [
        Request(id="10", prompts=("q10|Score: 5", "q10|cut"), chat=True),
        Request(id="9", prompts=("q9|b",), chat=True),
    ]
    assert (params.samples, params.stop) == (3, ("STOP", "END"))
    assert reports == [(1, 10)]
    assert [prompt.id for prompt in judged] == ["10", "9"]
    assert [[r.score for r in prompt.responses] for prompt in judged] == [[0.5, 1.5], [0.5]]
    assert [v.score for v in judged[0].responses[0].votes] == [0.0, None, 1.0]
    cut = judged[0].responses[1]
    assert (cut.response, cut.tokens, cut.finished) == ("cut", 3, False)
    assert cut.votes[0].text == "q10|cut Score: 1.0"


def test_an_unfinished_judgement_gives_no_vote():
    def generate(requests, params, report):
        return [((Completion(text="It is", tokens=2, finished=False),),) for _ in requests]

    ((response,),) = [prompt.responses for prompt in judge(generate, RUBRIC, [answer("1", "a")], PARAMS, print)]
    assert response.score is None
    assert response.votes[0].no_vote == NoVote.UNFINISHED
    assert not response.votes[0].finished


def test_two_answers_with_one_id_are_refused():
    with pytest.raises(ValueError, match="'1' occurs twice"):
        judge(lambda *_: [], RUBRIC, [answer("1", "a"), answer("1", "b")], PARAMS, print)


def test_a_generator_that_loses_a_result_is_caught():
    with pytest.raises(ValueError, match="zip"):
        judge(lambda *_: [], RUBRIC, [answer("1", "a")], PARAMS, print)


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
