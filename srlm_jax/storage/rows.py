"""Rows of data that people bring, as dictionaries: JSON Lines, plain or gzip, Parquet, or a TFDS data set.

What a file is shows in its first bytes, not in its name. Every error names the file and the line or row.

A data set of TensorFlow Datasets is called "tfds:NAME[/CONFIG][:SPLIT][?OURS=THEIRS&...]", as in
"tfds:my_answers:train?prompt=question&response=answer". Without a split it is "train"; columns that are not mapped bear
our names. It has been prepared as array_record, in TFDS's own folder (TFDS_DATA_DIR sets another); TensorFlow is not
needed.
"""

import gzip
import hashlib
import io
import re
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath

from srlm_jax.errors import MissingExtra
from srlm_jax.storage import jsonl

ADVICE = "correct the row or remove it, or fetch the file again where it was cut short"


_TFDS = "tfds:"
_TFDS_SOURCE = re.compile(r"tfds:(?P<name>[^:?]+)(?::(?P<split>[^?]+))?(?:\?(?P<mapping>\w+=\w+(?:&\w+=\w+)*))?")
_GZIP = b"\x1f\x8b"
_PARQUET = b"PAR1"


def read(source: epath.PathLike, columns: Sequence[str]) -> Iterator[tuple[str, dict]]:
    """("file:line" or "file: row n", row) for every row; of each row those `columns` that it has, and no others.

    Raises:
      BadRecord: the file is cut short, holds no row, or a row is broken; the data set is not there.
      MissingExtra: it is Parquet or a TFDS data set, and the extra `data` is not installed.
      OSError: it cannot be read.
    """
    found = _tfds_rows(source, columns) if is_tfds(source) else _file_rows(epath.Path(source), columns)
    empty = True
    for where, row in found:
        empty = False
        if not isinstance(row, dict):
            raise jsonl.BadRecord(f"{where}: expected an object, found {row!r:.60}; {ADVICE}")
        yield where, {name: row[name] for name in columns if name in row}
    if empty:
        raise jsonl.BadRecord(f"{source}: holds no row; give a source that does")


def is_tfds(source: epath.PathLike) -> bool:
    """Whether the source is a data set's name and not a path."""
    return str(source).startswith(_TFDS)


def digest(source: epath.PathLike) -> str:
    """A hash of the content, of a TFDS data set with all its splits: the same wherever it lies.

    Raises what `read` does where there is nothing to read.
    """
    if is_tfds(source):
        folder = epath.Path(_tfds_builder(str(source)).data_path)
        files = sorted(path for path in folder.iterdir() if not path.is_dir())
    else:
        files = [epath.Path(source)]
    found = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()[:16]


def _file_rows(path: epath.Path, columns: Sequence[str]) -> Iterator[tuple[str, object]]:
    data = path.read_bytes()
    if data.startswith(_PARQUET):
        return _parquet_rows(path, data, columns)
    return jsonl.parse_lines(_unpacked(path, data), str(path), ADVICE)


def _unpacked(path: epath.Path, data: bytes) -> bytes:
    if not data.startswith(_GZIP):
        return data
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise jsonl.BadRecord(f"{path}: not a whole gzip file ({error}); fetch it again") from error


def _parquet_rows(path: epath.Path, data: bytes, columns: Sequence[str]) -> Iterator[tuple[str, dict]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise MissingExtra(f"{path} is Parquet, which needs pyarrow: pip install 'srlm_jax[data]'") from error
    number = 0
    try:
        file = pyarrow.parquet.ParquetFile(io.BytesIO(data))
        there = [name for name in columns if name in file.schema_arrow.names]
        for batch in file.iter_batches(columns=there):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}: row {number}", row
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise jsonl.BadRecord(f"{path}: damaged Parquet after row {number} ({error}); fetch it again") from error


def _tfds_builder(source: str) -> Any:
    """Of a data set that is there; nothing is fetched or prepared."""
    match = _TFDS_SOURCE.fullmatch(source)
    if match is None:
        raise jsonl.BadRecord(f"{source}: not of the form tfds:NAME[/CONFIG][:SPLIT][?OURS=THEIRS&...]")
    try:
        import tensorflow_datasets
    except ModuleNotFoundError as error:
        raise MissingExtra(f"{source} needs tensorflow-datasets: pip install 'srlm_jax[data]'") from error
    advice = (
        f"prepare it first: tensorflow_datasets.builder('{match['name']}', file_format='array_record')"
        ".download_and_prepare()"
    )
    try:
        builder = tensorflow_datasets.builder(match["name"])
    except ValueError as error:  # DatasetNotFoundError too
        raise jsonl.BadRecord(f"{source}: {str(error).strip().splitlines()[0]} {advice}") from error
    if not builder.is_prepared():
        raise jsonl.BadRecord(f"{source}: not in {builder.data_path}; {advice}")
    return builder


def _tfds_rows(source: str, columns: Sequence[str]) -> Iterator[tuple[str, dict]]:
    builder, match = _tfds_builder(source), _TFDS_SOURCE.fullmatch(source)
    mapping = dict(part.split("=") for part in (match["mapping"] or "").split("&") if part)
    if unknown := mapping.keys() - {*columns}:
        raise jsonl.BadRecord(f"{source}: '{min(unknown)}' is not one of our columns {', '.join(columns)}")
    there = sorted(builder.info.features)
    if absent := set(mapping.values()) - {*there}:
        raise jsonl.BadRecord(f"{source}: the data set has no '{min(absent)}', only {', '.join(there)}")
    theirs = {name: mapping.get(name, name) for name in columns}
    theirs = {name: column for name, column in theirs.items() if column in there}
    try:
        examples = builder.as_data_source(match["split"] or "train")
    except (ValueError, KeyError, NotImplementedError) as error:
        splits = ", ".join(sorted(builder.info.splits))
        raise jsonl.BadRecord(
            f"{source}: {str(error).strip().splitlines()[0]} It has the splits {splits}, "
            f"in files of {builder.info.file_format.value}; only array_record can be read"
        ) from error
    for number in range(len(examples)):
        example, where = examples[number], f"{source}: row {number + 1}"
        try:
            yield where, {name: _plain(example[column]) for name, column in theirs.items()}
        except UnicodeDecodeError as error:
            raise jsonl.BadRecord(f"{where}: not UTF-8 text: {error}; {ADVICE}") from error


def _plain(value: object) -> object:
    """A value as JSON has it: TFDS gives text as bytes and lists as arrays."""
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
