"""New prompts, and answers to prompts (paper section 2.2)."""

import collections
import random
from collections.abc import Callable, Sequence

from etils import epath

from srlm_jax.data import sources
from srlm_jax.parallel import hosts
from srlm_jax.pipeline.cut_texts import warn_if_cut
from srlm_jax.pipeline.endpoint import EndpointGenerate
from srlm_jax.pipeline.ledger import EmptyStage, Outcome
from srlm_jax.pipeline.run import Run, draw, naming, needs_all, progress
from srlm_jax.records import (
    Example,
    Generate,
    Prompt,
    RankedPrompt,
    Request,
    Responses,
    SamplingParams,
)
from srlm_jax.storage import jsonl
from srlm_jax.text import self_instruct
from srlm_jax.text.self_instruct import Candidate, NoveltyPool, Rejection


def check_seeds(run: Run) -> None:
    """Refuses human prompts of which too few are short enough to be shown to a model that writes prompts.

    Raises:
      BadConfig: says how many there are.
    """
    s = run.settings
    if s.models > 1 and s.self_instruction.prompts_file is None:
        short = f"config.seed_data: IFT prompts of at most config.max_prompt_tokens ({s.max_prompt_tokens}) tokens:"
        s.check_demonstrations(short, len(set(_seeds(run))))


def _seeds(run: Run) -> list[str]:
    """The human prompts that can be shown."""
    prompts = [example.prompt for example in jsonl.read(run.workdir / "seed" / "ift.jsonl", Example)]
    return [prompt for prompt in prompts if prompt_tokens(run, prompt) <= run.settings.max_prompt_tokens]


def _prompt_writer(run: Run, start: str, stage: str) -> Generate:
    """The source of new prompts: a server, a model of this run, or any other."""
    s = run.settings.self_instruction
    if s.endpoint.url is not None:
        return EndpointGenerate(s.endpoint, "config.self_instruction.endpoint")
    if (own := _own_writer(run, start)) is not None:
        return run.generate(own, stage)
    with naming("config.self_instruction.generator"):
        return run.generate_with(epath.Path(s.generator), stage)


def _own_writer(run: Run, start: str) -> str | None:
    """The model of this run that writes new prompts, None where none does."""
    s = run.settings.self_instruction
    if s.endpoint.url is not None:
        return None
    name = start if s.generator == "current" else s.generator
    return name if (run.workdir / name / "checkpoint").exists() else None


def create_prompts(run: Run, name: str, start: str) -> None:
    """Self-instruction creation: 8-shot prompting, then Self-Instruct's filters (section 2.2); or the user's prompts,
    where there are some."""
    s = run.settings.self_instruction
    stage = f"{name}/prompts"
    if s.prompts_file is not None:
        _take_prompts(run, name)
        return

    def work() -> Outcome:
        generate = _prompt_writer(run, start, stage)
        seeds = _seeds(run)
        folder = run.workdir / name / "candidates"
        pool, accepted, counts = NoveltyPool(seeds, s.filters.max_rouge_l), [], collections.Counter()
        done = jsonl.shards_done(folder)
        hosts.barrier(f"{folder}: looked")
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
                    run.write(path, candidates)
                new = [candidate for candidate in candidates if candidate.rejection is None]
                accepted += [candidate.text for candidate in new]
                counts.update(str(c.rejection) for c in candidates if c.rejection is not None)
                report(min(len(new), s.prompts - len(accepted) + len(new)), tokens)
                if len(accepted) >= s.prompts:
                    break
        if not accepted:
            raise EmptyStage(
                f"{stage}: none of {sum(counts.values())} completions gave a new instruction ({dict(counts)}); look at "
                f"{folder}, then at config.self_instruction.filters, or at its sampling.max_new_tokens where they are "
                "unfinished"
            )
        accepted = accepted[: s.prompts]
        prompts = [Prompt(id=f"{name}-{i:05}", text=text, origin="self-instruct") for i, text in enumerate(accepted)]
        run.write(jsonl.shard(run.workdir / name / "prompts", 0), prompts)
        return Outcome({"kept": len(prompts)} | {str(r): counts[str(r)] for r in Rejection if counts[str(r)]}, None)

    run.ledger.run(
        stage,
        work,
        config=run.config("self_instruction", "max_prompt_tokens", *run.SAMPLING),
        # Of a writer from elsewhere the ledger knows nothing: the order of the run is kept all the same.
        inputs=("seed", f"{_own_writer(run, start) or start}/train"),
        outputs=(f"{name}/prompts", f"{name}/candidates"),
    )


def read_prompts(run: Run) -> tuple[list[Prompt], dict[str, int]]:
    """The prompts of config.self_instruction.prompts_file, and how many rows were dropped, by reason.

    Raises:
      BadConfig: they cannot be read.
    """
    with naming("config.self_instruction.prompts_file"):
        return sources.read_prompts(run.settings.self_instruction.prompts_file, "prompt")


def _take_prompts(run: Run, name: str) -> None:
    """The user's prompts, the same in every round, but for those of the EFT evaluation and those that are too long."""
    stage, source = f"{name}/prompts", run.settings.self_instruction.prompts_file

    def work() -> Outcome:
        given, dropped = read_prompts(run)
        evaluated = jsonl.read(run.workdir / "seed" / "eft_eval.jsonl", RankedPrompt)
        prompts, counts = sources.usable_prompts(given, evaluated)
        fitting = [p for p in prompts if prompt_tokens(run, p.text) <= run.settings.max_prompt_tokens]
        counts |= dropped | {str(Rejection.TOO_MANY_TOKENS): len(prompts) - len(fitting)}
        if not fitting:
            raise EmptyStage(
                f"{stage}: none of the {len(given)} prompts of config.self_instruction.prompts_file can be used "
                f"({counts}); look at config.max_prompt_tokens, or give others"
            )
        run.write(jsonl.shard(run.workdir / name / "prompts", 0), fitting)
        return Outcome({"kept": len(fitting)} | {reason: count for reason, count in counts.items() if count}, None)

    contents = run.contents(self_instruction__prompts_file=source)
    config = run.config("self_instruction.prompts_file", "max_prompt_tokens") | contents
    run.ledger.run(stage, work, config=config, inputs=("seed",), outputs=(f"{name}/prompts",))


def prompt_tokens(run: Run, text: str) -> int:
    """The length that config.max_prompt_tokens bounds."""
    return len(run.tokenizer.encode(text))


def _draw_candidates(
    run: Run,
    generate: Generate,
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
    drawn = draw(generate, requests, s.sampling)
    candidates, tokens = [], 0
    for request, ((completion,),) in zip(requests, drawn, strict=True):
        tokens += completion.tokens
        task = self_instruct.first_task(completion)
        if isinstance(task, Rejection):
            rejection, text = task, completion.text
        else:
            rejection, text = self_instruct.check(task, s.filters), task
            if rejection is None and prompt_tokens(run, task) > run.settings.max_prompt_tokens:
                rejection = Rejection.TOO_MANY_TOKENS
            if rejection is None:
                rejection = pool.admit(task)
        candidates.append(Candidate(id=request.id, text=text, rejection=rejection))
    return candidates, tokens


def draw_answers(
    run: Run, model_name: str, stage: str, prompts: Sequence[Prompt], params: SamplingParams, title: str
) -> list[Responses]:
    """Answers of a model to each prompt, as shards in the folder of `stage`; see `Run.in_shards`."""
    generate = run.generate(model_name, stage)

    def work(part: Sequence[Prompt], report: Callable[[int, int], None]) -> list[Responses]:
        requests = [Request(id=prompt.id, prompts=(prompt.text,), chat=True) for prompt in part]
        drawn = generate(requests, params, report)
        return [
            Responses(id=prompt.id, prompt=prompt.text, completions=completions)
            for prompt, (completions,) in zip(part, drawn, strict=True)
        ]

    return run.in_shards(
        run.workdir / stage,
        prompts,
        Responses,
        work,
        title=title,
        completions=lambda prompt: params.samples,
        together=needs_all(generate),
    )


def respond(run: Run, name: str, start: str) -> None:
    """N candidate answers to each new prompt (section 2.2)."""
    stage = f"{name}/responses"

    def work() -> Outcome:
        prompts = jsonl.read(run.workdir / name / "prompts", Prompt)
        answers = draw_answers(run, start, stage, prompts, run.settings.responses, f"{name}: responses")
        completions = [completion for answer in answers for completion in answer.completions]
        cut = sum(not completion.finished for completion in completions)
        warn_if_cut(stage, "answers", cut, len(completions), "config.responses.max_new_tokens")
        return Outcome({"responses": len(completions), "cut": cut}, None)

    run.ledger.run(
        stage,
        work,
        config=run.config("responses", *run.SAMPLING),
        inputs=(f"{name}/prompts", f"{start}/train"),
        outputs=(stage,),
    )
