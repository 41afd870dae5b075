"""The main command: its table, its results, and what it says instead of a traceback."""

import io
import math
import sys
from types import SimpleNamespace

import pytest
from etils import epath

from configs.base import get_config
from srlm_jax.evaluate.likelihood import likelihood_metrics
from srlm_jax.evaluate.oracle import oracle_metrics
from srlm_jax.evaluate.reward_metrics import reward_metrics
from srlm_jax.evaluate.validation import validation_metrics
from srlm_jax.pipeline import command, report
from srlm_jax.pipeline.command import collect_results, results_table, run_command
from srlm_jax.pipeline.ledger import EmptyStage, Outcome
from srlm_jax.records import (
    Completion,
    JudgedPrompt,
    JudgedResponse,
    OracleScores,
    RankedPrompt,
    Responses,
    Vote,
)
from srlm_jax.storage import jsonl
from srlm_jax.storage.jsonl import BadRecord


def metric(value, stderr, n=10):
    return {"value": value, "stderr": stderr, "n": n}


def test_the_table_has_a_line_a_model_and_a_column_a_metric():
    results = {
        "M1": {"oracle_score": metric(1.25, 0.5), "perfect": metric(0.125, 0.0625), "spearman": metric(-0.5, 0.25)},
        "M2": {"oracle_score": metric(10.0, 0.125)},
    }
    assert results_table(results).split("\n") == [
        "    oracle score       perfect        Spearman",
        "--  ------------  ------------  --------------",
        "M1   1.25 ± 0.50  12.5% ± 6.2%  -0.500 ± 0.250",
        "M2  10.00 ± 0.12             -               -",
    ]


def test_metrics_without_a_column_are_left_out():
    assert "unheard" not in results_table({"M1": {"unheard": metric(1, 1), "perfect": metric(1, 0)}})


def test_columns_are_named_as_the_metrics_are():
    """Once the report waited for a metric of another name, and had an empty column."""
    ranked = [RankedPrompt(id=i, prompt="name two fruits .", responses=("fig", "fig kiwi"), ranks=(1, 0)) for i in "ab"]
    judgements = tuple(
        JudgedResponse(
            response=text,
            tokens=1,
            finished=True,
            votes=(Vote(text="", finished=True, score=score, no_vote=None),),
            score=score,
        )
        for text, score in (("fig", 3.0), ("fig kiwi", 5.0))
    )
    judged = [JudgedPrompt(id=i, prompt="name two fruits .", responses=judgements) for i in "ab"]
    answers = [Responses(id="b", prompt="", completions=(Completion(text="", tokens=1, finished=True),))]
    measured = oracle_metrics(answers, [OracleScores(id="b", scores=(5,))]) | reward_metrics(ranked, judged)
    measured |= validation_metrics([*answers, *answers], judged) | likelihood_metrics([-3.0, -4.0], [2, 2])
    assert set(command._COLUMNS) <= measured.keys()
    assert {key for key, *_ in report._METRICS} <= measured.keys()


def test_results_are_the_evaluations_by_the_models_titles(tmp_path):
    workdir = epath.Path(tmp_path)
    for name, value in (("m0", 0.5), ("sft", 1.5)):
        jsonl.write_json(workdir / name / "eval" / "metrics.json", {"perfect": metric(value, 0.1)})
    results = collect_results(workdir, ["m0", "sft"])
    assert results == {"M0": {"perfect": metric(0.5, 0.1)}, "SFT": {"perfect": metric(1.5, 0.1)}}
    assert list(results) == ["M0", "SFT"]


def test_there_may_be_more_rounds_than_the_paper_has(finished, tmp_path, monkeypatch, capsys):
    """M4 once trained to its end, and then had no title in the table."""
    names = ["m0", "sft", *(f"m{number}" for number in range(1, 13))]
    for name in names:
        jsonl.write_json(epath.Path(tmp_path) / name / "eval" / "metrics.json", {"oracle_score": metric(3.5, 0.25)})
    monkeypatch.setattr(command, "self_reward", lambda run: names)
    run_command(finished | {"models": 12}, None)
    assert list(jsonl.read_json(tmp_path / "results.json")) == ["M0", "SFT", *(f"M{n}" for n in range(1, 13))]
    assert "\nM12   3.50 ± 0.25\n" in capsys.readouterr().out
    page = (tmp_path / "report.html").read_text()
    assert all(f">M{number}<" in page for number in range(1, 13))


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """A workdir in which two models are made and evaluated; making them again does nothing."""
    for name in ("m0", "sft"):
        jsonl.write_json(epath.Path(tmp_path) / name / "eval" / "metrics.json", {"oracle_score": metric(3.5, 0.25)})
    monkeypatch.setattr(command, "self_reward", lambda run: ["m0", "sft"])
    return get_config("smoke", 1).to_dict() | {"workdir": str(tmp_path)}


def test_the_command_writes_results_and_report_and_prints_the_table(finished, tmp_path, capsys):
    run_command(finished, None)
    results = jsonl.read_json(tmp_path / "results.json")
    assert results == {name: {"oracle_score": metric(3.5, 0.25)} for name in ("M0", "SFT")}
    assert "3.50" in (tmp_path / "report.html").read_text()
    printed = capsys.readouterr().out
    assert results_table(results) in printed
    assert str(tmp_path / "results.json") in printed and str(tmp_path / "report.html") in printed


def test_a_run_that_stops_leaves_results_and_a_report_of_what_there_is(finished, tmp_path, monkeypatch, capsys):
    def stop(run):
        raise EmptyStage("eft/judgements: nothing")

    monkeypatch.setattr(command, "self_reward", stop)
    with pytest.raises(EmptyStage, match=r"^eft/judgements: nothing$"):
        run_command(finished, None)
    assert list(jsonl.read_json(tmp_path / "results.json")) == ["M0", "SFT"]
    assert "3.50" in (tmp_path / "report.html").read_text()


def test_a_report_that_fails_does_not_hide_why_the_run_stops(finished, tmp_path, monkeypatch, capsys):
    def stop(run):
        raise EmptyStage("eft/judgements: nothing")

    def fail(*_):
        raise TypeError("a fault of the report")

    monkeypatch.setattr(command, "self_reward", stop)
    monkeypatch.setattr(command, "write_report", fail)
    with pytest.raises(EmptyStage, match="nothing"):
        run_command(finished, None)
    assert "warning: the report could not be written: TypeError" in capsys.readouterr().err


def test_the_report_is_written_after_stages_that_have_worked(finished, tmp_path, monkeypatch):
    written = []

    def work(run):
        for stage in ("seed", "m0/train", "seed"):
            run.ledger.run(stage, lambda: Outcome({}, None), config={}, inputs=(), outputs=())
            written.append((tmp_path / "report.html").exists())
            (tmp_path / "report.html").unlink(missing_ok=True)

    monkeypatch.setattr(command, "self_reward", work)
    monkeypatch.setattr(command.Progress, "SHARE", math.inf)
    run_command(finished, None)
    assert written == [True, True, False]


def test_a_report_that_takes_long_is_written_seldom(tmp_path, monkeypatch):
    now, written = [100.0], []
    monkeypatch.setattr(command.time, "monotonic", lambda: now[0])

    def write(workdir, models):
        written.append(now[0])
        now[0] += 3

    monkeypatch.setattr(command, "write_report", write)
    run = SimpleNamespace(workdir=epath.Path(tmp_path), settings=SimpleNamespace(models=2))
    progress = command.Progress(run)
    for _ in range(12):
        progress.after_stage("m2/pairs")
        now[0] += 10
    assert written == [100.0, 163.0]  # the next after 20 times 3 s
    progress.at_failure()
    assert len(written) == 3


def test_the_command_tells_what_a_redo_removed(finished, tmp_path, capsys):
    entry = {"status": "done", "stage": "m1/eval", "inputs": {}, "outputs": ["m1/eval"], "config": {}, "code": "1"}
    jsonl.write_json(tmp_path / "ledger" / "m1.eval.json", entry)
    run_command(finished, "m1/eval")
    assert "removed: m1/eval" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"--redo=m1/eval: .* has no such stage; it has none"):
        run_command(finished, "m1/eval")


def test_what_is_said_at_the_start_is_there_before_the_first_stage_ends(finished, tmp_path, monkeypatch):
    """A file as stdout holds lines back: hours passed before "no effect in this run" could be read."""
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written))
    monkeypatch.setattr(command, "self_reward", lambda run: seen.append(written.getvalue().decode()))
    seen, entry = [], {"status": "done", "stage": "m1/eval", "inputs": {}, "outputs": [], "config": {}, "code": "1"}
    jsonl.write_json(tmp_path / "ledger" / "m1.eval.json", entry)
    run_command(finished, "m1/eval", ["config.lora.alpha"])
    (said,) = seen
    assert said.splitlines() == [
        "no effect in this run: config.lora.alpha (config.lora.rank is not given)",
        "removed: m1/eval",
    ]


def test_a_metrics_file_that_is_cut_is_named(finished, tmp_path):
    (tmp_path / "sft" / "eval" / "metrics.json").write_text('{"oracle_score": {"val')
    with pytest.raises(BadRecord, match=r"sft/eval/metrics\.json: not valid JSON"):
        run_command(finished, None)
