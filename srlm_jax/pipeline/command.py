"""What the main command does: settings, run, models, results, report."""

import math
import sys
import time
from collections.abc import Mapping, Sequence

from etils import epath

import srlm_jax
from srlm_jax.model import config_files
from srlm_jax.parallel import hosts, mesh
from srlm_jax.pipeline import checks
from srlm_jax.pipeline.effects import without_effect
from srlm_jax.pipeline.iteration import self_reward
from srlm_jax.pipeline.report import write_report
from srlm_jax.pipeline.run import Run, make_run, open_workdir
from srlm_jax.pipeline.settings import read
from srlm_jax.storage import jsonl

_COLUMNS = {
    "oracle_score": ("oracle score", "{:.2f} ± {:.2f}"),
    "perfect": ("perfect", "{:.1%} ± {:.1%}"),
    "human_loss": ("human loss", "{:.3f} ± {:.3f}"),
    "validation_score": ("validation", "{:.2f} ± {:.2f}"),
    "response_tokens": ("tokens", "{:.1f} ± {:.1f}"),
    "cut": ("cut", "{:.1%} ± {:.1%}"),
    "scored": ("scored", "{:.1%} ± {:.1%}"),
    "pairwise_accuracy": ("pairwise", "{:.3f} ± {:.3f}"),
    "five_best": ("5-best", "{:.1%} ± {:.1%}"),
    "exact_match": ("exact match", "{:.1%} ± {:.1%}"),
    "spearman": ("Spearman", "{:.3f} ± {:.3f}"),
    "kendall_tau_b": ("Kendall tau-b", "{:.3f} ± {:.3f}"),
}


def run_command(config: Mapping, redo: str | None, given: Sequence[str] = ()) -> None:
    """Makes what `config` asks for and is not there yet, then writes results.json and report.html and prints a table.

    Everything that can be checked is checked first: until then nothing is written, and `redo` removes nothing.

    Args:
      config: the tree of a config file.
      redo: stages to remove with all that depends on them, with commas between.
      given: full names of the fields that the user has set; those without effect in this run are printed.

    Raises a UserError or an OSError; what was done until then stays, and the same command goes on from there.
    """
    settings = read(config)
    mesh.keep_programs(settings.compile_cache)
    mesh.start(settings.coordinator, settings.processes, settings.process, settings.start_timeout_s)
    with hosts.together("start"):
        run = make_run(settings, srlm_jax.__version__)
        checks.check(run, [] if redo is None else run.ledger.dependents(redo))
        open_workdir(run.workdir)
        tells = hosts.is_main()  # one process prints, and writes what is one file
        if tells and not run.embedded:
            print(_introduced(run), flush=True)
        if tells and (idle := without_effect(settings, given)):
            said = "; ".join(f"{name} ({reason})" for name, reason in idle.items())
            print(f"no effect in this run: {said}", flush=True)
        if redo is not None:
            removed = run.ledger.redo(redo)
            if tells:
                print(f"removed: {', '.join(removed)}", flush=True)
    progress = Progress(run)
    run.ledger.after = progress.after_stage
    try:
        self_reward(run)
    except BaseException:
        progress.at_failure()
        raise
    if tells:
        results = progress.write()
        print("\n" + results_table(results))
        print(f"\n{run.workdir / 'results.json'}\n{run.workdir / 'report.html'}")
    with hosts.together("report"):
        hosts.barrier("all is told")  # for however long it takes: on the way out they wait for one another no more


def _introduced(run: Run) -> str:
    """What is about to be trained, in a line: a wrong folder is seen before it costs anything."""
    model = run.settings.model
    said = f"model: {model.path}, {model.llama.parameters:,} parameters, {run.tokenizer.vocabulary:,} tokens"
    said += f"; chat format: {run.settings.chat}"
    if run.chat_note is not None:
        said += f"\nnote: {run.chat_note}"
    seen = config_files.hf_fields(epath.Path(model.path)).get("max_position_embeddings")
    if isinstance(seen, int) and seen < run.settings.context_length:
        said += (
            f"\nwarning: config.context_length is {run.settings.context_length:,}, and this model was made for texts "
            f"of {seen:,} tokens: it may write nonsense beyond"
        )
    return said


class Progress:
    """Keeps results.json and report.html up to date with the stages that are done.

    Writing them takes longer as a run grows, since all of its texts are read. After a stage they are written only where
    that takes less than SHARE of the time since it was done last.
    """

    SHARE = 1 / 20

    def __init__(self, run: Run):
        self._run = run
        self._done_s, self._took_s = -math.inf, 0.0

    def write(self) -> dict[str, dict[str, dict]]:
        """Writes both files; returns the results of the models that are evaluated."""
        began = time.monotonic()
        workdir = self._run.workdir
        names = ["m0", "sft", *(f"m{number}" for number in range(1, self._run.settings.models + 1))]
        names = [name for name in names if (workdir / name).exists()]
        results = collect_results(workdir, names)
        jsonl.write_json(workdir / "results.json", results)
        write_report(workdir, tuple(name.upper() for name in names))
        self._done_s = time.monotonic()
        self._took_s = self._done_s - began
        return results

    def after_stage(self, stage: str) -> None:
        """Writes them on one process, unless it is too soon."""
        if hosts.is_main() and self.SHARE * (time.monotonic() - self._done_s) >= self._took_s:
            self._write_or_warn()

    def at_failure(self) -> None:
        """Writes them with what there is."""
        if hosts.is_main():
            self._write_or_warn()

    def _write_or_warn(self) -> None:
        """No fault of a report ends a run, or hides why it ends."""
        try:
            self.write()
        except Exception as error:
            print(f"warning: the report could not be written: {error!r}", file=sys.stderr, flush=True)


def collect_results(workdir: epath.Path, names: Sequence[str]) -> dict[str, dict[str, dict]]:
    """{"M1": {"oracle_score": {"value": ..., "stderr": ..., "n": ...}}} of the models that are evaluated."""
    files = {name: workdir / name / "eval" / "metrics.json" for name in names}
    return {name.upper(): jsonl.read_json(path) for name, path in files.items() if path.exists()}


def results_table(results: Mapping[str, Mapping[str, Mapping]]) -> str:
    """A model a line, a metric a column, each with its standard error; a dash where a model has none."""
    columns = [name for name in _COLUMNS if any(name in metrics for metrics in results.values())]
    rows = [["", *(_COLUMNS[name][0] for name in columns)]]
    for model, metrics in results.items():
        cells = [
            _COLUMNS[name][1].format(metrics[name]["value"], metrics[name]["stderr"]) if name in metrics else "-"
            for name in columns
        ]
        rows.append([model, *cells])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])
