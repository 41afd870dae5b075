"""Sampling with weights and cache in 8 bits: how far from sampling without, and what still changes no sample.

How far, for each kind, is printed by `python -m pytest tests/sampling/test_rounding.py -k nat -s`.
"""

import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from srlm_jax.model import llama, quantized, weights
from srlm_jax.model.attention import ALL
from srlm_jax.model.cache import Cache, empty
from srlm_jax.parallel import rules
from srlm_jax.parallel.mesh import MeshShape, sample_mesh
from srlm_jax.sampling import decode
from srlm_jax.sampling.decode import Shape
from srlm_jax.sampling.engine import Draw, EngineConfig, Group, Work, sample
from srlm_jax.sampling.prefill import prefill_prefix
from srlm_jax.text.tokenizer import SentencePieceTokenizer

KINDS = {"weights": ("int8", None), "cache": (None, "int8"), "weights and cache": ("int8", "int8")}


# --- how far ----------------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames="cache")
def predictions(model, tokens_BT, *, cache):
    """Log-probabilities of what comes next [T, B, V], a token at a time as in decoding: each reads what is kept."""
    B, T = tokens_BT.shape
    stack = empty(model.config, model.layers, B, T, cache)

    def step(leaf, t):
        before = Cache(
            parents=(), shared=(), siblings=None, k_LBKSH=leaf[0], v_LBKSH=leaf[1], slot=t, among_themselves=False,
            readable=dataclasses.replace(ALL, length_R=jnp.full(B, t + 1)),
        )  # fmt: skip
        token = jax.lax.dynamic_slice_in_dim(tokens_BT, t, 1, axis=1)
        hidden, after = model(token, jnp.full((B, 1), t), segments_BT=None, cache=before, dropout=None)
        logits = jnp.einsum("bd,dv->bv", hidden[:, 0], model.head(), preferred_element_type=jnp.float32)
        return (after.k_LBKSH, after.v_LBKSH), jax.nn.log_softmax(logits)

    return jax.lax.scan(step, (stack, stack), jnp.arange(T))[1]


def apart(model, tokens_BT, kind):
    """(mean KL divergence in nats a token, share of tokens after which another is the most probable)."""
    exact = predictions(model, tokens_BT, cache=None)
    rounded, cache = quantized.quantize(model, kind[0]), kind[1]
    found = predictions(rounded, tokens_BT, cache=cache)
    divergence = jnp.sum(jnp.exp(exact) * (exact - found), axis=-1).mean()
    return float(divergence), float((exact.argmax(-1) != found.argmax(-1)).mean())


@pytest.fixture(scope="module")
def stories(stories260k, one_device):
    """A trained model, and the two stories of 257 tokens that are published with it."""
    folder = stories260k / "hf"
    config = weights.read_config(folder, param_dtype="float32", compute_dtype="float32", remat="dots")
    places = rules.model_shardings(one_device("data", "tensor"), rules.SAMPLE, llama.abstract(config))
    tokenizer = SentencePieceTokenizer(folder / "tokenizer.model")
    texts = re.findall(r"Once upon a time.*?(?=\n```)", (stories260k / "stories260K.md").read_text(), re.DOTALL)
    tokens_BT = jnp.array([[tokenizer.bos, *tokenizer.encode(text)] for text in texts])
    assert tokens_BT.shape == (2, 257)
    return weights.load(folder, config, places), tokens_BT


@pytest.mark.parametrize("kind", KINDS)
def test_a_trained_model_is_a_hundredth_of_a_nat_a_token_apart_at_most(stories, kind):
    divergence, others = apart(*stories, KINDS[kind])
    print(f"\nstories260k, {kind}: {divergence:.5f} nat a token, another most probable token after {others:.1%}")
    assert 0 < divergence < 0.01
    assert others < 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_random_models_are_a_few_hundredths_of_a_nat_apart(make_llama, kind):
    """Their weights are as unlike one another as they can be, and 16 of them are all that an output has."""
    model, tokens_BT = make_llama(), jax.random.randint(jax.random.key(7), (8, 60), 0, 40)
    divergence, others = apart(model, tokens_BT, KINDS[kind])
    print(f"\nrandom weights, {kind}: {divergence:.5f} nat a token, another most probable token after {others:.1%}")
    assert 0 < divergence < 0.05
    assert others < 0.1


# --- samples ----------------------------------------------------------------------------------------------------------


def tree(groups):
    """Prompts of a judge: all begin with 19 tokens, those of a group go on alike."""
    rng = np.random.default_rng(0)
    ids = lambda low, high: tuple(rng.integers(1, 40, rng.integers(low, high)).tolist())
    opening, made = ids(19, 20), []
    for i in range(groups):
        shared = opening + ids(1, 15)
        made.append(Group(address=(i, 7), prompts=tuple(shared + ids(1, 12) for _ in range(3)), limits=None))
    return made


RANDOM = Draw(samples=3, temperature=0.9, top_p=0.9, max_new_tokens=12, stops=((0,), (7, 8)))


def drawn(model, groups, kind, mesh, draw=RANDOM, **config):
    settings = EngineConfig(**({"rows": 6, "steps": 5} | config), weights=kind[0], cache=kind[1])
    return sample(
        quantized.quantize(model, kind[0]), groups, draw, key=jax.random.key(0), config=settings, mesh=mesh,
        report=lambda finished, sampled: None, work=Work(),
    )  # fmt: skip


def flat(samples):
    return [new.ids for of_group in samples for of_prompt in of_group for new in of_prompt]


def test_neither_the_engines_width_nor_the_order_of_groups_changes_a_sample(tiny_llama, one_device):
    mesh, groups, kind = one_device("data", "tensor"), tree(7), ("int8", "int8")
    wanted = drawn(tiny_llama, groups, kind, mesh)
    assert drawn(tiny_llama, groups, kind, mesh, rows=100, steps=16) == wanted
    assert drawn(tiny_llama, groups[::-1], kind, mesh) == wanted[::-1]


@pytest.mark.parametrize("tensor", [2, pytest.param(8, marks=pytest.mark.long)])
def test_rows_and_heads_split_over_8_devices_change_no_sample(make_llama, one_device, tensor):
    model, groups, kind = make_llama(N=8, K=8, L=1), tree(4), ("int8", "int8")
    wanted = drawn(model, groups, kind, one_device("data", "tensor"))
    mesh = sample_mesh(MeshShape(data=1, fsdp=-1, tensor=tensor))
    split = jax.device_put(model, rules.model_shardings(mesh, rules.SAMPLE, model))
    assert drawn(split, groups, kind, mesh) == wanted


def test_greedy_samples_mostly_begin_as_they_would_without(tiny_llama, one_device):
    mesh, groups = one_device("data", "tensor"), tree(7)
    greedy = dataclasses.replace(RANDOM, samples=1, temperature=0.0)
    exact = flat(drawn(tiny_llama, groups, (None, None), mesh, draw=greedy))
    found = flat(drawn(tiny_llama, groups, ("int8", "int8"), mesh, draw=greedy))
    alike = [sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(*ids, strict=False)))
             for ids in zip(exact, found, strict=True)]  # fmt: skip
    assert exact != found  # or nothing was rounded
    assert sum(alike) / sum(map(len, exact)) > 0.7


@pytest.mark.parametrize(("cache", "kept"), [(None, {"float32"}), ("int8", {"int8", "float32"})])
def test_every_level_is_kept_as_it_is_asked_for(tiny_llama, cache, kept):
    room = Shape(data=1, groups=2, prompts=1, samples=1, rows=2, slots=(8, 8, 8), stop_length=1, cache=cache)
    read = functools.partial(prefill_prefix, cache=cache)
    prefix = jax.eval_shape(read, tiny_llama, jnp.zeros((1, 64), int), jnp.ones(1, int))
    state = jax.eval_shape(lambda prefix: decode.start(tiny_llama, prefix, room, jax.random.key(0)), prefix)
    for stack in (state.prefix.k_LRKSH, state.groups.v_LRKSH, state.prompts.k_LRKSH, state.v_LBKSH):
        assert {str(x.dtype) for x in jax.tree.leaves(stack)} == kept
