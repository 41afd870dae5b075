"""The layouts in which people keep prompts, answers and rankings, and what a row of each says.

    name                   columns                                     gives
    plain                  prompt, response                            an example
    prompt and completion  prompt, completion                          an example
    Alpaca                 instruction, output (input)                 an example
    Dolly                  instruction, response (context)             an example
    Self-Instruct          instruction, instances: input, output       an example, of the first instance
    chat                   messages: role, content                     an example, of the first turn
    ShareGPT               conversations: from, value                  an example, of the first turn
    plain                  prompt, responses, ranks                    a ranking, 0 is the best
    preference (TRL)       chosen, rejected (prompt)                   a ranking of two
    judged                 prompt, response, judgement                 a judging example

A set of prompts may have any layout of examples, without the answers; or `turns`, of which the first is taken
(MT-Bench). `prompt`, `completion`, `chosen` and `rejected` may be lists of messages. Other columns are not looked at.
"""

import dataclasses
import enum
from collections.abc import Callable, Collection, Sequence

from srlm_jax.data.scalars import Misfit, text, whole
from srlm_jax.judge.parse import parse_vote


class RowDrop(enum.StrEnum):
    """Why a row is not used."""

    BLANK_PROMPT = "blank_prompt"  # empty, white space or null
    BLANK_RESPONSE = "blank_response"
    NO_FIRST_TURN = "no_first_turn"  # a conversation that does not begin with a user's turn and an assistant's
    SEVERAL_TURNS = "several_turns"  # the answer is one to a later turn
    NOT_TEXT = "not_text"  # a message holds more than text
    OTHER_PROMPT = "other_prompt"  # chosen and rejected answer different prompts
    UNRANKED_RESPONSE = "unranked_response"  # a rank is null
    UNORDERED = "unordered"  # no two responses of different rank
    SAME_RESPONSE = "same_response"  # one text has two ranks
    SAME_ID = "same_id"  # an earlier row has the id
    NO_SCORE = "no_score"  # the judgement holds no score from 0 to 5


class LeftOut(enum.StrEnum):
    """What is left out of a row that is used."""

    SYSTEM_MESSAGE = "system_message"
    LATER_TURNS = "later_turns"  # what follows the first question and its answer
    OTHER_INSTANCES = "other_instances"


class Unusable(Exception):
    """(`RowDrop`,): a row that cannot be used, though its types are right."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Content:
    """What a row says. Of a prompt alone there is no response; only a ranking has ranks, and only a judging example a
    judgement."""

    prompt: str
    responses: tuple[str, ...]
    ranks: tuple[int, ...]
    left_out: frozenset[LeftOut]
    judgement: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """Rows with these columns; `content` gives what a row says, and raises Misfit and Unusable as `read` does."""

    columns: tuple[str, ...]
    optional: tuple[str, ...]
    content: Callable[[dict], Content]


# Columns of any layout that change what a row means.
_CONTEXT = ("system", "system_prompt", "history")


def choose(layouts: Sequence[Layout], columns: Collection[str], mapped: Collection[str]) -> Layout | None:
    """The first layout that the columns make up and that knows those the user has mapped; None where none does."""
    for layout in layouts:
        if {*columns} >= {*layout.columns} and {*columns_of([layout])} >= {*mapped}:
            return layout
    return None


def columns_of(layouts: Sequence[Layout]) -> tuple[str, ...]:
    """All columns that rows of these layouts may have."""
    every = (name for layout in layouts for name in layout.columns + layout.optional)
    return tuple(dict.fromkeys((*every, *_CONTEXT)))


def read(layout: Layout, row: dict, *, blank: bool = False) -> Content:
    """What a row says. With `blank` the prompt may be empty.

    Raises:
      Misfit: a column is missing or has a wrong type.
      Unusable: the types are right, and it cannot be used.
    """
    for name in layout.columns:
        if name not in row:
            raise Misfit(f"no '{name}', which rows of this kind have ({', '.join(layout.columns)})")
    said = layout.content(row)
    if row.get("history"):
        raise Unusable(RowDrop.SEVERAL_TURNS)
    if any(text(row.get(name), name).strip() for name in ("system", "system_prompt")):
        said = dataclasses.replace(said, left_out=said.left_out | {LeftOut.SYSTEM_MESSAGE})
    if not (blank or said.prompt.strip()):
        raise Unusable(RowDrop.BLANK_PROMPT)
    if not all(response.strip() for response in said.responses):
        raise Unusable(RowDrop.BLANK_RESPONSE)
    return said


def _said(prompt: str, *responses: str, left_out: Collection[LeftOut] = ()) -> Content:
    return Content(prompt=prompt, responses=responses, ranks=(), left_out=frozenset(left_out))


# --- messages ---------------------------------------------------------------------------------------------------------

_ROLES = {
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant", "chatgpt": "assistant", "bot": "assistant",
    "system": "system", "developer": "system",
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Turns:
    """The texts of a conversation by role ("user", "assistant" or "other") without its system messages."""

    roles: tuple[str, ...]
    texts: tuple[str, ...]
    left_out: frozenset[LeftOut]


def _turns(value: object, field: str) -> _Turns:
    """The turns of a list of messages, each with role and content or with from and value; null is an empty list."""
    if isinstance(value, dict) and value and all(isinstance(item, list) for item in value.values()):
        value = [dict(zip(value, items, strict=False)) for items in zip(*value.values(), strict=False)]  # a table
    if not isinstance(value, list | None):
        raise Misfit(f"field '{field}': expected a list of messages, found {value!r:.60}{_list_as_text(value)}")
    roles, texts, left_out = [], [], set()
    for index, message in enumerate(value or ()):
        place = f"{field}[{index}]"
        if not isinstance(message, dict):
            raise Misfit(f"field '{place}': expected a message with role and content, found {message!r:.60}")
        role = text(_either(message, "role", "from", place), f"{place}.role")
        said = _message_text(_either(message, "content", "value", place), f"{place}.content")
        if (role := _ROLES.get(role.lower(), "other")) != "system":
            roles.append(role)
            texts.append(said)
        elif said.strip():
            left_out.add(LeftOut.SYSTEM_MESSAGE)
    return _Turns(roles=tuple(roles), texts=tuple(texts), left_out=frozenset(left_out))


def _list_as_text(value: object) -> str:
    """What to do about a list in a cell of CSV, where there is one."""
    listed = isinstance(value, str) and value.lstrip().startswith("[")
    return " (a list as text, which is not read: give JSON Lines or Parquet)" if listed else ""


def _either(message: dict, name: str, other: str, place: str) -> object:
    if name not in message and other not in message:
        raise Misfit(f"field '{place}': neither '{name}' nor '{other}', only {', '.join(map(str, message))}")
    return message[name] if message.get(name) is not None else message.get(other)


def _message_text(value: object, field: str) -> str:
    """Of a message in parts the text of all of them."""
    if not isinstance(value, list):
        return text(value, field)
    if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in value):
        raise Unusable(RowDrop.NOT_TEXT)
    return "".join(text(part["text"], field) for part in value)


def _first_question(value: object, field: str) -> Content:
    turns = _turns(value, field)
    if turns.roles[:1] != ("user",):
        raise Unusable(RowDrop.NO_FIRST_TURN)
    later = {LeftOut.LATER_TURNS} if len(turns.roles) > 2 or turns.roles[1:] == ("user",) else set()
    return _said(turns.texts[0], left_out=turns.left_out | later)


def _first_exchange(value: object, field: str) -> Content:
    turns = _turns(value, field)
    if turns.roles[:2] != ("user", "assistant"):
        raise Unusable(RowDrop.NO_FIRST_TURN)
    later = {LeftOut.LATER_TURNS} if len(turns.roles) > 2 else set()
    return _said(*turns.texts[:2], left_out=turns.left_out | later)


def _pair(prompt: object, prompt_field: str, answer: object, answer_field: str) -> Content:
    """A prompt and its answer, each a text or a list of messages. The answer's list may begin with the prompt, and
    then the prompt may be missing (None)."""
    prompts, left_out = [], set()
    if isinstance(prompt, list | dict):
        turns = _turns(prompt, prompt_field)
        if len(turns.roles) > 1:
            raise Unusable(RowDrop.SEVERAL_TURNS)
        if "assistant" in turns.roles:
            raise Unusable(RowDrop.NO_FIRST_TURN)
        prompts += turns.texts
        left_out |= turns.left_out
    elif prompt is not None:
        prompts.append(text(prompt, prompt_field))
    if isinstance(answer, list | dict):
        turns = _turns(answer, answer_field)
        if len(turns.roles) > 2:
            raise Unusable(RowDrop.SEVERAL_TURNS)
        if turns.roles not in (("assistant",), ("user", "assistant")):
            raise Unusable(RowDrop.NO_FIRST_TURN)
        *asked, response = turns.texts
        prompts += asked
        left_out |= turns.left_out
    else:
        response = text(answer, answer_field)
    if len({asked.strip() for asked in prompts}) > 1:
        raise Unusable(RowDrop.OTHER_PROMPT)
    return _said(prompts[0] if prompts else "", response, left_out=left_out)


# --- one layout after another -----------------------------------------------------------------------------------------


def _example(answer: str) -> Callable[[dict], Content]:
    return lambda row: _pair(row["prompt"], "prompt", row[answer], answer)


def _instruction(row: dict) -> str:
    """The instruction and, after a blank line, the text that it is about."""
    asked = text(row["instruction"], "instruction")
    for name in ("input", "context"):
        about = text(row.get(name), name)
        if asked.strip() and about.strip() not in ("", "<noinput>"):
            asked += f"\n\n{about}"
    return asked


def _instructed(answer: str) -> Callable[[dict], Content]:
    return lambda row: _said(_instruction(row), text(row[answer], answer))


def _instances(row: dict) -> Content:
    instances = row["instances"]
    if not (isinstance(instances, list) and instances and isinstance(instances[0], dict)):
        raise Misfit(f"field 'instances': expected a list of objects with input and output, found {instances!r:.60}")
    first = instances[0]
    asked = _instruction({"instruction": row["instruction"], "input": first.get("input")})
    left_out = {LeftOut.OTHER_INSTANCES} if len(instances) > 1 else set()
    return _said(asked, text(first.get("output"), "instances[0].output"), left_out=left_out)


def _prompt(row: dict) -> Content:
    if isinstance(row["prompt"], dict) and "message_id" in row["prompt"]:
        raise Misfit("field 'prompt': a message tree of Open Assistant, which config.seed_data.trees takes")
    if isinstance(row["prompt"], list | dict):
        return _first_question(row["prompt"], "prompt")
    return _said(text(row["prompt"], "prompt"))


def _turn_texts(row: dict) -> Content:
    turns = row["turns"]
    if not isinstance(turns, list) or not turns:
        raise Misfit(f"field 'turns': expected a list of texts, found {turns!r:.60}")
    if not isinstance(turns[0], str | None):
        return _first_question(turns, "turns")
    return _said(text(turns[0], "turns[0]"), left_out={LeftOut.LATER_TURNS} if len(turns) > 1 else set())


def _without_answer(of: Callable[[dict], Content]) -> Callable[[dict], Content]:
    return lambda row: dataclasses.replace(of(row), responses=())


def _ranking(row: dict) -> Content:
    for name in ("responses", "ranks"):
        if not isinstance(row[name], list):
            raise Misfit(f"field '{name}': expected a list, found {row[name]!r:.60}{_list_as_text(row[name])}")
    responses = tuple(text(one, f"responses[{index}]") for index, one in enumerate(row["responses"]))
    ranks = tuple(None if one is None else whole(one, f"ranks[{index}]") for index, one in enumerate(row["ranks"]))
    if len(responses) != len(ranks):
        raise Misfit(f"{len(responses)} responses and {len(ranks)} ranks")
    asked = _pair(row["prompt"], "prompt", None, "")
    if None in ranks:
        raise Unusable(RowDrop.UNRANKED_RESPONSE)
    if len(set(ranks)) < 2:
        raise Unusable(RowDrop.UNORDERED)
    if min(ranks) != 0:
        advice = f", so take {min(ranks)} from each" if min(ranks) > 0 else ""
        raise Misfit(f"ranks {list(ranks)} begin at {min(ranks)}: the best has 0{advice}")
    if len({*zip(responses, ranks, strict=True)}) > len({*responses}):
        raise Unusable(RowDrop.SAME_RESPONSE)
    return Content(prompt=asked.prompt, responses=responses, ranks=ranks, left_out=asked.left_out)


def _preference(row: dict) -> Content:
    if "prompt" not in row and isinstance(row["chosen"], str):
        raise Misfit("field 'chosen': expected a list of messages where there is no prompt, found a text")
    chosen, rejected = (_pair(row.get("prompt"), "prompt", row[name], name) for name in ("chosen", "rejected"))
    if chosen.prompt.strip() != rejected.prompt.strip():
        raise Unusable(RowDrop.OTHER_PROMPT)
    if chosen.responses == rejected.responses:
        raise Unusable(RowDrop.SAME_RESPONSE)
    return Content(
        prompt=chosen.prompt,
        responses=chosen.responses + rejected.responses,
        ranks=(0, 1),
        left_out=chosen.left_out | rejected.left_out,
    )


def _judged(row: dict) -> Content:
    said = _pair(row["prompt"], "prompt", row["response"], "response")
    judgement = text(row["judgement"], "judgement")
    if parse_vote(judgement, True).score is None:
        raise Unusable(RowDrop.NO_SCORE)
    return dataclasses.replace(said, judgement=judgement)


def _layout(columns: str, optional: str, of: Callable[[dict], Content]) -> Layout:
    """A layout whose rows may have an id."""
    return Layout(columns=tuple(columns.split()), optional=("id", *optional.split()), content=of)


EXAMPLES = (
    _layout("prompt response", "", _example("response")),
    _layout("prompt completion", "", _example("completion")),
    _layout("instruction output", "input", _instructed("output")),
    _layout("instruction response", "context", _instructed("response")),
    _layout("instruction instances", "", _instances),
    _layout("messages", "", lambda row: _first_exchange(row["messages"], "messages")),
    _layout("conversations", "", lambda row: _first_exchange(row["conversations"], "conversations")),
)
RANKINGS = (
    _layout("prompt responses ranks", "", _ranking),
    _layout("chosen rejected", "prompt", _preference),
)
PROMPTS = (
    _layout("prompt", "", _prompt),
    _layout("instruction instances", "", _without_answer(_instances)),
    _layout("instruction", "input context", lambda row: _said(_instruction(row))),
    _layout("turns", "", _turn_texts),
    _layout("messages", "", lambda row: _first_question(row["messages"], "messages")),
    _layout("conversations", "", lambda row: _first_question(row["conversations"], "conversations")),
)
# Without an id: rows that judge answers to one prompt often have that of the prompt.
JUDGED = (Layout(columns=("prompt", "response", "judgement"), optional=(), content=_judged),)
