"""Best against worst: the preference pair of a judged prompt (paper section 2.2)."""

from srlm_jax.records import JudgedPrompt, PairDrop, PreferencePair


def preference_pair(judged: JudgedPrompt) -> PreferencePair | PairDrop:
    """The response with the highest score as chosen, that with the lowest as rejected, or why there is no pair.

    A response without a score takes no part: it is neither good nor bad. Where several share the highest or lowest
    score the first in sample order is taken; samples are drawn alike, so that is a fair draw. Scores are compared
    exactly: `judge.score.mean_score` gives equal means as equal floats. Where chosen and rejected are one text there
    is no pair, though another of the tied responses might have given one.

    Source: paper section 2.2; it states the tie rule for equal scores only.
    """
    scored = [response for response in judged.responses if response.score is not None]
    if not scored:
        return PairDrop.UNPARSEABLE
    if len(scored) == 1:
        return PairDrop.ONE_SCORE
    best = max(scored, key=lambda response: response.score)  # max and min keep the first of equals
    worst = min(scored, key=lambda response: response.score)
    if best.score == worst.score:
        return PairDrop.TIE
    if best.response == worst.response:
        return PairDrop.SAME_TEXT
    return PreferencePair(
        id=judged.id,
        prompt=judged.prompt,
        chosen=best.response,
        rejected=worst.response,
        chosen_finished=best.finished,
        rejected_finished=worst.finished,
        chosen_score=best.score,
        rejected_score=worst.score,
    )
