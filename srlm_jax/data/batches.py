"""From records of token ids to batches: padded rows, packed rows and pairs, as grain pipelines.

Grain's iterators know where they are: their state is saved with the train state, and a restored one goes on with the
batch that would have come next.

Every process of a job draws the same batches, rows of all processes together: which rows are whose is the mesh's
affair (`parallel.hosts.spread`), so no batch depends on how many processes there are.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import grain
import jax
import numpy as np


class TokenBatch(NamedTuple):
    """Rows of tokens. `targets_BT` is `tokens_BT` one step on; the loss is where `mask_BT` is 1."""

    tokens_BT: jax.Array
    targets_BT: jax.Array
    mask_BT: jax.Array
    positions_BT: jax.Array  # in the token's own document
    segments_BT: jax.Array  # which document of a packed row


class PairBatch(NamedTuple):
    """P preference pairs, and the reference's log-probabilities of them, summed over tokens."""

    chosen: TokenBatch
    rejected: TokenBatch
    ref_chosen_P: jax.Array
    ref_rejected_P: jax.Array


@dataclasses.dataclass(frozen=True)
class Row:
    """Token ids of one document; the loss is on `ids[loss_from:]`."""

    ids: tuple[int, ...]
    loss_from: int

    @property
    def length(self) -> int:
        """How many positions the row takes in a batch: its last token is only ever a target."""
        return len(self.ids) - 1


@dataclasses.dataclass(frozen=True)
class PairRow:
    """The chosen and the rejected row of a preference pair, with the reference's log-probability of each."""

    chosen: Row
    rejected: Row
    ref_chosen: float
    ref_rejected: float


class RowTooLong(ValueError):
    """A row needs more positions than a batch has."""


def padded_length(lengths: Sequence[int], multiple: int) -> int:
    """The smallest multiple that holds the longest row: the sequence length of a batch of such rows."""
    return -(-max(lengths) // multiple) * multiple


def token_batch(rows: Sequence[Row], length: int) -> TokenBatch:
    """Rows side by side, padded on the right to `length` positions, as numpy arrays."""
    columns = [_padded(row, length) for row in rows]
    stacked = {name: np.stack([column[name] for column in columns]) for name in columns[0]}
    shape = stacked["tokens"].shape
    positions = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    # Padding lies to the right of every token, so causal attention alone keeps it out: one segment a row.
    return TokenBatch(stacked["tokens"], stacked["targets"], stacked["mask"], positions, np.zeros(shape, np.int32))


def _columns(row: Row) -> dict[str, np.ndarray]:
    ids = np.asarray(row.ids, np.int32)
    mask = (np.arange(1, len(ids)) >= row.loss_from).astype(np.float32)
    return {"tokens": ids[:-1], "targets": ids[1:], "mask": mask}


def _padded(row: Row, length: int) -> dict[str, np.ndarray]:
    if row.length > length:
        raise RowTooLong(f"a row of {row.length} positions does not fit a sequence length of {length}")
    return {name: np.pad(x, (0, length - row.length)) for name, x in _columns(row).items()}


def _shuffled(rows: Sequence, seed: int) -> grain.MapDataset:
    """The rows in a new random order each epoch, without end."""
    if not rows:
        raise ValueError("there are no rows to train on")
    return grain.MapDataset.source(rows).seed(seed).shuffle().repeat()


def padded_batches(rows: Sequence[Row], length: int, batch_size: int, seed: int) -> grain.IterDataset:
    """Batches of `batch_size` rows, one document each: the paper's notion of a batch."""
    dataset = _shuffled(rows, seed).to_iter_dataset()
    return dataset.batch(batch_size, batch_fn=lambda batch: token_batch(batch, length))


def pack(rows: Sequence[Row], length: int) -> list[tuple[Row, ...]]:
    """Documents grouped so that each group fits `length` positions, by best fit, longest first.

    Raises:
      RowTooLong: a document does not fit.
    """
    open_by_room: list[list[list[Row]]] = [[] for _ in range(length + 1)]
    groups: list[list[Row]] = []
    for row in sorted(rows, key=lambda row: -row.length):
        if row.length > length:
            raise RowTooLong(f"a document of {row.length} positions does not fit a sequence length of {length}")
        room = next((room for room in range(row.length, length + 1) if open_by_room[room]), None)
        group = open_by_room[room].pop() if room is not None else []
        if room is None:
            groups.append(group)
        group.append(row)
        open_by_room[(length if room is None else room) - row.length].append(group)
    return [tuple(group) for group in groups]


def _packed(group: tuple[Row, ...], length: int) -> dict[str, np.ndarray]:
    columns = [_columns(row) for row in group]
    joined = {name: np.concatenate([column[name] for column in columns]) for name in columns[0]}
    joined["positions"] = np.concatenate([np.arange(row.length, dtype=np.int32) for row in group])
    # Padding gets a segment of its own, 0.
    joined["segments"] = np.concatenate([np.full(row.length, i, np.int32) for i, row in enumerate(group, start=1)])
    return {name: np.pad(x, (0, length - len(x))) for name, x in joined.items()}


def packed_batch(groups: Sequence[tuple[Row, ...]], length: int) -> TokenBatch:
    """Rows of `length` positions, each holding the documents of one group, as numpy arrays."""
    columns = [_packed(group, length) for group in groups]
    names = ("tokens", "targets", "mask", "positions", "segments")
    return TokenBatch(*(np.stack([column[name] for column in columns]) for name in names))


def packed_batches(rows: Sequence[Row], length: int, batch_size: int, seed: int) -> grain.IterDataset:
    """Batches of `batch_size` rows of `length` positions, each filled with as many documents as fit."""
    groups = pack(rows, length)
    dataset = _shuffled(groups, seed).to_iter_dataset()
    return dataset.batch(batch_size, batch_fn=lambda batch: packed_batch(batch, length))


def pair_batches(pairs: Sequence[PairRow], length: int, batch_size: int, seed: int) -> grain.IterDataset:
    """Batches of `batch_size` preference pairs."""

    def to_batch(rows: Sequence[PairRow]) -> PairBatch:
        return PairBatch(
            token_batch([row.chosen for row in rows], length),
            token_batch([row.rejected for row in rows], length),
            np.asarray([row.ref_chosen for row in rows], np.float32),
            np.asarray([row.ref_rejected for row in rows], np.float32),
        )

    return _shuffled(pairs, seed).to_iter_dataset().batch(batch_size, batch_fn=to_batch)
