"""The command: prompts in, completions out, the same whatever interrupts it."""

import io
import json

import jax
import pytest
import sentencepiece
from etils import epath

from srlm_jax.generate import generate
from srlm_jax.model import config_files, weights
from srlm_jax.pipeline.generate import open_model
from srlm_jax.records import Responses, SamplingParams
from srlm_jax.sampling.engine import EngineConfig
from srlm_jax.storage import jsonl
from srlm_jax.text.chat import PLAIN

TEXTS = ("two words more", "more two words", "words more two", "and two words", "words and more")
PROMPTS = [f'{{"id": "p{i}", "prompt": "{text}"}}' for i, text in enumerate(TEXTS)]
GREEDY = SamplingParams(samples=1, temperature=0.0, top_p=1.0, max_new_tokens=6, stop=())
DRAWN = SamplingParams(samples=2, temperature=0.9, top_p=0.9, max_new_tokens=6, stop=())


@pytest.fixture(scope="module")
def tokenizer_model():
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["two words and more", "and two more words"] * 5), model_writer=model, vocab_size=36,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


@pytest.fixture
def folder(tmp_path, make_llama, tokenizer_model):
    """A random Llama in Hugging Face's layout, with a tokenizer of 40 ids."""
    folder = tmp_path / "model"
    folder.mkdir()
    model = make_llama()
    weights.save_hf(epath.Path(folder), model, shard_bytes=10**9)
    (folder / "config.json").write_text(json.dumps(config_files.to_hf(model.config, {})))
    (folder / "tokenizer.model").write_bytes(tokenizer_model)
    (tmp_path / "prompts.jsonl").write_text("\n".join(PROMPTS) + "\n")
    return folder


def run(folder, output, params=DRAWN, prompts="prompts.jsonl", **changes):
    arguments = {
        "chat_format": "none", "seed": 0, "tensor": 1, "shard_prompts": 2,
        "engine": EngineConfig(rows=4, steps=2, weights=None, cache=None),
    } | changes  # fmt: skip
    generate(folder, folder.parent / prompts, folder.parent / output, params=params, **arguments)
    return jsonl.read(folder.parent / output, Responses)


def test_a_model_from_a_folder_is_rounded_as_the_engine_says(folder, one_device):
    config = EngineConfig(rows=4, steps=2, weights="int8", cache="int8")
    source = open_model(folder, one_device("data", "tensor"), chat_format=PLAIN, config=config, key=jax.random.key(0))
    assert all(block.up.values.dtype == "int8" for block in source.model.blocks)
    assert len(run(folder, "out.jsonl", engine=config)) == len(PROMPTS)


def test_every_prompt_is_answered_in_order(folder):
    answers = run(folder, "out.jsonl")
    assert [answer.id for answer in answers] == [f"p{i}" for i in range(5)]
    assert all(len(answer.completions) == 2 for answer in answers)
    assert not list(folder.parent.glob(".out.jsonl*"))


def test_greedy_answers_depend_on_no_seed_and_drawn_ones_do(folder):
    assert run(folder, "a.jsonl", GREEDY) == run(folder, "b.jsonl", GREEDY, seed=1)
    assert run(folder, "c.jsonl") != run(folder, "d.jsonl", seed=1)


def test_batches_change_nothing(folder):
    wide = {"engine": EngineConfig(rows=16, steps=3, weights=None, cache=None), "shard_prompts": 5}
    assert run(folder, "a.jsonl") == run(folder, "b.jsonl", **wide)


def test_weights_that_devices_share_give_the_same_answers(folder, monkeypatch):
    held = []
    load = weights.load
    monkeypatch.setattr(weights, "load", lambda *arguments: held.append(load(*arguments)) or held[-1])
    assert run(folder, "a.jsonl", GREEDY, tensor=1) == run(folder, "b.jsonl", GREEDY, tensor=2)
    one, two = (model.blocks.q[...].addressable_shards[0].data.size for model in held)
    assert one == 2 * two  # each device has half the heads


@pytest.mark.parametrize(
    ("tensor", "problem"),
    [
        (3, "--tensor=3 does not divide the 8 devices"),
        (
            4,
            "mesh.tensor is 4, which does not divide axis 'kv_heads' of size 2 of weight .blocks.k (2, 16, 2, 8)",
        ),
    ],
)
def test_weights_that_devices_cannot_share_evenly_are_named(folder, tensor, problem):
    with pytest.raises(ValueError) as raised:
        run(folder, "a.jsonl", tensor=tensor)
    assert str(raised.value).startswith(problem)


def test_a_chat_format_stands_around_the_prompt(folder):
    assert run(folder, "a.jsonl", GREEDY) != run(folder, "b.jsonl", GREEDY, chat_format="llama2")


def test_what_was_killed_goes_on_and_ends_with_the_same_file(folder, monkeypatch):
    whole = run(folder, "whole.jsonl")
    written, write = [], jsonl.write

    def killed(path, records):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path)
        write(path, records)

    monkeypatch.setattr(jsonl, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        run(folder, "again.jsonl")
    monkeypatch.undo()
    assert not (folder.parent / "again.jsonl").exists()
    with pytest.raises(
        ValueError, match=r"\.again\.jsonl\.parts holds a begun output for which seed was 0, and is now 3"
    ):
        run(folder, "again.jsonl", seed=3)
    made = []
    monkeypatch.setattr(jsonl, "write", lambda path, records: (made.append(path), write(path, records)))
    assert run(folder, "again.jsonl") == whole
    assert not set(made) & set(written)  # what was there was not made again


def test_an_output_that_is_there_is_left_alone(folder):
    (folder.parent / "out.jsonl").write_text("mine")
    with pytest.raises(FileExistsError, match=r"out\.jsonl is there already"):
        run(folder, "out.jsonl")
    assert (folder.parent / "out.jsonl").read_text() == "mine"


def test_bad_prompts_are_named(folder):
    (folder.parent / "bad.jsonl").write_text('{"prompt": "a"}\n{"text": "b"}\n')
    with pytest.raises(jsonl.BadRecord, match=r"bad\.jsonl:2: no 'prompt'"):
        run(folder, "out.jsonl", prompts="bad.jsonl")


def test_a_tokenizer_of_another_model_is_refused(folder, make_llama):
    model = make_llama(V=8)
    weights.save_hf(epath.Path(folder), model, shard_bytes=10**9)
    (folder / "config.json").write_text(json.dumps(config_files.to_hf(model.config, {})))
    with pytest.raises(ValueError, match="8"):
        run(folder, "out.jsonl")
    assert not list(folder.parent.glob("*out.jsonl*"))  # nothing is begun, so nothing stands in the way of another try
