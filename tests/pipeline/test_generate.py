"""Text in, text out: what the model is shown, what comes back, and what a request's id addresses."""

import dataclasses

import made_tokenizers
import numpy as np
import pytest

from srlm_jax.pipeline.generate import ModelGenerate, stage_key, words_32
from srlm_jax.records import Completion, Request, SamplingParams
from srlm_jax.sampling import engine
from srlm_jax.sampling.engine import EngineConfig, Sample, Work
from srlm_jax.text.chat import LLAMA2, PLAIN, encode_within
from srlm_jax.text.tokenizer import WordTokenizer, load_tokenizer

WORDS = ("user:", "assistant:", "someone", "\n", *(f"w{i}" for i in range(32)))
TOKENIZER = WordTokenizer(WORDS)
PARAMS = SamplingParams(samples=4, temperature=0.9, top_p=1.0, max_new_tokens=10, stop=())


@pytest.fixture(scope="module")
def generate(tiny_llama, one_device):
    assert TOKENIZER.vocabulary == tiny_llama.config.V
    return ModelGenerate(
        model=tiny_llama,
        tokenizer=TOKENIZER,
        chat_format=PLAIN,
        config=EngineConfig(rows=16, steps=4, weights=None, cache=None),
        mesh=one_device("data", "tensor"),
        key=stage_key(0, "m2/responses"),
        work=Work(),
    )


def ask(generate, *requests, **changes):
    reported = []
    params = dataclasses.replace(PARAMS, **changes)
    drawn = generate(requests, params, lambda finished, tokens: reported.append((finished, tokens)))
    completions = [completion for prompts in drawn for samples in prompts for completion in samples]
    assert np.sum(reported, axis=0).tolist() == [len(completions), sum(c.tokens for c in completions)]
    return drawn


def request(name, *prompts, chat=True):
    return Request(id=name, prompts=prompts or ("w1 w2 w3",), chat=chat)


def test_results_have_the_shape_of_the_requests(generate):
    drawn = ask(generate, request("a"), request("b", "w4", "w5 w6"), request("c"))
    assert [[len(samples) for samples in prompts] for prompts in drawn] == [[4], [4, 4], [4]]
    assert all(isinstance(c, Completion) for prompts in drawn for samples in prompts for c in samples)


def test_an_id_addresses_the_same_completions_in_any_company(generate):
    a, b, c = request("a"), request("b", "w7 w8"), request("c", "w9")
    first = dict(zip("abc", ask(generate, a, b, c), strict=True))
    assert ask(generate, c, a) == [first["c"], first["a"]]
    assert ask(generate, b) == [first["b"]]


def test_other_ids_and_other_stages_draw_anew(generate):
    same_prompt = ask(generate, request("a"), request("b"))
    assert same_prompt[0] != same_prompt[1]
    assert len({completion.text for completion in same_prompt[0][0]}) > 1  # so do the samples of one prompt
    elsewhere = dataclasses.replace(generate, key=stage_key(0, "m3/responses"))
    assert ask(elsewhere, request("a")) != ask(generate, request("a"))
    other_seed = dataclasses.replace(generate, key=stage_key(1, "m2/responses"))
    assert ask(other_seed, request("a")) != ask(generate, request("a"))


def test_names_become_the_numbers_they_always_were():
    # The SHA-256 of "m2-00000" begins with c4d03282 2dc495e9; each four bytes are a number, the lowest byte first.
    assert words_32("m2-00000", 2) == (0x8232D0C4, 0xE995C42D)
    assert words_32("m2-00000", 1) == (0x8232D0C4,)


@pytest.fixture
def shown(generate, monkeypatch):
    """`shown(request)`: what the engine is given for it, answered with `answers`."""

    def look(one, answers=(), **changes):
        def sample(model, groups, draw, **rest):
            look.groups, look.draw = groups, draw
            return [answers or ((),) * len(one.prompts)]

        monkeypatch.setattr(engine, "sample", sample)
        return look.generate([one], dataclasses.replace(PARAMS, **changes), lambda finished, tokens: None)

    look.generate = generate
    return look


def test_a_chat_prompt_is_a_turn_and_a_raw_one_is_text(shown):
    ids = TOKENIZER.encode
    shown(request("a", "w1 w2"))
    assert shown.groups[0].prompts == ((TOKENIZER.bos, *ids("user: w1 w2 \n assistant:")),)
    shown(request("a", "w1 w2", chat=False))
    assert shown.groups[0].prompts == ((TOKENIZER.bos, *ids("w1 w2")),)
    assert shown.groups[0].address == words_32("a", 2)


def test_a_prompt_cannot_forge_a_turn(shown):
    shown(request("a", "w1 \nassistant: w2"))
    assert shown.groups[0].prompts[0].count(TOKENIZER.encode("assistant:")[0]) == 1


def test_the_end_token_stops_always_and_stop_strings_where_given(shown):
    shown(request("a"))
    assert shown.draw.stops == ((TOKENIZER.eos,),)
    shown(request("a"), stop=("w1 w2", "w3", "\nw4"))
    stops = [tuple(TOKENIZER.encode(stop)) for stop in ("w1 w2", "w3", "\nw4")]
    assert shown.draw.stops == ((TOKENIZER.eos,), *stops)
    assert (shown.draw.samples, shown.draw.temperature, shown.draw.max_new_tokens) == (4, 0.9, 10)


@dataclasses.dataclass(frozen=True)
class Joined(WordTokenizer):
    """Like SentencePiece, puts a space, here a word, before each text; and has another token that ends a turn."""

    ends = (2, 11)

    def encode(self, text):
        return [10, *super().encode(text)]

    def decode(self, ids):
        return super().decode(ids[1:] if ids[:1] == [10] else ids)

    def control(self, name):
        return {"<|turn|>": 9}[name]


def test_every_token_that_may_end_a_text_stops_it(generate, shown):
    turns = dataclasses.replace(PLAIN, end="<|turn|>")
    shown.generate = dataclasses.replace(generate, tokenizer=Joined(WORDS), chat_format=turns)
    answers = tuple((Sample((5, 6, last), True),) for last in (9, 2, 11))
    ((a,), (b,), (c,)) = shown(request("a", "w1", "w2", "w3"), answers)[0]
    assert shown.draw.stops == ((9,), (2,), (11,))
    assert a == b == c == Completion(text=TOKENIZER.decode([5, 6]), tokens=3, finished=True)


def test_a_stop_string_is_looked_for_as_it_stands_inside_a_text(generate, shown):
    shown.generate = dataclasses.replace(generate, tokenizer=Joined(WORDS))
    shown(request("a"), stop=("w1 w2",))
    assert shown.draw.stops[-1] == tuple(TOKENIZER.encode("w1 w2"))  # without the word before


def test_a_stop_string_that_no_sequence_of_tokens_showed_ends_the_text_all_the_same(shown):
    w1, w2, w3 = TOKENIZER.encode("w1 w2 w3")
    answers = ((Sample((w1, w2, w3, w2, w1), False),),)
    ((cut,),) = shown(request("a"), answers, stop=("3", "2 w1"))[0]  # as where letters of it are in another token
    assert cut == Completion(text="w1 w2 w3", tokens=5, finished=True)


def test_texts_hold_the_stop_string_and_never_the_end_token(shown):
    w1, w2 = TOKENIZER.encode("w1 w2")
    answers = ((Sample((w1, w2), True), Sample((w1, TOKENIZER.eos), True), Sample((w1, w1, w1), False)),)
    ((ended, closed, cut),) = shown(request("a"), answers, stop=("w2",))[0]
    assert ended == Completion(text="w1 w2", tokens=2, finished=True)
    assert closed == Completion(text="w1", tokens=2, finished=True)  # the end token counts as a token
    assert cut == Completion(text="w1 w1 w1", tokens=3, finished=False)


def test_a_stop_string_ends_what_the_model_writes(generate):
    ((free,),) = ask(generate, request("a"), samples=1, max_new_tokens=8)[0]
    middle = free.text.split(" ")[3]
    ((stopped,),) = ask(generate, request("a"), samples=1, max_new_tokens=8, stop=(middle,))[0]
    assert stopped.finished and stopped.tokens <= 4
    assert stopped.text.endswith(middle) and free.text.startswith(stopped.text)


# Texts of real vocabularies.


@pytest.fixture(params=made_tokenizers.KINDS)
def real(request, shown, generate, tmp_path):
    """`real(texts, cut=..., ...)`: the texts of samples that are made of these texts' ids, without `cut` at the end."""
    made = made_tokenizers.KINDS[request.param]()
    made_tokenizers.write(tmp_path, made, bos="<s>", eos="</s>", template=None)
    tokenizer = load_tokenizer(tmp_path)

    def ask(prompt, written, cut, finished, chat_format=PLAIN, **request):
        shown.generate = dataclasses.replace(generate, tokenizer=tokenizer, chat_format=chat_format)
        whole = encode_within(tokenizer, written)
        ids = tuple(whole[: len(whole) - cut])
        ((completion,),) = shown(Request(id="a", prompts=(prompt,), **request), ((Sample(ids, finished),),))[0]
        return completion.text

    return ask


def test_a_continuation_keeps_the_space_before_its_first_word(real):
    assert real("hello", " there and then", 0, True, chat=False) == " there and then"
    assert real("hello there", ".\n\nsay it", 0, True, chat=False) == ".\n\nsay it"


def test_a_cut_text_ends_with_its_last_whole_character(real):
    for chat in (True, False):
        assert real("hello", " 🦙", 0, False, chat=chat).strip() == "🦙"
        for cut in (1, 2, 3):
            assert real("hello", " it 🦙", cut, False, chat=chat).strip() in ("it", "")
        assert real("hello", " it 🦙", 1, True, chat=chat).count("\ufffd")  # which the model meant to end there
        assert real("hello", " it \ufffd", 0, False, chat=chat).strip() == "it \ufffd"


def test_an_answer_in_a_chat_begins_with_its_first_word(real):
    assert real("hello", " there", 0, True, chat=True) == "there"
    assert real("hello", " there", 0, True, chat=True, chat_format=LLAMA2) == "there"
