"""Training, top to bottom: the same loop for pretraining, supervised fine-tuning and DPO."""

import contextlib
import dataclasses
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Annotated

import grain
import jax
import numpy as np
from etils import epath
from tqdm import tqdm

from srlm_jax import limits
from srlm_jax.data.batches import PairBatch, TokenBatch, microbatches
from srlm_jax.errors import BadInput, UserError
from srlm_jax.limits import Count, above
from srlm_jax.model.llama import Llama
from srlm_jax.model.lora import LoraConfig, merge, split, whole
from srlm_jax.parallel import hosts, rules
from srlm_jax.storage import jsonl
from srlm_jax.storage.checkpoint import TrainCheckpoints, TrainState
from srlm_jax.train.first_step import FirstStep
from srlm_jax.train.objectives import Objective, SftObjective
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
    # Nats that the first loss may be from the expected one; see `first_step.FirstStep`.
    first_loss_tolerance: Annotated[float, above(0)]
    optimizer: OptimizerConfig

    def __post_init__(self):
        limits.check(self)
        if self.batch_size % self.accumulate:
            raise BadInput(f"batch_size ({self.batch_size}) must be a multiple of accumulate ({self.accumulate})")
        schedule(self.optimizer, self.steps)  # refuses a warm-up that is longer than the training


ABSURD = 10  # times the first loss, and at least a nat


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
    first: FirstStep | None,
) -> Llama:
    """Trains `model`, which is donated, and returns it trained: all its weights or, with `lora`, adapters that are
    merged into it at the end.

    Writes `metrics.jsonl` and TensorBoard events to `folder`, and keeps the train state in `folder/train_state`:
    killed and called again, the training goes on from there and ends with the same weights.

    The first step is checked as `first` says, and `folder/first_step.json` has its loss and the expected one. A
    training that is resumed after a saved step is not checked again. A loss above ABSURD times the first one gives a
    warning on stderr, once.

    Raises:
      BadFirstStep: the first step does not start from `model`.
      Diverged: a loss or gradient norm is NaN or infinite; the message names the step.
      ValueError: a batch cannot be made or computed; the message names the step and the shape of the batch.
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
            # The saved state needs their memory, and the caller may still hold references to them.
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
            with _naming(title, step):
                batch = next(iterator)
            tokens += _tokens(batch)
            step_key = jax.random.fold_in(key, step)
            with _naming(title, step, batch):
                check = first is not None and step == 0
                if check:
                    expected = first.expected(trainable if frozen is None else frozen, batch, mesh)
                    undropped = _without_dropout(objective, whole(trainable, frozen), batch, config, batch_sharding)
                spread = hosts.spread(batch, batch_sharding)
                trainable, opt_state, metrics = train_step(trainable, opt_state, frozen, spread, step_key)
            if check:
                loss = float(hosts.fetch(metrics["loss"]))
                found = {"loss": loss, "expected": expected, "tolerance": first.tolerance}
                first.check(title, found, undropped, adapted=frozen is not None, packed=_packed(batch))
                if hosts.is_main() and math.isfinite(loss):
                    jsonl.write_json(folder / "first_step.json", found)
            window.append(metrics)
            last = step + 1 == config.steps
            save = (step + 1) % config.checkpoint_every == 0 and not last
            # Reading metrics waits for the device, so it is done once a window, and before a step is saved.
            if save or last or (step + 1) % config.log_every == 0:
                window = hosts.fetch(window)
                means = _mean_of(window, first_step=step + 1 - len(window), done=done)
                metrics_log.warn_if_absurd(title, step + 1 - len(window), [float(each["loss"]) for each in window])
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


def _rows(batch: TokenBatch | PairBatch) -> TokenBatch:
    return batch.rows if isinstance(batch, PairBatch) else batch


def _tokens(batch: TokenBatch | PairBatch) -> int:
    """Tokens of a batch that count towards the loss or its context: all but padding."""
    rows = _rows(batch)
    return int(np.sum((rows.tokens_BT != 0) | (rows.mask_BT != 0)))


def _packed(batch: TokenBatch | PairBatch) -> bool:
    return _rows(batch).segments_BT is not None


@contextlib.contextmanager
def _naming(title: str, step: int, batch: TokenBatch | PairBatch | None = None) -> Iterator[None]:
    """A ValueError inside is told with the step and the shape of its batch."""
    try:
        yield
    except ValueError as error:
        made = "" if batch is None else f" of tokens {_rows(batch).tokens_BT.shape}"
        kind = BadInput if isinstance(error, UserError) else ValueError
        raise kind(f"{title}, step {step + 1}, its batch{made}: {error}") from error


def _without_dropout(
    objective: Objective,
    model: Llama,
    batch: TokenBatch | PairBatch,
    config: TrainConfig,
    place: jax.sharding.NamedSharding,
) -> float | None:
    """The loss of the first step without the dropout of `objective`, None where it has none."""
    if not isinstance(objective, SftObjective) or objective.dropout == 0:
        return None
    plain = jax.jit(dataclasses.replace(objective, dropout=0.0))
    parts = microbatches(batch, config.accumulate)
    sums = hosts.fetch([plain(model, hosts.spread(part, place), jax.random.key(0)) for part in parts])
    return float(sum(each.loss for each in sums) / max(sum(each.count for each in sums), 1))


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
        self._first = json.loads(kept[0])["loss"] if kept else None
        self._warned = False
        self._file = self._path.open("a")
        from tensorboardX import SummaryWriter  # which loads PyTorch if it is installed: seconds at every start

        self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1)

    def warn_if_absurd(self, title: str, done: int, losses: Sequence[float]) -> None:
        """Warns, once, where a loss of the steps after `done` is far above the first one."""
        if not self._main:
            return
        if self._first is None:
            self._first = losses[0]
        worst = int(np.argmax(losses))
        if not self._warned and losses[worst] > max(ABSURD * self._first, 1):
            self._warned = True
            tqdm.write(
                f"warning: {title}: the loss is {losses[worst]:.3f} at step {done + worst + 1}, more than {ABSURD} "
                f"times the {self._first:.3f} at the start; lower learning_rate, or look at the data",
                file=sys.stderr,
            )

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
