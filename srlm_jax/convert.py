"""`python -m srlm_jax.convert --source=DIR --target=DIR --to=native`: Hugging Face's or Meta's weights as a checkpoint
of this package; `--to=hf`: the way back."""

import collections
import contextlib
import dataclasses
import uuid
from collections.abc import Iterator

import jax
from absl import flags
from etils import epath

from srlm_jax import commandline
from srlm_jax.errors import BadInput
from srlm_jax.model import config_files, folders, llama, weights
from srlm_jax.storage import checkpoint, jsonl, paths
from srlm_jax.text.tokenizer import Tokenizer, WordTokenizer, check_vocabulary, load_tokenizer

_SHARD_BYTES = 5 * 10**9

_SOURCE = flags.DEFINE_string("source", None, "The folder of the model to convert, in any of the layouts.")
_TARGET = flags.DEFINE_string("target", None, "The folder to make.")
_TO = flags.DEFINE_enum("to", None, ["hf", "native"], "The layout to make: Hugging Face's, or this package's own.")
_DTYPE = flags.DEFINE_enum(
    "dtype", None, ["float32", "bfloat16", "float16"], "The type of the weights; if not given, that of most parameters."
)


def convert(source: epath.PathLike, target: epath.PathLike, *, to: str, dtype: str | None, shard_bytes: int) -> None:
    """Writes the model in the folder `source` (native, Hugging Face's or Meta's layout) to the new folder `target`.

    Args:
      to: "hf" or "native".
      dtype: what to keep the weights in; None: `weights.source_dtype` of the source. What is in that type there stays
        the same bit for bit; how many tensors are not is printed.
      shard_bytes: the size of Hugging Face's weight files.

    Raises UserError or OSError, and leaves no target then.
    """
    source, target = paths.given(source), paths.given(target)
    with new_folder(target) as folder:
        config = weights.read_config(source, param_dtype="float32", compute_dtype="float32", remat="dots")
        tokenizer = _tokenizer(source, config.V)
        others = collections.Counter()
        if dtype is None:
            dtype = weights.source_dtype(source, config)
            others.update(found for found, _ in weights.kept(source, config).values() if found != dtype)
        config = dataclasses.replace(config, param_dtype=dtype, compute_dtype=dtype)
        place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        model = weights.load(source, config, jax.tree.map(lambda _: place, llama.abstract(config)))
        carried = config_files.hf_fields(source)
        folders.copy_companions(source, folder)
        if to == "native":
            checkpoint.save_model(folder, model, {"config": checkpoint.config_facts(config), "hf": carried})
        else:
            weights.save_hf(folder, model, shard_bytes=shard_bytes)
            if isinstance(tokenizer, WordTokenizer) and not (folder / "tokenizer.json").exists():
                tokenizer.save_hf(folder)
            jsonl.write_json(folder / "config.json", config_files.to_hf(config, carried))
            if not (folder / "generation_config.json").exists():
                jsonl.write_json(folder / "generation_config.json", config_files.generation_config(carried))
    fewer = tokenizer is not None and tokenizer.vocabulary < config.V
    rounded = "".join(f"; {count:,} tensors were {kind}" for kind, count in sorted(others.items()))
    ids = f"; its tokenizer has {tokenizer.vocabulary:,} of the {config.V:,} ids" if fewer else ""
    print(f"{target}: {config.parameters:,} parameters in {dtype}{rounded}{ids}")


def _tokenizer(source: epath.Path, V: int) -> Tokenizer | None:
    """The tokenizer of a model with `V` ids; None where there is none, and the weights are converted alone.

    Raises:
      BadInput: it cannot be used, or is another model's: beside the converted weights it would look as if it could.
    """
    try:
        tokenizer = load_tokenizer(source)
        check_vocabulary(tokenizer, V)
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise BadInput(f"{error}. To convert the weights alone, move the tokenizer's files out of there") from error
    return tokenizer


@contextlib.contextmanager
def new_folder(target: epath.Path) -> Iterator[epath.Path]:
    """A folder beside `target` that takes its name at the end, and goes away on an error.

    Raises:
      FileExistsError: the target is there and not empty.
    """
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise FileExistsError(f"{target} is there already: choose another --target, or remove it")
    partial = target.parent / f".{target.name}.{uuid.uuid4().hex}.partial"
    partial.mkdir(parents=True)
    try:
        yield partial
        if target.exists():
            target.rmdir()
        partial.rename(target)
    except BaseException:
        partial.rmtree(missing_ok=True)
        raise


def main(argv: list[str]) -> None:
    with commandline.begin(argv, "--source=DIR"):
        jax.config.update("jax_platforms", "cpu")  # the host's memory is where files go through anyway
        convert(_SOURCE.value, _TARGET.value, to=_TO.value, dtype=_DTYPE.value, shard_bytes=_SHARD_BYTES)


if __name__ == "__main__":
    commandline.run(main, ["source", "target", "to"])
