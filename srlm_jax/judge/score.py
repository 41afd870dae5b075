"""The model as its own judge: several judgements of each response, averaged (paper section 2.2)."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction

from srlm_jax.errors import BadInput
from srlm_jax.judge.parse import BEFORE_SCORE, after_head, parse_vote
from srlm_jax.judge.rubric import Rubric, fill
from srlm_jax.records import (
    Completion,
    Generate,
    JudgedPrompt,
    JudgedResponse,
    RankedPrompt,
    Request,
    Responses,
    SamplingParams,
    Vote,
    WatchedCompletion,
)

POINTS = ("0", "1", "2", "3", "4", "5")


def mean_score(votes: Sequence[Vote]) -> float | None:
    """The mean of the votes that carry a score, None where none does; never rounded to whole points.

    The sum is exact and rounded once, so that equal means are equal floats whatever the order of the votes: a tie is
    a tie (paper section 2.2 averages three votes).
    """
    return _mean(vote.score for vote in votes)


def mean_expected(votes: Sequence[Vote]) -> float | None:
    """As `mean_score`, of the votes' expected scores."""
    return _mean(vote.expected for vote in votes)


def expected_points(probabilities: Sequence[float]) -> float | None:
    """The mean of 0 to 5 under six probabilities, which need not add up to 1; None where they are not finite, or all
    0."""
    total = math.fsum(probabilities)
    if not (0 < total < math.inf):
        return None
    return min(5.0, math.fsum(points * (p / total) for points, p in enumerate(probabilities)))


def judge(
    generate: Generate,
    rubric: Rubric,
    answers: Sequence[Responses],
    params: SamplingParams,
    report: Callable[[int, int], None],
    *,
    prefix: str,
    by_expected: bool,
) -> list[JudgedPrompt]:
    """Judges every response `params.samples` times; the results come in the order of `answers`.

    One request per instruction, its id that of the instruction: all its judgements share their beginning. The
    rubric's stop strings are added to those of `params`. Responses the length limit cut are judged like any other.

    A vote's expected score comes from the first token behind the concluding "Score:" that is no white space or
    dressing: the mean of the digits 0 to 5 under the model's probabilities there, whichever token was drawn. Of a
    verdict such as "4.5" that is the token of its 4. Temperature and top-p have no part in it.

    Args:
      prefix: words that each judgement begins with: the model goes on after them, and they belong to the vote's text.
      by_expected: a response's score is the mean of its expected scores, not that of its votes' scores.

    Raises ValueError where two entries of `answers` have one id: they would be judged with the same random numbers.
    """
    _check_distinct([answer.id for answer in answers])
    requests = [
        Request(
            id=answer.id,
            prompts=tuple(fill(rubric, answer.prompt, completion.text) for completion in answer.completions),
            chat=True,
            opening=prefix,
            watched=POINTS,
        )
        for answer in answers
    ]
    params = dataclasses.replace(params, stop=tuple(dict.fromkeys((*params.stop, *rubric.stop))))
    judgements = generate(requests, params, report)
    return [
        JudgedPrompt(
            id=answer.id,
            prompt=answer.prompt,
            responses=tuple(
                _judged(completion, texts, prefix, by_expected)
                for completion, texts in zip(answer.completions, judgements_of_answer, strict=True)
            ),
        )
        for answer, judgements_of_answer in zip(answers, judgements, strict=True)
    ]


def matched(ranked: Sequence[RankedPrompt], judged: Sequence[JudgedPrompt]) -> list[tuple[RankedPrompt, JudgedPrompt]]:
    """Each human ranking with the judge's verdict on the same instruction, joined by id, in the order of `ranked`.

    Raises ValueError where the two do not hold the same ids, once each, or differ in the instruction or a response.
    """
    _check_distinct([prompt.id for prompt in ranked])
    _check_distinct([prompt.id for prompt in judged])
    by_id = {prompt.id: prompt for prompt in judged}
    alone = sorted(by_id.keys() ^ {prompt.id for prompt in ranked})
    if alone:
        raise BadInput(
            f"{len(alone)} prompts are either ranked or judged but not both, among them '{alone[0]}'; "
            "judge the very prompts that are ranked"
        )
    for prompt in ranked:
        verdict = by_id[prompt.id]
        if len(prompt.ranks) != len(prompt.responses):
            raise BadInput(f"prompt '{prompt.id}': {len(prompt.responses)} responses but {len(prompt.ranks)} ranks")
        if prompt.prompt != verdict.prompt or prompt.responses != tuple(r.response for r in verdict.responses):
            raise BadInput(
                f"prompt '{prompt.id}': the judged texts are not the ranked ones, or in another order; "
                "judge the prompt again"
            )
    return [(prompt, by_id[prompt.id]) for prompt in ranked]


def _judged(completion: Completion, judgements: Sequence[Completion], prefix: str, by_expected: bool) -> JudgedResponse:
    votes = tuple(_vote(judgement, prefix) for judgement in judgements)
    expected = mean_expected(votes)
    return JudgedResponse(
        response=completion.text,
        tokens=completion.tokens,
        finished=completion.finished,
        votes=votes,
        score=expected if by_expected else mean_score(votes),
        expected=expected,
    )


def _vote(judgement: Completion, prefix: str) -> Vote:
    text = prefix + judgement.text
    vote, start = parse_vote(text, judgement.finished), after_head(text, judgement.finished)
    if start is None or not isinstance(judgement, WatchedCompletion):
        return vote
    probabilities = judgement.probabilities(max(0, start - len(prefix)), BEFORE_SCORE)
    return dataclasses.replace(vote, expected=None if probabilities is None else expected_points(probabilities))


def _mean(values: Iterable[float | None]) -> float | None:
    exact = [Fraction(value) for value in values if value is not None]
    return float(sum(exact) / len(exact)) if exact else None


def _check_distinct(ids: Sequence[str]) -> None:
    seen = set()
    for name in ids:
        if name in seen:
            raise BadInput(f"the id '{name}' occurs twice; give each prompt an id of its own")
        seen.add(name)
