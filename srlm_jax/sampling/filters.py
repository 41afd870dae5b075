"""From logits to one token a row: temperature and nucleus, without sorting the vocabulary.

Axes: B rows, V vocabulary.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key


def nucleus(probs_BV: Float[Array, "B V"], top_p: float) -> Float[Array, "B V"]:
    """The nucleus of each row (Holtzman et al., arXiv 1904.09751), the rest set to 0; not renormalised.

    The nucleus is the smallest set of most probable tokens whose mass reaches `top_p`; tokens as probable as the
    last of them belong to it too. Its lowest probability is found by bisection over the bit patterns of the
    probabilities, which for floats that are not negative are in the order of their values: exact after 31 halvings,
    each one masked sum, where a sort of 32,000 logits would cost many times more.
    """
    bits_BV = jax.lax.bitcast_convert_type(probs_BV.astype(jnp.float32), jnp.int32)
    needed_B = top_p * jnp.sum(probs_BV, axis=-1, dtype=jnp.float32)

    def halve(_, bounds):
        low_B, high_B = bounds  # the mass at or above low reaches top_p, that at or above high does not
        middle_B = low_B + (high_B - low_B) // 2
        mass_B = jnp.sum(jnp.where(bits_BV >= middle_B[:, None], probs_BV, 0), axis=-1, dtype=jnp.float32)
        enough_B = mass_B >= needed_B
        return jnp.where(enough_B, middle_B, low_B), jnp.where(enough_B, high_B, middle_B)

    top_B = jnp.max(bits_BV, axis=-1) + 1
    low_B, _ = jax.lax.fori_loop(0, 31, halve, (jnp.zeros_like(top_B), top_B))
    return jnp.where(bits_BV >= low_B[:, None], probs_BV, 0)


def draw(logits_BV: Float[Array, "B V"], keys_B: Key[Array, "B"], temperature: float, top_p: float) -> Int[Array, "B"]:
    """One token id a row. Temperature 0 takes the most probable; otherwise the row's key decides.

    The draw is the Gumbel-max trick over the nucleus, so it needs no renormalisation.
    """
    if temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    scaled_BV = logits_BV.astype(jnp.float32) / temperature
    if top_p < 1:
        kept_BV = nucleus(jax.nn.softmax(scaled_BV, axis=-1), top_p) > 0
        scaled_BV = jnp.where(kept_BV, scaled_BV, -jnp.inf)
    noise_BV = jax.vmap(lambda key: jax.random.gumbel(key, logits_BV.shape[1:]))(keys_B)
    return jnp.argmax(scaled_BV + noise_BV, axis=-1).astype(jnp.int32)
