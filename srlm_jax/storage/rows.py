"""Rows of data that people bring, as dictionaries: JSON Lines, plain or gzip, or Parquet.

What a file is shows in its first bytes, not in its name. Every error names the file and the line or row.
"""

import gzip
import hashlib
import io
import zlib
from collections.abc import Iterator, Sequence

from etils import epath

from srlm_jax.storage import jsonl

ADVICE = "correct the row or remove it, or fetch the file again where it was cut short"


class MissingExtra(ValueError):
    """A file or data set needs a package that the base install does not bring; the message names the extra."""


_GZIP = b"\x1f\x8b"
_PARQUET = b"PAR1"


def read(source: epath.PathLike, columns: Sequence[str]) -> Iterator[tuple[str, dict]]:
    """("file:line" or "file: row n", row) for every row; of each row those `columns` that it has, and no others.

    Raises:
      BadRecord: the file is cut short, holds no row, or a row is broken.
      MissingExtra: it is Parquet, and the extra `data` is not installed.
      OSError: it cannot be read.
    """
    path = epath.Path(source)
    data = path.read_bytes()
    if data.startswith(_PARQUET):
        found = _parquet_rows(path, data, columns)
    else:
        found = jsonl.parse_lines(_unpacked(path, data), str(path), ADVICE)
    empty = True
    for where, row in found:
        empty = False
        if not isinstance(row, dict):
            raise jsonl.BadRecord(f"{where}: expected an object, found {row!r:.60}; {ADVICE}")
        yield where, {name: row[name] for name in columns if name in row}
    if empty:
        raise jsonl.BadRecord(f"{path}: holds no row; give a file that does")


def digest(source: epath.PathLike) -> str:
    """A hash of the content: the same wherever it lies and whatever it is called."""
    with epath.Path(source).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


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
