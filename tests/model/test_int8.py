"""Numbers in 8 bits: how they are rounded, that weights compute what their products would, and that every kernel reads
keys and values as what they are multiplied out."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from srlm_jax.model import attention, int8, llama, ops, quantized
from srlm_jax.model.attention import ALL, Part, Siblings, alone
from srlm_jax.model.cache import Cache, empty, write
from srlm_jax.model.int8 import Slots
from srlm_jax.model.lora import PROJECTIONS
from srlm_jax.parallel import rules
from srlm_jax.parallel.mesh import MeshShape, sample_mesh, train_mesh
from srlm_jax.parallel.reshard import reshard

CLOSE = {"rtol": 2e-5, "atol": 2e-5}


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def slots(stack):
    """Keys or values [..., S, H], rounded."""
    values, scale = int8.round_along(stack, -1, "float32")
    return Slots(values, jnp.swapaxes(scale, -1, -2))


# --- rounding ---------------------------------------------------------------------------------------------------------


def test_rounding_by_hand():
    values, scale = int8.round_along(jnp.array([[254.0, -1.1, 3.2], [0, 0, 0], [-0.5, 0.25, 0.125]]), 1, "float32")
    np.testing.assert_array_equal(values, [[127, -1, 2], [0, 0, 0], [-127, 64, 32]])
    np.testing.assert_allclose(scale[:, 0], [2, 1, 0.5 / 127])
    assert (values.dtype, scale.shape) == ("int8", (3, 1))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_no_number_is_off_by_more_than_half_a_scale(dtype):
    """Whatever the scale is rounded to: the largest number is at most 127.25 of it, and becomes 127."""
    x = normal(0, 300, 64) * jnp.exp(normal(1, 300, 1))
    values, scale = int8.round_along(x, 1, dtype)
    assert scale.dtype == dtype
    off = jnp.abs(values * scale.astype("float32") - x) / scale.astype("float32")
    assert 0.49 < off.max() <= 0.5001


def test_what_is_not_a_number_shows():
    _, scale = int8.round_along(jnp.array([[1.0, jnp.nan], [jnp.inf, 1.0], [1.0, 1.0]]), 1, "bfloat16")
    np.testing.assert_array_equal(jnp.isfinite(scale[:, 0]), [False, False, True])


# --- weights ----------------------------------------------------------------------------------------------------------


def multiplied(model, rounded):
    """`model` with what the rounded weights stand for."""
    found = jax.tree.map(lambda leaf: leaf, model)
    for name, inputs in PROJECTIONS.items():
        weight = getattr(rounded.blocks, name)
        scale = weight.scale[...].reshape(weight.scale.shape[0], *(1,) * inputs, *weight.scale.shape[1:])
        setattr(found.blocks, name, getattr(model.blocks, name).replace(weight.values[...] * scale))
    return found


@jax.jit
def hidden(model):
    tokens = jax.random.randint(jax.random.key(7), (2, 12), 0, 40)
    positions = jnp.broadcast_to(jnp.arange(12), tokens.shape)
    return model(tokens, positions, segments_BT=None, cache=None, dropout=None)[0]


def test_rounded_weights_compute_what_their_products_do(tiny_llama):
    rounded = quantized.quantize(tiny_llama, "int8")
    found = hidden(rounded)
    np.testing.assert_allclose(found, hidden(multiplied(tiny_llama, rounded)), rtol=1e-4, atol=1e-5)
    assert np.abs(found - hidden(tiny_llama)).max() > 1e-3  # or nothing was rounded


@pytest.mark.parametrize(("dtype", "close"), [("float16", 2e-3), ("bfloat16", 2e-2)])
def test_so_they_do_in_16_bits(make_llama, dtype, close):
    """Of float16 too, in which the sums of whole numbers would be infinite."""
    model = make_llama(compute_dtype=dtype)
    weight = quantized.quantize(model, "int8").blocks.gate
    assert weight.scale.dtype == dtype
    matrix = jax.tree.map(lambda x: x.astype(dtype), weight)[0]
    x = jnp.full((1, 2, 16), 200.0, dtype)
    found = ops.linear(x, matrix)
    wanted = 200 * matrix.values.astype("float32").sum(axis=0) * matrix.scale.astype("float32")
    assert found.dtype == dtype and jnp.abs(200 * matrix.values.astype("float32").sum(axis=0)).max() > 65_504
    np.testing.assert_allclose(found[0, 1].astype("float32"), wanted, rtol=close, atol=close)


def test_every_output_has_a_scale_of_its_own(tiny_llama):
    rounded = quantized.quantize(tiny_llama, "int8").blocks
    assert (rounded.o.scale.shape, rounded.o.scale.axes) == ((2, 16), ("layers", "embed"))
    assert (rounded.k.scale.shape, rounded.k.scale.axes) == ((2, 2, 8), ("layers", "kv_heads", "head"))
    for name, inputs in PROJECTIONS.items():
        weight, old = getattr(rounded, name), getattr(tiny_llama.blocks, name)
        assert (weight.values.dtype, weight.values.axes) == ("int8", old.axes)
        assert (jnp.abs(weight.values[...]).max(axis=range(1, 1 + inputs)) == 127).all()


def test_nothing_else_is_touched_and_nothing_at_all_where_nobody_asks(tiny_llama):
    assert quantized.quantize(tiny_llama, None) is tiny_llama
    rounded = quantized.quantize(tiny_llama, "int8")
    for name in ("embedding", "norm", "output"):
        assert getattr(rounded, name)[...] is getattr(tiny_llama, name)[...]
    assert rounded.blocks.mlp_norm[...] is tiny_llama.blocks.mlp_norm[...]
    assert tiny_llama.blocks.q.dtype == "float32"


@pytest.mark.parametrize("shape", [(1, 4, 2), (2, 2, 2), (8, 1, 1)], ids=str)
def test_they_are_rounded_where_they_lie_and_move_as_weights_do(make_llama, shape):
    model = make_llama()
    wanted = quantized.quantize(model, "int8")
    mesh = MeshShape(**dict(zip(("data", "fsdp", "tensor"), shape, strict=True)))
    placed = jax.device_put(model, rules.model_shardings(train_mesh(mesh), rules.TRAIN, model))
    rounded = quantized.quantize(placed, "int8")
    for name in PROJECTIONS:
        old, new = getattr(placed.blocks, name)[...], getattr(rounded.blocks, name).values[...]
        assert new.sharding.is_equivalent_to(old.sharding, new.ndim)
    shapes = jax.eval_shape(lambda model: quantized.quantize(model, "int8"), llama.abstract(model.config))
    like = rules.placed(sample_mesh(mesh), rules.SAMPLE, shapes)
    for one, other, place in zip(*map(jax.tree.leaves, (reshard(rounded, like), wanted, like)), strict=True):
        assert (one.dtype, one.sharding) == (place.dtype, place.sharding)
        np.testing.assert_array_equal(one, other)


# --- keys and values --------------------------------------------------------------------------------------------------


def as_slots(part):
    return dataclasses.replace(part, k_LRKSH=slots(part.k_LRKSH), v_LRKSH=slots(part.v_LRKSH))


def as_products(part):
    k, v = (x.multiplied(jnp.float32) for x in (part.k_LRKSH, part.v_LRKSH))
    return dataclasses.replace(part, k_LRKSH=k, v_LRKSH=v)


def same(found, wanted):
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape
        np.testing.assert_allclose(one, other, **CLOSE)


def valid(lengths):
    return dataclasses.replace(ALL, length_R=jnp.array(lengths))


def test_what_is_written_is_what_rounding_gives(tiny_config):
    (stack,) = empty(tiny_config, (2,), 3, 8, "int8")
    assert [x.shape for x in jax.tree.leaves(stack)] == [(2, 3, 2, 8, 8), (2, 3, 2, 1, 8)]
    new = normal(0, 3, 2, 2, 8)
    stack = write(stack, new, jnp.int32(1), jnp.int32(5))
    found, wanted = stack.multiplied(jnp.float32), slots(new).multiplied(jnp.float32)
    np.testing.assert_array_equal(found[1, :, :, 5:7], wanted)
    np.testing.assert_allclose(wanted, new, atol=0.02)
    assert not found.at[1, :, :, 5:7].set(0).any()


@pytest.mark.parametrize("kernel", [attention.plain, attention.blocked], ids=["plain", "blocked"])
def test_attention_reads_what_they_are_multiplied_out(kernel):
    q = normal(0, 6, 4, 300, 16)
    part = as_slots(alone(normal(1, 3, 2, 40, 16), normal(2, 3, 2, 40, 16), valid([40, 7, 0])))
    same(kernel(q, part, with_lse=True), attention.plain(q, as_products(part), with_lse=True))


def test_so_does_the_kernel_of_a_prefill(monkeypatch):
    make = functools.partial(attention.splash_kernel.make_splash_mha, interpret=True)
    monkeypatch.setattr(attention.splash_kernel, "make_splash_mha", make)
    q = normal(0, 2, 4, 128, 16)
    part = as_slots(alone(normal(1, 1, 2, 150, 16), normal(2, 1, 2, 150, 16), valid([133])))
    same(attention.splash(q, part, with_lse=True), attention.plain(q, as_products(part), with_lse=True))


@pytest.mark.parametrize("shape", [(1, 4, 2), (8, 1, 1)], ids=str)
def test_devices_share_them(shape):
    """A ring of each row, a level of every two rows, a prefix of all; siblings of the level not adjacent."""
    mesh = sample_mesh(MeshShape(**dict(zip(("data", "fsdp", "tensor"), shape, strict=True))))
    D = mesh.shape["data"]
    q = normal(0, 8, 4, 1, 16)
    ring = as_slots(Part(normal(1, 3, 8, 2, 32, 16), normal(2, 3, 8, 2, 32, 16), jnp.int32(2), valid([5] * 8)))
    level = as_slots(alone(normal(3, 8, 2, 20, 16), normal(4, 8, 2, 20, 16), valid(range(1, 9))))
    prefix = as_slots(alone(normal(5, 1, 2, 32, 16), normal(6, 1, 2, 32, 16), valid([30])))
    places = jnp.tile(jnp.arange(8 // D)[None], (D, 1))
    siblings = Siblings(places[:, ::-1], places[:, ::-1].reshape(-1))
    run = lambda q, own, shared: attention.attend(q, own, shared, siblings)
    with jax.set_mesh(mesh):
        found = jax.jit(run)(q, [ring, prefix], [level])
    wanted = run(q, [as_products(ring), as_products(prefix)], [as_products(level)])
    np.testing.assert_allclose(found, wanted, **CLOSE)


def test_new_tokens_read_one_another_as_they_are(tiny_llama):
    """A row read in one piece says what it says without a cache, whatever is kept of it."""
    leaf = empty(tiny_llama.config, tiny_llama.layers, 2, 12, "int8")
    cache = Cache(
        parents=(), shared=(), siblings=None, k_LBKSH=leaf, v_LBKSH=leaf, slot=jnp.int32(0), readable=None,
        among_themselves=True,
    )  # fmt: skip
    tokens = jax.random.randint(jax.random.key(7), (2, 12), 0, 40)
    positions = jnp.broadcast_to(jnp.arange(12), tokens.shape)
    found, after = tiny_llama(tokens, positions, segments_BT=None, cache=cache, dropout=None)
    np.testing.assert_allclose(found, hidden(tiny_llama), rtol=1e-4, atol=1e-5)
    assert after.k_LBKSH[0].values.any() and after.v_LBKSH[0].scale.all()
