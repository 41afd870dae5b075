"""Weights in 8 bits, for sampling alone: whole numbers, and a scale for each output of a projection.

Only the projections of the blocks are rounded; embedding, head and norms stay as they are.
"""

import functools

import jax
from flax import nnx

from srlm_jax.model import int8, ops
from srlm_jax.model.llama import Llama
from srlm_jax.model.lora import PROJECTIONS

_rounded = functools.partial(jax.jit, static_argnums=(1, 2))(int8.round_along)


class QuantizedWeight(nnx.Module):
    """Stands in a block's place of a weight, and reads as its matrix: [L, in..., out...] in 8 bits, and [L, out...]."""

    def __init__(self, weight: nnx.Param, inputs: int, dtype: str):
        along = tuple(range(1, 1 + inputs))
        values, scale = _rounded(weight[...], along, dtype)
        self.values = nnx.Param(values, axes=weight.axes)
        self.scale = nnx.Param(scale.squeeze(along), axes=(weight.axes[0], *weight.axes[1 + inputs :]))

    def __getitem__(self, index: object) -> ops.Quantized:
        return ops.Quantized(values=self.values[index], scale=self.scale[index])


def quantize(model: Llama, weights: str | None) -> Llama:
    """`model` with its projections kept as `weights` says, "int8" or None for as they are; all else it shares with it.

    Each device rounds its own part, and nothing as large as a weight is made on the way. The scales have the type that
    the model computes in.
    """
    if weights is None:
        return model
    quantized = jax.tree.map(lambda leaf: leaf, model)
    for name, inputs in PROJECTIONS.items():
        weight = getattr(model.blocks, name)
        setattr(quantized.blocks, name, QuantizedWeight(weight, inputs, model.config.compute_dtype))
    return quantized
