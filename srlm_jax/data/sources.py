"""The user's own data -> the records of the seed data, and a fixed set of prompts.

`srlm_jax.storage.rows` says which files and data sets are read, `srlm_jax.data.layouts` which columns. Rows of ours
are as follows; all but those that judge may have an "id" of their own.

    IFT      {"prompt": "...", "response": "..."}
    EFT      {"prompt": "...", "responses": ["...", "..."], "ranks": [1, 0]}    0 is the best, equal ranks are level
    judging  {"prompt": "...", "response": "the answer that is judged", "judgement": "It is clear.\\nScore: 4"}
    prompts  {"prompt": "..."}

Rows that cannot be used (a blank answer, a judgement without a score, an id that occurs twice) are dropped and counted
by reason. A source is refused where they are more than half, and where a value has a wrong type; the message counts
such rows.
"""

import collections
import enum
import itertools
from collections.abc import Iterable, Sequence

from etils import epath

from srlm_jax.data import layouts
from srlm_jax.data.judging_examples import JudgingExample
from srlm_jax.data.layouts import Content, Layout, RowDrop, Unusable
from srlm_jax.data.scalars import Misfit, identity
from srlm_jax.data.trees import SeedSplit, same_text_key
from srlm_jax.errors import BadInput
from srlm_jax.records import Example, Prompt, RankedPrompt
from srlm_jax.storage import rows
from srlm_jax.storage.jsonl import BadRecord


class SourceDrop(enum.StrEnum):
    """Why a usable row of the user's is not trained on."""

    IN_EFT_EVAL = "in_eft_eval"  # its prompt is asked in the evaluation
    SAME_PROMPT = "same_prompt"  # an earlier row of the prompts has it


def read_examples(source: epath.PathLike, name: str) -> tuple[list[Example], dict[str, int]]:
    """IFT examples, and how many rows were dropped, or used in part, by `RowDrop` and `LeftOut`. A row without an id is
    called `name` and its number.

    Raises:
      BadRecord, naming file and line: no layout has these columns, a value has a wrong type, or more than half of the
        rows cannot be used.
      MissingExtra, OSError: as `rows.read` does.
    """
    used, counts = _read(source, name, layouts.EXAMPLES)
    # A human's answer is whole.
    examples = [Example(id=id_, prompt=c.prompt, response=c.responses[0], finished=True) for id_, c in used]
    return examples, counts


def read_ranked(source: epath.PathLike, name: str) -> tuple[list[RankedPrompt], dict[str, int]]:
    """Prompts with ranked responses; raises as `read_examples` does, and where the ranks do not rank the responses."""
    used, counts = _read(source, name, layouts.RANKINGS)
    ranked = [RankedPrompt(id=id_, prompt=c.prompt, responses=c.responses, ranks=c.ranks) for id_, c in used]
    return ranked, counts


def read_judging_examples(source: epath.PathLike) -> tuple[list[JudgingExample], dict[str, int]]:
    """Judged answers, in the order of their rows; raises as `read_examples` does."""
    used, counts = _read(source, "judging", layouts.JUDGED)
    return [JudgingExample(prompt=c.prompt, response=c.responses[0], judgement=c.judgement) for _, c in used], counts


def read_prompts(source: epath.PathLike, name: str, *, blank: bool = False) -> tuple[list[Prompt], dict[str, int]]:
    """A fixed set of prompts, of origin "user"; raises as `read_examples` does. With `blank` they may be empty."""
    used, counts = _read(source, name, layouts.PROMPTS, blank=blank)
    return [Prompt(id=id_, text=c.prompt, origin="user") for id_, c in used], counts


def without_overlap(
    ift: Sequence[Example], eft_train: Sequence[RankedPrompt], eft_eval: Sequence[RankedPrompt]
) -> SeedSplit:
    """The three sets, without what trains on a prompt of the evaluation: prompts that are the same but for case and
    white space.

    Prompts that occur more than once in a set, or in both training sets, are counted and stay.

    Raises ValueError where a training set has nothing left. `eft_train` may be empty from the beginning.
    """
    evaluated = _keys(eft_eval)
    counts = collections.Counter()
    kept = {}
    for name, records in (("ift", ift), ("eft_train", eft_train)):
        kept[name] = [record for record in records if same_text_key(record.prompt) not in evaluated]
        counts[f"{name}_{SourceDrop.IN_EFT_EVAL}"] = len(records) - len(kept[name])
        if records and not kept[name]:
            raise BadInput(f"all {len(records)} prompts of {name} are in eft_eval: they cannot be trained on as well")
    sets = kept | {"eft_eval": list(eft_eval)}
    for name, records in sets.items():
        counts[name] = len(records)
        counts[f"{name}_{SourceDrop.SAME_PROMPT}"] = len(records) - len(_keys(records))
    counts["ift_in_eft_train"] = len(_keys(sets["ift"]) & _keys(sets["eft_train"]))
    return SeedSplit(**sets, counts={name: counts[name] for name in sorted(counts)})


def usable_prompts(prompts: Sequence[Prompt], eft_eval: Sequence[RankedPrompt]) -> tuple[list[Prompt], dict[str, int]]:
    """The prompts that may be trained on, each text once, and how many are not, by `SourceDrop`."""
    evaluated, seen = _keys(eft_eval), set()
    counts = collections.Counter()
    kept = []
    for prompt in prompts:
        key = same_text_key(prompt.text)
        if key in evaluated:
            counts[SourceDrop.IN_EFT_EVAL] += 1
        elif key in seen:
            counts[SourceDrop.SAME_PROMPT] += 1
        else:
            seen.add(key)
            kept.append(prompt)
    return kept, {str(reason): counts[reason] for reason in SourceDrop}


def _keys(records: Iterable[Example | RankedPrompt]) -> set[str]:
    return {same_text_key(record.prompt) for record in records}


def _read(
    source: epath.PathLike, name: str, known: Sequence[Layout], *, blank: bool = False
) -> tuple[list[tuple[str, Content]], dict[str, int]]:
    """(id, what it says) of every row that can be used, and the counts."""
    source_rows = rows.read(source, layouts.columns_of(known))
    first = next(source_rows)
    layout = layouts.choose(known, first[1], rows.mapping(source))
    if layout is None:
        raise BadRecord(f"{first[0]}: {_unknown(source, known)}")
    used, wrong, dropped, left_out = {}, [], collections.defaultdict(list), collections.Counter()
    total = 0
    for total, (where, row) in enumerate(itertools.chain([first], source_rows), start=1):
        try:
            content = layouts.read(layout, row, blank=blank)
            id_ = identity(row.get("id"), "id") or f"{name}-{total:06}"
            if id_ in used:
                raise Unusable(RowDrop.SAME_ID)
        except Misfit as misfit:
            wrong.append(f"{where}: {misfit}")
        except Unusable as unusable:
            dropped[unusable.args[0]].append(where)
        else:
            used[id_] = content
            left_out.update(content.left_out)
    if wrong:
        others = f"; {len(wrong)} of {total} rows are wrong, this is the first" if len(wrong) > 1 else ""
        raise BadRecord(f"{wrong[0]}{others}; {rows.ADVICE}")
    if 2 * (total - len(used)) > total:
        reasons = ", ".join(f"{reason} {len(places)} (the first: {places[0]})" for reason, places in dropped.items())
        raise BadRecord(
            f"{source}: {total - len(used)} of {total} rows cannot be used: {reasons}; correct them, or take other "
            f"columns, as by {_example_mapping(layout)}"
        )
    counts = {reason: len(places) for reason, places in dropped.items()} | left_out
    return [*used.items()], {str(reason): count for reason, count in sorted(counts.items())}


def _unknown(source: epath.PathLike, known: Sequence[Layout]) -> str:
    """Why none of the layouts has the columns of a source, and what to do."""
    columns = rows.columns_of(source)
    if "message_id" in columns or "message_tree_id" in columns:
        return "an Open Assistant export, which config.seed_data.trees takes"
    ways = ", or ".join(" + ".join(layout.columns) for layout in known)
    return (
        f"the columns are {', '.join(columns):.300}; wanted: {ways}; name yours at the end of the path, as in "
        f"{_example_mapping(known[0])}"
    )


def _example_mapping(layout: Layout) -> str:
    return "FILE?" + "&".join(f"{column}=YOUR_{column.upper()}" for column in layout.columns)
