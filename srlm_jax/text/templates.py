"""Chat templates in Jinja, as transformers' `apply_chat_template` reads them: a model's own, and ours for its export.

A model's template comes with the model and may be hostile: it is rendered in Jinja's sandbox, with limits.
"""

import dataclasses
import datetime
import json
import sys
from collections.abc import Callable, Mapping, Sequence

import jinja2
import jinja2.ext
import jinja2.nodes
from etils import epath
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

from srlm_jax.errors import BadInput
from srlm_jax.storage import jsonl
from srlm_jax.text import chat as chats
from srlm_jax.text import token_files
from srlm_jax.text.chat import FORMATS, ChatFormat, with_system
from srlm_jax.text.tokenizer import SentencePieceTokenizer, Tokenizer, WordTokenizer

Message = Mapping[str, str]

_FILE = "chat_template.jinja"
_MOST_STEPS = 300_000  # lines of a template's program; the longest published templates take some hundreds

# --- a model's own ----------------------------------------------------------------------------------------------------


def read_template(folder: epath.PathLike) -> str | None:
    """The chat template of a model's folder, None where it has none.

    chat_template.jinja stands before the entry in tokenizer_config.json; of several named ones "default" is taken.

    Raises:
      BadInput: a file is damaged.
    """
    folder = epath.Path(folder)
    if (folder / _FILE).exists():
        try:
            return (folder / _FILE).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise BadInput(f"{folder / _FILE} is not UTF-8 text: {error}") from error
    found = token_files.fields_of(folder / token_files.CONFIG).get("chat_template")
    if isinstance(found, list):
        found = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
    if isinstance(found, dict):
        found = found.get("default")
    if found is not None and not isinstance(found, str):
        raise BadInput(f"{folder / token_files.CONFIG}: chat_template is {found!r}, which is no text")
    return found


def render(template: str, messages: Sequence[Message], tokens: Mapping[str, str], today: datetime.date | None) -> str:
    """The text of a conversation up to where the assistant's answer begins.

    Args:
      tokens: the names under which a template knows special tokens ("bos_token"), and how they are spelt.
      today: what `strftime_now` gives. None: there is no such function, as in older releases of transformers, for
        which templates hold a fixed date.

    Raises:
      BadInput: the template is not valid, refuses the messages, or wants more than the sandbox allows.
    """
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _refuse, "dict": lambda **fields: fields, "namespace": _Namespace}
    if today is not None:
        environment.globals["strftime_now"] = today.strftime
    try:
        made = environment.from_string(template)
        given = {"messages": [dict(m) for m in messages], "tools": None, "documents": None, **tokens}
        text = _within_limits(lambda: made.render(add_generation_prompt=True, **given))
        text.encode()  # no tokenizer takes half a character
        return text
    # A SyntaxError is one of the Python program that Jinja makes of the template.
    except (
        jinja2.TemplateError, SyntaxError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError
    ) as error:  # fmt: skip
        raise BadInput(f"{type(error).__name__}: {error}") from error
    except (MemoryError, RecursionError) as error:
        raise BadInput(f"it is too large ({type(error).__name__})") from error


def _within_limits(work: Callable[[], str]) -> str:
    """Calls `work`, which runs a template's program, and stops it after `_MOST_STEPS` lines."""
    steps, before = 0, sys.gettrace()

    def count(frame, event, argument):
        nonlocal steps
        steps += 1
        if steps > _MOST_STEPS:
            raise SecurityError("the template does not end")
        return count

    sys.settrace(count)
    try:
        return work()
    finally:
        sys.settrace(before)


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, without the operators that make much out of little."""

    intercepted_binops = frozenset({"*", "**", "%"})

    def call_binop(self, context, operator, left, right):
        if operator == "**" or not (isinstance(left, int | float) and isinstance(right, int | float)):
            raise SecurityError(f"a template may not use {operator} here")
        return super().call_binop(context, operator, left, right)


class _Namespace(jinja2.utils.Namespace):
    """Without names that begin with an underscore, which may be Python's own."""

    def __init__(*arguments, **fields):
        self, *rest = arguments
        for name in (known := dict(*rest, **fields)):
            _Namespace._check(name)
        jinja2.utils.Namespace.__init__(self, known)

    def __setitem__(self, name, value):
        _Namespace._check(name)
        jinja2.utils.Namespace.__setitem__(self, name, value)

    @staticmethod
    def _check(name):
        if str(name).startswith("_"):
            raise SecurityError(f"a template may not set {name!r}")


class _Generation(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %} marks what an assistant wrote; here it is only text."""

    tags = frozenset({"generation"})

    def parse(self, parser):
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


def _refuse(message):
    raise jinja2.TemplateError(message)


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


# --- the format of a run, beside the model's template -----------------------------------------------------------------

# Messages on which formats are compared. The white space shows which of them trim.
_SHOWN = ("Hello", " Hello\n")
_DAY = datetime.date(2024, 7, 26)  # which Llama 3's templates give where they do not know the day


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fields:
    """What a user calls the two settings: "config.chat" and "config.chat_system", or "--format" and "--system"."""

    chat: str
    system: str


def resolve(
    folder: epath.PathLike | None, tokenizer: Tokenizer, name: str, system: str | None, fields: Fields
) -> tuple[ChatFormat, str | None]:
    """A chat format with its system prompt, and a line for the user where the model's own template differs.

    Args:
      folder: where the model's template is; None for a model without a folder.
      name: of the format, in `text.chat.FORMATS`.
      system: the system prompt, "" for none. None: the one that the model's template has by itself, where it has one.

    Raises:
      BadInput: the format has no place for the system prompt; a file is damaged.
    """
    template = None if folder is None else read_template(folder)
    chat = with_system(FORMATS[name], system or "")
    if template is None:
        return chat, None
    here, tokens = f"the chat template of {folder}", _names(epath.Path(folder), tokenizer)
    told = [{"role": "system", "content": system}] if system else []
    try:
        dated = render(template, [*told, _user(_SHOWN[0])], tokens, datetime.date.today())
        theirs, spaced = (_on_any_day(template, [*told, _user(shown)], tokens) for shown in _SHOWN)
    except BadInput as error:
        return chat, f"{here} cannot be rendered, so {fields.chat}={name} may differ from it: {error}"
    wanted = _own_system(theirs, tokenizer, FORMATS[name])
    if wanted is None:
        others = [
            o for o in FORMATS if _usable(tokenizer, o) and _own_system(theirs, tokenizer, FORMATS[o]) is not None
        ]
        advice = f"choose {fields.chat}={others[0]}" if others else f"no {fields.chat} gives the template's text"
        ours = _short(spell(tokenizer, chat, _SHOWN[0]))
        return chat, f"{here} gives {_short(theirs)} for the message 'Hello', and {fields.chat}={name} {ours}; {advice}"
    if system is None and wanted:
        # One text for all days of a run.
        day = "" if dated == theirs else ". The template writes the date of the day, and here a fixed one stays"
        return with_system(chat, wanted), (
            f"{here} has a system prompt of its own, {_short(wanted)}, which is used; {fields.system}='' leaves it "
            f"out{day}"
        )
    if wanted != chat.system:
        close = "without it the template is followed" if not system else "give it the whole text to follow the template"
        return chat, (
            f"{here} begins with the system prompt {_short(wanted)}, and {fields.system} is {_short(chat.system)}: "
            f"{close}"
        )
    if spaced != spell(tokenizer, chat, _SHOWN[1]):
        kept, trimmed = ("keeps", "trims") if chat.strips else ("trims", "keeps")
        return chat, f"{here} {kept} the white space around a message, and {fields.chat}={name} {trimmed} it"
    return chat, None


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _short(text: str) -> str:
    return repr(text if len(text) <= 400 else f"{text[:200]} ... {text[-200:]}")


def _on_any_day(template: str, messages: Sequence[Message], tokens: Mapping[str, str]) -> str:
    """What a template gives without the date, or on `_DAY` where it needs one: the same on all days."""
    try:
        return render(template, messages, tokens, None)
    except BadInput:
        return render(template, messages, tokens, _DAY)


def _usable(tokenizer: Tokenizer, name: str) -> bool:
    try:
        chats.check_format(tokenizer, FORMATS[name], sys.maxsize)
    except BadInput:
        return False
    return True


def _own_system(shown: str, tokenizer: Tokenizer, chat: ChatFormat) -> str | None:
    """The system prompt with which `chat` gives `shown`, "" for none; None where no system prompt does."""
    if shown == spell(tokenizer, chat, _SHOWN[0]):
        return ""
    if chat.around_system is None:
        return None
    whole = spell(tokenizer, with_system(chat, "\0"), _SHOWN[0])
    before, after = whole.split("\0")
    inside = shown.startswith(before) and shown.endswith(after) and len(before) + len(after) < len(shown)
    return shown[len(before) : len(shown) - len(after)] if inside else None


def spell(tokenizer: Tokenizer, chat: ChatFormat, prompt: str) -> str:
    """The text whose ids `encode_prompt` gives, control tokens spelt out."""
    (before, after), prompt = chat.frame(prompt)
    begin = "".join(map(tokenizer.piece, chats.begin_ids(tokenizer, chat)))
    return f"{begin}{before}{chat.system}{after}{prompt}{chat.before_response}"


def _names(folder: epath.Path, tokenizer: Tokenizer) -> dict[str, str]:
    """How the special tokens are spelt, by the names that templates know."""
    names = {"eos_token": tokenizer.piece(tokenizer.eos)}
    if tokenizer.bos is not None:
        names["bos_token"] = tokenizer.piece(tokenizer.bos)
    config = token_files.fields_of(folder / token_files.CONFIG)
    for role in ("bos_token", "eos_token", "unk_token", "pad_token"):
        value = config.get(role)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            names[role] = value
    return names


# --- for an export ----------------------------------------------------------------------------------------------------

_HEAD = """\
{%- set begin, end, system = BEGIN, END, SYSTEM %}
{%- if messages and messages[0]['role'] == 'system' %}
{%- set system = messages[0]['content'] %}
{%- set messages = messages[1:] %}
{%- endif %}
"""


def template_of(tokenizer: Tokenizer, chat: ChatFormat) -> str:
    """A template that gives what `encode_prompt` and `encode_response` do, in conversations of several turns too."""
    safe = "".join(f"|replace({control!a}, {chat.neutral!a})" for control in chat.control)
    values = {
        "BEGIN": ascii("".join(map(tokenizer.piece, chats.begin_ids(tokenizer, chat)))),
        "END": ascii(tokenizer.piece(chats.end_of_response(tokenizer, chat))),
        "SYSTEM": ascii(chat.system),
    }
    head = _HEAD
    for name, value in values.items():
        head = head.replace(name, value)
    return head + chat.template.replace("SAFE", safe)


def save_tokenizer(folder: epath.Path, tokenizer: Tokenizer, chat: ChatFormat) -> None:
    """Writes a tokenizer into an existing folder, with a chat template for `chat`.

    The template that came with the tokenizer stays where it gives the same texts.
    """
    tokenizer.save(folder)
    own, tokens = read_template(folder), _names(folder, tokenizer)
    if own is not None and _keeps(own, tokens, tokenizer, chat):
        return
    template = template_of(tokenizer, chat)
    if (folder / _FILE).exists():
        (folder / _FILE).write_text(template, encoding="utf-8")
        return
    config = token_files.fields_of(folder / token_files.CONFIG)
    kind = {}
    if isinstance(tokenizer, SentencePieceTokenizer):
        kind = {"tokenizer_class": "LlamaTokenizer", "legacy": True, "add_bos_token": True, "unk_token": "<unk>"}
    elif not isinstance(tokenizer, WordTokenizer):
        kind = {"tokenizer_class": "PreTrainedTokenizerFast"}
    jsonl.write_json(folder / token_files.CONFIG, kind | tokens | config | {"chat_template": template})


def _keeps(template: str, tokens: Mapping[str, str], tokenizer: Tokenizer, chat: ChatFormat) -> bool:
    """Whether a template gives the text of `chat` on any day, the system prompt and an answer included."""
    answer = {"role": "assistant", "content": "Yes."}
    end = tokenizer.piece(chats.end_of_response(tokenizer, chat))
    whole = f"{spell(tokenizer, chat, _SHOWN[0])}{chat.begin_response}Yes.{chat.after_response}{end}"
    days = (None, datetime.date(2001, 2, 3))
    try:
        prompts = [render(template, [_user(shown)], tokens, day) for day in days for shown in _SHOWN]
        answered = render(template, [_user(_SHOWN[0]), answer], tokens, None)
    except BadInput:
        return False
    return prompts == 2 * [spell(tokenizer, chat, shown) for shown in _SHOWN] and answered.startswith(whole)
