"""What is measured of each model; nothing here is read by any training."""

from collections.abc import Sequence

from srlm_jax.data import world
from srlm_jax.evaluate.oracle import oracle_metrics
from srlm_jax.evaluate.reward_metrics import reward_metrics
from srlm_jax.pipeline.answering import draw_answers
from srlm_jax.pipeline.judging import as_responses, judge_all, vote_counts
from srlm_jax.pipeline.ledger import Outcome
from srlm_jax.pipeline.run import Run
from srlm_jax.records import (
    OracleScores,
    Prompt,
    RankedPrompt,
    Responses,
    SamplingParams,
)
from srlm_jax.storage import jsonl


def evaluate(run: Run, name: str) -> None:
    """The judge against the humans on the EFT evaluation split, and the oracle's scores of held-out answers."""
    stage, folder = f"{name}/eval", run.workdir / name / "eval"

    def work() -> Outcome:
        ranked = jsonl.read(run.workdir / "seed" / "eft_eval.jsonl", RankedPrompt)
        judged = judge_all(
            run, name, f"{stage}/judgements", [as_responses(p) for p in ranked], f"{name}: evaluating the judge"
        )
        held_out = jsonl.read(run.workdir / "world" / "held_out.jsonl", Prompt)
        params = SamplingParams(**{**vars(run.settings.responses), "samples": 1})
        answers = draw_answers(run, name, f"{stage}/responses", held_out, params, f"{name}: held-out answers")
        scores = _oracle_scores(answers)
        jsonl.write(folder / "oracle.jsonl", scores)
        metrics = oracle_metrics(answers, scores) | reward_metrics(ranked, judged)
        jsonl.write_json(folder / "metrics.json", {key: vars(metric) for key, metric in metrics.items()})
        return Outcome(vote_counts(judged), None)

    run.ledger.run(
        stage,
        work,
        config=run.config("judging", "responses", "shard_prompts", "engine"),
        inputs=("world", "seed", f"{name}/train"),
        outputs=(stage,),
    )


def score_round_by_oracle(run: Run, name: str) -> None:
    """The oracle's scores of a round's answers, for the report alone: no training reads them."""
    stage = f"{name}/oracle"

    def work() -> Outcome:
        scores = _oracle_scores(jsonl.read(run.workdir / name / "responses", Responses))
        jsonl.write(run.workdir / name / "oracle.jsonl", scores)
        unscored = sum(score is None for row in scores for score in row.scores)
        return Outcome({"scores": sum(len(row.scores) for row in scores) - unscored, "unscored": unscored}, None)

    run.ledger.run(stage, work, config=run.config(), inputs=(f"{name}/responses",), outputs=(f"{name}/oracle.jsonl",))


def _oracle_scores(answers: Sequence[Responses]) -> list[OracleScores]:
    return [
        OracleScores(
            id=answer.id,
            scores=tuple(world.oracle_score(answer.prompt, completion.text) for completion in answer.completions),
        )
        for answer in answers
    ]
