"""Weights and train states on disk, by Orbax, with a manifest that says what they are and a hash that proves it."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from typing import TypeVar

import grain
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath

from srlm_jax.errors import UserError
from srlm_jax.parallel import hosts
from srlm_jax.storage import jsonl

Tree = TypeVar("Tree")

_ADVICE = "delete the folder and run the stage that makes it again (see --redo)"


class BadCheckpoint(UserError, ValueError):
    """A checkpoint is missing, unfinished, damaged or of another model."""


def _absolute(path: epath.PathLike) -> epath.Path:
    """Orbax takes no relative path, and some of its releases say so only once they write."""
    path = epath.Path(path)
    return path if "://" in os.fspath(path) else epath.Path(os.path.abspath(path))


def _names(tree: object) -> list[str]:
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    names = [jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value") for path in paths]
    return [name.replace("/value/", "/") or "value" for name in names]


def named_leaves(tree: Tree) -> dict[str, jax.Array]:
    """The arrays of a tree (or their shapes) by name: `blocks/gate`, `embedding`, ..."""
    return dict(zip(_names(tree), jax.tree.leaves(tree), strict=True))


@jax.jit
def _checksum(x: jax.Array) -> jax.Array:
    """Two 32-bit sums that any one changed bit changes; integer, so the same however the array is sharded."""
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32)
    weights = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        weights = weights * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    # Odd multipliers are invertible modulo 2^32: no change of a single word can cancel.
    return jnp.stack([jnp.sum(bits), jnp.sum(bits * (2 * weights + 1) * jnp.uint32(0x9E3779B1))])


def model_hash(model: object) -> str:
    """A name for these exact weights: the same on any mesh, different after any change of a single number."""
    digest = hashlib.sha256()
    for name, leaf in sorted(named_leaves(model).items()):
        digest.update(f"{name} {leaf.shape} {leaf.dtype}".encode())
        digest.update(hosts.fetch(_checksum(leaf)).tobytes())
    return digest.hexdigest()[:16]


def save_model(path: epath.PathLike, model: object, facts: Mapping[str, object]) -> str:
    """Writes weights to the folder `path`, then a manifest with `facts`, shapes and hash; returns the hash.

    The manifest comes last: a folder without one is an unfinished checkpoint and reads as missing.
    """
    path = _absolute(path)
    weights = named_leaves(model)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / "weights", weights, force=True)
        checkpointer.wait_until_finished()
    identity = model_hash(model)
    shapes = {name: {"shape": list(leaf.shape), "dtype": str(leaf.dtype)} for name, leaf in weights.items()}
    if hosts.is_main():
        jsonl.write_json(path / "manifest.json", {"hash": identity, "weights": shapes, **facts})
    return identity


def check_model(path: epath.PathLike, like: object) -> str:
    """Checks, by its manifest alone, that the folder `path` holds weights with the shapes and dtypes of `like`; returns
    the hash that they must have.

    Raises:
      BadCheckpoint: the folder is missing or unfinished, or its weights are of another shape or dtype than `like`; the
        message names the weight.
    """
    path = _absolute(path)
    try:
        manifest = jsonl.read_json(path / "manifest.json")
    except FileNotFoundError as error:
        raise BadCheckpoint(f"{path} holds no finished checkpoint: manifest.json is missing; {_ADVICE}") from error
    except jsonl.BadRecord as error:
        raise BadCheckpoint(f"{error}; {_ADVICE}") from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("weights"), dict) or "hash" not in manifest:
        raise BadCheckpoint(f"{path / 'manifest.json'} lacks the field 'hash' or 'weights'; {_ADVICE}")
    wanted = named_leaves(like)
    stored = manifest["weights"]
    for name in sorted(wanted.keys() | stored.keys()):
        want = None if name not in wanted else {"shape": list(wanted[name].shape), "dtype": str(wanted[name].dtype)}
        if want != stored.get(name):
            raise BadCheckpoint(
                f"{path}: weight {name!r:.80} is {stored.get(name, 'missing')!s:.80}, the model configuration wants "
                f"{want or 'none of that name'}; it is the checkpoint of another model"
            )
    if not (path / "weights").is_dir():
        raise BadCheckpoint(f"{path} holds no weights: the folder weights/ is missing; {_ADVICE}")
    return manifest["hash"]


def load_model(path: epath.PathLike, like: Tree) -> Tree:
    """The weights in the folder `path`, into the shapes, dtypes and shardings of `like`.

    Raises:
      BadCheckpoint: as `check_model`; or the weights are damaged: they do not give the manifest's hash.
    """
    path = _absolute(path)
    wanted, promised = named_leaves(like), check_model(path, like)
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            weights = checkpointer.restore(path / "weights", wanted)
    except jax.errors.JaxRuntimeError:  # of the devices, or of a process that is gone
        raise
    except Exception as error:  # Orbax and TensorStore raise many types for damaged files; the cause stays attached.
        raise BadCheckpoint(f"{path / 'weights'} cannot be read, a file is missing or damaged; {_ADVICE}") from error
    model = jax.tree.unflatten(jax.tree.structure(like), [weights[name] for name in wanted])
    if (identity := model_hash(model)) != promised:
        raise BadCheckpoint(f"{path}: the weights' hash is {identity}, not {promised!s:.40}: damaged; {_ADVICE}")
    return model


@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a training needs to go on: what the step carries, and where the data stands."""

    trainable: object
    opt_state: object


class TrainCheckpoints:
    """The last train state of an unfinished training, with the state of its data iterator. Use as a context."""

    def __init__(self, path: epath.PathLike):
        options = ocp.CheckpointManagerOptions(max_to_keep=1, create=True)
        self._path = _absolute(path)
        self._manager = ocp.CheckpointManager(self._path, options=options)

    def __enter__(self) -> "TrainCheckpoints":
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if hosts.disconnection(error) is None:  # or a save that the others never finish would be waited for
            self._manager.close()

    def save(self, step: int, state: TrainState, batches: grain.DatasetIterator) -> None:
        """Starts writing in the background; a kill before the end leaves the one before."""
        tree = named_leaves((state.trainable, state.opt_state))
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(tree),
                # One for all processes, who draw the same batches: another number of them can go on from it.
                batches=ocp.args.JsonSave(batches.get_state()),
            ),
        )

    def any_saved(self) -> bool:
        """Whether there is a train state to go on from."""
        return self._manager.latest_step() is not None

    def restore(self, like: TrainState, batches: grain.DatasetIterator) -> tuple[int, TrainState] | None:
        """The last saved step with its state, and `batches` moved to where it was; None where nothing was saved.

        Raises:
          BadCheckpoint: what was saved cannot be read, or is of another training.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        both = (like.trainable, like.opt_state)
        wanted = named_leaves(both)
        try:
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(wanted),
                    batches=ocp.args.JsonRestore(),
                ),
            )
            batches.set_state(restored["batches"])
        except jax.errors.JaxRuntimeError:  # see load_model
            raise
        except Exception as error:
            raise BadCheckpoint(
                f"{self._path} (step {step}) cannot be read; delete the folder to train this stage from its start"
            ) from error
        leaves = [restored["state"][name] for name in wanted]
        trainable, opt_state = jax.tree.unflatten(jax.tree.structure(both), leaves)
        return step, TrainState(trainable, opt_state)


def config_facts(config: object) -> dict[str, object]:
    """A configuration dataclass as a manifest holds it."""
    return json.loads(json.dumps(dataclasses.asdict(config)))
