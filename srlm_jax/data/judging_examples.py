"""Judging examples of the user's own, in place of the SFT baseline's judgements (paper section 3.1.1).

A row of `config.seed_data.eft` has these columns; others are not looked at. See `srlm_jax.storage.rows` for the files
and data sets that can be read.

    {"prompt": "an instruction", "response": "the answer that is judged", "judgement": "It is clear.\\nScore: 4"}

The run puts the instruction and the answer into its rubric. All rows are trained on as they are: the rules of
config.eft do not apply to them.
"""

import collections
import dataclasses
import enum
from collections.abc import Sequence

from etils import epath

from srlm_jax.data.eft import EftExamples
from srlm_jax.data.trees import same_text_key
from srlm_jax.judge.parse import parse_vote
from srlm_jax.judge.rubric import Rubric, fill
from srlm_jax.records import Example, RankedPrompt
from srlm_jax.storage import jsonl, rows

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


def read_judging_examples(source: epath.PathLike) -> list[JudgingExample]:
    """The rows of a source, in its order.

    Raises:
      BadRecord, naming file and line: a column is missing or mistyped, the prompt is blank, or the judgement has no
        score by `judge.parse`.
      MissingExtra, OSError: as `rows.read` does.
    """
    columns = [field.name for field in dataclasses.fields(JudgingExample)]
    found = []
    for where, row in rows.read(source, columns):
        if missing := [column for column in columns if column not in row]:
            raise jsonl.BadRecord(f"{where}: no '{missing[0]}'; a judging example has {', '.join(columns)}")
        example = jsonl.decode(where, row, JudgingExample, rows.ADVICE)
        if not example.prompt.strip():
            raise jsonl.BadRecord(f"{where}: 'prompt' is blank; {rows.ADVICE}")
        vote = parse_vote(example.judgement, True)
        if vote.score is None:
            raise jsonl.BadRecord(
                f"{where}: 'judgement' has no score from 0 to 5 ({vote.no_vote}): end it in a line such as 'Score: 4', "
                f"or remove the row; it is {example.judgement!r:.80}"
            )
        found.append(example)
    return found


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
    found = []
    for prompt in prompts:
        places = sorted(set(prompt.ranks))
        for response, rank in zip(prompt.responses, prompt.ranks, strict=True):
            judgement = worded(wording, score_of_rank(rank, prompt.ranks), places.index(rank) + 1, len(prompt.ranks))
            found.append(JudgingExample(prompt=prompt.prompt, response=response, judgement=judgement))
    return found


def filled_examples(judged: Sequence[JudgingExample], eft_eval: Sequence[RankedPrompt], rubric: Rubric) -> EftExamples:
    """The training examples, in order: judge's prompt in, judgement out. An example's id is "eft-" and its row's number
    from 1. `counts`: rows, examples, and what was dropped by `JudgingDrop`.

    A row's prompt is in the evaluation where it is the same as one there but for case and white space.
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
