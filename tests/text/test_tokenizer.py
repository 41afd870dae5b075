"""Text survives the round trip, and what a tokenizer file lacks is said."""

import io
import json
import shutil

import hypothesis.strategies as st
import made_tokenizers
import pytest
import sentencepiece
import tokenizers
from etils import epath
from hypothesis import given

from srlm_jax.errors import BadInput
from srlm_jax.text.tokenizer import (
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    WordTokenizer,
    check_vocabulary,
    load_tokenizer,
)

WORDS = WordTokenizer(("say", "two", "words", "\n", "done."))


def trained(**options):
    """A SentencePiece model learnt from a few lines, as bytes."""
    lines = ["one two three four", "two words and two more", "say it in other words", "nothing else to say"] * 5
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, minloglevel=2, hard_vocab_limit=False,
        **{"vocab_size": 60, "byte_fallback": False} | options,
    )  # fmt: skip
    return model.getvalue()


@pytest.fixture
def save(tmp_path):
    def save(data):
        (tmp_path / "tokenizer.model").write_bytes(data)
        return tmp_path / "tokenizer.model"

    return save


# Words.


def test_words_by_hand():
    assert WORDS.encode("say two\nwords done.") == [4, 5, 7, 6, 8]
    assert WORDS.vocabulary == 9
    assert (WORDS.pad, WORDS.bos, WORDS.eos) == (0, 1, 2)


@pytest.mark.parametrize(
    "text", ["", "say", "say two words", "say\ntwo", "say\n\n\ntwo words\n", "\nsay", "say two\nwords\n\ndone."]
)
def test_words_survive_the_round_trip(text):
    assert WORDS.decode(WORDS.encode(text)) == text


def test_an_unknown_word_is_marked():
    assert WORDS.encode("say nothing") == [4, 3]
    assert WORDS.decode([4, 3]) == "say <unk>"


def test_text_never_makes_a_special_token():
    assert set(WORDS.encode("<s> </s> <pad> <unk>")) == {WORDS.unknown}


def test_special_tokens_are_not_part_of_the_text():
    assert WORDS.decode([1, 4, 5, 2, 0, 0]) == "say two"


def test_a_word_twice_is_refused():
    with pytest.raises(ValueError, match="the vocabulary holds a word twice"):
        WordTokenizer(("a", "b", "a"))


# SentencePiece.


def test_pieces_survive_the_round_trip(save):
    tokenizer = SentencePieceTokenizer(save(trained()))
    ids = tokenizer.encode("two other words")
    assert tokenizer.decode(ids) == "two other words"
    assert tokenizer.decode([tokenizer.bos, *ids, tokenizer.eos]) == "two other words"
    assert not {tokenizer.bos, tokenizer.eos} & set(ids)
    assert max(ids) < tokenizer.vocabulary


def test_text_never_makes_a_special_piece(save):
    tokenizer = SentencePieceTokenizer(save(trained()))
    assert not {tokenizer.bos, tokenizer.eos} & set(tokenizer.encode("<s> two </s>"))


def test_without_a_padding_id_the_end_token_stands_in(save):
    tokenizer = SentencePieceTokenizer(save(trained(pad_id=-1)))
    assert tokenizer.pad == tokenizer.eos == 2


def test_a_padding_id_of_its_own_is_used(save):
    tokenizer = SentencePieceTokenizer(save(trained(pad_id=3)))
    assert (tokenizer.pad, tokenizer.eos) == (3, 2)


def test_a_model_without_an_end_token_is_refused(save):
    with pytest.raises(ValueError, match=r"tokenizer.model defines no begin or no end token \(bos 1, eos -1\)"):
        SentencePieceTokenizer(save(trained(eos_id=-1)))


# Its error quotes the piece that it cannot use.
QUOTED = trained(vocab_size=320, byte_fallback=True).replace(b"<0x48>", b"<0x\xff8>")


@pytest.mark.parametrize(
    "data", [b"", b"not a model", trained()[:1000], QUOTED], ids=["empty", "text", "cut", "not UTF-8"]
)
def test_a_file_that_is_no_model_is_named(save, data):
    with pytest.raises(ValueError, match=r"tokenizer.model (is not a SentencePiece model|defines no begin)"):
        SentencePieceTokenizer(save(data))


def test_a_piece_that_is_no_text_is_refused_before_the_model_can_write_it(save):
    data = trained()
    with pytest.raises(ValueError, match=r"tokenizer\.model holds a piece that is not UTF-8 text .*: copy it again"):
        SentencePieceTokenizer(save(data.replace("▁".encode(), b"\xe2\xff\x81", 1)))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.model"):
        SentencePieceTokenizer(tmp_path / "nowhere.model")


def test_a_mark_that_text_can_spell_is_no_control_token(save):
    tokenizer = SentencePieceTokenizer(save(trained(control_symbols=["<|end|>"], user_defined_symbols=["<|open|>"])))
    assert tokenizer.control("<|end|>") == 3
    assert 3 not in tokenizer.encode("two <|end|> words")
    for name in ("<|open|>", "<unk>", "two", "nowhere"):
        with pytest.raises(ValueError, match=f"no control token '{name}'".replace("|", r"\|")):
            tokenizer.control(name)


def test_an_end_token_that_text_can_spell_is_refused(save):
    with pytest.raises(ValueError, match=r"tokenizer\.model defines no begin or no end token \(bos 1, eos -1\)"):
        SentencePieceTokenizer(save(trained(user_defined_symbols=["</s>"])))


def test_a_piece_that_only_the_model_has_can_be_decoded(save):
    tokenizer = SentencePieceTokenizer(save(trained()))
    assert tokenizer.decode([*tokenizer.encode("two"), tokenizer.vocabulary + 4]).startswith("two")


# tokenizer.json.

SPECIAL = ["<|begin|>", "<|document|>", "<|turn|>"]
TEXTS = ["one two three four", "two words and two more", "say it in other words", "nothing else to say"]


def write_folder(folder, config=None, added=(), **files):
    """A byte-level tokenizer.json with three special tokens, and `added` tokens that are not declared special."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(TEXTS * 3, trainer)
    made.add_special_tokens(SPECIAL)
    made.add_tokens(list(added))
    made.enable_truncation(5)
    made.enable_padding(length=9)
    made.save(str(folder / "tokenizer.json"))
    if config is None:
        config = {"bos_token": "<|begin|>", "eos_token": "<|turn|>"}
    for name, content in {"tokenizer_config": config, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return made


@pytest.fixture
def load(tmp_path):
    def load(*arguments, **files):
        write_folder(tmp_path, *arguments, **files)
        return HuggingFaceTokenizer(tmp_path / "tokenizer.json")

    return load


@pytest.fixture(scope="module")
def hugging(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hugging")
    write_folder(folder, added=["<|im_start|>", "[ACT]", "õõ"])
    return HuggingFaceTokenizer(folder / "tokenizer.json")


# The library's byte-level decoder takes the letters of an added word for bytes, so that word alone does not come back.
@given(st.text().filter(lambda text: "õõ" not in text))
def test_any_text_survives_the_round_trip(hugging, text):
    ids = hugging.encode(text)
    assert hugging.decode([hugging.bos, *ids, hugging.eos]) == text
    assert all(i < hugging.vocabulary for i in ids)


@given(st.lists(st.sampled_from([*SPECIAL, "<|im_start|>", "[ACT]", " ", "<|", "|>", "two"])).map("".join))
def test_text_never_makes_a_special_token_of_a_json(hugging, text):
    special = {hugging.control(name) for name in [*SPECIAL, "<|im_start|>", "[ACT]"]}
    assert len(special) == 5
    assert not special & set(hugging.encode(text))
    assert hugging.decode(hugging.encode(text)) == text


def test_an_added_word_stays_a_word(hugging):
    assert len(hugging.encode("õõ")) == 1  # as DeepSeek adds letters that its pieces lack
    with pytest.raises(ValueError, match=r"tokenizer\.json has no control token 'õõ'"):
        hugging.control("õõ")


def test_texts_are_neither_cut_nor_padded(hugging):
    assert hugging.decode(hugging.encode("one two three four " * 9)) == "one two three four " * 9
    assert len(hugging.encode("two")) < 9


def test_ids_beyond_the_vocabulary_decode_to_nothing(hugging):
    assert hugging.decode([*hugging.encode("two"), hugging.vocabulary, hugging.vocabulary + 900]) == "two"


def test_special_tokens_are_left_out_and_undeclared_ones_are_text(hugging):
    ids = [hugging.control(name) for name in ("<|begin|>", "<|im_start|>", "<|document|>", "<|turn|>")]
    assert hugging.decode(ids) == "<|im_start|>"


@pytest.mark.parametrize(
    ("config", "files", "bos", "ends"),
    [
        ({"bos_token": "<|begin|>", "eos_token": "<|turn|>"}, {}, 0, [2]),
        ({"bos_token": {"content": "<|begin|>"}, "eos_token": {"content": "<|document|>", "lstrip": True}}, {}, 0, [1]),
        ({}, {"special_tokens_map": {"bos_token": "<|begin|>", "eos_token": {"content": "<|turn|>"}}}, 0, [2]),
        ({"bos_token": None}, {"generation_config": {"bos_token_id": 0, "eos_token_id": [1, 2]}}, 0, [1, 2]),
        ({"bos_token": "<|begin|>", "eos_token": "<|turn|>"}, {"generation_config": {"eos_token_id": [1]}}, 0, [2, 1]),
        ({"bos_token": None, "eos_token": "<|document|>"}, {"generation_config": {"eos_token_id": 1}}, None, [1]),
    ],
    ids=["strings", "objects", "special_tokens_map", "generation_config", "Llama-3 instruct", "no begin token"],
)  # fmt: skip
def test_begin_and_end_tokens_are_read_from_the_files_beside(tmp_path, config, files, bos, ends):
    first = write_folder(tmp_path).token_to_id(SPECIAL[0])
    moved = json.loads(json.dumps(files), object_hook=lambda o: {
        k: v if not k.endswith("_id") else [i + first for i in v] if isinstance(v, list) else v + first
        for k, v in o.items()
    })  # fmt: skip
    write_folder(tmp_path, config, **moved)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.bos == (None if bos is None else first + bos)
    assert [i - first for i in tokenizer.ends] == ends
    assert tokenizer.eos == tokenizer.pad == tokenizer.ends[0]


@pytest.mark.parametrize(
    ("config", "files", "message"),
    [
        ({}, {}, "names no end token: tokenizer_config.json, special_tokens_map.json, generation_config.json"),
        ({"eos_token": "<|none|>"}, {}, r"tokenizer_config.json: eos_token is '<\|none\|>', which is no token"),
        ({"eos_token": {"text": "x"}}, {}, "tokenizer_config.json: eos_token is .*, which is no token"),
        ({"eos_token": True}, {}, "tokenizer_config.json: eos_token is True"),
        ({}, {"generation_config": {"eos_token_id": [1, 99_999]}}, r"eos_token_id is \[1, 99999\]"),
        ({}, {"generation_config": [1]}, "generation_config.json holds no JSON object"),
    ],
)
def test_what_the_files_beside_get_wrong_is_named(load, config, files, message):
    with pytest.raises(ValueError, match=message):
        load(config, **files)


@pytest.mark.parametrize(
    "damage", [b"", b"{", b"[]", b"{}", b"\xff\xfe", b'{"added_tokens": [1]}', b'{"added_tokens": 7}']
)
def test_a_damaged_json_is_named(tmp_path, damage):
    write_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(damage)
    with pytest.raises(ValueError, match=r"tokenizer\.json (is not JSON|holds no JSON object|is not a tokenizer)"):
        load_tokenizer(tmp_path)


def test_a_json_at_which_the_library_panics_is_named(tmp_path):
    write_folder(tmp_path)
    document = json.loads((tmp_path / "tokenizer.json").read_text())
    document["model"]["continuing_subword_prefix"] = "longer than any piece"
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer of the tokenizers library"):
        load_tokenizer(tmp_path)


def test_whoever_interrupts_the_reading_of_a_json_is_heard(tmp_path, monkeypatch):
    def interrupted(document):
        raise KeyboardInterrupt

    write_folder(tmp_path)
    monkeypatch.setattr(json, "dumps", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_tokenizer(tmp_path)


def test_a_tokenizer_that_makes_special_tokens_out_of_words_is_refused(tmp_path):
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"two": 0, "</s>": 1}, "two"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    with pytest.raises(ValueError, match="makes the special token '</s>' out of the text '</s>'"):
        load_tokenizer(tmp_path)


# Folders and vocabularies.


def test_a_folder_is_recognised_by_its_files(tmp_path, save):
    with pytest.raises(FileNotFoundError, match=r"holds neither tokenizer\.json .* nor tokenizer\.model"):
        load_tokenizer(tmp_path)
    save(trained())
    assert isinstance(load_tokenizer(tmp_path), SentencePieceTokenizer)
    write_folder(tmp_path)
    assert isinstance(load_tokenizer(tmp_path), HuggingFaceTokenizer)


def test_a_vocabulary_may_be_smaller_than_the_model_and_never_larger():
    check_vocabulary(WORDS, 9)
    check_vocabulary(WORDS, 64)
    with pytest.raises(ValueError, match=r"the tokenizer has 9 ids and the model 8: words\.json is another"):
        check_vocabulary(WORDS, 8)


def test_words_have_no_control_tokens():
    with pytest.raises(ValueError, match=r"no control token '</s>'"):
        WORDS.control("</s>")


# The real thing.


def test_llama_2_has_its_published_ids(llama2):
    assert (llama2.vocabulary, llama2.bos, llama2.eos, llama2.pad) == (32_000, 1, 2, 2)


def test_llama_2_encodes_the_golden_rows(llama2, llama2_folder):
    rows = json.loads((llama2_folder / "golden_llama_spm.json").read_text())
    assert len(rows) == 43
    for row in rows:
        assert llama2.encode(row["text"]) == row["ids"], row["text"]


@given(st.text(), st.sampled_from(["<s>", "</s>", "<unk>", "<0x0A>"]), st.text())
def test_llama_2_makes_no_special_token_out_of_text(llama2, before, name, after):
    ids = llama2.encode(before + name + after)
    assert not {llama2.bos, llama2.eos} & set(ids)
    assert llama2.decode(ids) == before + name + after


def test_a_folder_of_llama_2_is_recognised(tmp_path, llama2, llama2_folder):
    shutil.copy(llama2_folder / "tokenizer.model", tmp_path)
    assert load_tokenizer(tmp_path).encode("two words") == llama2.encode("two words")


def test_llama_2_as_a_json_gives_the_golden_rows(tmp_path, llama2, llama2_folder):
    # The file in Meta's folder says what the SentencePiece model says in the terms of the tokenizers library: which
    # pairs make a piece, the best scores first; bytes where no piece fits; a space before every text.
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(llama2_folder / "tokenizer.model"))
    ids = {pieces.id_to_piece(i): i for i in range(pieces.vocab_size())}
    pairs = [
        (-pieces.get_score(i), ids[piece[:n]], ids[piece[n:]], (piece[:n], piece[n:]))
        for piece, i in ids.items()
        for n in range(1, len(piece))
        if piece[:n] in ids and piece[n:] in ids
    ]
    merges = [pair for *_, pair in sorted(pairs)]
    made = tokenizers.Tokenizer(
        tokenizers.models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    normalizers, decoders = tokenizers.normalizers, tokenizers.decoders
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": {"content": "<s>"}, "eos_token": "</s>"}')
    tokenizer = load_tokenizer(tmp_path)
    for row in json.loads((llama2_folder / "golden_llama_spm.json").read_text()):
        assert tokenizer.encode(row["text"]) == row["ids"], row["text"]
        assert tokenizer.decode(row["ids"]) == llama2.decode(row["ids"])
    assert (tokenizer.vocabulary, tokenizer.bos, tokenizer.eos) == (32_000, 1, 2)
    assert llama2.encode("hi </s>") == tokenizer.encode("hi </s>")


# Saved.


def test_a_saved_tokenizer_is_loaded_again(tmp_path, save, hugging):
    for number, tokenizer in enumerate([WORDS, SentencePieceTokenizer(save(trained())), hugging]):
        folder = epath.Path(tmp_path / str(number))
        folder.mkdir()
        tokenizer.save(folder)
        again = load_tokenizer(folder)
        assert again.encode("say two words") == tokenizer.encode("say two words")
        assert (again.bos, again.ends, again.pad) == (tokenizer.bos, tokenizer.ends, tokenizer.pad)


def test_words_as_a_json_give_the_same_ids_and_text(tmp_path):
    WORDS.save_hf(epath.Path(tmp_path))
    made = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in ("", "say two\nwords  done.", "say\n\n\ntwo words\n", "\nsay nothing\ttwo", " say\rtwo é "):
        ids = WORDS.encode(text)
        assert made.encode(text, add_special_tokens=False).ids == ids
        assert made.encode(text).ids == [WORDS.bos, *ids]
        known = [i for i in ids if i != WORDS.unknown]
        assert made.decode([WORDS.bos, *known, WORDS.eos, WORDS.pad]) == WORDS.decode(known)


def test_a_word_that_is_spelt_like_a_special_token_cannot_be_written_as_a_json(tmp_path):
    with pytest.raises(ValueError, match=r"words\.json holds one of <pad>, <s>, </s>, <unk>"):
        WordTokenizer(("say", "</s>")).save_hf(epath.Path(tmp_path))


@pytest.mark.parametrize("content", ["{}", "[1]", '["a", "a"]', '["a"'])
def test_a_damaged_list_of_words_is_refused(tmp_path, content):
    (tmp_path / "words.json").write_text(content)
    with pytest.raises(ValueError, match=r"words\.json"):
        load_tokenizer(tmp_path)


# Texts with control tokens in them, begins, and cut characters.


def library(folder):
    """The tokenizers library's own reading of a file, in which spelt control tokens count."""
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.mark.parametrize("sides", [{}, {"lstrip": True}, {"rstrip": True}, {"lstrip": True, "rstrip": True}])
@pytest.mark.parametrize("kind", made_tokenizers.KINDS)
def test_marked_texts_have_the_ids_of_the_spelt_out_text(tmp_path, kind, sides):
    made = made_tokenizers.KINDS[kind]()
    made.add_special_tokens([tokenizers.AddedToken("<|x|>", special=True, normalized=False, **sides)])
    made_tokenizers.write(tmp_path, made, bos="<s>", eos="</s>", template=None)
    tokenizer, reference = load_tokenizer(tmp_path), library(tmp_path)
    x, bos = tokenizer.control("<|x|>"), tokenizer.bos
    for parts in (
        ["user"],
        [bos, "user"],
        ["hello", x, "there"],
        [x, x],
        [" a ", x, " b ", bos, "\n\nc "],
        [x, "\n", x],
    ):
        spelt = "".join(part if isinstance(part, str) else {x: "<|x|>", bos: "<s>"}[part] for part in parts)
        assert tokenizer.encode_marked(parts) == reference.encode(spelt, add_special_tokens=False).ids, parts
    assert x not in tokenizer.encode_marked(["<|x|>", bos, "<|x|> <s>"])


def test_marked_texts_are_right_where_the_vocabulary_has_gaps(tmp_path):
    document = json.loads(made_tokenizers.byte_level().to_str())
    size = 1 + max(document["model"]["vocab"].values())
    document["model"]["vocab"] = {p: i if i < size - 3 else i + 90 for p, i in document["model"]["vocab"].items()}
    made = tokenizers.Tokenizer.from_str(json.dumps(document))
    made_tokenizers.write(tmp_path, made, bos="<s>", eos="</s>", template=None)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode_marked(["say it", tokenizer.bos, "say it"]) == [
        *tokenizer.encode("say it"), tokenizer.bos, *tokenizer.encode("say it")
    ]  # fmt: skip


def test_a_vocabulary_with_ids_that_are_far_apart_is_refused(tmp_path):
    document = json.loads(made_tokenizers.byte_level().to_str())
    document["model"]["vocab"]["a"] = 2_000_000_000
    document["model"]["merges"] = []
    made_tokenizers.write(tmp_path, made_tokenizers.byte_level(), bos="<s>", eos="</s>", template=None)
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match="ids below its largest unused: it is damaged"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("config", "post", "begins"),
    [
        ({}, None, False),
        ({}, "<s> $A", True),
        ({"add_bos_token": True}, None, True),
        ({"add_bos_token": False}, "<s> $A", False),
        ({"bos_token": None}, None, False),
    ],
)
def test_a_text_begins_as_the_files_say(tmp_path, config, post, begins):
    made = made_tokenizers.byte_level()
    if post:
        made.post_processor = tokenizers.processors.TemplateProcessing(
            single=post, special_tokens=[("<s>", made.token_to_id("<s>"))]
        )
    made_tokenizers.write(tmp_path, made, bos="<s>", eos="</s>", template=None)
    known = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(known | config))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.begins == ((made.token_to_id("<s>"),) if begins else ())
    assert (tokenizer.bos is None) == (config.get("bos_token", "") is None)


CUT = ["hi 🦙", "и", "a\n🦙", "🦙🦙", "日本", "hi \ufffd", "\ufffd\ufffd"]


def every_cut(tokenizer):
    """What is decoded of all beginnings of texts, and what should be: as many characters as are whole."""
    for text in CUT:
        ids = tokenizer.encode(text)
        for count in range(len(ids) + 1):
            shown = tokenizer.decode_cut(ids[:count])
            assert text.startswith(shown.removeprefix(" ")), (text, count, shown)
            assert shown.count("\ufffd") <= text.count("\ufffd")
        assert tokenizer.decode_cut(ids) == tokenizer.decode(ids) == text


@pytest.mark.parametrize("kind", made_tokenizers.KINDS)
def test_a_cut_character_is_left_out(tmp_path, kind):
    made_tokenizers.write(tmp_path, made_tokenizers.KINDS[kind](), bos="<s>", eos="</s>", template=None)
    every_cut(load_tokenizer(tmp_path))


def test_llama_2_leaves_a_cut_character_out(llama2):
    every_cut(llama2)
    assert llama2.decode(llama2.encode("hi 🦙")[:-1]).endswith("\ufffd")


def test_bytes_that_begin_no_character_stay_marked(tmp_path):
    made_tokenizers.write(tmp_path, made_tokenizers.metaspace("first"), bos="<s>", eos="</s>", template=None)
    tokenizer = load_tokenizer(tmp_path)
    wrong = [*tokenizer.encode("hi"), *(tokenizer._tokens.token_to_id(name) for name in ("<0x9F>", "<0xFF>"))]
    assert tokenizer.decode_cut(wrong).endswith("\ufffd")


# SentencePiece with files beside it.


def test_added_tokens_are_control_tokens(tmp_path, save):
    path = save(trained())
    plain = SentencePieceTokenizer(path)
    size = plain.vocabulary
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|im_start|>": size + 1, "<|im_end|>": size, "</s>": 2}))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>", "add_bos_token": false}')
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.control("<|im_start|>"), tokenizer.vocabulary) == (size + 1, size + 2)
    assert (tokenizer.ends, tokenizer.begins, tokenizer.bos) == ((size, 2), (), 1)
    assert tokenizer.needed == size + 1  # up to the end token; the other is never made of text
    assert max(tokenizer.encode("two <|im_start|> <|im_end|>")) < size
    assert tokenizer.decode([size + 1, *tokenizer.encode("two words"), size]) == "two words"
    assert tokenizer.piece(size) == "<|im_end|>"
    (tmp_path / "other").mkdir()
    tokenizer.save(epath.Path(tmp_path / "other"))
    assert load_tokenizer(tmp_path / "other").control("<|im_start|>") == size + 1


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ('{"word": 900}', r"added_tokens\.json adds the word 'word', which is not in tokenizer\.model"),
        ('{"<pad>": 5}', r"added_tokens\.json: '<pad>' has id 5, which is '.*' in tokenizer\.model"),
        ('{"<pad>": "5"}', r"added_tokens\.json: the id of '<pad>' is '5', which is no whole number"),
        ("[]", r"added_tokens\.json holds no JSON object"),
        ("{", r"added_tokens\.json is not JSON"),
    ],
)
def test_added_tokens_that_cannot_be_used_are_named(tmp_path, save, added, message):
    save(trained())
    (tmp_path / "added_tokens.json").write_text(added)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path)


def test_text_after_a_control_token_begins_with_a_space_unless_the_files_say_otherwise(tmp_path, llama2_folder):
    shutil.copy(llama2_folder / "tokenizer.model", tmp_path)
    (tmp_path / "added_tokens.json").write_text('{"<|im_start|>": 32000}')
    pieces = lambda: list(map(load_tokenizer(tmp_path).piece, load_tokenizer(tmp_path).encode_marked([32_000, "user"])))
    assert pieces() == ["<|im_start|>", "▁user"]
    (tmp_path / "tokenizer_config.json").write_text('{"legacy": false}')
    assert pieces() == ["<|im_start|>", "user"]


def test_a_token_beyond_the_models_rows_is_fine_unless_text_makes_it(tmp_path, save):
    size = SentencePieceTokenizer(save(trained())).vocabulary
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<pad>": size}))
    check_vocabulary(load_tokenizer(tmp_path), size)
    with pytest.raises(ValueError, match=rf"the tokenizer has {size} ids and the model {size - 1}"):
        check_vocabulary(load_tokenizer(tmp_path), size - 1)
    # In a tokenizer.json too; there an added word is made of text.
    (tmp_path / "tokenizer.model").unlink()
    made = write_folder(tmp_path, {"eos_token": "<|turn|>"}, added=["[PAD]"])
    check_vocabulary(load_tokenizer(tmp_path), made.get_vocab_size() - 1)
    write_folder(tmp_path, {"eos_token": "<|turn|>"}, added=["õõ"])
    with pytest.raises(ValueError, match=r"\(id \d+ is 'õõ'\)"):
        check_vocabulary(load_tokenizer(tmp_path), made.get_vocab_size() - 1)
    write_folder(tmp_path, {"eos_token": "[PAD]"}, added=["[PAD]"])
    with pytest.raises(ValueError, match=r"\(id \d+ is '\[PAD\]'\)"):
        check_vocabulary(load_tokenizer(tmp_path), made.get_vocab_size() - 1)


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json"])
def test_a_pointer_in_place_of_a_tokenizer_is_named(tmp_path, name):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    with pytest.raises(ValueError, match=rf"^{tmp_path / name} is a Git LFS pointer .*: fetch it with `git lfs pull`$"):
        load_tokenizer(tmp_path)


def test_files_beside_a_tokenizer_may_begin_with_a_byte_order_mark_but_not_nest_without_end(tmp_path):
    made_tokenizers.write(tmp_path, made_tokenizers.byte_level(), bos="<s>", eos="</s>", template=None)
    path = tmp_path / "tokenizer_config.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert load_tokenizer(tmp_path).piece(load_tokenizer(tmp_path).eos) == "</s>"
    path.write_text("[" * 100_000)
    with pytest.raises(BadInput, match=r"tokenizer_config\.json is not JSON: maximum recursion depth"):
        load_tokenizer(tmp_path)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        load_tokenizer(tmp_path / "nowhere")
