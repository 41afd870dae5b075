"""Records <-> JSON Lines, on any path etils.epath reads: local files and cloud buckets alike.

A file is written whole or not at all, and read back typed: a line that is not the record it should be stops the run
with its place, before it can turn into a wrong number three stages later.

A stage that works in steps writes one shard per step into a folder (`00000.jsonl`, `00001.jsonl`, ...); `read` takes
the folder as if it were one file.
"""

import dataclasses
import enum
import functools
import json
import math
import os
import re
import reprlib
import types
import typing
import uuid
from collections.abc import Iterable, Iterator
from typing import TypeVar

from etils import epath

from srlm_jax.errors import UserError

Record = TypeVar("Record")

_SHARD = re.compile(r"([0-9]{5,})\.jsonl")
_ADVICE = "correct it, or delete the file and run the stage that writes it again"


class BadRecord(UserError, ValueError):
    """A file does not hold the records it should; the message says where, what is wrong and what to do."""


def write(path: epath.PathLike, records: Iterable[object]) -> None:
    """Writes dataclass records, one line each, replacing `path` in one step; parent folders are made.

    The bytes depend on the records alone: keys in field order, no escapes but JSON's own. What is written can be
    read: a value that does not fit its field's annotation raises BadRecord and leaves `path` as it was.
    """
    write_whole(epath.Path(path), _lines(path, records))


def write_documents(path: epath.PathLike, documents: Iterable[object]) -> None:
    """Writes JSON documents that are not records (message trees, say), one line each, replacing `path` in one step."""
    lines = (json.dumps(document, ensure_ascii=False, allow_nan=False).encode() + b"\n" for document in documents)
    write_whole(epath.Path(path), lines)


def read(path: epath.PathLike, cls: type[Record]) -> list[Record]:
    """The records of a file, or of a folder's shards in order of their number.

    Raises:
      BadRecord: a line is not a `cls` (unknown, missing or mistyped field, broken JSON, not UTF-8), the last line is
        cut, or the folder's shards have a gap. A folder's missing last shards show only to a caller who knows their
        number: see `shards_done`.
      FileNotFoundError: there is no such file, or the folder has no shards.
    """
    path = epath.Path(path)
    if path.is_dir():
        return [record for part in _shards(path) for record in read(part, cls)]
    data = path.read_bytes()
    if data and not data.endswith(b"\n"):
        line = data.count(b"\n") + 1
        raise BadRecord(f"{path}:{line}: the line does not end, so the file was cut short; {_ADVICE}")
    return [decode(where, document, cls, _ADVICE) for where, document in parse_lines(data, str(path), _ADVICE)]


def parse_lines(data: bytes, name: str, advice: str) -> Iterator[tuple[str, object]]:
    """("name:line", JSON document) for each line of `data`.

    Raises BadRecord, ending in `advice`, where a line is blank, not UTF-8 or not strict JSON (NaN, infinities and
    repeated keys are refused too). Lines end at "\\n" alone: U+2028 and its kin may stand inside a JSON string.
    """
    if not data:
        return
    for number, line in enumerate(data.removesuffix(b"\n").split(b"\n"), start=1):
        where = f"{name}:{number}"
        yield where, _parse(line, where, advice)


def decode(where: str, document: object, cls: type[Record], advice: str) -> Record:
    """The JSON document that stands at `where` as a `cls`.

    Raises BadRecord, ending in `advice`, where it is none: an unknown, missing or mistyped field, or a value that the
    class itself refuses.
    """
    try:
        return _decode_record(cls, document, "")
    except _Misfit as misfit:
        field, problem = misfit.args
        place = f"field '{field}': " if field else ""
        raise BadRecord(f"{where}: {place}{problem}; {advice}") from None


def shard(directory: epath.PathLike, index: int) -> epath.Path:
    """Where the shard with this number (from 0) lies."""
    if index < 0:
        raise ValueError(f"a shard's number starts at 0, got {index}")
    return epath.Path(directory) / f"{index:05d}.jsonl"


def shards_done(directory: epath.PathLike) -> frozenset[int]:
    """The numbers of the shards that are there, whole because written in one step; none where there is no folder."""
    directory = epath.Path(directory)
    if not directory.is_dir():
        return frozenset()
    names = (_SHARD.fullmatch(entry.name) for entry in directory.iterdir())
    return frozenset(int(name[1]) for name in names if name and shard(directory, int(name[1])).name == name[0])


def write_json(path: epath.PathLike, document: object) -> None:
    """Writes one JSON document, replacing `path` in one step; dataclasses and enums inside are written as in records.

    Raises BadRecord for a NaN, an infinity or anything JSON has no form for.
    """
    try:
        text = json.dumps(_plain(document), ensure_ascii=False, allow_nan=False, indent=2) + "\n"
        data = text.encode("utf-8")
    except (TypeError, ValueError) as error:
        raise BadRecord(f"{path}: cannot be written as JSON: {error}") from error
    write_whole(epath.Path(path), [data])


def write_whole(path: epath.Path, chunks: Iterable[bytes]) -> None:
    """Writes a file that is there whole or not at all, whenever the process ends; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # The name is new each time: two writers of one file can then never mix their bytes, the last one wins whole.
    partial = path.parent / f".{path.name}.{uuid.uuid4().hex}.partial"
    try:
        with partial.open("wb") as file:
            for chunk in chunks:
                file.write(chunk)
            if _is_local(path):
                file.flush()
                os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    if _is_local(path):
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the new name outlives a power cut only once its folder is on disk
        finally:
            os.close(folder)


def read_json(path: epath.PathLike) -> object:
    """The JSON document of a file; BadRecord where it is not strict JSON in UTF-8."""
    path = epath.Path(path)
    return _parse(path.read_bytes(), str(path), _ADVICE)


def _shards(directory: epath.Path) -> list[epath.Path]:
    done = shards_done(directory)
    if not done:
        raise FileNotFoundError(
            f"{directory}: the folder holds no shard ({shard(directory, 0).name}, ...); run the stage that writes it"
        )
    missing = sorted(set(range(max(done))) - done)
    if missing:
        raise BadRecord(
            f"{directory}: shard {shard(directory, missing[0]).name} is missing though "
            f"{shard(directory, max(done)).name} is there; run the stage that writes them again"
        )
    return [shard(directory, index) for index in sorted(done)]


def _is_local(path: epath.Path) -> bool:
    return "://" not in os.fspath(path)


def _lines(path: epath.PathLike, records: Iterable[object]) -> Iterator[bytes]:
    for index, record in enumerate(records):
        where = f"{path}: record {index} of those to write"
        document = _plain(record)
        decode(where, document, type(record), "correct the code that makes the record")
        yield json.dumps(document, ensure_ascii=False, allow_nan=False).encode("utf-8") + b"\n"


def _plain(value: object) -> object:
    """The value in what JSON knows: dataclasses as objects, enums as their value, tuples as arrays."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value


def _parse(data: bytes, where: str, advice: str) -> object:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRecord(
            f"{where}: not UTF-8 text (byte {error.start} of the line): {error.reason}; {advice}"
        ) from error
    try:
        return json.loads(text, object_pairs_hook=unique_keys, parse_constant=_no_constant, parse_float=finite_number)
    except (ValueError, RecursionError) as error:
        raise BadRecord(f"{where}: not valid JSON: {error}; {advice}") from error


def unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object of its pairs, for `json`; ValueError where a key occurs twice."""
    document = dict(pairs)
    if len(document) != len(pairs):
        raise ValueError(f"a key occurs twice among {[key for key, _ in pairs]}")
    return document


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def finite_number(digits: str) -> float:
    """A JSON number with a fraction or an exponent, for `json`; ValueError where a float cannot hold it."""
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"the number {reprlib.repr(digits)} is too large")
    return value


class _Misfit(Exception):
    """(path of the field, what is wrong with it)."""


def _misfit(path: str, expected: str, value: object) -> _Misfit:
    return _Misfit(path, f"expected {expected}, found {reprlib.repr(value)}")


@functools.cache
def _kinds(cls: type) -> dict[str, object]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _decode_record(cls: type[Record], value: object, path: str) -> Record:
    if not isinstance(value, dict):
        raise _misfit(path, f"an object ({cls.__name__})", value)
    kinds = _kinds(cls)
    for name in value:
        if name not in kinds:
            raise _Misfit(_join(path, name), f"{cls.__name__} has no such field, only {', '.join(kinds)}")
    for name in kinds:
        if name not in value:
            raise _Misfit(_join(path, name), f"missing, and {cls.__name__} needs it")
    fields = {name: _decode(kind, value[name], _join(path, name)) for name, kind in kinds.items()}
    try:
        return cls(**fields)
    except ValueError as error:
        raise _Misfit(path, f"not a valid {cls.__name__}: {error}") from error


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _decode(kind: object, value: object, path: str) -> object:
    if dataclasses.is_dataclass(kind):
        return _decode_record(kind, value, path)
    if isinstance(kind, types.UnionType):
        options = [option for option in typing.get_args(kind) if option is not types.NoneType]
        if len(options) != 1:
            raise TypeError(f"field '{path}': of unions only `X | None` can be read, not {kind}")
        return None if value is None else _decode(options[0], value, path)
    if typing.get_origin(kind) is tuple:
        item, *rest = typing.get_args(kind)
        if rest != [...]:
            raise TypeError(f"field '{path}': of tuples only `tuple[X, ...]` can be read, not {kind}")
        if not isinstance(value, list):
            raise _misfit(path, "a list", value)
        return tuple(_decode(item, element, f"{path}[{index}]") for index, element in enumerate(value))
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        members = {member.value: member for member in kind}
        if not isinstance(value, str | int) or value not in members:
            raise _misfit(path, f"one of {', '.join(map(repr, members))}", value)
        return members[value]
    return _decode_scalar(kind, value, path)


def _decode_scalar(kind: object, value: object, path: str) -> object:
    if kind is str and isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise _misfit(path, "text that UTF-8 can hold (no lone surrogate)", value) from None
        return value
    # To Python a bool is an int: told apart here, or `true` would pass for the number 1.
    if kind is bool and isinstance(value, bool):
        return value
    if kind is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if math.isfinite(number):
            return number
        raise _misfit(path, "a finite number", value)
    if kind not in (str, bool, int, float):
        raise TypeError(f"field '{path}': no rule to read {kind}")
    raise _misfit(path, kind.__name__, value)
