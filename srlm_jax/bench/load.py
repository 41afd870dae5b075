"""Loading a checkpoint: seconds and peak memory of this package and of transformers, on the CPU.

Each load has a process of its own, and the libraries take turns. The files are in the page cache before the first. A
load ends when a byte of every page of all weights has been read, so that a library that only maps its files has them
in memory too; imports come before it, and the check of the numbers after it.
"""

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import platform
import select
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from tqdm import tqdm

from srlm_jax.bench import load_once
from srlm_jax.errors import BadInput
from srlm_jax.model import config_files, llama, sources, weights
from srlm_jax.model.config import LlamaConfig
from srlm_jax.storage import jsonl

# Of what is compared with: the packages that it needs, and its loaders. transformers leaves weights where the file is
# mapped if it can; copied, they are in memory of its own, as ours are.
PEERS = {"transformers": (("torch", "transformers"), ("transformers", "transformers, copied"))}

_LETTERS = "VDLNKHF"
_POLL_SECONDS = 0.002


@dataclasses.dataclass(frozen=True, kw_only=True)
class Load:
    """One load. The memory is that of the process, its libraries included."""

    seconds: float
    before_bytes: int  # resident when the load began
    peak_bytes: int  # the most that was resident, pages of mapped files among it
    own_before_bytes: int  # the same without pages of files, which the system can drop and read again
    own_peak_bytes: int


def measure(
    config: LlamaConfig, *, folder: epath.PathLike | None, peer: str | None, repeat: int, shard_bytes: int
) -> dict[str, object]:
    """Loads a random model of this configuration `repeat` times with each library: what `table` prints, and more.

    Args:
      folder: where the model is, or is made and left; None: it is made in a temporary folder.
      peer: a name in PEERS; None: this package alone.
      shard_bytes: the size of the model's files, if it is made.

    Raises:
      ValueError: the peer is not installed, the folder holds something else, or a library failed or loaded other
        numbers than the files hold.
    """
    packages, others = PEERS[peer] if peer else ((), ())
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        raise BadInput(f"--vs={peer} needs {' and '.join(missing)}: pip install 'srlm_jax[parity]'")
    if not Path("/proc/self/status").exists():
        raise BadInput("memory is read from /proc, which only Linux has")
    with _checkpoint(config, folder, shard_bytes) as made:
        tensors = sources.hugging_face(made)
        wanted = load_once.checksum((name, load_once.as_bytes(t.whole())) for name, t in tensors.items())
        loads: dict[str, list[Load]] = {name: [] for name in ("ours", *others)}
        with tqdm(total=repeat * len(loads), desc="load", unit="load", dynamic_ncols=True, file=sys.stderr) as bar:
            for _ in range(repeat):
                for name, done in loads.items():
                    done.append(_load(name, made, config.param_dtype, wanted))
                    bar.update()
        files = len(list(made.glob("*.safetensors")))
    summaries = {name: summary(done) for name, done in loads.items()}
    return {
        "command": "load",
        "device": cpu(),
        "versions": {name: importlib.metadata.version(name) for name in ("jax", *packages)},
        "shape": {letter: getattr(config, letter) for letter in _LETTERS},
        "parameters": config.parameters,
        "dtype": config.param_dtype,
        "bytes": sum(tensor.bytes for tensor in tensors.values()),
        "files": files,
        "checksum": wanted,
        "loads": loads,
        "summary": summaries,
        "ratio": {name: ratio(summaries[name], summaries["ours"]) for name in others},
    }


def table(document: Mapping[str, object]) -> str:
    """What `measure` found, to be read. MB are millions of bytes."""
    shape = " ".join(f"{letter}={size}" for letter, size in document["shape"].items())
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    lines = [
        f"load: {document['device']}; {versions}",
        f"random Llama, {shape}: {document['parameters']:,} parameters in {document['dtype']}, "
        f"{document['bytes'] / 1e6:,.0f} MB (files: {document['files']})",
        "",
        f"{'':30}{'seconds':>9}{'':>9}{'peak memory':>15}{'':>18}",
        f"{'':30}{'median':>9}{'least':>9}{'in all, MB':>15}{'without files, MB':>18}",
    ]
    for name, found in document["summary"].items():
        lines.append(
            f"{name:30}{found['seconds_median']:9.2f}{found['seconds_min']:9.2f}"
            f"{found['peak_bytes'] / 1e6:15,.0f}{found['own_peak_bytes'] / 1e6:18,.0f}"
        )
    for name, found in document["ratio"].items():
        lines.append(
            f"{name + ' / ours':30}{found['seconds_median']:9.2f}{found['seconds_min']:9.2f}"
            f"{found['peak_bytes']:15.2f}{found['own_peak_bytes']:18.2f}"
        )
    loads = len(document["loads"]["ours"])
    lines += [
        "",
        f"Loads of each: {loads}, in turn, each in a new process, the files in the page cache. Memory: the median of",
        "what came on top of the libraries; in all, pages of mapped files too. Every page of every weight was read,",
        f"and all loaded the numbers of the files (checksum {document['checksum']}).",
    ]
    return "\n".join(lines)


@contextlib.contextmanager
def _checkpoint(config: LlamaConfig, folder: epath.PathLike | None, shard_bytes: int) -> Iterator[epath.Path]:
    """A folder of Hugging Face's layout with a model of this configuration, made if it is not there."""
    if folder is not None and epath.Path(folder).exists():
        folder = epath.Path(folder)
        choices = {"param_dtype": config.param_dtype, "compute_dtype": config.compute_dtype, "remat": config.remat}
        same = weights.read_config(folder, **choices) == config
        if not same or weights.source_dtype(folder, config) != config.param_dtype:
            raise BadInput(f"{folder} holds another model than the one to load: choose another --folder, or remove it")
        yield folder
        return
    parent = None if folder is None else epath.Path(folder).parent
    if parent is not None:
        parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".srlm_jax-bench-", dir=parent) as unfinished:
        made = epath.Path(unfinished) / "model"
        made.mkdir()
        _make(config, made, shard_bytes)
        yield made if folder is None else made.rename(folder)


def _make(config: LlamaConfig, folder: epath.Path, shard_bytes: int) -> None:
    """Writes a model of random numbers, spread as transformers' initialisation spreads them, into an empty folder."""
    shapes, structure = jax.tree.flatten(llama.abstract(config))
    leaves, rng = [], np.random.default_rng(0)
    with tqdm(total=config.parameters, desc="draw", unit="", unit_scale=True, dynamic_ncols=True) as bar:
        for like in shapes:
            numbers = rng.standard_normal(like.shape, np.float32)
            leaves.append(jnp.asarray(0.02 * numbers, like.dtype))
            bar.update(like.size)
        bar.set_description("write")
        weights.save_hf(folder, jax.tree.unflatten(structure, leaves), shard_bytes=shard_bytes)
        jsonl.write_json(folder / "config.json", config_files.to_hf(config, {}))


def _load(loader: str, folder: epath.Path, dtype: str, wanted: str) -> Load:
    """One load in a new process, watched from here so that the watching costs it nothing.

    Raises:
      ValueError: it failed, or its numbers do not have the checksum `wanted`.
    """
    line = [sys.executable, "-m", "srlm_jax.bench.load_once", loader, os.fspath(folder), dtype]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    with (
        tempfile.TemporaryFile() as complaints,
        subprocess.Popen(line, env=environment, bufsize=0, stdout=subprocess.PIPE, stderr=complaints) as child,
    ):
        child.stdout.readline()
        own = 0
        while not select.select([child.stdout], [], [], _POLL_SECONDS)[0]:
            own = max(own, load_once.memory(child.pid)["RssAnon"])
        measured, checksum = child.stdout.readline(), child.stdout.readline().decode().strip()
        if child.wait() != 0:
            complaints.seek(0)
            reason = (complaints.read().decode(errors="replace").strip() or f"exit {child.returncode}").splitlines()[-1]
            raise BadInput(f"{loader}: {folder} could not be loaded: {reason}")
    if checksum != wanted:
        raise BadInput(f"{loader}: loaded other numbers than {folder} holds (checksum {checksum}, not {wanted})")
    found = json.loads(measured)
    return Load(
        seconds=found["seconds"],
        before_bytes=found["before"]["VmRSS"],
        peak_bytes=found["after"]["VmHWM"],
        own_before_bytes=found["before"]["RssAnon"],
        own_peak_bytes=max(own, found["after"]["RssAnon"]),
    )


def summary(loads: list[Load]) -> dict[str, float]:
    """Of several loads; memory is what came on top of what the process held before."""
    return {
        "seconds_median": statistics.median(load.seconds for load in loads),
        "seconds_min": min(load.seconds for load in loads),
        "peak_bytes": statistics.median(load.peak_bytes - load.before_bytes for load in loads),
        "own_peak_bytes": statistics.median(load.own_peak_bytes - load.own_before_bytes for load in loads),
    }


def ratio(theirs: Mapping[str, float], ours: Mapping[str, float]) -> dict[str, float]:
    return {name: theirs[name] / ours[name] for name in ours}


def cpu() -> str:
    """This machine's processor, by name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"CPU, {next(named, platform.machine())}, {os.cpu_count()} cores"
