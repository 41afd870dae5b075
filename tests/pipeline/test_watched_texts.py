"""The place of a score's token in a verdict, found for several kinds of tokenizer."""

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from srlm_jax.data import world
from srlm_jax.pipeline.generate import ModelGenerate, watched_ids
from srlm_jax.records import Request, WatchedCompletion
from srlm_jax.sampling.engine import Sample
from srlm_jax.text.chat import PLAIN
from srlm_jax.text.tokenizer import HuggingFaceTokenizer, WordTokenizer

DIGITS = ("0", "1", "2", "3", "4", "5")
DRESS = "*_`\"'<[(\u201c\u201d"


@pytest.fixture(scope="module")
def bytes_tokenizer(tmp_path_factory):
    """A byte-level one, whose words carry the space before them and whose digits stand alone."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<end>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    made.train_from_iterator(["The answer is good. Score: 4 of the points"] * 9, trainer)
    folder = tmp_path_factory.mktemp("bytes")
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<end>", "bos_token": "<end>"}')
    return HuggingFaceTokenizer(folder / "tokenizer.json")


def completion(tokenizer, ids, *, finished, stop=()):
    """A sample whose watched probabilities tell the place: of digit d in the place of token t they are t + d / 10."""
    watched = watched_ids(tokenizer, DIGITS)
    places = np.arange(len(ids))[:, None] + np.repeat(np.arange(6), [len(some) for some in watched]) / 10
    sizes = np.repeat([len(some) for some in watched], [len(some) for some in watched])
    sample = Sample(tuple(ids), finished, np.log(np.maximum(places / sizes, 1e-30)).astype(np.float32))
    source = ModelGenerate(
        model=None, tokenizer=tokenizer, chat_format=PLAIN, config=None, mesh=None, key=None, work=None
    )
    request = Request(id="a", prompts=("",), chat=True)
    return source._decode(sample, tokenizer.ends, stop, watched, request, ())


def place(tokenizer, text, *, finished=True, head="Score:", stop=()):
    """(the place that is found behind the last `head`, the text of the token there)."""
    ids = [*tokenizer.encode(text), *([tokenizer.eos] if finished and not stop else [])]
    made = completion(tokenizer, ids, finished=finished, stop=stop)
    assert isinstance(made, WatchedCompletion)
    found = made.probabilities(made.text.rindex(head) + len(head) if head else 0, DRESS)
    if found is None:
        return None
    np.testing.assert_allclose(np.subtract(found, found[0]), np.arange(6) / 10, atol=1e-5)
    return tokenizer.decode([ids[round(found[0])]]).strip() if ids[round(found[0])] != tokenizer.eos else "<end>"


TEXTS = [
    ("The answer is good.\nScore: 4", "4"),
    ("Score: 2\nbut no. Score:5 points", "5"),
    ("Score: **3** of the points", "3"),
    ("**Score:** 1", "1"),
    ("Score:\n\n\u201c4\u201d", "4"),  # quotation marks of three bytes, each a token here
    ("Score: (0)", "0"),
    ("Score: 4.5", "4"),
    ("\U0001f600 h\u00e9 Score: 2 \U0001f600", "2"),
    ("Score:", "<end>"),
]


@pytest.mark.parametrize(("text", "token"), [*TEXTS, ("Score: the points", "t")])
def test_the_first_token_behind_the_head_that_is_no_dressing(bytes_tokenizer, text, token):
    assert place(bytes_tokenizer, text)[:1] == token[:1]


@pytest.mark.parametrize(("text", "token"), TEXTS)
def test_a_sentence_piece_tokenizer(llama2, text, token):
    assert place(llama2, text) == token


def test_the_embedded_world_s_words():
    tokenizer = WordTokenizer(world.vocabulary())
    assert place(tokenizer, "count yes order no\nScore: 4", stop=world.RUBRIC.stop) == "4"
    assert place(tokenizer, "count yes\nScore: yes") == "yes"


def test_an_opening_that_holds_the_head_leaves_the_first_token(bytes_tokenizer):
    assert place(bytes_tokenizer, "3 points", head="") == "3"
    assert place(bytes_tokenizer, " 3 points", head="") == "3"


@pytest.mark.parametrize("text", ["Score:", "Score: ", "Score: **"])
def test_a_limit_before_the_score_leaves_no_place(bytes_tokenizer, text):
    assert place(bytes_tokenizer, text, finished=False) is None


def test_a_token_over_the_head_s_end_has_no_place(bytes_tokenizer):
    assert place(bytes_tokenizer, "The answer is good", head="answ") is None


def test_words_without_a_token_for_each_digit_watch_nothing():
    assert watched_ids(WordTokenizer(("Score:", "0", "1")), DIGITS) == ()
    assert len(set(watched_ids(WordTokenizer(("Score:", *DIGITS)), DIGITS))) == 6
