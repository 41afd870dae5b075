"""The user's own data -> the records of the seed data, and a fixed set of prompts.

JSON Lines (plain or gzip), Parquet, or a "tfds:" name; see `srlm_jax.storage.rows`. A row has these columns, others
are not looked at:

    IFT      {"prompt": "...", "response": "..."}
    EFT      {"prompt": "...", "responses": ["...", "..."], "ranks": [1, 0]}    0 is the best, equal ranks are level
    prompts  {"prompt": "..."}

and, if it likes, an "id" of its own. Nothing is repaired: a row that is wrong stops the reading with its place.
"""

import collections
import dataclasses
import enum
from collections.abc import Iterable, Sequence
from typing import TypeVar

from etils import epath

from srlm_jax.data.trees import SeedSplit, same_text_key
from srlm_jax.errors import BadInput
from srlm_jax.records import Example, Prompt, RankedPrompt
from srlm_jax.storage import jsonl, rows


class SourceDrop(enum.StrEnum):
    """Why a row of the user's is not trained on."""

    IN_EFT_EVAL = "in_eft_eval"  # its prompt is asked in the evaluation
    SAME_PROMPT = "same_prompt"  # an earlier row of the prompts has it


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptRow:
    """A row of a set of prompts."""

    id: str
    prompt: str


Record = TypeVar("Record", Example, RankedPrompt, PromptRow)


def read_examples(source: epath.PathLike, name: str) -> tuple[list[Example], dict[str, int]]:
    """IFT examples, and how many rows were dropped, by reason. A row without an id is called `name` and its number.

    Raises:
      BadRecord, naming file and line: a column is missing, mistyped or blank, or an id occurs twice.
      MissingExtra, OSError: as `rows.read` does.
    """
    return _read(source, name, Example)


def read_ranked(source: epath.PathLike, name: str) -> tuple[list[RankedPrompt], dict[str, int]]:
    """Prompts with ranked responses; raises as `read_examples` does, and where the ranks do not rank the responses."""
    return _read(source, name, RankedPrompt)


def read_prompts(source: epath.PathLike, name: str, *, blank: bool = False) -> tuple[list[Prompt], dict[str, int]]:
    """A fixed set of prompts, of origin "user"; raises as `read_examples` does. With `blank` they may be empty."""
    found, counts = _read(source, name, PromptRow, blank=blank)
    return [Prompt(id=row.id, text=row.prompt, origin="user") for row in found], counts


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
    source: epath.PathLike, name: str, cls: type[Record], *, blank: bool = False
) -> tuple[list[Record], dict[str, int]]:
    columns = [field.name for field in dataclasses.fields(cls) if field.name not in ("id", "finished")]
    found, places = [], {}
    for number, (where, row) in enumerate(rows.read(source, ("id", *columns)), start=1):
        if missing := [column for column in columns if column not in row]:
            raise jsonl.BadRecord(
                f"{where}: no '{missing[0]}'; a row of this kind has {', '.join(columns)} and, if it likes, id"
            )
        if row.get("id") is None:
            row["id"] = f"{name}-{number:06}"
        if cls is Example:
            row["finished"] = True  # a human's answer is whole
        record = jsonl.decode(where, row, cls, rows.ADVICE)
        problem = None if blank and cls is PromptRow else _fault(record)
        if problem is None and record.id in places:
            problem = f"id '{record.id}' is already that of {places[record.id]}"
        if problem is not None:
            raise jsonl.BadRecord(f"{where}: {problem}; {rows.ADVICE}")
        places[record.id] = where
        found.append(record)
    return found, {}


def _fault(record: Example | RankedPrompt | PromptRow) -> str | None:
    texts = {name: text for name, text in vars(record).items() if isinstance(text, str)}
    if isinstance(record, RankedPrompt):
        texts |= {f"responses[{index}]": text for index, text in enumerate(record.responses)}
    if blank := [name for name, text in texts.items() if not text.strip()]:
        return f"'{blank[0]}' is blank"
    if not isinstance(record, RankedPrompt):
        return None
    if len(record.ranks) != len(record.responses):
        return f"{len(record.responses)} responses and {len(record.ranks)} ranks"
    if len(set(record.ranks)) < 2:
        return f"ranks {list(record.ranks)} order nothing: two responses of different rank are needed"
    if min(record.ranks) != 0:
        return f"ranks {list(record.ranks)} begin at {min(record.ranks)}: the best has 0"
    return None
