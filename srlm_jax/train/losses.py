"""The losses, as pure functions of arrays. Importing this file loads nothing but jax and numpy.

Axes: B rows, T tokens, D width, V vocabulary, C positions of a chunk, S chunks, P preference pairs, N documents.
"""

import functools

import jax
import jax.numpy as jnp


def token_logprobs(
    hidden_BTD: jax.Array, head_DV: jax.Array, targets_BT: jax.Array, mask_BT: jax.Array, chunk: int
) -> jax.Array:
    """Log-probability of each target token that is wanted, without ever holding the logits of all of them.

    Logits are made for `chunk` positions of each row at a time, in float32, and made again in the backward pass, so
    the memory is B * chunk * V instead of B * T * V. Positions that no row wants cost nothing: of each row those that
    are wanted come first, and there are as many turns as the row with most of them needs.

    Args:
      hidden_BTD: final hidden states; `hidden_BTD[:, t]` is what predicts `targets_BT[:, t]`.
      head_DV: output projection.
      targets_BT: token ids. The shift by one is the caller's: `tokens[:, 1:]` are the targets of `hidden[:, :-1]`.
      mask_BT: 0 where no log-probability is wanted. Hidden states and targets there may hold anything, NaN or -100 too.
      chunk: positions at a time.

    Returns:
      float32 [B, T], in nats; 0 where the mask is 0, and NaN where a wanted target is not an id from 0 to V - 1.

    Raises ValueError where two shapes disagree (the message names the axis), targets are not integers, or `chunk` is
    below 1.
    """
    _check_rows(hidden_BTD, head_DV, targets_BT, mask_BT, chunk)
    wanted_BT = mask_BT != 0
    # Nothing of a position that is not wanted may reach a sum: 0 * NaN is NaN.
    hidden_BTD = jnp.where(wanted_BT[..., None], hidden_BTD, 0)
    # An id below 0 would be counted from the vocabulary's end. One past the end gives NaN.
    targets_BT = jnp.where(wanted_BT, jnp.where(targets_BT < 0, head_DV.shape[1], targets_BT), 0)
    return _chunked(hidden_BTD, head_DV, targets_BT, mask_BT, max(1, min(chunk, hidden_BTD.shape[1])))


def _check_rows(
    hidden_BTD: jax.Array, head_DV: jax.Array, targets_BT: jax.Array, mask_BT: jax.Array, chunk: int
) -> None:
    """Shapes are static, so this runs when a program is traced and costs nothing afterwards."""
    sizes: dict[str, tuple[int, str]] = {}  # of each axis, and the array that had it first
    arrays = {"hidden_BTD": hidden_BTD, "head_DV": head_DV, "targets_BT": targets_BT, "mask_BT": mask_BT}
    for name, array in arrays.items():
        axes = name.partition("_")[2]
        if array.ndim != len(axes):
            raise ValueError(f"{name} must have the axes [{', '.join(axes)}], and has shape {array.shape}")
        for axis, size in zip(axes, array.shape, strict=True):
            known, where = sizes.setdefault(axis, (size, name))
            if size != known:
                advice = ": shift by one, hidden[:, :-1] with tokens[:, 1:]" if axis == "T" else ""
                raise ValueError(f"axis {axis} is {known} in {where} and {size} in {name}{advice}")
    if not jnp.issubdtype(targets_BT.dtype, jnp.integer):
        raise ValueError(f"targets_BT must hold integer token ids, and is {targets_BT.dtype}")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1 position, not {chunk}")


def _logits(hidden_BCD: jax.Array, head_DV: jax.Array) -> jax.Array:
    return jnp.einsum("bcd,dv->bcv", hidden_BCD, head_DV, preferred_element_type=jnp.float32)


# The gradient by hand: the log-sum-exp is kept, so that the way back makes logits once more and nothing else; both
# gradients come from one array of them, which is rounded to the type of the hidden states before it is multiplied.
@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _chunked(
    hidden_BTD: jax.Array, head_DV: jax.Array, targets_BT: jax.Array, mask_BT: jax.Array, chunk: int
) -> jax.Array:
    return _chunked_forward(hidden_BTD, head_DV, targets_BT, mask_BT, chunk)[0]


def _chunked_forward(hidden_BTD, head_DV, targets_BT, mask_BT, chunk):
    order_BT, place_BT, turns = _wanted_first(mask_BT, chunk)
    hidden_SBCD, targets_SBC = (_cut(_taken(x, order_BT), chunk) for x in (hidden_BTD, targets_BT))

    def one(turn, found):
        logits_BCV = _logits(hidden_SBCD[turn], head_DV)
        taken_BC = jnp.take_along_axis(logits_BCV, targets_SBC[turn][..., None], axis=-1)[..., 0]
        lse_BC = jax.nn.logsumexp(logits_BCV, axis=-1)
        return tuple(x.at[turn].set(now) for x, now in zip(found, (taken_BC - lse_BC, lse_BC), strict=True))

    nothing = jnp.zeros(targets_SBC.shape, jnp.float32)
    logprobs_SBC, lse_SBC = jax.lax.fori_loop(0, turns, one, (nothing, nothing))
    logprobs_BT = jnp.where(mask_BT == 0, 0, _put_back(logprobs_SBC, place_BT))
    return logprobs_BT, (hidden_BTD, head_DV, targets_BT, mask_BT, lse_SBC, order_BT, place_BT, turns)


def _chunked_backward(chunk, kept, gradient_BT):
    hidden_BTD, head_DV, targets_BT, mask_BT, lse_SBC, order_BT, place_BT, turns = kept
    gradient_BT = jnp.where(mask_BT == 0, 0, gradient_BT)
    hidden_SBCD, targets_SBC, gradient_SBC = (
        _cut(_taken(x, order_BT), chunk) for x in (hidden_BTD, targets_BT, gradient_BT)
    )
    tokens_1V = jnp.arange(head_DV.shape[1]).reshape(1, 1, -1)
    multiply = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

    def one(turn, gradients):
        hidden_gradient_SBCD, head_gradient_DV = gradients
        # d log p(target) / d logits = one at the target - softmax
        softmax_BCV = jnp.exp(_logits(hidden_SBCD[turn], head_DV) - lse_SBC[turn][..., None])
        on_BCV = gradient_SBC[turn][..., None] * ((tokens_1V == targets_SBC[turn][..., None]) - softmax_BCV)
        on_BCV = on_BCV.astype(hidden_BTD.dtype)
        hidden_gradient_BCD = multiply("bcv,dv->bcd", on_BCV, head_DV).astype(hidden_BTD.dtype)
        head_gradient_DV += multiply("bcd,bcv->dv", hidden_SBCD[turn], on_BCV)
        return hidden_gradient_SBCD.at[turn].set(hidden_gradient_BCD), head_gradient_DV

    nothing = jnp.zeros_like(hidden_SBCD), jnp.zeros(head_DV.shape, jnp.float32)
    hidden_gradient_SBCD, head_gradient_DV = jax.lax.fori_loop(0, turns, one, nothing)
    return _put_back(hidden_gradient_SBCD, place_BT), head_gradient_DV.astype(head_DV.dtype), None, None


_chunked.defvjp(_chunked_forward, _chunked_backward)


def _wanted_first(mask_BT: jax.Array, chunk: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Each row's positions, those that are wanted first; the place that each of them has there; and how many chunks
    hold all that are wanted."""
    wanted_BT = mask_BT != 0
    count_B1 = jnp.sum(wanted_BT, axis=1, keepdims=True)
    others_BT = count_B1 + jnp.cumsum(~wanted_BT, axis=1)
    place_BT = jnp.where(wanted_BT, jnp.cumsum(wanted_BT, axis=1), others_BT) - 1
    order_BT = jax.vmap(lambda place_T: jnp.zeros_like(place_T).at[place_T].set(jnp.arange(len(place_T))))(place_BT)
    return order_BT, place_BT, (jnp.max(count_B1) + chunk - 1) // chunk


def _taken(x_BT: jax.Array, order_BT: jax.Array) -> jax.Array:
    """The positions of each row of [B, T, ...] in this order."""
    return jax.vmap(lambda x_T, order_T: x_T[order_T])(x_BT, order_BT)


def _cut(x: jax.Array, chunk: int) -> jax.Array:
    """[B, T, ...] as [chunks, B, chunk, ...], filled up with zeros."""
    B, T, *rest = x.shape
    chunks = -(-T // chunk)
    x = jnp.pad(x, [(0, 0), (0, chunks * chunk - T), *[(0, 0)] * len(rest)])
    return x.reshape(B, chunks, chunk, *rest).swapaxes(0, 1)


def _put_back(pieces: jax.Array, place_BT: jax.Array) -> jax.Array:
    """The way back of `_cut(_taken(...))`."""
    chunks, B, chunk, *rest = pieces.shape
    return _taken(pieces.swapaxes(0, 1).reshape(B, chunks * chunk, *rest), place_BT)


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
    return jnp.sum(token_logprobs(hidden_BTD, head_DV, targets_BT, mask_BT, chunk) * mask_BT, axis=-1)


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
    total = jnp.sum(token_logprobs(hidden_BTD, head_DV, targets_BT, mask_BT, chunk) * mask_BT)
    return -total / jnp.maximum(jnp.sum(mask_BT), 1)


def dpo_margin(
    chosen_P: jax.Array, rejected_P: jax.Array, ref_chosen_P: jax.Array, ref_rejected_P: jax.Array
) -> jax.Array:
    """How much more the policy prefers the chosen answer than the reference does, in nats, for each pair.

    (log pi(chosen) - log ref(chosen)) - (log pi(rejected) - log ref(rejected)), each log-probability summed over the
    answer's tokens.

    Raises ValueError where the four do not have one shape: [P] and [P, 1] would broadcast to [P, P].
    """
    arrays = {"rejected_P": rejected_P, "ref_chosen_P": ref_chosen_P, "ref_rejected_P": ref_rejected_P}
    for name, array in arrays.items():
        if jnp.shape(array) != jnp.shape(chosen_P):
            raise ValueError(
                f"chosen_P has shape {jnp.shape(chosen_P)} and {name} {jnp.shape(array)}: each needs one "
                "log-probability for each pair [P]"
            )
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

    Raises ValueError as `dpo_margin` does.
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
