"""The mathematics of a Llama block as pure functions.

Axes: B rows, T new tokens, S cached positions, D width, N query heads, K key-value heads, G = N / K, H head width,
F MLP width, R rows of a cache level, C = B / R rows that share one of them.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from srlm_jax.model.config import RopeScaling
from srlm_jax.model.int8 import Slots
from srlm_jax.parallel import rules

PRODUCT = "product"  # by which training knows the results of `linear`, to keep or to compute again

# Stands for minus infinity where a row may have nothing to attend to: exp() of it is 0, and differences stay finite.
MASKED = -1e30

# Up to so many queries XLA's CPU backend scores faster one after the other: see `_scores`.
FEW_QUERIES = 4


@dataclasses.dataclass(frozen=True)
class Dropout:
    """Inverted dropout: each number is kept with probability 1 - rate and divided by it, so that its mean stays."""

    rate: float
    key: PRNGKeyArray

    def fold(self, index: int | Array) -> "Dropout":
        """The same rate under another key."""
        return Dropout(self.rate, jax.random.fold_in(self.key, index))

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        kept = jax.random.bernoulli(self.key, 1 - self.rate, x.shape)
        return jnp.where(kept, x / (1 - self.rate), 0)


jax.tree_util.register_dataclass(Dropout, data_fields=["key"], meta_fields=["rate"])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapted:
    """The matrix w + scale a b as its parts, which `linear` never multiplies out (see `model.lora`)."""

    w: Float[Array, "..."]  # [in..., out...]
    a: Float[Array, "..."]  # [in..., R]
    b: Float[Array, "..."]  # [R, out...]
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        return self.w.shape

    def reshape(self, rows: int, columns: int) -> "Adapted":
        """With all that it multiplies as one axis, and all that it gives as the other."""
        R = self.b.shape[0]
        w, a, b = self.w.reshape(rows, columns), self.a.reshape(rows, R), self.b.reshape(R, columns)
        return dataclasses.replace(self, w=w, a=a, b=b)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantized:
    """The matrix values * scale as its parts, which `linear` never multiplies out (see `model.quantized`)."""

    values: Float[Array, "..."]  # [in..., out...]: whole numbers that were stored in 8 bits
    scale: Float[Array, "..."]  # [out...]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def reshape(self, rows: int, columns: int) -> "Quantized":
        """As `Adapted.reshape`."""
        return Quantized(values=self.values.reshape(rows, columns), scale=self.scale.reshape(columns))


def rms_norm(x: Float[Array, "*B D"], scale_D: Float[Array, "D"], eps: float) -> Float[Array, "*B D"]:
    """x / sqrt(mean(x^2) + eps) * scale, with the mean taken in float32 (Llama; Zhang and Sennrich 2019)."""
    x32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (x32 * inverse * scale_D.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))).astype(x.dtype)


def rope_angles(
    positions_BT: Int[Array, "B T"], head_width: int, theta: float, scaling: RopeScaling | None
) -> tuple[Float[Array, "B T H2"], Float[Array, "B T H2"]]:
    """Cosine and sine of the rotary angles, in float32: position / theta^(2i / head_width) for pair i, or as `scaling`
    stretches them."""
    frequency = theta ** (-jnp.arange(0, head_width, 2, dtype=jnp.float32) / head_width)
    if scaling is not None:
        turns = scaling.original_context * frequency / (2 * math.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        kept = jnp.clip((turns - low) / (high - low), 0, 1)
        frequency = frequency * (kept + (1 - kept) / scaling.factor)
    angle = positions_BT.astype(jnp.float32)[..., None] * frequency.reshape(1, 1, -1)
    return jnp.cos(angle), jnp.sin(angle)


def rotate(
    x_BNTH: Float[Array, "B N T H"], cos: Float[Array, "B T H2"], sin: Float[Array, "B T H2"]
) -> Float[Array, "B N T H"]:
    """Rotary position embedding in Hugging Face's layout: element i is paired with element i + H / 2."""
    first, second = jnp.split(x_BNTH.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, None], sin[:, None]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BNTH.dtype)


def attend(
    q_BNTH: Float[Array, "B N T H"],
    k_RKSH: Float[Array, "R K S H"] | Slots,
    v_RKSH: Float[Array, "R K S H"] | Slots,
    mask_RCTS: Bool[Array, "#R #C #T S"],
    dropout: Dropout | None = None,
) -> tuple[Float[Array, "B N T H"], Float[Array, "B N T"]]:
    """Softmax attention, and the log-sum-exp of its scores (float32), by which parts of one attention are merged.

    Rows of queries come in R groups of C siblings that read the same keys: these are read once for all of them.
    Query head n reads key-value head n // G. Where the mask leaves a query nothing, its log-sum-exp is about -1e30.
    `dropout` acts on the probabilities: those that are kept no longer sum to 1.
    """
    B, N, T, H = q_BNTH.shape
    R, K, S, _ = k_RKSH.shape
    C, G = B // R, N // K
    # in:  rows r0c0 r0c1 r1c0 r1c1, heads k0g0 k0g1 k1g0 ...    out: for each (r, k) all queries that read its keys
    q = q_BNTH.reshape(R, C, K, G, T, H).swapaxes(1, 2).reshape(R, K, C * G * T, H)
    k, k_scale = _parts(k_RKSH, q.dtype)
    v, v_scale = _parts(v_RKSH, q.dtype)
    scores = _scores(q * H**-0.5, k)
    scores = scores if k_scale is None else scores * k_scale
    scores = jnp.where(mask_RCTS[:, None, :, None], scores.reshape(R, K, C, G, T, S), MASKED)
    top = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.exp(scores - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    lse = (top + jnp.log(total))[..., 0]
    weights = weights if dropout is None else dropout(weights)
    weights = weights.reshape(R, K, C * G * T, S)
    weights = (weights if v_scale is None else weights * v_scale).astype(v.dtype)
    out = jnp.einsum("rkqs,rksh->rkqh", weights, v, preferred_element_type=jnp.float32)
    # Divided after the product: H numbers a query instead of S.
    out = (out.reshape(R, K, C, G, T, H) / total).swapaxes(1, 2).reshape(B, N, T, H)
    return out.astype(q_BNTH.dtype), lse.swapaxes(1, 2).reshape(B, N, T)


def _scores(q_RKQH: Float[Array, "R K Q H"], k_RKSH: Float[Array, "R K S H"]) -> Float[Array, "R K Q S"]:
    multiply = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    if rules.platform() == "cpu" and 1 < q_RKQH.shape[2] <= FEW_QUERIES:
        # For the product of several it lays the keys out anew, which takes longer than to read them once a query.
        singles = [multiply("rkh,rksh->rks", q_RKQH[:, :, i], k_RKSH) for i in range(q_RKQH.shape[2])]
        return jnp.stack(singles, axis=2)
    return multiply("rkqh,rksh->rkqs", q_RKQH, k_RKSH)


def _parts(slots: jax.Array | Slots, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array | None]:
    """The numbers of keys, or values, and what they count if that is not 1."""
    return (slots.values.astype(dtype), slots.scale) if isinstance(slots, Slots) else (slots, None)


def merge_attention(outs: list[Float[Array, "B N T H"]], lses: list[Float[Array, "B N T"]]) -> Float[Array, "B N T H"]:
    """Attention over the union of disjoint key sets, from the attention over each (Hydragen, arXiv 2402.05099)."""
    if len(outs) == 1:
        return outs[0]
    # Number by number, so that it is one loop of a compiled program.
    top = functools.reduce(jnp.maximum, lses)
    shares = [jnp.exp(lse - top) for lse in lses]
    merged = sum(out.astype(jnp.float32) * share[..., None] for out, share in zip(outs, shares, strict=True))
    return (merged / sum(shares)[..., None]).astype(outs[0].dtype)


def swiglu(
    x_BTD: Float[Array, "B T D"],
    gate_DF: Float[Array, "D F"] | Adapted | Quantized,
    up_DF: Float[Array, "D F"] | Adapted | Quantized,
    down_FD: Float[Array, "F D"] | Adapted | Quantized,
) -> Float[Array, "B T D"]:
    """(silu(x gate) * x up) down (Shazeer 2020)."""
    return linear(jax.nn.silu(linear(x_BTD, gate_DF)) * linear(x_BTD, up_DF), down_FD)


def linear(x_BTD: Float[Array, "B T D"], w_DF: Float[Array, "D F"] | Adapted | Quantized) -> Float[Array, "B T F"]:
    """x w as one matrix product of two axes each: with three, XLA's CPU backend transposes the gradients' operands,
    and a training step takes half as long again."""
    if isinstance(w_DF, Adapted):
        return linear(x_BTD, w_DF.w) + w_DF.scale * linear(linear(x_BTD, w_DF.a), w_DF.b)
    B, T, D = x_BTD.shape
    x_RD = x_BTD.reshape(B * T, D)
    if isinstance(w_DF, Quantized):
        # In the type of x, since devices that share a product add up what comes of it; but the sums of whole numbers
        # are as large as 127 makes them, too large for float16.
        dtype = jnp.float32 if x_BTD.dtype == jnp.float16 or rules.platform() == "cpu" else x_BTD.dtype
        out = jnp.matmul(x_RD, w_DF.values, preferred_element_type=dtype)
        return (out * w_DF.scale.astype(dtype)[None]).astype(x_BTD.dtype).reshape(B, T, -1)
    product = _rounded_product if rules.platform() == "cpu" and x_BTD.dtype == jnp.bfloat16 else jnp.matmul
    return checkpoint_name(product(x_RD, w_DF), PRODUCT).reshape(B, T, -1)


@jax.custom_vjp
def _rounded_product(x_RD: Float[Array, "R D"], w_DF: Float[Array, "D F"]) -> Float[Array, "R F"]:
    """x w by products that XLA's CPU backend has for 16-bit numbers, and takes where sums are asked for as they are
    made, on the way there and back. On other devices this would have several that share a product exchange more."""
    return _summed(x_RD, w_DF, over=0)


def _summed(a: Array, b: Array, over: int) -> Array:
    """Over the last axis of `a` and one of `b`."""
    found = jax.lax.dot_general(a, b, (((1,), (over,)), ((), ())), preferred_element_type=jnp.float32)
    return found.astype(a.dtype)


def _rounded_gradients(kept: tuple[Array, Array], g_RF: Array) -> tuple[Array, Array]:
    x_RD, w_DF = kept
    # Laid out anew: of operands that are read across their rows there is no fast product.
    x_DR = with_layout_constraint(x_RD.T, Layout(major_to_minor=(0, 1)))
    return _summed(g_RF, w_DF, over=1), _summed(x_DR, g_RF, over=0)


_rounded_product.defvjp(lambda x_RD, w_DF: (_rounded_product(x_RD, w_DF), (x_RD, w_DF)), _rounded_gradients)
