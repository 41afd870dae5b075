"""The data a run starts from: the embedded world and the seed split."""

import dataclasses

from srlm_jax.data import judging_examples, oasst, sources, trees, world_corpus
from srlm_jax.data.judging_examples import JudgingExample
from srlm_jax.data.trees import SeedRules, SeedSplit
from srlm_jax.parallel import hosts
from srlm_jax.pipeline import answering, judging
from srlm_jax.pipeline.ledger import EmptyStage, Outcome
from srlm_jax.pipeline.run import Run, naming
from srlm_jax.records import Document, RankedPrompt
from srlm_jax.storage import jsonl


def make_world(run: Run) -> None:
    """The embedded world's base corpus, human-ranked message trees and held-out prompts."""

    def work() -> Outcome:
        rules_, seed, folder = run.settings.world, run.settings.seed, run.workdir / "world"
        corpus = [
            Document(id=f"document-{i:06}", text=text) for i, text in enumerate(world_corpus.draw_corpus(rules_, seed))
        ]
        grown = list(world_corpus.draw_trees(rules_, seed))
        seen = {tree["prompt"]["text"] for tree in grown}
        held_out = world_corpus.draw_held_out(rules_, seed, seen)
        run.write(folder / "corpus.jsonl", corpus)
        if hosts.is_main():
            jsonl.write_documents(folder / "trees.jsonl", grown)
        run.write(folder / "held_out.jsonl", held_out)
        return Outcome({"documents": len(corpus), "trees": len(grown), "held_out": len(held_out)}, None)

    run.ledger.run("world", work, config=run.config("world"), inputs=(), outputs=("world",))


def split_seed(run: Run) -> None:
    """The IFT examples and the ranked EFT prompts for training and evaluation (section 3.1.1): from message trees, the
    world's or Open Assistant's, or as the user has divided them.

    Raises:
      BadConfig: as `read_seed`; or too few IFT prompts are short enough to be shown to a model that writes prompts.
      EmptyStage: no human-ranked answer could be judged.
    """
    s = run.settings.seed_data

    def work() -> Outcome:
        split, counts = read_seed(run)
        for name in ("ift", "eft_train", "eft_eval"):
            run.write(run.workdir / "seed" / f"{name}.jsonl", getattr(split, name))
        return Outcome(counts | split.counts, None)

    own = s.trees is not None or s.ift is not None
    run.ledger.run(
        "seed",
        work,
        config=seed_config(run),
        inputs=() if own else ("world",),
        outputs=("seed",),
    )
    # What would stop the run hours later.
    answering.check_seeds(run)
    for name in ("eft_train", "eft_eval"):
        judging.ranked_prompts(run, name)


def seed_config(run: Run) -> dict[str, object]:
    """What the seed data depend on: the sources' names and contents, and the rules by which trees are divided."""
    s = run.settings.seed_data
    config = run.config(*(f"seed_data.{name}" for name in ("trees", "ift", "eft_train", "eft_eval", "rules")))
    config["config.seed_data.rules.eft_train_prompts"] = _rules(run).eft_train_prompts
    return config | run.contents(
        seed_data__trees=s.trees,
        seed_data__ift=s.ift,
        seed_data__eft_train=s.eft_train,
        seed_data__eft_eval=s.eft_eval,
    )


def _rules(run: Run) -> SeedRules:
    """How trees are divided: as configured, and none are for training the judge where the user has examples of it."""
    s = run.settings.seed_data
    return s.rules if s.eft_file is None else dataclasses.replace(s.rules, eft_train_prompts=0)


def read_seed(run: Run) -> tuple[SeedSplit, dict[str, int]]:
    """The seed data from where the configuration says that they are, and the counts of what was read and dropped.

    Raises:
      BadConfig: a source cannot be read or used, with the name of its field.
    """
    s = run.settings.seed_data
    if s.ift is not None:
        split, counts = _own_split(run)
        run.settings.check_demonstrations("config.seed_data.ift: examples that can be used:", len(split.ift))
        return split, counts
    with naming("config.seed_data.trees"):
        export = oasst.read_export(s.trees or run.workdir / "world" / "trees.jsonl")
    with naming("config.seed_data.rules"):
        return trees.split_seed(export.trees, _rules(run), run.settings.seed), export.counts


def read_judging_examples(run: Run) -> tuple[list[JudgingExample], dict[str, int]]:
    """The judging examples that the configuration names, from the user's source or from the seed's ranks, and how many
    rows or prompts were dropped, by reason.

    Raises:
      BadConfig: they cannot be read or used, with the name of the field.
    """
    if run.settings.seed_data.eft_file is None:
        ranked, too_long = judging.ranked_prompts(run, "eft_train")
        made = judging_examples.from_ranks(ranked, f"Score: {judging_examples.SCORE}")
        return made, {"prompts_with_too_many_tokens": too_long}
    with naming("config.seed_data.eft"):
        return sources.read_judging_examples(run.settings.seed_data.eft)


def take_eft(run: Run) -> None:
    """Judging examples of the user's own, or from human ranks -> EFT training examples, in place of the SFT baseline's
    judgements."""
    s = run.settings.seed_data
    fields = ("seed_data.eft",)
    if s.eft_file is None:  # ranked answers that do not fit the context with the judge's prompt are left out
        fields += ("context_length", "judging.max_new_tokens", "judging.prefix", "chat", "chat_system")

    def work() -> Outcome:
        ranked = jsonl.read(run.workdir / "seed" / "eft_eval.jsonl", RankedPrompt)
        judged, dropped = read_judging_examples(run)
        made = judging_examples.filled_examples(judged, ranked, run.rubric)
        if not made.examples:
            raise EmptyStage(
                f"eft/examples: all prompts of config.seed_data.eft are in the evaluation ({made.counts}): they cannot "
                "be trained on as well; give examples with other prompts"
            )
        run.write(jsonl.shard(run.workdir / "eft" / "examples", 0), made.examples)
        return Outcome(made.counts | dropped, None)

    run.ledger.run(
        "eft/examples",
        work,
        config=run.config(*fields) | judging.rubric_content(run) | run.contents(seed_data__eft=s.eft_file),
        inputs=("seed",),
        outputs=("eft/examples",),
    )


def _own_split(run: Run) -> tuple[SeedSplit, dict[str, int]]:
    """The seed data from the user's three sources, and how many rows of each were dropped, by reason."""
    s, found, counts = run.settings.seed_data, {}, {}
    for name, read in (
        ("ift", sources.read_examples),
        ("eft_train", sources.read_ranked),
        ("eft_eval", sources.read_ranked),
    ):
        if name == "eft_train" and s.eft_file is not None:
            found[name] = []
            continue
        with naming(f"config.seed_data.{name}"):
            found[name], dropped = read(getattr(s, name), name.replace("_", "-"))
        counts |= {f"{name}_{reason}": count for reason, count in dropped.items()}
    with naming("config.seed_data"):
        return sources.without_overlap(**found), counts
