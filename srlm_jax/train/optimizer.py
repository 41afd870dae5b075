"""AdamW and its schedule."""

import dataclasses
from typing import Annotated

import jax
import optax
from flax import nnx

from srlm_jax.errors import BadInput
from srlm_jax.limits import above, at_least, below


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with global-norm clipping, a linear warm-up, then a cosine from `learning_rate` to `end_learning_rate`.

    Step k (from 0) of a warm-up of w steps has the learning rate `learning_rate` (k + 1) / (w + 1): the first step
    learns too. The schedules of transformers begin at 0, and their first step changes nothing.
    """

    learning_rate: Annotated[float, above(0)]
    end_learning_rate: Annotated[float, at_least(0)]
    warmup_steps: Annotated[int, at_least(0)]
    b1: Annotated[float, at_least(0), below(1)]
    b2: Annotated[float, at_least(0), below(1)]
    eps: Annotated[float, above(0)]
    weight_decay: Annotated[float, at_least(0)]  # decoupled; norm scales are exempt
    clip_norm: Annotated[float, above(0)]  # of the gradient over all weights

    def __post_init__(self):
        if self.end_learning_rate > self.learning_rate:
            raise BadInput(
                f"end_learning_rate is {self.end_learning_rate}: it must not be above learning_rate, which is "
                f"{self.learning_rate}"
            )


def schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate by step; the last of `steps` steps runs at the end of the cosine, a single one at its peak.

    Raises:
      ValueError: the warm-up leaves no step for the fall.
    """
    if config.warmup_steps and config.warmup_steps > steps - 2:
        raise BadInput(
            f"warmup_steps ({config.warmup_steps}) must leave two of the training's {steps} steps: the peak and the end"
        )
    return optax.warmup_cosine_decay_schedule(
        init_value=config.learning_rate / (config.warmup_steps + 1),
        peak_value=config.learning_rate,
        warmup_steps=config.warmup_steps,
        decay_steps=max(steps - 1, config.warmup_steps + 1),
        end_value=config.end_learning_rate,
    )


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clip, AdamW, schedule; works on an NNX module as on any tree."""

    def decayed(model: nnx.Module) -> nnx.Module:
        return jax.tree.map(
            lambda weight: weight.replace("norm" not in weight.axes),
            model,
            is_leaf=lambda node: isinstance(node, nnx.Param),
        )

    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            schedule(config, steps),
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=decayed,
        ),
    )
