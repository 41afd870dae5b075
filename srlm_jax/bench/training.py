"""Training: updates of SFT and DPO by this package, by transformers and by TRL."""

import contextlib
import dataclasses
import functools
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import grain
import jax
import numpy as np

from srlm_jax.bench import batching, cost, sides
from srlm_jax.bench.ceilings import Ceilings
from srlm_jax.bench.peer_process import Peer, python_of, started
from srlm_jax.bench.sampling import job
from srlm_jax.bench.setting import Setting, checkpoint, random_model, train_mesh
from srlm_jax.bench.sides import OURS, Side
from srlm_jax.bench.workload import Pair, documents, pairs
from srlm_jax.data.batches import PairRow, Row
from srlm_jax.errors import BadInput
from srlm_jax.model.llama import Llama
from srlm_jax.parallel import hosts, rules
from srlm_jax.storage.checkpoint import TrainCheckpoints, TrainState
from srlm_jax.train.objectives import DpoObjective, SftObjective
from srlm_jax.train.optimizer import OptimizerConfig
from srlm_jax.train.step import init_optimizer, make_train_step

# By command and peer: the script, and the ways in which it trains, each a row of its own.
PEERS: dict[tuple[str, str], tuple[str, tuple[str, ...]]] = {
    ("sft", "transformers"): ("torch_training", ("forward, backward, AdamW",)),
    ("sft", "trl"): ("trl_training", ("SFTTrainer",)),
    ("dpo", "trl"): ("trl_training", ("DPOTrainer", "DPOTrainer, reference first")),
}

BETA = 0.1  # section 3.1.3 of the paper
_TOLERANCE = 1e-3  # of a log-probability, a token
_STEPS = 100_000  # of the schedule, far more than are run
_OPTIMIZER = OptimizerConfig(
    learning_rate=1e-6, end_learning_rate=1e-7, warmup_steps=0, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.0,
    clip_norm=1.0,
)  # fmt: skip


class Training:
    """A training under way: weights and moments go from one update into the next."""

    def __init__(self, model: Llama, objective: SftObjective | DpoObjective):
        self._step, tx = make_train_step(objective, _OPTIMIZER, _STEPS, 1)
        self.model = model
        self._moments = init_optimizer(tx, model, train_mesh())

    def run(self, made: Sequence) -> None:
        """An update on each of these batches, which are numpy arrays; returns when the last is done."""
        mesh = train_mesh()
        place = rules.sharding(mesh, rules.TRAIN, ("batch",))
        with jax.set_mesh(mesh):
            for batch in made:
                spread = hosts.spread(batch, place)
                self.model, self._moments, metrics = self._step(
                    self.model, self._moments, None, spread, jax.random.key(0)
                )
        jax.block_until_ready((self.model, metrics))

    @contextlib.contextmanager
    def saving(self, found: dict[str, float]) -> Iterator[None]:
        """A train state is being written while this is open. Puts into `found` how long the training was held to
        begin with, and after how long both it and the writing were done."""
        no_data = iter(grain.MapDataset.range(1).to_iter_dataset())
        with tempfile.TemporaryDirectory(prefix="srlm_jax-bench-") as folder:
            start = time.perf_counter()
            with TrainCheckpoints(folder) as checkpoints:
                opened = time.perf_counter()
                checkpoints.save(1, TrainState(self.model, self._moments), no_data)
                found["save_held_seconds"] = time.perf_counter() - opened
                yield
            found["save_seconds"] = time.perf_counter() - start


def sft_objective() -> SftObjective:
    return SftObjective(dropout=0.0, logprob_chunk=batching.logprob_chunk())


def dpo_objective() -> DpoObjective:
    return DpoObjective(beta=BETA, logprob_chunk=batching.logprob_chunk())


def numbered(known: Sequence[Pair]) -> list[PairRow]:
    """The pairs without a reference: in place of it each has its number, for batches are in an order of their own."""
    rows = batching.rows_of(known)
    return [PairRow(rows[2 * i], rows[2 * i + 1], float(i), float(i)) for i in range(len(known))]


def measure(setting: Setting, ceilings: Ceilings) -> dict[str, object]:
    """Times `sft` or `dpo` by each side: what `report.document` takes.

    Raises:
      ValueError: the peer is missing, fails, or computes something else than this package.
    """
    w, vocabulary = setting.workload, setting.config.V
    work = documents(w, vocabulary) if setting.command == "sft" else pairs(w, vocabulary)
    rows = _rows(work)
    with contextlib.ExitStack() as opened:
        compared, versions = _sides(setting, work, opened)
        runs = sides.measure(compared, setting.repeat, setting.command)
    needs = {dtype: _needs(setting, work, dtype) for dtype in setting.dtypes}
    return {
        "work": {
            "updates": w.updates,
            "documents": len(rows),
            "tokens": sum(row.length for row in rows),
            "longest": max(row.length for row in rows),
        },
        "units": (len(work), "row" if setting.command == "sft" else "pair"),
        "versions": versions,
        "runs": runs,
        "summary": [sides.summary(side, runs[side.label], needs[side.dtype], ceilings) for side in compared],
    }


def _rows(work: Sequence[Row] | Sequence[Pair]) -> list[Row]:
    return batching.rows_of(work) if isinstance(work[0], Pair) else list(work)


def _needs(setting: Setting, work: Sequence[Row] | Sequence[Pair], dtype: str) -> dict[str, list[cost.Need]]:
    config = setting.of(dtype)
    documents = cost.of_rows(work) if setting.command == "sft" else cost.of_pairs(work)
    train = cost.training(config, documents, setting.workload.updates, dtype)
    if setting.command == "sft":
        return {"seconds": [train]}
    reference = cost.forward(config, documents, dtype)
    return {"seconds": [reference, train], "reference_seconds": [reference], "train_seconds": [train]}


def _sides(
    setting: Setting, work: Sequence[Row] | Sequence[Pair], opened: contextlib.ExitStack
) -> tuple[list[Side], dict[str, str]]:
    found, versions = [], {}
    w = setting.workload
    if setting.peer is not None:
        script, methods = PEERS[setting.command, setting.peer]
        python = python_of(setting.peer, setting.peer_python)
        folder = opened.enter_context(checkpoint(setting))
        sent = {"command": setting.command, "work": _plain(work), "batch": w.batch, "updates": w.updates, "beta": BETA}
        _agree(setting, work, script, python, job(setting, folder, "float32") | sent | {"method": methods[-1]})
    for dtype in setting.dtypes:
        model = random_model(setting.of(dtype), setting.made_in)
        if setting.command == "sft":
            training = Training(model, sft_objective())
            run = functools.partial(_run_sft, training, work, w.batch)
        else:
            training = Training(model, dpo_objective())
            run = functools.partial(_run_dpo, training, work, w.batch)
        del model  # the training donates it
        found.append(Side(name=OURS, dtype=dtype, run=run))
        if setting.saving:
            found.append(
                Side(name=f"{OURS}, while saving", dtype=dtype, run=functools.partial(_run_saving, training, run))
            )
        if setting.peer is not None:
            for method in methods:
                told = job(setting, folder, dtype) | sent | {"method": method}
                peer = opened.enter_context(started(script, python, told))
                versions |= peer.versions
                found.append(Side(name=f"{setting.peer}, {method}", dtype=dtype, run=functools.partial(_ask, peer)))
    return found, versions


def _plain(work: Sequence[Row] | Sequence[Pair]) -> list[dict[str, object]]:
    if isinstance(work[0], Pair):
        return [dataclasses.asdict(pair) for pair in work]
    return [{"prompt": row.ids[: row.loss_from], "answer": row.ids[row.loss_from :]} for row in work]


def _run_sft(training: Training, work: Sequence[Row], batch: int) -> dict[str, float]:
    sides.forget_peak_memory()
    start = time.perf_counter()
    training.run(batching.token_batches(work, batch))
    return {"seconds": time.perf_counter() - start, "peak_bytes": sides.peak_memory()}


def _run_dpo(training: Training, work: Sequence[Pair], batch: int) -> dict[str, float]:
    sides.forget_peak_memory()
    start = time.perf_counter()
    made = batching.reference_pass(training.model, batching.pair_batches(numbered(work), batch))
    between = time.perf_counter()
    training.run(made)
    end = time.perf_counter()
    return {
        "seconds": end - start,
        "reference_seconds": between - start,
        "train_seconds": end - between,
        "peak_bytes": sides.peak_memory(),
    }


def _run_saving(training: Training, run: Callable[[], Mapping[str, float]]) -> dict[str, float]:
    found: dict[str, float] = {}
    with training.saving(found):
        done = run()
    # The updates and what they waited for before the first of them.
    return found | done | {"seconds": done["seconds"] + found["save_held_seconds"]}


def _ask(peer: Peer) -> dict[str, float]:
    return peer.ask(do="train")


def _agree(setting: Setting, work: Sequence[Row] | Sequence[Pair], script: str, python, told: dict) -> None:
    """Nothing is timed before both sides give the first documents the same log-probabilities, in float32.

    Raises:
      ValueError: they do not.
    """
    batch = setting.workload.batch
    rows = _rows(work)[: 2 * batch]
    model = random_model(setting.of("float32"), setting.made_in)
    with jax.default_matmul_precision("highest"):
        if setting.command == "sft":
            ours = batching.logprobs(model, rows)
        else:
            (made,) = batching.pair_batches(numbered(work[:batch]), batch)
            (found,) = batching.reference_pass(model, [made])
            by_pair = np.stack([found.ref_chosen_P, found.ref_rejected_P], axis=1)
            ours = by_pair[np.argsort(made.ref_chosen_P)].reshape(-1)
    with started(script, python, told) as peer:
        theirs = np.asarray(peer.ask(do="check", count=len(rows))["logprobs"])
    check_logprobs(script, ours, theirs, [len(row.ids) - row.loss_from for row in rows])


def check_logprobs(name: str, ours: np.ndarray, theirs: np.ndarray, tokens: Sequence[int]) -> None:
    """Raises ValueError where a document's log-probability is not the same, as far as its tokens' rounding goes."""
    apart = np.abs(ours - theirs) / np.asarray(tokens)
    if not np.all(apart <= _TOLERANCE):
        worst = int(np.argmax(apart))
        raise BadInput(
            f"{name} gives document {worst} a log-probability of {theirs[worst]:.4f} and this package "
            f"{ours[worst]:.4f}: nothing is timed before both compute the same"
        )
