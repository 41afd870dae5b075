"""Properties of the whole model: what it reads, and that no way of running it changes what it says."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from srlm_jax.data.batches import PairBatch, Row, token_batch
from srlm_jax.model import llama, ops
from srlm_jax.model.attention import ALL
from srlm_jax.model.cache import Cache, Level, empty
from srlm_jax.train import objectives

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def held(start, length, rows):
    """The same slots of every row may be read."""
    return dataclasses.replace(ALL, length_R=jnp.full(rows, length), start_R=jnp.full(rows, start))


def tokens(*shape):
    return jax.random.randint(jax.random.key(7), shape, 0, 40)


@jax.jit
def forward(model, tokens_BT, *, positions_BT=None, segments_BT=None, dropout=None):
    if positions_BT is None:
        positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    hidden, cache = model(tokens_BT, positions_BT, segments_BT=segments_BT, cache=None, dropout=dropout)
    assert cache is None
    return hidden


@jax.jit
def step(model, tokens_BT, positions_BT, parents, leaf, slot, readable):
    """One cached pass: hidden states, and the leaf's keys and values."""
    cache = Cache(
        parents=parents,
        shared=(),
        siblings=None,
        k_LBKSH=leaf[0],
        v_LBKSH=leaf[1],
        slot=slot,
        readable=readable,
        among_themselves=tokens_BT.shape[1] > 1,
    )
    hidden, cache = model(tokens_BT, positions_BT, segments_BT=None, cache=cache, dropout=None)
    return hidden, (cache.k_LBKSH, cache.v_LBKSH)


def prefill(model, tokens_RT, lengths, start, parents):
    """A finished level of rows of different lengths, filled up with tokens that nobody may read."""
    R, T = tokens_RT.shape
    positions = jnp.array(start)[:, None] + jnp.arange(T)[None]
    leaf = (empty(model.config, model.layers, R, T, None),) * 2
    hidden, (k, v) = step(model, tokens_RT, positions, parents, leaf, 0, None)
    return hidden, Level(k, v, jnp.array(lengths))


def test_a_token_is_predicted_from_the_tokens_up_to_it_and_from_all_of_them(tiny_llama):
    # All tokens differ, so the gradient with respect to a row of the embedding is that of one position.
    T = 6
    reads = jax.jacrev(lambda model: forward(model, jnp.arange(T)[None])[0].sum(axis=-1))(tiny_llama)
    strength_TT = jnp.abs(reads.embedding[...][:, :T]).sum(axis=-1)
    np.testing.assert_array_equal(strength_TT > 0, np.tril(np.ones((T, T), bool)))


def test_padding_on_the_right_changes_nothing(tiny_llama):
    row = tokens(1, 5)
    padded = jnp.pad(row, ((0, 0), (0, 4)))
    np.testing.assert_allclose(forward(tiny_llama, padded)[:, :5], forward(tiny_llama, row), **CLOSE)


def test_the_order_of_tokens_matters(tiny_llama):
    row = tokens(1, 5)
    turned = row[:, jnp.array([1, 0, 2, 3, 4])]
    assert not np.allclose(forward(tiny_llama, row)[0, -1], forward(tiny_llama, turned)[0, -1], atol=1e-2)


def test_grouped_queries_are_full_heads_with_repeated_keys_and_values(make_llama):
    grouped, full = make_llama(K=2), jax.tree.map(lambda x: x, make_llama(K=4))
    for name in ("attention_norm", "q", "o", "mlp_norm", "gate", "up", "down"):
        setattr(full.blocks, name, getattr(grouped.blocks, name))
    for name in ("k", "v"):
        weight = getattr(full.blocks, name)
        setattr(full.blocks, name, weight.replace(jnp.repeat(getattr(grouped.blocks, name)[...], 2, axis=2)))
    full.embedding, full.norm = grouped.embedding, grouped.norm
    np.testing.assert_allclose(forward(full, tokens(2, 6)), forward(grouped, tokens(2, 6)), **CLOSE)


def test_packed_documents_do_not_see_each_other(tiny_llama):
    a, b, c = tokens(3, 5)[0, :3], tokens(3, 5)[1], tokens(3, 5)[2, :2]
    packed = jnp.concatenate([a, b, c])[None]
    positions = jnp.concatenate([jnp.arange(3), jnp.arange(5), jnp.arange(2)])[None]
    segments = jnp.array([[1] * 3 + [2] * 5 + [3] * 2])
    found = forward(tiny_llama, packed, positions_BT=positions, segments_BT=segments)[0]
    wanted = jnp.concatenate([forward(tiny_llama, row[None])[0] for row in (a, b, c)])
    np.testing.assert_allclose(found, wanted, **CLOSE)


@pytest.mark.parametrize("apart", [False, True], ids=["one stack", "by layer"])
def test_one_level_prefill_and_decode_is_the_forward_pass(tiny_llama, apart):
    row = tokens(2, 9)
    wanted = forward(tiny_llama, row)
    model = llama.by_layer(tiny_llama) if apart else tiny_llama
    leaf = (empty(model.config, model.layers, 2, 12, None),) * 2
    positions = jnp.broadcast_to(jnp.arange(5), (2, 5))
    hidden, leaf = step(model, row[:, :5], positions, (), leaf, 0, None)
    np.testing.assert_allclose(hidden, wanted[:, :5], **CLOSE)
    for t in range(5, 9):
        hidden, leaf = step(model, row[:, t : t + 1], jnp.full((2, 1), t), (), leaf, t, held(0, t + 1, 2))
        np.testing.assert_allclose(hidden[:, 0], wanted[:, t], **CLOSE)


def test_several_tokens_at_a_time_are_the_forward_pass(tiny_llama):
    """Chunks of 3 of a row of 9: each reads the slots of those before it, and itself."""
    row = tokens(2, 9)
    wanted, leaf = forward(tiny_llama, row), (empty(tiny_llama.config, tiny_llama.layers, 2, 9, None),) * 2
    for first in (0, 3, 6):
        positions = jnp.broadcast_to(first + jnp.arange(3), (2, 3))
        part = row[:, first : first + 3]
        hidden, leaf = step(tiny_llama, part, positions, (), leaf, first, held(0, first, 2))
        np.testing.assert_allclose(hidden, wanted[:, first : first + 3], **CLOSE)


def test_a_tree_of_levels_with_ragged_rows_and_a_ring_is_the_forward_pass(tiny_llama):
    """One prefix, two groups (of 3 and 1 tokens), two prompts in each (of 2, 0, 3 and 1), two samples of each.

    The samples are decoded in a ring of 4 slots that starts at slot 2, so that the third token wraps around.
    """
    ids = np.asarray(tokens(64)).tolist()
    take = lambda n: [ids.pop() for _ in range(n)]
    prefix, groups, prompts, samples = take(3), [take(3), take(1)], [take(n) for n in (2, 0, 3, 1)], []
    samples = [take(4) for _ in range(8)]

    def padded(rows, width):
        return jnp.array([row + [39] * (width - len(row)) for row in rows])

    lengths = lambda rows: [len(row) for row in rows]
    starts = [len(prefix) + n for n in lengths(groups)]
    _, root = prefill(tiny_llama, jnp.array([prefix]), [3], [0], ())
    _, middle = prefill(tiny_llama, padded(groups, 4), lengths(groups), [3, 3], (root,))
    start_R = np.repeat(starts, 2)
    _, bottom = prefill(tiny_llama, padded(prompts, 3), lengths(prompts), start_R, (root, middle))
    parents = (root, middle, bottom)
    position_B = jnp.array(np.repeat(start_R + lengths(prompts), 2))

    leaf = (empty(tiny_llama.config, tiny_llama.layers, 8, 4, None),) * 2
    found = []
    for t in range(4):
        slot = (2 + t) % 4
        last = jnp.array([row[t] for row in samples])[:, None]
        hidden, leaf = step(tiny_llama, last, (position_B + t)[:, None], parents, leaf, slot, held(2, t + 1, 8))
        found.append(hidden[:, 0])

    for b, sample in enumerate(samples):
        document = prefix + groups[b // 4] + prompts[b // 2] + sample
        wanted = forward(tiny_llama, jnp.array([document]))[0, -4:]
        np.testing.assert_allclose(jnp.stack(found, axis=1)[b], wanted, **CLOSE)


def test_a_tied_model_has_no_head_of_its_own(make_llama):
    tied, untied = make_llama(tied=True), make_llama(tied=False)
    assert not hasattr(tied, "output")
    np.testing.assert_array_equal(tied.head(), tied.embedding[...].T)
    np.testing.assert_array_equal(untied.head(), untied.output[...])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("width", [64, 256])
def test_logits_start_with_unit_variance_whatever_the_width(tiny_config, tied, width):
    model = llama.init(dataclasses.replace(tiny_config, tied=tied, D=width), jax.random.key(0))
    row = tokens(4, 12)
    logits = forward(model, row) @ model.head()
    own = jax.nn.one_hot(row, logits.shape[-1], dtype=bool)  # of a tied head, an outlier: a token meets itself
    assert 0.8 < jnp.std(logits[~own]) < 1.2


def test_both_uses_of_a_tied_embedding_get_a_gradient(make_llama):
    model = make_llama(tied=True)
    gradient = jax.grad(lambda model: (forward(model, jnp.array([[3, 4]])) @ model.head())[0, -1, 5])(model)
    reached = jnp.abs(gradient.embedding[...]).sum(axis=-1) > 0
    assert reached[jnp.array([3, 4, 5])].all()
    assert reached.sum() == 3


@pytest.mark.parametrize("dropout", [None, ops.Dropout(0.3, jax.random.key(5))], ids=["plain", "dropout"])
def test_recomputing_activations_changes_neither_values_nor_gradients(make_llama, dropout):
    def run(remat):
        total = lambda model: jnp.square(forward(model, tokens(2, 6), dropout=dropout)).sum()
        return jax.jit(jax.value_and_grad(total))(make_llama(remat=remat))

    for one, other in zip(jax.tree.leaves(run("full")), jax.tree.leaves(run("dots")), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


def test_dropout_acts_only_with_a_key_and_differs_from_key_to_key(tiny_llama):
    row = tokens(1, 6)
    runs = [forward(tiny_llama, row, dropout=ops.Dropout(0.3, jax.random.key(seed))) for seed in (0, 0, 1)]
    plain = [forward(tiny_llama, row), forward(tiny_llama, row)]
    np.testing.assert_array_equal(*plain)
    np.testing.assert_array_equal(runs[0], runs[1])
    assert not np.allclose(runs[0], runs[2], atol=1e-2)
    assert not np.allclose(runs[0], plain[0], atol=1e-2)


def test_dropout_drops_other_probabilities_in_every_layer(make_llama):
    # A token alone has one probability a head, and the gradient of the output projection is zero where it is dropped.
    model = make_llama(L=3, N=16, K=16)
    dropout = ops.Dropout(0.5, jax.random.key(0))
    gradient = jax.grad(lambda model: forward(model, tokens(1, 1), dropout=dropout).sum())(model)
    dropped_LN = np.asarray((gradient.blocks.o[...] == 0).all(axis=(2, 3)))
    assert 0 < dropped_LN.mean() < 1
    assert len({tuple(mask) for mask in dropped_LN.tolist()}) == 3  # two of them agree by chance once in 20,000 keys


def test_dropout_of_packed_rows_keeps_documents_apart(tiny_llama):
    segments, positions = jnp.array([[1] * 3 + [2] * 5]), jnp.array([[0, 1, 2, 0, 1, 2, 3, 4]])
    dropout = ops.Dropout(0.3, jax.random.key(0))
    found = [
        forward(tiny_llama, row, positions_BT=positions, segments_BT=segments, dropout=dropout)[0, 3:]
        for row in (tokens(1, 8), tokens(1, 8).at[0, :3].set(5))
    ]
    np.testing.assert_array_equal(*found)


def test_bfloat16_runs_in_bfloat16_and_stays_near_float32(make_llama):
    half, full = forward(make_llama(compute_dtype="bfloat16"), tokens(2, 6)), forward(make_llama(), tokens(2, 6))
    assert half.dtype == jnp.bfloat16
    error = jnp.abs(half.astype(jnp.float32) - full)
    assert error.max() < 0.15
    assert error.mean() < 0.02


def test_the_blocks_are_one_scan_however_many_layers(tiny_config):
    def size(layers):
        model = llama.abstract(dataclasses.replace(tiny_config, L=layers))
        return len(str(jax.make_jaxpr(lambda model: forward(model, tokens(1, 4)))(model)).splitlines())

    assert size(2) == size(5)


# What the gradient keeps in memory: B * T * V logits would be by far the largest array of all.

B, T, V, CHUNK = 4, 32, 400, 8


def largest_array(objective, model, batch):
    """Elements of the largest array in the compiled gradient."""
    gradient = jax.jit(jax.grad(lambda model: objective(model, batch, jax.random.key(0)).loss))
    shapes = re.findall(r"\b(?:f32|bf16|f16|s32|u32|pred)\[([0-9,]+)\]", gradient.lower(model).compile().as_text())
    return max(int(np.prod([int(n) for n in shape.split(",")])) for shape in shapes)


def rows(n):
    batch = token_batch([Row(tuple(range(i, i + T + 1)), 3) for i in range(n)], T)
    return jax.tree.map(jnp.asarray, batch)


SFT = (objectives.SftObjective, {"dropout": 0.1}, lambda: rows(B))
DPO = (objectives.DpoObjective, {"beta": 0.1}, lambda: PairBatch(rows(B), jnp.zeros(2), jnp.zeros(2)))


@pytest.mark.parametrize(("kind", "options", "batch"), [SFT, DPO], ids=["sft", "dpo"])
def test_no_gradient_ever_holds_all_logits(make_llama, kind, options, batch):
    model = make_llama(V=V, remat="full")
    chunked = kind(logprob_chunk=CHUNK, **options)
    whole = kind(logprob_chunk=T, **options)
    assert largest_array(chunked, model, batch()) < B * T * V
    assert largest_array(whole, model, batch()) >= B * T * V
