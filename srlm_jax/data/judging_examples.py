"""Judging examples of the user's own, in place of the SFT baseline's judgements (paper section 3.1.1).

They come from the file of `config.seed_data.eft` (see `srlm_jax.data.sources`) or from human ranks. The run puts the
instruction and the answer into its rubric. The rules of config.eft do not apply to them.
"""

import collections
import dataclasses
import enum
from collections.abc import Sequence

from srlm_jax.data.eft import EftExamples
from srlm_jax.data.trees import same_text_key
from srlm_jax.judge.rubric import Rubric, fill
from srlm_jax.records import Example, RankedPrompt

# config.seed_data.eft for examples that are made from the human ranks of the EFT training prompts.
FROM_RANKS = "ranks"
SCORE, RANK, COUNT = "<SCORE_HERE>", "<RANK_HERE>", "<COUNT_HERE>"
BEST, WORST = 5, 1


class JudgingDrop(enum.StrEnum):
    """Why a judging example is not trained on."""

    IN_EFT_EVAL = "in_eft_eval"  # its prompt is asked in the evaluation
    DUPLICATE = "duplicate"


@dataclasses.dataclass(frozen=True, kw_only=True)
class JudgingExample:
    """An instruction, an answer to it, and a judgement of the answer that ends in its score."""

    prompt: str
    response: str
    judgement: str


def score_of_rank(rank: int, ranks: Sequence[int]) -> int:
    """The score of an answer by its human rank: 5 for the best of its prompt, 1 for the worst, linear between them in
    the place among the ranks that occur, rounded to whole points and halves up."""
    places = sorted(set(ranks))
    steps = len(places) - 1
    below = places.index(rank) * (BEST - WORST)
    return BEST if steps == 0 else (2 * (BEST * steps - below) + steps) // (2 * steps)


def worded(wording: str, score: int, rank: int, count: int) -> str:
    """A judgement by a template. SCORE stands for the score, RANK for the answer's place from 1 among COUNT answers."""
    return wording.replace(SCORE, str(score)).replace(RANK, str(rank)).replace(COUNT, str(count))


def from_ranks(prompts: Sequence[RankedPrompt], wording: str) -> list[JudgingExample]:
    """A judging example for every ranked answer, its score by `score_of_rank`."""
    examples = []
    for prompt in prompts:
        places = sorted(set(prompt.ranks))
        for response, rank in zip(prompt.responses, prompt.ranks, strict=True):
            judgement = worded(wording, score_of_rank(rank, prompt.ranks), places.index(rank) + 1, len(prompt.ranks))
            examples.append(JudgingExample(prompt=prompt.prompt, response=response, judgement=judgement))
    return examples


def filled_examples(judged: Sequence[JudgingExample], eft_eval: Sequence[RankedPrompt], rubric: Rubric) -> EftExamples:
    """The training examples, in order: judge's prompt in, judgement out. An example's id is "eft-" and its number in
    `judged`, from 1. `counts`: how many are given (rows) and made (examples), and what was dropped by `JudgingDrop`.

    A prompt is in the evaluation where it is the same as one there but for case and white space.
    """
    evaluated = {same_text_key(prompt.prompt) for prompt in eft_eval}
    counts = collections.Counter({"rows": len(judged)} | {str(reason): 0 for reason in JudgingDrop})
    examples: dict[tuple[str, str], Example] = {}
    for number, row in enumerate(judged, start=1):
        text = fill(rubric, row.prompt, row.response)
        if same_text_key(row.prompt) in evaluated:
            counts[JudgingDrop.IN_EFT_EVAL] += 1
        elif (text, row.judgement) in examples:
            counts[JudgingDrop.DUPLICATE] += 1
        else:
            examples[text, row.judgement] = Example(
                id=f"eft-{number:06}", prompt=text, response=row.judgement, finished=True
            )
    counts["examples"] = len(examples)
    return EftExamples(
        examples=list(examples.values()), counts={str(name): count for name, count in sorted(counts.items())}
    )
