"""Text <-> token ids, behind the few methods that the rest of the package needs."""

import dataclasses
import json
import re
from collections.abc import Sequence
from typing import Protocol

import sentencepiece
import tokenizers
from etils import epath
from tokenizers import decoders, models, pre_tokenizers, processors

from srlm_jax.errors import BadInput
from srlm_jax.storage import jsonl

_WORDS = "words.json"  # the embedded world's vocabulary


class Tokenizer(Protocol):
    """What a tokenizer offers.

    `encode` adds no special tokens, and never makes one out of text. `decode` leaves special tokens out, and takes any
    ids: a model may have more than its tokenizer, and draw one of them.
    """

    name: str  # in messages: its file
    vocabulary: int  # one more than the largest id
    bos: int  # begins a text
    eos: int  # ends a document
    ends: tuple[int, ...]  # all that a model may end its text with; `eos` is the first
    pad: int  # padding is masked wherever it occurs, so any id will do

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def control(self, name: str) -> int:
        """The id of a control token such as "<|eot_id|>": one that `encode` never gives.

        Raises ValueError where the tokenizer has none of this name.
        """

    def save(self, folder: epath.Path) -> None:
        """Writes the files of which `load_tokenizer` makes it again into an existing folder."""


@dataclasses.dataclass(frozen=True)
class WordTokenizer:
    """One token per word of a closed vocabulary; a line break is a word too.

    Ids 0 to 3 are padding, begin, end and unknown; `words[i]` is id 4 + i. Decoding puts a space between words except
    around a line break, so text in that form survives the round trip.
    """

    words: tuple[str, ...]

    name = _WORDS
    pad = 0
    bos = 1
    eos = 2
    ends = (eos,)
    unknown = 3

    def __post_init__(self):
        if len(set(self.words)) != len(self.words):
            raise BadInput("the vocabulary holds a word twice")
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

    def control(self, name: str) -> int:
        raise BadInput(f"a vocabulary of words has no control token {name!r}; choose a chat format without")

    def save(self, folder: epath.Path) -> None:
        jsonl.write_json(folder / _WORDS, list(self.words))

    def save_hf(self, folder: epath.Path) -> None:
        """Writes tokenizer.json and tokenizer_config.json: transformers encodes by them as this does, behind a begin
        token as is usual for a Llama, and decodes known words as this does.

        There, text that spells a special token becomes it.

        Raises ValueError where a word is spelt like one.
        """
        special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        pieces = [*special.values(), *self.words]
        if len(set(pieces)) != len(pieces):
            raise BadInput(f"{_WORDS} holds one of {', '.join(special.values())}, which are not words elsewhere")
        ids = {piece: i for i, piece in enumerate(pieces)}
        made = tokenizers.Tokenizer(models.WordLevel(ids, special["unk_token"]))
        made.add_special_tokens([*special.values()])
        split = pre_tokenizers.Split
        made.pre_tokenizer = pre_tokenizers.Sequence([split("\n", "isolated"), split(" ", "removed")])
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", self.bos)])
        spaced = decoders.WordPiece(prefix="\n\n", cleanup=False)  # no word has this prefix, so each gets its space
        breaks = [decoders.Replace(around, "\n") for around in (" \n ", "\n ", " \n")]
        made.decoder = decoders.Sequence([spaced, decoders.Fuse(), *breaks])
        (folder / "tokenizer.json").write_text(made.to_str(pretty=True))
        kind = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        jsonl.write_json(folder / "tokenizer_config.json", kind | special)


class SentencePieceTokenizer:
    """A SentencePiece `tokenizer.model`, Llama-2's for one, which has no padding id: the end token's stands in.

    Every text is encoded as the begin of one: where the model puts a space before the first word, it does so each
    time, and so Llama-2's reference code does with each turn of a dialogue.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is no SentencePiece model, or lacks a begin or end token.
    """

    def __init__(self, path: epath.PathLike):
        self._path = epath.Path(path)
        self.name = str(path)
        try:
            self._pieces = sentencepiece.SentencePieceProcessor(model_proto=self._path.read_bytes())
        except (RuntimeError, UnicodeDecodeError) as error:  # the latter where it quotes what it cannot use
            raise BadInput(
                f"{path} is not a SentencePiece model: {error}. Llama-3's file of this name is of another kind; "
                "its tokenizer.json is read"
            ) from error
        self.vocabulary = self._pieces.vocab_size()
        self.bos, self.eos = self._pieces.bos_id(), self._pieces.eos_id()
        if self.bos < 0 or self.eos < 0:
            raise BadInput(f"{path} defines no begin or no end token (bos {self.bos}, eos {self.eos})")
        try:
            self._pieces.decode(list(range(self.vocabulary)))
        except UnicodeDecodeError as error:  # else it would come in the middle of a run, once a model draws the piece
            raise BadInput(f"{path} holds a piece that is not UTF-8 text ({error}): copy it again") from error
        self.ends = (self.eos,)
        self.pad = self._pieces.pad_id() if self._pieces.pad_id() >= 0 else self.eos

    def encode(self, text: str) -> list[int]:
        return self._pieces.encode(text, add_bos=False, add_eos=False)

    def decode(self, ids: Sequence[int]) -> str:
        known = [i if i < self.vocabulary else self._pieces.unk_id() for i in ids]
        return self._pieces.decode([i for i in known if i not in (self.bos, self.eos)])

    def control(self, name: str) -> int:
        piece = self._pieces.piece_to_id(name)
        if not self._pieces.IsControl(piece):
            raise BadInput(f"{self._path} has no control token {name!r}; choose the chat format the model was made for")
        return piece

    def save(self, folder: epath.Path) -> None:
        self._path.copy(folder / "tokenizer.model", overwrite=True)


# Chat models often add their marks without declaring them special; what is spelt like this is never made out of text.
_BRACKETED = re.compile(r"<.+>|\[.+\]", re.DOTALL)


class HuggingFaceTokenizer:
    """A `tokenizer.json`, and which tokens begin and end a text from the files beside it.

    Those are tokenizer_config.json, special_tokens_map.json and generation_config.json, the first that says it. Where
    none names a begin token (Qwen has none), the end token stands in: it separates documents. It pads, too. The
    tokenizers of Llama-3's and like models have several end tokens: those that any of the files name are `ends`.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: a file is damaged, names a token that does not exist, or no file names an end token; or text that
        spells a special token would become it.
    """

    def __init__(self, path: epath.PathLike):
        self._path = path = epath.Path(path)
        self.name = str(path)
        document = _read_object(path)
        added = document.get("added_tokens") or []
        try:
            special = {token["content"] for token in added if token["special"]}
            for token in added:
                token["special"] |= _BRACKETED.fullmatch(token["content"]) is not None
            self._tokens = tokenizers.Tokenizer.from_str(json.dumps(document))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the library raises nothing narrower, and what is no Exception where it panics
            raise BadInput(f"{path} is not a tokenizer of the tokenizers library: {error!r}") from error
        # A file may carry the settings of a training run, which would cut texts.
        self._tokens.no_truncation()
        self._tokens.no_padding()
        self._tokens.encode_special_tokens = True  # "<s>" in a text is three characters
        every = self._tokens.get_vocab(with_added_tokens=True)
        self.vocabulary = 1 + max(every.values(), default=-1)
        self.ends = _named_ids(path.parent, "eos", every)
        if not self.ends:
            raise BadInput(f"{path.parent} names no end token: {', '.join(_BESIDE)} are where it should be")
        self.eos = self.pad = self.ends[0]
        self.bos = (*_named_ids(path.parent, "bos", every), self.eos)[0]
        self._control = {token["content"]: every[token["content"]] for token in added if token["special"]}
        self._silent = frozenset({self.bos, *self.ends, *(every[name] for name in special)})
        never = {*self._silent, *self._control.values()}
        for name in sorted(self._tokens.id_to_token(i) for i in never):
            if made := never.intersection(self.encode(name)):
                raise BadInput(
                    f"{path} makes the special token {self._tokens.id_to_token(min(made))!r} out of the text {name!r}, "
                    "so that any prompt could; it cannot be used safely"
                )

    def encode(self, text: str) -> list[int]:
        return self._tokens.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokens.decode([i for i in ids if i not in self._silent], skip_special_tokens=False)

    def control(self, name: str) -> int:
        if name not in self._control:
            raise BadInput(f"{self._path} has no control token {name!r}; choose the chat format the model was made for")
        return self._control[name]

    def save(self, folder: epath.Path) -> None:
        for name in (self._path.name, *_BESIDE):
            if (self._path.parent / name).exists():
                (self._path.parent / name).copy(folder / name, overwrite=True)


def load_tokenizer(folder: epath.PathLike) -> Tokenizer:
    """The tokenizer of a model's folder.

    Of tokenizer.json and tokenizer.model the first is taken where both are there: it has the tokens that were added
    after pretraining (ChatML's marks), and Llama-3's tokenizer.model is no SentencePiece model.

    Raises:
      FileNotFoundError: the folder has neither.
      ValueError: the file cannot be used; see the two classes.
    """
    folder = epath.Path(folder)
    if (folder / _WORDS).exists():
        words = jsonl.read_json(folder / _WORDS)
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise BadInput(f"{folder / _WORDS} must hold a list of words; copy it again")
        try:
            return WordTokenizer(tuple(words))
        except ValueError as error:
            raise BadInput(f"{folder / _WORDS}: {error}; copy it again") from error
    if (folder / "tokenizer.json").exists():
        return HuggingFaceTokenizer(folder / "tokenizer.json")
    if (folder / "tokenizer.model").exists():
        return SentencePieceTokenizer(folder / "tokenizer.model")
    raise FileNotFoundError(
        f"{folder} holds neither tokenizer.json (tokenizers) nor tokenizer.model (SentencePiece); copy the one that "
        "came with the model there"
    )


def check_vocabulary(tokenizer: Tokenizer, V: int) -> None:
    """Refuses a tokenizer with ids that a model of `V` ids has not. Fewer are right: vocabularies are often padded.

    Raises ValueError with the tokenizer's name and both numbers.
    """
    if tokenizer.vocabulary > V:
        raise BadInput(
            f"the tokenizer has {tokenizer.vocabulary} ids and the model {V}: {tokenizer.name} is another "
            "model's, or the model's vocabulary has to be larger"
        )


_BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json")


def _named_ids(folder: epath.Path, role: str, ids: dict[str, int]) -> tuple[int, ...]:
    """All ids that the files beside a tokenizer.json give for "bos" or "eos", in the order of the files.

    A file gives a token as text, as an object with its text, as its id, or as a list of these.
    """
    found = []
    for name in _BESIDE:
        path = folder / name
        key = f"{role}_token_id" if name == "generation_config.json" else f"{role}_token"
        value = _read_object(path).get(key) if path.exists() else None
        for token in value if isinstance(value, list) else [value]:
            if token is None:
                continue
            text = token.get("content") if isinstance(token, dict) else token
            one = ids.get(text) if isinstance(text, str) else text
            if type(one) is not int or one not in ids.values():
                raise BadInput(f"{path}: {key} is {value!r}, which is no token of tokenizer.json beside it")
            found.append(one)
    return tuple(dict.fromkeys(found))


def _read_object(path: epath.Path) -> dict:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadInput(f"{path} is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise BadInput(f"{path} holds no JSON object")
    return document
