"""The losses, as pure functions of arrays. Importing this file loads nothing but jax and numpy.

Axes: B rows, T tokens, D width, V vocabulary, P preference pairs, N documents.
"""

import jax
import jax.numpy as jnp


def token_logprobs(hidden_BTD: jax.Array, head_DV: jax.Array, targets_BT: jax.Array, chunk: int) -> jax.Array:
    """Log-probability of each target token, without ever holding the logits of all of them.

    Logits are made for `chunk` positions of each row at a time, in float32, and made again in the backward pass, so
    the memory is B * chunk * V instead of B * T * V.

    Args:
      hidden_BTD: final hidden states; `hidden_BTD[:, t]` is what predicts `targets_BT[:, t]`.
      head_DV: output projection.
      targets_BT: token ids. The shift by one is the caller's.
      chunk: positions at a time.

    Returns:
      float32 [B, T], in nats.
    """
    B, T, D = hidden_BTD.shape

    @jax.checkpoint
    def one_chunk(hidden_BCD: jax.Array, targets_BC: jax.Array) -> jax.Array:
        logits_BCV = jnp.einsum("bcd,dv->bcv", hidden_BCD, head_DV, preferred_element_type=jnp.float32)
        taken_BC = jnp.take_along_axis(logits_BCV, targets_BC[..., None], axis=-1)[..., 0]
        return taken_BC - jax.nn.logsumexp(logits_BCV, axis=-1)

    if chunk >= T:
        return one_chunk(hidden_BTD, targets_BT)
    chunks = -(-T // chunk)
    padding = chunks * chunk - T
    hidden_BTD = jnp.pad(hidden_BTD, ((0, 0), (0, padding), (0, 0)))
    targets_BT = jnp.pad(targets_BT, ((0, 0), (0, padding)))
    pieces = (
        hidden_BTD.reshape(B, chunks, chunk, D).swapaxes(0, 1),
        targets_BT.reshape(B, chunks, chunk).swapaxes(0, 1),
    )
    _, logprobs = jax.lax.scan(lambda carry, piece: (carry, one_chunk(*piece)), None, pieces)
    return logprobs.swapaxes(0, 1).reshape(B, chunks * chunk)[:, :T]


def sequence_logprobs(
    hidden_BTD: jax.Array, head_DV: jax.Array, targets_BT: jax.Array, mask_BT: jax.Array, chunk: int
) -> jax.Array:
    """Log-probability of each row's response: the sum, never the mean, over its tokens, the end token included.

    Args:
      hidden_BTD, head_DV, targets_BT, chunk: as for `token_logprobs`.
      mask_BT: 1 where the target is a token of the response, 0 elsewhere.

    Returns:
      float32 [B], in nats.
    """
    return jnp.sum(token_logprobs(hidden_BTD, head_DV, targets_BT, chunk) * mask_BT, axis=-1)


def document_logprobs(logprobs_BT: jax.Array, mask_BT: jax.Array, segments_BT: jax.Array, documents: int) -> jax.Array:
    """Log-probability of each document's response in rows that hold several: sums over its masked-in tokens.

    Args:
      logprobs_BT: of the target tokens, as `token_logprobs` gives them.
      mask_BT: as for `sequence_logprobs`.
      segments_BT: the number of each token's document, from 1; 0 is no document's.
      documents: how many there are.

    Returns:
      float32 [documents], in nats; 0 for a document that is in none of the rows.
    """
    # Comparisons and one sum, which the compiler makes one loop: a scatter would add in an order of its own on GPUs.
    own_BTN = segments_BT[..., None] == jnp.arange(1, documents + 1).reshape(1, 1, -1)
    return jnp.sum(jnp.where(own_BTN, (logprobs_BT * mask_BT)[..., None], 0), axis=(0, 1))


def sft_loss(
    hidden_BTD: jax.Array, head_DV: jax.Array, targets_BT: jax.Array, mask_BT: jax.Array, chunk: int
) -> jax.Array:
    """Mean negative log-likelihood of the masked-in target tokens of the whole batch (paper section 2.4).

    Arguments as for `sequence_logprobs`. Returns a float32 scalar; 0 where the mask is empty.
    """
    total = jnp.sum(token_logprobs(hidden_BTD, head_DV, targets_BT, chunk) * mask_BT)
    return -total / jnp.maximum(jnp.sum(mask_BT), 1)


def dpo_margin(
    chosen_P: jax.Array, rejected_P: jax.Array, ref_chosen_P: jax.Array, ref_rejected_P: jax.Array
) -> jax.Array:
    """How much more the policy prefers the chosen answer than the reference does, in nats, for each pair.

    (log pi(chosen) - log ref(chosen)) - (log pi(rejected) - log ref(rejected)), each log-probability summed over the
    answer's tokens.
    """
    return (chosen_P - ref_chosen_P) - (rejected_P - ref_rejected_P)


def dpo_loss(
    chosen_P: jax.Array, rejected_P: jax.Array, ref_chosen_P: jax.Array, ref_rejected_P: jax.Array, beta: float
) -> jax.Array:
    """Direct Preference Optimization (Rafailov et al., arXiv 2305.18290, equation 7), for each pair.

    Args:
      chosen_P, rejected_P: the policy's log-probabilities of whole answers, float [P], in nats.
      ref_chosen_P, ref_rejected_P: the reference's; no gradient is wanted through them.
      beta: strength of the pull towards the reference; the paper's is 0.1.

    Returns:
      float [P]: -log sigmoid(beta * margin), which is log 2 where policy and reference agree.
    """
    return -jax.nn.log_sigmoid(beta * dpo_margin(chosen_P, rejected_P, ref_chosen_P, ref_rejected_P))


def conservative_dpo_loss(
    chosen_P: jax.Array,
    rejected_P: jax.Array,
    ref_chosen_P: jax.Array,
    ref_rejected_P: jax.Array,
    beta: float,
    label_smoothing: float,
) -> jax.Array:
    """DPO where a share `label_smoothing` of the preferences is taken to be the wrong way round (Mitchell 2023).

    Arguments and result as for `dpo_loss`, which it equals at `label_smoothing` 0.
    """
    logits_P = beta * dpo_margin(chosen_P, rejected_P, ref_chosen_P, ref_rejected_P)
    right, wrong = jax.nn.log_sigmoid(logits_P), jax.nn.log_sigmoid(-logits_P)
    return -(1 - label_smoothing) * right - label_smoothing * wrong


def ipo_loss(
    chosen_P: jax.Array, rejected_P: jax.Array, ref_chosen_P: jax.Array, ref_rejected_P: jax.Array, beta: float
) -> jax.Array:
    """Identity Preference Optimization (Azar et al., arXiv 2310.12036, equation 17), for each pair.

    (margin - 1 / (2 beta))^2: a margin to reach, not to grow without end. Arguments as for `dpo_loss`; the
    log-probabilities here are sums over tokens, as the paper of IPO has them.
    """
    return jnp.square(dpo_margin(chosen_P, rejected_P, ref_chosen_P, ref_rejected_P) - 1 / (2 * beta))
