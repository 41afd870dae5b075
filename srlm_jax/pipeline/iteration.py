"""The paper's algorithm (section 2): M0 -> SFT baseline, M1 -> M2 -> M3."""

from srlm_jax.pipeline import answering, evaluation, judging, seeding, training
from srlm_jax.pipeline.run import Run


def self_reward(run: Run) -> list[str]:
    """Makes M1 ... M`settings.models` and what they need, evaluating each; returns the models' names in order."""
    if run.embedded:
        seeding.make_world(run)
    seeding.split_seed(run)
    own_judgements = run.settings.seed_data.eft is not None
    if own_judgements:
        seeding.take_eft(run)

    training.make_base(run)
    evaluation.evaluate(run, "m0")

    # The SFT baseline: M0 on human answers alone. It judges the ranked answers of the EFT split, unless the user has
    # given judgements.
    training.fine_tune(run, "sft", ["seed/ift.jsonl"], ["seed", "m0/train"])
    evaluation.evaluate(run, "sft")
    if not own_judgements:
        judging.judge_ranked(run)
        judging.make_eft(run)

    # M1: M0, not the baseline, on human answers and on judgements: those that agree with humans, or the user's.
    training.fine_tune(run, "m1", ["seed/ift.jsonl", "eft/examples"], ["seed", "eft/examples", "m0/train"])
    evaluation.evaluate(run, "m1")

    models = ["m0", "sft", "m1"]
    for t in range(2, run.settings.models + 1):
        self_rewarding_round(run, f"m{t}", models[-1])
        evaluation.evaluate(run, f"m{t}")
        models.append(f"m{t}")
    return models


def self_rewarding_round(run: Run, name: str, start: str) -> None:
    """One round: the model `start` writes prompts, answers, judges; DPO on its own preferences gives `name`."""
    answering.create_prompts(run, name, start)
    answering.respond(run, name, start)
    judging.judge_responses(run, name, start)
    if run.embedded:
        evaluation.score_round_by_oracle(run, name)
    judging.make_pairs(run, name)
    training.reference_logprobs(run, name, start)
    training.train_on_preferences(run, name, start)
