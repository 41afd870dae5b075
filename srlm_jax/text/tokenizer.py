"""Text <-> token ids, behind the few methods that the rest of the package needs."""

import dataclasses
import json
import secrets
from collections.abc import Sequence
from typing import Protocol

import sentencepiece
import tokenizers
from etils import epath
from tokenizers import decoders, models, pre_tokenizers, processors

from srlm_jax.errors import BadInput
from srlm_jax.storage import jsonl, paths
from srlm_jax.text import characters, token_files

_WORDS = "words.json"  # the embedded world's vocabulary
_MOST_GAPS = 100_000  # each is filled with a token


class Tokenizer(Protocol):
    """What a tokenizer offers.

    `encode` adds no special tokens, and never makes one out of text. `decode` leaves special tokens out, and takes any
    ids: a model may have more than its tokenizer, and draw one of them.
    """

    name: str  # in messages: its file
    vocabulary: int  # one more than the largest id
    needed: int  # one more than the largest id that `encode` gives or that begins or ends a text
    bos: int | None  # the begin token; None where no file names one
    begins: tuple[int, ...]  # what the tokenizer puts before a text by itself: (bos,) or ()
    eos: int  # ends a document
    ends: tuple[int, ...]  # all that a model may end its text with; `eos` is the first
    pad: int  # padding is masked wherever it occurs, so any id will do

    def encode(self, text: str) -> list[int]: ...

    def encode_marked(self, parts: Sequence[str | int]) -> list[int]:
        """The ids of a text in which control tokens stand: `parts` are its texts and the control tokens' ids.

        They are those that the tokenizer's library gives where the control tokens are spelt out in one string. Text
        after a control token may have other ids than at the beginning.
        """

    def decode(self, ids: Sequence[int]) -> str: ...

    def decode_cut(self, ids: Sequence[int]) -> str:
        """As `decode`, for ids that the length limit cut: an incomplete character at the end is left out."""

    def piece(self, i: int) -> str:
        """How the vocabulary spells an id, for messages and templates."""

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
    begins = (bos,)
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

    @property
    def needed(self) -> int:
        return self.vocabulary

    def encode(self, text: str) -> list[int]:
        return [self._ids.get(word, self.unknown) for word in text.replace("\n", " \n ").split(" ") if word]

    def encode_marked(self, parts: Sequence[str | int]) -> list[int]:
        return [i for part in parts for i in (self.encode(part) if isinstance(part, str) else [part])]

    def decode(self, ids: Sequence[int]) -> str:
        # A model may have more ids than there are words, and draw one of them.
        known = range(4, self.vocabulary)
        words = [self.words[i - 4] if i in known else "<unk>" for i in ids if i not in (self.pad, self.bos, self.eos)]
        return " ".join(words).replace(" \n ", "\n").replace("\n ", "\n").replace(" \n", "\n")

    decode_cut = decode  # a word is whole

    def piece(self, i: int) -> str:
        return ("<pad>", "<s>", "</s>", "<unk>", *self.words)[i]

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
        path = folder / token_files.CONFIG  # which has the chat template already
        jsonl.write_json(path, kind | special | token_files.fields_of(path))


class SentencePieceTokenizer:
    """A SentencePiece `tokenizer.model`, Llama-2's for one, which has no padding id: the end token's stands in.

    Where the model puts a space before the first word of a text, it does so after each control token too, as Llama-2's
    reference code does with each turn of a dialogue; tokenizer_config.json beside it with "legacy": false says that it
    does so only at the beginning. That file may also name other end tokens and say "add_bos_token": false.
    added_tokens.json beside it adds control tokens, which text never makes.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is no SentencePiece model, or lacks a begin or end token; a file beside it is damaged, or
        adds a word or an id that the model has.
    """

    def __init__(self, path: epath.PathLike):
        self._path = epath.Path(path)
        self.name = str(path)
        try:
            self._pieces = sentencepiece.SentencePieceProcessor(model_proto=self._path.read_bytes())
        except (RuntimeError, UnicodeDecodeError) as error:  # the latter where it quotes what it cannot use
            message = (
                f"{path} is not a SentencePiece model: {error}. Llama-3's file of this name is of another kind; its "
                "tokenizer.json is read"
            )
            raise BadInput(paths.pointer_error(self._path) or message) from error
        size = self._pieces.vocab_size()
        self.bos, eos = self._pieces.bos_id(), self._pieces.eos_id()
        if self.bos < 0 or eos < 0:
            raise BadInput(f"{path} defines no begin or no end token (bos {self.bos}, eos {eos})")
        try:
            self._pieces.decode(list(range(size)))
        except UnicodeDecodeError as error:  # else it would come in the middle of a run, once a model draws the piece
            raise BadInput(f"{path} holds a piece that is not UTF-8 text ({error}): copy it again") from error
        self._added = _added_tokens(self._path.parent / "added_tokens.json", self._pieces)
        self.vocabulary = max(size, *(1 + i for i in self._added.values()), 0)
        config = token_files.fields_of(self._path.parent / token_files.CONFIG)
        self._always = config.get("legacy") is not False
        self.begins = () if config.get("add_bos_token") is False else (self.bos,)
        pieces = {self._pieces.id_to_piece(i): i for i in range(size)}
        self.ends = tuple(dict.fromkeys((*token_files.named_ids(self._path.parent, "eos", pieces | self._added), eos)))
        self.eos = self.ends[0]
        made = [i for i in range(size) if not (self._pieces.IsControl(i) or self._pieces.IsUnused(i))]
        self.needed = 1 + max(*made, self.bos, *self.ends)
        self.pad = self._pieces.pad_id() if self._pieces.pad_id() >= 0 else self.eos

    def encode(self, text: str) -> list[int]:
        return self._pieces.encode(text, add_bos=False, add_eos=False)

    def encode_marked(self, parts: Sequence[str | int]) -> list[int]:
        ids: list[int] = []
        for part in parts:
            if not isinstance(part, str):
                ids.append(part)
            elif self._always or not ids:
                ids += self.encode(part)
            else:
                before = self.encode("\n")
                ids += self.encode(f"\n{part}")[len(before) :]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        silent = {self.bos, *self.ends, *self._added.values()}
        shown = [i for i in ids if i not in silent]
        return self._pieces.decode([i if i < self._pieces.vocab_size() else self._pieces.unk_id() for i in shown])

    def decode_cut(self, ids: Sequence[int]) -> str:
        whole = [*ids]
        del whole[len(whole) - characters.begun_tokens([self.piece(i) for i in whole[-3:]]) :]
        return self.decode(whole)

    def piece(self, i: int) -> str:
        names = {i: name for name, i in self._added.items()}
        return names.get(i, self._pieces.id_to_piece(i if i < self._pieces.vocab_size() else self._pieces.unk_id()))

    def control(self, name: str) -> int:
        piece = self._added.get(name, self._pieces.piece_to_id(name))
        if name not in self._added and not self._pieces.IsControl(piece):
            raise BadInput(f"{self._path} has no control token {name!r}; choose the chat format the model was made for")
        return piece

    def save(self, folder: epath.Path) -> None:
        token_files.copy(self._path, folder)


def _added_tokens(path: epath.Path, pieces: sentencepiece.SentencePieceProcessor) -> dict[str, int]:
    """What an added_tokens.json adds to a SentencePiece model: control tokens and their ids."""
    added = {}
    for name, i in token_files.fields_of(path).items():
        if type(i) is not int or i < 0:
            raise BadInput(f"{path}: the id of {name!r} is {i!r}, which is no whole number from 0")
        if i < pieces.vocab_size():
            if pieces.id_to_piece(i) != name:
                raise BadInput(f"{path}: {name!r} has id {i}, which is {pieces.id_to_piece(i)!r} in tokenizer.model")
        elif token_files.BRACKETED.fullmatch(name) is None:
            raise BadInput(f"{path} adds the word {name!r}, which is not in tokenizer.model: bring the tokenizer.json")
        else:
            added[name] = i
    return added


class HuggingFaceTokenizer:
    """A `tokenizer.json`, and which tokens begin and end a text from the files beside it.

    Those are tokenizer_config.json, special_tokens_map.json and generation_config.json, the first that says it. The
    end token also pads. The tokenizers of Llama-3's and like models have several end tokens: those that any of the
    files name are `ends`. A text begins with the begin token where "add_bos_token" in tokenizer_config.json or, without
    it, the post-processor of tokenizer.json says so.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: a file is damaged, names a token that does not exist, or no file names an end token; or text that
        spells a special token would become it.
    """

    def __init__(self, path: epath.PathLike):
        self._path = path = epath.Path(path)
        self.name = str(path)
        document = token_files.read_object(path)
        added = document.get("added_tokens") or []
        try:
            special = {token["content"] for token in added if token["special"]}
            for token in added:
                token["special"] |= token_files.BRACKETED.fullmatch(token["content"]) is not None
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
        self.ends = token_files.named_ids(path.parent, "eos", every)
        if not self.ends:
            raise BadInput(f"{path.parent} names no end token: {', '.join(token_files.BESIDE)} are where it should be")
        self.eos = self.pad = self.ends[0]
        self.bos = next(iter(token_files.named_ids(path.parent, "bos", every)), None)
        self._control = {token["content"]: every[token["content"]] for token in added if token["special"]}
        self._silent = frozenset({*self.ends, *(every[name] for name in special)} | ({self.bos} - {None}))
        never = {*self._silent, *self._control.values()}
        for name in sorted(self._tokens.id_to_token(i) for i in never):
            if made := never.intersection(self.encode(name)):
                raise BadInput(
                    f"{path} makes the special token {self._tokens.id_to_token(min(made))!r} out of the text {name!r}, "
                    "so that any prompt could; it cannot be used safely"
                )
        named = {*self.ends, self.bos} - {None}
        self.needed = 1 + max({*every.values()} - never | named)
        self.begins = self._begins()
        self._add_twins(never, {every[token["content"]]: token for token in added})
        decoder = json.dumps(document.get("decoder"))
        self._byte_level, self._byte_fallback = "ByteLevel" in decoder, "ByteFallback" in decoder

    def _begins(self) -> tuple[int, ...]:
        said = token_files.fields_of(self._path.parent / token_files.CONFIG).get("add_bos_token")
        if said is None:
            framed = self._tokens.encode("a", add_special_tokens=True).ids
            said = bool(framed) and framed[0] == self.bos
        return (self.bos,) if said and self.bos is not None else ()

    def _add_twins(self, never: set[int], added: dict[int, dict]) -> None:
        """Adds a token beside each control token, spelt in a way that nobody can guess.

        In `encode_marked` it stands for the control token, so that the library splits the text there as it would at the
        control token, although no spelling of the control token in a text counts.
        """
        gaps = self.vocabulary - self._tokens.get_vocab_size()
        if gaps > _MOST_GAPS:
            raise BadInput(f"{self._path} leaves {gaps:,} ids below its largest unused: it is damaged, copy it again")
        secret = secrets.token_hex(8)
        self._tokens.add_tokens([f"\U000f0000{secret} gap {i}\U000f0001" for i in range(gaps)])
        self._twins = {i: f"\U000f0000{secret} {i}\U000f0001" for i in sorted(never)}
        sides = [{side: added.get(i, {}).get(side, False) for side in ("lstrip", "rstrip")} for i in self._twins]
        twins = zip(self._twins.values(), sides, strict=True)
        self._tokens.add_tokens([tokenizers.AddedToken(twin, normalized=False, **strips) for twin, strips in twins])
        self._originals = {self._tokens.token_to_id(twin): i for i, twin in self._twins.items()}

    def encode(self, text: str) -> list[int]:
        return self._tokens.encode(text, add_special_tokens=False).ids

    def encode_marked(self, parts: Sequence[str | int]) -> list[int]:
        text = "".join(part if isinstance(part, str) else self._twins[part] for part in parts)
        return [self._originals.get(i, i) for i in self.encode(text)]

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokens.decode(self._shown(ids), skip_special_tokens=False)

    def decode_cut(self, ids: Sequence[int]) -> str:
        shown = self._shown(ids)
        if self._byte_fallback:
            del shown[len(shown) - characters.begun_tokens([self.piece(i) for i in shown[-3:]]) :]
        text = self._tokens.decode(shown, skip_special_tokens=False)
        if self._byte_level and characters.ends_begun([self.piece(i) for i in shown[-4:]]):
            return text.removesuffix("\ufffd")
        return text

    def _shown(self, ids: Sequence[int]) -> list[int]:
        return [i for i in ids if i not in self._silent and i < self.vocabulary]

    def piece(self, i: int) -> str:
        return self._tokens.id_to_token(i) or ""

    def control(self, name: str) -> int:
        if name not in self._control:
            raise BadInput(f"{self._path} has no control token {name!r}; choose the chat format the model was made for")
        return self._control[name]

    def save(self, folder: epath.Path) -> None:
        token_files.copy(self._path, folder)


def load_tokenizer(folder: epath.PathLike) -> Tokenizer:
    """The tokenizer of a model's folder.

    Of tokenizer.json and tokenizer.model the first is taken where both are there: it has the tokens that were added
    after pretraining (ChatML's marks), and Llama-3's tokenizer.model is no SentencePiece model.

    Raises:
      FileNotFoundError: the folder has neither.
      ValueError: the file cannot be used; see the two classes.
    """
    folder = paths.given(folder)
    if not folder.exists():
        raise FileNotFoundError(f"{folder} does not exist")
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
    """Refuses a tokenizer that needs ids which a model of `V` ids has not.

    Fewer ids are right, because vocabularies are often padded. So are control tokens beyond `V` that no text makes and
    that neither begin nor end one, such as a padding token that was added later.

    Raises BadInput with the tokenizer's name, both numbers and the token.
    """
    if tokenizer.needed > V:
        last = tokenizer.needed - 1
        raise BadInput(
            f"the tokenizer has {tokenizer.needed} ids and the model {V}: {tokenizer.name} is another model's, or the "
            f"model's vocabulary has to be larger (id {last} is {tokenizer.piece(last)!r})"
        )
