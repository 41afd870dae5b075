"""`python -m srlm_jax.bench load --vs=transformers --json=FILE`: what a load costs on this machine, in time and memory,
beside another library in the same run."""

import dataclasses
import sys

import jax
from absl import app, flags, logging

from srlm_jax.bench import load
from srlm_jax.storage import jsonl

# What a user can put right: told in one line, without a traceback.
FAILURES = (ValueError, OSError)

_ALONE = "nothing"

_SHAPE = flags.DEFINE_enum("shape", "1b", list(load.SHAPES), "Which model: 1b is of TinyLlama's shape.")
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["float32", "bfloat16", "float16"], "What its weights are kept in.")
_FOLDER = flags.DEFINE_string(
    "folder", None, "Where the model lies, or is to be made and left; if not given, made and removed again."
)
_VS = flags.DEFINE_enum("vs", _ALONE, [_ALONE, *load.PEERS], "What to compare with.")
_REPEAT = flags.DEFINE_integer("repeat", 5, "How often to measure each.", lower_bound=1)
_JSON = flags.DEFINE_string("json", None, "A file to write all of it to.")


def main(argv: list[str]) -> None:
    if argv[1:] != ["load"]:
        wrong = f"not {' '.join(argv[1:])!r}" if len(argv) > 1 else "as in: python -m srlm_jax.bench load"
        sys.exit(f"error: say what to measure: load, {wrong}")
    logging.set_verbosity(logging.ERROR)
    jax.config.update("jax_platforms", "cpu")
    dtype = _DTYPE.value
    try:
        document = load.measure(
            dataclasses.replace(load.SHAPES[_SHAPE.value], param_dtype=dtype, compute_dtype=dtype),
            folder=_FOLDER.value,
            peer=None if _VS.value == _ALONE else _VS.value,
            repeat=_REPEAT.value,
            shard_bytes=5 * 10**8,
        )
        print(load.table(document))
        if _JSON.value is not None:
            jsonl.write_json(_JSON.value, document)
    except FAILURES as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    app.run(main)
