"""The stages that make models: M0 from a folder or by pretraining, the baseline and M1 by SFT, M2 and M3 by DPO; and
the reference log-probabilities that DPO needs."""

import shutil
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from etils import epath

from srlm_jax.data import batches
from srlm_jax.data.batches import PairRow, Row, TokenBatch
from srlm_jax.data.packing import Packing, Shape, pack
from srlm_jax.model import config_files, folders, llama, weights
from srlm_jax.model.llama import Llama
from srlm_jax.parallel import hosts, rules
from srlm_jax.pipeline.generate import stage_key, words_32
from srlm_jax.pipeline.ledger import EmptyStage, Outcome
from srlm_jax.pipeline.run import Run, naming
from srlm_jax.pipeline.settings import Settings
from srlm_jax.records import (
    Document,
    Example,
    PreferencePair,
    ReferencePair,
)
from srlm_jax.sampling import engine
from srlm_jax.storage import checkpoint, jsonl
from srlm_jax.text import chat, templates
from srlm_jax.train.first_step import FirstStep
from srlm_jax.train.loop import TrainConfig, train
from srlm_jax.train.objectives import DpoObjective, Objective, SftObjective, compiled_logprobs

PairIds = tuple[tuple[int, ...], tuple[int, ...]]  # the token ids of a pair's two documents


def _train_stage(
    run: Run,
    name: str,
    make: Callable[[], tuple[Llama, Objective, object, dict[str, int], dict[PairIds, str]]],
    *,
    part: str,
    inputs: Sequence[str],
) -> None:
    """Trains the model `name` as `make` prepares it (model, objective, batches, counts, ids of pairs) and saves it."""
    folder = run.workdir / name
    # The embedded world's M0 starts from random weights: there is nothing to adapt.
    lora = None if part == "pretraining" or run.settings.lora.rank is None else run.settings.lora

    def work() -> Outcome:
        model, objective, dataset, counts, names = make()
        config = getattr(run.settings, part).train
        groups = run.train_mesh.shape["data"] * run.train_mesh.shape["fsdp"]
        first = FirstStep(
            tolerance=config.first_loss_tolerance,
            accumulate=config.accumulate,
            rows=-(-config.batch_size // config.accumulate // groups) * groups,
            logprob_chunk=run.settings.logprob_chunk,
            names=names,
        )
        model = train(
            model,
            objective,
            dataset,
            config=config,
            lora=lora,
            mesh=run.train_mesh,
            seed=words_32(f"{run.settings.seed}/{name}", 1)[0],
            folder=folder,
            title=f"{name}: training",
            first=first,
        )
        identity = _save(run, name, model)
        checked = jsonl.read_json(folder / "first_step.json")
        counts |= {"first_loss": round(checked["loss"], 6), "expected_first_loss": round(checked["expected"], 6)}
        run.keep(name, model)
        return Outcome(counts, identity)

    outputs = [
        f"{name}/{output}"
        for output in ("checkpoint", "train_state", "metrics.jsonl", "first_step.json", "tensorboard")
    ]
    fields = (part, "model", "chat", "chat_system", "logprob_chunk", "length_multiple", "context_length", "packed")
    config = run.config(*fields, *(() if lora is None else ("lora",)))
    del config[f"config.{part}.train.first_loss_tolerance"]  # it stops a training, and changes none
    run.ledger.run(f"{name}/train", work, config=config, inputs=inputs, outputs=outputs)
    # The optimizer's moments take twice the model's size and are not needed any more. They are deleted only after the
    # stage is recorded: a half-deleted train state cannot resume.
    if hosts.is_main():
        shutil.rmtree(folder / "train_state", ignore_errors=True)


def _save(run: Run, name: str, model: Llama) -> str:
    """The model's checkpoint, with all that other commands need beside the weights; returns their hash."""
    folder = run.workdir / name / "checkpoint"
    folder.mkdir(parents=True, exist_ok=True)
    if hosts.is_main():
        if not run.embedded:
            folders.copy_companions(epath.Path(run.settings.model.path), folder)
        if name == "m0":  # as it came: nothing is trained in a chat format yet
            run.tokenizer.save(folder)
        else:
            templates.save_tokenizer(folder, run.tokenizer, run.chat)
    facts = {"config": checkpoint.config_facts(run.settings.model.llama)}
    if not run.embedded:
        facts["hf"] = config_files.hf_fields(epath.Path(run.settings.model.path))
    return checkpoint.save_model(folder, model, facts)


def make_base(run: Run) -> None:
    """M0: the base model, which knows neither instructions nor how to judge (section 2)."""
    if run.embedded:
        _pretrain(run)
    else:
        _take_base(run)


def _take_base(run: Run) -> None:
    """M0 from its folder, in the type that is trained in: later stages read the run's own copy."""
    path = epath.Path(run.settings.model.path)

    def work() -> Outcome:
        config = run.settings.model.llama
        places = rules.model_shardings(run.train_mesh, rules.TRAIN, llama.abstract(config))
        with naming("config.model.path"):
            model = weights.load(path, config, places)
        identity = _save(run, "m0", model)
        run.keep("m0", model)
        return Outcome({"parameters": config.parameters}, identity)

    run.ledger.run("m0/train", work, config=run.config("model"), inputs=(), outputs=("m0/checkpoint",))


def _pretrain(run: Run) -> None:
    """M0 from the world's corpus."""
    s = run.settings.pretraining

    def make():
        corpus = jsonl.read(run.workdir / "world" / "corpus.jsonl", Document)
        rows = [Row(tuple(chat.encode_document(run.tokenizer, document.text)), 1) for document in corpus]
        model = run.settings.model.llama
        places = rules.model_shardings(run.train_mesh, rules.TRAIN, llama.abstract(model))
        init = jax.jit(lambda key: llama.init(model, key), out_shardings=places)
        dataset = batches.filled_batches(rows, s.sequence_length, s.train.batch_size, run.settings.seed)
        objective = SftObjective(dropout=s.dropout, logprob_chunk=run.settings.logprob_chunk)
        return init(stage_key(run.settings.seed, "m0/init")), objective, dataset, {"documents": len(rows)}, {}

    _train_stage(run, "m0", make, part="pretraining", inputs=("world",))


def fine_tune(run: Run, name: str, files: Sequence[str], inputs: Sequence[str]) -> None:
    """SFT from M0 on the examples of `files`: the loss on the answer's tokens and the end token (section 2.4)."""
    s = run.settings.sft

    def make():
        examples = [example for file in files for example in jsonl.read(run.workdir / file, Example)]
        rows = [example_row(run, example.prompt, example.response, example.finished) for example in examples]
        fitting = [row for row in rows if row.length <= run.settings.context_length]
        if not fitting:
            raise EmptyStage(f"{name}: none of {len(rows)} examples fits config.context_length; raise it")
        counts = {"examples": len(fitting), "too_many_tokens": len(rows) - len(fitting)}
        if run.settings.packed:
            fitting = _enough(fitting, s.train.batch_size)
            packing = _packing(run, s.train, [[row.length] for row in fitting])
            dataset = batches.packed_batches(fitting, packing, s.train.steps)
        else:
            length = batches.padded_length([row.length for row in fitting], run.settings.length_multiple)
            dataset = batches.padded_batches(fitting, length, s.train.batch_size, run.settings.seed)
        objective = SftObjective(dropout=s.dropout, logprob_chunk=run.settings.logprob_chunk)
        return run.give_away("m0"), objective, dataset, counts, {}

    _train_stage(run, name, make, part="sft", inputs=inputs)


def _enough(examples: list, batch_size: int) -> list:
    """The examples as often as it takes for a batch."""
    return examples * -(-batch_size // len(examples))


def _packing(run: Run, config: TrainConfig, lengths: Sequence[Sequence[int]]) -> Packing:
    s = run.settings
    return Packing(
        lengths=np.asarray(lengths),
        batch_size=config.batch_size,
        accumulate=config.accumulate,
        most=s.context_length,
        length_multiple=s.length_multiple,
        rows_multiple=run.train_mesh.shape["data"] * run.train_mesh.shape["fsdp"],
        seed=s.seed,
    )


def example_row(run: Run, prompt: str, response: str, finished: bool) -> Row:
    """Prompt and answer as token ids, the loss on the answer; without an end token where the answer was cut."""
    opening = chat.encode_prompt(run.tokenizer, run.chat, prompt)
    return Row((*opening, *chat.encode_response(run.tokenizer, run.chat, response, finished)), len(opening))


def _pair_row(run: Run, pair: PreferencePair | ReferencePair, reference: tuple[float, float]) -> PairRow:
    answers = ((pair.chosen, pair.chosen_finished), (pair.rejected, pair.rejected_finished))
    return PairRow(*(example_row(run, pair.prompt, *answer) for answer in answers), *reference)


def _reference_batches(
    s: Settings, shards: Sequence[Sequence[PairRow]]
) -> tuple[Callable[[Sequence[PairRow]], Iterator[TokenBatch]], int]:
    """How batches of a shard are made, all of one shape, and how many documents each may name: of n pairs the chosen
    answers from 1, the rejected ones from 1 + n."""
    pairs, size = [pair for shard in shards for pair in shard], s.reference_batch
    longest = lambda lengths: batches.padded_length(lengths, s.length_multiple)
    length = longest([row.length for row in batches.documents(pairs)])

    def padded(shard: Sequence[PairRow]) -> Iterator[TokenBatch]:
        rows = batches.documents(shard)
        rows += rows[:1] * (-len(rows) % size)
        return (batches.token_batch(rows[i : i + size], length) for i in range(0, len(rows), size))

    def packed(shard: Sequence[PairRow]) -> Iterator[TokenBatch]:
        rows = batches.documents(shard)
        groups = pack([row.length for row in rows], length)
        shape = Shape(size, length)
        return (batches.packed_batch(rows, groups[i : i + size], shape) for i in range(0, len(groups), size))

    if not s.packed:
        return padded, size
    if not batches.worth_folding(pairs):
        return packed, 2 * s.shard_prompts
    lengths = lambda shard: [pair.folded_length for pair in shard]
    # In buckets, so that the next round's pairs find the program compiled.
    shape = Shape(size, longest([engine.bucket(max(lengths(pairs)))]))
    rows = [[shard[i] for i in group] for shard in shards for group in pack(lengths(shard), shape.length)]
    unfolded = longest([engine.bucket(batches.unfolded_length(rows, s.length_multiple))])

    def folded(shard: Sequence[PairRow]) -> Iterator[TokenBatch]:
        groups = pack(lengths(shard), shape.length)
        return (batches.folded_batch(shard, groups[i : i + size], shape, unfolded) for i in range(0, len(groups), size))

    return folded, 2 * s.shard_prompts


def reference_logprobs(run: Run, name: str, start: str) -> None:
    """What the model that the round starts from gives each answer of each pair, once (section 2.4)."""
    s = run.settings

    def work() -> Outcome:
        model = run.to_train(start)
        pairs = jsonl.read(run.workdir / name / "pairs", PreferencePair)
        known = [(pair, _pair_row(run, pair, (0.0, 0.0))) for pair in pairs]
        rows = [row for _, row in known]
        shards = [rows[i : i + s.shard_prompts] for i in range(0, len(rows), s.shard_prompts)]
        made, documents = _reference_batches(s, shards)
        place = rules.sharding(run.train_mesh, rules.TRAIN, ("batch",))

        def logprobs(shard: Sequence[PairRow]) -> np.ndarray:
            """Of each pair's answers, [pairs, 2]."""
            with jax.set_mesh(run.train_mesh):
                found = hosts.fetch(
                    [
                        compiled_logprobs(model, hosts.spread(batch, place), documents, s.logprob_chunk)
                        for batch in made(shard)
                    ]
                )
            # Packed, each document is in one of the batches, and the others give 0 for it.
            found = np.sum(found, axis=0) if s.packed else np.concatenate(found)
            return found[: 2 * len(shard)].reshape(2, -1).T

        def part_work(
            part: Sequence[tuple[PreferencePair, PairRow]], report: Callable[[int, int], None]
        ) -> list[ReferencePair]:
            rows = [row for _, row in part]
            found = logprobs(rows)
            report(2 * len(part), sum(row.length for row in rows))
            return [
                ReferencePair(
                    id=pair.id,
                    prompt=pair.prompt,
                    chosen=pair.chosen,
                    rejected=pair.rejected,
                    chosen_finished=pair.chosen_finished,
                    rejected_finished=pair.rejected_finished,
                    chosen_logprob=float(chosen),
                    rejected_logprob=float(rejected),
                )
                for (pair, _), (chosen, rejected) in zip(part, found, strict=True)
            ]

        run.in_shards(
            run.workdir / name / "reference",
            known,
            ReferencePair,
            part_work,
            title=f"{name}: reference",
            completions=lambda pair: 2,
            together=True,
        )
        return Outcome({"pairs": len(known)}, None)

    run.ledger.run(
        f"{name}/reference",
        work,
        config=run.config(
            "model",
            "chat",
            "chat_system",
            "logprob_chunk",
            "length_multiple",
            "packed",
            "reference_batch",
            "shard_prompts",
        ),
        inputs=(f"{name}/pairs", f"{start}/train"),
        outputs=(f"{name}/reference",),
    )


def train_on_preferences(run: Run, name: str, start: str) -> None:
    """DPO from the model `start`, against its stored log-probabilities (section 2.4)."""
    s = run.settings.dpo

    def make():
        pairs = jsonl.read(run.workdir / name / "reference", ReferencePair)
        rows = [_pair_row(run, pair, (pair.chosen_logprob, pair.rejected_logprob)) for pair in pairs]
        names = {(row.chosen.ids, row.rejected.ids): pair.id for row, pair in zip(rows, pairs, strict=True)}
        counts = {"pairs": len(rows)}
        if run.settings.packed:
            rows = _enough(rows, s.train.batch_size)
            packing = _packing(run, s.train, [[pair.chosen.length, pair.rejected.length] for pair in rows])
            dataset = batches.packed_pairs(rows, packing, s.train.steps)
        else:
            lengths = [row.length for row in batches.documents(rows)]
            length = batches.padded_length(lengths, run.settings.length_multiple)
            dataset = batches.padded_pairs(rows, length, s.train.batch_size, run.settings.seed)
        objective = DpoObjective(beta=s.beta, logprob_chunk=run.settings.logprob_chunk)
        return run.give_away(start), objective, dataset, counts, names

    _train_stage(run, name, make, part="dpo", inputs=(f"{name}/reference", f"{start}/train"))
