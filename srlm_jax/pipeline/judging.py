"""The stages that judge: the EFT examples from the baseline's judgements, the preference pairs from the model's own."""

import collections
from collections.abc import Sequence

from srlm_jax.data import eft, pairs
from srlm_jax.judge import rubric as rubrics
from srlm_jax.judge.score import judge
from srlm_jax.pipeline.cut_texts import warn_if_cut
from srlm_jax.pipeline.ledger import EmptyStage, Outcome
from srlm_jax.pipeline.run import Run, needs_all
from srlm_jax.records import (
    Completion,
    Generate,
    JudgedPrompt,
    NoVote,
    PairDrop,
    PreferencePair,
    RankedPrompt,
    Responses,
)
from srlm_jax.storage import jsonl
from srlm_jax.text import chat


def as_responses(prompt: RankedPrompt) -> Responses:
    """Ranked answers in the form in which a judge takes them; their lengths in tokens are not known."""
    completions = tuple(Completion(text=text, tokens=0, finished=True) for text in prompt.responses)
    return Responses(id=prompt.id, prompt=prompt.prompt, completions=completions)


def ranked_prompts(run: Run, split: str) -> tuple[list[RankedPrompt], int]:
    """The prompts of "eft_train" or "eft_eval" of which the judge can see each answer whole and still write its
    verdict, and how many there are besides: nothing is judged that was cut.

    Raises:
      EmptyStage: there are prompts, and none of them fits.
    """
    ranked = jsonl.read(run.workdir / "seed" / f"{split}.jsonl", RankedPrompt)
    room = run.settings.context_length - run.settings.judging.max_new_tokens

    def fits(prompt: RankedPrompt) -> bool:
        texts = [rubrics.fill(run.rubric, prompt.prompt, response) for response in prompt.responses]
        return all(len(chat.encode_prompt(run.tokenizer, run.chat, text)) <= room for text in texts)

    fitting = [prompt for prompt in ranked if fits(prompt)]
    if ranked and not fitting:
        raise EmptyStage(
            f"seed: none of {len(ranked)} prompts of {split} can be judged in config.context_length "
            f"{run.settings.context_length} with config.judging.max_new_tokens {run.settings.judging.max_new_tokens}: "
            "raise the first"
        )
    return fitting, len(ranked) - len(fitting)


def judge_answers(
    run: Run, generate: Generate, folder: str, answers: Sequence[Responses], title: str
) -> list[JudgedPrompt]:
    """The judgements of all answers by one judge, as shards in `folder`; see `Run.in_shards`."""
    votes = run.settings.judging.samples
    return run.in_shards(
        run.workdir / folder,
        answers,
        JudgedPrompt,
        lambda part, report: judge(
            generate, run.rubric, part, run.settings.judging, report, prefix="", by_expected=False
        ),
        title=title,
        completions=lambda answer: votes * len(answer.completions),
        together=needs_all(generate),
    )


def judge_all(run: Run, judge_name: str, stage: str, answers: Sequence[Responses], title: str) -> list[JudgedPrompt]:
    """As `judge_answers`, by a model of this run."""
    return judge_answers(run, run.generate(judge_name, stage), stage, answers, title)


def vote_counts(judged: Sequence[JudgedPrompt]) -> dict[str, int]:
    """How many judgements there are, how many of them the length limit cut, and how many carry no vote, by reason."""
    votes = [vote for prompt in judged for response in prompt.responses for vote in response.votes]
    counts = collections.Counter(str(vote.no_vote) for vote in votes if vote.no_vote is not None)
    cut = sum(not vote.finished for vote in votes)
    return {"votes": len(votes), "cut": cut} | {str(reason): counts[str(reason)] for reason in NoVote}


def _warn_if_cut(stage: str, counts: dict[str, int]) -> None:
    warn_if_cut(stage, "judgements", counts["cut"], counts["votes"], "config.judging.max_new_tokens")


def _refuse_if_unscored(stage: str, judge_name: str, counts: dict[str, int]) -> None:
    if counts["votes"] == sum(counts[str(reason)] for reason in NoVote):
        raise EmptyStage(
            f"{stage}: none of {counts['votes']} judgements by {judge_name} holds a score (100 % without a vote: "
            f"{ {str(reason): counts[str(reason)] for reason in NoVote} }). This model cannot judge with this rubric: "
            "look at the texts in the folder of the stage; give the model judging data, or raise "
            "config.judging.max_new_tokens where they are unfinished"
        )


def judge_ranked(run: Run) -> None:
    """The SFT baseline judges the ranked EFT answers (section 3.1.1)."""

    def work() -> Outcome:
        ranked, too_long = ranked_prompts(run, "eft_train")
        judged = judge_all(run, "sft", "eft/judgements", [as_responses(p) for p in ranked], "eft: judging")
        counts = vote_counts(judged) | {"prompts_with_too_many_tokens": too_long}
        _warn_if_cut("eft/judgements", counts)
        _refuse_if_unscored("eft/judgements", "the SFT baseline", counts)
        return Outcome(counts, None)

    run.ledger.run(
        "eft/judgements",
        work,
        config=run.config("judging", "context_length", *run.SAMPLING),
        inputs=("seed", "sft/train"),
        outputs=("eft/judgements",),
    )


def make_eft(run: Run) -> None:
    """Judgements that agree with the humans -> EFT training examples (section 3.1.1)."""

    def work() -> Outcome:
        ranked, _ = ranked_prompts(run, "eft_train")
        made = eft.eft_examples(
            ranked,
            jsonl.read(run.workdir / "eft" / "judgements", JudgedPrompt),
            run.rubric,
            run.settings.eft,
            run.settings.seed,
        )
        if not made.examples:
            raise EmptyStage(
                f"eft/examples: no judgement of the SFT baseline agrees with the human ranking ({made.counts}); "
                "raise config.eft.max_tied_share or config.eft.most_common_share, or train the baseline for longer"
            )
        run.write(jsonl.shard(run.workdir / "eft" / "examples", 0), made.examples)
        return Outcome(made.counts, None)

    run.ledger.run(
        "eft/examples", work, config=run.config("eft"), inputs=("seed", "eft/judgements"), outputs=("eft/examples",)
    )


def judge_responses(run: Run, name: str, start: str) -> None:
    """The model judges its own answers (section 2.2)."""
    stage = f"{name}/judgements"

    def work() -> Outcome:
        answers = jsonl.read(run.workdir / name / "responses", Responses)
        counts = vote_counts(judge_all(run, start, stage, answers, f"{name}: judging"))
        _warn_if_cut(stage, counts)
        _refuse_if_unscored(stage, start, counts)
        return Outcome(counts, None)

    run.ledger.run(
        stage,
        work,
        config=run.config("judging", *run.SAMPLING),
        inputs=(f"{name}/responses", f"{start}/train"),
        outputs=(stage,),
    )


def make_pairs(run: Run, name: str) -> None:
    """Highest mean score against lowest (section 2.2)."""

    def work() -> Outcome:
        made = [pairs.preference_pair(judged) for judged in jsonl.read(run.workdir / name / "judgements", JudgedPrompt)]
        kept = [pair for pair in made if isinstance(pair, PreferencePair)]
        drops = collections.Counter(str(drop) for drop in made if isinstance(drop, PairDrop))
        counts = {"kept": len(kept)} | {str(reason): drops[str(reason)] for reason in PairDrop}
        if not kept:
            raise EmptyStage(
                f"{name}/pairs: no prompt gives a preference pair ({counts}); a judge that always says the same "
                "cannot teach: look at the score histogram in report.html, raise config.judging.samples or "
                "config.responses.temperature"
            )
        counts["chosen_cut"] = sum(not pair.chosen_finished for pair in kept)
        counts["rejected_cut"] = sum(not pair.rejected_finished for pair in kept)
        field = "config.responses.max_new_tokens"
        warn_if_cut(f"{name}/pairs", "chosen answers", counts["chosen_cut"], len(kept), field)
        run.write(jsonl.shard(run.workdir / name / "pairs", 0), kept)
        return Outcome(counts, None)

    run.ledger.run(
        f"{name}/pairs", work, config=run.config(), inputs=(f"{name}/judgements",), outputs=(f"{name}/pairs",)
    )
