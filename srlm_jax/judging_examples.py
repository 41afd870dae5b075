"""`python -m srlm_jax.judging_examples --trees=FILE --examples=FILE.jsonl`, or `--ranked=FILE`: judging examples for
config.seed_data.eft from answers that humans ranked."""

import collections
import dataclasses

from absl import flags
from etils import epath

from srlm_jax import commandline
from srlm_jax.data import oasst, sources
from srlm_jax.data.judging_examples import BEST, COUNT, RANK, SCORE, WORST, from_ranks, score_of_rank, worded
from srlm_jax.data.trees import ranked_prompts
from srlm_jax.errors import BadInput
from srlm_jax.judge.parse import parse_vote
from srlm_jax.storage import jsonl, paths, texts

TEMPLATE = f"The response meets {SCORE} of the five criteria.\nScore: {SCORE}"

_RANKED = flags.DEFINE_string(
    "ranked", None, 'Rows {"prompt": "...", "responses": ["...", ...], "ranks": [1, 0, ...]}.'
)
_TREES = flags.DEFINE_string("trees", None, "An Open Assistant export, in place of --ranked.")
_LANG = flags.DEFINE_string("lang", "en", "The language of the trees that are used.")
_EXAMPLES = flags.DEFINE_string("examples", None, "The file to make: one judging example a line.")
_VERDICT = flags.DEFINE_string(
    "template",
    None,
    f"A text file: how a judgement is worded. {SCORE} stands for the score, {RANK} for the answer's place among the "
    f"{COUNT} answers to its prompt, 1 the best. If not given: {TEMPLATE!r}.",
)


def write_examples(
    output: epath.PathLike,
    *,
    ranked: epath.PathLike | None,
    trees: epath.PathLike | None,
    lang: str,
    template: epath.PathLike | None,
) -> None:
    """Writes a judging example for every ranked answer, in the layout of `data.sources`, and prints counts.

    The judge's prompt is no part of it: a run fills its own rubric with the instruction and the answer.

    Args:
      ranked, trees: exactly one of the two, as for config.seed_data.eft_train and config.seed_data.trees.
      template: the file of a judgement's wording, or None for TEMPLATE.

    Raises BadInput, BadRecord, MissingExtra or OSError, and leaves no output then.
    """
    if (ranked is None) == (trees is None):
        raise BadInput("give one of --ranked=FILE and --trees=FILE")
    output = paths.given(output)
    if output.exists():
        raise BadInput(f"--examples={output} is there already: choose another file, or remove it")
    wording = TEMPLATE if template is None else read_template(template)
    if ranked is not None:
        prompts, counts = sources.read_ranked(ranked, "ranked")
        counts = {"prompts": len(prompts)} | counts
    else:
        prompts, counts = ranked_prompts(oasst.read_export(trees).trees, lang)
    if not prompts:
        raise BadInput(f"{ranked or trees}: holds no prompt with two ranked answers ({_said(counts)})")
    rows = from_ranks(prompts, wording)
    jsonl.write_documents(output, map(dataclasses.asdict, rows))
    scores = collections.Counter(score_of_rank(rank, prompt.ranks) for prompt in prompts for rank in prompt.ranks)
    counts |= {f"score {score}": scores[score] for score in sorted(scores)}
    print(f"{output}: {len(rows)} judging examples ({_said(counts)})")


def read_template(path: epath.PathLike) -> str:
    """How a judgement is worded, from a UTF-8 text file.

    Raises:
      BadInput, naming the file: it is not text, or a judgement so worded does not have the score that it is to have.
      OSError: it cannot be read.
    """
    text = texts.read(path)
    if SCORE not in text:
        raise BadInput(f"{path}: the template does not hold {SCORE}; write for instance a last line 'Score: {SCORE}'")
    for score in range(WORST, BEST + 1):
        judgement = worded(text, score, 1, 2)
        if parse_vote(judgement, True).score != score:
            raise BadInput(
                f"{path}: the score is not found in a judgement so worded, {judgement!r:.80}; end the template in a "
                f"line 'Score: {SCORE}'"
            )
    return text


def _said(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())


def main(argv: list[str]) -> None:
    with commandline.begin(argv, "--trees=FILE"):
        write_examples(
            _EXAMPLES.value, ranked=_RANKED.value, trees=_TREES.value, lang=_LANG.value, template=_VERDICT.value
        )


if __name__ == "__main__":
    commandline.run(main, ["examples"])
