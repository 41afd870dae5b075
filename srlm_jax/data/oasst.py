"""Open Assistant's exports, in each form in which people have them -> message trees for `srlm_jax.data.trees`.

Nested: one tree a row, as in `*_ready.trees.jsonl.gz`; or the root message itself, with all that follows in `replies`.
Flat: one message a row that names its parent, as in `*_ready.messages.jsonl.gz`, in the rows of the data set's Parquet
files, or in what `oasst_builder` makes. `srlm_jax.storage.rows` says which files are read. Keys that are unset may be
absent or null; keys that are not needed (labels, emojis, ...) are not looked at.
"""

import collections
import dataclasses
import enum
import itertools
from collections.abc import Iterable, Iterator, Sequence

from etils import epath

from srlm_jax.data.scalars import Misfit, identity, mark, text, whole
from srlm_jax.data.trees import withdrawn
from srlm_jax.storage import rows
from srlm_jax.storage.jsonl import BadRecord
from srlm_jax.storage.rows import ADVICE

_COLUMNS = (
    "message_tree_id", "prompt", "message_id", "parent_id", "text", "role", "lang", "rank", "deleted", "synthetic",
    "review_result", "replies",
)  # fmt: skip
# What stands for null in a TFDS data set, which has none.
TFDS_NULLS = {"parent_id": "", "lang": "", "rank": -1}
_ANSWERED_BY = {"prompter": "assistant", "assistant": "prompter"}


class Omission(enum.StrEnum):
    """Why a message of an export is in no tree, or counts for nothing; beside `trees.Withdrawn`."""

    NO_PARENT = "no_parent"  # its parent is not in the file: left out
    BELOW_NO_PARENT = "below_no_parent"
    REPEATED = "repeated"  # an earlier message has its id: left out; its replies hang below the earlier one
    REPEATED_TREE = "repeated_tree"  # of those the roots
    BELOW_WITHDRAWN = "below_withdrawn"  # in its tree, below a message that is withdrawn
    UNRANKED_ANSWER = "unranked_answer"  # an assistant's message without a rank


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export:
    """The trees of a file in Open Assistant's nested form, and `counts`: those of `survey` and each `Omission`.

    Of a flat file: rows = messages + deleted + synthetic + rejected + below_withdrawn + no_parent + below_no_parent +
    repeated.
    """

    trees: list[dict]
    counts: dict[str, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Placed:
    """A message, the id of its parent, the id of the tree where it is a root that has one, and where it stands."""

    message: dict
    parent: str | None
    tree: str | None
    where: str
    path: str


def read_export(source: epath.PathLike) -> Export:
    """The trees of an export, checked as far as they are used.

    Of flat messages a tree's id is that of its root, and replies keep the order of the file. Of messages with the same
    id the first counts.

    Raises:
      BadRecord, naming file, line and field, and how many rows are wrong: the file is damaged, a row lacks what is
        needed, messages are one another's parents in a circle, or somebody answers himself.
      MissingExtra, OSError: as `rows.read` does.
    """
    found = rows.read(source, _COLUMNS)
    if rows.is_tfds(source):
        found = ((where, _with_nulls(row)) for where, row in found)
    where, first = next(found)
    if "prompt" not in first and "message_id" not in first:
        raise BadRecord(
            f"{where}: neither a message tree (with 'message_tree_id' and 'prompt') nor a message (with 'message_id' "
            f"and 'parent_id'), but {', '.join(rows.columns_of(source)):.300}; give an Open Assistant export of trees "
            "or of messages"
        )
    trees, counts = _linked(_placed(itertools.chain([(where, first)], found)))
    return Export(trees=trees, counts={str(name): count for name, count in sorted((survey(trees) + counts).items())})


def survey(trees: Sequence[dict]) -> collections.Counter[str]:
    """What there is to learn from: messages and roots that stand, prompts (at any turn, and at the first) with two or
    more ranked answers, the pairs of answers to one prompt that differ in rank, and what is withdrawn or omitted."""
    counts = collections.Counter()
    for tree in trees:
        waiting = [(tree["prompt"], False)]
        while waiting:
            message, below = waiting.pop()
            replies = message.get("replies") or []
            reason = withdrawn(message)
            waiting += [(reply, below or reason is not None) for reply in replies]
            if reason is not None or below:
                counts[reason or Omission.BELOW_WITHDRAWN] += 1
                continue
            first_turn = message is tree["prompt"]
            counts["messages"] += 1
            counts["roots"] += first_turn
            if message["role"] == "assistant":
                counts[Omission.UNRANKED_ANSWER] += message.get("rank") is None
                continue
            ranks = [r["rank"] for r in replies if withdrawn(r) is None and r.get("rank") is not None]
            if len(ranks) < 2:
                continue
            pairs = sum(a != b for a, b in itertools.combinations(ranks, 2))
            for prefix in ("", "first_turn_")[: 1 + first_turn]:
                counts[f"{prefix}ranked_prompts"] += 1
                counts[f"{prefix}ordered_pairs"] += pairs
    return counts


def messages(trees: Iterable[dict]) -> Iterator[dict]:
    """The flat messages of trees, each after its parent, with these keys: those of `TFDS_NULLS`, null where unset, and
    message_id, text, role, deleted, synthetic and review_result, none of them null."""
    for tree in trees:
        waiting = [(tree["prompt"], None)]
        while waiting:
            message, parent = waiting.pop()
            marks = {name: bool(message.get(name)) for name in ("deleted", "synthetic")}
            marks["review_result"] = message.get("review_result") is not False
            named = {name: message.get(name) for name in ("message_id", "text", "role", *TFDS_NULLS)}
            yield named | marks | {"parent_id": parent}
            waiting += [(reply, message["message_id"]) for reply in reversed(message.get("replies") or [])]


def _with_nulls(row: dict) -> dict:
    return {name: None if name in TFDS_NULLS and value == TFDS_NULLS[name] else value for name, value in row.items()}


def _placed(found: Iterable[tuple[str, dict]]) -> list[_Placed]:
    """The messages of all rows, each after its parent where that is in the same row.

    Raises BadRecord where rows are wrong.
    """
    placed, wrong, total = [], [], 0
    for where, row in found:
        total += 1
        try:
            placed += _messages_of(where, row)
        except Misfit as misfit:
            wrong.append(f"{where}: {misfit}")
    _refuse(wrong, total, "rows")
    return placed


def _refuse(wrong: Sequence[str], total: int, kind: str) -> None:
    if wrong:
        others = f"; {len(wrong)} of {total} {kind} are wrong, this is the first" if len(wrong) > 1 else ""
        raise BadRecord(f"{wrong[0]}{others}; {ADVICE}")


def _messages_of(where: str, row: dict) -> Iterator[_Placed]:
    """The messages of a row: a tree, or a message with what follows it in `replies`."""
    if row.get("prompt") is None and ("message_id" in row or "message_tree_id" not in row):
        top, path, tree, parent = row, "", None, identity(row.get("parent_id"), "parent_id")
    else:
        tree, top, path, parent = _id(row, "message_tree_id", ""), row.get("prompt"), "prompt.", None
    waiting = [(top, path, parent)]
    while waiting:
        message, path, parent = waiting.pop()
        if not isinstance(message, dict):
            raise Misfit(f"field '{path.removesuffix('.')}': expected an object, found {message!r:.60}")
        checked = _checked(message, path)
        yield _Placed(message=checked, parent=parent, tree=tree, where=where, path=path)
        tree = None
        replies = message.get("replies")
        if not isinstance(replies, list | None):
            raise Misfit(f"field '{path}replies': expected list, found {replies!r:.60}")
        below = [(reply, f"{path}replies[{i}].", checked["message_id"]) for i, reply in enumerate(replies or [])]
        waiting += reversed(below)


def _checked(message: dict, path: str) -> dict:
    """What is needed of a message, without its replies. Raises Misfit."""
    checked = {"message_id": _id(message, "message_id", path)}
    for name in ("text", "role"):
        if name not in message:
            raise Misfit(f"field '{path}{name}': missing")
    kinds = (("text", text), ("role", text), ("lang", text), ("rank", whole))
    for name, kind in (*kinds, ("deleted", mark), ("synthetic", mark), ("review_result", mark)):
        if name in message:
            unset = message[name] is None and name not in ("text", "role")
            checked[name] = None if unset else kind(message[name], f"{path}{name}")
    if (checked.get("rank") or 0) < 0:
        raise Misfit(f"field '{path}rank': expected 0 or more, found {message['rank']}")
    if checked["role"] not in _ANSWERED_BY:
        raise Misfit(f"field '{path}role': expected 'prompter' or 'assistant', found {message['role']!r:.60}")
    return checked | {"replies": []}


def _id(row: dict, name: str, path: str) -> str:
    value = identity(row.get(name), f"{path}{name}")
    if value is None:
        raise Misfit(f"field '{path}{name}': missing")
    return value


def _linked(placed: Sequence[_Placed]) -> tuple[list[dict], collections.Counter[str]]:
    """Trees of messages in any order, and how many messages are in none of them."""
    known, counts = {}, collections.Counter()
    for one in placed:
        if one.message["message_id"] in known:
            counts[Omission.REPEATED] += 1
            counts[Omission.REPEATED_TREE] += one.parent is None
        else:
            known[one.message["message_id"]] = one
    roots, orphans = [], []
    for one in known.values():
        if one.parent is None:
            roots.append(one)
        elif one.parent not in known:
            orphans.append(one)
        else:
            known[one.parent].message["replies"].append(one.message)
    reached = {message["message_id"] for top in roots + orphans for message in _walk(top.message)}
    if len(reached) < len(known):  # what is above a message ends neither at a root nor outside the file
        _refuse_circle(known, next(name for name in known if name not in reached))
    counts[Omission.NO_PARENT] += len(orphans)
    counts[Omission.BELOW_NO_PARENT] += sum(1 for one in orphans for _ in _walk(one.message)) - len(orphans)
    _check_roles(known, roots)
    trees = {}
    for root in roots:
        name = root.tree or root.message["message_id"]
        if name in trees:
            counts[Omission.REPEATED_TREE] += 1
            counts[Omission.REPEATED] += sum(1 for _ in _walk(root.message))
        else:
            trees[name] = {"message_tree_id": name, "prompt": root.message}
    return [*trees.values()], counts


def _walk(top: dict) -> Iterator[dict]:
    waiting = [top]
    while waiting:
        message = waiting.pop()
        waiting += message["replies"]
        yield message


def _refuse_circle(known: dict[str, _Placed], name: str) -> None:
    climbed = set()
    while name not in climbed:  # up into the circle that it hangs below or lies on
        climbed.add(name)
        name = known[name].parent
    raise BadRecord(
        f"{known[name].where}: message '{name}' is its own ancestor: its parents, from '{known[name].parent}' on, form "
        f"a circle; {ADVICE}"
    )


def _check_roles(known: dict[str, _Placed], roots: Sequence[_Placed]) -> None:
    expected = {root.message["message_id"]: "prompter" for root in roots}
    for root in roots:
        for message in _walk(root.message):
            expected |= {reply["message_id"]: _ANSWERED_BY[message["role"]] for reply in message["replies"]}
    wrong = [one for name, one in known.items() if one.message["role"] != expected.get(name, one.message["role"])]
    _refuse(
        [
            f"{one.where}: field '{one.path}role': expected '{expected[one.message['message_id']]}', for the two take "
            f"turns and a prompter begins, found '{one.message['role']}'"
            for one in wrong
        ],
        len(known),
        "messages",
    )
