"""Text <-> token ids, behind the few methods that the rest of the package needs."""

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import sentencepiece
from etils import epath


class Tokenizer(Protocol):
    """What a tokenizer offers. `encode` adds no special tokens, and never makes one out of text."""

    vocabulary: int
    bos: int
    eos: int
    pad: int

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


@dataclasses.dataclass(frozen=True)
class WordTokenizer:
    """One token per word of a closed vocabulary; a line break is a word too.

    Ids 0 to 3 are padding, begin, end and unknown; `words[i]` is id 4 + i. Decoding puts a space between words except
    around a line break, so text in that form survives the round trip.
    """

    words: tuple[str, ...]

    pad = 0
    bos = 1
    eos = 2
    unknown = 3

    def __post_init__(self):
        if len(set(self.words)) != len(self.words):
            raise ValueError("the vocabulary holds a word twice")
        object.__setattr__(self, "_ids", {word: 4 + i for i, word in enumerate(self.words)})

    @property
    def vocabulary(self) -> int:
        return 4 + len(self.words)

    def encode(self, text: str) -> list[int]:
        return [self._ids.get(word, self.unknown) for word in text.replace("\n", " \n ").split(" ") if word]

    def decode(self, ids: Sequence[int]) -> str:
        # A model may have more ids than there are words, and draw one of them.
        known = range(4, self.vocabulary)
        words = [self.words[i - 4] if i in known else "<unk>" for i in ids if i not in (self.pad, self.bos, self.eos)]
        return " ".join(words).replace(" \n ", "\n").replace("\n ", "\n").replace(" \n", "\n")


class SentencePieceTokenizer:
    """A SentencePiece `tokenizer.model`, Llama-2's for one, which has no padding id: the end token's stands in.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is no SentencePiece model, or lacks a begin or end token.
    """

    def __init__(self, path: epath.PathLike):
        path = epath.Path(path)
        try:
            self._pieces = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
        except RuntimeError as error:
            raise ValueError(f"{path} is not a SentencePiece model: {error}") from error
        self.vocabulary = self._pieces.vocab_size()
        self.bos, self.eos = self._pieces.bos_id(), self._pieces.eos_id()
        if self.bos < 0 or self.eos < 0:
            raise ValueError(f"{path} defines no begin or no end token (bos {self.bos}, eos {self.eos})")
        self.pad = self._pieces.pad_id() if self._pieces.pad_id() >= 0 else self.eos

    def encode(self, text: str) -> list[int]:
        return self._pieces.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        return self._pieces.decode([i for i in ids if i not in (self.bos, self.eos)])
