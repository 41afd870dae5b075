"""What is measured of each model; nothing here is read by any training."""

import dataclasses
import sys
from collections.abc import Mapping, Sequence

from srlm_jax.data import sources, world
from srlm_jax.evaluate.oracle import oracle_metrics
from srlm_jax.evaluate.reward_metrics import reward_metrics
from srlm_jax.evaluate.validation import validation_metrics
from srlm_jax.parallel import hosts
from srlm_jax.pipeline.answering import draw_answers, prompt_tokens
from srlm_jax.pipeline.endpoint import EndpointGenerate
from srlm_jax.pipeline.human_loss import human_loss
from srlm_jax.pipeline.judging import (
    as_responses,
    judge_all,
    judge_answers,
    ranked_prompts,
    rubric_content,
    told,
    vote_counts,
)
from srlm_jax.pipeline.ledger import Outcome
from srlm_jax.pipeline.run import Run, naming
from srlm_jax.pipeline.settings import BadConfig
from srlm_jax.records import (
    Metric,
    OracleScores,
    Prompt,
    Responses,
)
from srlm_jax.storage import jsonl


def evaluate(run: Run, name: str) -> None:
    """Measures a model on data that nothing is trained on: the loss of the best human answers and the judge's agreement
    with the humans, both on the EFT evaluation split; and answers to held-out prompts, scored by the oracle in the
    embedded world and elsewhere by the validation judge."""
    stage, folder = f"{name}/eval", run.workdir / name / "eval"
    prompts_file = None if run.embedded else run.settings.validation.prompts_file

    def work() -> Outcome:
        ranked, too_long = ranked_prompts(run, "eft_eval")
        judged = judge_all(
            run,
            name,
            f"{stage}/judgements",
            [as_responses(p) for p in ranked],
            f"{name}: evaluating the judge",
            by_expected=run.settings.judging.score == "expected",
        )
        metrics, counts = human_loss(run, name) | reward_metrics(ranked, judged), {}
        if run.embedded:
            metrics = _oracle_metrics(run, name, stage) | metrics
        elif prompts_file is not None:
            measured, counts = _validation_metrics(run, name, stage)
            metrics = measured | metrics
        if hosts.is_main():
            jsonl.write_json(folder / "metrics.json", {key: vars(metric) for key, metric in metrics.items()})
            print(told(name.upper(), judged), flush=True)
            if name != "m0" and (warning := at_chance(name.upper(), metrics)):  # nothing is taught by M0's judgements
                print(warning, file=sys.stderr, flush=True)
        return Outcome(vote_counts(judged) | {"prompts_with_too_many_tokens": too_long} | counts, None)

    fields = [
        *run.JUDGING,
        "judging.score",
        "responses",
        "context_length",
        "logprob_chunk",
        "reference_batch",
        *run.SAMPLING,
        *([] if run.embedded else ["validation"]),
    ]
    run.ledger.run(
        stage,
        work,
        config=run.config(*fields) | rubric_content(run) | run.contents(validation__prompts_file=prompts_file),
        inputs=(*(["world"] if run.embedded else []), "seed", f"{name}/train"),
        outputs=(stage,),
    )


def at_chance(name: str, metrics: Mapping[str, Metric]) -> str | None:
    """A warning where a judge orders pairs within two standard errors of a coin, or worse; None where it is better."""
    measured = metrics.get("pairwise_accuracy")
    if measured is None or measured.value - 2 * measured.stderr > 0.5:
        return None
    return (
        f"warning: {name}'s judge orders human-ranked pairs no better than chance "
        f"({measured.value:.2f} ± {measured.stderr:.2f}): what it teaches is noise"
    )


def _held_out_answers(run: Run, name: str, stage: str, prompts: Sequence[Prompt]) -> list[Responses]:
    """One answer to each prompt, drawn as a round draws its answers."""
    params = dataclasses.replace(run.settings.responses, samples=1)
    return draw_answers(run, name, f"{stage}/responses", prompts, params, f"{name}: held-out answers")


def _oracle_metrics(run: Run, name: str, stage: str) -> dict[str, Metric]:
    held_out = jsonl.read(run.workdir / "world" / "held_out.jsonl", Prompt)
    answers = _held_out_answers(run, name, stage, held_out)
    scores = _oracle_scores(answers)
    run.write(run.workdir / stage / "oracle.jsonl", scores)
    return oracle_metrics(answers, scores)


def read_prompts(run: Run) -> tuple[list[Prompt], dict[str, int]]:
    """The prompts of config.validation.prompts_file, and how many rows were dropped, by reason.

    Raises:
      BadConfig: they cannot be read, or one is too long.
    """
    with naming("config.validation.prompts_file"):
        prompts, dropped = sources.read_prompts(run.settings.validation.prompts_file, "validation")
        for prompt in prompts:
            if (tokens := prompt_tokens(run, prompt.text)) > run.settings.max_prompt_tokens:
                raise BadConfig(
                    f"prompt {prompt.id!r} has {tokens} tokens, more than config.max_prompt_tokens "
                    f"{run.settings.max_prompt_tokens}: take it out, or raise the limit"
                )
    return prompts, dropped


def _validation_metrics(run: Run, name: str, stage: str) -> tuple[dict[str, Metric], dict[str, int]]:
    """How long the answers to the validation prompts are and, where a server judges them, their scores; and how many
    rows of the prompts were dropped, by reason."""
    s = run.settings.validation
    prompts, dropped = read_prompts(run)
    answers = _held_out_answers(run, name, stage, prompts)
    counts = {f"validation_{reason}": count for reason, count in dropped.items()}
    if s.endpoint.url is None:
        return validation_metrics(answers, []), counts
    server, folder = EndpointGenerate(s.endpoint, "config.validation.endpoint"), f"{stage}/validation"
    judged = judge_answers(run, server, folder, answers, f"{name}: validation", prefix="", by_expected=False)
    return validation_metrics(answers, judged), counts


def score_round_by_oracle(run: Run, name: str) -> None:
    """The oracle's scores of a round's answers, for the report alone: no training reads them."""
    stage = f"{name}/oracle"

    def work() -> Outcome:
        scores = _oracle_scores(jsonl.read(run.workdir / name / "responses", Responses))
        run.write(run.workdir / name / "oracle.jsonl", scores)
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
