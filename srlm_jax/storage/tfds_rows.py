"""The rows of a data set of TensorFlow Datasets, called "tfds:NAME[/CONFIG][:SPLIT]".

Without a split it is "train". It has been prepared as array_record, in TFDS's own folder (TFDS_DATA_DIR sets another);
TensorFlow is not needed.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from etils import epath

from srlm_jax.errors import MissingExtra
from srlm_jax.storage import file_rows
from srlm_jax.storage.file_rows import ADVICE
from srlm_jax.storage.jsonl import BadRecord

_SOURCE = re.compile(r"tfds:(?P<name>[^:?]+)(?::(?P<split>[^?]+))?")


def read(source: str, columns: Sequence[str] | None) -> Iterator[tuple[str, dict]]:
    """("tfds:NAME: row n", row) for every row, with those of `columns` that it has; None for all of them.

    Raises:
      BadRecord: the data set is not there, or a row is broken.
      MissingExtra: the extra `data` is not installed.
    """
    builder, split = _builder(source), _match(source)["split"] or "train"
    there = [name for name in builder.info.features if columns is None or name in columns]
    try:
        examples = builder.as_data_source(split)
    except (ValueError, KeyError, NotImplementedError) as error:
        splits = ", ".join(sorted(builder.info.splits))
        raise BadRecord(
            f"{source}: {str(error).strip().splitlines()[0]} It has the splits {splits}, "
            f"in files of {builder.info.file_format.value}; only array_record can be read"
        ) from error
    for number in range(len(examples)):
        example, where = examples[number], f"{source}: row {number + 1}"
        try:
            yield where, {name: file_rows.plain(example[name]) for name in there}
        except UnicodeDecodeError as error:
            raise BadRecord(f"{where}: not UTF-8 text: {error}; {ADVICE}") from error


def columns(source: str) -> list[str]:
    """The columns of the data set; raises what `read` does."""
    return sorted(_builder(source).info.features)


def files(source: str) -> list[epath.Path]:
    """The files of the data set with all its splits; raises what `read` does."""
    folder = epath.Path(_builder(source).data_path)
    return sorted(path for path in folder.iterdir() if not path.is_dir())


def _match(source: str) -> re.Match:
    match = _SOURCE.fullmatch(source)
    if match is None:
        raise BadRecord(f"{source}: not of the form tfds:NAME[/CONFIG][:SPLIT][?OURS=THEIRS&...]")
    return match


def _builder(source: str) -> Any:
    """The builder of a data set that is prepared already; nothing is downloaded or prepared."""
    match = _match(source)
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
        raise BadRecord(f"{source}: {str(error).strip().splitlines()[0]} {advice}") from error
    if not builder.is_prepared():
        raise BadRecord(f"{source}: not in {builder.data_path}; {advice}")
    return builder
