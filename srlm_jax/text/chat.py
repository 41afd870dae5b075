"""How an instruction and its answer become tokens, and which of them carry the loss."""

import dataclasses
import enum
import re
from collections.abc import Sequence

from srlm_jax.errors import BadInput
from srlm_jax.text.tokenizer import Tokenizer


class Begin(enum.Enum):
    """What stands before an exchange."""

    TOKEN = "the begin token, where the tokenizer has one"
    TEXT = "what the tokenizer puts before any text"
    NOTHING = "nothing"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatFormat:
    """The text around a single-turn exchange.

        BEGIN before_prompt PROMPT before_response begin_response RESPONSE after_response END
                                                   ^ loss from here on, the end token included

    With a system prompt, `around_system[0] SYSTEM around_system[1]` stands in the place of `before_prompt`.

    No prompt can forge a turn, whoever wrote it. `marks` are those strings of the format that are control tokens: the
    format's are inserted as ids, and a tokenizer makes none out of text, so in a prompt they are mere letters.
    `control` lists the strings that are marks by their spelling alone: inside a prompt each is replaced by `neutral`.
    """

    begins: Begin
    before_prompt: str
    around_system: tuple[str, str] | None  # None: the format has no place for a system prompt
    system: str  # "" for none
    before_response: str
    begin_response: str  # text with which the model begins each answer
    after_response: str
    end: str | None  # the control token that ends a response; None: the tokenizer's end token
    marks: tuple[str, ...]
    control: tuple[str, ...]
    neutral: str
    strips: bool  # white space around messages and responses
    template: str  # the same in Jinja, for exports; see `templates.template_of`

    def __post_init__(self):
        if self.system and self.around_system is None:
            raise BadInput("this chat format has no place for a system prompt")
        for control in self.control:
            if _may_join(self.neutral, control):
                # "[IN[INST]ST]" without its inner mark is a mark.
                raise BadInput(
                    f"neutral {self.neutral!r} and the text around it could make the control string {control!r}; "
                    "choose one that is not empty and shares no beginning or end with it"
                )

    def frame(self, prompt: str) -> tuple[tuple[str, str], str]:
        """What stands on both sides of the system prompt, and the prompt without the white space around its message.

        Where the system prompt is the first part of the same message, as Llama-2's is, only the message's end is there.
        """
        around = self.around_system if self.system else ("", self.before_prompt)
        if not self.strips:
            return around, prompt
        before, after = around
        if not (self.system and before.startswith(self.before_prompt)):
            return around, prompt.strip()
        return (before, after if prompt.strip() else after.rstrip()), prompt.rstrip()


def _may_join(neutral: str, control: str) -> bool:
    """Whether an occurrence of `control` can overlap `neutral` in some text; an empty one always can."""
    lengths = range(1, min(len(neutral), len(control)) + 1)
    overlap = any(neutral[-n:] == control[:n] or neutral[:n] == control[-n:] for n in lengths)
    return overlap or neutral in control or control in neutral


# The format of the embedded world, and of its base corpus' question-answer documents.
PLAIN = ChatFormat(
    begins=Begin.TEXT,
    before_prompt="user: ",
    around_system=None,
    system="",
    before_response="\nassistant:",
    begin_response=" ",
    after_response="",
    end=None,
    marks=(),
    control=("user:", "assistant:"),
    neutral="someone",
    strips=False,
    template="""\
{%- if system %}{{ raise_exception('this format has no place for a system prompt') }}{% endif %}
{%- for message in messages %}
{%- if message['role'] == 'user' %}{{ begin + 'user: ' + message['content']SAFE + '\\nassistant:' }}
{%- else %}{{ ' ' + message['content'] + end }}{% endif %}
{%- endfor %}
""",
)

# For base models, which know such dialogues from their corpus. Roles have lines of their own: a space at the end of
# what the model continues would part it from its word, which most vocabularies hold with the space before.
DIALOGUE = ChatFormat(
    begins=Begin.TEXT,
    before_prompt="Human:\n",
    around_system=("", "\n\nHuman:\n"),
    system="",
    before_response="\n\nAssistant:\n",
    begin_response="",
    after_response="",
    end=None,
    marks=(),
    control=("Human:", "Assistant:"),
    neutral="Someone said,",
    strips=True,
    template="""\
{%- for message in messages %}
{%- if message['role'] == 'user' %}
{{- begin if loop.first else '' }}
{{- systemSAFE + '\\n\\n' if system and loop.first else '' }}
{{- 'Human:\\n' + message['content']|trimSAFE + '\\n\\nAssistant:\\n' }}
{%- else %}{{ message['content']|trim + end }}{% endif %}
{%- endfor %}
""",
)

# Llama-2's marks are no tokens of their own. The spaces around each answer are part of what its chat models were
# trained on.
LLAMA2 = ChatFormat(
    begins=Begin.TOKEN,
    before_prompt="[INST] ",
    around_system=("[INST] <<SYS>>\n", "\n<</SYS>>\n\n"),
    system="",
    before_response=" [/INST]",
    begin_response=" ",
    after_response=" ",
    end=None,
    marks=(),
    control=("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"),
    neutral="(mark)",
    strips=True,
    template="""\
{%- for message in messages %}
{%- if message['role'] == 'user' %}
{{- begin + '[INST] ' }}
{%- if system and loop.first %}
{{- ('<<SYS>>\\n' + systemSAFE + '\\n<</SYS>>\\n\\n' + message['content']SAFE)|trim + ' [/INST]' }}
{%- else %}{{ message['content']|trimSAFE + ' [/INST]' }}{% endif %}
{%- else %}{{ ' ' + message['content']|trim + ' ' + end }}{% endif %}
{%- endfor %}
""",
)

LLAMA3 = ChatFormat(
    begins=Begin.TOKEN,
    before_prompt="<|start_header_id|>user<|end_header_id|>\n\n",
    around_system=(
        "<|start_header_id|>system<|end_header_id|>\n\n",
        "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n",
    ),
    system="",
    before_response="<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    begin_response="",
    after_response="",
    end="<|eot_id|>",
    marks=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    control=(),
    neutral="",
    strips=True,
    template="""\
{{- begin }}
{%- if system %}{{ '<|start_header_id|>system<|end_header_id|>\\n\\n' + system + end }}{% endif %}
{%- for message in messages %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content']|trim + end }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}
""",
)

# Without a begin token, and without the line break that other turns would need after the answer's end.
CHATML = ChatFormat(
    begins=Begin.NOTHING,
    before_prompt="<|im_start|>user\n",
    around_system=("<|im_start|>system\n", "<|im_end|>\n<|im_start|>user\n"),
    system="",
    before_response="<|im_end|>\n<|im_start|>assistant\n",
    begin_response="",
    after_response="",
    end="<|im_end|>",
    marks=("<|im_start|>", "<|im_end|>"),
    control=(),
    neutral="",
    strips=False,
    template="""\
{%- if system %}{{ '<|im_start|>system\\n' + system + end + '\\n' }}{% endif %}
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + end + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
""",
)

FORMATS = {"plain": PLAIN, "dialogue": DIALOGUE, "llama2": LLAMA2, "llama3": LLAMA3, "chatml": CHATML}


def with_system(chat: ChatFormat, system: str) -> ChatFormat:
    """The format with a system prompt in every exchange. Raises ValueError where it has no place for one."""
    return dataclasses.replace(chat, system=system)


def check_format(tokenizer: Tokenizer, chat: ChatFormat, V: int) -> None:
    """Looks up the format's control tokens.

    Raises BadInput where the tokenizer lacks one, or its id is not among the `V` of the model.
    """
    ids = [*encode_prompt(tokenizer, chat, ""), end_of_response(tokenizer, chat)]
    if max(ids) >= V:
        raise BadInput(
            f"{tokenizer.name} gives the chat format's token {tokenizer.piece(max(ids))!r} the id {max(ids)}, and the "
            f"model has {V} ids: choose the chat format the model was made for"
        )


def encode_prompt(tokenizer: Tokenizer, chat: ChatFormat, prompt: str) -> list[int]:
    """The tokens after which the model answers: those of the whole text with its marks, as a template gives them.

    Raises BadInput where the tokenizer lacks one of the format's marks.
    """
    (before, after), prompt = chat.frame(prompt)
    prompt, system = _harmless(tokenizer, chat, prompt), _harmless(tokenizer, chat, chat.system)
    parts: list[str | int] = [*begin_ids(tokenizer, chat)]
    run = ""
    for text, is_frame in ((before, 1), (system, 0), (after, 1), (prompt, 0), (chat.before_response, 1)):
        pieces = _split(chat, text) if is_frame else [text]
        run += pieces[0]
        for mark, following in zip(pieces[1::2], pieces[2::2], strict=True):
            parts += [run, tokenizer.control(mark)]
            run = following
    return tokenizer.encode_marked([part for part in (*parts, run) if part != ""])


def encode_response(tokenizer: Tokenizer, chat: ChatFormat, response: str, finished: bool) -> list[int]:
    """The tokens of an answer: exactly those that carry the loss.

    A finished answer ends with the text that the format puts behind it and with the end token. An answer that the
    length limit cut (`finished` False) has neither, and keeps the white space at its end: it goes on. A character that
    the cut left incomplete (U+FFFD at the end) is left out.

    The ids are those that the answer has behind the format's `before_response`, as a template gives them. Where a token
    would hold letters of both, the answer is encoded apart, because the model, too, begins to write there.
    """
    if finished:
        text = chat.begin_response + (response.strip() if chat.strips else response) + chat.after_response
        end = [end_of_response(tokenizer, chat)]
    else:
        cut = response.rstrip("\ufffd")
        text, end = (chat.begin_response + (cut.lstrip() if chat.strips else cut)) if cut else "", []
    pieces = _split(chat, chat.before_response)
    mark = [tokenizer.control(pieces[-2])] if pieces[1:] else []

    def encode(text: str, end: list[int]) -> list[int]:
        return tokenizer.encode_marked([*mark, *([text] if text else []), *end])

    frame, whole = encode(pieces[-1], []), encode(pieces[-1] + text, end)
    return whole[len(frame) :] if whole[: len(frame)] == frame else [*encode_within(tokenizer, text), *end]


def encode_within(tokenizer: Tokenizer, text: str) -> list[int]:
    """A text as it looks behind other text: SentencePiece puts a space before the first word of all."""
    before, both = tokenizer.encode("\n"), tokenizer.encode(f"\n{text}")
    return both[len(before) :] if both[: len(before)] == before else tokenizer.encode(text)


def encode_prompt_with_opening(tokenizer: Tokenizer, chat: ChatFormat, prompt: str, opening: str) -> list[int]:
    """The tokens after which the model continues an answer that begins with `opening`, "" for none."""
    ids = encode_prompt(tokenizer, chat, prompt)
    return [*ids, *encode_response(tokenizer, chat, opening, finished=False)] if opening else ids


def begin_ids(tokenizer: Tokenizer, chat: ChatFormat) -> tuple[int, ...]:
    """The tokens before an exchange."""
    token = () if tokenizer.bos is None else (tokenizer.bos,)
    return {Begin.TOKEN: token, Begin.TEXT: tokenizer.begins, Begin.NOTHING: ()}[chat.begins]


def end_of_response(tokenizer: Tokenizer, chat: ChatFormat) -> int:
    """The token that ends an answer: Llama-3's is another than the one that ends a document."""
    return tokenizer.eos if chat.end is None else tokenizer.control(chat.end)


def until_stop(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    """The text up to and with the first stop string, and whether there is one."""
    ends = [text.index(string) + len(string) for string in stop if string in text]
    return text[: min(ends, default=len(text))], bool(ends)


def encode_document(tokenizer: Tokenizer, text: str) -> list[int]:
    """Plain text as a base model reads it: begin, text, end."""
    return [*tokenizer.begins, *tokenizer.encode(text), tokenizer.eos]


def encode_opening(tokenizer: Tokenizer, text: str) -> list[int]:
    """Plain text for a model to continue."""
    return [*tokenizer.begins, *tokenizer.encode(text)]


def _split(chat: ChatFormat, frame: str) -> list[str]:
    """Text, mark, text, mark, ..., text."""
    return re.split(f"({'|'.join(map(re.escape, chat.marks))})", frame) if chat.marks else [frame]


def _harmless(tokenizer: Tokenizer, chat: ChatFormat, text: str) -> str:
    """`text` without the format's control strings, as the tokenizer reads it."""
    text = _replace(chat, text)
    if chat.control:
        # Some SentencePiece models make "[INST]" out of full-width brackets.
        read = tokenizer.decode(tokenizer.encode(text))
        if any(control in read for control in chat.control):
            return _replace(chat, read)
    return text


def _replace(chat: ChatFormat, text: str) -> str:
    for control in chat.control:
        text = text.replace(control, chat.neutral)
    return text
