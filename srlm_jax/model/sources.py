"""Files of named tensors, read a slice at a time: safetensors, PyTorch's own format, Meta's model-parallel shards."""

import dataclasses
import functools
import json
import math
import os
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from etils import epath
from safetensors import SafetensorError, safe_open

from srlm_jax.model.folders import BadModelFile, instead_of_weights, listed, read_json
from srlm_jax.storage import paths

Index = tuple[slice, ...]  # a range of each axis, start and stop given


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor that lies elsewhere: `read` brings the numbers of an index into memory, and no others."""

    shape: tuple[int, ...]
    dtype: str  # as numpy calls it, or as the file does where numpy has no such floats
    read: Callable[[Index], np.ndarray]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * jnp.dtype(self.dtype).itemsize

    def whole(self) -> np.ndarray:
        return self.read(tuple(slice(0, size) for size in self.shape))


Tensors = dict[str, Tensor]

FLOATS = ("float64", "float32", "float16", "bfloat16")  # the types of numbers that are read as they are

_SAFETENSORS_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def safetensors_file(path: epath.Path) -> Tensors:
    """The tensors of a safetensors file, by name.

    Raises:
      BadModelFile: the file is cut short or its header is damaged.
    """
    try:
        with safe_open(os.fspath(path), framework="np"):
            pass  # it checks that the header and the file's length are as they should be
    except (SafetensorError, UnicodeDecodeError) as error:
        message = f"{path} is no whole safetensors file ({error!s:.120}): copy it again"
        raise BadModelFile(paths.pointer_error(path) or message) from error
    except OSError as error:  # the library's do not name the file
        raise BadModelFile(f"{path} cannot be read: {error}") from error
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))

    def read(entry: Mapping[str, object], index: Index) -> np.ndarray:
        # Mapped anew each time, so that no more of the file is in memory than is being read.
        dtype = jnp.dtype(_SAFETENSORS_DTYPES[entry["dtype"]])
        offset = 8 + size + entry["data_offsets"][0]
        return np.memmap(os.fspath(path), dtype, "r", offset, tuple(entry["shape"])).view(np.ndarray)[index]

    return {
        name: Tensor(
            tuple(entry["shape"]),
            _SAFETENSORS_DTYPES.get(entry["dtype"], entry["dtype"]),
            functools.partial(read, entry),
        )
        for name, entry in header.items()
        if name != "__metadata__"
    }


def write_safetensors(path: epath.Path, tensors: Tensors) -> None:
    """Writes a safetensors file, one tensor in memory at a time.

    In the file: the header's length (8 bytes, little-endian), the header (JSON: each tensor's type, shape and place),
    the tensors one after the other.
    """
    codes = {name: code for code, name in _SAFETENSORS_DTYPES.items()}
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # what transformers writes
    offset = 0
    for name, tensor in tensors.items():
        place = [offset, offset + tensor.bytes]
        header[name] = {"dtype": codes[tensor.dtype], "shape": list(tensor.shape), "data_offsets": place}
        offset += tensor.bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the numbers are aligned
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(np.ascontiguousarray(tensor.whole()).reshape(-1).view(np.uint8))


def torch_file(path: epath.Path) -> Tensors:
    """The tensors of a file that PyTorch wrote (.bin, .pth), by name; nothing but tensors is unpickled.

    The file is mapped into memory. One of PyTorch before 1.6 is no zip archive and cannot be: it is read whole.

    Raises:
      BadModelFile: PyTorch is not installed, or the file holds anything but named tensors, or is damaged.
    """
    try:
        import torch
    except ImportError as error:
        raise BadModelFile(
            f"{path} can only be read with PyTorch: pip install torch (or the extra `parity`), or use safetensors files"
        ) from error
    try:
        loaded = torch.load(os.fspath(path), map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a pickle can fail in any way; the cause stays attached
        message = f"{path} is no whole file of tensors alone ({_reason(error):.120}); nothing else is loaded"
        raise BadModelFile(paths.pointer_error(path) or message) from error

    def plain(tensor: object) -> bool:  # and not sparse, nor without its numbers
        return isinstance(tensor, torch.Tensor) and tensor.layout is torch.strided and tensor.device.type == "cpu"

    if not isinstance(loaded, dict) or not all(map(plain, loaded.values())):
        raise BadModelFile(f"{path} holds something else than named tensors")

    def read(tensor: torch.Tensor, index: Index) -> np.ndarray:
        part = tensor.detach()[index]
        if part.dtype == torch.bfloat16:  # numpy has none of its own: the same bits under another name
            return part.contiguous().view(torch.int16).numpy().view(jnp.bfloat16)
        return part.numpy()

    return {
        str(name): Tensor(
            tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), functools.partial(read, tensor)
        )
        for name, tensor in loaded.items()
    }


def _reason(error: Exception) -> str:
    """What PyTorch says of a file, without its advice to load what may be harmful."""
    if other := re.search(r"GLOBAL (\S+)", str(error)):
        return f"it holds {other[1]}"
    if str(error).startswith("Weights only load failed"):
        return "it is damaged, or holds objects of other kinds"
    return str(error).partition("\n")[0]


def hugging_face(folder: epath.Path) -> Tensors:
    """The tensors of a folder as transformers saves it: one file or shards with an index, safetensors before .bin.

    Raises:
      BadModelFile: there are no weights, or a file of them is missing or damaged.
    """
    _check_local(folder)
    kinds = (("model.safetensors", safetensors_file), ("pytorch_model.bin", torch_file))
    for name, open_file in kinds:
        if (folder / name).exists():
            return open_file(folder / name)
        if (folder / f"{name}.index.json").exists():
            return _sharded(folder / f"{name}.index.json", open_file)
    names = [name for kind, _ in kinds for name in (kind, f"{kind}.index.json")]
    instead = instead_of_weights(folder) or f"none of {', '.join(names)} is there"
    raise BadModelFile(f"{folder} holds no weights: {instead}")


def _sharded(index: epath.Path, open_file: Callable[[epath.Path], Tensors]) -> Tensors:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(f, str) and _is_name(f) for f in places.values()):
        raise BadModelFile(f"{index}: weight_map must give each tensor's file, by its name alone")
    files = sorted(set(places.values()))
    if missing := [name for name in files if not (index.parent / name).exists()]:
        raise BadModelFile(f"{index} names files that are missing: {listed(missing, ', ')}")
    tensors: Tensors = {}
    for name in files:
        part = open_file(index.parent / name)
        if twice := sorted(part.keys() & tensors.keys()):
            raise BadModelFile(
                f"{index.parent / name} holds tensors that an earlier file has too: {listed(twice, ', ')}"
            )
        if lost := sorted(tensor for tensor, place in places.items() if place == name and tensor not in part):
            raise BadModelFile(f"{index.parent / name} lacks tensors that {index.name} promises: {listed(lost, ', ')}")
        tensors |= part
    return tensors


def _is_name(text: str) -> bool:
    """Whether this names a file of a folder; one with a folder in it could lead anywhere."""
    return epath.Path(text).name == text and text not in ("", "..")


def meta_shards(folder: epath.Path) -> list[Tensors]:
    """The tensors of consolidated.00.pth, consolidated.01.pth, ...: of each, every file has a part.

    Raises:
      BadModelFile: a file is missing or damaged, or lacks a tensor that another has.
    """
    _check_local(folder)
    files = sorted(path for path in folder.iterdir() if re.fullmatch(r"consolidated\.\d\d\.pth", path.name))
    wanted = [f"consolidated.{number:02d}.pth" for number in range(max(1, len(files)))]
    if missing := sorted(set(wanted) - {path.name for path in files}):
        raise BadModelFile(f"{folder} lacks {listed(missing, ', ')}")
    shards = [torch_file(path) for path in files]
    names = frozenset().union(*shards)
    for path, shard in zip(files, shards, strict=True):
        if lost := sorted(names - shard.keys()):
            raise BadModelFile(f"{path} lacks tensors that the other shards have: {listed(lost, ', ')}")
    return shards


# What torch.compile and FSDP add to a name at each module that they wrap.
_WRAPPED = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def unwrapped(tensors: Tensors, known: str) -> Tensors:
    """The tensors without what wrappers of a model add to their names: `module.` (data parallel), `base_model.model.`
    (PEFT), `_orig_mod.` (torch.compile) and the like.

    Args:
      known: a tensor that every model has. What stands before its name is taken off, if all names begin with it.
    """
    plain = {_WRAPPED.sub("", name): tensor for name, tensor in tensors.items()}
    if len(plain) < len(tensors):  # two of one name: neither can be trusted
        return tensors
    prefixes = [name.removesuffix(known) for name in plain if name.endswith(known)]
    if len(prefixes) != 1 or not all(name.startswith(prefixes[0]) for name in plain):
        return plain
    return {name.removeprefix(prefixes[0]): tensor for name, tensor in plain.items()}


def _check_local(folder: epath.Path) -> None:
    if "://" in os.fspath(folder):
        raise BadModelFile(f"{folder}: these weights are mapped into memory, so copy the folder to a local disk first")


def merged(shards: Sequence[Tensors], shapes: Mapping[str, tuple[int, ...]]) -> Tensors:
    """Model-parallel shards as whole tensors.

    A tensor is joined along the axis in which its parts are too short for its entry in `shapes` (Llama 2 splits its
    embedding by width, Llama 3 by vocabulary). One that every shard holds whole, or that fits in no way, is left as
    a part of it is.
    """
    return {name: _join([shard[name] for shard in shards], shapes.get(name)) for name in shards[0]}


def _join(parts: Sequence[Tensor], shape: tuple[int, ...] | None) -> Tensor:
    first = parts[0]
    axes = {len(part.shape) for part in parts}
    for axis in range(len(first.shape)) if len(axes) == 1 else ():
        rest = {(*part.shape[:axis], *part.shape[axis + 1 :]) for part in parts}
        joined = (*first.shape[:axis], sum(part.shape[axis] for part in parts), *first.shape[axis + 1 :])
        if joined == shape and len(rest) == 1:
            return Tensor(joined, first.dtype, functools.partial(_read_joined, parts, axis))
    # A part that is not as it should be, if there is one, so that the check of shapes names it.
    return next((part for part in parts if part.shape != shape), first)


def _read_joined(parts: Sequence[Tensor], axis: int, index: Index) -> np.ndarray:
    found, offset = [], 0
    for part in parts:
        size = part.shape[axis]
        start, stop = max(index[axis].start - offset, 0), min(index[axis].stop - offset, size)
        if start < stop:
            found.append(part.read((*index[:axis], slice(start, stop), *index[axis + 1 :])))
        offset += size
    return found[0] if len(found) == 1 else np.concatenate(found, axis=axis)
