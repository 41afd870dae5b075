"""Log-probabilities of watched tokens, against a forward pass over the whole text."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from srlm_jax.sampling import engine
from srlm_jax.sampling.engine import Draw, EngineConfig, Work, decoding_model

CONFIG = EngineConfig(rows=6, steps=5, weights=None, cache=None)
DRAW = Draw(samples=3, temperature=0.4, top_p=0.7, max_new_tokens=12, stops=((0,), (7, 8)))
WATCHED = (5, 0, 39, 17)


def groups_that_share(count, prompts):
    """Groups whose prompts all begin alike, and those of a group for longer."""
    rng = np.random.default_rng(0)
    draw = lambda n: tuple(rng.integers(1, 40, n).tolist())
    opening = draw(19)
    made = []
    for i in range(count):
        shared = opening + draw(3 + i)
        made.append(
            engine.Group(address=(i, 7), prompts=tuple(shared + draw(1 + p) for p in range(prompts)), limits=None)
        )
    return made


@pytest.fixture(scope="module")
def run(tiny_llama, one_device):
    mesh = one_device("data", "tensor")
    model = decoding_model(tiny_llama, mesh)

    def run(groups, draw, config=CONFIG):
        key, report = jax.random.key(0), lambda finished, tokens: None
        return engine.sample(model, groups, draw, key=key, config=config, mesh=mesh, report=report, work=Work())

    return run


def logprobs_of(model, prompt, ids):
    """[T, V]: of every token in the place of each of `ids`."""
    text = jnp.asarray([*prompt, *ids])
    hidden, _ = model(text[None], jnp.arange(text.size)[None], segments_BT=None, cache=None, dropout=None)
    return np.asarray(jax.nn.log_softmax(hidden[0, len(prompt) - 1 : -1] @ model.head(), axis=-1))


@pytest.fixture(scope="module")
def watched(run):
    groups = groups_that_share(7, 2)
    return groups, run(groups, dataclasses.replace(DRAW, watched=WATCHED))


def test_watched_tokens_have_the_log_probabilities_of_a_forward_pass(watched, tiny_llama):
    groups, found = watched
    for group, of_group in zip(groups, found, strict=True):
        for prompt, samples in zip(group.prompts, of_group, strict=True):
            for sample in samples:
                wanted = logprobs_of(tiny_llama, prompt, sample.ids)[:, WATCHED]
                assert sample.watched_TW.dtype == np.float32
                np.testing.assert_allclose(sample.watched_TW, wanted, atol=2e-5)


def test_the_probabilities_of_all_tokens_sum_to_one(run):
    found = run(groups_that_share(2, 2), dataclasses.replace(DRAW, watched=tuple(range(40))))
    for sample in (sample for of_group in found for samples in of_group for sample in samples):
        assert sample.watched_TW.shape == (len(sample.ids), 40)
        np.testing.assert_allclose(np.exp(sample.watched_TW).sum(axis=1), 1, atol=1e-5)


def test_watching_changes_no_sample_and_unwatched_samples_carry_nothing(run, watched):
    groups, found = watched
    plain = run(groups, DRAW)
    assert found == plain
    assert all(sample.watched_TW is None for of_group in plain for samples in of_group for sample in samples)


def test_the_width_of_the_engine_changes_no_probability(run, watched):
    groups, narrow = watched
    wide = run(groups, dataclasses.replace(DRAW, watched=WATCHED), dataclasses.replace(CONFIG, rows=100, steps=16))
    for a, b in zip(jax.tree.leaves(narrow), jax.tree.leaves(wide), strict=True):
        np.testing.assert_allclose(a.watched_TW, b.watched_TW, atol=2e-5)
