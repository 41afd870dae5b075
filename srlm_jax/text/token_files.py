"""The files beside a tokenizer's own, which say more about its tokens."""

import json
import re

from etils import epath

from srlm_jax.errors import BadInput
from srlm_jax.storage import paths

# Chat models often add their marks without declaring them special; what is spelt like this is never made out of text.
BRACKETED = re.compile(r"<.+>|\[.+\]", re.DOTALL)

CONFIG = "tokenizer_config.json"
BESIDE = (CONFIG, "special_tokens_map.json", "generation_config.json")


def copy(path: epath.Path, folder: epath.Path) -> None:
    """Copies a tokenizer's file and those beside it that say more about it."""
    for name in (path.name, *BESIDE, "added_tokens.json", "chat_template.jinja"):
        if (path.parent / name).exists():
            (path.parent / name).copy(folder / name, overwrite=True)


def named_ids(folder: epath.Path, role: str, ids: dict[str, int]) -> tuple[int, ...]:
    """All ids that the files beside a tokenizer.json give for "bos" or "eos", in the order of the files.

    A file gives a token as text, as an object with its text, as its id, or as a list of these.
    """
    found = []
    for name in BESIDE:
        path = folder / name
        key = f"{role}_token_id" if name == "generation_config.json" else f"{role}_token"
        value = fields_of(path).get(key)
        for token in value if isinstance(value, list) else [value]:
            if token is None:
                continue
            text = token.get("content") if isinstance(token, dict) else token
            one = ids.get(text) if isinstance(text, str) else text
            if type(one) is not int or one not in ids.values():
                raise BadInput(f"{path}: {key} is {value!r}, which is no token of the tokenizer beside it")
            found.append(one)
    return tuple(dict.fromkeys(found))


def fields_of(path: epath.Path) -> dict:
    """The object in a JSON file; an empty one where there is no such file. Raises BadInput as `read_object`."""
    return read_object(path) if path.exists() else {}


def read_object(path: epath.Path) -> dict:
    """The object in a JSON file. Raises BadInput where it holds none."""
    try:
        document = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise BadInput(paths.pointer_error(path) or f"{path} is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise BadInput(f"{path} holds no JSON object")
    return document
