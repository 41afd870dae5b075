"""Where the loss is, what shares a row, and that a data iterator goes on where it was."""

import itertools
import math
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from srlm_jax.data.batches import (
    PairRow,
    Row,
    filled_batches,
    folded_batch,
    packed_batch,
    packed_batches,
    packed_pairs,
    padded_batches,
    padded_length,
    padded_pairs,
    token_batch,
)
from srlm_jax.data.packing import Packing, RowTooLong, Shape, pack
from srlm_jax.text.chat import PLAIN, encode_prompt, encode_response
from srlm_jax.text.tokenizer import WordTokenizer
from srlm_jax.train.objectives import SftObjective

# begin, user:, hi, \n, assistant: | hello, end
PROMPT, RESPONSE = (1, 4, 5, 6, 7), (8, 2)


def documents(count, longest, seed=0):
    rng = np.random.default_rng(seed)
    return [Row(tuple(rng.integers(3, 40, n).tolist()), 1) for n in rng.integers(2, longest + 2, count)]


def lists(arrays):
    return [np.asarray(x).tolist() for x in arrays if x is not None]


def test_targets_are_the_tokens_one_step_on_and_the_loss_is_on_the_response_and_its_end():
    batch = token_batch([Row(PROMPT + RESPONSE, len(PROMPT))], 8)
    assert batch.tokens_BT.tolist() == [[1, 4, 5, 6, 7, 8, 0, 0]]
    assert batch.targets_BT.tolist() == [[4, 5, 6, 7, 8, 2, 0, 0]]
    assert batch.mask_BT.tolist() == [[0, 0, 0, 0, 1, 1, 0, 0]]
    assert batch.positions_BT.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7]]


def test_the_loss_of_an_encoded_exchange_is_on_exactly_the_tokens_of_its_response():
    tokenizer = WordTokenizer(("user:", "assistant:", "\n", "hi", "hello", "there"))
    prompt, response = (
        encode_prompt(tokenizer, PLAIN, "hi there"),
        encode_response(tokenizer, PLAIN, "hello there", finished=True),
    )
    batch = token_batch([Row(tuple(prompt + response), len(prompt))], 12)
    learnt = batch.targets_BT[batch.mask_BT == 1].tolist()
    assert learnt == response
    assert learnt[-1] == tokenizer.eos
    assert tokenizer.decode(learnt) == "hello there"


def test_a_document_without_a_prompt_is_learnt_from_its_second_token_on():
    batch = token_batch([Row((1, 5, 6, 2), 0)], 4)
    assert batch.mask_BT.tolist() == [[1, 1, 1, 0]]


def test_a_row_that_just_fits_is_taken_and_one_more_token_is_too_much():
    assert token_batch([Row(tuple(range(9)), 1)], 8).tokens_BT.shape == (1, 8)
    with pytest.raises(RowTooLong, match="a row of 9 positions does not fit a sequence length of 8"):
        token_batch([Row(tuple(range(10)), 1)], 8)


@pytest.mark.parametrize(("longest", "wanted"), [(1, 8), (8, 8), (9, 16), (16, 16)])
def test_padded_length_is_the_next_multiple(longest, wanted):
    assert padded_length([1, longest, 1], 8) == wanted


# Packing.


def test_a_packed_row_by_hand():
    batch = packed_batch([Row((1, 7, 2), 1), Row((1, 5, 6, 2), 2)], [[1, 0]], Shape(2, 7))
    assert lists(batch) == [
        [[1, 5, 6, 1, 7, 0, 0], [0] * 7],  # tokens
        [[5, 6, 2, 7, 2, 0, 0], [0] * 7],  # targets
        [[0, 1, 1, 1, 1, 0, 0], [0] * 7],  # mask
        [[0, 1, 2, 0, 1, 0, 0], [0] * 7],  # positions
        [[2, 2, 2, 1, 1, 0, 0], [0] * 7],  # segments
    ]


def test_packed_documents_have_the_loss_and_the_gradient_of_documents_in_rows_of_their_own(tiny_llama):
    rows = documents(10, 9)
    groups = pack([row.length for row in rows], 20)
    assert len(groups) < 5
    packed = packed_batch(rows, groups, Shape(len(groups), 20))
    objective = SftObjective(dropout=0.0, logprob_chunk=32)

    @jax.jit
    def run(model, batch):
        loss = lambda model: (lambda sums: (sums.loss, sums.count))(objective(model, batch, jax.random.key(0)))
        return jax.value_and_grad(loss, has_aux=True)(model)

    (loss, count), gradient = run(tiny_llama, jax.tree.map(jnp.asarray, packed))
    (one_loss, one_count), one_gradient = run(tiny_llama, jax.tree.map(jnp.asarray, token_batch(rows, 9)))
    assert count == one_count == sum(row.length for row in rows)
    np.testing.assert_allclose(loss, one_loss, rtol=1e-5)
    for one, other in zip(jax.tree.leaves(gradient), jax.tree.leaves(one_gradient), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


def test_answers_that_share_their_prompt_in_a_row_by_hand():
    # Prompts 1 4 5 and 1 6; of each all tokens but the last are shared.
    pairs = [
        PairRow(Row((1, 4, 5, 7, 2), 3), Row((1, 4, 5, 8, 9, 2), 3), 0.0, 0.0),
        PairRow(Row((1, 6, 2), 2), Row((1, 6, 3, 2), 2), 0.0, 0.0),
    ]
    assert [(pair.shared, pair.length, pair.folded_length) for pair in pairs] == [(2, 9, 7), (1, 5, 4)]
    batch = folded_batch(pairs, [[1, 0]], Shape(1, 12), 15)
    folding = batch.folding
    assert lists(batch[:5]) == [
        [[1, 6, 6, 3, 1, 4, 5, 7, 5, 8, 9, 0]],  # tokens
        [[6, 2, 3, 2, 4, 5, 7, 2, 8, 9, 2, 0]],  # targets
        [[0, 1, 1, 1, 0, 0, 1, 1, 1, 1, 1, 0]],  # mask
        [[0, 1, 1, 2, 0, 1, 2, 3, 2, 3, 4, 0]],  # positions
        [[2, 2, 4, 4, 1, 1, 1, 1, 3, 3, 3, 0]],  # segments
    ]
    assert lists((folding.source_BU, folding.first_BT, folding.second_BT, folding.segments_BU)) == [
        [[0, 1, 0, 2, 3, 4, 5, 6, 7, 4, 5, 8, 9, 10, 0]],
        [[0, 1, 3, 4, 5, 6, 7, 8, 11, 12, 13, -1]],
        [[2, -1, -1, -1, 9, 10, -1, -1, -1, -1, -1, -1]],
        [[2, 2, 4, 4, 4, 1, 1, 1, 1, 3, 3, 3, 3, 3, 0]],
    ]


def test_what_is_no_prompt_or_not_the_same_is_not_shared():
    alike = PairRow(Row((1, 4, 5, 7, 2), 2), Row((1, 4, 5, 7, 3, 2), 2), 0.0, 0.0)
    apart = PairRow(Row((1, 4, 5, 7, 2), 4), Row((1, 9, 5, 7, 2), 4), 0.0, 0.0)
    none = PairRow(Row((1, 2), 0), Row((1, 2), 1), 0.0, 0.0)
    assert [pair.shared for pair in (alike, apart, none)] == [1, 1, 0]


# Pipelines.

PAIRS = [
    PairRow(chosen, rejected, -float(i), -2.0 * i)
    for i, (chosen, rejected) in enumerate(zip(documents(7, 8), documents(7, 8, seed=1), strict=True))
]


def packing(lengths, seed, **changes):
    usual = {"batch_size": 6, "accumulate": 2, "most": 20, "length_multiple": 4, "rows_multiple": 2}
    return Packing(lengths=np.asarray(lengths), seed=seed, **usual | changes)


def with_one_prompt(length, pair):
    """Both answers of the pair after a prompt of so many tokens."""
    prompt = tuple(range(1, length + 1))
    chosen, rejected = (Row(prompt + row.ids, length) for row in (pair.chosen, pair.rejected))
    return PairRow(chosen, rejected, pair.ref_chosen, pair.ref_rejected)


LONG_PROMPTS = [with_one_prompt(9, pair) for pair in PAIRS]


def all_packed_pairs(seed, pairs=PAIRS, steps=20):
    how = packing([[pair.chosen.length, pair.rejected.length] for pair in pairs], seed)
    return packed_pairs(pairs, how, steps)


def all_packed(seed, rows, steps=20):
    how = packing([[row.length] for row in rows], seed)
    return packed_batches(rows, how, steps)


PIPELINES = {
    "padded": lambda seed: padded_batches(documents(7, 8), 8, 3, seed),
    "filled": lambda seed: filled_batches(documents(30, 8), 16, 3, seed),
    "padded pairs": lambda seed: padded_pairs(PAIRS, 8, 3, seed),
    "packed": lambda seed: all_packed(seed, documents(13, 8)),
    "packed pairs": all_packed_pairs,
    "folded pairs": lambda seed: all_packed_pairs(seed, LONG_PROMPTS),
}


def take(iterator, count):
    return [[np.asarray(leaf).tolist() for leaf in jax.tree.leaves(next(iterator))] for _ in range(count)]


@pytest.mark.parametrize("make", PIPELINES.values(), ids=PIPELINES)
def test_every_process_of_a_job_draws_the_batches_that_one_alone_would(monkeypatch, make):
    wanted = take(iter(make(0)), 5)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for number in range(2):
        monkeypatch.setattr(jax, "process_index", lambda number=number: number)
        assert take(iter(make(0)), 5) == wanted


@pytest.mark.parametrize("make", PIPELINES.values(), ids=PIPELINES)
def test_a_restored_iterator_goes_on_with_the_batch_that_would_have_come_next(make):
    iterator = iter(make(0))
    take(iterator, 5)  # past the end of an epoch, and in the middle of a row's batch
    state = iterator.get_state()
    wanted = take(iterator, 6)
    fresh = iter(make(0))
    fresh.set_state(state)
    assert take(fresh, 6) == wanted


@pytest.mark.parametrize("make", PIPELINES.values(), ids=PIPELINES)
def test_the_seed_decides_the_order(make):
    assert take(iter(make(0)), 6) == take(iter(make(0)), 6)
    assert take(iter(make(0)), 6) != take(iter(make(1)), 6)


def test_every_epoch_holds_every_row_once_in_another_order():
    rows = documents(12, 8)
    batches = iter(padded_batches(rows, 8, 4, seed=0))
    epochs = [np.concatenate([next(batches).tokens_BT for _ in range(3)]).tolist() for _ in range(3)]
    every = sorted(token_batch(rows, 8).tokens_BT.tolist())
    assert [sorted(epoch) for epoch in epochs] == [every] * 3
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def of_microbatch(batch, index, accumulate):
    """What `train.step` makes microbatch `index` of."""
    return jax.tree.map(lambda x: x[index::accumulate], batch)


def answers(rows):
    """The targets of each document of a packed batch, by its number."""
    numbers = sorted(set(rows.segments_BT.reshape(-1).tolist()) - {0})
    return {number: rows.targets_BT[rows.segments_BT == number].tolist() for number in numbers}


def whole_answers(rows):
    """As `answers`, of rows that may be folded: each answer with its prompt."""
    if rows.folding is None:
        return answers(rows)
    segments, tokens = rows.folding.segments_BU, rows.tokens_BT
    targets = np.take_along_axis(rows.targets_BT, rows.folding.source_BU, axis=1)
    opening = np.take_along_axis(tokens, rows.folding.source_BU, axis=1)
    numbers = sorted(set(segments.reshape(-1).tolist()) - {0})
    # What a shared token predicts is its document's next token, whichever answer brought it.
    found = {}
    for number in numbers:
        own, last = opening[segments == number].tolist(), targets[segments == number].tolist()[-1]
        found[number] = [*own[1:], last]
    return found


@pytest.mark.parametrize("pairs", [PAIRS, LONG_PROMPTS], ids=["short prompts", "long prompts"])
def test_the_two_answers_of_a_pair_and_their_reference_stay_together(pairs):
    by_chosen = {pair.chosen.ids[1:]: pair for pair in pairs}

    def check(chosen, rejected, *reference):
        pair = by_chosen[tuple(chosen)]
        assert tuple(rejected) == pair.rejected.ids[1:]
        assert reference == (pair.ref_chosen, pair.ref_rejected)

    for batch in itertools.islice(padded_pairs(pairs, 20, 3, seed=0), 5):
        found = [row[row != 0].tolist() for row in batch.rows.targets_BT]
        for i in range(3):
            check(found[i], found[3 + i], batch.ref_chosen_P[i], batch.ref_rejected_P[i])
    for batch in all_packed_pairs(0, pairs):
        assert (batch.rows.folding is not None) == (pairs is LONG_PROMPTS)
        for part in (of_microbatch(batch, i, 2) for i in range(2)):
            found = whole_answers(part.rows)
            assert list(found) == [1, 2, 3, 4, 5, 6]
            for i in range(3):
                check(found[1 + i], found[4 + i], part.ref_chosen_P[i], part.ref_rejected_P[i])


def test_prompts_are_shared_where_that_saves_a_tenth_of_all_positions():
    apart, shared = (next(iter(all_packed_pairs(0, pairs))).rows for pairs in (PAIRS, LONG_PROMPTS))
    assert apart.folding is None
    how = packing([[pair.chosen.length, pair.rejected.length] for pair in LONG_PROMPTS], 0)
    assert of_microbatch(shared, 0, 2).tokens_BT.size <= 0.9 * math.prod(how.smallest_shape(20))


def test_packed_batches_have_the_same_number_of_examples_and_no_example_twice_an_epoch():
    rows = [Row((1, *(30 + i for i in range(3, 3 + n % 5)), n + 2), 1) for n in range(20)]  # all different
    found = list(all_packed(0, rows, steps=9))  # three epochs of 3 x 6, two left over in each
    assert len({batch.tokens_BT.shape for batch in found}) == 1
    taken = [[tuple(x) for part in range(2) for x in answers(of_microbatch(b, part, 2)).values()] for b in found]
    assert {len(batch) for batch in taken} == {6}
    epochs = [[x for batch in taken[3 * i : 3 * i + 3] for x in batch] for i in range(3)]
    assert [len(set(epoch)) for epoch in epochs] == [18, 18, 18]
    assert set(epochs[0]) != set(epochs[1]) or set(epochs[1]) != set(epochs[2])
    assert set().union(*epochs) == {row.ids[1:] for row in rows}


def test_a_packed_batch_has_the_loss_of_its_examples_however_it_is_cut(tiny_llama):
    """Of every microbatch, from its own rows alone."""
    objective = jax.jit(SftObjective(dropout=0.0, logprob_chunk=32))
    rows = documents(13, 8)
    by_answer = {row.ids[1:]: row for row in rows}
    batch = next(iter(all_packed(0, rows)))
    for index in range(2):
        part = of_microbatch(batch, index, 2)
        own = token_batch([by_answer[tuple(x)] for x in answers(part).values()], 8)
        found, wanted = (objective(tiny_llama, jax.tree.map(jnp.asarray, x), jax.random.key(0)) for x in (part, own))
        assert found.count == wanted.count
        np.testing.assert_allclose(found.loss, wanted.loss, rtol=1e-5)


def test_no_rows_are_refused():
    with pytest.raises(ValueError, match="there are no rows to train on"):
        padded_batches([], 8, 3, seed=0)


class Counted(list):
    """Rows that count how often one is taken."""

    taken = 0

    def __getitem__(self, index):
        self.taken += 1
        return super().__getitem__(index)


def test_batches_are_made_ahead_and_a_state_is_that_of_the_batch_last_taken():
    rows = Counted(documents(50, 8))
    iterator = iter(padded_batches(rows, 8, 3, seed=0))
    next(iterator)
    state, deadline = iterator.get_state(), time.monotonic() + 30
    while rows.taken < 3 * 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert rows.taken >= 3 * 3  # the batch that was taken and two more
    assert iterator.get_state() == state
    wanted = take(iterator, 3)
    fresh = iter(padded_batches(rows, 8, 3, seed=0))
    fresh.set_state(state)
    assert take(fresh, 3) == wanted
