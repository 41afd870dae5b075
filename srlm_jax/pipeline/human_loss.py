"""The loss of human answers under a model of the run."""

import numpy as np

from srlm_jax.data.batches import Row
from srlm_jax.evaluate.likelihood import likelihood_metrics
from srlm_jax.pipeline.run import Run
from srlm_jax.pipeline.training import example_row
from srlm_jax.records import Metric, RankedPrompt
from srlm_jax.storage import jsonl
from srlm_jax.train.first_step import row_length, row_logprobs


def human_loss(run: Run, name: str) -> dict[str, Metric]:
    """`likelihood_metrics` of the model `name` on the best-ranked answers of the EFT evaluation split.

    This needs neither a judge nor sampling. A training that wrecks a model raises it at once, whatever the training's
    own loss says; DPO moves it by some per cent. Answers that do not fit config.context_length are left out.
    """
    ranked = jsonl.read(run.workdir / "seed" / "eft_eval.jsonl", RankedPrompt)
    best = [example_row(run, p.prompt, p.responses[p.ranks.index(min(p.ranks))], True) for p in ranked]
    rows = [row for row in best if row.length <= run.settings.context_length]
    return likelihood_metrics(_logprobs(run, name, rows), [len(row.ids) - row.loss_from for row in rows])


def _logprobs(run: Run, name: str, rows: list[Row]) -> list[float]:
    """The log-probability of each row's answer, in nats."""
    s, found = run.settings, np.zeros(len(rows))
    # Rows of like length together: most answers are much shorter than the longest.
    lengths = np.asarray([row_length(row.length) for row in rows])
    for length in sorted(set(lengths.tolist())):
        places = np.flatnonzero(lengths == length)
        own = [rows[place] for place in places]
        model = run.to_train(name)
        found[places] = row_logprobs(model, own, length, s.reference_batch, s.logprob_chunk, run.train_mesh)
    return found.tolist()
