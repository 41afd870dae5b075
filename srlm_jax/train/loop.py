"""Training, top to bottom: the same loop for pretraining, supervised fine-tuning and DPO."""

import contextlib
import dataclasses
import json
import math
import sys
import time

import grain
import jax
import numpy as np
from etils import epath
from tensorboardX import SummaryWriter
from tqdm import tqdm

from srlm_jax import limits
from srlm_jax.errors import BadInput, UserError
from srlm_jax.limits import Count
from srlm_jax.model.llama import Llama
from srlm_jax.model.lora import LoraConfig, merge, split
from srlm_jax.parallel import hosts, rules
from srlm_jax.storage.checkpoint import TrainCheckpoints, TrainState
from srlm_jax.train.objectives import Objective
from srlm_jax.train.optimizer import OptimizerConfig, schedule
from srlm_jax.train.step import init_optimizer, make_train_step


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training."""

    steps: Count
    batch_size: Count  # rows, or preference pairs, of an update over all devices
    accumulate: Count  # microbatches that an update is cut into
    log_every: Count  # steps
    checkpoint_every: Count  # steps
    optimizer: OptimizerConfig

    def __post_init__(self):
        limits.check(self)
        if self.batch_size % self.accumulate:
            raise BadInput(f"batch_size ({self.batch_size}) must be a multiple of accumulate ({self.accumulate})")
        schedule(self.optimizer, self.steps)  # refuses a warm-up that is longer than the training


class Diverged(UserError, FloatingPointError):
    """The loss or the gradient is not a number."""


def train(
    model: Llama,
    objective: Objective,
    batches: grain.IterDataset,
    *,
    config: TrainConfig,
    lora: LoraConfig | None,
    mesh: jax.sharding.Mesh,
    seed: int,
    folder: epath.Path,
    title: str,
) -> Llama:
    """Trains `model`, which is donated, and returns it trained: all its weights or, with `lora`, adapters that are
    merged into it at the end.

    Writes `metrics.jsonl` and TensorBoard events to `folder`, and keeps the train state in `folder/train_state`:
    killed and called again, the training goes on from there and ends with the same weights.

    Raises:
      Diverged: a loss or gradient norm is NaN or infinite; the message names the step.
    """
    train_step, tx = make_train_step(objective, config.optimizer, config.steps, config.accumulate)
    key = jax.random.key(seed)
    trainable, frozen = split(model, lora, jax.random.fold_in(key, config.steps), mesh)  # a key that no step has
    del model
    opt_state = init_optimizer(tx, trainable, mesh)
    iterator = iter(batches)
    learning_rate = schedule(config.optimizer, config.steps)
    batch_sharding = rules.sharding(mesh, rules.TRAIN, ("batch",))
    folder.mkdir(parents=True, exist_ok=True)

    with TrainCheckpoints(folder / "train_state") as checkpoints, contextlib.ExitStack() as opened, jax.set_mesh(mesh):
        # Start where the last run stopped, if one did.
        done = 0
        like = TrainState(_shapes(trainable), _shapes(opt_state))
        if checkpoints.any_saved():
            # Room for what was saved: whoever called may still have a name for what it would have begun with.
            for x in jax.tree.leaves((trainable, opt_state)):
                x.delete()
        restored = checkpoints.restore(like, iterator)
        if restored is not None:
            done, state = restored
            trainable, opt_state = state.trainable, state.opt_state
            del state
        metrics_log = opened.enter_context(contextlib.closing(MetricsLog(folder, done)))

        window: list[dict[str, jax.Array]] = []  # metrics of the steps since the last log, still on the device
        tokens, since = 0, time.perf_counter()
        bar = opened.enter_context(
            tqdm(
                total=config.steps,
                initial=done,
                desc=title,
                unit="step",
                dynamic_ncols=True,
                file=sys.stderr,
                disable=not hosts.is_main(),
            )
        )
        for step in range(done, config.steps):
            batch = next(iterator)
            tokens += _tokens(batch)
            batch = hosts.spread(batch, batch_sharding)
            step_key = jax.random.fold_in(key, step)
            trainable, opt_state, metrics = train_step(trainable, opt_state, frozen, batch, step_key)
            window.append(metrics)
            last = step + 1 == config.steps
            save = (step + 1) % config.checkpoint_every == 0 and not last
            # Reading metrics waits for the device, so it is done once a window; never is a step saved unread.
            if save or last or (step + 1) % config.log_every == 0:
                means = _mean_of(hosts.fetch(window), first_step=step + 1 - len(window), done=done)
                seconds = time.perf_counter() - since
                means |= {"learning_rate": float(learning_rate(step)), "tokens_per_second": tokens / seconds}
                metrics_log.write(step + 1, means)
                bar.update(len(window))
                bar.set_postfix_str(f"loss {means['loss']:.3f}, {tokens / seconds:,.0f} tokens/s")
                window, tokens, since = [], 0, time.perf_counter()
            if save:
                checkpoints.save(step + 1, TrainState(trainable, opt_state), iterator)
        del opt_state
        return merge(trainable, frozen)


def _shapes(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def _tokens(batch) -> int:
    """Tokens of a batch that count towards the loss or its context: all but padding."""
    rows = [
        leaf for leaf in jax.tree.leaves(batch, is_leaf=lambda x: hasattr(x, "mask_BT")) if hasattr(leaf, "mask_BT")
    ]
    return sum(int(np.sum((row.tokens_BT != 0) | (row.mask_BT != 0))) for row in rows)


def _mean_of(window: list[dict[str, np.ndarray]], *, first_step: int, done: int) -> dict[str, float]:
    for offset, metrics in enumerate(window):
        for name in ("loss", "gradient_norm"):
            if not math.isfinite(metrics[name]):
                raise Diverged(
                    f"{name} is {float(metrics[name])} at step {first_step + offset + 1} (this run started at step "
                    f"{done}); the last saved state is intact. Lower learning_rate or clip_norm, or look at the data"
                )
    return {name: float(np.mean([metrics[name] for metrics in window])) for name in window[0]}


class MetricsLog:
    """Training metrics as JSON Lines and as TensorBoard events. Opened at step n, it forgets what came after."""

    def __init__(self, folder: epath.Path, done: int):
        self._main = hosts.is_main()
        if not self._main:
            return
        self._path = folder / "metrics.jsonl"
        lines = self._path.read_text().splitlines(keepends=True) if self._path.exists() else []
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= done]
        self._path.write_text("".join(kept))
        self._file = self._path.open("a")
        self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """One line, and one scalar each."""
        if self._main:
            self._file.write(json.dumps({"step": step} | metrics) + "\n")
            self._file.flush()
            for name, value in metrics.items():
                self._events.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes both."""
        if self._main:
            self._file.close()
            self._events.close()
