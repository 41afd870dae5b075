"""From logits to one token a row: temperature and nucleus, in few passes over the vocabulary and without sorting it.

Axes: B rows, V vocabulary, N blocks of the vocabulary.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from srlm_jax.parallel import rules

# What is drawn from logits that are NaN or infinite.
UNDRAWN = -1


def in_nucleus(probs_BV: Float[Array, "B V"], token_B: Int[Array, "B"], top_p: float) -> Bool[Array, "B"]:
    """Whether a token of each row is in its nucleus (Holtzman et al., arXiv 1904.09751); `probs_BV` need no norm.

    The nucleus is the smallest set of most probable tokens whose mass reaches `top_p`; tokens as probable as the last
    of them belong to it too. So a token is in it if those that are more probable do not reach `top_p` without it: one
    masked sum, where finding the whole nucleus takes a sort. The most probable token is in it at any `top_p`.
    """
    own_B1 = jnp.take_along_axis(probs_BV, token_B[:, None], axis=-1)
    possible_B = own_B1[:, 0] > 0
    if top_p >= 1:
        return possible_B
    above_B = jnp.sum(jnp.where(probs_BV > own_B1, probs_BV, 0), axis=-1)
    return possible_B & ((above_B < top_p * jnp.sum(probs_BV, axis=-1)) | (above_B == 0))


def draw(logits_BV: Float[Array, "B V"], keys_B: Key[Array, "B"], temperature: float, top_p: float) -> Int[Array, "B"]:
    """One token id a row, UNDRAWN if its logits are NaN or infinite. Temperature 0 takes the most probable; otherwise
    the row's key decides.

    Tokens are drawn from the whole distribution until one is in the nucleus (of a `top_p` of 0.9 more than nine draws
    in ten are): those that are kept have the nucleus' distribution. A draw inverts the cumulated probabilities, first
    those of blocks of the vocabulary and then those of the tokens of one block, with a random number for each of the
    two, where the Gumbel trick takes one for every token.
    """
    if temperature < jnp.finfo(jnp.float32).tiny:
        token_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)  # a NaN counts as the largest
        largest_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=-1)[:, 0]
        return jnp.where(jnp.isfinite(largest_B), token_B, UNDRAWN)
    B, V = logits_BV.shape
    # Shifted before it is scaled, or a low temperature would make the largest logits infinite.
    shifted_BV = logits_BV.astype(jnp.float32) - jnp.max(logits_BV, axis=-1, keepdims=True).astype(jnp.float32)
    probs_BV = jnp.exp(shifted_BV / temperature)
    # A power of two divides among devices, as the vocabulary does.
    N = min(V & -V, 256)
    blocks_BNV = probs_BV.reshape(B, N, V // N)
    # A few numbers a row, wanted whole: to cumulate them across devices takes many small exchanges.
    masses_BN = rules.constrain(jnp.sum(blocks_BNV, axis=-1), "batch", "slots")

    def pick(weights_BN: Array, uniform_B: Array) -> Array:
        cumulated = jnp.cumsum(weights_BN, axis=-1)
        found_B = jnp.sum(cumulated <= (uniform_B * cumulated[:, -1])[:, None], axis=-1)
        return jnp.minimum(found_B, weights_BN.shape[1] - 1).astype(jnp.int32)

    def again(carry):
        _, _, drawn_B = carry
        return ~jnp.all(drawn_B)

    def trial(carry):
        number, token_B, drawn_B = carry
        uniform_B2 = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, number), 2))(keys_B)
        block_B = pick(masses_BN, uniform_B2[:, 0])
        within_BV = jnp.take_along_axis(blocks_BNV, block_B[:, None, None], axis=1)[:, 0]
        new_B = block_B * (V // N) + pick(within_BV, uniform_B2[:, 1])
        token_B = jnp.where(drawn_B, token_B, new_B)
        return number + 1, token_B, drawn_B | in_nucleus(probs_BV, token_B, top_p)

    # A row that is not finite has no token to wait for.
    hopeless_B = ~jnp.isfinite(jnp.sum(masses_BN, axis=-1))
    first = (jnp.int32(0), jnp.full(B, UNDRAWN), hopeless_B)
    return jax.lax.while_loop(again, trial, first)[1]
