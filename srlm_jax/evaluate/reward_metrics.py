"""How well the judge agrees with humans: the paper's five reward-modelling metrics (section 3.1.2 and table 4)."""

import itertools
import math
from collections.abc import Sequence

from srlm_jax.judge.score import matched
from srlm_jax.records import JudgedPrompt, Metric, RankedPrompt

_PERFECT = 5.0


def reward_metrics(ranked: Sequence[RankedPrompt], judged: Sequence[JudgedPrompt]) -> dict[str, Metric]:
    """The judge's mean scores against the human ranks, over prompts with at least two responses. All are fractions
    or correlations, not per cent; where the paper is silent the rule is ours and stated here.

    - pairwise_accuracy: of all pairs of responses that humans ordered, the fraction the judge orders alike. A tie of
      the judge counts one half, so a judge that always says 4 has 0.5.
    - five_best: of the responses with a perfect score (every vote that parses is a 5), the fraction that is the
      humans' best among all responses to its prompt. An expected score is hardly ever perfect.
    - exact_match: the fraction of prompts the judge orders wholly as the humans do. A tie of the judge where humans
      see a difference is a miss, and so is a response without a score.
    - spearman, kendall_tau_b: rank correlation within each prompt of two or more scored responses, averaged over
      prompts; 0 where all scores of the prompt are equal. 1 is full agreement.
    - scored: the fraction of judgements that carry a score, as they were drawn. Responses without a score are left out
      of pairs, five_best and correlations: read the metrics beside this one.

    The unit of a standard error, and of `n`, is the prompt: responses to one prompt are not independent. Means over
    prompts have s / sqrt(n); ratios of sums over prompts have the linearised ratio estimator. A metric fewer than two
    prompts bear on (no response is perfect, say) has no standard error and is left out of the result.

    Raises ValueError where `ranked` and `judged` do not hold the same prompts; the order is free.
    """
    pairs, perfect, scored = [], [], []  # (numerator, denominator) for each prompt
    exact, spearman, kendall = [], [], []  # one value for each prompt
    for prompt, verdict in matched(ranked, judged):
        if len(prompt.ranks) < 2:
            continue
        scores = [response.score for response in verdict.responses]
        known = [(rank, score) for rank, score in zip(prompt.ranks, scores, strict=True) if score is not None]
        votes = [vote for response in verdict.responses for vote in response.votes]
        scored.append((sum(vote.score is not None for vote in votes), len(votes)))
        pairs.append(_pairs(known))
        perfect_ranks = [rank for rank, score in known if score == _PERFECT]
        perfect.append((perfect_ranks.count(min(prompt.ranks)), len(perfect_ranks)))
        exact.append(float(len(known) == len(scores) and _same_order(known)))
        if len(known) >= 2:
            goodness = [-rank for rank, _ in known]
            known_scores = [score for _, score in known]
            spearman.append(spearman_rho(known_scores, goodness))
            kendall.append(kendall_tau_b(known_scores, goodness))
    metrics = {
        "pairwise_accuracy": ratio(pairs),
        "five_best": ratio(perfect),
        "exact_match": _mean(exact),
        "spearman": _mean(spearman),
        "kendall_tau_b": _mean(kendall),
        "scored": ratio(scored),
    }
    return {name: metric for name, metric in metrics.items() if metric is not None}


def spearman_rho(x: Sequence[float], y: Sequence[float]) -> float:
    """Pearson's correlation of the ranks, equal values sharing their mean rank; 0 where x or y is constant."""
    rank_x, rank_y = _mean_ranks(x), _mean_ranks(y)
    middle = (len(rank_x) + 1) / 2
    covariance = sum((a - middle) * (b - middle) for a, b in zip(rank_x, rank_y, strict=True))
    spread = math.sqrt(sum((a - middle) ** 2 for a in rank_x) * sum((b - middle) ** 2 for b in rank_y))
    return covariance / spread if spread else 0.0


def kendall_tau_b(x: Sequence[float], y: Sequence[float]) -> float:
    """(concordant - discordant) / sqrt(pairs untied in x * pairs untied in y); 0 where x or y is constant."""
    signs = [(_sign(a - c), _sign(b - d)) for (a, b), (c, d) in itertools.combinations(zip(x, y, strict=True), 2)]
    untied = math.sqrt(sum(s != 0 for s, _ in signs) * sum(t != 0 for _, t in signs))
    return sum(s * t for s, t in signs) / untied if untied else 0.0


def _pairs(known: list[tuple[int, float]]) -> tuple[float, int]:
    """(credit, number) of the pairs that humans ordered."""
    gains = [
        (_sign(better_score - worse_score) + 1) / 2
        for (better, better_score), (worse, worse_score) in itertools.combinations(sorted(known), 2)
        if better != worse
    ]
    return sum(gains), len(gains)


def _same_order(known: list[tuple[int, float]]) -> bool:
    """Whether the scores order every pair as the ranks do, ties with ties."""
    return all(
        _sign(score - other_score) == _sign(other_rank - rank)
        for (rank, score), (other_rank, other_score) in itertools.combinations(known, 2)
    )


def _sign(x: float) -> int:
    return (x > 0) - (x < 0)


def _mean_ranks(values: Sequence[float]) -> list[float]:
    return [(sum(v < value for v in values) + sum(v <= value for v in values) + 1) / 2 for value in values]


def _mean(values: list[float]) -> Metric | None:
    return ratio([(value, 1) for value in values])


def ratio(parts: list[tuple[float, float]]) -> Metric | None:
    """sum of numerators / sum of denominators over prompts; with all denominators 1 it is the mean and s / sqrt(n)."""
    parts = [part for part in parts if part[1]]
    n = len(parts)
    if n < 2:
        return None
    total = sum(below for _, below in parts)
    value = sum(above for above, _ in parts) / total
    squares = sum((above - value * below) ** 2 for above, below in parts)
    return Metric(value=value, stderr=math.sqrt(n / (n - 1) * squares) / total, n=n)
