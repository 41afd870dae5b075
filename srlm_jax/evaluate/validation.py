"""How good answers are where no oracle knows: a judge from outside scores them by the rubric."""

from collections.abc import Sequence

from srlm_jax.evaluate.oracle import cut_shares, mean
from srlm_jax.records import JudgedPrompt, Metric, Responses


def validation_metrics(answers: Sequence[Responses], judged: Sequence[JudgedPrompt]) -> dict[str, Metric]:
    """Of answers to validation prompts, one unit a prompt; a metric without at least two units is absent.

    - validation_score: mean of the scores that the judge gave, 0 to 5; answers without a vote are left out.
    - response_tokens: mean length in tokens, the end token included.
    - cut: share of answers that the length limit cut.
    """
    scores = [[r.score for r in prompt.responses if r.score is not None] for prompt in judged]
    lengths = [[completion.tokens for completion in answer.completions] for answer in answers]
    units = {
        "validation_score": [row for row in scores if row],
        "response_tokens": lengths,
        "cut": [[x] for x in cut_shares(answers)],
    }
    return {name: mean([sum(row) / len(row) for row in rows]) for name, rows in units.items() if len(rows) > 1}
