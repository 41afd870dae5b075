"""Logits that are NaN or infinite end the sampling, with the part of the model where that begins."""

import jax
import jax.numpy as jnp
import pytest

from srlm_jax.sampling.diagnosis import NotFinite, first_part
from srlm_jax.sampling.engine import Draw, EngineConfig, Group, Work, decoding_model, sample

PROMPTS = (Group(address=(0, 0), prompts=((1, 2, 3, 4), (1, 2, 5)), limits=None),)


@pytest.fixture
def sample_of(one_device):
    """`sample_of(model, 0.7)`: what is sampled of two prompts at a temperature."""
    mesh = one_device("data", "tensor")

    def draw(model, temperature):
        params = Draw(samples=2, temperature=temperature, top_p=0.9, max_new_tokens=9, stops=(), watched=())
        return sample(
            decoding_model(model, mesh), PROMPTS, params, key=jax.random.key(0),
            config=EngineConfig(rows=4, steps=4, weights=None, cache=None), mesh=mesh,
            report=lambda finished, tokens: None, work=Work(),
        )  # fmt: skip

    return draw


def scaled(model, name, layer, factor):
    """The model with a weight of one layer, or of the whole model if that is None, many times as large."""
    changed = jax.tree.map(lambda leaf: leaf, model)
    owner = changed if layer is None else changed.blocks
    weight = getattr(owner, name)
    place = ... if layer is None else layer
    setattr(owner, name, jax.tree.map(lambda leaf: leaf.at[place].multiply(factor), weight))
    return changed


OVERFLOWS = [
    ("embedding", None, "embedding"),
    ("o", 0, "attention of layer 0"),
    ("o", 2, "attention of layer 2"),
    ("down", 1, "MLP of layer 1"),
    ("gate", 2, "MLP of layer 2"),
    ("norm", None, "final norm"),
    ("output", None, "output head"),
]


@pytest.mark.parametrize(("name", "layer", "part"), OVERFLOWS)
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_number_too_large_for_float16_is_an_error_with_its_place(
    make_llama, sample_of, name, layer, part, temperature
):
    """It once gave token 0 for ever, and exit status 0."""
    model = make_llama(L=3, param_dtype="float16", compute_dtype="float16")
    sample_of(model, temperature)
    with pytest.raises(NotFinite, match=rf"NaN or infinite in float16, first in the {part}\. .*65,504.* bfloat16"):
        sample_of(scaled(model, name, layer, 1e7), temperature)


def test_bfloat16_holds_what_float16_does_not(make_llama, sample_of):
    model = make_llama(L=3, compute_dtype="bfloat16")
    sample_of(scaled(model, "down", 1, 1e7), 0.7)


def test_weights_that_are_nan_are_said_to_be_damaged(make_llama, sample_of):
    with pytest.raises(NotFinite, match=r"in float32, first in the attention of layer 1\. Its weights are damaged, or"):
        sample_of(scaled(make_llama(L=3), "v", 1, float("nan")), 0.7)


def test_the_diagnosis_leaves_the_model_as_it_is(make_llama, one_device):
    model = decoding_model(make_llama(L=3), one_device("data", "tensor"))
    broken = jax.tree.map(lambda leaf: leaf, model)
    broken.blocks[1].down = jax.tree.map(lambda leaf: leaf * jnp.nan, broken.blocks[1].down)
    before = [bool(jnp.all(leaf == leaf)) for leaf in jax.tree.leaves(broken)]
    assert first_part(model, [1, 2, 3]) is None
    assert first_part(broken, [1, 2, 3]) == "MLP of layer 1"
    assert [bool(jnp.all(leaf == leaf)) for leaf in jax.tree.leaves(broken)] == before
    assert all(bool(jnp.any(blocks.gate[...] != 0)) for blocks in broken.blocks)
