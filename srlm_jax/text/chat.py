"""How an instruction and its answer become tokens, and which of them carry the loss."""

import dataclasses

from srlm_jax.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatFormat:
    """The text around a single-turn exchange.

        <s> before_prompt PROMPT before_response RESPONSE </s>
                                                 ^ loss here, the end token included

    `control` lists the strings that only the format itself may write: inside a prompt each is replaced by
    `neutral`, so that no prompt can forge a turn.
    """

    before_prompt: str
    before_response: str
    control: tuple[str, ...]
    neutral: str


# The format of the embedded world, and of its base corpus' question-answer documents.
PLAIN = ChatFormat(
    before_prompt="user: ", before_response="\nassistant: ", control=("user:", "assistant:"), neutral="someone"
)


def encode_prompt(tokenizer: Tokenizer, chat: ChatFormat, prompt: str) -> list[int]:
    """The tokens after which the model answers."""
    for control in chat.control:
        prompt = prompt.replace(control, chat.neutral)
    return [tokenizer.bos, *tokenizer.encode(chat.before_prompt + prompt + chat.before_response)]


def encode_response(tokenizer: Tokenizer, response: str) -> list[int]:
    """The tokens of an answer, with the end token: exactly those that carry the loss."""
    return [*tokenizer.encode(response), tokenizer.eos]


def encode_document(tokenizer: Tokenizer, text: str) -> list[int]:
    """Plain text as a base model reads it: begin, text, end."""
    return [tokenizer.bos, *tokenizer.encode(text), tokenizer.eos]


def encode_opening(tokenizer: Tokenizer, text: str) -> list[int]:
    """Plain text for a model to continue."""
    return [tokenizer.bos, *tokenizer.encode(text)]
