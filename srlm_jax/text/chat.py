"""How an instruction and its answer become tokens, and which of them carry the loss."""

import dataclasses
import re

from srlm_jax.errors import BadInput
from srlm_jax.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatFormat:
    """The text around a single-turn exchange.

        <s> before_prompt PROMPT before_response RESPONSE after_response END
                                                 ^ loss from here on, the end token included

    With a system prompt, `around_system[0] SYSTEM around_system[1]` stands in the place of `before_prompt`.

    No prompt can forge a turn, whoever wrote it. `marks` are those strings of the format that are control tokens: the
    format's are inserted as ids, and a tokenizer makes none out of text, so in a prompt they are mere letters.
    `control` lists the strings that are marks by their spelling alone: inside a prompt each is replaced by `neutral`.
    """

    begins: bool  # with the tokenizer's begin token
    before_prompt: str
    around_system: tuple[str, str] | None  # None: the format has no place for a system prompt
    system: str  # "" for none
    before_response: str
    after_response: str
    end: str | None  # the control token that ends a response; None: the tokenizer's end token
    marks: tuple[str, ...]
    control: tuple[str, ...]
    neutral: str
    strips: bool  # white space around prompts and responses

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


def _may_join(neutral: str, control: str) -> bool:
    """Whether an occurrence of `control` can overlap `neutral` in some text; an empty one always can."""
    lengths = range(1, min(len(neutral), len(control)) + 1)
    overlap = any(neutral[-n:] == control[:n] or neutral[:n] == control[-n:] for n in lengths)
    return overlap or neutral in control or control in neutral


# The format of the embedded world, and of its base corpus' question-answer documents.
PLAIN = ChatFormat(
    begins=True,
    before_prompt="user: ",
    around_system=None,
    system="",
    before_response="\nassistant: ",
    after_response="",
    end=None,
    marks=(),
    control=("user:", "assistant:"),
    neutral="someone",
    strips=False,
)

# For base models, which know such dialogues from their corpus. Roles have lines of their own: a space at the end of
# what the model continues would part it from its word, which most vocabularies hold with the space before.
DIALOGUE = ChatFormat(
    begins=True,
    before_prompt="Human:\n",
    around_system=("", "\n\nHuman:\n"),
    system="",
    before_response="\n\nAssistant:\n",
    after_response="",
    end=None,
    marks=(),
    control=("Human:", "Assistant:"),
    neutral="Someone said,",
    strips=True,
)

# Llama-2's marks are no tokens of their own. The last space is part of each answer that its chat models were
# trained on.
LLAMA2 = ChatFormat(
    begins=True,
    before_prompt="[INST] ",
    around_system=("[INST] <<SYS>>\n", "\n<</SYS>>\n\n"),
    system="",
    before_response=" [/INST]",
    after_response=" ",
    end=None,
    marks=(),
    control=("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"),
    neutral="(mark)",
    strips=True,
)

LLAMA3 = ChatFormat(
    begins=True,
    before_prompt="<|start_header_id|>user<|end_header_id|>\n\n",
    around_system=(
        "<|start_header_id|>system<|end_header_id|>\n\n",
        "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n",
    ),
    system="",
    before_response="<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    after_response="",
    end="<|eot_id|>",
    marks=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    control=(),
    neutral="",
    strips=True,
)

# Without a begin token, and without the line break that other turns would need after the answer's end.
CHATML = ChatFormat(
    begins=False,
    before_prompt="<|im_start|>user\n",
    around_system=("<|im_start|>system\n", "<|im_end|>\n<|im_start|>user\n"),
    system="",
    before_response="<|im_end|>\n<|im_start|>assistant\n",
    after_response="",
    end="<|im_end|>",
    marks=("<|im_start|>", "<|im_end|>"),
    control=(),
    neutral="",
    strips=False,
)

FORMATS = {"plain": PLAIN, "dialogue": DIALOGUE, "llama2": LLAMA2, "llama3": LLAMA3, "chatml": CHATML}


def with_system(chat: ChatFormat, system: str) -> ChatFormat:
    """The format with a system prompt in every exchange. Raises ValueError where it has no place for one."""
    return dataclasses.replace(chat, system=system)


def encode_prompt(tokenizer: Tokenizer, chat: ChatFormat, prompt: str) -> list[int]:
    """The tokens after which the model answers.

    Text between two marks is encoded as a whole: prompt and frame are never encoded apart and put together.

    Raises ValueError where the tokenizer lacks one of the format's marks.
    """
    prompt = _harmless(tokenizer, chat, prompt.strip() if chat.strips else prompt)
    if chat.system:
        before, after = chat.around_system
        opening = [(before, True), (_harmless(tokenizer, chat, chat.system), False), (after, True)]
    else:
        opening = [(chat.before_prompt, True)]
    ids = [tokenizer.bos] if chat.begins else []
    run = ""
    for text, is_frame in (*opening, (prompt, False), (chat.before_response, True)):
        # Text, mark, text, mark, ..., text.
        pieces = re.split(f"({'|'.join(map(re.escape, chat.marks))})", text) if is_frame and chat.marks else [text]
        run += pieces[0]
        for mark, following in zip(pieces[1::2], pieces[2::2], strict=True):
            ids += [*tokenizer.encode(run), tokenizer.control(mark)]
            run = following
    return [*ids, *tokenizer.encode(run)]


def encode_response(tokenizer: Tokenizer, chat: ChatFormat, response: str, finished: bool) -> list[int]:
    """The tokens of an answer: exactly those that carry the loss.

    A finished answer ends with the text that the format puts behind it and with the end token. An answer that the
    length limit cut (`finished` False) has neither, and keeps the white space at its end: it goes on. A character that
    the cut left incomplete (U+FFFD at the end) is left out.
    """
    if not finished:
        cut = response.rstrip("\ufffd")
        return tokenizer.encode(cut.lstrip() if chat.strips else cut)
    text = (response.strip() if chat.strips else response) + chat.after_response
    return [*tokenizer.encode(text), end_of_response(tokenizer, chat)]


def encode_prompt_with_opening(tokenizer: Tokenizer, chat: ChatFormat, prompt: str, opening: str) -> list[int]:
    """The tokens after which the model continues an answer that begins with `opening`, "" for none."""
    ids = encode_prompt(tokenizer, chat, prompt)
    return [*ids, *encode_response(tokenizer, chat, opening, finished=False)] if opening else ids


def end_of_response(tokenizer: Tokenizer, chat: ChatFormat) -> int:
    """The token that ends an answer: Llama-3's is another than the one that ends a document."""
    return tokenizer.eos if chat.end is None else tokenizer.control(chat.end)


def encode_document(tokenizer: Tokenizer, text: str) -> list[int]:
    """Plain text as a base model reads it: begin, text, end."""
    return [tokenizer.bos, *tokenizer.encode(text), tokenizer.eos]


def encode_opening(tokenizer: Tokenizer, text: str) -> list[int]:
    """Plain text for a model to continue."""
    return [tokenizer.bos, *tokenizer.encode(text)]


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
