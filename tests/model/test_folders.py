"""Folders of models: whose layout they have, what is copied from them, and what is said of one without a model."""

import json

import pytest
from etils import epath

from srlm_jax.errors import BadInput
from srlm_jax.model import weights
from srlm_jax.model.folders import (
    COMPANIONS,
    BadModelFile,
    copy_companions,
    instead_of_weights,
    layout_of,
    listed,
    read_json,
)
from srlm_jax.text.tokenizer import load_tokenizer


def made(folder, *names):
    """A folder that holds these files, each with an empty JSON object in it."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    return epath.Path(folder)


def test_names_are_listed_up_to_the_third():
    assert listed(["a"], ", ") == "a"
    assert listed(["a", "b", "c"], ", ") == "a, b, c"
    assert listed((str(i) for i in range(300)), ", ") == "0, 1, 2, and 297 more"
    assert len(listed(["x" * 10_000] * 9, ", ")) < 260


def test_a_layout_is_told_by_its_files(tmp_path):
    folder = epath.Path(tmp_path)
    with pytest.raises(BadModelFile, match=r"holds no model: none of manifest.json, config.json, params.json is there"):
        layout_of(folder)
    for name, layout in (("params.json", "meta"), ("config.json", "hf"), ("manifest.json", "native")):
        (folder / name).write_text("{}")
        assert layout_of(folder) == layout
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        layout_of(folder / "nowhere")


@pytest.mark.parametrize("text", ['{"hidden_size": 1', "\x00\x01", "[" * 100_000], ids=["cut", "binary", "deep"])
def test_a_damaged_file_is_named(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(
        BadModelFile, match=r"config.json is not JSON \(.*\): it is cut short or damaged; copy it again"
    ):
        read_json(epath.Path(tmp_path / "config.json"))
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(BadModelFile, match=r"config.json must hold an object with fields, not list"):
        read_json(epath.Path(tmp_path / "config.json"))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((), "none of manifest.json, config.json, params.json is there, the folder is empty"),
        (("README.md",), "none of manifest.json, config.json, params.json is there"),
        (("model/config.json",), "the model is in {}/model; give that folder"),
        (("a/config.json", "b/config.json"), "the model is in {}/a or {}/b; give that folder"),
        (("m2/checkpoint/manifest.json",), "the model is in {}/m2/checkpoint; give that folder"),
        (("snapshots/0a1b/params.json",), "the model is in {}/snapshots/0a1b; give that folder"),
        (("weights/_METADATA", "tokenizer.json"), "weights/ is there without manifest.json, an unfinished checkpoint"),
        (("model.safetensors",), "model.safetensors is there without config.json (or params.json); copy it from"),
        (("consolidated.00.pth",), "consolidated.00.pth is there without config.json (or params.json)"),
        (("model-q4.gguf", "README.md"), "model-q4.gguf is a GGUF file, which is not read; get the model as"),
        (("model.onnx",), "model.onnx is an ONNX file, which is not read"),
        (("tf_model.h5",), "tf_model.h5 is a TensorFlow file, which is not read"),
        (("flax_model.msgpack",), "flax_model.msgpack is a Flax file, which is not read"),
        (("adapter_config.json", "adapter_model.safetensors"), "it is a LoRA adapter for another model; merge it into"),
    ],
)
def test_a_folder_without_a_model_says_what_it_holds(tmp_path, names, message):
    folder = made(tmp_path / "f", *names)
    folder.mkdir(exist_ok=True)
    with pytest.raises(BadModelFile) as raised:
        layout_of(folder)
    said = str(raised.value)
    assert said.startswith(f"{folder} holds no model: {message.replace('{}', str(folder))}")
    assert len(said.replace(str(folder), "")) < 300 and "\n" not in said


def test_an_adapter_names_its_model(tmp_path):
    config = {"base_model_name_or_path": "meta-llama/Llama-2-7b-hf", "peft_type": "LORA"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(BadModelFile, match=r"a LoRA adapter for meta-llama/Llama-2-7b-hf; merge it into that model"):
        layout_of(epath.Path(tmp_path))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.safetensors", "is a file: give the folder of the model, {}"),
        ("config.json", "is a file: give the folder of the model, {}"),
        ("model-q4.gguf", "is a GGUF file, which is not read: give a folder with config.json and safetensors files"),
        ("model.onnx", "is an ONNX file, which is not read"),
    ],
)
def test_a_file_in_place_of_a_folder_is_told_with_the_folder(tmp_path, name, message):
    made(tmp_path, name)
    with pytest.raises(BadModelFile) as raised:
        layout_of(epath.Path(tmp_path / name))
    assert str(raised.value).startswith(f"{tmp_path / name} {message.replace('{}', str(tmp_path))}")


@pytest.mark.parametrize(
    ("path", "hint"),
    [
        ("meta-llama/Llama-2-7b-hf", True), ("SmolLM2-135M", True), ("gpt2", True),
        ("../models/model", False), ("/no/such", False), ("~/model", False), ("a/b/c", False),
    ],
)  # fmt: skip
def test_a_name_on_a_hub_is_no_folder_and_the_message_says_so(path, hint):
    with pytest.raises(FileNotFoundError) as raised:
        layout_of(epath.Path(path))
    advice = "; if it is the name of a model on a hub, download the model and give the folder it is in"
    assert str(raised.value).endswith("there is no such folder" + (advice if hint else ""))


def test_no_command_takes_an_address_for_a_folder(tmp_path):
    choices = {"param_dtype": "float32", "compute_dtype": "float32", "remat": "dots"}
    for read in (load_tokenizer, lambda path: weights.read_config(path, **choices)):
        with pytest.raises(BadInput, match=r"^https://host/a/model is an address and no path"):
            read("https://host/a/model")


def test_a_link_to_a_file_that_is_gone_is_named(tmp_path):
    folder = made(tmp_path, "config.json")
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "blobs" / "0a1b")
    assert instead_of_weights(folder).startswith("model.safetensors is a link to a file that is not there; copy the")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((), ""),
        (("adapter_config.json", "adapter_model.safetensors"), "it is a LoRA adapter for another model"),
        (
            ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
            "model-00001-of-00002.safetensors is there without model.safetensors.index.json; copy it too",
        ),
        (("pytorch_model-00002-of-00002.bin",), "pytorch_model-00002-of-00002.bin is there without pytorch_model.bin."),
        (("model.fp16.safetensors",), "model.fp16.safetensors is there, which is no name that weights are read from"),
        (("model.gguf",), "model.gguf is a GGUF file, which is not read"),
        (("tf_model.h5",), "tf_model.h5 is a TensorFlow file, which is not read"),
    ],
)
def test_what_is_there_in_place_of_weights_is_told(tmp_path, names, message):
    assert instead_of_weights(made(tmp_path, "config.json", *names)).startswith(message)
    assert not message or instead_of_weights(epath.Path(tmp_path))


def test_only_known_files_are_copied_over_those_that_are_there(tmp_path):
    others = (
        "modeling_x.py",
        "chat_template.py",
        "secret.txt",
        "config.json",
        "model.safetensors",
        "tokenizer.json.sh",
    )
    source, target = made(tmp_path / "source", *COMPANIONS, *others), made(tmp_path / "target", "chat_template.jinja")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "merges.txt").unlink()
    (source / "merges.txt").mkdir()
    copy_companions(source, target)
    assert {path.name for path in target.iterdir()} == set(COMPANIONS) - {"merges.txt"}
    assert (target / "chat_template.jinja").read_text() == "{{ messages }}"
    assert {"chat_template.jinja", "added_tokens.json", "special_tokens_map.json"} < set(COMPANIONS)
