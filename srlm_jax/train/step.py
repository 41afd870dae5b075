"""The one training step: gradients over microbatches, clip, AdamW."""

import functools

import jax
import jax.numpy as jnp
import optax

from srlm_jax.data.batches import PairBatch, TokenBatch
from srlm_jax.model.llama import Llama
from srlm_jax.parallel import rules
from srlm_jax.train.objectives import Objective
from srlm_jax.train.optimizer import OptimizerConfig, make_optimizer


@functools.cache
def make_train_step(objective: Objective, optimizer: OptimizerConfig, steps: int, accumulate: int):
    """A compiled `(model, opt_state, batch, key) -> (model, opt_state, metrics)`.

    The batch is cut into `accumulate` microbatches whose gradients are added before the one update: the same update
    as without cutting, in less memory. `model` and `opt_state` are donated; under `jax.set_mesh` they stay where
    `rules.TRAIN` has them. Metrics are means over the whole batch.
    """
    tx = make_optimizer(optimizer, steps)

    def sums(model: Llama, microbatch: TokenBatch | PairBatch, key: jax.Array):
        total = objective(model, microbatch, key)
        return total.loss, total

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def train_step(model: Llama, opt_state: optax.OptState, batch: TokenBatch | PairBatch, key: jax.Array):
        gradient = jax.grad(sums, has_aux=True)
        if accumulate == 1:
            grads, total = gradient(model, batch, key)
        else:
            # Row i goes to microbatch i % accumulate, so that each device keeps the rows it has.
            cut = jax.tree.map(lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), batch)

            def add(carry, scanned):
                microbatch, index = scanned
                return jax.tree.map(jnp.add, carry, gradient(model, microbatch, jax.random.fold_in(key, index))), None

            first = jax.tree.map(lambda x: x[0], cut)
            zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gradient, model, first, key))
            (grads, total), _ = jax.lax.scan(add, zero, (cut, jnp.arange(accumulate)))
        count = jnp.maximum(total.count, 1)
        grads = jax.tree.map(lambda g: g / count.astype(g.dtype), grads)
        updates, opt_state = tx.update(grads, opt_state, model)
        metrics = {"loss": total.loss / count, "gradient_norm": optax.tree.norm(grads)}
        metrics |= {name: value / count for name, value in total.metrics.items()}
        model, opt_state = rules.keep_in_place(rules.TRAIN, (optax.apply_updates(model, updates), opt_state))
        return model, opt_state, metrics

    return train_step, tx


def init_optimizer(tx: optax.GradientTransformation, model: Llama, mesh: jax.sharding.Mesh) -> optax.OptState:
    """The optimizer's state before the first step, each moment where its weight is: no device ever holds all of it."""
    places = rules.model_shardings(mesh, rules.TRAIN, jax.eval_shape(tx.init, model))
    return jax.jit(tx.init, out_shardings=places)(model)
