"""Which documents share a row, and which examples a batch.

Only lengths are known here, in positions; what they are the lengths of is named by its index.
"""

import bisect
import dataclasses
import heapq
import math
import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from srlm_jax.errors import UserError

FILLINGS = 8  # tries to fill rows at random where best fit takes too many of them
DEALS = 4  # tries to deal an epoch's examples so that all of its batches fit


class RowTooLong(UserError, ValueError):
    """A row needs more positions than a batch has."""


class Shape(NamedTuple):
    """Of an array of tokens."""

    rows: int
    length: int  # positions of a row


# --- documents into rows ----------------------------------------------------------------------------------------------


def pack(lengths: Sequence[int], length: int) -> list[list[int]]:
    """Documents grouped so that each group fits `length` positions, by best fit, longest first; each by its index.

    Raises:
      RowTooLong: a document does not fit.
    """
    groups: list[list[int]] = []
    # The groups by the room that is left in each, ascending; of those with the same room the youngest comes first.
    rooms: list[int] = []
    by_room: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        size = lengths[index]
        if size > length:
            raise RowTooLong(f"a document of {size} positions does not fit a sequence length of {length}")
        at = bisect.bisect_left(rooms, size)
        if at < len(rooms):
            room, group = rooms.pop(at), by_room.pop(at)
        else:
            room, group = length, []
            groups.append(group)
        group.append(index)
        at = bisect.bisect_left(rooms, room - size)
        rooms.insert(at, room - size)
        by_room.insert(at, group)
    return groups


def pack_into(lengths: Sequence[int], shape: Shape) -> list[list[int]] | None:
    """As `pack`, into no more rows than the shape has; None where no way was found.

    Best fit leaves rows of few documents too empty, so they are then filled one after the other, each as far as it
    goes. Many sets of documents fill a row alike: a few random choices among them are tried.
    """
    if sum(lengths) > shape.rows * shape.length:
        return None
    groups, chance = pack(lengths, shape.length), random.Random(0)
    for _ in range(FILLINGS):
        if len(groups) <= shape.rows:
            return groups
        groups = _fill(lengths, shape.length, chance)
    return None


def _fill(lengths: Sequence[int], length: int, chance: random.Random) -> list[list[int]]:
    """The longest document that is left opens a row, and those of the others join it that together fill it most."""
    left, groups = sorted(range(len(lengths)), key=lambda index: lengths[index]), []
    while left:
        group = [left.pop()]
        room = length - lengths[group[0]]
        fitting = [index for index in left if lengths[index] <= room]
        chance.shuffle(fitting)
        # Bit s of reached[i] says that some of the first i fill exactly s positions.
        reached = [1]
        for index in fitting:
            reached.append((reached[-1] | reached[-1] << lengths[index]) & (2 << room) - 1)
        filled = reached[-1].bit_length() - 1
        for index, before in zip(reversed(fitting), reversed(reached[:-1]), strict=True):
            if filled >= lengths[index] and before >> filled - lengths[index] & 1:
                filled -= lengths[index]
                group.append(index)
                left.remove(index)
        groups.append(group)
    return groups


# --- examples into batches --------------------------------------------------------------------------------------------


def deal(sizes: np.ndarray, lots: int, count: int, chance: np.random.Generator) -> np.ndarray:
    """Examples dealt at random into lots of `count` that are nearly of the same size: [lots, count] indices, each once.

    The fullest lot and the emptiest exchange an example each, again and again, until they differ by a hundredth or no
    exchange brings them closer.
    """
    dealt = chance.permutation(len(sizes))[: lots * count].reshape(lots, count)
    totals = sizes[dealt].sum(axis=1)
    while True:
        most, least = int(totals.argmax()), int(totals.argmin())
        gap = totals[most] - totals[least]
        moved = sizes[dealt[most]][:, None] - sizes[dealt[least]][None]
        i, j = np.unravel_index(np.abs(2 * moved - gap).argmin(), moved.shape)
        if 100 * gap <= totals[most] or not 0 < moved[i, j] < gap:
            return dealt
        dealt[most, i], dealt[least, j] = dealt[least, j], dealt[most, i]
        totals[most] -= moved[i, j]
        totals[least] += moved[i, j]


@dataclasses.dataclass(frozen=True)
class Lot:
    """The examples of a microbatch and the rows that their documents share.

    Document d of the k-th of n examples has the number d * n + k, by which the rows name it.
    """

    examples: np.ndarray
    rows: list[list[int]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Packing:
    """How a training packs its examples, of which every update has the same number."""

    lengths: np.ndarray  # of each example's documents, [examples, documents]
    batch_size: int  # examples of an update
    accumulate: int  # microbatches of an update, which share no rows
    most: int  # positions of a row, unless a document needs more
    length_multiple: int  # of a row's positions
    rows_multiple: int  # of a microbatch's rows: the devices that share them evenly
    seed: int

    @property
    def batches(self) -> int:
        """Of an epoch."""
        return len(self.lengths) // self.batch_size

    def epochs(self, steps: int) -> int:
        """How many epochs so many updates reach into."""
        return math.ceil(steps / self.batches)

    def epoch(self, epoch: int, shape: Shape) -> list[list[Lot]] | None:
        """Every batch of an epoch as its microbatches, each of which fits `shape`; None where no way was found.

        No example comes twice. Those that are left over, at random and fewer than a batch, wait for another epoch.
        """
        count, sizes = self.batch_size // self.accumulate, self.lengths.sum(axis=1)
        for attempt in range(DEALS):
            chance, lots = np.random.default_rng((self.seed, epoch, attempt)), []
            for examples in deal(sizes, self.batches * self.accumulate, count, chance):
                if (rows := pack_into(self.lengths[examples].T.reshape(-1).tolist(), shape)) is None:
                    break
                lots.append(Lot(examples, rows))
            else:
                return [lots[i : i + self.accumulate] for i in range(0, len(lots), self.accumulate)]
        return None

    def smallest_shape(self, steps: int) -> Shape:
        """Of a microbatch: the one with the fewest positions that all microbatches of so many updates fit."""
        epochs = range(self.epochs(steps))
        return next(shape for shape in self._shapes() if all(self.epoch(i, shape) is not None for i in epochs))

    def _shapes(self) -> Iterator[Shape]:
        """All with room for a microbatch, the smallest first; of two with as many positions the one of shorter rows."""
        total = self.lengths.sum() / len(self.lengths) * self.batch_size / self.accumulate
        shortest = math.ceil(self.lengths.max() / self.length_multiple) * self.length_multiple
        waiting = []
        for length in range(shortest, max(shortest, self.most) + 1, self.length_multiple):
            rows = math.ceil(total / length / self.rows_multiple) * self.rows_multiple
            waiting.append((rows * length, length, rows))
        heapq.heapify(waiting)
        while True:
            _, length, rows = waiting[0]
            yield Shape(rows, length)
            rows += self.rows_multiple
            heapq.heapreplace(waiting, (rows * length, length, rows))
