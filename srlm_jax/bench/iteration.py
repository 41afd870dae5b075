"""A whole iteration: answers, judgements, pairs, the reference pass and DPO, by this package and by TRL.

Random weights write no scores, so which answer of each instruction is the best and which the worst is drawn beforehand,
the same for all sides; the tokens of an answer are each side's own, their number is not.
"""

import contextlib
import functools
import time

from srlm_jax.bench import batching, cost, sides
from srlm_jax.bench.ceilings import Ceilings
from srlm_jax.bench.peer_process import Peer, python_of, started
from srlm_jax.bench.sampling import DRAW, agree, job, sample, to_sample
from srlm_jax.bench.setting import Setting, checkpoint, random_model
from srlm_jax.bench.sides import OURS, Side
from srlm_jax.bench.training import BETA, Training, dpo_objective, numbered
from srlm_jax.bench.workload import Tree, Workload, answering, best_and_worst, judging, judging_of, pairs_of

_NAME = "transformers generate, DPOTrainer"


def updates_of(w: Workload) -> tuple[int, int]:
    """Pairs of an update, and how many updates the pairs of all instructions make."""
    batch = min(w.batch, w.prompts)
    return batch, w.prompts // batch


def measure(setting: Setting, ceilings: Ceilings) -> dict[str, object]:
    """Times `iteration` by each side: what `report.document` takes.

    Raises:
      ValueError: the peer is missing, fails, or computes something else than this package.
    """
    w, vocabulary = setting.workload, setting.config.V
    asked, judged = answering(w, vocabulary), judging(w, vocabulary)
    with contextlib.ExitStack() as opened:
        compared, versions = _sides(setting, asked, judged, opened)
        runs = sides.measure(compared, setting.repeat, setting.command)
    needs = {dtype: _needs(setting, asked, judged, dtype) for dtype in setting.dtypes}
    some = needs[setting.dtypes[0]]
    return {
        "work": {
            "instructions": w.prompts,
            "answers": len(asked.rows),
            "answer_tokens": asked.tokens,
            "judgements": len(judged.rows),
            "judgement_tokens": judged.tokens,
            "trained_tokens": some["train_seconds"][0].tokens,
        },
        "units": (w.prompts, "instruction"),
        "versions": versions,
        "runs": runs,
        "summary": [sides.summary(side, runs[side.label], needs[side.dtype], ceilings) for side in compared],
    }


def _needs(setting: Setting, asked: Tree, judged: Tree, dtype: str) -> dict[str, list[cost.Need]]:
    config, w = setting.of(dtype), setting.workload
    batch, updates = updates_of(w)
    answers = tuple(tuple((0,) * limit for limit in limits) for (limits,) in asked.limits)
    trained = cost.of_pairs(pairs_of(w, asked, answers)[: batch * updates])
    answered = [cost.reading(config, asked, dtype), cost.writing(config, asked, w.rows, dtype)]
    voted = [cost.reading(config, judged, dtype), cost.writing(config, judged, w.rows, dtype)]
    reference, train = cost.forward(config, trained, dtype), cost.training(config, trained, updates, dtype)
    everything = cost.Need(tokens=asked.tokens + judged.tokens + train.tokens, flops=0, memory_bytes=0)
    return {
        "seconds": [*answered, *voted, reference, train, everything],
        "answering_seconds": answered,
        "judging_seconds": voted,
        "reference_seconds": [reference],
        "train_seconds": [train],
    }


def _sides(
    setting: Setting, asked: Tree, judged: Tree, opened: contextlib.ExitStack
) -> tuple[list[Side], dict[str, str]]:
    found, versions = [], {}
    if setting.peer is not None:
        python = python_of(setting.peer, setting.peer_python)
        folder = opened.enter_context(checkpoint(setting))
        agree(setting, asked, "torch_sampling", ("generate",), python, folder)
    for dtype in setting.dtypes:
        model = random_model(setting.of(dtype), setting.made_in)
        run = functools.partial(_run_ours, setting, Training(model, dpo_objective()), asked)
        del model  # the training donates it
        found.append(Side(name=OURS, dtype=dtype, run=run))
        if setting.peer is not None:
            told = job(setting, folder, dtype) | _plain(setting.workload, asked, judged)
            peer = opened.enter_context(started("torch_iteration", python, told))
            versions |= peer.versions
            found.append(Side(name=_NAME, dtype=dtype, run=functools.partial(_ask, peer)))
    return found, versions


def _plain(w: Workload, asked: Tree, judged: Tree) -> dict[str, object]:
    """The iteration as a peer is told it, the judge's template by its two ends."""
    batch, updates = updates_of(w)
    some = judged.prompts[0][0]
    return {
        "prompts": [list(prompt) for (prompt,) in asked.prompts],
        "limits": [list(limits) for (limits,) in asked.limits],
        "before": list(some[: w.before]),
        "behind": list(some[len(some) - w.behind :]),
        "judge_limits": [list(limits) for group in judged.limits for limits in group],
        "order": best_and_worst(w),
        "draw": DRAW,
        "batch": batch,
        "updates": updates,
        "beta": BETA,
        "method": "DPOTrainer, reference first",
    }


def _run_ours(setting: Setting, training: Training, asked: Tree) -> dict[str, float]:
    w, vocabulary = setting.workload, setting.config.V
    batch, updates = updates_of(w)
    sides.forget_peak_memory()
    marks = [time.perf_counter()]
    model = to_sample(training.model)
    samples, _ = sample(model, asked, DRAW, w.rows, w.steps, asked.longest)
    answers = tuple(tuple(one.ids for one in group[0]) for group in samples)
    marks.append(time.perf_counter())
    judged = judging_of(w, vocabulary, asked, answers)
    sample(model, judged, DRAW, w.rows, w.steps, judged.longest)
    del model  # room for the training
    known = pairs_of(w, asked, answers)[: batch * updates]
    marks.append(time.perf_counter())
    made = batching.reference_pass(training.model, batching.pair_batches(numbered(known), batch))
    marks.append(time.perf_counter())
    training.run(made)
    marks.append(time.perf_counter())
    names = ("answering_seconds", "judging_seconds", "reference_seconds", "train_seconds")
    took = {name: end - start for name, start, end in zip(names, marks[:-1], marks[1:], strict=True)}
    return {"seconds": marks[-1] - marks[0], **took, "peak_bytes": sides.peak_memory()}


def _ask(peer: Peer) -> dict[str, float]:
    return peer.ask(do="iterate")
