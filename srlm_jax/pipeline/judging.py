"""The stages that judge: the EFT examples from the baseline's judgements, the preference pairs from the model's own."""

import collections
import sys
from collections.abc import Sequence

from srlm_jax.data import eft, pairs
from srlm_jax.judge import rubric as rubrics
from srlm_jax.judge.score import judge
from srlm_jax.parallel import hosts
from srlm_jax.pipeline.cut_texts import warn_if_cut
from srlm_jax.pipeline.endpoint import EndpointGenerate
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
    s = run.settings.judging
    room = run.settings.context_length - s.max_new_tokens

    def fits(prompt: RankedPrompt) -> bool:
        texts = [rubrics.fill(run.rubric, prompt.prompt, response) for response in prompt.responses]
        encoded = [chat.encode_prompt_with_opening(run.tokenizer, run.chat, text, s.prefix) for text in texts]
        return all(len(ids) <= room for ids in encoded)

    fitting = [prompt for prompt in ranked if fits(prompt)]
    if ranked and not fitting:
        raise EmptyStage(
            f"seed: none of {len(ranked)} prompts of {split} can be judged in config.context_length "
            f"{run.settings.context_length} with config.judging.max_new_tokens {s.max_new_tokens}: "
            "raise the first"
        )
    return fitting, len(ranked) - len(fitting)


def judge_answers(
    run: Run,
    generate: Generate,
    folder: str,
    answers: Sequence[Responses],
    title: str,
    *,
    prefix: str,
    by_expected: bool,
) -> list[JudgedPrompt]:
    """The judgements of all answers by one judge, as shards in `folder`; see `Run.in_shards` and `judge.score.judge`.
    A server takes no prefix and gives no expected scores."""
    votes = run.settings.judging.samples
    return run.in_shards(
        run.workdir / folder,
        answers,
        JudgedPrompt,
        lambda part, report: judge(
            generate, run.rubric, part, run.settings.judging, report, prefix=prefix, by_expected=by_expected
        ),
        title=title,
        completions=lambda answer: votes * len(answer.completions),
        together=needs_all(generate),
    )


def rubric_content(run: Run) -> dict[str, object]:
    """For the config of a stage that judges: a hash of the rubric's file, if there is one."""
    return run.contents(judging__rubric=run.settings.judging.rubric)


def judge_all(
    run: Run, judge_name: str, stage: str, answers: Sequence[Responses], title: str, *, by_expected: bool
) -> list[JudgedPrompt]:
    """As `judge_answers`, by a model of this run."""
    generate, prefix = run.generate(judge_name, stage), run.settings.judging.prefix
    return judge_answers(run, generate, stage, answers, title, prefix=prefix, by_expected=by_expected)


def vote_counts(judged: Sequence[JudgedPrompt]) -> dict[str, int]:
    """How many judgements there are, how many of them the length limit cut, and how many carry no vote, by reason."""
    votes = [vote for prompt in judged for response in prompt.responses for vote in response.votes]
    counts = collections.Counter(str(vote.no_vote) for vote in votes if vote.no_vote is not None)
    cut = sum(not vote.finished for vote in votes)
    return {"votes": len(votes), "cut": cut} | {str(reason): counts[str(reason)] for reason in NoVote}


def _warn_if_cut(stage: str, counts: dict[str, int]) -> None:
    warn_if_cut(stage, "judgements", counts["cut"], counts["votes"], "config.judging.max_new_tokens")


WARN_SCORED = 0.9  # the share of judgements with a score below which there is a warning


def told(name: str, judged: Sequence[JudgedPrompt]) -> str:
    """A line on the judgements of one judge: how many have a score, why the others have none, and the mean.

    "M1: 93 % of 1,620 judgements have a score (5 % unfinished, 2 % no score), mean 3.4"
    """
    votes = [vote for prompt in judged for response in prompt.responses for vote in response.votes]
    counts, scores = vote_counts(judged), [vote.score for vote in votes if vote.score is not None]
    expected = [vote.expected for vote in votes if vote.expected is not None]
    line = f"{name}: {_shares(counts)}"
    line += f", mean {sum(scores) / len(scores):.1f}" if scores else ""
    return line + (f"; mean expected score {sum(expected) / len(expected):.1f}" if expected else "")


def _shares(counts: dict[str, int]) -> str:
    """ "93 % of 1,620 judgements have a score (5 % unfinished, 2 % no score)"."""
    total = counts["votes"]
    without = {reason: counts[str(reason)] for reason in NoVote if counts[str(reason)]}
    said = f"{_percent(total - sum(without.values()), total)} of {total:,} judgements have a score"
    reasons = [f"{_percent(n, total)} {reason.replace('_', ' ')}" for reason, n in without.items()]
    return said + (f" ({', '.join(reasons)})" if reasons else "")


def _percent(part: int, total: int) -> str:
    """Whole per cents, of which 0 and 100 are said of none and all alone."""
    share = 100 * part / max(total, 1)
    if 0 < share < 1 or 99 < share < 100:
        return f"{share:.1f} %" if 0.05 <= share < 99.95 else "< 0.1 %" if share < 1 else "> 99.9 %"
    return f"{share:.0f} %"


def check_scored(run: Run, stage: str, judge_name: str, judged: Sequence[JudgedPrompt], *, teaches: bool) -> None:
    """Stops a stage whose judgements are too few to go on with, and warns where many carry no score.

    Args:
      teaches: the judgements themselves are trained on, so that only those count whose text holds a score. Otherwise
        those count that have the score which config.judging.score names.

    Raises:
      EmptyStage: none has a score, or a smaller share than config.judging.min_scored; the message says what helps.
    """
    s, counts = run.settings.judging, vote_counts(judged)
    votes = [vote for prompt in judged for response in prompt.responses for vote in response.votes]
    expected = sum(vote.expected is not None for vote in votes)
    parsed = sum(vote.score is not None for vote in votes)
    by_expected = s.score == "expected" and not teaches
    share = (expected if by_expected else parsed) / max(len(votes), 1)
    said = f"{stage}: judged by {judge_name}, {_shares(counts)}"
    if by_expected:
        said += f"; {_percent(expected, len(votes))} have an expected score"
    if share == 0 or share < s.min_scored:
        more = expected > parsed and not teaches and not by_expected
        raise EmptyStage(
            f"{said}. config.judging.min_scored is {s.min_scored:g}. Look at the texts in {run.workdir / stage} or in "
            f"report.html. What helps: {'; '.join(_advice(run, counts, teaches=teaches, expected_helps=more))}. With "
            "another prefix, rubric or length the models are judged anew: add "
            f"--redo={','.join(run.ledger.made_by('config.judging'))}"
        )
    if share < WARN_SCORED and hosts.is_main():
        print(f"warning: {said}; the others are not used", file=sys.stderr, flush=True)


def _advice(run: Run, counts: dict[str, int], *, teaches: bool, expected_helps: bool) -> list[str]:
    """What to change where too few judgements have a score, the likeliest first."""
    s = run.settings.judging
    by_server = run.settings.endpoint.url is not None or (s.endpoint.url is not None and not teaches)
    missing = sum(counts[str(reason)] for reason in NoVote)
    advice = []
    if counts[str(NoVote.UNFINISHED)] >= missing / 2:
        advice.append(f"raise config.judging.max_new_tokens (now {s.max_new_tokens}): most of them are unfinished")
    if not s.prefix and not by_server:
        advice.append("config.judging.prefix='Score: ' gives a model that does not know how to judge a form to fill")
    if expected_helps:
        advice.append("config.judging.score=expected takes the probabilities of the scores in place of the text")
    if counts[str(NoVote.OUT_OF_RANGE)] >= missing / 2:
        advice.append("config.judging.rubric, a file, can say the scale (0 to 5) more plainly")
    else:
        advice.append("config.judging.rubric, a file, can ask more simply than the paper's rubric does")
    if run.settings.seed_data.eft is None:
        advice.append("config.seed_data.eft teaches the model to judge by examples of your own")
    if not teaches and s.endpoint.url is None:
        advice.append("config.judging.endpoint names a server that judges in the model's place")
    if missing < counts["votes"]:
        advice.append("a lower config.judging.min_scored goes on with those that have one")
    return advice


def judge_ranked(run: Run) -> None:
    """The SFT baseline judges the ranked EFT answers (section 3.1.1)."""

    def work() -> Outcome:
        ranked, too_long = ranked_prompts(run, "eft_train")
        # What is trained on is the text, so that its own score counts here.
        answers = [as_responses(p) for p in ranked]
        judged = judge_all(run, "sft", "eft/judgements", answers, "eft: judging", by_expected=False)
        counts = vote_counts(judged) | {"prompts_with_too_many_tokens": too_long}
        _warn_if_cut("eft/judgements", counts)
        check_scored(run, "eft/judgements", "the SFT baseline", judged, teaches=True)
        return Outcome(counts, None)

    run.ledger.run(
        "eft/judgements",
        work,
        config=run.config(*run.JUDGING, "context_length", *run.SAMPLING) | rubric_content(run),
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
    """The model judges its own answers (section 2.2), or the server of config.judging.endpoint does."""
    stage, s = f"{name}/judgements", run.settings.judging

    def work() -> Outcome:
        answers, title = jsonl.read(run.workdir / name / "responses", Responses), f"{name}: judging"
        if s.endpoint.url is None:
            judge_name = start.upper()
            judged = judge_all(run, start, stage, answers, title, by_expected=s.score == "expected")
        else:
            judge_name = f"the server's {s.endpoint.model}"
            server = EndpointGenerate(s.endpoint, "config.judging.endpoint")
            judged = judge_answers(run, server, stage, answers, title, prefix="", by_expected=False)
        counts = vote_counts(judged)
        _warn_if_cut(stage, counts)
        check_scored(run, stage, judge_name, judged, teaches=False)
        return Outcome(counts, None)

    run.ledger.run(
        stage,
        work,
        config=run.config(*run.JUDGING, "judging.score", "judging.endpoint", *run.SAMPLING) | rubric_content(run),
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
