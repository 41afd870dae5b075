"""Open Assistant's exports, in each form in which people have them -> message trees for `srlm_jax.data.trees`.

Nested: one tree a line, as in `*_ready.trees.jsonl.gz`. Flat: one message a row that names its parent, as in
`*_ready.messages.jsonl.gz`, in the rows of the data set's Parquet files, or in what `oasst_builder` makes. Which of the
two it is shows in the first row. Keys that are unset may be absent or null; keys that are not needed (labels, emojis,
...) are not looked at.
"""

import collections
import dataclasses
import enum
import itertools
from collections.abc import Iterable, Iterator, Sequence

from etils import epath

from srlm_jax.storage import jsonl, rows
from srlm_jax.storage.rows import ADVICE

_NESTED = ("message_tree_id", "prompt")
_FLAT = ("message_id", "parent_id", "text", "role", "lang", "deleted", "rank")
# What stands for null in a TFDS data set, which has none.
TFDS_NULLS = {"parent_id": "", "lang": "", "rank": -1}
_ANSWERED_BY = {"prompter": "assistant", "assistant": "prompter"}


class Omission(enum.StrEnum):
    """Why a message of an export is in no tree, or stands in one and counts for nothing."""

    NO_PARENT = "no_parent"  # its parent is not in the file: left out
    BELOW_NO_PARENT = "below_no_parent"
    DELETED = "deleted"  # in its tree, with the mark by which the seed split drops it
    BELOW_DELETED = "below_deleted"
    UNRANKED_ANSWER = "unranked_answer"  # an assistant's message without a rank


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export:
    """The trees of a file in Open Assistant's nested form, and `counts`: those of `survey` and each `Omission`.

    Of a flat file: rows = messages + no_parent + below_no_parent + deleted + below_deleted.
    """

    trees: list[dict]
    counts: dict[str, int]


def read_export(source: epath.PathLike) -> Export:
    """The trees of an export, checked as far as they are used.

    Of flat messages a tree's id is that of its root, and replies keep the order of the file.

    Raises:
      BadRecord, naming file, line and field: the file is damaged, a row lacks what is needed, an id occurs twice,
        messages are one another's parents in a circle, or somebody answers himself.
      MissingExtra, OSError: as `rows.read` does.
    """
    found = rows.read(source, tuple(dict.fromkeys(_NESTED + _FLAT)))
    if rows.is_tfds(source):
        found = ((where, _with_nulls(row)) for where, row in found)
    where, first = next(found)
    found = itertools.chain([(where, first)], found)
    if "prompt" in first:
        trees, counts = _nested(found), collections.Counter()
    elif "message_id" in first:
        trees, counts = _linked(found)
    else:
        raise jsonl.BadRecord(
            f"{where}: neither a message tree (with 'message_tree_id' and 'prompt') nor a message (with 'message_id' "
            "and 'parent_id'); give an Open Assistant export of trees or of messages"
        )
    return Export(trees=trees, counts={str(name): count for name, count in sorted((survey(trees) + counts).items())})


def survey(trees: Sequence[dict]) -> collections.Counter[str]:
    """What there is to learn from: messages and roots that stand, prompts (at any turn, and at the first) with two or
    more ranked answers, the pairs of answers to one prompt that differ in rank, and what `Omission` counts."""
    counts = collections.Counter()
    for tree in trees:
        waiting = [(tree["prompt"], False)]
        while waiting:
            message, below_deleted = waiting.pop()
            replies = message.get("replies") or []
            gone = below_deleted or bool(message.get("deleted"))
            waiting += [(reply, gone) for reply in replies]
            if gone:
                counts[Omission.DELETED if message.get("deleted") else Omission.BELOW_DELETED] += 1
                continue
            first_turn = message is tree["prompt"]
            counts["messages"] += 1
            counts["roots"] += first_turn
            if message["role"] == "assistant":
                counts[Omission.UNRANKED_ANSWER] += message.get("rank") is None
                continue
            ranks = [r["rank"] for r in replies if not r.get("deleted") and r.get("rank") is not None]
            if len(ranks) < 2:
                continue
            pairs = sum(a != b for a, b in itertools.combinations(ranks, 2))
            for prefix in ("", "first_turn_")[: 1 + first_turn]:
                counts[f"{prefix}ranked_prompts"] += 1
                counts[f"{prefix}ordered_pairs"] += pairs
    return counts


def messages(trees: Iterable[dict]) -> Iterator[dict]:
    """The flat messages of trees, each after its parent, with the keys of `TFDS_NULLS` and message_id, text, role and
    deleted; null where one is unset."""
    for tree in trees:
        waiting = [(tree["prompt"], None)]
        while waiting:
            message, parent = waiting.pop()
            yield {name: message.get(name) for name in _FLAT} | {
                "parent_id": parent,
                "deleted": bool(message.get("deleted")),
            }
            waiting += [(reply, message["message_id"]) for reply in reversed(message.get("replies") or [])]


def _with_nulls(row: dict) -> dict:
    return {name: None if name in TFDS_NULLS and value == TFDS_NULLS[name] else value for name, value in row.items()}


def _nested(found: Iterable[tuple[str, dict]]) -> list[dict]:
    trees, places = [], {}
    for where, tree in found:
        _field(tree, "message_tree_id", str, where, "message_tree_id")
        waiting = [(_field(tree, "prompt", dict, where, "prompt"), "prompt", "prompter")]
        while waiting:
            message, path, role = waiting.pop()
            if not isinstance(message, dict):
                raise jsonl.BadRecord(f"{where}: field '{path}': expected an object, found {message!r:.60}; {ADVICE}")
            _check_message(message, where, f"{path}.")
            _check_role(message, role, where, f"{path}.")
            _check_new(message, where, places)
            replies = message.get("replies") or []
            waiting += [(reply, f"{path}.replies[{index}]", _ANSWERED_BY[role]) for index, reply in enumerate(replies)]
        trees.append(tree)
    return trees


def _linked(found: Iterable[tuple[str, dict]]) -> tuple[list[dict], collections.Counter[str]]:
    """Trees of flat messages, and what is in none of them."""
    messages, parents, places = {}, {}, {}
    for where, row in found:
        _check_message(row, where, "")
        _check_new(row, where, places)
        parents[row["message_id"]] = row.pop("parent_id", None)
        messages[row["message_id"]] = row | {"replies": []}
    roots, orphans = [], []
    for name, message in messages.items():
        parent = parents[name]
        if parent is None:
            roots.append(message)
        elif parent not in messages:
            orphans.append(message)
        else:
            messages[parent]["replies"].append(message)
    below = sum(1 for orphan in orphans for _ in _walk(orphan)) - len(orphans)
    reached = {message["message_id"] for top in roots + orphans for message in _walk(top)}
    if len(reached) < len(messages):  # what is above a message ends neither at a root nor outside the file
        name = next(name for name in messages if name not in reached)
        climbed = set()
        while name not in climbed:  # up into the circle that it hangs below or lies on
            climbed.add(name)
            name = parents[name]
        raise jsonl.BadRecord(
            f"{places[name]}: message '{name}' is its own ancestor: its parents, from '{parents[name]}' on, form a "
            f"circle; {ADVICE}"
        )
    for root in roots:
        _check_role(root, "prompter", places[root["message_id"]], "")
        for message in _walk(root):
            for reply in message["replies"]:
                _check_role(reply, _ANSWERED_BY[message["role"]], places[reply["message_id"]], "")
    counts = collections.Counter({Omission.NO_PARENT: len(orphans), Omission.BELOW_NO_PARENT: below})
    return [{"message_tree_id": root["message_id"], "prompt": root} for root in roots], counts


def _walk(top: dict) -> Iterator[dict]:
    waiting = [top]
    while waiting:
        message = waiting.pop()
        waiting += message["replies"]
        yield message


def _check_message(message: dict, where: str, path: str) -> None:
    for name in ("message_id", "text", "role"):
        _field(message, name, str, where, path + name)
    for name, kind in (("parent_id", str), ("lang", str), ("deleted", bool), ("rank", int), ("replies", list)):
        if message.get(name) is not None:
            _field(message, name, kind, where, path + name)
    if (message.get("rank") or 0) < 0:
        raise jsonl.BadRecord(f"{where}: field '{path}rank': expected 0 or more, found {message['rank']}; {ADVICE}")
    if message["role"] not in _ANSWERED_BY:
        raise jsonl.BadRecord(
            f"{where}: field '{path}role': expected 'prompter' or 'assistant', found {message['role']!r:.60}; {ADVICE}"
        )


def _check_role(message: dict, role: str, where: str, path: str) -> None:
    if message["role"] != role:
        raise jsonl.BadRecord(
            f"{where}: field '{path}role': expected '{role}', for the two take turns and a prompter begins, found "
            f"'{message['role']}'; {ADVICE}"
        )


def _check_new(message: dict, where: str, places: dict[str, str]) -> None:
    """Enters the message's id, and where it stands, into `places`."""
    name = message["message_id"]
    if name in places:
        raise jsonl.BadRecord(f"{where}: message_id '{name}' is already that of {places[name]}; keep one of the two")
    places[name] = where


def _field(document: dict, name: str, kind: type, where: str, path: str) -> object:
    if name not in document:
        raise jsonl.BadRecord(f"{where}: field '{path}': missing; {ADVICE}")
    value = document[name]
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise jsonl.BadRecord(f"{where}: field '{path}': expected {kind.__name__}, found {value!r:.60}; {ADVICE}")
    if kind is str:
        try:
            value.encode()
        except UnicodeEncodeError:
            raise jsonl.BadRecord(
                f"{where}: field '{path}': not text that UTF-8 can hold (a lone surrogate); {ADVICE}"
            ) from None
    return value
