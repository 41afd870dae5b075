"""Every kernel against the plain one, and which of them is taken where. TPU and Triton kernels are interpreted."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from srlm_jax.model import attention, ops
from srlm_jax.model.attention import ALL, CAUSAL, Siblings, alone
from srlm_jax.model.cache import Cache, empty
from srlm_jax.parallel import rules
from srlm_jax.parallel.mesh import MeshShape, sample_mesh, train_mesh
from srlm_jax.sampling import prefill

CLOSE = {"rtol": 2e-5, "atol": 2e-5}


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def queries_and_keys(B, N, T, R, K, S, H):
    return normal(0, B, N, T, H), normal(1, R, K, S, H), normal(2, R, K, S, H)


def valid(lengths):
    return dataclasses.replace(ALL, length_R=jnp.array(lengths))


def packed(rows, length):
    """Segments of different lengths, padding behind them."""
    ids = [sorted(np.random.default_rng(row).integers(1, 4, length - 7).tolist()) + [0] * 7 for row in range(rows)]
    return dataclasses.replace(CAUSAL, segments_BT=jnp.array(ids))


def outputs_and_gradients(kernel, readable, q, k, v):
    """Of a sum in which every output has a weight of its own."""
    weights = normal(3, *q.shape)

    def total(q, k, v):
        out = kernel(q, alone(k, v, readable), with_lse=False)[0]
        return jnp.sum(out * weights), out

    (_, out), gradients = jax.value_and_grad(total, (0, 1, 2), has_aux=True)(q, k, v)
    return out, *gradients


def same(found, wanted):
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert one.shape == other.shape
        np.testing.assert_allclose(one, other, **CLOSE)


@pytest.fixture
def interpreted(monkeypatch):
    """Kernels run anywhere, an operation at a time."""
    for module, name in ((attention.splash_kernel, "make_splash_mha"), (attention.flash_triton, "flash_attention")):
        monkeypatch.setattr(module, name, functools.partial(getattr(module, name), interpret=True))


@pytest.fixture
def tpu(interpreted, monkeypatch):
    """Attention takes the devices at hand for TPUs."""
    monkeypatch.setattr(rules, "platform", lambda: "tpu")


# --- what may be read -------------------------------------------------------------------------------------------------


def test_what_may_be_read_by_hand():
    segments = dataclasses.replace(CAUSAL, segments_BT=jnp.array([[1, 1, 2, 2]]))
    whole = segments.mask_RCTS(0, 4, 4).astype(int).tolist()
    assert whole == [[[[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]]]
    assert segments.mask_RCTS(1, 2, 4).astype(int).tolist() == [[[[1, 1, 0, 0], [0, 0, 1, 0]]]]
    assert CAUSAL.mask_RCTS(0, 2, 3).astype(int).tolist() == [[[[1, 0, 0], [1, 1, 0]]]]
    assert valid([2, 0]).mask_RCTS(0, 2, 3).astype(int).tolist() == [[[[1, 1, 0]]], [[[0, 0, 0]]]]


# --- kernels ----------------------------------------------------------------------------------------------------------

CASES = [
    ("splash", 4, 2, 256, 64, "causal"),
    ("splash", 4, 4, 200, 128, "causal"),
    ("splash", 4, 1, 384, 128, "packed"),
    ("splash", 2, 1, 200, 64, "packed"),
    ("splash", 2, 2, 130, 8, "causal"),
    ("triton", 4, 2, 128, 64, "packed"),
    ("triton", 2, 1, 100, 32, "packed"),
    ("blocked", 4, 2, 600, 8, "causal"),
    ("blocked", 2, 1, 160, 8, "packed"),
    ("blocked", 2, 1, 1030, 8, "packed"),
]


@pytest.mark.parametrize(("kernel", "N", "K", "T", "H", "what"), CASES)
def test_a_kernel_gives_what_plain_attention_gives_and_its_gradients(interpreted, kernel, N, K, T, H, what):
    arrays = queries_and_keys(2, N, T, 2, K, T, H)
    readable = CAUSAL if what == "causal" else packed(2, T)
    same(
        outputs_and_gradients(getattr(attention, kernel), readable, *arrays),
        outputs_and_gradients(attention.plain, readable, *arrays),
    )


@pytest.mark.parametrize("kernel", [attention.splash, attention.blocked])
@pytest.mark.parametrize(("rows", "T", "S"), [(4, 130, 200), (2, 300, 128), (1, 128, 140)])
def test_siblings_over_a_level_and_the_log_sum_exp_of_their_scores(interpreted, kernel, rows, T, S):
    q, k, v = queries_and_keys(4, 4, T, rows, 2, S, 16)
    part = alone(k, v, valid([S, 3, 77, 128][:rows]))
    same(kernel(q, part, with_lse=True), attention.plain(q, part, with_lse=True))


def test_the_log_sum_exp_of_a_causal_part(interpreted):
    q, k, v = queries_and_keys(2, 4, 200, 2, 2, 200, 16)
    for kernel in (attention.splash, attention.blocked):
        found, wanted = (one(q, alone(k, v, CAUSAL), with_lse=True) for one in (kernel, attention.plain))
        same(found, wanted)


def test_a_row_of_nothing_has_no_weight_in_a_kernel_either(interpreted):
    q, k, v = queries_and_keys(2, 2, 128, 2, 1, 128, 16)
    out, lse = attention.splash(q, alone(k, v, valid([0, 128])), with_lse=True)
    assert np.isfinite(out).all()
    assert (lse[0] == jnp.float32(ops.MASKED)).all() and (lse[1] > ops.MASKED).all()
    other = attention.plain(q, alone(k, v, CAUSAL), with_lse=True)
    merged = ops.merge_attention([out, other[0]], [lse, other[1]])
    np.testing.assert_array_equal(merged[0], other[0][0])


def levels(B, T):
    """A leaf, a level shared by pairs, and a prefix that all rows share."""
    q, k, v = queries_and_keys(B, 4, T, B, 2, T, 16)
    shared = alone(normal(4, B // 2, 2, 150, 16), normal(5, B // 2, 2, 150, 16), valid([150, 20, 0, 77][: B // 2]))
    prefix = alone(normal(6, 1, 2, 9, 16), normal(7, 1, 2, 9, 16), valid([9]))
    return q, [alone(k, v, CAUSAL), shared, prefix]


def test_levels_merge_as_they_do_in_plain_attention(tpu, monkeypatch):
    q, parts = levels(8, 140)
    found = attention.attend(q, parts, [], None)
    monkeypatch.setattr(rules, "platform", lambda: "cpu")
    same(found, attention.attend(q, parts, [], None))


@pytest.mark.parametrize("groups", [1, 2])
def test_siblings_that_are_not_adjacent_read_what_adjacent_ones_do(groups):
    """Six rows a group; of each of three prompts' two samples one may be nobody's."""
    X, rng = 6, np.random.default_rng(0)
    B = 6 * groups
    q, k, v = queries_and_keys(B, 4, 1, 3 * groups, 2, 9, 16)
    own, own_v = normal(8, B, 2, 5, 16), normal(9, B, 2, 5, 16)
    place = np.stack([rng.permutation(X) for _ in range(groups)])
    readers = np.argsort(place, axis=1)
    readers[:, 4] = 6  # its row is idle
    siblings = Siblings(jnp.array(readers), jnp.array(place.reshape(-1)))
    lengths = [9, 3, 5] * groups
    found = attention.attend(q, [alone(own, own_v, CAUSAL)], [alone(k, v, valid(lengths))], siblings)
    for b in range(B):
        if place[b // 6, b % 6] == 4:
            continue
        r = b // 6 * 3 + place[b // 6, b % 6] // 2
        one = [alone(own[b][None], own_v[b][None], CAUSAL), alone(k[r][None], v[r][None], valid(lengths[r : r + 1]))]
        same(found[b], attention.attend(q[b][None], one, [], None)[0])


# --- devices ----------------------------------------------------------------------------------------------------------

SHAPES = [(1, 8, 1), (2, 2, 2), (4, 1, 2)]
MORE_SHAPES = [pytest.param(shape, 8, marks=pytest.mark.long) for shape in [(8, 1, 1), (1, 4, 2)]]


@pytest.mark.parametrize(("shape", "rows"), [(shape, 8) for shape in SHAPES] + MORE_SHAPES + [((2, 2, 2), 3)])
def test_devices_share_rows_and_heads(tpu, monkeypatch, shape, rows):
    """Three rows cannot be shared, and are computed by every device."""
    mesh = train_mesh(MeshShape(**dict(zip(("data", "fsdp", "tensor"), shape, strict=True))))
    arrays, readable, seen = queries_and_keys(rows, 4, 136, rows, 2, 136, 16), packed(rows, 136), set()
    wanted = outputs_and_gradients(attention.plain, readable, *arrays)

    def seeing(q, part, *, with_lse):
        seen.add((q.shape[:2], part.k_LRKSH.shape[-4:-2], part.readable.segments_BT.shape[0]))
        return splash(q, part, with_lse=with_lse)

    splash = attention.splash
    monkeypatch.setattr(attention, "splash", seeing)
    attend = lambda q, part, with_lse: (attention.attend(q, [part], [], None),)
    with jax.set_mesh(mesh):
        same(jax.jit(lambda *arrays: outputs_and_gradients(attend, readable, *arrays))(*arrays), wanted)
    own = rows // (shape[0] * shape[1]) if rows == 8 else rows
    assert seen == {((own, 4 // shape[2]), (own, 2 // shape[2]), own)}


@pytest.mark.parametrize(("shape", "rows"), [(shape, 8) for shape in SHAPES] + MORE_SHAPES + [((2, 2, 2), 2)])
def test_devices_share_levels(tpu, monkeypatch, shape, rows):
    """The prefix has one row for all of them, and two rows over a level of one are too few for most meshes."""
    mesh = sample_mesh(MeshShape(**dict(zip(("data", "fsdp", "tensor"), shape, strict=True))))
    q, parts = levels(rows, 130)
    with jax.set_mesh(mesh):
        found = jax.jit(lambda q, parts: attention.attend(q, parts, [], None))(q, parts)
    monkeypatch.setattr(rules, "platform", lambda: "cpu")
    same(found, attention.attend(q, parts, [], None))


# --- the choice -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("platform", "T", "S", "H", "dtype", "readable", "single", "wanted"),
    [
        ("tpu", 2048, 2048, 128, "bfloat16", CAUSAL, True, "splash"),
        ("tpu", 320, 320, 8, "float32", packed(1, 320), True, "splash"),
        ("tpu", 256, 128, 64, "bfloat16", valid([128]), False, "splash"),
        ("tpu", 256, 16, 64, "bfloat16", valid([16]), False, "plain"),
        ("tpu", 64, 64, 64, "bfloat16", CAUSAL, True, "plain"),
        ("tpu", 1, 4096, 64, "bfloat16", valid([9]), True, "plain"),
        ("gpu", 2048, 2048, 128, "bfloat16", CAUSAL, True, "cudnn"),
        ("gpu", 100, 100, 64, "float16", CAUSAL, True, "cudnn"),
        ("gpu", 2048, 2048, 128, "bfloat16", packed(1, 2048), True, "triton"),
        ("gpu", 2048, 2048, 96, "bfloat16", packed(1, 2048), True, "blocked"),
        ("gpu", 2048, 2048, 128, "bfloat16", CAUSAL, False, "blocked"),
        ("gpu", 2048, 2048, 256, "bfloat16", CAUSAL, True, "blocked"),
        ("gpu", 2048, 2048, 128, "float32", CAUSAL, True, "blocked"),
        ("gpu", 1, 2048, 128, "bfloat16", valid([9]), True, "decoding_gpu"),
        ("gpu", 1, 2048, 128, "float32", valid([9]), True, "plain"),
        ("gpu", 1, 24, 128, "bfloat16", valid([9]), True, "plain"),
        ("gpu", 128, 1536, 128, "bfloat16", valid([9]), False, "decoding_gpu"),
        ("gpu", 128, 128, 128, "bfloat16", CAUSAL, False, "plain"),
        ("tpu", 1, 4096, 128, "bfloat16", valid([9]), True, "decoding"),
        ("cpu", 2048, 2048, 128, "bfloat16", CAUSAL, True, "blocked"),
        ("cpu", 1024, 1024, 128, "float32", packed(1, 1024), True, "blocked"),
        ("cpu", 128, 128, 128, "float32", CAUSAL, True, "plain"),
        ("cpu", 64, 4096, 128, "float32", valid([9]), False, "plain"),
    ],
)
def test_the_kernel_of_a_platform(platform, T, S, H, dtype, readable, single, wanted):
    q, k = jnp.zeros((1, 1, T, H), dtype), jnp.zeros((1, 1, S, H), dtype)
    assert attention.kernel(platform, q, alone(k, k, readable), single=single).__name__ == wanted


def described(platform, **axes):
    """A mesh of devices that are not there."""
    device = jax.sharding.AbstractDevice(device_kind="described", num_cores=None, platform=platform)
    types = (jax.sharding.AxisType.Auto,) * len(axes)
    return jax.sharding.AbstractMesh(tuple(axes.values()), tuple(axes), types, abstract_device=device)


@pytest.mark.parametrize("name", ["gpu", "tpu"])
def test_the_platform_is_that_of_the_mesh_though_this_process_has_none_of_its_devices(name):
    found = []
    with jax.sharding.use_abstract_mesh(described(name, data=2)):
        jax.make_jaxpr(jax.jit(lambda: found.append(rules.platform())))()
    assert (found, rules.platform()) == ([name], "cpu")


@pytest.mark.parametrize(
    ("readable", "dtype", "calls"),
    [
        (CAUSAL, "bfloat16", {"__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"}),
        (packed(4, 128), "bfloat16", {"__gpu$xla.gpu.triton"}),
        (CAUSAL, "float32", set()),
    ],
    ids=["cudnn", "triton", "plain"],
)
def test_a_gpu_is_given_its_kernels_forward_and_back(monkeypatch, readable, dtype, calls):
    """Lowered for a GPU that is not there."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91_000)
    q, k, v = (jax.ShapeDtypeStruct((4, heads, 128, 64), dtype) for heads in (4, 2, 2))

    def total(q, k, v):
        return attention.attend(q, [alone(k, v, readable)], [], None).astype(jnp.float32).sum()

    with jax.sharding.use_abstract_mesh(described("gpu", data=2, tensor=2)):
        traced = jax.jit(jax.grad(total, (0, 1, 2))).trace(q, k, v)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert set(re.findall(r"custom_call @(__[\w$.]+)", text)) == calls


# --- the whole model --------------------------------------------------------------------------------------------------


def tokens(*shape):
    return jax.random.randint(jax.random.key(7), shape, 0, 40)


def hidden_and_gradients(model, tokens_BT, segments_BT):
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)

    def total(model):
        hidden, _ = model(tokens_BT, positions_BT, segments_BT=segments_BT, cache=None, dropout=None)
        return jnp.square(hidden).mean(), hidden

    return jax.jit(jax.value_and_grad(total, has_aux=True))(model)


@pytest.mark.parametrize("segments", [None, packed(2, 150).segments_BT], ids=["causal", "packed"])
def test_the_model_says_the_same_through_the_kernel(make_llama, monkeypatch, interpreted, segments):
    model, row = make_llama(remat="full"), tokens(2, 150)
    wanted = hidden_and_gradients(model, row, segments)
    monkeypatch.setattr(rules, "platform", lambda: "tpu")
    for one, other in zip(*map(jax.tree.leaves, (hidden_and_gradients(model, row, segments), wanted)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)


def test_prefill_of_two_levels_through_the_kernel_and_decoding_is_the_forward_pass(tiny_llama, tpu):
    """A prefix of 130 tokens, two rows of 140 and 133 more, read in chunks; then a token of each of their samples."""
    prefix, rows, last = tokens(130), tokens(2, 256), tokens(4, 1)
    root = prefill.prefill_prefix(tiny_llama, prefix[None], jnp.array([130]), cache=None)
    read = jax.jit(
        lambda *arguments: prefill.prefill(tiny_llama, *arguments, data=1, chunk=128, halvings=1, cache=None)
    )
    level = read((root,), None, rows, jnp.array([140, 133]), jnp.array([130, 130]))
    leaf = empty(tiny_llama.config, tiny_llama.layers, 4, 4, None)
    cache = Cache(
        parents=(root, level),
        shared=(),
        siblings=None,
        k_LBKSH=leaf,
        v_LBKSH=leaf,
        slot=jnp.int32(2),
        readable=dataclasses.replace(ALL, length_R=jnp.ones(4, int), start_R=jnp.full(4, 2)),
        among_themselves=False,
    )
    positions = jnp.array([270, 270, 263, 263])[:, None]
    found, _ = tiny_llama(last, positions, segments_BT=None, cache=cache, dropout=None)
    for b in range(4):
        length = (140, 133)[b // 2]
        document = jnp.concatenate([prefix, rows[b // 2, :length], last[b]])[None]
        wanted, _ = hidden_and_gradients(tiny_llama, document, None)
        np.testing.assert_allclose(found[b, 0], wanted[1][0, -1], rtol=1e-3, atol=1e-4)
