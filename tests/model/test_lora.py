"""Adapters: they start as nothing, are trained in the place of weights, and end as part of them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from srlm_jax.model import lora
from srlm_jax.model.lora import LoraConfig
from srlm_jax.storage.checkpoint import named_leaves

CONFIG = LoraConfig(rank=3, alpha=4.5)  # counts 1.5 times, so that a forgotten scale shows
TOKENS = np.random.default_rng(1).integers(1, 40, (2, 12))


@jax.jit
def hidden(model):
    positions_BT = jnp.broadcast_to(jnp.arange(TOKENS.shape[1])[None], TOKENS.shape)
    return model(jnp.asarray(TOKENS), positions_BT, segments_BT=None, cache=None, dropout=None)[0]


@jax.jit
@jax.grad
def gradient(trainable, frozen):
    """Of a number that depends on every hidden state."""
    return jnp.sum(jnp.sin(hidden(lora.whole(trainable, frozen))))


@pytest.fixture(scope="module")
def fresh(tiny_llama):
    return lora.init(tiny_llama, CONFIG, jax.random.key(0))


@pytest.fixture(scope="module")
def trained(fresh):
    """Adapters whose B is not zero, as after some steps; large enough that what they add shows."""
    rng = np.random.default_rng(2)
    return jax.tree.map(lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape), x.dtype), fresh)


def merged(model, adapters):
    return lora.merge(adapters, jax.tree.map(jnp.copy, model))  # a copy: what is merged into is donated


def test_new_adapters_change_nothing(tiny_llama, fresh):
    np.testing.assert_array_equal(hidden(lora.whole(fresh, tiny_llama)), hidden(tiny_llama))
    for name in lora.PROJECTIONS:
        assert not getattr(fresh, name).b[...].any() and getattr(fresh, name).a[...].all()
    for found, wanted in zip(jax.tree.leaves(merged(tiny_llama, fresh)), jax.tree.leaves(tiny_llama), strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_what_a_new_adapter_reads_it_gives_on_with_unit_variance(make_llama):
    adapters = lora.init(make_llama(D=64, F=96), LoraConfig(rank=16, alpha=16.0), jax.random.key(0))
    for name, size in {"q": 64, "o": 32, "down": 96}.items():
        np.testing.assert_allclose(getattr(adapters, name).a[...].std() * size**0.5, 1, atol=0.1)


def test_shapes_and_axes_are_those_of_the_weight(fresh):
    assert (fresh.o.a.shape, fresh.o.a.axes) == ((2, 4, 8, 3), ("layers", "heads", "head", "rank"))
    assert (fresh.o.b.shape, fresh.o.b.axes) == ((2, 3, 16), ("layers", "rank", "embed"))
    assert (fresh.k.a.shape, fresh.k.a.axes) == ((2, 16, 3), ("layers", "embed", "rank"))
    assert (fresh.k.b.shape, fresh.k.b.axes) == ((2, 3, 2, 8), ("layers", "rank", "kv_heads", "head"))


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_a_merged_model_computes_what_the_adapted_one_does(make_llama, trained, remat):
    model = make_llama(remat=remat)
    adapted, ordinary = hidden(lora.whole(trained, model)), hidden(merged(model, trained))
    np.testing.assert_allclose(adapted, ordinary, rtol=1e-4, atol=1e-4)
    assert np.abs(ordinary - hidden(model)).max() > 0.1


def test_gradients_are_those_of_the_weights_projected(tiny_llama, trained):
    """W' = W + s A B, so dA = s dW' B^T and dB = s A^T dW'."""
    found = gradient(trained, tiny_llama)
    of_weights = gradient(merged(tiny_llama, trained), None)
    for name, inputs in lora.PROJECTIONS.items():
        adapter, dw, s = getattr(trained, name), np.asarray(getattr(of_weights.blocks, name)[...]), 1.5
        for layer in range(2):
            a = np.asarray(adapter.a[layer]).reshape(-1, 3)
            b = np.asarray(adapter.b[layer]).reshape(3, -1)
            matrix = dw[layer].reshape(np.prod(dw.shape[1 : 1 + inputs]), -1)
            for ours, wanted in (
                (getattr(found, name).a, s * matrix @ b.T),
                (getattr(found, name).b, s * a.T @ matrix),
            ):
                np.testing.assert_allclose(
                    np.asarray(ours[layer]).reshape(wanted.shape), wanted, rtol=1e-4, atol=1e-4
                )  # fmt: skip
                assert np.abs(wanted).max() > 1e-2


def test_merged_weights_are_rounded_once_to_the_type_they_are_kept_in(make_llama, trained):
    model = make_llama(param_dtype="bfloat16")
    found, before = named_leaves(merged(model, trained)), named_leaves(model)
    for name, leaf in before.items():
        assert found[name].dtype == jnp.bfloat16
        short = name.removeprefix("blocks/")
        if short not in lora.PROJECTIONS:
            np.testing.assert_array_equal(found[name], leaf)
            continue
        a, b = getattr(trained, short).a[...], getattr(trained, short).b[...]
        update = np.stack([np.tensordot(a[layer], b[layer], axes=1) for layer in range(2)])
        wanted = (np.asarray(leaf, np.float32) + 1.5 * update).astype(jnp.bfloat16)
        # float32 sums of another order may round to the neighbour, of numbers that lie in the middle.
        assert np.mean(np.asarray(found[name]) == wanted) > 0.99, name


def test_without_a_configuration_all_weights_are_trained(tiny_llama, one_device):
    trainable, frozen = lora.split(tiny_llama, None, jax.random.key(0), one_device("data", "fsdp", "tensor"))
    assert trainable is tiny_llama and frozen is None
    assert lora.whole(trainable, frozen) is lora.merge(trainable, frozen) is tiny_llama


@pytest.mark.parametrize(
    ("change", "said"),
    [({"rank": 0}, "rank is 0: it must be at least 1"), ({"alpha": 0.0}, "alpha is 0.0: it must be above 0")],
)
def test_impossible_adapters_are_refused(change, said):
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(CONFIG, **change)


def test_adapters_are_narrower_than_every_projection(tiny_config):
    lora.check_rank(dataclasses.replace(CONFIG, rank=16), tiny_config)
    lora.check_rank(dataclasses.replace(CONFIG, rank=None), tiny_config)
    with pytest.raises(ValueError, match=r"rank is 17, more than the 16 of the narrowest projection \(model\.D\)"):
        lora.check_rank(dataclasses.replace(CONFIG, rank=17), tiny_config)


@pytest.mark.parity
def test_a_model_of_transformers_with_adapters_of_torch_agrees(
    tiny_llama, trained, as_transformers, transformers_block
):
    """Every linear layer of a block with a hand-written adapter beside it: hidden states, and gradients of A and B."""
    import torch

    class Adapted(torch.nn.Module):
        def __init__(self, linear, a, b):
            super().__init__()
            self.linear, self.a, self.b = linear.requires_grad_(False), torch.nn.Parameter(a), torch.nn.Parameter(b)

        def forward(self, x):
            return self.linear(x) + 1.5 * (x @ self.a) @ self.b

    theirs, placed = as_transformers(tiny_llama), {}
    for their_name, (name, _) in transformers_block.items():
        if name not in lora.PROJECTIONS:
            continue
        adapter = getattr(trained, name)
        for layer in range(2):
            a = torch.tensor(np.asarray(adapter.a[layer]).reshape(-1, 3))
            b = torch.tensor(np.asarray(adapter.b[layer]).reshape(3, -1))
            parent, _, child = f"model.layers.{layer}.{their_name.removesuffix('.weight')}".rpartition(".")
            module = Adapted(theirs.get_submodule(f"{parent}.{child}"), a, b)
            setattr(theirs.get_submodule(parent), child, module)
            placed[name, layer] = module
    states = theirs.model(torch.tensor(TOKENS)).last_hidden_state
    torch.sin(states).sum().backward()
    wanted = states.detach().numpy()
    np.testing.assert_allclose(hidden(lora.whole(trained, tiny_llama)), wanted, rtol=1e-4, atol=1e-4)
    found = gradient(trained, tiny_llama)
    for (name, layer), module in placed.items():
        for ours, theirs in ((getattr(found, name).a, module.a.grad), (getattr(found, name).b, module.b.grad)):
            np.testing.assert_allclose(
                np.asarray(ours[layer]).reshape(theirs.shape), theirs.numpy(), rtol=1e-3, atol=1e-4
            )
