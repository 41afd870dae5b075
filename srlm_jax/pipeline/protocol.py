"""OpenAI's protocol as real servers speak it: what an HTTP answer holds, or why it holds no completions."""

import dataclasses
import email.utils
import json
import math
import time
from collections.abc import Sequence

from srlm_jax.records import Completion
from srlm_jax.text.chat import until_stop

# Any other reason means that the text is not whole: "length", "content_filter", "error", "abort", null, "tool_calls"
# (no tools are offered, so the text stops where the call begins).
_FINISHED = frozenset({"stop", "eos", "eos_token", "end_turn", "stop_sequence"})
_LARGEST_COUNT = 10**9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Failure:
    """An HTTP request without a completion."""

    what: str
    quoted: str | None = None  # the server's own words, whole: they may hold the key
    status: int | None = None  # of HTTP; None without a connection, or where the answer came with 200
    answered: bool = False  # a completion was made, and cannot be read: each repetition may cost as much
    busy: bool = False  # the server is there, and has more to do than it can
    retry_after_s: float | None = None  # as the server asks

    @property
    def passes(self) -> bool:
        """Whether the same request may succeed later."""
        if self.status is None or self.status in (408, 409, 425, 429):
            return True
        return self.status >= 500 and self.status not in (501, 505)

    @property
    def of_the_prompt(self) -> bool:
        """Whether another prompt may succeed: 400, 413 and 422 are also said of one that is too long."""
        return self.passes or self.status in (400, 413, 422)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """The completions of a prompt, in the order of their `index`. `silence` says why none of them has a text; it is
    None where one has, and where the server's content filter withheld it."""

    completions: tuple[Completion, ...]
    silence: Failure | None


def read_answer(body: bytes, chat: bool, stop: Sequence[str]) -> Answer | Failure:
    """The completions in the body of an answer with status 200.

    Content may be text, null or a list of parts, whose texts are joined; reasoning beside it is left out. A text ends
    with its first stop string. Half a character (a lone surrogate) becomes U+FFFD. `usage.completion_tokens` is shared
    out by length of text before the cut, extra choices included; where it is no count, all shares are 0.
    """
    document = read_json(body)
    if isinstance(document, Failure):
        return document
    choices = document.get("choices") if isinstance(document, dict) else None
    if not isinstance(choices, list) or not choices:
        if isinstance(document, dict) and (document.get("error") or document.get("object") == "error"):
            return _error_object(document)
        return Failure(what="the answer has no choices", quoted=_shown(document), answered=True)
    read = []
    choices = _in_order(choices)
    for choice in choices:
        one = _read_choice(choice, chat)
        if isinstance(one, str):
            return Failure(what=one, quoted=_shown(document), answered=True)
        read.append(one)
    usage = document.get("usage")
    total = _count(usage.get("completion_tokens") if isinstance(usage, dict) else None) or 0
    completions = []
    for (text, ended), tokens in zip(read, _shares(total, [len(text) for text, _ in read]), strict=True):
        text, found = until_stop(text, stop)
        completions.append(Completion(text=text, tokens=tokens, finished=found or ended))
    return Answer(completions=tuple(completions), silence=_silence(choices, completions))


def read_json(body: bytes) -> object | Failure:
    """The document in the body of an answer with status 200."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        streams = body.lstrip()[:5] == b"data:"
        what = "the answer is an event stream, which was not asked for" if streams else "the answer is not JSON"
        return Failure(what=what, quoted=body.decode(errors="replace"))


def read_error(status: int, body: bytes) -> Failure:
    """What an answer with another status than 200 says."""
    document = read_json(body)
    quoted = document.quoted if isinstance(document, Failure) else _message(document)
    return Failure(what=f"HTTP {status}", quoted=quoted, status=status, busy=status == 429)


def retry_after_s(header: str | None) -> float | None:
    """Retry-After in seconds from now: the header holds seconds or a date. None where it is absent or neither."""
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(header).timestamp() - time.time()
        except (ValueError, OverflowError):
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None


def _error_object(document: dict) -> Failure:
    """An error that comes with status 200; it may name the status that it should have."""
    error = document.get("error")
    fields = error if isinstance(error, dict) else document
    codes = (_count(fields.get(name)) for name in ("code", "status", "status_code"))
    status = next((code for code in codes if code is not None and 400 <= code < 600), None)
    after = fields.get("retry_after")
    return Failure(
        what="an error in place of an answer" + (f" (status {status})" if status is not None else ""),
        quoted=_message(document),
        status=status,
        busy=status == 429,
        retry_after_s=retry_after_s(str(after)) if isinstance(after, int | float | str) else None,
    )


def _message(document: object) -> str:
    """The words of an error's document: {"error": {"message": ...}}, {"error": ...}, {"message": ...}; or all of it."""
    error = document.get("error", document) if isinstance(document, dict) else document
    message = error.get("message") if isinstance(error, dict) else error
    return message if isinstance(message, str) and message.strip() else _shown(document)


def _shown(document: object) -> str:
    """JSON without escapes, so that a key in it can be found."""
    try:
        return json.dumps(document, ensure_ascii=False)
    except RecursionError:
        return ""


def _in_order(choices: list) -> list:
    indices = [_count(choice.get("index")) if isinstance(choice, dict) else None for choice in choices]
    if None in indices or len(set(indices)) < len(indices):
        return choices
    return [choice for _, choice in sorted(zip(indices, choices, strict=True), key=lambda pair: pair[0])]


def _read_choice(choice: object, chat: bool) -> tuple[str, bool] | str:
    """Text and whether the model ended it; or what is wrong. Where there is no text, nothing was ended."""
    name, holder = ("message.content", "message") if chat else ("text", "text")
    if not isinstance(choice, dict):
        return f"a choice is no object but {type(choice).__name__}"
    if holder not in choice:
        return f"a choice has no {name}"
    content = choice[holder]
    if chat and content is not None:
        if not isinstance(content, dict):
            return f"a choice's message is no object but {type(content).__name__}"
        content = content.get("content")
    texts = _texts(content)
    if texts is None:
        return f"a choice's {name} is no text but {type(content).__name__}"
    reason = choice.get("finish_reason")
    ended = bool(texts) and isinstance(reason, str) and reason.casefold() in _FINISHED
    return "".join(texts).encode("utf-16", "surrogatepass").decode("utf-16", "replace"), ended


def _texts(content: object) -> list[str] | None:
    """The texts of a message; None where it is neither null, nor a text, nor a list of parts."""
    if content is None:
        return []
    if isinstance(content, str):
        return [content]
    if not isinstance(content, list):
        return None
    texts = []
    for part in content:
        if isinstance(part, dict) and part.get("type", "text") in ("text", "output_text"):
            part = part.get("text")
        elif isinstance(part, dict):
            continue  # reasoning, an image
        if not isinstance(part, str):
            return None
        texts.append(part)
    return texts


def _silence(choices: list, completions: Sequence[Completion]) -> Failure | None:
    reasons = [choice.get("finish_reason") for choice in choices]
    if any(one.text or one.finished for one in completions) or "content_filter" in reasons:
        return None
    messages = [choice["message"] for choice in choices if isinstance(choice.get("message"), dict)]
    thought = any(message.get("reasoning_content") or message.get("reasoning") for message in messages)
    advice = " but reasoning: raise max_new_tokens;" if thought else ","
    reason = reasons[0] if isinstance(reasons[0], str) else _shown(reasons[0])
    return Failure(what=f"the answer holds no text{advice} finish_reason", quoted=reason)


def _count(value: object) -> int | None:
    """A whole number that may be written as 7, 7.0 or "7"; None for all else."""
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 12:
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return int(value) if 0 <= value <= _LARGEST_COUNT and value == int(value) else None


def _shares(total: int, lengths: Sequence[int]) -> list[int]:
    """`total` shared out by length. Rounded at the ends of the shares, which so add up to it."""
    ends = [round(total * sum(lengths[: k + 1]) / max(1, sum(lengths))) for k in range(len(lengths))]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]
