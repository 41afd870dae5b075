"""From records of token ids to batches: examples and preference pairs, padded or packed, as grain pipelines.

Grain's iterators know where they are: their state is saved with the train state, and a restored one goes on with the
batch that would have come next. A thread makes the next batches while the devices are busy; the state is that of the
batch last taken.

Padded, a document has a row to itself and rows are as long as the longest. Packed, documents share rows (`packing`):
the same examples in a batch and the same loss, in fewer positions. The two answers of a pair can also share the tokens
of their prompt (`model.folding`). Packed pairs do so where it saves a tenth of all positions or more, because attention
has to undo it in every layer.

Every process of a job draws the same batches, rows of all processes together. The mesh says which process holds which
rows (`parallel.hosts.spread`), so that no batch depends on the number of processes.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import grain
import jax
import numpy as np

from srlm_jax.data.packing import Lot, Packing, RowTooLong, Shape, pack
from srlm_jax.errors import BadInput
from srlm_jax.model.folding import Folding

# One thread makes batches, and two are ready: a step takes much longer than a batch.
AHEAD = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)

_WORTH = 0.9  # of the positions, at most, for sharing tokens to pay


class TokenBatch(NamedTuple):
    """Rows of tokens. `targets_BT` is `tokens_BT` one step on; the loss is where `mask_BT` is 1."""

    tokens_BT: jax.Array
    targets_BT: jax.Array
    mask_BT: jax.Array
    positions_BT: jax.Array  # in the token's own document
    segments_BT: jax.Array | None  # the number of the token's document, from 1, and 0 for padding; None: row B's is B
    folding: Folding | None = None  # where documents share tokens; a shared token has the number of one

    @property
    def documents(self) -> jax.Array | Folding | None:
        """The documents of each row, as the model takes them."""
        return self.segments_BT if self.folding is None else self.folding


class PairBatch(NamedTuple):
    """P preference pairs, and the reference's log-probabilities of them, summed over tokens.

    Of a microbatch's documents the chosen answers come first, then the rejected ones in the same order.
    """

    rows: TokenBatch
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

    @property
    def shared(self) -> int:
        """How many positions the two answers can share: the same tokens at the beginning of their prompts. The prompt's
        last token is not shared, because its target differs."""
        most = min(self.chosen.loss_from, self.rejected.loss_from) - 1
        same = zip(self.chosen.ids[:most], self.rejected.ids[:most], strict=False)
        return next((i for i, (one, other) in enumerate(same) if one != other), max(most, 0))

    @property
    def length(self) -> int:
        """How many positions both answers take in a row."""
        return self.chosen.length + self.rejected.length

    @property
    def folded_length(self) -> int:
        """How many positions both answers take in a row where they share their prompt."""
        return self.length - self.shared


def padded_length(lengths: Sequence[int], multiple: int) -> int:
    """The smallest multiple that holds the longest row: the sequence length of a batch of such rows."""
    return -(-max(lengths) // multiple) * multiple


def token_batch(rows: Sequence[Row], length: int) -> TokenBatch:
    """Rows side by side, padded on the right to `length` positions, as numpy arrays."""
    columns = [_padded(row, length) for row in rows]
    stacked = {name: np.stack([column[name] for column in columns]) for name in columns[0]}
    shape = stacked["tokens"].shape
    positions = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    # Padding lies to the right of every token, so causal attention alone keeps it out.
    return TokenBatch(stacked["tokens"], stacked["targets"], stacked["mask"], positions, None)


def _columns(row: Row) -> dict[str, np.ndarray]:
    ids = np.asarray(row.ids, np.int32)
    mask = (np.arange(1, len(ids)) >= row.loss_from).astype(np.float32)
    return {"tokens": ids[:-1], "targets": ids[1:], "mask": mask}


def microbatches(batch: TokenBatch | PairBatch, accumulate: int) -> list[TokenBatch | PairBatch]:
    """The microbatches of a batch: row i is of microbatch i % accumulate, see `train.step`."""
    return [jax.tree.map(lambda x, i=i: x[i::accumulate], batch) for i in range(accumulate)]


def unpacked(batch: TokenBatch) -> list[Row]:
    """The documents of one microbatch (numpy arrays) as rows of their own, in the order of their numbers."""
    if batch.segments_BT is None:
        # Padding is behind the last target that carries the loss, and the loss is on a row's last tokens.
        ends = [int(np.max(np.flatnonzero(mask_T), initial=0)) + 1 for mask_T in batch.mask_BT]
        places = [(b, np.arange(end)) for b, end in enumerate(ends)]
    elif batch.folding is None:
        segments, tokens = batch.segments_BT, np.arange(batch.segments_BT.shape[1])
        places = _by_document(segments, np.broadcast_to(tokens, segments.shape))
    else:
        places = _by_document(batch.folding.segments_BU, batch.folding.source_BU)
    rows = []
    for b, at in places:
        ids = (*batch.tokens_BT[b, at].tolist(), int(batch.targets_BT[b, at[-1]]))
        rows.append(Row(ids, len(ids) - int(batch.mask_BT[b, at].sum())))
    return rows


def _by_document(segments: np.ndarray, source: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """The row of each document and the places of its tokens there."""
    places = {}
    for b, of_row in enumerate(segments):
        places |= {int(number): (b, source[b, of_row == number]) for number in np.unique(of_row) if number}
    return [places[number] for number in sorted(places)]


def _padded(row: Row, length: int) -> dict[str, np.ndarray]:
    if row.length > length:
        raise RowTooLong(f"a row of {row.length} positions does not fit a sequence length of {length}")
    return {name: np.pad(x, (0, length - row.length)) for name, x in _columns(row).items()}


def _batches(rows: Sequence, batch_size: int, seed: int, make) -> grain.IterDataset:
    """`make(rows of a batch)` for the rows in a new random order each epoch, without end."""
    if not rows:
        raise BadInput("there are no rows to train on")
    dataset = grain.MapDataset.source(rows).seed(seed).shuffle().repeat()
    return dataset.batch(batch_size, batch_fn=make).to_iter_dataset(AHEAD)


def padded_batches(rows: Sequence[Row], length: int, batch_size: int, seed: int) -> grain.IterDataset:
    """Batches of `batch_size` rows, one document each: the paper's notion of a batch."""
    return _batches(rows, batch_size, seed, lambda batch: token_batch(batch, length))


def padded_pairs(pairs: Sequence[PairRow], length: int, batch_size: int, seed: int) -> grain.IterDataset:
    """Batches of `batch_size` preference pairs, one answer a row."""
    return _batches(pairs, batch_size, seed, lambda batch: pair_batch(batch, length))


def pair_batch(pairs: Sequence[PairRow], length: int) -> PairBatch:
    """Pairs as numpy arrays, one answer a row."""
    return PairBatch(token_batch(documents(pairs), length), *_references(pairs))


def documents(pairs: Sequence[PairRow]) -> list[Row]:
    """The chosen answers, then the rejected ones."""
    return [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]


def _references(pairs: Sequence[PairRow]) -> tuple[np.ndarray, np.ndarray]:
    chosen, rejected = zip(*[(pair.ref_chosen, pair.ref_rejected) for pair in pairs], strict=True)
    return np.asarray(chosen, np.float32), np.asarray(rejected, np.float32)


def packed_batch(documents: Sequence[Row], groups: Sequence[Sequence[int]], shape: Shape) -> TokenBatch:
    """Rows that hold the documents of one group each, by their indices, and empty ones up to `shape`, as numpy
    arrays."""
    types = (np.int32, np.int32, np.float32, np.int32, np.int32)
    batch = TokenBatch(*(np.zeros(shape, dtype) for dtype in types))
    for row, group in enumerate(groups):
        end = 0
        for index in group:
            document = documents[index]
            here = np.s_[row, end : (end := end + document.length)]
            columns = _columns(document)
            batch.tokens_BT[here], batch.targets_BT[here] = columns["tokens"], columns["targets"]
            batch.mask_BT[here], batch.positions_BT[here] = columns["mask"], np.arange(document.length)
            batch.segments_BT[here] = 1 + index
    return batch


def filled_batches(rows: Sequence[Row], length: int, batch_size: int, seed: int) -> grain.IterDataset:
    """Batches of `batch_size` rows of `length` positions, each filled with as many documents as fit, for a training
    that does not count documents."""
    groups = pack([row.length for row in rows], length)
    shape = Shape(batch_size, length)
    return _batches(groups, batch_size, seed, lambda batch: packed_batch(rows, batch, shape))


def packed_batches(rows: Sequence[Row], packing: Packing, steps: int) -> grain.IterDataset:
    """So many batches of documents, each of which is an example of `packing`."""
    shape = packing.smallest_shape(steps)
    return _packed(shape, packing, steps, lambda lot: packed_batch([rows[i] for i in lot.examples], lot.rows, shape))


def packed_pairs(pairs: Sequence[PairRow], packing: Packing, steps: int) -> grain.IterDataset:
    """So many batches of preference pairs, for which `packing.lengths` has the chosen answer and the rejected one."""
    shape = packing.smallest_shape(steps)
    folded = dataclasses.replace(packing, lengths=np.asarray([[pair.folded_length] for pair in pairs]))
    folded_shape = folded.smallest_shape(steps)
    if math.prod(folded_shape) <= _WORTH * math.prod(shape):
        return _folded_pairs(pairs, folded_shape, folded, steps)

    def make(lot: Lot) -> PairBatch:
        own = [pairs[i] for i in lot.examples]
        return PairBatch(packed_batch(documents(own), lot.rows, shape), *_references(own))

    return _packed(shape, packing, steps, make)


def worth_folding(pairs: Sequence[PairRow]) -> bool:
    """Whether so many tokens are shared that their copies for attention cost less than they save."""
    return sum(pair.folded_length for pair in pairs) <= _WORTH * sum(pair.length for pair in pairs)


def _folded_pairs(pairs: Sequence[PairRow], shape: Shape, packing: Packing, steps: int) -> grain.IterDataset:
    lots = [lot for epoch in range(packing.epochs(steps)) for step in packing.epoch(epoch, shape) for lot in step]
    rows = [[pairs[lot.examples[index]] for index in row] for lot in lots for row in lot.rows]
    unfolded = unfolded_length(rows, packing.length_multiple)

    def make(lot: Lot) -> PairBatch:
        own = [pairs[i] for i in lot.examples]
        return PairBatch(folded_batch(own, lot.rows, shape, unfolded), *_references(own))

    return _packed(shape, packing, steps, make)


def unfolded_length(rows: Sequence[Sequence[PairRow]], multiple: int) -> int:
    """The positions of rows in which the pairs of each of these are unfolded."""
    return padded_length([sum(pair.length for pair in row) for row in rows], multiple)


def folded_batch(pairs: Sequence[PairRow], groups: Sequence[Sequence[int]], shape: Shape, unfolded: int) -> TokenBatch:
    """Rows that hold the pairs of one group each, by their indices, the prompt of each once; `unfolded` positions of a
    row when each answer has its prompt again. As numpy arrays."""
    batch = packed_batch((), (), shape)
    wide = (shape.rows, unfolded)
    folding = Folding(
        source_BU=np.zeros(wide, np.int32),
        first_BT=np.full(shape, -1, np.int32),
        second_BT=np.full(shape, -1, np.int32),
        segments_BU=np.zeros(wide, np.int32),
    )
    for row, group in enumerate(groups):
        end, end_unfolded = 0, 0
        for index in group:
            prompt, start = np.arange(end, end + pairs[index].shared), 0
            for number, document in enumerate((pairs[index].chosen, pairs[index].rejected)):
                segment = 1 + number * len(pairs) + index
                # The second answer starts behind the prompt, whose tokens the first one brought.
                own = np.arange(end, end := end + document.length - start)
                source = own if number == 0 else np.concatenate([prompt, own])
                there = np.arange(end_unfolded, end_unfolded := end_unfolded + document.length)
                columns = {name: column[start:] for name, column in _columns(document).items()}
                batch.tokens_BT[row, own], batch.targets_BT[row, own] = columns["tokens"], columns["targets"]
                batch.mask_BT[row, own] = columns["mask"]
                batch.positions_BT[row, own] = np.arange(start, document.length)
                batch.segments_BT[row, own] = segment
                folding.source_BU[row, there] = source
                folding.segments_BU[row, there] = segment
                folding.first_BT[row, own] = there[start:]
                if number == 1:
                    folding.second_BT[row, prompt] = there[:start]
                start = len(prompt)
    return batch._replace(folding=folding)


def _packed(shape: Shape, packing: Packing, steps: int, make) -> grain.IterDataset:
    epoch = functools.lru_cache(maxsize=2)(lambda index: packing.epoch(index, shape))

    def batch(step: int) -> TokenBatch | PairBatch:
        microbatches = [make(lot) for lot in epoch(step // packing.batches)[step % packing.batches]]
        # Row i of the whole goes to microbatch i % accumulate: see `train.step`.
        return jax.tree.map(lambda *parts: np.stack(parts, axis=1).reshape(-1, *parts[0].shape[1:]), *microbatches)

    return grain.MapDataset.range(steps).map(batch).to_iter_dataset(AHEAD)
