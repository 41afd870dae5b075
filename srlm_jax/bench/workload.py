"""What is measured: models by shape, and fixed lists of token ids with a fixed number of tokens to write for each row.

Everything is drawn from one seed, so that all sides of a comparison have the same work, in every run.
"""

import dataclasses
import hashlib
import math
from collections.abc import Callable

import numpy as np

from srlm_jax.data.batches import Row
from srlm_jax.model.config import PRESETS, LlamaConfig

Ids = tuple[int, ...]

END = 2  # the end token of Llama 2's vocabulary, and of every list here that is trained on
_FIRST = 3  # the first id that is no mark of the beginning, the end or the like


def llama_110m() -> LlamaConfig:
    """A Llama of Llama 2's proportions: 134,105,856 parameters, 110 million but for the embedding."""
    return LlamaConfig(
        V=32_000, D=768, L=12, N=12, K=12, H=64, F=2048, rope_theta=10_000.0, rope_scaling=None, norm_eps=1e-5,
        tied=False, param_dtype="float32", compute_dtype="float32", remat="dots",
    )  # fmt: skip


SHAPES: dict[str, Callable[[], LlamaConfig]] = {
    "tiny": PRESETS["tiny"],
    "110m": llama_110m,
    "1b": PRESETS["tinyllama_1b"],
    "7b": PRESETS["llama2_7b"],
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """How much there is of everything. Lengths are in tokens; those with `mean` are drawn for each row."""

    prompts: int  # instructions
    samples: int  # answers to each
    votes: int  # judgements of each answer
    instruction: int
    response_mean: int
    judgement_mean: int
    before: int  # of the judge's template, before the instruction
    behind: int  # and behind the answer
    spread: int  # of lengths about their mean: a lognormal's sigma in hundredths; 0: all are as long as the mean
    rows: int  # sampled at once
    steps: int  # decoding steps between two looks of the host
    batch: int  # rows of SFT, or pairs of DPO, of one update
    updates: int  # in one measurement
    seed: int

    def times(self, factor: int, training: bool) -> "Workload":
        """So many times the work: updates where it is `training`, instructions elsewhere."""
        if training:
            return dataclasses.replace(self, updates=factor * self.updates)
        return dataclasses.replace(self, prompts=factor * self.prompts)


# What stands around an instruction and an answer is the paper's judge prompt in Llama 2's tokens. On an accelerator the
# lengths are the paper's too; on a CPU answers and judgements are shorter, so that a measurement takes minutes.
CPU = Workload(
    prompts=16, samples=4, votes=3, instruction=64, response_mean=64, judgement_mean=32, before=272, behind=97,
    spread=70, rows=32, steps=8, batch=4, updates=2, seed=0,
)  # fmt: skip
ACCELERATOR = dataclasses.replace(
    CPU, prompts=32, instruction=80, response_mean=400, judgement_mean=150, rows=64, steps=16, batch=16, updates=4
)


def default(command: str, *, cpu: bool) -> Workload:
    """What a command measures unless told otherwise. An instruction is twelve judgements, so `judge` and `iteration`
    have fewer instructions."""
    w = CPU if cpu else ACCELERATOR
    if command == "decode" and cpu:  # four times as many rows as are written at once, or their last ones are most of it
        return dataclasses.replace(w, prompts=2 * w.prompts, response_mean=w.response_mean // 2)
    if command not in ("judge", "prefill", "iteration"):
        return w
    return dataclasses.replace(w, prompts=w.prompts // (4 if cpu else 2))


@dataclasses.dataclass(frozen=True)
class Tree:
    """Prompts to sample, in groups that share their beginning, and the tokens that each row is to write.

    `prompts[g][p]` are the ids of prompt p of group g, `limits[g][p][c]` the length of its sample c.
    """

    prompts: tuple[tuple[Ids, ...], ...]
    limits: tuple[tuple[tuple[int, ...], ...], ...]

    @property
    def samples(self) -> int:
        return len(self.limits[0][0])

    @property
    def rows(self) -> list[tuple[Ids, int]]:
        """Every row: its prompt, and how many tokens it is to write."""
        return [
            (prompt, limit)
            for prompts, limits in zip(self.prompts, self.limits, strict=True)
            for prompt, of_prompt in zip(prompts, limits, strict=True)
            for limit in of_prompt
        ]

    @property
    def tokens(self) -> int:
        """Tokens to write: what counts as useful."""
        return sum(limit for _, limit in self.rows)

    @property
    def longest(self) -> int:
        """The most tokens that a row is to write."""
        return max(limit for _, limit in self.rows)

    def read_only(self) -> "Tree":
        """The same prompts, of which one token is written each: all that is left is reading."""
        return Tree(self.prompts, tuple(tuple((1,) * len(row) for row in group) for group in self.limits))

    def unshared(self) -> "Tree":
        """Every row as a prompt of its own, its first token another than its neighbours', so that nothing is shared."""
        rows = [((_FIRST + i % 32, *prompt[1:]), limit) for i, (prompt, limit) in enumerate(self.rows)]
        return Tree(tuple((prompt,) for prompt, _ in rows), tuple(((limit,),) for _, limit in rows))


@dataclasses.dataclass(frozen=True)
class Pair:
    """A preference pair as token ids; both answers end with the end token."""

    prompt: Ids
    chosen: Ids
    rejected: Ids


def lengths(count: int, mean: int, spread: int, rng: np.random.Generator) -> list[int]:
    """Lognormal lengths of about this mean and of `Workload.spread`, none more than two and a half times as long."""
    sigma = spread / 100
    drawn = rng.lognormal(math.log(mean) - sigma**2 / 2, sigma, count)
    return [int(length) for length in np.clip(np.round(drawn), 1, round(2.5 * mean))]


def _ids(count: int, vocabulary: int, rng: np.random.Generator) -> Ids:
    return tuple(rng.integers(_FIRST, vocabulary, count).tolist())


def _rng(w: Workload, part: str) -> np.random.Generator:
    return np.random.default_rng([w.seed, *hashlib.sha256(part.encode()).digest()[:4]])


def answering(w: Workload, vocabulary: int) -> Tree:
    """The instructions, each a group of its own, and `samples` answers to each."""
    rng = _rng(w, "answering")
    prompts = tuple((_ids(w.instruction, vocabulary, rng),) for _ in range(w.prompts))
    drawn = lengths(w.prompts * w.samples, w.response_mean, w.spread, rng)
    limits = tuple((tuple(drawn[p * w.samples : (p + 1) * w.samples]),) for p in range(w.prompts))
    return Tree(prompts, limits)


def judging(w: Workload, vocabulary: int) -> Tree:
    """The judge's prompts on random answers of the lengths of `answering`: a group for each instruction."""
    rng = _rng(w, "answers")
    asked = answering(w, vocabulary)
    answers = tuple(tuple(_ids(limit, vocabulary, rng) for limit in limits) for (limits,) in asked.limits)
    return judging_of(w, vocabulary, asked, answers)


def judging_of(w: Workload, vocabulary: int, asked: Tree, answers: tuple[tuple[Ids, ...], ...]) -> Tree:
    """The judge's prompts on these answers, `answers[p][c]` to instruction p of `asked`."""
    rng = _rng(w, "judging")
    before, behind = _ids(w.before, vocabulary, rng), _ids(w.behind, vocabulary, rng)
    drawn = iter(lengths(w.prompts * w.samples * w.votes, w.judgement_mean, w.spread, rng))
    prompts = tuple(
        tuple((*before, *instruction, *answer, *behind) for answer in of_prompt)
        for (instruction,), of_prompt in zip(asked.prompts, answers, strict=True)
    )
    limits = tuple(tuple(tuple(next(drawn) for _ in range(w.votes)) for _ in group) for group in prompts)
    return Tree(prompts, limits)


def best_and_worst(w: Workload) -> list[tuple[int, int]]:
    """Of each instruction the answers that are taken as the best and the worst: random weights give no scores, so
    these are drawn, the same for all sides."""
    rng = _rng(w, "scores")
    orders = [np.argsort(rng.random(w.samples)) for _ in range(w.prompts)]
    return [(int(order[-1]), int(order[0])) for order in orders]


def pairs_of(w: Workload, asked: Tree, answers: tuple[tuple[Ids, ...], ...]) -> list[Pair]:
    """The preference pair of each instruction, the last token of each answer replaced by the end token."""
    return [
        Pair(instruction, (*of_prompt[best][:-1], END), (*of_prompt[worst][:-1], END))
        for (instruction,), of_prompt, (best, worst) in zip(asked.prompts, answers, best_and_worst(w), strict=True)
    ]


def pairs(w: Workload, vocabulary: int) -> list[Pair]:
    """Preference pairs for `updates` updates of `batch` pairs."""
    rng = _rng(w, "pairs")
    w = dataclasses.replace(w, prompts=w.batch * w.updates, samples=2)
    asked = answering(w, vocabulary)
    return pairs_of(w, asked, tuple(tuple(_ids(n, vocabulary, rng) for n in limits) for (limits,) in asked.limits))


def documents(w: Workload, vocabulary: int) -> list[Row]:
    """Prompts with an answer each, for `updates` updates of `batch` of them; the loss is on the answer."""
    rng = _rng(w, "documents")
    asked = answering(dataclasses.replace(w, prompts=w.batch * w.updates, samples=1), vocabulary)
    return [
        Row((*instruction, *_ids(limit - 1, vocabulary, rng), END), len(instruction))
        for (instruction,), ((limit,),) in zip(asked.prompts, asked.limits, strict=True)
    ]
