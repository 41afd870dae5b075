"""How good answers are by the embedded world's exact score. Only the evaluation may ask."""

import math
from collections.abc import Sequence

from srlm_jax.records import Metric, OracleScores, Responses


def oracle_metrics(answers: Sequence[Responses], scores: Sequence[OracleScores]) -> dict[str, Metric]:
    """Of answers to held-out prompts, one unit a prompt:

    - oracle_score: mean exact score, 0 to 5.
    - perfect: share of answers that earn all five points.
    - response_tokens: mean length in tokens, the end token included.
    - cut: share of answers that the length limit cut.
    """
    points = [[score for score in row.scores if score is not None] for row in scores]
    points = [row for row in points if row]
    lengths = [[completion.tokens for completion in answer.completions] for answer in answers]
    return {
        "oracle_score": mean([sum(row) / len(row) for row in points]),
        "perfect": mean([sum(score == 5 for score in row) / len(row) for row in points]),
        "response_tokens": mean([sum(row) / len(row) for row in lengths]),
        "cut": mean(cut_shares(answers)),
    }


def cut_shares(answers: Sequence[Responses]) -> list[float]:
    """Of each prompt the share of answers that the length limit cut."""
    return [sum(not c.finished for c in answer.completions) / len(answer.completions) for answer in answers]


def mean(values: Sequence[float]) -> Metric:
    """The mean of at least two independent values."""
    n = len(values)
    mean = sum(values) / n
    variance = sum((value - mean) ** 2 for value in values) / max(n - 1, 1)
    return Metric(value=mean, stderr=math.sqrt(variance / n), n=n)
