"""Why a model's logits are NaN or infinite: which of its parts gives the first number that is not finite."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from srlm_jax.errors import UserError
from srlm_jax.model.llama import Llama


class NotFinite(UserError, FloatingPointError):
    """A model's logits are NaN or infinite, so no token can be drawn; the message says where that begins and which type
    to compute in."""


def not_finite(model: Llama, ids: Sequence[int]) -> NotFinite:
    """The error for a text after which the model's logits are not finite."""
    dtype = model.config.compute_dtype
    said = f"no token can be drawn: the model's logits are NaN or infinite in {dtype}"
    if where := first_part(model, ids):
        said += f", first in the {where}"
    if dtype == "float16":
        largest = f"{float(jnp.finfo(dtype).max):,.0f}"
        return NotFinite(
            f"{said}. float16 holds no number above {largest}: compute in bfloat16 or float32 "
            "(config.model.compute_dtype=bfloat16, or convert the folder with --dtype=bfloat16)"
        )
    return NotFinite(f"{said}. Its weights are damaged, or a training has diverged: check where they come from")


def first_part(model: Llama, ids: Sequence[int]) -> str | None:
    """The first part of the model whose result for this text is not finite, such as "MLP of layer 3"; None if all are.

    Layers count from 0. The model is cut behind a layer, and the layer is found by halving.
    """
    tokens_1T, total = np.asarray([ids], np.int32), sum(model.layers)
    if not _finite(_cut(model, 0), tokens_1T):
        return "embedding"
    if _finite(model, tokens_1T):
        return None if bool(jnp.all(jnp.isfinite(_logits(model, tokens_1T)))) else "output head"
    finite, broken = 0, total  # layers kept
    while broken - finite > 1:
        middle = (finite + broken) // 2
        if _finite(_cut(model, middle), tokens_1T):
            finite = middle
        else:
            broken = middle
    if not _finite(_cut(model, broken), tokens_1T):
        half = "MLP" if _finite(_without_mlp(_cut(model, broken)), tokens_1T) else "attention"
        return f"{half} of layer {broken - 1}"
    return "final norm"


@jax.jit
def _hidden(model: Llama, tokens_1T: jax.Array) -> jax.Array:
    positions_1T = jnp.arange(tokens_1T.shape[1])[None]
    return model(tokens_1T, positions_1T, segments_BT=None, cache=None, dropout=None)[0]


@jax.jit
def _logits(model: Llama, tokens_1T: jax.Array) -> jax.Array:
    """After the last token: [V]."""
    last_D = _hidden(model, tokens_1T)[0, -1]
    return jnp.einsum("d,dv->v", last_D, model.head(), preferred_element_type=jnp.float32)


def _finite(model: Llama, tokens_1T: np.ndarray) -> bool:
    return bool(jnp.all(jnp.isfinite(_hidden(model, tokens_1T))))


def _cut(model: Llama, layers: int) -> Llama:
    """The model with its first layers alone, and a final norm that changes nothing but the scale."""
    short = jax.tree.map(lambda leaf: leaf, model)
    short.norm = jax.tree.map(jnp.ones_like, model.norm)
    if isinstance(short.blocks, nnx.List):
        short.blocks = nnx.List(list(short.blocks)[:layers])
    else:
        short.blocks = jax.tree.map(lambda leaf: leaf[:layers], short.blocks)
    return short


def _without_mlp(model: Llama) -> Llama:
    """The model with an MLP in its last layer that gives zero."""
    without = jax.tree.map(lambda leaf: leaf, model)
    last = without.blocks[-1] if isinstance(without.blocks, nnx.List) else without.blocks
    for name in ("gate", "up", "down"):
        setattr(last, name, jax.tree.map(lambda leaf: leaf.at[-1].set(0), getattr(last, name)))
    return without
