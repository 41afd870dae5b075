"""Text survives the round trip, and what a tokenizer file lacks is said."""

import io
import json
import pathlib

import pytest
import sentencepiece

from srlm_jax.text.tokenizer import SentencePieceTokenizer, WordTokenizer

LLAMA2 = pathlib.Path(__file__).parents[2] / ".." / "shared" / "data" / "llama2_tokenizer"
WORDS = WordTokenizer(("say", "two", "words", "\n", "done."))


def trained(**options):
    """A SentencePiece model learnt from a few lines, as bytes."""
    lines = ["one two three four", "two words and two more", "say it in other words", "nothing else to say"] * 5
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=60, minloglevel=2, byte_fallback=False,
        hard_vocab_limit=False, **options,
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


@pytest.mark.parametrize("data", [b"", b"not a model", trained()[:1000]], ids=["empty", "text", "cut"])
def test_a_file_that_is_no_model_is_named(save, data):
    with pytest.raises(ValueError, match=r"tokenizer.model (is not a SentencePiece model|defines no begin)"):
        SentencePieceTokenizer(save(data))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.model"):
        SentencePieceTokenizer(tmp_path / "nowhere.model")


# The real thing.


@pytest.fixture(scope="module")
def llama2():
    if not LLAMA2.is_dir():
        pytest.skip("needs Llama 2's tokenizer.model and golden rows, which are not part of this repository")
    return SentencePieceTokenizer(LLAMA2 / "tokenizer.model")


def test_llama_2_has_its_published_ids(llama2):
    assert (llama2.vocabulary, llama2.bos, llama2.eos, llama2.pad) == (32_000, 1, 2, 2)


def test_llama_2_encodes_the_golden_rows(llama2):
    rows = json.loads((LLAMA2 / "golden_llama_spm.json").read_text())
    assert len(rows) == 43
    for row in rows:
        assert llama2.encode(row["text"]) == row["ids"], row["text"]
