"""Judging as it is configured: what a run accepts, says, counts and advises."""

import dataclasses

import pytest
from completions_server import Server, serving

from configs.base import get_config
from srlm_jax.data import world
from srlm_jax.judge.rubric import Rubric
from srlm_jax.pipeline import evaluation, judging
from srlm_jax.pipeline.ledger import EmptyStage, Outcome, StaleStage
from srlm_jax.pipeline.run import Run, make_run
from srlm_jax.pipeline.settings import BadConfig, read
from srlm_jax.records import (
    Completion,
    JudgedPrompt,
    JudgedResponse,
    Metric,
    NoVote,
    RankedPrompt,
    Responses,
    Vote,
    WatchedCompletion,
)
from srlm_jax.storage import jsonl

SERVER = {"url": "http://127.0.0.1:9/v1", "model": "judge"}


def settings(workdir, **changes):
    """The smoke scale with fields of config.judging changed."""
    tree = get_config("smoke", 2).to_dict() | {"workdir": str(workdir)}
    endpoint = tree["judging"]["endpoint"] | changes.pop("endpoint", {})
    tree["judging"] |= changes | {"endpoint": endpoint}
    return tree


def open_run(workdir, **changes):
    return make_run(read(settings(workdir, **changes)), "test")


def votes(*texts):
    """Votes by score, or by why they have none."""
    return tuple(
        Vote(
            text="",
            finished=it is not NoVote.UNFINISHED,
            score=None if isinstance(it, NoVote) else it,
            no_vote=it if isinstance(it, NoVote) else None,
        )
        for it in texts
    )


def judged(*some):
    responses = (JudgedResponse(response="a", tokens=1, finished=True, votes=tuple(some), score=None),)
    return [JudgedPrompt(id="a", prompt="q", responses=responses)]


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"score": "mean"}, r"^config\.judging\.score is 'mean': it must (be )?'votes' or 'expected'"),
        ({"min_scored": 1.5}, r"^config\.judging\.min_scored is 1\.5"),
        ({"min_scored": -0.1}, r"^config\.judging\.min_scored is -0\.1"),
        ({"min_scored": float("nan")}, r"^config\.judging\.min_scored is nan"),
        ({"samples": 0}, r"^config\.judging\.samples is 0"),
        ({"score": "expected", "endpoint": SERVER}, r"score is 'expected' and config\.judging\.endpoint\.url is given"),
        ({"prefix": "Score: ", "endpoint": SERVER}, r"prefix is 'Score: ' and config\.judging\.endpoint\.url is given"),
        ({"endpoint": {"url": "http://127.0.0.1/v1"}}, r"^config\.judging\.endpoint: .*model is not given"),
    ],
)
def test_settings_that_cannot_be_judged_by_are_refused(tmp_path, changes, message):
    with pytest.raises(BadConfig, match=message):
        read(settings(tmp_path, **changes))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "rubric.txt"),
        (b"judge <INSTRUCTION_HERE>", r"rubric\.txt: .*must hold <RESPONSE_HERE> once, it holds it 0 times"),
        (b"<INSTRUCTION_HERE> <RESPONSE_HERE> \xff", r"rubric\.txt: not UTF-8 text"),
    ],
)
def test_a_rubric_that_cannot_be_used_is_named_before_anything_runs(tmp_path, content, message):
    path = tmp_path / "rubric.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BadConfig, match=rf"^config\.judging\.rubric: .*{message}"):
        open_run(tmp_path / "run", rubric=str(path))


def test_a_rubric_of_ones_own_takes_the_place_of_the_world_s(tmp_path):
    path = tmp_path / "rubric.txt"
    path.write_text("question: <INSTRUCTION_HERE>\nanswer: <RESPONSE_HERE>\nscore:\n")
    assert open_run(tmp_path / "run").rubric == world.RUBRIC
    run = open_run(tmp_path / "run", rubric=str(path))
    assert run.rubric == Rubric(template="question: <INSTRUCTION_HERE>\nanswer: <RESPONSE_HERE>\nscore:", stop=())
    assert list(judging.rubric_content(run)) == ["config.judging.rubric (content)"]


# --- what is said -----------------------------------------------------------------------------------------------------


def test_the_share_of_scores_is_said_by_reason_with_the_mean():
    some = [*votes(*[3.0] * 1_900, *[5.0] * 60), *votes(*[NoVote.UNFINISHED] * 30, *[NoVote.NO_SCORE] * 10)]
    assert judging.told("M1", judged(*some)) == (
        "M1: 98 % of 2,000 judgements have a score (2 % unfinished, 0.5 % no score), mean 3.1"
    )
    assert judging.told("M0", judged(*votes(*[NoVote.NO_SCORE] * 3))) == (
        "M0: 0 % of 3 judgements have a score (100 % no score)"
    )
    expected = [dataclasses.replace(vote, expected=2.5) for vote in votes(NoVote.NO_SCORE, 4.0)]
    assert judging.told("M0", judged(*expected)).endswith("mean 4.0; mean expected score 2.5")
    assert judging.told("M0", []) == "M0: 0 % of 0 judgements have a score"


@pytest.mark.parametrize(
    ("value", "stderr", "warns"), [(0.51, 0.02, True), (0.54, 0.02, True), (0.55, 0.02, False), (0.3, 0.01, True)]
)
def test_a_judge_at_chance_is_told(value, stderr, warns):
    warning = evaluation.at_chance("M1", {"pairwise_accuracy": Metric(value=value, stderr=stderr, n=9)})
    assert warns == (warning is not None)
    if warns:
        assert f"M1's judge orders human-ranked pairs no better than chance ({value:.2f} ± {stderr:.2f})" in warning
    assert evaluation.at_chance("M1", {}) is None


# --- too few scores ---------------------------------------------------------------------------------------------------


def stop(run, some, *, teaches=False):
    with pytest.raises(EmptyStage) as raised:
        judging.check_scored(run, "m2/judgements", "M1", judged(*some), teaches=teaches)
    return str(raised.value)


def test_below_the_threshold_a_run_stops_and_above_it_warns(tmp_path, capsys):
    run = open_run(tmp_path, min_scored=0.5)
    message = stop(run, votes(3.0, NoVote.NO_SCORE, NoVote.NO_SCORE))
    assert message.startswith("m2/judgements: judged by M1, 33 % of 3 judgements have a score (67 % no score). ")
    assert "a lower config.judging.min_scored" in message
    assert "a lower config.judging.min_scored" not in stop(run, votes(NoVote.NO_SCORE))
    assert capsys.readouterr().err == ""
    judging.check_scored(run, "m2/judgements", "M1", judged(*votes(3.0, NoVote.NO_SCORE)), teaches=False)
    assert capsys.readouterr().err.startswith("warning: m2/judgements: judged by M1, 50 % of 2 judgements have a score")
    judging.check_scored(run, "m2/judgements", "M1", judged(*votes(*[3.0] * 9, NoVote.NO_SCORE)), teaches=False)
    assert capsys.readouterr().err == ""


def test_a_threshold_of_zero_still_wants_one_score(tmp_path):
    run = open_run(tmp_path, min_scored=0.0)
    judging.check_scored(run, "m2/judgements", "M1", judged(*votes(3.0, *[NoVote.NO_SCORE] * 99)), teaches=False)
    stop(run, votes(NoVote.NO_SCORE))


def test_the_advice_depends_on_the_reasons(tmp_path):
    run = open_run(tmp_path, min_scored=0.5)
    cut = stop(run, votes(*[NoVote.UNFINISHED] * 4))
    assert "raise config.judging.max_new_tokens (now 64): most of them are unfinished" in cut
    assert "max_new_tokens" not in stop(run, votes(*[NoVote.NO_SCORE] * 4))
    assert "say the scale (0 to 5)" in stop(run, votes(*[NoVote.OUT_OF_RANGE] * 4))
    assert "config.judging.prefix" in cut
    assert "config.judging.prefix" not in stop(
        open_run(tmp_path, min_scored=0.5, prefix="Score: "), votes(NoVote.NO_SCORE)
    )
    served = stop(open_run(tmp_path, min_scored=0.5, endpoint=SERVER), votes(NoVote.NO_SCORE))
    assert "config.judging.prefix" not in served and "config.judging.endpoint" not in served
    taught = stop(run, votes(NoVote.NO_SCORE), teaches=True)
    assert "config.seed_data.eft" in taught
    assert "config.judging.endpoint" not in taught and "config.judging.score" not in taught


def test_expected_scores_count_where_they_are_configured_and_help_where_they_are_not(tmp_path):
    some = [dataclasses.replace(vote, expected=2.5) for vote in votes(*[NoVote.NO_SCORE] * 4)]
    assert "config.judging.score=expected" in stop(open_run(tmp_path, min_scored=0.5), some)
    run = open_run(tmp_path, min_scored=0.5, score="expected")
    judging.check_scored(run, "m2/judgements", "M1", judged(*some), teaches=False)
    assert "config.judging.score=expected" not in stop(run, some, teaches=True)


# --- stages -----------------------------------------------------------------------------------------------------------


def pretend(run, *names):
    for name in names:
        run.ledger.run(name, lambda: Outcome({}, None), config={}, inputs=(), outputs=())


def judge(run):
    pretend(run, "m1/train", "m2/responses")
    completions = tuple(Completion(text=text, tokens=1, finished=True) for text in ("plum", "fig"))
    answers = [Responses(id=name, prompt=f"question {name}", completions=completions) for name in "abc"]
    jsonl.write(jsonl.shard(run.workdir / "m2" / "responses", 0), answers)
    judging.judge_responses(run, "m2", "m1")
    return jsonl.read(run.workdir / "m2" / "judgements", JudgedPrompt)


@pytest.fixture
def model(monkeypatch):
    """Every model says "3" with the probability of 5 at a half, after whatever it is made to begin with."""
    asked = []

    def generate(requests, params, report):
        asked.extend(requests)
        said = WatchedCompletion(
            text="3", tokens=1, finished=True, probabilities=lambda start, skipped: (0, 0, 0, 0.5, 0, 0.5)
        )
        return [tuple((said,) * params.samples for _ in request.prompts) for request in requests]

    monkeypatch.setattr(Run, "generate", lambda run, name, stage: generate)
    return asked


@pytest.mark.parametrize(("score", "wanted"), [("votes", 3.0), ("expected", 4.0)])
def test_the_configured_score_counts_and_both_are_recorded(tmp_path, model, score, wanted):
    records = judge(open_run(tmp_path, prefix="Score: ", score=score))
    assert {request.opening for request in model} == {"Score: "}
    for response in (response for record in records for response in record.responses):
        assert (response.score, response.expected) == (wanted, 4.0)
        assert {(vote.text, vote.score, vote.expected) for vote in response.votes} == {("Score: 3", 3.0, 4.0)}


def test_the_baseline_s_judgements_are_scored_by_their_text(tmp_path, model):
    run = open_run(tmp_path, prefix="Score: ", score="expected")
    pretend(run, "seed", "sft/train")
    ranked = [RankedPrompt(id="a", prompt="question a", responses=("plum", "fig"), ranks=(0, 1))]
    jsonl.write(run.workdir / "seed" / "eft_train.jsonl", ranked)
    judging.judge_ranked(run)
    (record,) = jsonl.read(run.workdir / "eft" / "judgements", JudgedPrompt)
    assert [response.score for response in record.responses] == [3.0, 3.0]


def test_a_server_may_judge_the_pairs_in_the_model_s_place(tmp_path, model, monkeypatch):
    pytest.importorskip("openai", reason="needs the extra `openai`")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serving(Server(lambda prompt, sample: f"It is so.\nScore: {1 + ('plum' in prompt)}")) as server:
        url = f"http://127.0.0.1:{server.server_port}/v1"
        records = judge(open_run(tmp_path, endpoint={"url": url, "model": "outside"}))
        assert {fields["model"] for _, _, fields in server.asked} == {"outside"}
    assert model == []
    assert [[response.score for response in record.responses] for record in records] == [[2.0, 1.0]] * 3
    assert {vote.expected for record in records for response in record.responses for vote in response.votes} == {None}
    with pytest.raises(StaleStage, match=r"m2/judgements .*config\.judging\.endpoint\.model was \"outside\", is null"):
        judge(open_run(tmp_path))


def test_thresholds_and_servers_make_no_judgement_of_a_model_stale(tmp_path):
    plain, other = open_run(tmp_path), open_run(tmp_path, min_scored=0.7, endpoint=SERVER)
    assert plain.config(*plain.JUDGING) == other.config(*other.JUDGING)
    assert open_run(tmp_path, prefix="Score: ").config(*plain.JUDGING) != plain.config(*plain.JUDGING)


def test_a_server_that_is_named_and_not_asked_is_not_the_judge(tmp_path):
    """The address came later once: the model's own judgements would have passed for the server's."""
    without, later = open_run(tmp_path, endpoint={"model": "outside"}), open_run(tmp_path, endpoint=SERVER)
    field = "config.judging.endpoint.model"
    assert without.config("judging.endpoint") == {field: None, "config.seed": 0}
    assert later.config("judging.endpoint") == {field: SERVER["model"], "config.seed": 0}
