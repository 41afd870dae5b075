"""`python -m srlm_jax.bench decode --vs=transformers --json=FILE`: what the parts of an iteration cost on this device,
beside other libraries in the same run. See docs/bench.md."""

import dataclasses
import os
import sys

import jax
from absl import app, flags

from srlm_jax import commandline
from srlm_jax.bench import ceilings, commands, load, peer_process, report
from srlm_jax.bench.commands import MEASURES, VS
from srlm_jax.bench.setting import Setting
from srlm_jax.bench.workload import SHAPES, Workload, default
from srlm_jax.errors import BadInput
from srlm_jax.storage import jsonl

_ALONE = "nothing"

COMMANDS = (*VS, "all", "peers")

_SHAPE = flags.DEFINE_enum("shape", None, list(SHAPES), "Which model; if not given, 1b for load and 110m for the rest.")
_DTYPE = flags.DEFINE_list(
    "dtype", None, "float32, bfloat16 or both; if not given, bfloat16 for load and on accelerators, float32 on a CPU."
)
_FOLDER = flags.DEFINE_string(
    "folder", None, "load: where the model lies, or is to be made and left; if not given, made and removed again."
)
_VS = flags.DEFINE_enum("vs", _ALONE, [_ALONE, "transformers", "trl", "tunix"], "What to compare with.")
_PEER_PYTHON = flags.DEFINE_string("peer_python", None, "The peer's interpreter; if not given, .peers/NAME/bin/python.")
_PEER_ROWS = flags.DEFINE_integer("peer_rows", None, "Rows that a peer samples at once; if not given, as many.", 1)
_REPEAT = flags.DEFINE_integer("repeat", None, "How often to measure each; if not given, 5 for load, else 3.", 1)
_UNSHARED = flags.DEFINE_bool("unshared", False, "attention, judge: measure this package without sharing too.")
_SAVING = flags.DEFINE_bool("saving", False, "sft, dpo: measure this package while it writes a train state too.")
_GROWTH = flags.DEFINE_list("growth", [], "1,2,4,10: the same with so many times the work, and what a unit costs.")
_MAKE = flags.DEFINE_list("make", [], "peers: which environments to make.")
_BASE_PYTHON = flags.DEFINE_string("base_python", sys.executable, "peers: the interpreter to make them with.")
_REMAT = flags.DEFINE_enum("remat", None, ["full", "dots"], "What training keeps of blocks; if not given, the shape's.")
_JSON = flags.DEFINE_string("json", None, "A file to write all of it to.")
_SIZES = {
    field.name: flags.DEFINE_integer(
        field.name, None, f"See bench/workload.py; {field.name} there.", lower_bound=int(field.name != "spread")
    )
    for field in dataclasses.fields(Workload)
    if field.name != "seed"
}


def main(argv: list[str]) -> None:
    if len(argv) != 2 or argv[1] not in COMMANDS:
        wrong = f"not {' '.join(argv[1:])!r}" if len(argv) > 1 else "as in: python -m srlm_jax.bench load"
        sys.exit(f"error: say what to measure: {', '.join(COMMANDS)}, {wrong}")
    with commandline.begin(argv[1:], "--shape=1b"):
        document, text = run(argv[1])
        print(text)
        if _JSON.value is not None:
            jsonl.write_json(_JSON.value, document)


def run(command: str) -> tuple[object, str]:
    """What a command finds, and the same to be read."""
    if command == "peers":
        return _make_peers()
    peer = None if _VS.value == _ALONE else _VS.value
    known = sorted({name for names in VS.values() for name in names}) if command == "all" else VS[command]
    if peer is not None and peer not in known:
        raise BadInput(f"--vs={peer}: {command} is compared with {' or '.join(known) or 'none'}")
    if command == "load":
        return _load(peer)
    times = _times()
    if peer is not None:
        peer_process.python_of(peer, _PEER_PYTHON.value)  # before anything takes its time
    _share_memory(peer)
    top = ceilings.measure(_setting("decode", None).dtypes)
    if command != "all":
        return _measured(command, peer, top, times)
    found = {}
    for one in MEASURES:
        found[one] = _measured(one, peer if peer in VS[one] else None, top, times)
        print(found[one][1], end="\n\n", flush=True)
    return {one: document for one, (document, _) in found.items()}, "all: " + ", ".join(found)


def _measured(command: str, peer: str | None, top: ceilings.Ceilings, times: list[int]) -> tuple[object, str]:
    setting = _setting(command, peer)
    if times:
        found = commands.grown(setting, top, times)
        return found, report.growth_table(found)
    found = commands.measured(setting, top)
    return found, report.table(found)


def _times() -> list[int]:
    try:
        times = [int(text) for text in _GROWTH.value]
    except ValueError:
        times = [0]
    if any(factor < 1 for factor in times):
        raise BadInput(f"--growth={','.join(_GROWTH.value)}: give whole numbers from 1, as in 1,2,4,10")
    return times


def _make_peers() -> tuple[object, str]:
    if not _MAKE.value:
        raise BadInput(f"say which: --make={','.join(peer_process.REQUIREMENTS)}")
    made = {name: os.fspath(peer_process.make(name, _BASE_PYTHON.value)) for name in _MAKE.value}
    return made, "\n".join(f"{name}: {folder}" for name, folder in made.items())


def _load(peer: str | None) -> tuple[object, str]:
    jax.config.update("jax_platforms", "cpu")
    (dtype,) = _dtypes(("bfloat16",), ("float32", "bfloat16", "float16"), most=1)
    document = load.measure(
        dataclasses.replace(SHAPES[_SHAPE.value or "1b"](), param_dtype=dtype, compute_dtype=dtype),
        folder=_FOLDER.value,
        peer=peer,
        repeat=_REPEAT.value or 5,
        shard_bytes=5 * 10**8,
    )
    return document, load.table(document)


def _dtypes(otherwise: tuple[str, ...], known: tuple[str, ...], most: int) -> tuple[str, ...]:
    dtypes = otherwise if _DTYPE.value is None else tuple(dict.fromkeys(_DTYPE.value))
    if not 1 <= len(dtypes) <= most or not set(dtypes) <= set(known):
        wanted = " or ".join(known) + (", or both" if most > 1 else "")
        raise BadInput(f"--dtype={','.join(dtypes)}: give {wanted}")
    return dtypes


def _share_memory(peer: str | None) -> None:
    """A GPU's memory is taken whole where nobody else needs it, and as it is needed beside a peer."""
    if peer is None:
        os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    else:
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def _setting(command: str, peer: str | None) -> Setting:
    cpu = jax.default_backend() == "cpu"
    given = {name: flag.value for name, flag in _SIZES.items() if flag.value is not None}
    shape = _SHAPE.value or "110m"
    config = SHAPES[shape]()
    workload = dataclasses.replace(default(command, cpu=cpu), **given)
    return Setting(
        command=command,
        shape=shape,
        config=config if _REMAT.value is None else dataclasses.replace(config, remat=_REMAT.value),
        dtypes=_dtypes(("float32",) if cpu else ("bfloat16",), ("float32", "bfloat16"), most=2),
        workload=workload,
        repeat=_REPEAT.value or 3,
        peer=peer,
        peer_python=_PEER_PYTHON.value,
        peer_rows=_PEER_ROWS.value or workload.rows,
        unshared=_UNSHARED.value and command in ("attention", "judge"),
        saving=_SAVING.value and command in ("sft", "dpo"),
    )


if __name__ == "__main__":
    app.run(main)
