"""The losses against values and gradients that can be worked out by hand."""

import json
import math
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from srlm_jax.train import losses

BETA = 0.1
# One pair: the policy moved the chosen answer up by 1 nat and the rejected one down by 1, so the margin is 2.
CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED = (jnp.array([x]) for x in (-10.0, -12.0, -11.0, -11.0))
PAIR = (CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED)


def random_pairs(pairs):
    """Log-probabilities of whole answers, as policy and reference give them."""
    return jax.random.uniform(jax.random.key(0), (4, pairs), minval=-60.0, maxval=-1.0)


def projection(B=2, T=7, D=5, V=11):
    """Hidden states, head, targets and a mask with masked-out ends and middles."""
    keys = jax.random.split(jax.random.key(1), 3)
    hidden = jax.random.normal(keys[0], (B, T, D))
    head = jax.random.normal(keys[1], (D, V))
    targets = jax.random.randint(keys[2], (B, T), 0, V)
    mask = jnp.array([[0, 0, 1, 1, 0, 1, 0], [0, 1, 1, 1, 1, 1, 1]], jnp.float32)
    return hidden, head, targets, mask


def plain_logprobs(hidden, head, targets):
    """The same quantity, spelled out."""
    logprobs = jax.nn.log_softmax(hidden @ head, axis=-1)
    return jnp.take_along_axis(logprobs, targets[..., None], axis=-1)[..., 0]


# Direct preference optimization.


def test_dpo_margin_by_hand():
    assert losses.dpo_margin(*PAIR).tolist() == [2.0]


def test_dpo_loss_by_hand():
    # -log sigmoid(0.1 * 2) = log(1 + exp(-0.2))
    np.testing.assert_allclose(losses.dpo_loss(*PAIR, BETA), [0.59813887], rtol=1e-6)


def test_dpo_prefers_the_chosen_answer():
    better = losses.dpo_loss(CHOSEN + 1, REJECTED, REF_CHOSEN, REF_REJECTED, BETA)
    worse = losses.dpo_loss(CHOSEN, REJECTED + 1, REF_CHOSEN, REF_REJECTED, BETA)
    assert better[0] < losses.dpo_loss(*PAIR, BETA)[0] < worse[0]


def test_dpo_where_policy_and_reference_agree_is_log_2():
    chosen, rejected, _, _ = random_pairs(5)
    np.testing.assert_allclose(losses.dpo_loss(chosen, rejected, chosen, rejected, BETA), np.full(5, math.log(2)))


def test_dpo_gradient_where_policy_and_reference_agree_is_half_of_beta():
    chosen, rejected, _, _ = random_pairs(5)
    total = lambda c, r: losses.dpo_loss(c, r, chosen, rejected, BETA).sum()
    on_chosen, on_rejected = jax.grad(total, argnums=(0, 1))(chosen, rejected)
    np.testing.assert_allclose(on_chosen, np.full(5, -BETA / 2), rtol=1e-6)
    np.testing.assert_allclose(on_rejected, np.full(5, BETA / 2), rtol=1e-6)


def test_dpo_gradient_is_the_closed_form():
    # Rafailov et al., section 4: beta * sigmoid(-beta * margin) is the weight of a pair.
    pairs = random_pairs(5)
    on = jax.grad(lambda pairs: losses.dpo_loss(*pairs, BETA).sum())(pairs)
    weight = BETA / (1 + np.exp(BETA * np.asarray(losses.dpo_margin(*pairs), np.float64)))
    np.testing.assert_allclose(on, np.stack([-weight, weight, weight, -weight]), rtol=1e-5)


def test_conservative_dpo_by_hand():
    # 0.9 * 0.598139 + 0.1 * (0.598139 + 0.2)
    np.testing.assert_allclose(losses.conservative_dpo_loss(*PAIR, BETA, 0.1), [0.61813887], rtol=1e-6)


def test_conservative_dpo_without_smoothing_is_dpo():
    pairs = random_pairs(5)
    np.testing.assert_array_equal(losses.conservative_dpo_loss(*pairs, BETA, 0.0), losses.dpo_loss(*pairs, BETA))


def test_conservative_dpo_with_all_smoothing_is_dpo_the_wrong_way_round():
    chosen, rejected, ref_chosen, ref_rejected = random_pairs(5)
    turned = losses.dpo_loss(rejected, chosen, ref_rejected, ref_chosen, BETA)
    smoothed = losses.conservative_dpo_loss(chosen, rejected, ref_chosen, ref_rejected, BETA, 1.0)
    np.testing.assert_allclose(smoothed, turned, rtol=1e-6)


def test_ipo_by_hand():
    # (2 - 1 / (2 * 0.1))^2 = 9, and nothing to gain where the margin is 5
    np.testing.assert_allclose(losses.ipo_loss(*PAIR, BETA), [9.0], rtol=1e-6)
    reached = losses.ipo_loss(CHOSEN + 3, REJECTED, REF_CHOSEN, REF_REJECTED, BETA)
    np.testing.assert_allclose(reached, [0.0], atol=1e-6)


PREFERENCE_LOSSES = {
    "dpo": lambda pairs: losses.dpo_loss(*pairs, BETA),
    "conservative": lambda pairs: losses.conservative_dpo_loss(*pairs, BETA, 0.2),
    "ipo": lambda pairs: losses.ipo_loss(*pairs, BETA),
}


@pytest.mark.parametrize("loss", PREFERENCE_LOSSES.values(), ids=PREFERENCE_LOSSES)
def test_preference_gradients_agree_with_finite_differences(loss):
    check_grads(loss, (random_pairs(3) / 10,), order=1, modes=("fwd", "rev"), eps=1e-2, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("loss", PREFERENCE_LOSSES.values(), ids=PREFERENCE_LOSSES)
def test_preference_losses_are_the_same_under_jit(loss):
    np.testing.assert_allclose(jax.jit(loss)(random_pairs(3)), loss(random_pairs(3)), rtol=1e-6)


@pytest.mark.parametrize("loss", PREFERENCE_LOSSES.values(), ids=PREFERENCE_LOSSES)
@pytest.mark.parametrize("margin", [1e6, -1e6])
def test_a_margin_beyond_all_bounds_gives_finite_losses_and_gradients(loss, margin):
    pairs = jnp.array([[margin], [0.0], [0.0], [0.0]])
    assert np.isfinite(loss(pairs)).all()
    assert np.isfinite(jax.grad(lambda pairs: loss(pairs).sum())(pairs)).all()


def test_a_hopeless_pair_still_pulls_with_the_whole_of_beta():
    # A naive log(sigmoid(x)) has underflowed here, and gives minus infinity or a gradient of 0.
    on = jax.grad(lambda chosen: losses.dpo_loss(chosen, REJECTED, REF_CHOSEN, REF_REJECTED, BETA)[0])(CHOSEN - 1e6)
    np.testing.assert_allclose(on, [-BETA], rtol=1e-6)


# Log-probabilities of tokens and of sequences.


def test_token_logprobs_by_hand():
    # Logits (0, log 3) and (log 3, 0): probabilities 1/4 and 3/4.
    hidden, head = jnp.array([[[1.0, 0.0], [0.0, 1.0]]]), math.log(3) * jnp.array([[0.0, 1.0], [1.0, 0.0]])
    logprobs = losses.token_logprobs(hidden, head, jnp.array([[0, 0]]), jnp.ones((1, 2)), 8)
    np.testing.assert_allclose(logprobs, [[math.log(1 / 4), math.log(3 / 4)]], rtol=1e-6)


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_chunks_change_neither_log_probabilities_nor_gradients(chunk):
    hidden, head, targets, mask = projection()
    chunked = losses.token_logprobs(hidden, head, targets, mask, chunk)
    np.testing.assert_allclose(chunked, plain_logprobs(hidden, head, targets) * mask, rtol=1e-5, atol=1e-6)

    def gradients(logprobs):
        return jax.grad(lambda hidden, head: (logprobs(hidden, head) * mask).sum(), argnums=(0, 1))(hidden, head)

    found = gradients(lambda hidden, head: losses.token_logprobs(hidden, head, targets, mask, chunk))
    wanted = gradients(lambda hidden, head: plain_logprobs(hidden, head, targets))
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_positions_that_no_row_needs_are_not_even_multiplied():
    hidden, head, targets, mask = projection()
    value = lambda hidden, head: losses.sequence_logprobs(hidden, head, targets, mask, 1).sum()
    wanted = jax.value_and_grad(value, argnums=(0, 1))(hidden, head)
    # The second row wants six positions: the first row's last unwanted one and its own come seventh. What is not a
    # number stays so in every sum, even multiplied by 0.
    broken = hidden.at[0, 6].set(jnp.nan).at[1, 0].set(jnp.nan)
    found = jax.value_and_grad(value, argnums=(0, 1))(broken, head)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_token_logprobs_gradients_agree_with_finite_differences():
    hidden, head, targets, mask = projection()
    logprobs = lambda hidden, head: losses.token_logprobs(hidden, head, targets, mask, 3)
    check_grads(logprobs, (hidden, head), order=1, modes=("rev",), eps=1e-2, atol=1e-2, rtol=1e-2)


def test_token_logprobs_are_float32_whatever_the_hidden_states_are():
    hidden, head, targets, mask = projection()
    half = losses.token_logprobs(hidden.astype(jnp.bfloat16), head.astype(jnp.bfloat16), targets, mask, 3)
    assert half.dtype == jnp.float32
    # Rounding the inputs costs some 1%; rounding the logits or their sum to bfloat16 would cost more than that.
    exact = losses.token_logprobs(
        hidden.astype(jnp.bfloat16).astype(jnp.float32), head.astype(jnp.bfloat16).astype(jnp.float32), targets, mask, 3
    )
    np.testing.assert_allclose(half, exact, rtol=1e-5, atol=1e-5)


def test_gradients_in_half_the_bits_are_those_of_float32_but_for_rounding():
    hidden, head, targets, mask = projection()
    half = [x.astype(jnp.bfloat16) for x in (hidden, head)]
    total = lambda hidden, head: losses.sequence_logprobs(hidden, head, targets, mask, 3).sum()
    found = jax.grad(total, argnums=(0, 1))(*half)
    wanted = jax.grad(total, argnums=(0, 1))(*(x.astype(jnp.float32) for x in half))
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == jnp.bfloat16
        np.testing.assert_allclose(one.astype(jnp.float32), other, rtol=0.02, atol=0.02)


def test_huge_logits_give_finite_log_probabilities_and_gradients():
    hidden, head, targets, mask = projection()
    total = lambda hidden: losses.sequence_logprobs(hidden, 1e4 * head, targets, mask, 3).sum()
    value, gradient = jax.value_and_grad(total)(hidden)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


def test_a_sequence_is_the_sum_of_its_tokens_and_not_their_mean():
    hidden, head, targets, mask = projection()
    tokens = plain_logprobs(hidden, head, targets)
    wanted = [tokens[0, 2] + tokens[0, 3] + tokens[0, 5], tokens[1, 1:].sum()]
    np.testing.assert_allclose(losses.sequence_logprobs(hidden, head, targets, mask, 3), wanted, rtol=1e-5)


def test_an_answer_twice_as_long_is_twice_as_improbable():
    hidden, head = jnp.zeros((1, 8, 2)), jnp.zeros((2, 4))  # every token has probability 1/4
    targets, four, eight = jnp.zeros((1, 8), int), jnp.array([[1.0] * 4 + [0.0] * 4]), jnp.ones((1, 8))
    np.testing.assert_allclose(losses.sequence_logprobs(hidden, head, targets, four, 8), [-4 * math.log(4)], rtol=1e-6)
    np.testing.assert_allclose(losses.sequence_logprobs(hidden, head, targets, eight, 8), [-8 * math.log(4)], rtol=1e-6)


def test_documents_of_a_row_have_sums_of_their_own():
    logprobs = -jnp.array([[1.0, 2.0, 4.0, 8.0], [16.0, 32.0, 64.0, 128.0]])
    mask = jnp.array([[1.0, 0.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    segments = jnp.array([[3, 3, 3, 1], [1, 4, 0, 0]])
    wanted = [-24.0, 0.0, -5.0, -32.0]
    np.testing.assert_array_equal(losses.document_logprobs(logprobs, mask, segments, 4), wanted)


# Supervised fine-tuning.


def test_sft_loss_by_hand():
    # Probabilities 1/4 (kept), 3/4 (masked out): the mean over one token.
    hidden, head = jnp.array([[[1.0, 0.0], [0.0, 1.0]]]), math.log(3) * jnp.array([[0.0, 1.0], [1.0, 0.0]])
    loss = losses.sft_loss(hidden, head, jnp.array([[0, 0]]), jnp.array([[1.0, 0.0]]), 8)
    np.testing.assert_allclose(loss, math.log(4), rtol=1e-6)


def test_sft_loss_is_the_mean_over_all_tokens_of_the_batch_and_not_over_rows():
    hidden, head, targets, mask = projection()
    wanted = -(plain_logprobs(hidden, head, targets) * mask).sum() / 9
    np.testing.assert_allclose(losses.sft_loss(hidden, head, targets, mask, 3), wanted, rtol=1e-5)


def test_sft_gradient_touches_exactly_the_masked_in_positions():
    hidden, head, targets, mask = projection()
    gradient = jax.grad(losses.sft_loss)(hidden, head, targets, mask, 3)
    np.testing.assert_array_equal(np.abs(gradient).sum(axis=-1) > 0, mask == 1)


def test_sft_loss_of_an_empty_mask_is_zero_and_has_no_gradient():
    hidden, head, targets, mask = projection()
    loss, gradient = jax.value_and_grad(losses.sft_loss)(hidden, head, targets, 0 * mask, 3)
    assert loss == 0
    assert not gradient.any()


# What a user of the losses alone has to install.


# What is refused, and what is ignored.


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"targets": (2, 6)}, "axis T is 7 in hidden_BTD and 6 in targets_BT: shift by one"),
        ({"mask": (2, 6)}, "axis T is 7 in hidden_BTD and 6 in mask_BT: shift by one"),
        ({"mask": (2, 1)}, "axis T is 7 in hidden_BTD and 1 in mask_BT"),
        ({"targets": (1, 7)}, "axis B is 2 in hidden_BTD and 1 in targets_BT"),
        ({"head": (6, 11)}, "axis D is 5 in hidden_BTD and 6 in head_DV"),
        ({"head": (1, 5, 11)}, r"head_DV must have the axes \[D, V\], and has shape \(1, 5, 11\)"),
        ({"hidden": (7, 5)}, r"hidden_BTD must have the axes \[B, T, D\], and has shape \(7, 5\)"),
        ({"targets": (2, 7, 1)}, r"targets_BT must have the axes \[B, T\]"),
    ],
)
@pytest.mark.parametrize("loss", [losses.token_logprobs, losses.sequence_logprobs, losses.sft_loss])
def test_shapes_that_disagree_are_refused_by_the_axis(loss, changed, message):
    arrays = dict(zip(("hidden", "head", "targets", "mask"), projection(), strict=True))
    arrays |= {name: jnp.ones(shape, arrays[name].dtype) for name, shape in changed.items()}
    with pytest.raises(ValueError, match=message):
        loss(*arrays.values(), 4)


@pytest.mark.parametrize("chunk", [0, -3])
def test_a_chunk_without_positions_is_refused(chunk):
    with pytest.raises(ValueError, match=f"chunk must be at least 1 position, not {chunk}"):
        losses.token_logprobs(*projection(), chunk)


def test_targets_that_are_no_integers_are_refused():
    hidden, head, targets, mask = projection()
    with pytest.raises(ValueError, match="integer token ids, and is float32"):
        losses.token_logprobs(hidden, head, targets.astype(jnp.float32), mask, 4)


@pytest.mark.parametrize("place", range(1, 4))
@pytest.mark.parametrize("shape", [(3, 1), (1,), (2,), ()])
def test_pairs_of_two_shapes_are_refused(place, shape):
    arrays = list(random_pairs(3))
    arrays[place] = jnp.zeros(shape)
    name = ("chosen_P", "rejected_P", "ref_chosen_P", "ref_rejected_P")[place]
    for loss in (losses.dpo_margin, lambda *a: losses.dpo_loss(*a, BETA), lambda *a: losses.ipo_loss(*a, BETA)):
        with pytest.raises(ValueError, match=rf"chosen_P has shape \(3,\) and {name} "):
            loss(*arrays)


@pytest.mark.parametrize("ignored", [-100, -1, 11, 2**31 - 1])
@pytest.mark.parametrize("hidden_value", [jnp.nan, jnp.inf, -jnp.inf])
@pytest.mark.parametrize("chunk", [2, 7])
def test_positions_without_a_loss_may_hold_anything(ignored, hidden_value, chunk):
    hidden, head, targets, mask = projection()
    poisoned = jnp.where(mask[..., None] == 0, hidden_value, hidden), head, jnp.where(mask == 0, ignored, targets), mask

    def run(hidden, head, targets, mask):
        return jax.value_and_grad(losses.sft_loss, argnums=(0, 1))(hidden, head, targets, mask, chunk)

    for wanted, found in zip(
        jax.tree.leaves(run(hidden, head, targets, mask)), jax.tree.leaves(run(*poisoned)), strict=True
    ):
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("target", [-100, -1, 11])
def test_a_wanted_target_that_is_no_token_is_no_number(target):
    hidden, head, targets, mask = projection()
    assert np.isnan(losses.token_logprobs(hidden, head, targets.at[0, 2].set(target), mask, 4)[0, 2])


def test_the_losses_may_be_mapped_over_pairs():
    pairs = random_pairs(3)
    mapped = jax.vmap(lambda *pair: losses.dpo_loss(*pair, BETA))(*pairs)
    np.testing.assert_allclose(mapped, losses.dpo_loss(*pairs, BETA), rtol=1e-6)


def test_the_readme_shows_code_that_runs():
    text = (pathlib.Path(__file__).parents[2] / "README.md").read_text()
    snippet = text[text.index("## As a library") :].split("```python\n")[1].split("```")[0]
    done = {}
    exec(compile(snippet, "README.md", "exec"), done)
    assert done["loss"].shape == () and np.isfinite(done["loss"])


def test_the_losses_load_nothing_but_jax_and_numpy():
    code = """
import sys
import jax, jax.numpy, numpy
before = set(sys.modules)
from srlm_jax import dpo_loss, sequence_logprobs, sft_loss
import json
print(json.dumps(sorted({name.partition(".")[0] for name in set(sys.modules) - before})))
"""
    root = pathlib.Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    third_party = set(json.loads(done.stdout)) - set(sys.stdlib_module_names)
    assert third_party <= {"srlm_jax", "jax", "jaxlib", "numpy"}
