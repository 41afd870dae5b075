"""Damage anywhere in the small files of a model: it changes nothing that shows, or the error names the file."""

import itertools
import json
import random
import shutil

import pytest
import tokenizers
from etils import epath

from srlm_jax.convert import convert
from srlm_jax.model import config_files, weights
from srlm_jax.text.tokenizer import load_tokenizer

CHOICES = {"param_dtype": "float32", "compute_dtype": "float32", "remat": "dots"}


@pytest.fixture
def copied(stories260k, tmp_path):
    """`copied("hf")`: a real trained model in one of its two layouts, to be damaged."""

    def copy(layout):
        folder = tmp_path / layout
        folder.mkdir()
        for path in (stories260k / layout).iterdir():
            shutil.copyfile(path, folder / path.name)  # without its rights: what is shared cannot be written
        return folder

    return copy


def opened(folder):
    """Everything that a model's folder says but the numbers themselves."""
    folder = epath.Path(folder)
    config = weights.read_config(folder, **CHOICES)
    weights.source_dtype(folder, config)
    config_files.hf_fields(folder)


def spoken(folder):
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.encode("Once upon <s> a time é\n")
    assert all(i < tokenizer.vocabulary for i in ids)
    tokenizer.decode([*range(min(tokenizer.vocabulary, 1000))])


def damages(data, rng):
    """Versions of a file with bits flipped, bytes lost, doubled or replaced."""
    while True:
        damaged = bytearray(data)
        for _ in range(rng.choice([1, 1, 1, 2, 5])):
            i = rng.randrange(len(damaged))
            match rng.randrange(4):
                case 0 | 1:
                    damaged[i] ^= 1 << rng.randrange(8)
                case 2:
                    damaged[i : i + rng.randrange(1, 6)] = b""
                case 3:
                    damaged[i:i] = rng.choice([b'"', b"9", b"-", b"{", b"[", b",", b"e9", b"\xff", b"null"])
        yield bytes(damaged)


def write_tokenizer_json(folder):
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=270, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    made.train_from_iterator(["once upon a time"], trainer)
    made.add_special_tokens(["<s>", "</s>"])
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": {"content": "</s>"}}')
    ids = {"bos_token_id": made.token_to_id("<s>"), "eos_token_id": [made.token_to_id("</s>")]}
    (folder / "generation_config.json").write_text(json.dumps(ids))


def write_index(folder):
    tensors = weights.sources.hugging_face(epath.Path(folder))
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "part.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def every_damage_is_named(folder, name, read):
    read(folder)
    noticed = 0
    for damaged in itertools.islice(damages((folder / name).read_bytes(), random.Random(0)), 150):
        (folder / name).write_bytes(damaged)
        try:
            read(folder)
        except (ValueError, OSError) as error:
            assert str(folder) in str(error), damaged
            noticed += 1
    assert noticed > 15


@pytest.mark.parametrize(
    ("name", "read", "prepare"),
    [
        ("config.json", opened, None),
        ("model.safetensors.index.json", opened, write_index),
        ("tokenizer.model", spoken, None),
        ("tokenizer.json", spoken, write_tokenizer_json),
        ("tokenizer_config.json", spoken, write_tokenizer_json),
        ("generation_config.json", spoken, write_tokenizer_json),
        ("words.json", spoken, lambda folder: (folder / "words.json").write_text('["Once", "upon", "\\n"]')),
    ],
)
def test_whatever_happens_to_a_model_s_file_the_error_names_it(copied, name, read, prepare):
    folder = copied("hf")
    if prepare is not None:
        prepare(folder)
    every_damage_is_named(folder, name, read)


@pytest.mark.parity
def test_whatever_happens_to_params_json_the_error_names_it(copied):
    every_damage_is_named(copied("meta"), "params.json", opened)


def test_whatever_happens_to_a_manifest_the_error_names_it(copied, tmp_path):
    convert(copied("hf"), tmp_path / "native", to="native", dtype=None, shard_bytes=10**9)
    every_damage_is_named(tmp_path / "native", "manifest.json", opened)
