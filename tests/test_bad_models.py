"""Damaged and contradictory models of other people: one error that names the file, and nothing made of them."""

import json
import os
import random
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from xla_flags import xla_flags

from srlm_jax.convert import convert
from srlm_jax.errors import UserError
from srlm_jax.generate import generate
from srlm_jax.model import weights
from srlm_jax.model.folders import BadModelFile
from srlm_jax.records import SamplingParams
from srlm_jax.sampling.engine import EngineConfig
from srlm_jax.storage import checkpoint

ROOT = Path(__file__).parents[1]
CHOICES = {"param_dtype": "float32", "compute_dtype": "float32", "remat": "dots"}
GREEDY = SamplingParams(samples=1, temperature=0.0, top_p=1.0, max_new_tokens=4, stop=())


def copied(source, folder):
    folder.mkdir()
    for path in source.iterdir():
        shutil.copyfile(path, folder / path.name)  # without its rights: what is shared cannot be written
    return folder


@pytest.fixture
def hf(stories260k, tmp_path):
    """A real trained model in Hugging Face's layout, to be damaged."""
    return copied(stories260k / "hf", tmp_path / "model")


@pytest.fixture
def meta(stories260k, tmp_path):
    """The same in Meta's."""
    return copied(stories260k / "meta", tmp_path / "model")


def refusals(folder, dtype=None, inside=None):
    """What conversion to either layout and generation say of a model, having made nothing `inside` a folder."""
    inside = inside or folder.parent
    prompts = inside / "prompts.jsonl"
    prompts.write_text('{"prompt": "Once"}\n')
    before = sorted(inside.iterdir())
    for to in ("hf", "native"):
        with pytest.raises((UserError, OSError)) as raised:
            convert(folder, inside / "made", to=to, dtype=dtype, shard_bytes=10**9)
        yield str(raised.value)
    if dtype is None:
        with pytest.raises((UserError, OSError)) as raised:
            generate(
                folder, prompts, inside / "made.jsonl",
                chat_format="none", system=None, params=GREEDY, seed=0, tensor=1, shard_prompts=1,
                engine=EngineConfig(rows=1, steps=4, weights=None, cache=None),
            )  # fmt: skip
        yield str(raised.value)
    assert sorted(inside.iterdir()) == before


# --- weights ----------------------------------------------------------------------------------------------------------


def begin_of_numbers(data):
    return 8 + int.from_bytes(data[:8], "little")


def place_of(data, name):
    """Where the numbers of a tensor begin in a safetensors file."""
    header = json.loads(data[8 : begin_of_numbers(data)])
    return begin_of_numbers(data) + header[name]["data_offsets"][0]


def change(path, edit):
    data = bytearray(path.read_bytes())
    edit(data)
    path.write_bytes(data)


def test_a_truncated_file_is_named(hf):
    path = hf / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    for message in refusals(hf):
        assert message.startswith(f"{path} is no whole safetensors file (")


def test_a_flipped_bit_of_the_header_is_named(hf):
    def flip(data):
        data[data.index(b"mlp.up_proj")] ^= 1

    change(hf / "model.safetensors", flip)
    for message in refusals(hf):
        assert message.startswith(f"{hf}: model.layers.")
        assert "up_proj.weight is missing" in message and "llp.up_proj.weight is unknown" in message


@pytest.mark.parametrize("bits", [0x7FC00000, 0xFF800000, 0x7F123456], ids=["NaN", "infinity", "large"])
def test_a_number_that_is_no_weight_is_named_with_its_tensor(hf, bits):
    name = "model.layers.3.mlp.down_proj.weight"
    change(hf / "model.safetensors", lambda data: struct.pack_into("<I", data, place_of(data, name) + 400, bits))
    for message in refusals(hf):
        assert message.startswith(f"{hf}: {name} holds numbers that are no weights in float32 (NaN, infinite, or")


def test_a_flip_of_the_highest_exponent_bit_is_found_wherever_it_falls(hf):
    path, rng = hf / "model.safetensors", random.Random(0)
    data = path.read_bytes()
    begin, config = begin_of_numbers(data), weights.read_config(hf, **CHOICES)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    places = jax.tree.map(lambda _: place, weights.llama.abstract(config))
    for _ in range(8):
        damaged = bytearray(data)
        damaged[begin + 4 * rng.randrange((len(data) - begin) // 4) + 3] ^= 0x40
        path.write_bytes(damaged)
        with pytest.raises(BadModelFile, match="holds numbers that are no weights"):
            weights.load(hf, config, places)


def test_weights_that_a_type_has_no_room_for_are_named(hf):
    name = "model.norm.weight"
    change(hf / "model.safetensors", lambda data: struct.pack_into("<f", data, place_of(data, name), 7e4))
    for message in refusals(hf, dtype="float16"):
        assert message.startswith(f"{hf}: {name} holds numbers that are no weights in float16")
    convert(hf, hf.parent / "made", to="hf", dtype="bfloat16", shard_bytes=10**9)


def test_a_checkpoint_of_ours_with_a_nan_is_refused_too(tmp_path, tiny_llama):
    leaves, tree = jax.tree.flatten(tiny_llama)
    names = list(checkpoint.named_leaves(tiny_llama))
    leaves[names.index("blocks/up")] = leaves[names.index("blocks/up")].at[1, 0, 0].set(np.nan)
    broken = jax.tree.unflatten(tree, leaves)
    checkpoint.save_model(tmp_path / "m", broken, {"config": checkpoint.config_facts(tiny_llama.config)})
    with pytest.raises(BadModelFile, match=r"m: blocks/up\[1\] holds numbers that are no weights"):
        convert(tmp_path / "m", tmp_path / "made", to="hf", dtype=None, shard_bytes=10**9)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_folder_in_place_of_a_file_is_named(hf):
    (hf / "model.safetensors").unlink()
    (hf / "model.safetensors").mkdir()
    for message in refusals(hf):
        assert message.startswith(f"{hf / 'model.safetensors'} cannot be read: ")


@pytest.mark.parametrize("name", ["", ".", "..", "../model.safetensors", "/etc/passwd"])
def test_an_index_cannot_lead_out_of_its_folder(hf, name):
    (hf / "model.safetensors").unlink()
    path = hf / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    for message in refusals(hf):
        assert message == f"{path}: weight_map must give each tensor's file, by its name alone"


# --- pickles ----------------------------------------------------------------------------------------------------------


@pytest.mark.parity
@pytest.mark.parametrize("kind", ["hf", "meta"])
def test_a_pickle_that_is_not_tensors_or_is_cut_short_is_named(request, kind):
    import torch

    folder = request.getfixturevalue(kind)
    path = folder / ("pytorch_model.bin" if kind == "hf" else "consolidated.00.pth")
    (folder / "model.safetensors").unlink(missing_ok=True)
    matrix = torch.eye(4)
    for content in ({"x": matrix.to_sparse()}, {"x": matrix.to("meta")}, {"x": {"y": matrix}}, [matrix], {"x": 1}):
        torch.save(content, path)
        for message in refusals(folder):
            assert message == f"{path} holds something else than named tensors"
    torch.save({"x": ROOT}, path)
    cut = path.read_bytes()[:-60]
    for content in (path.read_bytes(), cut, b"not a pickle", b""):
        path.write_bytes(content)
        for message in refusals(folder):
            assert message.startswith(f"{path} is no whole file of tensors alone (") and "\n" not in message


@pytest.mark.parity
def test_shards_whose_tensors_have_other_axes_are_named(meta):
    import torch

    whole = torch.load(meta / "consolidated.00.pth", weights_only=True)
    params = json.loads((meta / "params.json").read_text())
    (meta / "params.json").write_text(json.dumps(params | {"vocab_size": -1}))
    for name in ("tok_embeddings.weight", "layers.2.attention.wo.weight", "norm.weight"):
        for other in (torch.zeros(()), torch.zeros(3), torch.zeros(1, 1, 64)):
            torch.save(whole | {name: other}, meta / "consolidated.01.pth")
            for message in refusals(meta):
                assert message.startswith(f"{meta}: ") and name in message


@pytest.mark.parity
def test_eight_bit_floats_are_named_though_they_may_not_be_compared(meta):
    import torch

    path = meta / "consolidated.00.pth"
    whole = torch.load(path, weights_only=True)
    half = whole["tok_embeddings.weight"].to(torch.float8_e4m3fn)
    torch.save(whole | {"tok_embeddings.weight": half, "output.weight": half.clone()}, path)
    for message in refusals(meta):
        assert "output.weight holds float8_e4m3fn, not floating-point numbers as they are" in message


# --- what is no model -------------------------------------------------------------------------------------------------


def gone(hf, *, adapter=False, foreign=None):
    """The model's folder with something else in it."""
    for path in hf.iterdir():
        if path.suffix in (".safetensors", ".json") and not (foreign and path.name == "config.json"):
            path.unlink()
    if adapter:
        (hf / "adapter_config.json").write_text('{"base_model_name_or_path": "some/model"}')
        (hf / "adapter_model.safetensors").write_bytes(b"x")
    if foreign:
        (hf / foreign).write_bytes(b"x")
    return hf


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({}, "holds no model: none of manifest.json, config.json, params.json is there"),
        ({"adapter": True}, "holds no model: it is a LoRA adapter for some/model; merge it into that model"),
        ({"foreign": "model-q4.gguf"}, "holds no weights: model-q4.gguf is a GGUF file, which is not read"),
        ({"foreign": "model.onnx"}, "holds no weights: model.onnx is an ONNX file, which is not read"),
        ({"foreign": "tf_model.h5"}, "holds no weights: tf_model.h5 is a TensorFlow file, which is not read"),
        ({"foreign": "flax_model.msgpack"}, "holds no weights: flax_model.msgpack is a Flax file, which is not read"),
    ],
)
def test_what_is_no_model_is_told_in_one_short_line(hf, change, problem):
    folder = gone(hf, **change)
    for message in refusals(folder):
        assert message.startswith(f"{folder} {problem}")
        assert len(message.replace(str(folder), "")) < 300 and "\n" not in message


def test_a_folder_one_level_too_high_names_the_right_one(hf, tmp_path):
    (tmp_path / "high").mkdir()
    hf.rename(tmp_path / "high" / "model")
    for message in refusals(tmp_path / "high"):
        assert (
            message
            == f"{tmp_path / 'high'} holds no model: the model is in {tmp_path / 'high' / 'model'}; give that folder"
        )


def test_a_file_of_a_folder_names_the_folder(hf):
    for message in refusals(hf / "config.json", inside=hf.parent):
        assert message == f"{hf / 'config.json'} is a file: give the folder of the model, {hf}"


def test_three_hundred_missing_tensors_are_a_short_line(hf):
    path = hf / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 40}))
    for message in refusals(hf):
        assert message.endswith("and 312 more") and len(message.replace(str(hf), "")) < 400


# --- configurations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [
        ("hidden_size", 128, "model.embed_tokens.weight is [512, 64], the configuration says [512, 128]"),
        ("num_hidden_layers", 4, "model.layers.4.input_layernorm.weight is unknown"),
        ("num_hidden_layers", 6, "model.layers.5.input_layernorm.weight is missing"),
        ("num_hidden_layers", 2**30, "the configuration says 1073741824 layers, and there are only 47 tensors"),
        ("vocab_size", 1024, "model.embed_tokens.weight is [512, 64], the configuration says [1024, 64]"),
        (
            "num_key_value_heads",
            2,
            "model.layers.0.self_attn.k_proj.weight is [32, 64], the configuration says [16, 64]",
        ),
        ("intermediate_size", 10**18, "config.json: F is 1000000000000000000: it must be at least 1"),
        ("rms_norm_eps", 10**400, "config.json: rms_norm_eps must be more than 0 and less than 2^63"),
        ("tie_word_embeddings", False, "lm_head.weight is missing"),
        ("mlp_bias", True, "config.json: mlp_bias is True, which is another model"),
    ],
)
def test_a_config_json_that_lies_is_told_with_the_field_or_the_tensor(hf, field, value, problem):
    path = hf / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    for message in refusals(hf):
        assert message.startswith(str(hf)) and problem in message
    for message in refusals(hf, dtype="float32"):
        assert message.startswith(str(hf)) and problem in message


@pytest.mark.parity
def test_a_params_json_that_lies_is_told_with_the_field_or_the_tensor(meta):
    path = meta / "params.json"
    for field, value, problem in (
        ("dim", 128, "tok_embeddings.weight is [512, 64], the configuration says [512, 128]"),
        ("n_layers", 2**30, "the configuration says 1073741824 layers, and there are only 48 tensors"),
        ("vocab_size", 32_000, "params.json: vocab_size is 32000, and the weights have 512"),
        ("n_heads", 3, "params.json: dim 64 is no multiple of n_heads 3"),
    ):
        original = path.read_text()
        path.write_text(json.dumps(json.loads(original) | {field: value}))
        for message in refusals(meta):
            assert message.startswith(str(meta)) and problem in message
        path.write_text(original)


# --- tokenizers -------------------------------------------------------------------------------------------------------


def test_the_tokenizer_of_another_model_is_refused(hf, llama2_folder):
    shutil.copyfile(llama2_folder / "tokenizer.model", hf / "tokenizer.model")
    converted_hf, converted, generated = refusals(hf)
    problem = f"the tokenizer has 32000 ids and the model 512: {hf / 'tokenizer.model'} is another model's"
    assert generated.startswith(problem)
    assert converted.startswith(problem) and converted_hf == converted
    assert converted.endswith("To convert the weights alone, move the tokenizer's files out of there")


def test_a_damaged_tokenizer_is_refused(hf):
    whole = (hf / "tokenizer.model").read_bytes()
    (hf / "tokenizer.model").write_bytes(whole[:4000])
    for message in refusals(hf):
        assert message.startswith(f"{hf / 'tokenizer.model'} ")
    (hf / "tokenizer.json").write_text("{")
    for message in refusals(hf):
        assert message.startswith(f"{hf / 'tokenizer.json'} is not JSON")


def test_weights_alone_are_converted_without_a_tokenizer(hf, capsys):
    (hf / "tokenizer.model").unlink()
    convert(hf, hf.parent / "made", to="hf", dtype=None, shard_bytes=10**9)
    assert capsys.readouterr().out == f"{hf.parent / 'made'}: 260,032 parameters in float32\n"


def test_a_tokenizer_with_fewer_ids_than_the_model_is_mentioned(hf, capsys):
    (hf / "words.json").write_text('["two", "words"]')
    convert(hf, hf.parent / "made", to="native", dtype=None, shard_bytes=10**9)
    assert capsys.readouterr().out.endswith(" in float32; its tokenizer has 6 of the 512 ids\n")


# --- the command lines ------------------------------------------------------------------------------------------------


def command(module, *arguments):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": xla_flags()}
    line = [sys.executable, "-m", f"srlm_jax.{module}", *map(str, arguments)]
    return subprocess.run(line, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)


def test_an_error_of_either_command_is_one_line(hf, tmp_path, llama2_folder):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Once"}\n{"prompt": "O')
    before = sorted(tmp_path.iterdir())
    ask = (f"--checkpoint={hf}", f"--prompts={tmp_path / 'prompts.jsonl'}", f"--output={tmp_path / 'out.jsonl'}")
    answers = [command("generate", *ask)]
    name = "model.layers.0.mlp.down_proj.weight"
    change(hf / "model.safetensors", lambda data: struct.pack_into("<f", data, place_of(data, name), float("nan")))
    answers.append(command("convert", f"--source={hf}", f"--target={tmp_path / 'out'}", "--to=native"))
    shutil.copyfile(llama2_folder / "tokenizer.model", hf / "tokenizer.model")
    answers.append(command("convert", f"--source={hf}", f"--target={tmp_path / 'out'}", "--to=hf"))
    for answer, problem in zip(answers, ["prompts.jsonl:2: not valid JSON", name, "32000 ids"], strict=True):
        assert (answer.returncode, answer.stdout) == (1, "")
        assert answer.stderr.startswith("error: ") and problem in answer.stderr and answer.stderr.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before
