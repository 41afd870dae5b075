"""The kernels for decoding, interpreted, against plain attention; and that they read nothing that they need not."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from srlm_jax.model import attention, decode_attention, decode_triton, int8, ops
from srlm_jax.model.attention import ALL, Part
from srlm_jax.model.int8 import Slots

CLOSE = {"rtol": 2e-5, "atol": 2e-5}
HERE = pltpu.InterpretParams(uninitialized_memory="nan")


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def level(R, S, lengths, starts=None, *, layers=3, K=2, H=128):
    """Random keys and values of a stack of layers, and which slots of the rows hold something."""
    readable = dataclasses.replace(
        ALL, length_R=jnp.array(lengths), start_R=None if starts is None else jnp.array(starts)
    )
    return Part(normal(1, layers, R, K, S, H), normal(2, layers, R, K, S, H), jnp.int32(layers - 1), readable)


@pytest.fixture
def interpreted(monkeypatch):
    """The kernels run anywhere; a TPU's memory that nothing was written to is NaN."""
    for module, how in ((decode_attention, HERE), (decode_triton, True)):
        monkeypatch.setattr(module, "flash_decode", functools.partial(module.flash_decode, interpret=how))


def same(found, wanted):
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape
        np.testing.assert_allclose(one, other, **CLOSE)


LEVELS = {
    "a level of siblings": (4, level(2, 48, [48, 17])),
    "one row for all": (6, level(1, 64, [33])),
    "a ring that goes around its end": (3, level(3, 64, [10, 64, 30], [60, 5, 32])),
    "blocks of 128": (2, level(2, 256, [129, 256], [250, 0])),
    "a row that nobody reads": (4, level(4, 32, [0, 32, 1, 0])),
}


KERNELS = [attention.decoding, attention.decoding_gpu]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("rows", "part"), LEVELS.values(), ids=LEVELS)
def test_a_kernel_gives_what_plain_attention_gives(interpreted, rows, part, kernel):
    q = normal(0, rows, 4, 1, 128)
    found, wanted = (run(q, part, with_lse=True) for run in (kernel, attention.plain))
    read = np.repeat(np.asarray(part.readable.length_R) > 0, rows // part.k_LRKSH.shape[1])
    same([x[read] for x in found], [x[read] for x in wanted])
    assert (found[0][~read] == 0).all() and (found[1][~read] == jnp.float32(ops.MASKED)).all()


@pytest.mark.parametrize("name", ["a level of siblings", "a row that nobody reads"])
def test_a_gpu_s_kernel_reads_a_part_for_many_new_tokens_of_a_row(interpreted, name):
    rows, part = LEVELS[name]
    q = normal(0, rows, 4, 20, 128)
    found, wanted = (run(q, part, with_lse=True) for run in (attention.decoding_gpu, attention.plain))
    read = np.repeat(np.asarray(part.readable.length_R) > 0, rows // part.k_LRKSH.shape[1])
    same([x[read] for x in found], [x[read] for x in wanted])
    assert (found[0][~read] == 0).all()


def in_8_bits(part):
    """A part whose keys and values are rounded, and one of what they then are."""

    def slots(stack):
        values, scale = int8.round_along(stack, -1, "float32")
        return Slots(values, jnp.swapaxes(scale, -1, -2))

    k, v = slots(part.k_LRKSH), slots(part.v_LRKSH)
    products = dataclasses.replace(part, k_LRKSH=k.multiplied(jnp.float32), v_LRKSH=v.multiplied(jnp.float32))
    return dataclasses.replace(part, k_LRKSH=k, v_LRKSH=v), products


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", [name for name, (_, part) in LEVELS.items() if part.k_LRKSH.shape[3] % 32 == 0])
def test_the_kernel_reads_8_bits_as_what_they_are_multiplied_out(interpreted, name, kernel):
    rows, part = LEVELS[name]
    rounded, products = in_8_bits(part)
    q = normal(0, rows, 4, 1, 128)
    found, wanted = kernel(q, rounded, with_lse=True), attention.plain(q, products, with_lse=True)
    read = np.repeat(np.asarray(part.readable.length_R) > 0, rows // part.k_LRKSH.shape[1])
    same([x[read] for x in found], [x[read] for x in wanted])
    assert (found[0][~read] == 0).all() and (found[1][~read] == jnp.float32(ops.MASKED)).all()


def test_a_block_of_8_bits_has_as_many_slots_as_a_register_has_lanes_or_a_row_has():
    shape = lambda slots: Slots(jax.ShapeDtypeStruct((1, 1, 4, slots, 128), jnp.int8), None)
    found = [decode_attention.block_of(shape(n)) for n in (8, 16, 32, 48, 96, 128, 320, 384, 1024, 1088)]
    assert found == [None, None, 32, None, 96, 128, 320, 128, 128, None]


def test_many_queries_are_worked_on_some_heads_at_a_time(interpreted, monkeypatch):
    q, part = normal(0, 5, 8, 1, 128), level(1, 64, [40], K=4)
    wanted = attention.plain(q, part, with_lse=True)
    grids = []
    call = decode_attention.pl.pallas_call
    monkeypatch.setattr(
        decode_attention.pl, "pallas_call", lambda *a, **k: grids.append(k["grid_spec"].grid) or call(*a, **k)
    )
    monkeypatch.setattr(decode_attention, "_FAST_BYTES", 500_000)
    same(attention.decoding(q, part, with_lse=True), wanted)
    assert grids == [(1, 2, 1)]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("rows", [2, 6])
def test_no_block_is_read_that_holds_nothing_and_no_other_layer(interpreted, monkeypatch, rows, kernel):
    """All of it is NaN but the blocks of the layer that `blocks_read` counts."""
    monkeypatch.setattr(decode_triton, "block_size", lambda slots: 128)  # as the TPU's
    part = level(2, 128 * 3, [100, 200], [380, 130])
    S, block = 384, decode_attention.block_size(384, 2 * 128 * 4)
    counts = decode_attention.blocks_read(part.readable.start_R, part.readable.length_R, S, block)
    assert (block, counts.tolist()) == (128, [2, 2])  # the first goes around the ring's end, from the last block on
    kept = np.zeros((2, S), bool)
    for r, (start, count) in enumerate(zip([380, 130], counts.tolist(), strict=True)):
        for i in range(count):
            first = (start // block + i) % (S // block) * block
            kept[r, first : first + block] = True
    poison = lambda x: jnp.full(x.shape, jnp.nan).at[2].set(jnp.where(kept[:, None, :, None], x[2], jnp.nan))
    poisoned = dataclasses.replace(part, k_LRKSH=poison(part.k_LRKSH), v_LRKSH=poison(part.v_LRKSH))
    q = normal(0, rows, 4, 1, 128)
    same(kernel(q, poisoned, with_lse=True), attention.plain(q, part, with_lse=True))


@pytest.mark.parametrize(("R", "Q", "S"), [(2, 70, 48), (1, 3, 1024)])
def test_a_gpu_s_programs_share_many_queries_and_few_rows(monkeypatch, R, Q, S):
    """70 queries are two programs of 64, and a row that nobody but two heads reads is shared by several."""
    part, grids = level(R, S, [S - 5] * R, [7] * R), []
    call = decode_triton.pl.pallas_call
    monkeypatch.setattr(decode_triton.pl, "pallas_call", lambda *a, **k: grids.append(k["grid"]) or call(*a, **k))
    q_RKQH, zero = normal(0, R, 2, Q, 128), jnp.int32(2)
    found = decode_triton.flash_decode(
        q_RKQH, part.k_LRKSH, part.v_LRKSH, zero, part.readable.start_R, part.readable.length_R, interpret=True
    )
    q = q_RKQH.swapaxes(1, 2).reshape(R * Q, 2, 1, 128) * 128**0.5
    out, lse = attention.plain(q, part, with_lse=True)
    shape = lambda x: x.reshape(R, Q, 2, -1).swapaxes(1, 2)
    same((found[0], found[1][..., None]), (shape(out), shape(lse)))
    assert grids == [(R, 2, -(-Q // 64), 1 if S == 48 else 2)]


def test_a_gpu_is_given_its_kernel_for_decoding():
    """Lowered for a GPU that is not there."""
    device = jax.sharding.AbstractDevice(device_kind="described", num_cores=None, platform="gpu")
    types = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.sharding.AbstractMesh((2, 2), ("data", "tensor"), types, abstract_device=device)
    q, k = jnp.zeros((8, 4, 1, 64), jnp.bfloat16), jnp.zeros((3, 4, 4, 32, 64), jnp.bfloat16)
    part = Part(k, k, jnp.int32(1), dataclasses.replace(ALL, length_R=jnp.full(4, 9)))
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(lambda q: attention.attend(q, [part], [], None)).trace(q)
    assert "__gpu$xla.gpu.triton" in traced.lower(lowering_platforms=("cuda",)).as_text()


def test_blocks_by_hand():
    read = lambda start, length, slots, block: int(
        decode_attention.blocks_read(jnp.int32(start), jnp.int32(length), slots, block)
    )
    assert [read(0, n, 64, 64) for n in (0, 1, 64)] == [0, 1, 1]
    assert [read(0, n, 256, 128) for n in (128, 129, 256)] == [1, 2, 2]
    assert [read(127, n, 256, 128) for n in (1, 2, 256)] == [1, 2, 2]
    assert [decode_attention.block_size(n, 1_024) for n in (8, 16, 48, 96, 320, 1024)] == [None, 16, 16, 32, 64, 128]
    assert [decode_attention.block_size(1024, n) for n in (2_048, 4_096, 8_192, 65_536)] == [128, 64, 32, 16]


def test_a_judge_of_7b_reads_little_more_than_what_it_has_to_and_far_less_than_one_that_shares_nothing():
    """150 tokens of each of 3 judgements of 4 responses of 400 tokens to an instruction of 80: 272 tokens of rubric
    come before and 97 behind. Counted in slots of a layer, for each token of a judgement, 96 rows at a time."""
    block = lambda room: decode_attention.block_size(room, 32 * 128 * 2)

    def read(lengths, room):
        return np.mean(decode_attention.blocks_read(jnp.int32(0), jnp.array(lengths), room, block(room))) * block(room)

    own = np.arange(1, 151)
    found = read([272], 320) / 96 + read([80], 96) / 12 + read([497], 1280) / 3 + read(own, 256)
    least = 272 / 96 + 80 / 12 + 497 / 3 + own.mean()
    assert found <= 1.10 * least
    assert found < 0.3 * (272 + 80 + 497 + own.mean())
