"""Weights from and to other people's files: one table of names, read in both directions.

Axes: L layers, V vocabulary, D width, N query heads, K key-value heads, H head width, F MLP width.
"""

import dataclasses
import itertools
import math
import mmap
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from srlm_jax.model import config_files, llama, sources
from srlm_jax.model.config import LlamaConfig
from srlm_jax.model.folders import BadModelFile, layout_of, listed, read_json
from srlm_jax.model.llama import Llama
from srlm_jax.model.sources import Index, Tensor, Tensors
from srlm_jax.storage import checkpoint, jsonl, paths


@dataclasses.dataclass(frozen=True)
class _Weight:
    """A weight of ours, and the matrix or vector that others keep it in: one a layer if the name has a place for it."""

    ours: str
    axes: str  # of ours, in a layer
    theirs: tuple[str, ...]  # the same axes as theirs has them; ("NH", "D") is a matrix [N * H, D]
    hf: str
    meta: str

    @property
    def stacked(self) -> bool:
        return "{}" in self.hf

    def names(self, layout: str, config: LlamaConfig) -> list[str]:
        """Their names of it, by layer."""
        name = self.meta if layout == "meta" else self.hf
        return [name.format(layer) for layer in range(config.L)] if self.stacked else [name]

    def shape(self, config: LlamaConfig) -> tuple[int, ...]:
        """The shape of theirs."""
        return tuple(math.prod(getattr(config, axis) for axis in axes) for axes in self.theirs)


_BLOCK_HF, _BLOCK_META = "model.layers.{}.", "layers.{}."
_TABLE = (
    _Weight("embedding", "VD", ("V", "D"), "model.embed_tokens.weight", "tok_embeddings.weight"),
    *(
        _Weight(f"blocks/{ours}", axes, theirs, f"{_BLOCK_HF}{hf}.weight", f"{_BLOCK_META}{meta}.weight")
        for ours, axes, theirs, hf, meta in (
            ("attention_norm", "D", ("D",), "input_layernorm", "attention_norm"),
            ("q", "DNH", ("NH", "D"), "self_attn.q_proj", "attention.wq"),
            ("k", "DKH", ("KH", "D"), "self_attn.k_proj", "attention.wk"),
            ("v", "DKH", ("KH", "D"), "self_attn.v_proj", "attention.wv"),
            ("o", "NHD", ("D", "NH"), "self_attn.o_proj", "attention.wo"),
            ("mlp_norm", "D", ("D",), "post_attention_layernorm", "ffn_norm"),
            ("gate", "DF", ("F", "D"), "mlp.gate_proj", "feed_forward.w1"),
            ("up", "DF", ("F", "D"), "mlp.up_proj", "feed_forward.w3"),
            ("down", "FD", ("D", "F"), "mlp.down_proj", "feed_forward.w2"),
        )
    ),
    _Weight("norm", "D", ("D",), "model.norm.weight", "norm.weight"),
    _Weight("output", "DV", ("V", "D"), "lm_head.weight", "output.weight"),
)
_EMBEDDING, *_, _OUTPUT = _TABLE

# Meta turns elements 2i and 2i + 1 of these by one angle, Hugging Face and this package elements i and i + H / 2.
_ROTATED = ("blocks/q", "blocks/k")

# Rotary frequencies that older files hold, though they follow from the configuration.
_IGNORED = ("rotary_emb.inv_freq", "rope.freqs")


def _table(config: LlamaConfig) -> tuple[_Weight, ...]:
    return _TABLE[:-1] if config.tied else _TABLE


# --- reading ----------------------------------------------------------------------------------------------------------

_READERS = 8  # threads: they wait for the disk, or turn matrices
_STRIP = 128  # rows of a matrix turned at a time: a line of the cache is full before it has to go


def read_config(folder: epath.PathLike, *, param_dtype: str, compute_dtype: str, remat: str) -> LlamaConfig:
    """The model in a folder of Hugging Face's, Meta's or this package's layout; the three arguments are ours to choose.

    Raises:
      FileNotFoundError: there is no such folder.
      BadModelFile, BadRecord: it holds no model, or one that is no Llama as it is built here; the message names the
        field.
    """
    folder = paths.given(folder)
    choices = {"param_dtype": param_dtype, "compute_dtype": compute_dtype, "remat": remat}
    match layout_of(folder):
        case "native":
            path = folder / "manifest.json"
            return config_files.from_manifest(read_json(path), str(path), **choices)
        case "hf":
            path = folder / "config.json"
            return config_files.from_hf(read_json(path), str(path), **choices)
    path = folder / "params.json"
    vocabulary, tied = _meta_vocabulary(folder, read_json(path))
    return config_files.from_meta(read_json(path), str(path), vocabulary=vocabulary, tied=tied, **choices)


def _meta_vocabulary(folder: epath.Path, params: Mapping[str, object]) -> tuple[int, bool]:
    """What params.json may not say: how many tokens there are, and whether the head is the embedding."""
    shards = _meta_shards(folder)
    if not all(_EMBEDDING.meta in shard and len(shard[_EMBEDDING.meta].shape) == 2 for shard in shards):
        raise BadModelFile(f"{folder}: {_EMBEDDING.meta} is missing or no matrix")
    rows, columns = shards[0][_EMBEDDING.meta].shape
    vocabulary = sum(shard[_EMBEDDING.meta].shape[0] for shard in shards) if columns == params.get("dim") else rows
    shape = (vocabulary, params.get("dim"))
    whole = sources.merged(shards, {_EMBEDDING.meta: shape, _OUTPUT.meta: shape})
    tied = _OUTPUT.meta not in whole or _equal(whole[_OUTPUT.meta], whole[_EMBEDDING.meta])
    return vocabulary, tied


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether two matrices are the same, some rows at a time; what cannot be read as numbers is not."""
    if (one.shape, one.dtype) != (other.shape, other.dtype) or len(one.shape) != 2 or one.dtype not in sources.FLOATS:
        return False
    for start in range(0, one.shape[0], 4096):
        rows = (slice(start, min(start + 4096, one.shape[0])), slice(0, one.shape[1]))
        if not np.array_equal(one.read(rows), other.read(rows)):
            return False
    return True


def source_dtype(folder: epath.PathLike, config: LlamaConfig) -> str:
    """The type that most of the parameters in a folder are kept in: what the model is computed in where no other type
    is chosen. float64 counts as float32. Of two types with as many parameters, the first of float32, bfloat16 and
    float16 is taken.

    Raises:
      BadModelFile: they cannot be read, or are not those of the configuration.
      BadCheckpoint: as `checkpoint.check_model`, for a checkpoint of this package.
    """
    sizes = dict.fromkeys(("float32", "bfloat16", "float16"), 0)
    for dtype, shape in kept(folder, config).values():
        sizes["float32" if dtype == "float64" else dtype] += math.prod(shape)
    return max(sizes, key=sizes.get)


def check(folder: epath.PathLike, config: LlamaConfig) -> None:
    """Refuses weights that `load` would refuse for a name, a shape, a type or a file's length. Their numbers are not
    read, except where an output head is to be compared with the embedding.

    Raises:
      BadModelFile, BadCheckpoint: as `load`.
    """
    kept(folder, config)


def kept(folder: epath.PathLike, config: LlamaConfig) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Type and shape of each tensor that makes the model in a folder, by its name there; raises as `check`."""
    folder = paths.given(folder)
    if layout_of(folder) != "native":
        return {name: (tensor.dtype, tensor.shape) for name, tensor in _open(folder, config).items()}
    stored = _stored(folder, config)
    checkpoint.check_model(folder, stored)
    return {name: (str(leaf.dtype), leaf.shape) for name, leaf in checkpoint.named_leaves(stored).items()}


def _stored(folder: epath.Path, config: LlamaConfig) -> Llama:
    """The shapes of a checkpoint of this package as `config` says, and the types as its manifest says."""
    listing = read_json(folder / "manifest.json").get("weights")
    if not isinstance(listing, dict):
        raise BadModelFile(f"{folder / 'manifest.json'} lacks the field 'weights': copy the checkpoint again")
    model = llama.abstract(config)

    def as_kept(name: str, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        dtype = listing[name].get("dtype") if isinstance(listing.get(name), dict) else None
        return jax.ShapeDtypeStruct(leaf.shape, dtype if dtype in sources.FLOATS else leaf.dtype)

    leaves = [as_kept(name, leaf) for name, leaf in checkpoint.named_leaves(model).items()]
    return jax.tree.unflatten(jax.tree.structure(model), leaves)


def load(folder: epath.PathLike, config: LlamaConfig, shardings: Llama) -> Llama:
    """The weights in a folder of any of the three layouts, in the configuration's parameter type, whatever types they
    are kept in.

    Each host reads only what its devices hold. Host memory holds, at a time, one device's part of one weight and the
    tensors of the files that it is made of; devices that are CPUs keep that memory as their own.

    Args:
      shardings: for each weight, where it lives.

    Raises:
      BadModelFile: tensors are missing, unknown or of another shape (the first of them are named), a file is damaged,
        or weights are NaN, infinite or absurdly large in the configuration's type.
      BadCheckpoint: as `checkpoint.load_model`, for a checkpoint of this package.
    """
    folder = paths.given(folder)
    if layout_of(folder) == "native":
        stored, places = jax.tree.leaves(_stored(folder, config)), jax.tree.leaves(shardings)
        like = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=to) for x, to in zip(stored, places, strict=True)]
        structure = jax.tree.structure(llama.abstract(config))
        leaves = jax.tree.leaves(checkpoint.load_model(folder, jax.tree.unflatten(structure, like)))
        model = jax.tree.unflatten(structure, [leaf.astype(config.param_dtype) for leaf in leaves])
    else:
        model = assemble(_open(folder, config), layout_of(folder), config, shardings)
    _check_magnitudes(model, layout_of(folder), str(folder))
    return model


# No weight of a trained model comes near it. One below 2 whose highest exponent bit has flipped goes beyond, in float32
# and bfloat16; a file of weights has no checksum that would tell.
_LARGEST = 2.0**32


def _check_magnitudes(model: Llama, layout: str, where: str) -> None:
    """Raises BadModelFile, naming the tensors, where weights are NaN, infinite or absurdly large."""
    leaves, config = checkpoint.named_leaves(model), model.config
    for w in _table(config):
        layers = range(config.L) if w.stacked else (None,)
        fits = [_fits(leaves[w.ours], layer) for layer in layers]
        names = w.names(layout, config)
        if layout == "native":
            names = [w.ours if layer is None else f"{w.ours}[{layer}]" for layer in layers]
        if damaged := [name for name, fit in zip(names, fits, strict=True) if not fit]:
            raise BadModelFile(
                f"{where}: {listed(damaged, ', ')} holds numbers that are no weights in {config.param_dtype} (NaN, "
                "infinite, or beyond 2^32): the file is damaged, copy it again; or choose a type that has room for "
                "them (convert --dtype, config.model.param_dtype)"
            )


@jax.jit
def _fits(weight: jax.Array, layer: int | None) -> jax.Array:
    """Whether no number of the weight, or of one layer of it, is beyond the limit; NaN is."""
    numbers = weight if layer is None else weight[layer]
    return (jnp.abs(numbers) <= min(_LARGEST, float(jnp.finfo(weight.dtype).max))).all()


def _open(folder: epath.Path, config: LlamaConfig) -> Tensors:
    """The checked tensors of a folder that is not of our own layout."""
    layout = layout_of(folder)
    if layout == "hf":
        tensors = sources.unwrapped(sources.hugging_face(folder), _EMBEDDING.hf)
        return checked(tensors, layout, config, str(folder))
    shards = _meta_shards(folder)
    tensors = sources.merged(shards, _shapes(_TABLE, layout, config, len(shards[0]), str(folder)))
    return checked(tensors, layout, config, str(folder))


def _meta_shards(folder: epath.Path) -> list[Tensors]:
    return [sources.unwrapped(shard, _EMBEDDING.meta) for shard in sources.meta_shards(folder)]


def _shapes(
    table: tuple[_Weight, ...], layout: str, config: LlamaConfig, tensors: int, where: str
) -> dict[str, tuple[int, ...]]:
    """Their names of the weights in a table, by layer, with their shapes; `tensors` is how many there are.

    Raises:
      BadModelFile: the configuration has more layers than that, so that naming what is missing would have no end.
    """
    if tensors < config.L:
        raise BadModelFile(f"{where}: the configuration says {config.L} layers, and there are only {tensors} tensors")
    return {name: w.shape(config) for w in table for name in w.names(layout, config)}


def checked(tensors: Mapping[str, Tensor], layout: str, config: LlamaConfig, where: str) -> Tensors:
    """The tensors that make the model, without what may be there besides.

    Raises:
      BadModelFile: tensors are missing, unknown, of another shape or not of floating-point numbers; the message names
        three of them, of different kinds if there are several, and says how many more there are.
    """
    if adapters := [name for name in tensors if ".lora_" in name or ".base_layer." in name]:
        raise BadModelFile(
            f"{where}: {min(adapters):.120} belongs to an adapter that is not merged into the weights; merge it (in "
            "PEFT: merge_and_unload) and save the model again"
        )
    (head,), (embedding,) = _OUTPUT.names(layout, config), _EMBEDDING.names(layout, config)
    if (bare := embedding.removeprefix("model.")) in tensors and embedding not in tensors:
        advice = "load and save it with AutoModelForCausalLM" if config.tied else "get the files that have the head too"
        raise BadModelFile(
            f"{where}: {bare} is there and no {embedding}: the weights are those of transformers' LlamaModel, which "
            f"has no output head; {advice}"
        )
    wanted = _shapes(_table(config), layout, config, len(tensors), where)
    missing = [f"{name} is missing" for name in wanted if name not in tensors]
    shapes, types, unknown = [], [], []
    for name, shape in wanted.items():
        if name in tensors and tensors[name].shape != shape:
            found = str(list(tensors[name].shape))
            shapes.append(f"{name} is {found:.40}, the configuration says {list(shape)}")
        elif name in tensors and tensors[name].dtype not in sources.FLOATS:
            types.append(f"{name} holds {tensors[name].dtype:.20}, not floating-point numbers as they are")
    for name in sorted(tensors.keys() - wanted.keys()):
        if name.endswith(_IGNORED):
            continue
        if name != head:
            unknown.append(f"{name:.80} is unknown")
        elif embedding in tensors and not _equal(tensors[head], tensors[embedding]):
            unknown.append(f"{head} differs from {embedding}, and the configuration says that they are tied")
    rounds = itertools.zip_longest(missing, shapes, types, unknown)  # the first of each kind, then the second, ...
    if problems := [problem for turn in rounds for problem in turn if problem is not None]:
        more = f"; and {len(problems) - 3:,} more" if len(problems) > 3 else ""
        raise BadModelFile(f"{where}: {'; '.join(problems[:3])}{more}")
    return {name: tensors[name] for name in wanted}


def assemble(tensors: Mapping[str, Tensor], layout: str, config: LlamaConfig, shardings: Llama) -> Llama:
    """The model made of checked tensors; `shardings` says for each weight where it lives."""
    model = llama.abstract(config)
    shapes, places = checkpoint.named_leaves(model), checkpoint.named_leaves(shardings)
    table = {w.ours: w for w in _TABLE}

    def weight(name: str) -> jax.Array:
        layers = [tensors[theirs] for theirs in table[name].names(layout, config)]
        return _place(shapes[name], places[name], lambda part: _block(table[name], layers, layout, config, part))

    return jax.tree.unflatten(jax.tree.structure(model), [weight(name) for name in shapes])


def _place(
    like: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding, read: Callable[[Index], np.ndarray]
) -> jax.Array:
    """An array of which every device holds what `read` gives for its part; each part is read once, and let go."""
    devices: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(like.shape).items():
        part = tuple(axis.indices(size)[:2] for axis, size in zip(index, like.shape, strict=True))
        devices.setdefault(part, []).append(device)
    arrays = []
    for part, holders in devices.items():
        block = read(tuple(slice(*bounds) for bounds in part))
        arrays += jax.block_until_ready([jax.device_put(block, device) for device in holders])
    return jax.make_array_from_single_device_arrays(like.shape, sharding, arrays)


def _block(w: _Weight, layers: list[Tensor], layout: str, config: LlamaConfig, part: Index) -> np.ndarray:
    """A part of our weight, some of its layers read at a time."""
    rows, part = (part[0], part[1:]) if w.stacked else (slice(0, 1), part)
    sizes = [axis.stop - axis.start for axis in part]
    block = _pages((rows.stop - rows.start, *sizes), config.param_dtype)
    bounds = dict(zip(w.axes, part, strict=True))

    def fill(target: np.ndarray, layer: Tensor) -> None:
        source = _from_theirs(w, layer, layout, config, bounds)
        target = target.transpose([w.axes.index(axis) for axis in "".join(w.theirs)])
        strip = max(1, _STRIP // math.prod(source.shape[1 : len(w.theirs[0])]))
        with np.errstate(over="ignore", invalid="ignore"):  # seen by _check_magnitudes
            for start in range(0, len(source), strip):
                target[start : start + strip] = source[start : start + strip]

    with ThreadPoolExecutor(_READERS) as readers:
        list(readers.map(fill, block, layers[rows]))
    return block if w.stacked else block[0]


def _pages(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Memory straight from the system: it begins with a page, as JAX's CPU devices want it to take it over uncopied.

    numpy's own large arrays do not, and ask for huge pages, which some virtual machines are slow to give.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(memory, dtype).reshape(shape)


def _from_theirs(w: _Weight, tensor: Tensor, layout: str, config: LlamaConfig, part: Mapping[str, slice]) -> np.ndarray:
    """A part of one of their tensors: our axes, in their order."""
    # Of axes that they keep as one, the first is cut here and the second (H) taken whole, to be cut at the end.
    widths = [math.prod(getattr(config, axis) for axis in axes[1:]) for axes in w.theirs]
    index = tuple(
        slice(part[axes[0]].start * width, part[axes[0]].stop * width)
        for axes, width in zip(w.theirs, widths, strict=True)
    )
    cut = {axes[0] for axes in w.theirs}
    letters = "".join(w.theirs)
    sizes = {a: part[a].stop - part[a].start if a in cut else getattr(config, a) for a in letters}
    x = tensor.read(index).reshape([sizes[axis] for axis in letters])
    if layout == "meta" and w.ours in _ROTATED:
        heads, H, D = x.shape
        x = x.reshape(heads, H // 2, 2, D).swapaxes(1, 2).reshape(heads, H, D)  # x0 y0 x1 y1 -> x0 x1 y0 y1
    return x[tuple(slice(None) if axis in cut else part[axis] for axis in letters)]


# --- writing ----------------------------------------------------------------------------------------------------------


def hf_tensors(model: Llama) -> Tensors:
    """The model's weights as Hugging Face names and shapes them; each comes to the host when it is read."""
    config, ours = model.config, checkpoint.named_leaves(model)

    def of_layer(w: _Weight, layer: int) -> Tensor:
        def read(index: Index) -> np.ndarray:
            x = np.asarray(ours[w.ours][layer] if w.stacked else ours[w.ours])
            x = x.transpose([w.axes.index(axis) for axis in "".join(w.theirs)])
            return x.reshape(w.shape(config))[index]

        return Tensor(w.shape(config), str(ours[w.ours].dtype), read)

    return {name: of_layer(w, layer) for w in _table(config) for layer, name in enumerate(w.names("hf", config))}


def save_hf(folder: epath.Path, model: Llama, *, shard_bytes: int) -> None:
    """Writes the weights into an existing folder as safetensors: one file, or shards of at most `shard_bytes` (a larger
    tensor has a shard of its own) and their index. One tensor is in host memory at a time."""
    tensors = hf_tensors(model)
    shards = list(_shards(tensors, shard_bytes))
    if len(shards) == 1:
        sources.write_safetensors(folder / "model.safetensors", shards[0])
        return
    files = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    for name, shard in zip(files, shards, strict=True):
        sources.write_safetensors(folder / name, shard)
    places = {tensor: name for name, shard in zip(files, shards, strict=True) for tensor in shard}
    total = sum(tensor.bytes for tensor in tensors.values())
    jsonl.write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": places})


def _shards(tensors: Tensors, shard_bytes: int) -> Iterator[Tensors]:
    shard, size = {}, 0
    for name, tensor in tensors.items():
        if shard and size + tensor.bytes > shard_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.bytes
    yield shard
