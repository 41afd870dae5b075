"""How often each program of an iteration runs, and how long that takes at the least."""

import dataclasses
from collections.abc import Mapping

from srlm_jax.pipeline.settings import Settings
from srlm_jax.plan import programs
from srlm_jax.plan.chips import Slice
from srlm_jax.plan.formulas import Cost
from srlm_jax.plan.programs import ANSWER, ANSWERED, EXAMPLE, PACKED

# Mean lengths in tokens, where a program's own length is only the most it may be: assumptions, stated in the output.
JUDGEMENT, NEW_PROMPT = 150, 60
COMPLETIONS_PER_PROMPT = 1.2  # of self-instruction, for one that the filters accept
PAIRS_PER_PROMPT = 0.75  # whose answers the judge does not score alike
RANKED_ANSWERS = 2.85  # of a human-ranked prompt (section 3.1.1)


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds that each part of a chip needs for one run of a program; the slowest is how long it takes at least."""

    compute_s: float
    memory_s: float
    links_s: float

    @property
    def seconds(self) -> float:
        return max(self.compute_s, self.memory_s, self.links_s)

    @property
    def bound(self) -> str:
        """Which part that is."""
        times = {"compute": self.compute_s, "HBM": self.memory_s, "ICI": self.links_s}
        return max(times, key=times.get)


def roofline(cost: Cost, link_bytes: float, where: Slice) -> Roofline:
    """`cost` on one chip of the slice, with what the links carry as the compiled program says, or the formula."""
    links = link_bytes / where.link_bandwidth if link_bytes else 0.0
    return Roofline(cost.flops / where.chip.flops, cost.memory_bytes / where.chip.bandwidth, links)


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage of the iteration: how often it runs which program."""

    name: str
    runs: Mapping[str, float]


def stages(s: Settings, data: int) -> list[Stage]:
    """What a run to M`models` does last: from its data M1 where that is 1, else one self-rewarding round.

    Decoding is counted as if slots were always full: rows that end are replaced.
    """
    shapes = programs.sampling_shapes(s, data)

    def sampling(stage: str, groups: float, tokens: float, length: int) -> dict[str, float]:
        shape, room = shapes[stage], shapes[stage].room
        completions = groups * room.prompts * room.samples
        calls = completions * min(tokens, length) / (room.rows * s.engine.steps)
        return {f"prefill, {stage}": groups / shape.at_once, f"decode, {stage}": calls}

    judged = s.seed_data.rules.eft_train_prompts if s.seed_data.eft is None else 0
    ranked = judged * RANKED_ANSWERS / s.responses.samples
    evaluated = s.seed_data.rules.eft_eval_prompts * RANKED_ANSWERS / s.responses.samples
    evaluation = Stage("evaluation", sampling("judgements", evaluated, JUDGEMENT, s.judging.max_new_tokens))
    if s.models == 1:
        judging = Stage("EFT judgements", sampling("judgements", ranked, JUDGEMENT, s.judging.max_new_tokens))
        return [
            Stage("SFT baseline", {"SFT step": s.sft.train.steps, "reshard": 1}),
            *([judging] if ranked else []),
            Stage("SFT of M1", {"SFT step": s.sft.train.steps, "reshard": 1}),
            evaluation,
        ]
    written = s.self_instruction.prompts_file is None and s.self_instruction.endpoint.url is None
    prompts = s.self_instruction.prompts
    found = []
    if written:
        # One completion of a prompt of eight tasks: as a response to an instruction, in the same program's cost a row.
        groups = prompts * COMPLETIONS_PER_PROMPT / s.responses.samples
        found.append(
            Stage("new prompts", sampling("responses", groups, NEW_PROMPT, s.self_instruction.sampling.max_new_tokens))
        )
    answers = 2 * prompts * PAIRS_PER_PROMPT
    rows = programs.packed_rows(s, answers, ANSWERED) if s.packed else answers
    judging = Stage("judgements", sampling("judgements", prompts, JUDGEMENT, s.judging.max_new_tokens))
    return [
        *found,
        Stage("responses", sampling("responses", prompts, ANSWER, s.responses.max_new_tokens)),
        *([judging] if s.judging.endpoint.url is None else []),
        Stage("reference", {"reference": rows / s.reference_batch}),
        Stage("DPO", {"DPO step": s.dpo.train.steps, "reshard": 1}),
        evaluation,
    ]


def assumptions(s: Settings, data: int) -> list[str]:
    """What the times rest on besides the data sheet, a sentence each."""
    shapes = programs.sampling_shapes(s, data)
    found = [
        f"an answer has {ANSWER} tokens on average and a judgement {JUDGEMENT}, or the most that may be drawn",
        f"every row of a training has {programs.row_length(s)} positions (config.context_length), "
        + (
            f"which examples of {EXAMPLE} tokens in SFT and answers of {ANSWERED} in DPO, prompts included, fill but "
            f"for {1 - 1 / PACKED:.0%} (config.packed)"
            if s.packed
            else "and holds one example"
        ),
        "every chip runs at its data sheet's peak in what bounds it: real programs take longer",
        "the slots of the engine are always full: " + "; ".join(
            f"{stage} {shape.room.rows} rows" for stage, shape in shapes.items()
        ),
    ]  # fmt: skip
    if s.models > 1:
        found += [
            f"{s.self_instruction.prompts} prompts, {PAIRS_PER_PROMPT:.0%} of which give a pair",
            f"new prompts are written by a model of this size, {COMPLETIONS_PER_PROMPT} completions of {NEW_PROMPT} "
            "tokens each; reading their eight examples is counted as an instruction",
        ]
    return found


def seconds(stage: Stage, times: Mapping[str, Roofline]) -> float:
    """How long a stage takes at least."""
    return sum(count * times[name].seconds for name, count in stage.runs.items())


def iteration_seconds(s: Settings, data: int, times: Mapping[str, Roofline]) -> float:
    """How long the iteration takes at least."""
    return sum(seconds(stage, times) for stage in stages(s, data))
