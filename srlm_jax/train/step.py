"""The one training step: gradients over microbatches, clip, AdamW."""

import functools

import jax
import jax.numpy as jnp
import optax

from srlm_jax.data.batches import PairBatch, TokenBatch
from srlm_jax.model import lora
from srlm_jax.model.llama import Llama
from srlm_jax.model.lora import Adapters
from srlm_jax.parallel import rules
from srlm_jax.train.objectives import Objective
from srlm_jax.train.optimizer import OptimizerConfig, make_optimizer


@functools.cache
def make_train_step(objective: Objective, optimizer: OptimizerConfig, steps: int, accumulate: int):
    """A compiled `(trainable, opt_state, frozen, batch, key) -> (trainable, opt_state, metrics)`.

    The batch is cut into `accumulate` microbatches whose gradients are added before the one update: the same update
    as without cutting, in less memory. What is trained and what is frozen is as `lora.split` has it. `trainable` and
    `opt_state` are donated; under `jax.set_mesh` they stay where `rules.TRAIN` has them. Metrics are means over the
    whole batch.
    """
    tx = make_optimizer(optimizer, steps)

    def sums(trainable: Llama | Adapters, frozen: Llama | None, microbatch: TokenBatch | PairBatch, key: jax.Array):
        total = objective(lora.whole(trainable, frozen), microbatch, key)
        return total.loss, total

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def train_step(
        trainable: Llama | Adapters,
        opt_state: optax.OptState,
        frozen: Llama | None,
        batch: TokenBatch | PairBatch,
        key: jax.Array,
    ):
        gradient = jax.grad(sums, has_aux=True)
        narrow = _as_multiplied(trainable)
        if accumulate == 1:
            grads, total = gradient(narrow, frozen, batch, key)
        else:
            # Row i goes to microbatch i % accumulate, so that each device keeps the rows it has.
            cut = jax.tree.map(lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), batch)

            def add(carry, scanned):
                microbatch, index = scanned
                found = gradient(narrow, frozen, microbatch, jax.random.fold_in(key, index))
                return jax.tree.map(jnp.add, carry, found), None

            first = jax.tree.map(lambda x: x[0], cut)
            shapes = jax.eval_shape(gradient, trainable, frozen, first, key)  # sums in the type of what is trained
            zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
            (grads, total), _ = jax.lax.scan(add, zero, (cut, jnp.arange(accumulate)))
        count = jnp.maximum(total.count, 1)
        grads = jax.tree.map(lambda g, x: g.astype(x.dtype) / count.astype(x.dtype), grads, trainable)
        updates, opt_state = tx.update(grads, opt_state, trainable)
        metrics = {"loss": total.loss / count, "gradient_norm": optax.tree.norm(grads)}
        metrics |= {name: value / count for name, value in total.metrics.items()}
        trainable = optax.apply_updates(trainable, updates)
        trainable, opt_state = rules.keep_in_place(rules.TRAIN, (trainable, opt_state))
        return trainable, opt_state, metrics

    return train_step, tx


def _as_multiplied(trainable: Llama | Adapters) -> Llama | Adapters:
    """A model with its blocks' weights in the type that they are multiplied in. Their gradients are computed in it, and
    so take no more memory than that until the optimizer reads them: the same numbers in half of it."""
    if not isinstance(trainable, Llama):
        return trainable
    model = jax.tree.map(lambda x: x, trainable)
    model.blocks = jax.tree.map(lambda x: x.astype(model.config.compute_dtype), trainable.blocks)
    return model


def init_optimizer(
    tx: optax.GradientTransformation, trainable: Llama | Adapters, mesh: jax.sharding.Mesh
) -> optax.OptState:
    """The optimizer's state before the first step, each moment where its weight is: no device ever holds all of it."""
    places = rules.model_shardings(mesh, rules.TRAIN, jax.eval_shape(tx.init, trainable))
    return jax.jit(tx.init, out_shardings=places)(trainable)
