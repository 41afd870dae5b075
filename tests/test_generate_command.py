"""The command: prompts in, completions out, the same whatever interrupts it."""

import dataclasses
import io
import json
import shutil

import jax
import pytest
import sentencepiece
import tokenizers
from absl import flags
from absl.testing import flagsaver
from etils import epath

from srlm_jax import generate as command
from srlm_jax.errors import BadInput, UserError
from srlm_jax.generate import generate
from srlm_jax.model import config_files, weights
from srlm_jax.pipeline.generate import open_model
from srlm_jax.records import Responses, SamplingParams
from srlm_jax.sampling.engine import EngineConfig
from srlm_jax.storage import jsonl
from srlm_jax.text import chat
from srlm_jax.text.chat import PLAIN
from srlm_jax.text.tokenizer import load_tokenizer

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
        "chat_format": "none", "system": None, "seed": 0, "tensor": 1, "shard_prompts": 2,
        "engine": EngineConfig(rows=4, steps=2, weights=None, cache=None),
    } | changes  # fmt: skip
    generate(folder, folder.parent / prompts, folder.parent / output, params=params, **arguments)
    return jsonl.read(folder.parent / output, Responses)


def said_of(folder, error, **places):
    """What the command says of places that cannot be used, among others that can."""
    known = {"checkpoint": folder, "prompts": folder.parent / "prompts.jsonl", "output": folder.parent / "out.jsonl"}
    with pytest.raises(error) as raised:
        generate(
            **known | places, chat_format="none", system=None, params=GREEDY, seed=0, tensor=1, shard_prompts=2,
            engine=EngineConfig(rows=4, steps=2, weights=None, cache=None),
        )  # fmt: skip
    return str(raised.value)


def test_a_model_from_a_folder_is_rounded_as_the_engine_says(folder, one_device):
    config = EngineConfig(rows=4, steps=2, weights="int8", cache="int8")
    mesh = one_device("data", "tensor")
    key = jax.random.key(0)
    source = open_model(folder, load_tokenizer(folder), mesh, chat_format=PLAIN, config=config, key=key)
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


@pytest.fixture
def begun(folder, monkeypatch):
    """The parts of an output "out.jsonl" that was killed before its last part."""
    write = jsonl.write

    def killed(path, records):
        if len(jsonl.shards_done(path.parent)) == 2:
            raise KeyboardInterrupt
        write(path, records)

    monkeypatch.setattr(jsonl, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        run(folder, "out.jsonl")
    monkeypatch.undo()
    return folder.parent / ".out.jsonl.parts"


@pytest.mark.parametrize("damage", [None, "[1]", "{}"])
def test_parts_of_which_nothing_is_known_are_not_gone_on_with(folder, begun, damage):
    note = begun / "arguments.json"
    note.unlink() if damage is None else note.write_text(damage)
    with pytest.raises(BadInput, match=r"holds a begun output, and arguments\.json not what it is made of: remove the"):
        run(folder, "out.jsonl")


def test_a_part_that_lost_a_line_is_noticed(folder, begun):
    part = begun / "00000.jsonl"
    part.write_text(part.read_text().split("\n")[0] + "\n")
    with pytest.raises(
        BadInput, match=r"\.out\.jsonl\.parts does not hold a line for each prompt: a file in it is dama"
    ):
        run(folder, "out.jsonl")
    assert not (folder.parent / "out.jsonl").exists()


def test_where_no_part_is_done_the_arguments_may_change(folder, begun):
    for index in jsonl.shards_done(begun):
        jsonl.shard(begun, index).unlink()
    run(folder, "out.jsonl", seed=3)
    run(folder, "other.jsonl", seed=3)
    assert (folder.parent / "out.jsonl").read_text() == (folder.parent / "other.jsonl").read_text()


def test_an_output_goes_on_with_the_parts_it_was_begun_with(folder, monkeypatch):
    whole = run(folder, "whole.jsonl")
    write = jsonl.write

    def killed(path, records):
        if jsonl.shards_done(path.parent):
            raise KeyboardInterrupt
        write(path, records)

    for first, second in ((2, 1), (1, 3)):
        monkeypatch.setattr(jsonl, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            run(folder, f"{first}.jsonl", shard_prompts=first)
        monkeypatch.undo()
        assert run(folder, f"{first}.jsonl", shard_prompts=second) == whole


def write_prompts(folder, *texts):
    lines = [json.dumps({"id": f"p{i}", "prompt": text}) for i, text in enumerate(texts)]
    (folder.parent / "prompts.jsonl").write_text("\n".join(lines) + "\n")


@pytest.fixture
def stories(tmp_path, stories260k):
    folder = tmp_path / "stories"
    shutil.copytree(stories260k / "hf", folder)
    return folder


def test_prompt_and_completion_are_the_text_as_the_model_wrote_it(stories, stories260k):
    published = (stories260k / "greedy_200.txt").read_text()
    write_prompts(stories, "Once upon a", "", published[:40], published[:42].rstrip())
    answers = run(stories, "out.jsonl", dataclasses.replace(GREEDY, max_new_tokens=12))
    for answer in answers:
        text = answer.prompt + answer.completions[0].text
        assert published.startswith(text) and len(text) > len(answer.prompt) + 10
    assert answers[0].completions[0].text.startswith(" time")


def byte_level(folder, **config):
    """Gives the model a byte-level tokenizer.json instead, with 3 control tokens of 40."""
    (folder / "tokenizer.model").unlink()
    made = tokenizers.Tokenizer(
        tokenizers.models.BPE({letter: i for i, letter in enumerate("abcdefghijklmnopqrstuvwxyzĠĊ")}, [])
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(["<|im_start|>", "<|im_end|>", "<|endoftext|>"])
    made.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def test_an_empty_prompt_needs_a_begin_token(folder, monkeypatch):
    write_prompts(folder, "two", "")
    byte_level(folder)
    monkeypatch.setattr(weights, "load", None)  # nothing is loaded before
    with pytest.raises(UserError, match=r"prompt 'p1' is empty, and .*tokenizer\.json puts no begin token"):
        run(folder, "out.jsonl")
    monkeypatch.undo()
    byte_level_config = json.loads((folder / "tokenizer_config.json").read_text()) | {"add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(byte_level_config))
    assert len(run(folder, "out.jsonl", GREEDY)) == 2


def test_blank_messages_are_counted(folder, capsys):
    write_prompts(folder, "two", "", "  ")
    assert len(run(folder, "out.jsonl", GREEDY, chat_format="plain")) == 3
    assert "note: 2 of 3 prompts are blank" in capsys.readouterr().err


def test_prompts_longer_than_the_model_was_made_for_are_counted(folder, capsys):
    document = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(document | {"max_position_embeddings": 16}))
    write_prompts(folder, "two", "two words and more " * 9, "and two more words " * 9)
    run(folder, "out.jsonl", GREEDY)
    said = capsys.readouterr().err
    assert "warning: 2 of 3 prompts have more than 16 tokens together with --max_new_tokens=6" in said
    write_prompts(folder, "two")
    run(folder, "short.jsonl", GREEDY)
    assert "warning" not in capsys.readouterr().err


CHATML = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nbe kind<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{{ '<|im_start|>assistant\n' }}"
)


def test_the_system_prompt_is_the_models_own_or_the_one_that_is_given(folder, capsys, monkeypatch):
    byte_level(folder, chat_template=CHATML)
    asked = []
    encode = chat.encode_prompt
    monkeypatch.setattr(chat, "encode_prompt", lambda t, c, text: asked.append(c.system) or encode(t, c, text))
    for system, told, said in (
        (None, "be kind", "has a system prompt of its own, 'be kind', which is used; --system='' leaves it out"),
        ("", "", "--system is '': without it the template is followed"),
        ("be rude", "be rude", ""),
    ):
        asked.clear()
        run(folder, f"{told}.jsonl", GREEDY, chat_format="chatml", system=system)
        assert set(asked) == {told}
        printed = capsys.readouterr().err
        assert said in printed and ("note:" in printed) == bool(said)
    with pytest.raises(UserError, match="--format=none continues texts"):
        run(folder, "none.jsonl", system="be kind")
    with pytest.raises(UserError, match="no place for a system prompt"):
        run(folder, "plain.jsonl", system="be kind", chat_format="plain")


def test_a_padding_token_beyond_the_models_rows_is_no_obstacle(folder):
    (folder / "added_tokens.json").write_text('{"<pad>": 40}')
    assert len(run(folder, "out.jsonl")) == len(PROMPTS)
    (folder / "added_tokens.json").unlink()
    byte_level(folder)
    document = json.loads((folder / "tokenizer.json").read_text())
    assert max(token["id"] for token in document["added_tokens"]) < 40


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": -1.0}, "top_p is -1.0"),
        ({"top_p": float("nan")}, "top_p is nan"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
    ],
)
def test_a_value_that_sampling_cannot_use_is_refused_before_anything_is_read(flag, said, capsys):
    known = {"checkpoint": "nowhere", "prompts": "nowhere", "output": "nowhere"}
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["generate"])
    with flagsaver.flagsaver(**known, **flag), pytest.raises(SystemExit):
        command.main(["generate"])
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_an_output_that_is_there_is_left_alone(folder):
    (folder.parent / "out.jsonl").write_text("mine")
    with pytest.raises(FileExistsError, match=r"out\.jsonl is there already"):
        run(folder, "out.jsonl")
    assert (folder.parent / "out.jsonl").read_text() == "mine"


def test_an_address_and_the_name_of_a_model_on_a_hub_are_told_from_a_folder(folder):
    for place in ("checkpoint", "prompts", "output"):
        assert said_of(folder, BadInput, **{place: "https://host/x"}).startswith("https://host/x is an address and no")
    assert said_of(folder, FileNotFoundError, checkpoint="meta-llama/Llama-2-7b-hf").startswith(
        "meta-llama/Llama-2-7b-hf: there is no such folder; if it is the name of a model on a hub, download the model"
    )


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
