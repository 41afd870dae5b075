"""The rows of one file that people bring: JSON Lines, a JSON array, CSV, Parquet or Arrow, also compressed.

The first bytes decide what a file is. Only CSV is recognised by its name, which ends in .csv or .tsv. Every other file
is refused with what it is and what to do. Every error names the file and the line, item or row.
"""

import bz2
import codecs
import csv
import decimal
import gzip
import io
import itertools
import json
import lzma
import re
import sys
import zlib
from collections.abc import Iterator, Sequence

import numpy as np
from etils import epath

from srlm_jax.errors import MissingExtra
from srlm_jax.storage import jsonl
from srlm_jax.storage.jsonl import BadRecord

ADVICE = "correct the row or remove it, or fetch the file again where it was cut short"
_WANTED = "rows are read from JSON Lines, a JSON array, CSV (named .csv or .tsv), Parquet and Arrow"

_PARQUET, _ARROW_FILE, _ARROW_STREAM = b"PAR1", b"ARROW1", b"\xff\xff\xff\xff"
_GZIP, _BZIP2, _XZ, _ZSTD = b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd"
_ZIP = b"PK\x03\x04"
_SAVE_AS_UTF8 = "save it as UTF-8, as `iconv -f UTF-16 -t UTF-8 FILE > NEW` does"
# The first bytes of what is refused, what it is, and what to do.
_REFUSED = (
    (b"version https://git-lfs.github.com/spec/", "a Git LFS pointer, not the file itself", "run `git lfs pull`"),
    (codecs.BOM_UTF32_LE, "UTF-32 text", _SAVE_AS_UTF8.replace("UTF-16", "UTF-32")),  # begins like UTF-16
    (codecs.BOM_UTF16_LE, "UTF-16 text", _SAVE_AS_UTF8),
    (codecs.BOM_UTF16_BE, "UTF-16 text", _SAVE_AS_UTF8),
    (b"\xd0\xcf\x11\xe0", "an old Excel workbook or another Office file", "save the sheet as CSV in UTF-8"),
    (b"FEA1", "a Feather file of version 1", "write it again as Parquet"),
    (b"ORC", "an ORC file", "write it again as Parquet"),
    (b"Obj\x01", "an Avro file", "write it again as Parquet"),
    (b"SQLite format 3\0", "an SQLite database", "export the table as CSV"),
    (b"%PDF", "a PDF document", "give the data it was made from"),
)
_SPACE = re.compile(r"\s*")


def read(path: epath.Path, columns: Sequence[str] | None) -> Iterator[tuple[str, dict]]:
    """("file:line" or "file: row n", row) for every row of a file. Of Parquet and Arrow only `columns` are read, None
    for all of them; the other forms give every column.

    A NaN is None, as pandas writes a missing number, and so is an empty cell of CSV. All cells of CSV are text.

    Raises:
      BadRecord: the file is of another kind, cut short or damaged, or a row is broken.
      MissingExtra: a package is needed that is not installed.
      OSError: it cannot be read.
    """
    data = _unpacked(path, path.read_bytes())
    if data.startswith((_PARQUET, _ARROW_FILE, _ARROW_STREAM)):
        return _arrow_rows(path, data, columns)
    _refuse_others(path, data)
    data = data.removeprefix(codecs.BOM_UTF8)
    start = data.lstrip()[:1]
    if not start:
        return iter(())
    if start == b"[":
        return _json_values(_decoded(path, data), path, array=True)
    if start == b"{":
        if _spans_lines(data):
            return _json_values(_decoded(path, data), path, array=False)
        return _json_lines(path, data)
    if (name := _plain_name(path)).endswith((".csv", ".tsv")):
        return _csv_rows(path, _decoded(path, data), tabs=name.endswith(".tsv"))
    line = data.lstrip().split(b"\n")[0].decode("utf-8", "replace").strip()
    raise BadRecord(f"{path}: a text that begins with {line!r:.60}; {_WANTED}")


def plain(value: object) -> object:
    """A value as JSON has it: text for bytes, lists for arrays, Python's numbers for numpy's, None for NaN.

    Raises UnicodeDecodeError for bytes that are not UTF-8.
    """
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, decimal.Decimal):
        return plain(float(value))
    if isinstance(value, float) and value != value:
        return None
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return value


# --- what a file is ---------------------------------------------------------------------------------------------------


def _plain_name(path: epath.Path) -> str:
    """The name in lower case without the ending of a compression."""
    return re.sub(r"\.(gz|bz2|xz|zst)$", "", path.name.lower())


def _unpacked(path: epath.Path, data: bytes) -> bytes:
    for mark, kind, decompress in (
        (_GZIP, "gzip", gzip.decompress),
        (_BZIP2, "bzip2", bz2.decompress),
        (_XZ, "xz", lzma.decompress),
    ):
        if data.startswith(mark):
            try:
                return decompress(data)
            except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
                raise BadRecord(f"{path}: not a whole {kind} file ({error}); fetch it again") from error
    return _unpacked_zstd(path, data) if data.startswith(_ZSTD) else data


def _unpacked_zstd(path: epath.Path, data: bytes) -> bytes:
    try:
        import zstandard
    except ModuleNotFoundError as error:
        raise MissingExtra(
            f"{path} is compressed with zstd: unpack it with `zstd -d FILE`, or pip install zstandard"
        ) from error
    try:
        with zstandard.ZstdDecompressor().stream_reader(data, read_across_frames=True) as reader:
            return reader.read()
    except zstandard.ZstdError as error:
        raise BadRecord(f"{path}: not a whole zstd file ({error}); fetch it again") from error


def _refuse_others(path: epath.Path, data: bytes) -> None:
    for mark, kind, advice in _REFUSED:
        if data.startswith(mark):
            raise BadRecord(f"{path}: {kind}; {advice}")
    if data.startswith(_ZIP):
        if b"xl/workbook" in data:
            raise BadRecord(f"{path}: an Excel workbook; save the sheet as CSV in UTF-8")
        raise BadRecord(f"{path}: a zip archive; unpack it, and give the file inside")
    if data[257:262] == b"ustar":
        raise BadRecord(f"{path}: a tar archive; unpack it, and give the file inside")
    if data.startswith((_GZIP, _BZIP2, _XZ, _ZSTD)):
        raise BadRecord(f"{path}: compressed twice; unpack it once")
    if data.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"<"):
        raise BadRecord(
            f"{path}: a page of HTML or XML, such as a login or an error page, not the data; fetch the file itself"
        )
    head = data[:40]
    if len(head) > 1 and any(head) and not (any(head[::2]) and any(head[1::2])):
        raise BadRecord(f"{path}: UTF-16 text; {_SAVE_AS_UTF8}")
    if b"\0" in data[:4096]:
        raise BadRecord(f"{path}: a binary file of an unknown kind; {_WANTED}")


def _decoded(path: epath.Path, data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise BadRecord(f"{path}:{line}: not UTF-8 text: {error.reason}; save the file as UTF-8") from error


# --- JSON -------------------------------------------------------------------------------------------------------------


def _constant(name: str) -> None:
    if name != "NaN":
        raise ValueError(f"{name} is not a JSON number")


_JSON = json.JSONDecoder(object_pairs_hook=jsonl.unique_keys, parse_constant=_constant, parse_float=jsonl.finite_number)


def _spans_lines(data: bytes) -> bool:
    """Whether the first object is printed over several lines."""
    if _json_line(data.lstrip().split(b"\n", 1)[0])[1] is None:
        return False
    text = data.decode("utf-8", "replace").lstrip()
    try:
        _, end = _JSON.raw_decode(text)
    except (ValueError, RecursionError):
        return False
    return "\n" in text[:end]


def _json_lines(path: epath.Path, data: bytes) -> Iterator[tuple[str, dict]]:
    """Lines end at "\\n" alone: U+2028 and its kin may stand inside a JSON string. Blank lines are skipped."""
    lines = [(number, line) for number, line in enumerate(data.split(b"\n"), start=1) if line.strip()]
    for index, (number, line) in enumerate(lines):
        row, problem = _json_line(line)
        if problem is not None:
            broken = 1 + sum(_json_line(later)[1] is not None for _, later in lines[index + 1 :])
            others = f"; {broken} of {len(lines)} rows cannot be read, this is the first" if broken > 1 else ""
            raise BadRecord(f"{path}:{number}: {problem}{others}; {ADVICE}")
        yield f"{path}:{number}", row


def _json_line(line: bytes) -> tuple[dict | None, str | None]:
    """(the row, None), or (None, what is wrong)."""
    try:
        text = line.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        return None, f"not UTF-8 text (byte {error.start} of the line): {error.reason}"
    try:
        row = _JSON.decode(text)
    except (ValueError, RecursionError) as error:
        return None, f"not valid JSON: {error}"
    return (row, None) if isinstance(row, dict) else (None, f"expected an object, found {row!r:.60}")


def _json_values(text: str, path: epath.Path, *, array: bool) -> Iterator[tuple[str, dict]]:
    """The objects of an array, or those that stand one after another, in as many lines as they like."""
    position, counted, line = _SPACE.match(text).end() + array, 0, 1
    for number in itertools.count(1):
        position = _SPACE.match(text, position).end()
        line, counted = line + text.count("\n", counted, position), position
        where = f"{path}:{line} (item {number})"
        if position == len(text):
            if array:
                raise BadRecord(f"{where}: the array does not end, so the file was cut short; fetch it again")
            return
        if array and text[position] == "]":
            if text[position + 1 :].strip():
                raise BadRecord(f"{where}: text after the end of the array; {ADVICE}")
            return
        try:
            row, position = _JSON.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            raise BadRecord(f"{where}: not valid JSON: {error}; {ADVICE}") from error
        if not isinstance(row, dict):
            raise BadRecord(f"{where}: expected an object, found {row!r:.60}; {ADVICE}")
        yield where, row
        position = _SPACE.match(text, position).end()
        if array and position < len(text):
            if text[position] not in ",]":
                raise BadRecord(f"{where}: expected a comma or the end of the array after it; {ADVICE}")
            position += text[position] == ","


# --- CSV --------------------------------------------------------------------------------------------------------------


def _csv_rows(path: epath.Path, text: str, *, tabs: bool) -> Iterator[tuple[str, dict]]:
    header = text.lstrip().split("\n", 1)[0]
    delimiter = "\t" if tabs else max(",;\t", key=header.count)
    before = csv.field_size_limit(sys.maxsize)  # 131,072 characters are not enough for every answer
    try:
        lines, start = [], 1
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        for cells in reader:
            if any(cells):
                lines.append((start, cells))
            start = reader.line_num + 1
    except csv.Error as error:
        raise BadRecord(f"{path}:{start}: not valid CSV: {error}; correct the row, or write the file again") from error
    finally:
        csv.field_size_limit(before)
    if not lines:
        return iter(())
    (_, names), *lines = lines
    names = [name.strip() for name in names]
    _check_once(path, names, [name for name in names if name])
    uneven = [(start, cells) for start, cells in lines if len(cells) != len(names)]
    if uneven:
        start, cells = uneven[0]
        others = f"; {len(uneven)} of {len(lines)} rows are like this" if len(uneven) > 1 else ""
        raise BadRecord(
            f"{path}:{start}: {len(cells)} cells, and the header has {len(names)}{others}; put a text that holds "
            f"{delimiter!r} or a line break between double quotes"
        )
    return (
        (f"{path}:{start}", dict(zip(names, (cell or None for cell in cells), strict=True))) for start, cells in lines
    )


def _check_once(path: epath.Path, names: Sequence[str], wanted: Sequence[str]) -> None:
    for name in wanted:
        if names.count(name) > 1:
            raise BadRecord(f"{path}: the column '{name}' occurs {names.count(name)} times; keep one of them")


# --- Parquet and Arrow ------------------------------------------------------------------------------------------------


def _arrow_rows(path: epath.Path, data: bytes, columns: Sequence[str] | None) -> Iterator[tuple[str, dict]]:
    kind = "Parquet" if data.startswith(_PARQUET) else "Arrow"
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise MissingExtra(f"{path} is {kind}, which needs pyarrow: pip install 'srlm_jax[data]'") from error
    number = 0
    try:
        names, batches = _arrow_batches(data)
        there = [name for name in names if columns is None or name in columns]
        _check_once(path, names, there)
        for batch in batches(there):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}: row {number}", plain(row)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise BadRecord(f"{path}: damaged {kind} after row {number} ({error}); fetch it again") from error


def _arrow_batches(data: bytes) -> tuple:
    """(column names, a function of those wanted that gives batches)."""
    import pyarrow
    import pyarrow.parquet

    if data.startswith(_PARQUET):
        file = pyarrow.parquet.ParquetFile(io.BytesIO(data))
        return file.schema_arrow.names, lambda wanted: file.iter_batches(batch_size=1_000, columns=wanted)
    if data.startswith(_ARROW_FILE):
        table = pyarrow.ipc.open_file(data).read_all()
    else:
        table = pyarrow.ipc.open_stream(data).read_all()
    return table.column_names, lambda wanted: table.select(wanted).to_batches(max_chunksize=1_000)
