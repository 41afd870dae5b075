"""The schedule's ends, and what weight decay leaves alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from srlm_jax.train.optimizer import OptimizerConfig, make_optimizer, schedule

# The paper's supervised fine-tuning (section 3.1.3).
SFT = OptimizerConfig(
    learning_rate=5.5e-6, end_learning_rate=1.1e-6, warmup_steps=0,
    b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, clip_norm=1.0,
)  # fmt: skip
DPO = dataclasses.replace(SFT, learning_rate=1e-6, end_learning_rate=1e-7)


@pytest.mark.parametrize(("config", "first", "last"), [(SFT, 5.5e-6, 1.1e-6), (DPO, 1e-6, 1e-7)], ids=["sft", "dpo"])
def test_the_learning_rate_falls_from_the_paper_s_first_to_its_last_value(config, first, last):
    rates = np.array([schedule(config, 200)(step) for step in range(200)])
    np.testing.assert_allclose(rates[[0, -1]], [first, last], rtol=1e-5)
    assert (np.diff(rates) < 0).all()
    np.testing.assert_allclose(rates[99:101].mean(), (first + last) / 2, rtol=1e-5)  # a cosine is symmetric


def test_warm_up_is_linear_to_the_peak_and_its_first_step_learns():
    rates = [float(schedule(dataclasses.replace(SFT, warmup_steps=4), 20)(step)) for step in range(20)]
    np.testing.assert_allclose(rates[:5], 5.5e-6 * np.arange(1, 6) / 5, rtol=1e-5)
    np.testing.assert_allclose(rates[-1], 1.1e-6, rtol=1e-5)


@pytest.mark.parametrize("warmup", [20, 19])
def test_a_warm_up_that_leaves_no_fall_is_refused(warmup):
    with pytest.raises(ValueError, match=rf"warmup_steps \({warmup}\) must leave two of the training's 20 steps"):
        schedule(dataclasses.replace(SFT, warmup_steps=warmup), 20)


def test_the_shortest_training_that_warms_up_ends_at_the_end():
    rates = [float(schedule(dataclasses.replace(SFT, warmup_steps=1), 3)(step)) for step in range(3)]
    np.testing.assert_allclose(rates, [2.75e-6, 5.5e-6, 1.1e-6], rtol=1e-5)


def test_weight_decay_shrinks_all_weights_but_the_norm_scales(tiny_llama):
    # Without a gradient, decay alone moves a weight: by learning rate times decay times itself.
    tx = make_optimizer(dataclasses.replace(SFT, learning_rate=0.5, weight_decay=0.1), 10)
    nothing = jax.tree.map(jnp.zeros_like, tiny_llama)
    updates, _ = jax.jit(tx.update)(nothing, tx.init(tiny_llama), tiny_llama)
    moved = {
        jax.tree_util.keystr(path, simple=True): update
        for path, update in jax.tree_util.tree_leaves_with_path(jax.tree.map(lambda u, w: u / w, updates, tiny_llama))
    }
    assert len(moved) == 12
    for name, change in moved.items():
        np.testing.assert_allclose(change, 0.0 if "norm" in name else -0.05, rtol=1e-5, err_msg=name)


def test_a_gradient_is_clipped_by_its_norm_over_all_weights(tiny_llama):
    # AdamW's first moment, after one step, is (1 - b1) times the clipped gradient.
    tx = make_optimizer(dataclasses.replace(SFT, b1=0.5, clip_norm=2.0), 10)
    gradient = jax.tree.map(jnp.ones_like, tiny_llama)
    _, state = jax.jit(tx.update)(gradient, tx.init(tiny_llama), tiny_llama)
    first_moments = jax.tree.leaves(state[1][0].mu)
    norm = np.sqrt(sum(float(jnp.square(m).sum()) for m in first_moments))
    np.testing.assert_allclose(norm, 0.5 * 2.0, rtol=1e-5)
