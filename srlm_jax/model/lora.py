"""LoRA: low-rank adapters on frozen weights (Hu et al., arXiv 2106.09685).

Of every projection W of the blocks, A and B are trained in its place: the model computes x W + alpha / rank (x A) B, so
that there is no gradient of W and no optimizer state for it. Trained, they are added up, and the weights are ordinary.

A training deals with `(trainable, frozen)`: the adapters and the model, or, where all weights are trained, the model
and None.
"""

import dataclasses
import functools
import math
from typing import Annotated

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import PRNGKeyArray

from srlm_jax import limits
from srlm_jax.errors import BadInput
from srlm_jax.limits import Count, above
from srlm_jax.model import ops
from srlm_jax.model.config import LlamaConfig
from srlm_jax.model.llama import Blocks, Llama
from srlm_jax.parallel import rules

# Every projection of a block, and how many axes of its weight (after that of the layers) are what it multiplies.
PROJECTIONS = {"q": 1, "k": 1, "v": 1, "o": 2, "gate": 1, "up": 1, "down": 1}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Which part of the weights is trained."""

    rank: Count | None  # columns of A; None: all weights are trained, and none are frozen
    alpha: Annotated[float, above(0)]  # what the adapters compute counts alpha / rank times

    def __post_init__(self):
        limits.check(self)


def check_rank(config: LoraConfig, model: LlamaConfig) -> None:
    """Refuses adapters that are as large as what they stand for.

    Raises:
      ValueError: the rank is larger than the narrowest projection.
    """
    sizes = {"D": model.D, "F": model.F, "N x H": model.N * model.H, "K x H": model.K * model.H}
    narrowest = min(sizes, key=sizes.get)
    if config.rank is not None and config.rank > sizes[narrowest]:
        raise BadInput(
            f"rank is {config.rank}, more than the {sizes[narrowest]} of the narrowest projection (model.{narrowest})"
        )


class Adapter(nnx.Module):
    """A and B of one projection, stacked over layers like its weight: [L, in..., R] and [L, R, out...]."""

    def __init__(self, weight: nnx.Param, inputs: int, rank: int, *, rngs: nnx.Rngs):
        (layers, *sizes), (stack, *axes) = weight.shape, weight.axes
        # x A has unit variance; B is zero, so that a training starts from exactly the model it is given (section 4.1).
        a = rngs.params.normal((layers, *sizes[:inputs], rank), jnp.float32) * math.prod(sizes[:inputs]) ** -0.5
        self.a = nnx.Param(a, axes=(stack, *axes[:inputs], "rank"))
        self.b = nnx.Param(jnp.zeros((layers, rank, *sizes[inputs:])), axes=(stack, "rank", *axes[inputs:]))


class Adapters(nnx.Module):
    """An adapter for every projection of the blocks, in float32."""

    def __init__(self, blocks: Blocks, config: LoraConfig, *, rngs: nnx.Rngs):
        self.scale = nnx.static(config.alpha / config.rank)
        for name, inputs in PROJECTIONS.items():
            setattr(self, name, Adapter(getattr(blocks, name), inputs, config.rank, rngs=rngs))


class AdaptedWeight(nnx.Module):
    """Stands in a block's place of a weight, and reads as its matrix."""

    def __init__(self, weight: nnx.Param, adapter: Adapter, scale: float):
        self.weight, self.a, self.b = weight, adapter.a, adapter.b
        self.scale = nnx.static(scale)

    def __getitem__(self, index: object) -> ops.Adapted:
        return ops.Adapted(w=self.weight[index], a=self.a[index], b=self.b[index], scale=self.scale)


def init(model: Llama, config: LoraConfig, key: PRNGKeyArray) -> Adapters:
    """New adapters for a model (arrays or their shapes). Under `jax.jit` with shardings, each device makes its part."""
    return Adapters(model.blocks, config, rngs=nnx.Rngs(key))


def split(
    model: Llama, config: LoraConfig | None, key: PRNGKeyArray, mesh: jax.sharding.Mesh
) -> tuple[Llama | Adapters, Llama | None]:
    """(trainable, frozen): new adapters where the mesh has them, and `model`; without a config `model` and None."""
    if config is None:
        return model, None
    shapes = jax.eval_shape(lambda weights: weights, model)
    make = functools.partial(init, shapes, config)
    places = rules.model_shardings(mesh, rules.TRAIN, jax.eval_shape(make, key))
    return jax.jit(make, out_shardings=places)(key), model


def whole(trainable: Llama | Adapters, frozen: Llama | None) -> Llama:
    """The model that is trained; its adapted weights are kept as their parts."""
    if frozen is None:
        return trainable
    model = jax.tree.map(lambda leaf: leaf, frozen)
    for name in PROJECTIONS:
        weight, adapter = getattr(frozen.blocks, name), getattr(trainable, name)
        setattr(model.blocks, name, AdaptedWeight(weight, adapter, trainable.scale))
    return model


def merge(trainable: Llama | Adapters, frozen: Llama | None) -> Llama:
    """The trained model as ordinary weights. The frozen ones are donated: one layer of one projection at a time is
    added up in float32 and rounded to the type that weights are kept in."""
    if frozen is None:
        return trainable
    model = jax.tree.map(lambda leaf: leaf, frozen)
    for name in PROJECTIONS:
        adapter = getattr(trainable, name)
        setattr(model.blocks, name, _add(getattr(frozen.blocks, name), adapter.a, adapter.b, trainable.scale))
    return model


@functools.partial(jax.jit, donate_argnums=0, static_argnums=3)
def _add(weight: nnx.Param, a: nnx.Param, b: nnx.Param, scale: float) -> nnx.Param:
    def add_layer(layer, stack):
        w, a_l, b_l = (jax.lax.dynamic_index_in_dim(x, layer, keepdims=False) for x in (stack, a[...], b[...]))
        update = scale * jnp.tensordot(a_l, b_l, axes=1, precision="highest")
        return jax.lax.dynamic_update_index_in_dim(stack, (w + update).astype(stack.dtype), layer, 0)

    stack = jax.lax.fori_loop(0, weight.shape[0], add_layer, weight[...])
    return rules.keep_in_place(rules.TRAIN, weight.replace(stack))
