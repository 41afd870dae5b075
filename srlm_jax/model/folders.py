"""The folder of a model: whose layout it has, which of its files belong to the model, and what it holds instead."""

import json
import os
import re
from collections.abc import Iterable

from etils import epath

from srlm_jax.errors import UserError

# Layout -> the file that tells it; the first one found counts.
MARKS = {"native": "manifest.json", "hf": "config.json", "meta": "params.json"}

# The files beside the weights that belong to a model and are copied with it: the tokenizer's, the chat template's and
# the sampling settings. No file of another name is copied, and no code.
COMPANIONS = (
    "words.json",
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)

# What files that are not read here hold.
_FOREIGN = {
    ".gguf": "a GGUF file",
    ".ggml": "a GGML file",
    ".onnx": "an ONNX file",
    ".h5": "a TensorFlow file",
    ".tflite": "a TensorFlow Lite file",
    ".msgpack": "a Flax file",
    ".ot": "a file of rust-bert",
    ".npz": "a file of NumPy or MLX",
    ".nemo": "a NeMo file",
    ".ckpt": "a training checkpoint",
}


class BadModelFile(UserError, ValueError):
    """A file of a model's folder cannot be used; the message names it and what to do."""


def listed(names: Iterable[str], word: str) -> str:
    """The first three names, each cut to 80 characters, then `word` and how many more there are."""
    names = list(names)
    shown = word.join(f"{name:.80}" for name in names[:3])
    return f"{shown}{word}and {len(names) - 3:,} more" if len(names) > 3 else shown


def layout_of(folder: epath.Path) -> str:
    """Whose layout a folder has: "native" (this package's), "hf" (Hugging Face's) or "meta".

    Raises:
      FileNotFoundError: there is no such folder.
      BadModelFile: it is a file, or a folder without a model; the message says what it holds instead.
    """
    if folder.is_dir():
        for layout, mark in MARKS.items():
            if (folder / mark).exists():
                return layout
        raise BadModelFile(f"{folder} holds no model: {_instead_of_model(folder)}")
    if not folder.exists():
        raise FileNotFoundError(f"{folder}: there is no such folder{hub_hint(folder)}")
    if kind := _FOREIGN.get(folder.suffix):
        raise BadModelFile(
            f"{folder} is {kind}, which is not read: give a folder with config.json and safetensors files"
        )
    raise BadModelFile(f"{folder} is a file: give the folder of the model, {folder.parent}")


def hub_hint(folder: epath.Path) -> str:
    """A hint for a path that looks like the name of a model on a hub."""
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", os.fspath(folder)):
        return ""
    return "; if it is the name of a model on a hub, download the model and give the folder it is in"


def _instead_of_model(folder: epath.Path) -> str:
    """What a folder without any of the three files holds, and what to do."""
    names = sorted(path.name for path in folder.iterdir())
    if "adapter_config.json" in names:
        return _adapter(folder)
    inner = sorted(
        path.parent for mark in MARKS.values() for depth in ("*", "*/*") for path in folder.glob(f"{depth}/{mark}")
    )
    if inner:
        inner = list(dict.fromkeys(map(str, inner)))  # whole: a path that is cut cannot be given
        more = f" or {len(inner) - 3} more" if len(inner) > 3 else ""
        return f"the model is in {' or '.join(inner[:3])}{more}; give that folder"
    if "weights" in names:
        return "weights/ is there without manifest.json, an unfinished checkpoint; run what makes it again"
    weights = [name for name in names if name.endswith((".safetensors", ".bin", ".pth", ".pt"))]
    if weights:
        return (
            f"{weights[0]:.80} is there without config.json (or params.json); copy it from where the weights are from"
        )
    if foreign := _foreign(names):
        return foreign
    missing = f"none of {', '.join(MARKS.values())} is there"
    return missing if names else f"{missing}, the folder is empty"


def instead_of_weights(folder: epath.Path) -> str:
    """What a folder in Hugging Face's layout holds in place of weights that are read; "" where it is nothing known."""
    if lost := sorted(path.name for path in folder.iterdir() if not path.exists()):
        return f"{lost[0]:.80} is a link to a file that is not there; copy the files themselves"
    names = sorted(path.name for path in folder.iterdir())
    if "adapter_config.json" in names:
        return _adapter(folder)
    weights = [name for name in names if name.endswith((".safetensors", ".bin"))]
    for name in weights:
        if match := re.fullmatch(r"(.+)-\d+-of-\d+(\.\w+)", name):
            return f"{name:.80} is there without {match[1]}{match[2]}.index.json; copy it too"
    if weights:
        return f"{weights[0]:.80} is there, which is no name that weights are read from; rename it if it is they"
    return _foreign(names)


def _adapter(folder: epath.Path) -> str:
    base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
    return (
        f"it is a LoRA adapter for {base or 'another model'!s:.80}; merge it into that model (in PEFT: "
        "merge_and_unload, then save_pretrained) and give the folder of the result"
    )


def _foreign(names: Iterable[str]) -> str:
    for name in names:
        if kind := _FOREIGN.get(epath.Path(name).suffix):
            return f"{name:.80} is {kind}, which is not read; get the model as safetensors files with config.json"
    return ""


def copy_companions(source: epath.Path, folder: epath.Path) -> None:
    """Copies the files of COMPANIONS that `source` has into an existing folder, over those that are there."""
    for name in COMPANIONS:
        if (source / name).is_file():
            (source / name).copy(folder / name, overwrite=True)


def read_json(path: epath.Path) -> dict[str, object]:
    """The object in a JSON file that comes from outside.

    Raises:
      BadModelFile: it is no JSON object.
    """
    try:
        document = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise BadModelFile(f"{path} is not JSON ({error!s:.120}): it is cut short or damaged; copy it again") from error
    if not isinstance(document, dict):
        raise BadModelFile(f"{path} must hold an object with fields, not {type(document).__name__}")
    return document
