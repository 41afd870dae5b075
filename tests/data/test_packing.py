"""Which documents share rows: nothing is lost, nothing doubled, and hardly a position wasted."""

import collections

import numpy as np
import pytest

from srlm_jax.data.packing import Packing, RowTooLong, Shape, deal, pack, pack_into


def test_packing_by_hand():
    # 6 and 5 open a row each; 3 fits the second exactly, and 2 the first.
    lengths = [3, 6, 2, 5]
    assert [[lengths[i] for i in group] for group in pack(lengths, 8)] == [[6, 2], [5, 3]]


def test_a_document_that_is_too_long_is_refused():
    assert pack([8], 8) == [[0]]
    with pytest.raises(RowTooLong, match="a document of 9 positions does not fit a sequence length of 8"):
        pack([3, 9], 8)


@pytest.mark.parametrize("seed", range(5))
def test_packing_keeps_every_document_once_and_wastes_less_than_half_a_row(seed):
    lengths = np.random.default_rng(seed).integers(1, 21, 200).tolist()
    groups = pack(lengths, 32)
    filled = [sum(lengths[i] for i in group) for group in groups]
    assert max(filled) <= 32
    assert sorted(i for group in groups for i in group) == list(range(200))
    # No two rows could be one, so all but one are more than half full; best fit does far better on such documents.
    assert sum(sorted(filled)[:2]) > 32
    assert len(groups) <= 1.05 * sum(filled) / 32 + 1


def test_rows_are_filled_where_best_fit_takes_one_too_many():
    lengths = [2, 5, 2, 4, 3, 4]
    together = lambda groups: sorted(sorted(lengths[i] for i in group) for group in groups)
    assert together(pack(lengths, 10)) == [[2], [2, 3, 4], [4, 5]]
    assert together(pack_into(lengths, Shape(2, 10))) == [[2, 3, 5], [2, 4, 4]]


def test_what_cannot_fit_does_not():
    assert pack_into([5, 5, 5], Shape(1, 14)) is None  # too many positions
    assert pack_into([6, 6, 6], Shape(2, 10)) is None  # enough, and no two share a row


def test_lots_are_alike_in_size_and_dealt_by_chance():
    sizes = np.random.default_rng(0).lognormal(6, 0.6, 1_000).astype(int)
    one, same, other = (deal(sizes, 62, 16, np.random.default_rng(seed)) for seed in (1, 1, 2))
    totals = sizes[one].sum(axis=1)
    assert totals.max() - totals.min() <= 0.01 * totals.max()
    assert len(set(one.reshape(-1).tolist())) == 62 * 16
    np.testing.assert_array_equal(one, same)
    # Who is in a lot with whom is new each time: of 7,440 pairs about 115 are together again.
    together = [{(i, j) for lot in x.tolist() for i in lot for j in lot if i < j} for x in (one, other)]
    assert len(together[0]) == 62 * 120
    assert len(together[0] & together[1]) < 250


def answers(rng, mean, sigma, most, n):
    """Lengths in tokens, lognormal."""
    return np.clip(rng.lognormal(np.log(mean) - sigma**2 / 2, sigma, n), 1, most).astype(int)


@pytest.mark.parametrize(("pairs", "steps"), [(16, 400), (64, 100)])
@pytest.mark.parametrize("known", [300, 6_000])
@pytest.mark.parametrize("seed", range(3))
def test_pairs_waste_few_positions(pairs, steps, known, seed):
    """Prompts of 80 tokens and answers of 400 on average, as long as the configuration lets them be."""
    rng = np.random.default_rng(seed)
    prompt = answers(rng, 80, 0.5, 192, known)
    lengths = np.stack([prompt + answers(rng, 400, 0.6, 1_024, known) for _ in range(2)], axis=1)
    packing = Packing(
        lengths=lengths, batch_size=pairs, accumulate=1, most=2_048, length_multiple=128, rows_multiple=1, seed=seed
    )
    shape = packing.smallest_shape(steps)
    assert lengths.max() <= shape.length <= 2_048 and shape.length % 128 == 0
    batches = packing.epoch(0, shape)
    seen = collections.Counter(i for (lot,) in batches for i in lot.examples.tolist())
    assert len(batches) == known // pairs and seen.total() == pairs * len(batches) == len(seen)
    filled = np.mean([lengths[lot.examples].sum() for (lot,) in batches])
    assert 1 - filled / (shape.rows * shape.length) <= 0.05
    assert 1 - filled / (2 * pairs * lengths.max()) > 0.5  # what is lost where each answer has a row


def test_microbatches_are_packed_apart_into_rows_that_all_devices_share():
    lengths = np.random.default_rng(0).integers(1, 60, (50, 1))
    packing = Packing(
        lengths=lengths, batch_size=12, accumulate=3, most=64, length_multiple=16, rows_multiple=4, seed=0
    )
    shape = packing.smallest_shape(10)
    assert shape.rows % 4 == 0
    for index in range(3):
        epoch = packing.epoch(index, shape)
        assert [len(batch) for batch in epoch] == [3] * 4
        for lot in (lot for batch in epoch for lot in batch):
            assert len(lot.examples) == 4 and len(lot.rows) <= shape.rows
            own = lengths[lot.examples, 0]
            assert sorted(i for row in lot.rows for i in row) == [0, 1, 2, 3]
            assert all(own[row].sum() <= shape.length for row in lot.rows)


def test_a_row_is_longer_than_asked_where_a_document_is():
    packing = Packing(
        lengths=np.array([[70], [5]]), batch_size=1, accumulate=1, most=64, length_multiple=16, rows_multiple=1, seed=0
    )
    assert packing.smallest_shape(2) == Shape(1, 80)
