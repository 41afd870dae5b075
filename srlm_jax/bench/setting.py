"""What a run of the benchmarks is asked to do, and where: the device, the models, the checkpoint that peers read."""

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from etils import epath

from srlm_jax.bench import load
from srlm_jax.bench.workload import Workload
from srlm_jax.model import config_files, llama, weights
from srlm_jax.model.config import LlamaConfig
from srlm_jax.model.llama import Llama
from srlm_jax.parallel import mesh as meshes
from srlm_jax.parallel import rules
from srlm_jax.parallel.mesh import MeshShape
from srlm_jax.storage import jsonl

ALONE = MeshShape(data=1, fsdp=1, tensor=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """One command."""

    command: str
    shape: str  # a name in workload.SHAPES
    config: LlamaConfig
    dtypes: tuple[str, ...]  # each of them is measured; weights are kept and products run in it
    workload: Workload
    repeat: int
    peer: str | None
    peer_python: str | None
    peer_rows: int  # that the peer samples at once
    unshared: bool  # attention, judge: measure our own mode without sharing too
    saving: bool  # sft, dpo: measure our own training while a train state is written too

    def of(self, dtype: str) -> LlamaConfig:
        return dataclasses.replace(self.config, param_dtype=dtype, compute_dtype=dtype)

    @property
    def made_in(self) -> str:
        """The type that the weights are drawn in; the others are rounded from it."""
        return "float32" if "float32" in self.dtypes else self.dtypes[0]


def device() -> str:
    """The one device that is measured, by name."""
    first = jax.devices()[0]
    if first.platform == "cpu":
        return load.cpu()
    return f"{first.platform.upper()}, {first.device_kind}"


def sample_mesh() -> jax.sharding.Mesh:
    return meshes.sample_mesh_over(ALONE, jax.devices()[:1])


def train_mesh() -> jax.sharding.Mesh:
    return meshes.train_mesh_over(ALONE, jax.devices()[:1])


def random_model(config: LlamaConfig, made_in: str) -> Llama:
    """The seeded random weights of every command, drawn in the type `made_in` and kept in that of `config`."""
    drawn = dataclasses.replace(config, param_dtype=made_in, compute_dtype=made_in)
    places = rules.model_shardings(train_mesh(), rules.TRAIN, llama.abstract(drawn))
    model = jax.jit(lambda key: llama.init(drawn, key), out_shardings=places)(jax.random.key(0))
    return as_kept(model, config)


def as_kept(model: Llama, config: LlamaConfig) -> Llama:
    """`model` with its weights in the type of `config`, and of that configuration."""
    numbers = [x.astype(config.param_dtype) for x in jax.tree.leaves(model)]
    return jax.tree.unflatten(jax.tree.structure(llama.abstract(config)), numbers)


def copied(model: Llama) -> Llama:
    """The same model in memory of its own, for what donates its argument."""
    return jax.tree.map(jnp.copy, model)


@contextlib.contextmanager
def checkpoint(setting: Setting) -> Iterator[str]:
    """A folder of Hugging Face's layout with the random model, for peers; removed in the end."""
    config = setting.of(setting.made_in)
    with tempfile.TemporaryDirectory(prefix="srlm_jax-bench-") as made:
        folder = epath.Path(made)
        weights.save_hf(folder, random_model(config, setting.made_in), shard_bytes=5 * 10**9)
        jsonl.write_json(folder / "config.json", config_files.to_hf(config, {}))
        yield made
