"""The stages of the paper, each a function of files to files. `pipeline.iteration` is the order they run in.

A stage's name is a path in the workdir: `m2/pairs` writes the folder of that name.
"""

import collections
import random
import shutil
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from srlm_jax.data import batches, eft, pairs, trees, world, world_corpus
from srlm_jax.data.batches import PairRow, Row
from srlm_jax.evaluate.oracle import oracle_metrics
from srlm_jax.evaluate.reward_metrics import reward_metrics
from srlm_jax.judge import rubric as rubrics
from srlm_jax.judge.score import judge
from srlm_jax.model import llama
from srlm_jax.model.llama import Llama
from srlm_jax.parallel import rules
from srlm_jax.pipeline.generate import stage_key, words_32
from srlm_jax.pipeline.ledger import EmptyStage, Outcome
from srlm_jax.pipeline.run import Run, progress
from srlm_jax.pipeline.settings import BadConfig
from srlm_jax.records import (
    Completion,
    Document,
    Example,
    JudgedPrompt,
    NoVote,
    OracleScores,
    PairDrop,
    PreferencePair,
    Prompt,
    RankedPrompt,
    ReferencePair,
    Request,
    Responses,
    SamplingParams,
)
from srlm_jax.storage import checkpoint, jsonl
from srlm_jax.text import chat, self_instruct
from srlm_jax.text.self_instruct import Candidate, NoveltyPool, Rejection
from srlm_jax.train.loop import train
from srlm_jax.train.objectives import DpoObjective, Objective, SftObjective, response_logprobs

# --- data -------------------------------------------------------------------------------------------------------------


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
        split = trees.split_seed(
            trees.read_trees(run.workdir / "world" / "trees.jsonl"), run.settings.seed_data, run.settings.seed
        )
        for name in ("ift", "eft_train", "eft_eval"):
            jsonl.write(run.workdir / "seed" / f"{name}.jsonl", getattr(split, name))
        return Outcome(split.counts, None)

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


# --- training ---------------------------------------------------------------------------------------------------------


def _train_stage(
    run: Run,
    name: str,
    make: Callable[[], tuple[Llama, Objective, object, dict[str, int]]],
    *,
    part: str,
    inputs: Sequence[str],
) -> None:
    """Trains the model `name` as `make` prepares it (model, objective, batches, counts) and saves it."""
    folder = run.workdir / name

    def work() -> Outcome:
        model, objective, dataset, counts = make()
        model = train(
            model,
            objective,
            dataset,
            config=getattr(run.settings, part).train,
            mesh=run.train_mesh,
            seed=words_32(f"{run.settings.seed}/{name}", 1)[0],
            folder=folder,
            title=f"{name}: training",
        )
        identity = checkpoint.save_model(
            folder / "checkpoint", model, {"config": checkpoint.config_facts(run.settings.model)}
        )
        return Outcome(counts, identity)

    outputs = [f"{name}/{output}" for output in ("checkpoint", "train_state", "metrics.jsonl", "tensorboard")]
    config = run.config(part, "model", "logprob_chunk", "length_multiple", "context_length")
    run.ledger.run(f"{name}/train", work, config=config, inputs=inputs, outputs=outputs)
    # The optimizer's moments are twice the model's size, and done with; only now, for half of them is no train state.
    if jax.process_index() == 0:
        shutil.rmtree(folder / "train_state", ignore_errors=True)


def pretrain(run: Run) -> None:
    """M0: a base model, from the world's corpus."""
    s = run.settings.pretraining

    def make():
        corpus = jsonl.read(run.workdir / "world" / "corpus.jsonl", Document)
        rows = [Row(tuple(chat.encode_document(run.tokenizer, document.text)), 1) for document in corpus]
        shapes = llama.abstract(run.settings.model)
        places = rules.model_shardings(run.train_mesh, rules.TRAIN, shapes)
        init = jax.jit(lambda key: llama.init(run.settings.model, key), out_shardings=places)
        dataset = batches.packed_batches(rows, s.sequence_length, s.train.batch_size, run.settings.seed)
        objective = SftObjective(dropout=s.dropout, logprob_chunk=run.settings.logprob_chunk)
        return init(stage_key(run.settings.seed, "m0/init")), objective, dataset, {"documents": len(rows)}

    _train_stage(run, "m0", make, part="pretraining", inputs=("world",))


def fine_tune(run: Run, name: str, files: Sequence[str], inputs: Sequence[str]) -> None:
    """SFT from M0 on the examples of `files`: the loss on the answer's tokens and the end token (section 2.4)."""
    s = run.settings.sft

    def make():
        examples = [example for file in files for example in jsonl.read(run.workdir / file, Example)]
        rows = [example_row(run, example.prompt, example.response) for example in examples]
        fitting = [row for row in rows if row.length <= run.settings.context_length]
        if not fitting:
            raise EmptyStage(f"{name}: none of {len(rows)} examples fits config.context_length; raise it")
        length = batches.padded_length([row.length for row in fitting], run.settings.length_multiple)
        dataset = batches.padded_batches(fitting, length, s.train.batch_size, run.settings.seed)
        objective = SftObjective(dropout=s.dropout, logprob_chunk=run.settings.logprob_chunk)
        counts = {"examples": len(fitting), "too_many_tokens": len(rows) - len(fitting)}
        return run.load_to_train("m0"), objective, dataset, counts

    _train_stage(run, name, make, part="sft", inputs=inputs)


def example_row(run: Run, prompt: str, response: str) -> Row:
    """Prompt and answer as token ids, the loss on the answer."""
    opening = chat.encode_prompt(run.tokenizer, run.chat, prompt)
    return Row((*opening, *chat.encode_response(run.tokenizer, response)), len(opening))


def train_on_preferences(run: Run, name: str, start: str) -> None:
    """DPO from the model `start`, against its stored log-probabilities (section 2.4)."""
    s = run.settings.dpo

    def make():
        rows = [
            PairRow(
                example_row(run, pair.prompt, pair.chosen),
                example_row(run, pair.prompt, pair.rejected),
                pair.chosen_logprob,
                pair.rejected_logprob,
            )
            for pair in jsonl.read(run.workdir / name / "reference", ReferencePair)
        ]
        lengths = [row.length for pair in rows for row in (pair.chosen, pair.rejected)]
        length = batches.padded_length(lengths, run.settings.length_multiple)
        dataset = batches.pair_batches(rows, length, s.train.batch_size, run.settings.seed)
        objective = DpoObjective(beta=s.beta, dropout=s.dropout, logprob_chunk=run.settings.logprob_chunk)
        return run.load_to_train(start), objective, dataset, {"pairs": len(rows)}

    _train_stage(run, name, make, part="dpo", inputs=(f"{name}/reference", f"{start}/train"))


# --- judging ----------------------------------------------------------------------------------------------------------


def _as_responses(prompt: RankedPrompt) -> Responses:
    completions = tuple(Completion(text=text, tokens=0, finished=True) for text in prompt.responses)
    return Responses(id=prompt.id, prompt=prompt.prompt, completions=completions)


def _judge_all(run: Run, judge_name: str, stage: str, answers: Sequence[Responses], title: str) -> list[JudgedPrompt]:
    generate = run.generate(run.load_to_sample(judge_name), stage)
    votes = run.settings.judging.samples
    return run.in_shards(
        run.workdir / stage,
        answers,
        JudgedPrompt,
        lambda part, report: judge(generate, run.rubric, part, run.settings.judging, report),
        title=title,
        completions=lambda answer: votes * len(answer.completions),
    )


def vote_counts(judged: Sequence[JudgedPrompt]) -> dict[str, int]:
    """How many judgements there are, and how many carry no vote, by reason."""
    votes = [vote for prompt in judged for response in prompt.responses for vote in response.votes]
    counts = collections.Counter(str(vote.no_vote) for vote in votes if vote.no_vote is not None)
    return {"votes": len(votes)} | {str(reason): counts[str(reason)] for reason in NoVote}


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
        ranked = jsonl.read(run.workdir / "seed" / "eft_train.jsonl", RankedPrompt)
        judged = _judge_all(run, "sft", "eft/judgements", [_as_responses(p) for p in ranked], "eft: judging")
        counts = vote_counts(judged)
        _refuse_if_unscored("eft/judgements", "the SFT baseline", counts)
        return Outcome(counts, None)

    run.ledger.run(
        "eft/judgements",
        work,
        config=run.config("judging", "shard_prompts", "engine"),
        inputs=("seed", "sft/train"),
        outputs=("eft/judgements",),
    )


def make_eft(run: Run) -> None:
    """Judgements that agree with the humans -> EFT training examples (section 3.1.1)."""

    def work() -> Outcome:
        made = eft.eft_examples(
            jsonl.read(run.workdir / "seed" / "eft_train.jsonl", RankedPrompt),
            jsonl.read(run.workdir / "eft" / "judgements", JudgedPrompt),
            run.rubric,
            run.settings.eft,
            run.settings.seed,
        )
        if not made.examples:
            raise EmptyStage(
                f"eft/examples: no judgement of the SFT baseline agrees with the human ranking ({made.counts}); "
                "raise config.eft.max_tied_pairs or config.eft.most_common_share, or train the baseline for longer"
            )
        jsonl.write(jsonl.shard(run.workdir / "eft" / "examples", 0), made.examples)
        return Outcome(made.counts, None)

    run.ledger.run(
        "eft/examples", work, config=run.config("eft"), inputs=("seed", "eft/judgements"), outputs=("eft/examples",)
    )


# --- a round ----------------------------------------------------------------------------------------------------------


def _generator(run: Run, current: str) -> tuple[Llama, tuple[str, ...]]:
    """The model that writes new prompts, and the stage it comes from."""
    wanted = run.settings.self_instruction.generator
    if wanted == "current":
        wanted = current
    if (run.workdir / wanted / "checkpoint").exists():
        return run.load_to_sample(wanted), (f"{wanted}/train",)
    if epath.Path(wanted).exists():
        return run.load(epath.Path(wanted), run.sample_mesh, rules.SAMPLE), ()
    raise BadConfig(
        f"config.self_instruction.generator is {wanted!r}: neither 'current', nor a model of {run.workdir}, nor the "
        "folder of a checkpoint"
    )


def create_prompts(run: Run, name: str, start: str) -> None:
    """Self-instruction creation: 8-shot prompting, then Self-Instruct's filters (section 2.2)."""
    s = run.settings.self_instruction
    stage = f"{name}/prompts"

    def work() -> Outcome:
        model, _ = _generator(run, start)
        generate = run.generate(model, stage)
        seeds = [
            example.prompt
            for example in jsonl.read(run.workdir / "seed" / "ift.jsonl", Example)
            if _prompt_tokens(run, example.prompt) <= run.settings.max_prompt_tokens
        ]
        folder = run.workdir / name / "candidates"
        pool, accepted, counts = NoveltyPool(seeds, s.filters.max_rouge_l), [], collections.Counter()
        done = jsonl.shards_done(folder) if folder.exists() else frozenset()
        with progress(f"{name}: new prompts", s.prompts, "prompt") as report:
            for index in range(-(-s.max_candidates // s.batch)):
                path = jsonl.shard(folder, index)
                if index in done:
                    candidates = jsonl.read(path, Candidate)
                    for candidate in candidates:
                        if candidate.rejection is None:
                            pool.admit(candidate.text)
                    tokens = 0
                else:
                    candidates, tokens = _draw_candidates(run, generate, stage, index, seeds, accepted, pool)
                    jsonl.write(path, candidates)
                new = [candidate for candidate in candidates if candidate.rejection is None]
                accepted += [candidate.text for candidate in new]
                counts.update(str(c.rejection) for c in candidates if c.rejection is not None)
                report(min(len(new), s.prompts - len(accepted) + len(new)), tokens)
                if len(accepted) >= s.prompts:
                    break
        if not accepted:
            raise EmptyStage(
                f"{stage}: none of {sum(counts.values())} completions gave a new instruction ({dict(counts)}); look at "
                f"{folder}, then at config.self_instruction.filters"
            )
        accepted = accepted[: s.prompts]
        prompts = [Prompt(id=f"{name}-{i:05}", text=text, origin="self-instruct") for i, text in enumerate(accepted)]
        jsonl.write(jsonl.shard(run.workdir / name / "prompts", 0), prompts)
        return Outcome({"kept": len(prompts)} | {str(r): counts[str(r)] for r in Rejection if counts[str(r)]}, None)

    wanted = s.generator
    inputs = (f"{start if wanted == 'current' else wanted}/train",)
    if run.ledger.entry(inputs[0]) is None:
        inputs = (f"{start}/train",)  # a checkpoint from elsewhere: the order of the run is kept all the same
    run.ledger.run(
        stage,
        work,
        config=run.config("self_instruction", "max_prompt_tokens", "engine"),
        inputs=("seed", *inputs),
        outputs=(f"{name}/prompts", f"{name}/candidates"),
    )


def _prompt_tokens(run: Run, text: str) -> int:
    return len(run.tokenizer.encode(text))


def _draw_candidates(
    run: Run,
    generate,
    stage: str,
    index: int,
    seeds: Sequence[str],
    accepted: Sequence[str],
    pool: NoveltyPool,
) -> tuple[list[Candidate], int]:
    """One batch of completions and what the filters make of them, and how many tokens were sampled."""
    s = run.settings.self_instruction
    requests = []
    for i in range(s.batch):
        identity = f"{stage}/{index}/{i}"
        shown = self_instruct.choose_demonstrations(
            random.Random(f"{run.settings.seed}/{identity}"),
            seeds,
            accepted,
            from_seeds=s.from_seeds,
            from_generated=s.from_generated,
        )
        requests.append(Request(id=identity, prompts=(self_instruct.creation_prompt(shown),), chat=False))
    drawn = generate(requests, s.sampling, lambda finished, tokens: None)
    candidates, tokens = [], 0
    for request, ((completion,),) in zip(requests, drawn, strict=True):
        tokens += completion.tokens
        task = self_instruct.first_task(completion)
        if isinstance(task, Rejection):
            rejection, text = task, completion.text
        else:
            rejection, text = self_instruct.check(task, s.filters), task
            if rejection is None and _prompt_tokens(run, task) > run.settings.max_prompt_tokens:
                rejection = Rejection.TOO_MANY_TOKENS
            if rejection is None:
                rejection = pool.admit(task)
        candidates.append(Candidate(id=request.id, text=text, rejection=rejection))
    return candidates, tokens


def _respond(
    run: Run, model_name: str, stage: str, prompts: Sequence[Prompt], params: SamplingParams, title: str
) -> list[Responses]:
    generate = run.generate(run.load_to_sample(model_name), stage)

    def work(part: Sequence[Prompt], report: Callable[[int, int], None]) -> list[Responses]:
        requests = [Request(id=prompt.id, prompts=(prompt.text,), chat=True) for prompt in part]
        drawn = generate(requests, params, report)
        return [
            Responses(id=prompt.id, prompt=prompt.text, completions=completions)
            for prompt, (completions,) in zip(part, drawn, strict=True)
        ]

    return run.in_shards(
        run.workdir / stage, prompts, Responses, work, title=title, completions=lambda prompt: params.samples
    )


def respond(run: Run, name: str, start: str) -> None:
    """N candidate answers to each new prompt (section 2.2)."""
    stage = f"{name}/responses"

    def work() -> Outcome:
        prompts = jsonl.read(run.workdir / name / "prompts", Prompt)
        answers = _respond(run, start, stage, prompts, run.settings.responses, f"{name}: responses")
        completions = [completion for answer in answers for completion in answer.completions]
        cut = sum(not completion.finished for completion in completions)
        return Outcome({"responses": len(completions), "cut": cut}, None)

    run.ledger.run(
        stage,
        work,
        config=run.config("responses", "shard_prompts", "engine"),
        inputs=(f"{name}/prompts", f"{start}/train"),
        outputs=(stage,),
    )


def judge_responses(run: Run, name: str, start: str) -> None:
    """The model judges its own answers (section 2.2)."""
    stage = f"{name}/judgements"

    def work() -> Outcome:
        answers = jsonl.read(run.workdir / name / "responses", Responses)
        counts = vote_counts(_judge_all(run, start, stage, answers, f"{name}: judging"))
        _refuse_if_unscored(stage, start, counts)
        return Outcome(counts, None)

    run.ledger.run(
        stage,
        work,
        config=run.config("judging", "shard_prompts", "engine"),
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
        jsonl.write(jsonl.shard(run.workdir / name / "pairs", 0), kept)
        return Outcome(counts, None)

    run.ledger.run(
        f"{name}/pairs", work, config=run.config(), inputs=(f"{name}/judgements",), outputs=(f"{name}/pairs",)
    )


_response_logprobs = jax.jit(response_logprobs, static_argnames=("logprob_chunk", "dropout"))


def reference_logprobs(run: Run, name: str, start: str) -> None:
    """What the model that the round starts from gives each answer of each pair, once (section 2.4)."""
    s = run.settings

    def logprobs(model: Llama, rows: Sequence[Row], length: int) -> np.ndarray:
        """In batches of one size; the last is filled up with copies of its first row."""
        sharding = rules.sharding(run.train_mesh, rules.TRAIN, ("batch",))
        found = []
        for first in range(0, len(rows), s.reference_batch):
            part = list(rows[first : first + s.reference_batch])
            batch = batches.token_batch(part + part[:1] * (s.reference_batch - len(part)), length)
            batch = jax.device_put(jax.tree.map(jnp.asarray, batch), sharding)
            found.append(np.asarray(_response_logprobs(model, batch, s.logprob_chunk, None))[: len(part)])
        return np.concatenate(found)

    def work() -> Outcome:
        model = run.load_to_train(start)
        known = jsonl.read(run.workdir / name / "pairs", PreferencePair)
        rows = [example_row(run, pair.prompt, text) for pair in known for text in (pair.chosen, pair.rejected)]
        length = batches.padded_length([row.length for row in rows], s.length_multiple)

        def part_work(part: Sequence[PreferencePair], report: Callable[[int, int], None]) -> list[ReferencePair]:
            rows = [example_row(run, pair.prompt, text) for pair in part for text in (pair.chosen, pair.rejected)]
            found = logprobs(model, rows, length).reshape(-1, 2)
            report(2 * len(part), sum(row.length for row in rows))
            return [
                ReferencePair(
                    id=pair.id,
                    prompt=pair.prompt,
                    chosen=pair.chosen,
                    rejected=pair.rejected,
                    chosen_logprob=float(chosen),
                    rejected_logprob=float(rejected),
                )
                for pair, (chosen, rejected) in zip(part, found, strict=True)
            ]

        run.in_shards(
            run.workdir / name / "reference",
            known,
            ReferencePair,
            part_work,
            title=f"{name}: reference",
            completions=lambda pair: 2,
        )
        return Outcome({"pairs": len(known)}, None)

    run.ledger.run(
        f"{name}/reference",
        work,
        config=run.config("model", "logprob_chunk", "length_multiple", "reference_batch", "shard_prompts"),
        inputs=(f"{name}/pairs", f"{start}/train"),
        outputs=(f"{name}/reference",),
    )


# --- evaluation -------------------------------------------------------------------------------------------------------


def evaluate(run: Run, name: str) -> None:
    """The judge against the humans on the EFT evaluation split, and the oracle's scores of held-out answers."""
    stage, folder = f"{name}/eval", run.workdir / name / "eval"

    def work() -> Outcome:
        ranked = jsonl.read(run.workdir / "seed" / "eft_eval.jsonl", RankedPrompt)
        judged = _judge_all(
            run, name, f"{stage}/judgements", [_as_responses(p) for p in ranked], f"{name}: evaluating the judge"
        )
        held_out = jsonl.read(run.workdir / "world" / "held_out.jsonl", Prompt)
        params = SamplingParams(**{**vars(run.settings.responses), "samples": 1})
        answers = _respond(run, name, f"{stage}/responses", held_out, params, f"{name}: held-out answers")
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
