"""The formulas against the compiler's own count, of programs without loops."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

from srlm_jax.model import cache, llama, lora, quantized
from srlm_jax.model.config import LlamaConfig
from srlm_jax.model.lora import LoraConfig
from srlm_jax.parallel import rules
from srlm_jax.plan import formulas
from srlm_jax.plan.formulas import Split
from srlm_jax.sampling.decode import Shape
from srlm_jax.train import losses

# One layer, so that the loop over layers is none, and wide enough that the products outweigh everything else.
WIDE = LlamaConfig(
    V=512, D=256, L=1, N=8, K=4, H=32, F=512, rope_theta=100.0, rope_scaling=None, norm_eps=1e-5,
    tied=False, param_dtype="float32", compute_dtype="float32", remat="dots",
)  # fmt: skip
ROWS, LENGTH = 2, 128


def counted(function, c):
    """The compiler's count of `function(model, tokens)`."""
    tokens = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32)
    return jax.jit(function).lower(llama.abstract(c), tokens).compile().cost_analysis()["flops"]


def total(model, tokens_BT):
    positions_BT = jnp.broadcast_to(jnp.arange(LENGTH)[None], (ROWS, LENGTH))
    hidden_BTD, _ = model(tokens_BT, positions_BT, segments_BT=None, cache=None, dropout=None)
    return jnp.sum(losses.token_logprobs(hidden_BTD, model.head(), tokens_BT, jnp.ones(tokens_BT.shape), LENGTH))


def test_a_forward_pass():
    assert counted(total, WIDE) == pytest.approx(formulas.forward_flops(WIDE, ROWS, LENGTH), rel=0.04)


def test_every_part_of_a_forward_pass():
    """What one number of the model adds, the compiler counts as the formula does."""
    for field, size in {"F": 1024, "V": 1024, "N": 16, "K": 8}.items():
        other = dataclasses.replace(WIDE, **{field: size})
        added = counted(total, other) - counted(total, WIDE)
        wanted = formulas.forward_flops(other, ROWS, LENGTH) - formulas.forward_flops(WIDE, ROWS, LENGTH)
        assert added == pytest.approx(wanted, rel=0.07), field


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_gradients(remat):
    c = dataclasses.replace(WIDE, remat=remat)
    # All positions are one chunk here, so that the compiler sees that their logits are there already.
    wanted = formulas.train_flops(c, ROWS, LENGTH, None) - formulas.head_flops(c, ROWS * LENGTH)
    assert counted(jax.grad(total), c) == pytest.approx(wanted, rel=0.02)


@pytest.mark.parametrize(("remat", "rank"), [("dots", 16), ("full", 64)])
def test_gradients_of_adapters(remat, rank):
    """What they save, none of the products that give the gradients of weights, less their own products."""
    c = dataclasses.replace(WIDE, remat=remat)
    model = llama.abstract(c)
    adapters = jax.eval_shape(lambda: lora.init(model, LoraConfig(rank=rank, alpha=16.0), jax.random.key(0)))
    tokens = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32)

    def loss(trained, model, tokens_BT):
        adapters, embedding = trained
        model = lora.whole(adapters, model)
        model.embedding = embedding
        return total(model, tokens_BT)

    # The embedding's gradient adds next to nothing, and makes the one layer give its input's, as all but a model's
    # first layer do.
    lowered = jax.jit(jax.grad(loss)).lower((adapters, model.embedding), model, tokens)
    whole = counted(jax.grad(total), c)
    saved = formulas.train_flops(c, ROWS, LENGTH, None) - formulas.train_flops(c, ROWS, LENGTH, rank)
    assert whole - lowered.compile().cost_analysis()["flops"] == pytest.approx(saved, abs=0.005 * whole)


def test_adapters_take_their_own_moments_and_no_one_elses():
    """Rank 4 beside weights of 4 bytes: the frozen ones once, and adapters with gradient and two moments."""
    alone, rank = Split(rows=1, weights=1, tensor=1), 4
    adapters = jax.eval_shape(
        lambda: lora.init(llama.abstract(WIDE), LoraConfig(rank=rank, alpha=16.0), jax.random.key(0))
    )
    numbers = sum(leaf.size for leaf in jax.tree.leaves(adapters))
    full, adapted = (formulas.train_cost(WIDE, alone, 8, LENGTH, 1, rank) for rank in (None, rank))
    assert full.resident_bytes - adapted.resident_bytes == 3 * 4 * WIDE.parameters - 4 * 4 * numbers
    shared = formulas.train_cost(WIDE, Split(rows=4, weights=8, tensor=2), 8, LENGTH, 1, rank)
    assert (
        0
        < shared.link_bytes
        < formulas.train_cost(WIDE, Split(rows=4, weights=8, tensor=2), 8, LENGTH, 1, None).link_bytes
    )
    assert shared.resident_bytes < adapted.resident_bytes / 2


def test_layers_count_as_often_as_they_run():
    one, three = (formulas.block_flops(dataclasses.replace(WIDE, L=layers), 64, 128) for layers in (1, 3))
    assert three == 3 * one


def test_decoding_reads_each_level_once_for_those_that_share_it():
    """4 groups of 2 prompts of 3 samples on one chip: 4 x 16 + 8 x 32 + 24 x 64 slots, and the weights, each step."""
    alone = Split(rows=1, weights=1, tensor=1)
    room = Shape(data=1, groups=4, prompts=2, samples=3, rows=24, slots=(16, 32, 64), stop_length=1, cache=None)
    cost = formulas.decode_cost(WIDE, alone, room, None, steps=5)
    slots = 4 * 16 + 8 * 32 + 24 * 64
    assert cost.memory_bytes == 5 * (4 * WIDE.parameters + slots * 2 * 1 * 4 * 32 * 4)
    assert cost.link_bytes == 0


@pytest.mark.parametrize("kind", [None, "int8"])
def test_bytes_of_what_is_sampled_with_are_those_of_its_arrays(monkeypatch, kind):
    monkeypatch.setattr(rules, "platform", lambda: "tpu")
    c = dataclasses.replace(WIDE, param_dtype="bfloat16", compute_dtype="bfloat16")
    size = lambda tree: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
    model = jax.eval_shape(functools.partial(quantized.quantize, weights=kind), llama.abstract(c))
    assert formulas.sample_bytes(c, kind) == size(model)
    kept = jax.eval_shape(lambda: cache.empty(c, (c.L,), 3, 5, kind))
    assert 3 * 5 * formulas.kv_token_bytes(c, kind) == 2 * size(kept)


def test_decoding_reads_what_is_rounded_in_fewer_bytes():
    room = Shape(data=1, groups=4, prompts=2, samples=3, rows=24, slots=(16, 32, 64), stop_length=1, cache=None)
    alone = Split(rows=1, weights=1, tensor=1)
    exact = formulas.decode_cost(WIDE, alone, room, None, steps=1)
    rounded = formulas.decode_cost(WIDE, alone, dataclasses.replace(room, cache="int8"), "int8", steps=1)
    others = 4 * (WIDE.parameters - formulas.projections(WIDE))  # float32 to 8 bits, and some scales
    assert 0.25 < (rounded.memory_bytes - others) / (exact.memory_bytes - others) < 0.29
    assert rounded.flops == exact.flops


def test_chips_share_what_can_be_shared():
    alone = formulas.train_cost(WIDE, Split(rows=1, weights=1, tensor=1), 8, LENGTH, 1, None)
    shared = formulas.train_cost(WIDE, Split(rows=4, weights=8, tensor=2), 8, LENGTH, 1, None)
    assert shared.flops == alone.flops / 8
    assert alone.link_bytes == 0 < shared.link_bytes
    assert shared.resident_bytes < alone.resident_bytes / 4
    # Three rows for four chips: each computes all of them.
    assert Split(rows=4, weights=8, tensor=2).own_rows(3) == 3
