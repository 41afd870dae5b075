"""The model against transformers' Llama on the same weights, whole and part by part."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from srlm_jax.model import ops
from srlm_jax.model.config import RopeScaling
from srlm_jax.model.llama import head_major, project

pytestmark = pytest.mark.parity

VARIANTS = {
    "full heads": {"K": 4},
    "grouped queries": {"K": 2},
    "one key-value head": {"K": 1},
    "tied": {"tied": True},
    "another rotary base": {"rope_theta": 10_000.0},
    "scaled rotary angles": {
        "H": 16,
        "rope_theta": 10_000.0,
        "rope_scaling": RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=64),
    },
    "a large eps": {"norm_eps": 0.1},
}


@pytest.fixture(scope="module")
def torch():
    import torch

    return torch


@pytest.fixture(scope="module", params=VARIANTS.values(), ids=VARIANTS)
def pair(request, make_llama, as_transformers):
    """Our model and theirs with the same weights."""
    ours = make_llama(**request.param)
    return ours, as_transformers(ours)


def assert_close(ours, theirs):
    theirs = theirs.detach().numpy()
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4 * np.abs(theirs).max())


def hidden(shape=(2, 7, 16)):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def test_logits(pair, torch):
    ours, theirs = pair
    tokens = np.random.default_rng(1).integers(0, 40, (2, 9))
    positions = jnp.broadcast_to(jnp.arange(9), (2, 9))
    found, _ = ours(jnp.asarray(tokens), positions, segments_BT=None, cache=None, dropout=None)
    with torch.no_grad():
        wanted = theirs(torch.tensor(tokens)).logits
    assert wanted.std() > 0.5  # so that agreement means something
    assert_close(found @ ours.head(), wanted)


def test_gradients_of_every_weight(pair, torch, transformers_block):
    ours, theirs = pair
    tokens = np.random.default_rng(1).integers(0, 40, (2, 9))
    positions = jnp.broadcast_to(jnp.arange(9), (2, 9))

    @jax.jit
    @jax.grad
    def gradient(model):
        found, _ = model(jnp.asarray(tokens), positions, segments_BT=None, cache=None, dropout=None)
        return jnp.square(found @ model.head()).mean()

    theirs.zero_grad()
    theirs(torch.tensor(tokens)).logits.square().mean().backward()
    found = gradient(ours)
    assert_close(found.embedding[...], theirs.model.embed_tokens.weight.grad)
    assert_close(found.norm[...], theirs.model.norm.weight.grad)
    for layer, block in enumerate(theirs.model.layers):
        for name, (mine, turn) in transformers_block.items():
            assert_close(turn(getattr(found.blocks, mine)[layer]), block.get_parameter(name).grad)


def test_rms_norm(pair, torch):
    ours, theirs = pair
    x = hidden()
    found = ops.rms_norm(jnp.asarray(x), ours.blocks.attention_norm[0], ours.config.norm_eps)
    assert_close(found, theirs.model.layers[0].input_layernorm(torch.tensor(x)))


def test_rotary_angles(pair, torch):
    ours, theirs = pair
    positions = np.array([[0, 1, 5, 1000]])
    found = ops.rope_angles(jnp.asarray(positions), ours.config.H, ours.config.rope_theta, ours.config.rope_scaling)
    wanted = theirs.model.rotary_emb(torch.zeros(1), torch.tensor(positions))
    for one, other in zip(found, wanted, strict=True):
        assert_close(jnp.concatenate([one, one], axis=-1), other)


def test_attention(pair, torch):
    ours, theirs = pair
    c, w, x = ours.config, ours.blocks, hidden()
    positions = np.arange(7)[None].repeat(2, axis=0)
    angles = ops.rope_angles(jnp.asarray(positions), c.H, c.rope_theta, c.rope_scaling)
    q, k, v = (head_major(project(jnp.asarray(x), weight[0]), c.H) for weight in (w.q, w.k, w.v))
    q, k = (ops.rotate(heads, *angles) for heads in (q, k))
    causal = jnp.tril(jnp.ones((7, 7), bool))
    out, _ = ops.attend(q, k, v, causal[None, None])
    found = jnp.einsum("bnth,nhd->btd", out, w.o[0])

    x = torch.tensor(x)
    mask = torch.full((7, 7), -torch.inf).triu(1)[None, None]
    rotary = theirs.model.rotary_emb(x, torch.tensor(positions))
    assert_close(found, theirs.model.layers[0].self_attn(x, position_embeddings=rotary, attention_mask=mask)[0])


def test_mlp(pair, torch):
    ours, theirs = pair
    w, x = ours.blocks, hidden()
    found = ops.swiglu(jnp.asarray(x), w.gate[0], w.up[0], w.down[0])
    assert_close(found, theirs.model.layers[0].mlp(torch.tensor(x)))
