"""One load of a checkpoint, timed in a process of its own: `python -m srlm_jax.bench.load_once LOADER FOLDER DTYPE`.

It prints three lines, each when it is so far: that it begins, what it measured, and the checksum of what it loaded.
Each loader imports what it needs and nothing of the others.
"""

import hashlib
import json
import mmap
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

# What a loader gives: all that it holds, and the same in Hugging Face's names and shapes, as bytes.
Loaded = tuple[list[np.ndarray], Iterator[tuple[str, np.ndarray]]]


def _ours(folder: str, dtype: str) -> Callable[[], Loaded]:
    import jax

    from srlm_jax.model import llama, weights

    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def load() -> Loaded:
        config = weights.read_config(folder, param_dtype=dtype, compute_dtype=dtype, remat="dots")
        model = weights.load(folder, config, jax.tree.map(lambda _: place, llama.abstract(config)))
        named = ((name, as_bytes(tensor.whole())) for name, tensor in weights.hf_tensors(model).items())
        return [as_bytes(np.asarray(leaf)) for leaf in jax.tree.leaves(jax.block_until_ready(model))], named

    return load


def _transformers(folder: str, dtype: str, *, copied: bool) -> Callable[[], Loaded]:
    import torch
    import transformers
    from transformers.models.llama import modeling_llama

    transformers.utils.logging.disable_progress_bar()
    assert modeling_llama  # imported here, because from_pretrained would only now do so

    def load() -> Loaded:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
        if copied:
            for parameter in model.parameters():
                parameter.data = parameter.data.clone()
        state = {name: tensor.view(torch.uint8).numpy() for name, tensor in model.state_dict().items()}
        return list(state.values()), iter(state.items())

    return load


LOADERS = {
    "ours": _ours,
    "transformers": lambda folder, dtype: _transformers(folder, dtype, copied=False),
    "transformers, copied": lambda folder, dtype: _transformers(folder, dtype, copied=True),
}


def as_bytes(array: np.ndarray) -> np.ndarray:
    """The bytes of an array in row-major order, without a copy if they lie so."""
    return np.ascontiguousarray(array).view(np.uint8)


def touch(arrays: Iterable[np.ndarray]) -> int:
    """Reads a byte of every page of memory, so that what is only mapped comes in; the sum of them."""
    return sum(int(array.reshape(-1)[:: mmap.PAGESIZE].sum()) for array in arrays)


def checksum(named: Iterable[tuple[str, np.ndarray]]) -> str:
    """A name for these exact tensors, in whatever order they come."""
    digests = {name: hashlib.sha256(np.ascontiguousarray(array)).hexdigest() for name, array in named}
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()[:16]


def memory(pid: int | str) -> dict[str, int]:
    """Bytes that a process has in memory: now (VmRSS), at most so far (VmHWM), now and no file's (RssAnon)."""
    lines = (line.partition(":") for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    fields = {name: text.split() for name, _, text in lines}
    # A process that has ended has no memory, and no such lines.
    return {name: 1024 * int(fields.get(name, ["0"])[0]) for name in ("VmRSS", "VmHWM", "RssAnon")}


def main(loader: str, folder: str, dtype: str) -> None:
    load = LOADERS[loader](folder, dtype)
    before = memory("self")
    print("ready", flush=True)
    start = time.perf_counter()
    held, named = load()
    touch(held)
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "before": before, "after": memory("self")}), flush=True)
    print(checksum(named), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
