"""Rows of data that people bring, as dictionaries. A source is one of:

    FILE             JSON Lines, a JSON array, CSV, Parquet or Arrow, also compressed: see `file_rows`
    FOLDER           the shards of one such file, in the order of their names
    tfds:NAME...     a data set of TensorFlow Datasets: see `tfds_rows`

and may end in a mapping of columns, ?OURS=THEIRS&..., as "answers.jsonl?prompt=question&response=answer". Columns that
are not mapped have our names.
"""

import hashlib
import re
from collections.abc import Iterator, Sequence

from etils import epath

from srlm_jax.storage import file_rows, paths, tfds_rows
from srlm_jax.storage.jsonl import BadRecord

ADVICE = file_rows.ADVICE

_TFDS = "tfds:"
_MAPPED = re.compile(r"(?P<place>.*?)\?(?P<mapping>\w+=[^?&=]+(?:&\w+=[^?&=]+)*)", re.DOTALL)
_SHARD = re.compile(r"[^.].*\.(jsonl|jsonl\.gz|parquet|arrow)")


def read(source: epath.PathLike, columns: Sequence[str]) -> Iterator[tuple[str, dict]]:
    """("file:line" or "file: row n", row) for every row; of each row those `columns` that it has, by our names, and no
    others.

    Raises:
      BadRecord: the file is of another kind, cut short or damaged, holds no row, or a row is broken; a mapping names
        columns that are not there; the data set is not there.
      MissingExtra: a package is needed that is not installed, as for Parquet and TFDS the extra `data`.
      OSError: it cannot be read.
    """
    theirs = {name: name for name in columns} | _checked_mapping(source, columns)
    wanted = sorted(set(theirs.values()))
    empty = True
    for where, row in _rows(source, wanted):
        empty = False
        yield where, {name: row[column] for name, column in theirs.items() if column in row}
    if empty:
        raise BadRecord(f"{source}: holds no row; give a source that does")


def columns_of(source: epath.PathLike) -> list[str]:
    """The columns of the first row, by their names in the source; raises what `read` does."""
    place, _ = _parts(source)
    if is_tfds(place):
        return tfds_rows.columns(place)
    for _, row in _rows(source, None):
        return list(row)
    raise BadRecord(f"{source}: holds no row; give a source that does")


def mapping(source: epath.PathLike) -> dict[str, str]:
    """Our column -> theirs, as the source's end says; empty where it says nothing."""
    return _parts(source)[1]


def is_tfds(source: epath.PathLike) -> bool:
    """Whether the source is a data set's name and not a path."""
    return str(source).startswith(_TFDS)


def digest(source: epath.PathLike) -> str:
    """A hash of the content and of the mapping: the same wherever the source lies. Of a TFDS data set all splits count.

    Raises what `read` does where there is nothing to read.
    """
    place, mapped = _parts(source)
    content = hashlib.sha256(repr(sorted(mapped.items())).encode() if mapped else b"")
    for path in tfds_rows.files(place) if is_tfds(place) else _files(place):
        with path.open("rb") as file:
            content.update(hashlib.file_digest(file, "sha256").digest())
    return content.hexdigest()[:16]


def _parts(source: epath.PathLike) -> tuple[str, dict[str, str]]:
    """(the place, the mapping)."""
    match = _MAPPED.fullmatch(str(source))
    if match is None:
        return str(source), {}
    pairs = [pair.split("=") for pair in match["mapping"].split("&")]
    mapped = dict(pairs)
    if len(mapped) < len(pairs):
        raise BadRecord(f"{source}: a column of ours is mapped twice")
    return match["place"], mapped


def _checked_mapping(source: epath.PathLike, columns: Sequence[str]) -> dict[str, str]:
    if not (mapped := mapping(source)):
        return {}
    if unknown := mapped.keys() - {*columns}:
        raise BadRecord(f"{source}: '{min(unknown)}' is not one of our columns {', '.join(columns)}")
    there = columns_of(source)
    if absent := set(mapped.values()) - {*there}:
        raise BadRecord(f"{source}: there is no column '{min(absent)}', only {', '.join(there)}")
    return mapped


def _rows(source: epath.PathLike, columns: Sequence[str] | None) -> Iterator[tuple[str, dict]]:
    place, _ = _parts(source)
    if is_tfds(place):
        yield from tfds_rows.read(place, columns)
        return
    for path in _files(place):
        yield from file_rows.read(path, columns)


def _files(place: str) -> list[epath.Path]:
    """The file, or the shards of a folder."""
    path = paths.given(place)
    if path.is_dir():
        return _shards(path)
    if "?" in path.name and not path.exists():
        raise BadRecord(f"{place}: not there, and not of the form FILE?OURS=THEIRS&..., as FILE?prompt=question")
    return [path]


def _shards(folder: epath.Path) -> list[epath.Path]:
    shards = sorted((path for path in folder.iterdir() if _SHARD.fullmatch(path.name)), key=lambda path: path.name)
    if not shards:
        raise BadRecord(f"{folder}: a folder without *.jsonl, *.parquet or *.arrow; give a file, or a folder of shards")
    kinds = sorted({re.sub(r"\d+", "N", path.name) for path in shards})
    if len(kinds) > 1:
        raise BadRecord(
            f"{folder}: holds different files ({', '.join(kinds)}); give one file, or a folder with the shards of one"
        )
    whole = re.search(r"-of-0*(\d+)", shards[0].name)
    if whole and int(whole[1]) != len(shards):
        raise BadRecord(f"{folder}: {len(shards)} of {whole[1]} shards are there; fetch the others")
    return shards
