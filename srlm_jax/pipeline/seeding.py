"""The data a run starts from: the embedded world, the seed split, and whether all prompts will fit."""

from srlm_jax.data import oasst, trees, world_corpus
from srlm_jax.judge import rubric as rubrics
from srlm_jax.pipeline.ledger import Outcome
from srlm_jax.pipeline.run import Run
from srlm_jax.pipeline.settings import BadConfig
from srlm_jax.records import (
    Document,
)
from srlm_jax.storage import jsonl
from srlm_jax.text import chat, self_instruct


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
        jsonl.write(folder / "corpus.jsonl", corpus)
        jsonl.write_documents(folder / "trees.jsonl", grown)
        jsonl.write(folder / "held_out.jsonl", held_out)
        return Outcome({"documents": len(corpus), "trees": len(grown), "held_out": len(held_out)}, None)

    run.ledger.run("world", work, config=run.config("world"), inputs=(), outputs=("world",))


def split_seed(run: Run) -> None:
    """Message trees -> IFT examples, ranked EFT training prompts, ranked EFT evaluation prompts (section 3.1.1)."""

    def work() -> Outcome:
        export = oasst.read_export(run.workdir / "world" / "trees.jsonl")
        split = trees.split_seed(export.trees, run.settings.seed_data, run.settings.seed)
        for name in ("ift", "eft_train", "eft_eval"):
            jsonl.write(run.workdir / "seed" / f"{name}.jsonl", getattr(split, name))
        return Outcome(export.counts | split.counts, None)

    run.ledger.run("seed", work, config=run.config("seed_data"), inputs=("world",), outputs=("seed",))
    check_lengths(run)


def check_lengths(run: Run) -> None:
    """Refuses, before any training, a configuration whose longest judge or 8-shot prompt would not fit the model.

    Raises:
      BadConfig: names the fields whose sum is too large.
    """
    s = run.settings

    def tokens(text: str) -> int:
        return len(chat.encode_prompt(run.tokenizer, run.chat, text))

    frame = tokens(rubrics.fill(run.rubric, "", ""))
    needed = frame + s.max_prompt_tokens + s.responses.max_new_tokens + s.judging.max_new_tokens
    if needed > s.context_length:
        raise BadConfig(
            f"the judge's prompt cannot be held: {frame} tokens of rubric + config.max_prompt_tokens "
            f"{s.max_prompt_tokens} + config.responses.max_new_tokens {s.responses.max_new_tokens} + "
            f"config.judging.max_new_tokens {s.judging.max_new_tokens} = {needed} > config.context_length "
            f"{s.context_length}: lower one or raise the last"
        )
    shots = s.self_instruction.from_seeds + s.self_instruction.from_generated
    frame = len(chat.encode_opening(run.tokenizer, self_instruct.creation_prompt(["x"] * shots)))
    needed = frame + shots * s.max_prompt_tokens + s.self_instruction.sampling.max_new_tokens
    if needed > s.context_length:
        raise BadConfig(
            f"the prompt for new instructions cannot be held: {frame} tokens of frame + {shots} x "
            f"config.max_prompt_tokens {s.max_prompt_tokens} + config.self_instruction.sampling.max_new_tokens "
            f"{s.self_instruction.sampling.max_new_tokens} = {needed} > config.context_length {s.context_length}: "
            "lower one or raise the last"
        )
