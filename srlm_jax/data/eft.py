"""Evaluation fine-tuning examples: how to judge, from the SFT baseline's own judgements (paper section 3.1.1).

The baseline judges every human-ranked response several times. The j-th judgements of a prompt's responses form one
draw, a ranking of the responses by the baseline; draws that agree with the humans teach, the others are dropped.
"""

import collections
import dataclasses
import enum
import hashlib
import itertools
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Annotated

from srlm_jax import limits
from srlm_jax.errors import BadInput
from srlm_jax.judge.rubric import Rubric, fill
from srlm_jax.judge.score import matched
from srlm_jax.limits import Count, above, at_least, at_most
from srlm_jax.records import Example, JudgedPrompt, RankedPrompt, Vote


class EftDrop(enum.StrEnum):
    """Why a draw, or an example of an accepted draw, is not in the training set."""

    TOO_FEW_SCORED = "too_few_scored"  # too few scores, or none of two responses that humans ordered
    AGAINST_HUMANS = "against_humans"  # some response scores above one that humans put before it
    TOO_MANY_TIES = "too_many_ties"
    EXTRA_DRAW = "extra_draw"  # beyond `draws_per_prompt`
    CUT = "cut"  # the length limit cut the judgement after its score
    DUPLICATE = "duplicate"
    MOST_COMMON_SCORE = "most_common_score"  # thinned out


@dataclasses.dataclass(frozen=True, kw_only=True)
class EftRules:
    """When a draw agrees with the humans, and how the examples are balanced; the paper leaves the numbers open.

    min_scored: the fewest responses of a draw that must have a score. The order of those alone is compared: a
      malformed judgement says nothing against the others. At least 2, or there is no order.
    max_tied_share: the largest share of the scored pairs that humans ordered which may score the same; at least one of
      these pairs must be ordered, whatever the share. Two responses have one pair, which must be ordered; three have
      three pairs, of which 0.4 lets one be tied. Six scores cannot order eight responses, so 0 keeps short lists only.
    draws_per_prompt: the most accepted draws kept of one prompt, so that easy prompts do not crowd out the others.
    most_common_share: the largest share of all examples the most common score may have, 1 for no thinning. The
      baseline says 4 too often, and a judge trained on that says nothing else.
    """

    min_scored: Annotated[int, at_least(2)]
    max_tied_share: Annotated[float, at_least(0), at_most(1)]
    draws_per_prompt: Count
    most_common_share: Annotated[float, above(0), at_most(1)]

    def __post_init__(self) -> None:
        limits.check(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EftExamples:
    """The examples, and the counts: prompts, draws, accepted draws, what was dropped by `EftDrop`, examples.

    draws = accepted_draws + too_few_scored + against_humans + too_many_ties + extra_draw.
    """

    examples: list[Example]
    counts: dict[str, int]


def disagreement(ranks: Sequence[int], votes: Sequence[Vote], rules: EftRules) -> EftDrop | None:
    """Why one draw (a vote for each response) does not agree with the human `ranks` (0 is the best), None if it does.

    Source: paper section 3.1.1, "the ranking of their scores agrees with the human ranking"; ties and lists with a
    missing score are settled by `rules`.
    """
    scored = [(rank, vote.score) for rank, vote in zip(ranks, votes, strict=True) if vote.score is not None]
    if len(scored) < rules.min_scored:
        return EftDrop.TOO_FEW_SCORED
    ordered = ties = 0
    for (better, better_score), (worse, worse_score) in itertools.combinations(sorted(scored), 2):
        if better == worse:
            continue  # humans put them level, so any scores agree
        if better_score < worse_score:
            return EftDrop.AGAINST_HUMANS
        ordered += 1
        ties += better_score == worse_score
    if ordered == 0:
        return EftDrop.TOO_FEW_SCORED
    # repr gives the decimal that was configured.
    return EftDrop.TOO_MANY_TIES if ties == ordered or ties > Fraction(repr(rules.max_tied_share)) * ordered else None


def eft_examples(
    ranked: Sequence[RankedPrompt], judged: Sequence[JudgedPrompt], rubric: Rubric, rules: EftRules, seed: int
) -> EftExamples:
    """The training examples: judge's prompt in, judgement out, for each scored judgement of each draw that agrees. A
    judgement that the length limit cut after its score counts in the draw, and is no example.

    `ranked` and `judged` hold the same prompts in any order; the examples follow `ranked`. An example's id is
    "prompt/response/draw", numbered from 0. The most common score (the higher of two equally common) is thinned down
    to `most_common_share`; a hash of `seed` and the id picks what goes. Where all examples have one score and the
    share is below 1 nothing is left: that judge has nothing to teach.

    Raises ValueError where the two do not match, or the responses of a prompt have unequal numbers of votes.
    """
    counts = collections.Counter({"prompts": len(ranked)})
    scores: dict[str, float] = {}
    examples: dict[tuple[str, str], Example] = {}
    for prompt, verdict in matched(ranked, judged):
        if len({len(response.votes) for response in verdict.responses}) > 1:
            raise BadInput(f"prompt '{prompt.id}': its responses have unequal numbers of votes; judge it again")
        kept = 0
        for draw, votes in enumerate(zip(*(response.votes for response in verdict.responses), strict=True)):
            counts["draws"] += 1
            drop = disagreement(prompt.ranks, votes, rules)
            if drop is None and kept == rules.draws_per_prompt:
                drop = EftDrop.EXTRA_DRAW
            if drop is not None:
                counts[drop] += 1
                continue
            kept += 1
            for index, (response, vote) in enumerate(zip(prompt.responses, votes, strict=True)):
                if vote.score is None:
                    continue
                if not vote.finished:
                    counts[EftDrop.CUT] += 1
                    continue
                text = fill(rubric, prompt.prompt, response)
                if (text, vote.text) in examples:
                    counts[EftDrop.DUPLICATE] += 1
                    continue
                example = Example(id=f"{prompt.id}/{index}/{draw}", prompt=text, response=vote.text, finished=True)
                examples[text, vote.text] = example
                scores[example.id] = vote.score
        counts["accepted_draws"] += kept
    thinned = _thinned(list(examples.values()), scores, rules.most_common_share, seed)
    counts[EftDrop.MOST_COMMON_SCORE] += len(examples) - len(thinned)
    counts["examples"] = len(thinned)
    return EftExamples(examples=thinned, counts={str(name): count for name, count in sorted(counts.items())})


def _thinned(examples: list[Example], scores: dict[str, float], share: float, seed: int) -> list[Example]:
    if not examples or share == 1:
        return examples
    frequency = collections.Counter(scores[example.id] for example in examples)
    most_common = max(frequency, key=lambda score: (frequency[score], score))
    rest = len(examples) - frequency[most_common]
    # k of the most common among k + rest examples: k <= share (k + rest). repr gives the decimal that was configured.
    exact = Fraction(repr(share))
    keep = int(exact * rest / (1 - exact))
    common = sorted((example.id for example in examples if scores[example.id] == most_common), key=_by_hash(seed))
    gone = set(common[keep:])
    return [example for example in examples if example.id not in gone]


def _by_hash(seed: int) -> Callable[[str], bytes]:
    return lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest()
