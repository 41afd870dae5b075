"""What the stages of an iteration hand to one another: one frozen record per line of a JSON Lines file.

Text in, text out: no JAX here, and no token ids except where a length is counted. Every record is addressed by
the id of its prompt, so that files can be joined, resumed and read in any order.
"""

import dataclasses
import enum
from collections.abc import Callable, Sequence
from typing import Annotated, Protocol

from srlm_jax import limits
from srlm_jax.limits import Count, Limit, above, at_least, at_most


@dataclasses.dataclass(frozen=True, kw_only=True)
class Document:
    """A text of the base corpus."""

    id: str
    text: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
    """An instruction. `origin` says where it came from: "seed", "self-instruct" or "user"."""

    id: str
    text: str
    origin: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
    """One supervised example: the loss is on `response` alone, and on the end token after it where it is finished.

    `finished` is False where a length limit cut the response. Human responses are always finished.
    """

    id: str
    prompt: str
    response: str
    finished: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class RankedPrompt:
    """An instruction and its answers as humans ranked them: `ranks[i]` belongs to `responses[i]`, 0 is the best."""

    id: str
    prompt: str
    responses: tuple[str, ...]
    ranks: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completion:
    """What a model wrote after a prompt. `finished` is False where the length limit cut it."""

    text: str
    tokens: int
    finished: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class WatchedCompletion(Completion):
    """A completion with the model's own probabilities of `Request.watched`, for whoever drew it; never written to a
    file.

    `probabilities(start, skipped)` is about the first token behind `text[:start]` that holds more than white space and
    the characters `skipped`, or that ends the text: the probability of each watched text in that token's place, at
    temperature 1 and over the whole vocabulary. None where the length limit cut the text before such a token.
    """

    probabilities: Callable[[int, str], tuple[float, ...] | None] = dataclasses.field(compare=False, repr=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Responses:
    """The N candidate answers to one prompt (paper section 2.2)."""

    id: str
    prompt: str
    completions: tuple[Completion, ...]


class NoVote(enum.StrEnum):
    """Why a judgement carries no score."""

    UNFINISHED = "unfinished"  # the length limit cut the judgement before a score
    NO_SCORE = "no_score"  # the text holds no "Score: <points>"
    OUT_OF_RANGE = "out_of_range"  # a number, but not between 0 and 5
    NOT_A_NUMBER = "not_a_number"  # "Score: four"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vote:
    """One judgement of one response: exactly one of `score` and `no_vote` is None.

    `finished` is False where the length limit cut the judgement; it may have a score even so. `expected` is the mean of
    0 to 5 under the model's probabilities of these digits in the place of the score, whatever was drawn there; None
    where the text reaches no such place, or where no probabilities came with it.
    """

    text: str
    finished: bool
    score: float | None
    no_vote: NoVote | None
    expected: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class JudgedResponse:
    """A response and its judgements.

    `expected` is the mean of the votes' expected scores. `score` is the one that counts: the mean of the votes' scores,
    or `expected`, as the run was configured. Each is None where no vote has one.
    """

    response: str
    tokens: int
    finished: bool
    votes: tuple[Vote, ...]
    score: float | None
    expected: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class JudgedPrompt:
    """All judged answers to one prompt."""

    id: str
    prompt: str
    responses: tuple[JudgedResponse, ...]


class PairDrop(enum.StrEnum):
    """Why a prompt gives no preference pair."""

    UNPARSEABLE = "unparseable"  # no response has a score
    ONE_SCORE = "one_score"  # a single response has a score
    TIE = "tie"  # highest and lowest mean score are equal
    SAME_TEXT = "same_text"  # the judge scored one text in two ways: noise, not a preference


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreferencePair:
    """The best and the worst answer to one prompt, by the judge's mean score (paper section 2.2).

    `chosen_finished` and `rejected_finished` are False where the length limit cut the answer.
    """

    id: str
    prompt: str
    chosen: str
    rejected: str
    chosen_finished: bool
    rejected_finished: bool
    chosen_score: float
    rejected_score: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReferencePair:
    """A preference pair with the log-probability of each answer under the round's starting model, in nats.

    A log-probability is the sum over the answer's tokens and its end token. A cut answer (`chosen_finished` or
    `rejected_finished` is False) has no end token.
    """

    id: str
    prompt: str
    chosen: str
    rejected: str
    chosen_finished: bool
    rejected_finished: bool
    chosen_logprob: float
    rejected_logprob: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class OracleScores:
    """The world's exact scores of all answers to one prompt, in their order; None where the prompt asks for nothing
    that can be scored."""

    id: str
    scores: tuple[int | None, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Metric:
    """A measured number with its standard error over `n` independent units."""

    value: float
    stderr: float
    n: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How completions are drawn. `temperature` 0 is greedy; `stop` ends a completion after any of its strings."""

    samples: Count
    temperature: Annotated[float, at_least(0)]
    top_p: Annotated[float, above(0), at_most(1)]
    max_new_tokens: Count
    stop: tuple[Annotated[str, Limit("not be empty", bool)], ...]

    def __post_init__(self):
        limits.check(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """Prompts that share their beginning (one instruction's four answers, say); each gets `samples` completions.

    `id` addresses the randomness: the same id under the same seed draws the same completions in any batch.
    `chat` wraps each prompt as a user's turn; otherwise the text is continued as it stands. `opening` begins every
    completion, which then goes on after it and does not hold it. The completions of a model on this job's devices come
    as `WatchedCompletion` where there are `watched` texts, one token each: the same in all requests of a call.
    """

    id: str
    prompts: tuple[str, ...]
    chat: bool
    opening: str = ""
    watched: tuple[str, ...] = ()


class Generate(Protocol):
    """Draws completions: result[i][j][k] is the k-th sample of prompt j of request i."""

    def __call__(
        self, requests: Sequence[Request], params: SamplingParams, report: Callable[[int, int], None]
    ) -> list[tuple[tuple[Completion, ...], ...]]:
        """`report(finished_completions, generated_tokens)` is called as the work goes on."""
