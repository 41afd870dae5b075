"""A run's configuration: here the ConfigDict of a config file becomes frozen dataclasses, and nothing below sees it."""

import dataclasses
import difflib
import sys
import typing
from collections.abc import Mapping
from typing import Annotated, TypeVar

from srlm_jax import limits
from srlm_jax.data.eft import EftRules
from srlm_jax.data.judging_examples import FROM_RANKS
from srlm_jax.data.trees import SeedRules
from srlm_jax.data.world_corpus import WorldRules
from srlm_jax.errors import UserError
from srlm_jax.limits import Count, Share, Text, above, at_least, below, one_of
from srlm_jax.model.config import LlamaConfig
from srlm_jax.model.lora import LoraConfig
from srlm_jax.parallel.mesh import MeshShape
from srlm_jax.pipeline.endpoint import EndpointConfig
from srlm_jax.records import SamplingParams
from srlm_jax.sampling.engine import EngineConfig
from srlm_jax.text.chat import FORMATS
from srlm_jax.text.self_instruct import Filters
from srlm_jax.train.loop import TrainConfig

T = TypeVar("T")

Shots = Annotated[int, at_least(0), below(2**31)]
Dropout = Annotated[float, at_least(0), below(1)]


class BadConfig(UserError, ValueError):
    """The configuration cannot be run; the message names the field."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSettings(LlamaConfig):
    """M0: the folder of a Llama, or the numbers of the one that is pretrained on the embedded world.

    A folder that is given has numbers of its own, which take the place of those here once it is opened
    (`run.make_run`); the two dtypes and `remat` stay.
    """

    path: Text | None  # in any layout that `model.weights` reads

    @property
    def llama(self) -> LlamaConfig:
        """The numbers alone."""
        return LlamaConfig(**{field.name: getattr(self, field.name) for field in dataclasses.fields(LlamaConfig)})


@dataclasses.dataclass(frozen=True, kw_only=True)
class SeedData:
    """Where the human data come from: the embedded world (nothing is given), an Open Assistant export, or three sources
    of the user's own, each a path or a "tfds:" name as in `srlm_jax.storage.rows`.

    Judging examples of the user's own (`eft`) take the place of ranked prompts for training. The SFT baseline then
    judges none; the evaluation still needs its ranked prompts, from trees or from `eft_eval`. With `eft` "ranks" the
    examples are made from the human ranks of the training prompts, for a model that cannot judge yet.
    """

    trees: Text | None  # of Open Assistant: see `srlm_jax.data.oasst`
    eft: Text | None  # "ranks", or a source: see `srlm_jax.data.sources`
    ift: Text | None  # these three, or two beside `eft`, all or none: see `srlm_jax.data.sources`
    eft_train: Text | None
    eft_eval: Text | None
    rules: SeedRules  # how trees are divided

    def __post_init__(self):
        if self.eft_file is not None and self.eft_train is not None:
            raise BadConfig("config.seed_data.eft and config.seed_data.eft_train are both given: keep one")
        names = ("ift", "eft_train", "eft_eval") if self.eft_file is None else ("ift", "eft_eval")
        own = {name: getattr(self, name) for name in names}
        given = [name for name, source in own.items() if source is not None]
        absent = [name for name, source in own.items() if source is None]
        if given and absent:
            raise BadConfig(
                f"config.seed_data.{absent[0]} is not given, and config.seed_data.{given[0]} is: give all of "
                f"{', '.join(own)}, or none of them"
            )
        if given and self.trees is not None:
            raise BadConfig(f"config.seed_data.trees and config.seed_data.{given[0]} are both given: keep one")
        if not given and self.eft_file is None and self.rules.eft_train_prompts == 0:
            raise BadConfig(
                "config.seed_data.rules.eft_train_prompts is 0, and nothing else teaches the model to judge: take some "
                "prompts, or give judging examples as config.seed_data.eft"
            )

    @property
    def eft_file(self) -> str | None:
        """The source of judging examples of the user's own, None where there is none."""
        return None if self.eft == FROM_RANKS else self.eft


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pretraining:
    """M0 where no folder is given: trained on the world's base corpus."""

    train: TrainConfig
    sequence_length: Count  # positions of a packed row
    dropout: Dropout


@dataclasses.dataclass(frozen=True, kw_only=True)
class SupervisedFineTuning:
    """SFT of the baseline (IFT) and of M1 (IFT + EFT), both from M0."""

    train: TrainConfig
    dropout: Dropout  # of the attention probabilities; above 0 no kernel computes attention, see `Llama`


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreferenceTraining:
    """DPO of a round, from and against the model that the round starts from."""

    train: TrainConfig
    beta: Annotated[float, above(0)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelfInstruction:
    """How a round's new prompts are made, or where they are taken from."""

    prompts_file: Text | None  # a fixed set for every round, instead of all below; see `srlm_jax.data.sources`
    prompts: Count  # wanted
    max_candidates: Count  # completions drawn before the round makes do with fewer prompts
    batch: Count  # completions drawn between two looks at what was accepted
    from_seeds: Shots  # demonstrations that are human prompts
    from_generated: Shots  # demonstrations that are prompts made earlier in the round
    generator: Text | None  # "current", a model of this run ("m1"), or the folder of any Llama
    endpoint: EndpointConfig  # a server that writes them instead: one with text completions, not chats alone
    filters: Filters
    sampling: SamplingParams


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judging(SamplingParams):
    """How judgements are drawn, what they are asked for, and which of their scores counts."""

    rubric: Text | None  # a file; None: the paper's rubric, or the world's in the embedded world
    prefix: str  # words that each judgement begins with, "" for none; the model goes on after them
    score: Annotated[str, one_of("votes", "expected")]  # a mean of the scores that were drawn, or of expected ones
    min_scored: Share  # the share of judgements with a score below which the run stops
    endpoint: EndpointConfig  # a server that judges a round's answers in place of the model; none: the model does


@dataclasses.dataclass(frozen=True, kw_only=True)
class Validation:
    """What is measured of answers where no oracle is: each model answers a fixed set of prompts, and a judge from
    outside scores the answers by the rubric."""

    prompts_file: Text | None  # None: no validation; see `srlm_jax.data.sources`
    endpoint: EndpointConfig  # the judge; none: only the answers' length is measured

    def __post_init__(self):
        if self.prompts_file is None and self.endpoint.url is not None:
            raise BadConfig(
                "config.validation.endpoint.url is given and config.validation.prompts_file is not: give the prompts "
                "whose answers the server is to judge"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything a run depends on."""

    seed: Annotated[int, at_least(0), below(2**32)]
    workdir: Text
    models: Count  # the last model to make: 1 stops at M1, 3 at M3
    coordinator: Text | None  # of a job of several processes: HOST:PORT of process 0, or "auto"; see `mesh.start`
    processes: Count | None  # with an address: how many there are
    process: Annotated[int, at_least(0)] | None  # with an address: which of them this is, from 0
    start_timeout_s: Count  # how long a process waits for the others to start
    compile_cache: Text | None  # a folder in which compiled programs are kept for the next start; None: they are not
    context_length: Count  # tokens that the model may see at once
    max_prompt_tokens: Count  # of an instruction
    shard_prompts: Count  # prompts between two files that a killed run keeps
    logprob_chunk: Count  # positions of a row whose logits are held at once
    length_multiple: Count  # row lengths are rounded up to it
    packed: bool  # documents share rows in SFT, reference and DPO; each has a row to itself where not
    reference_batch: Count  # rows at a time when log-probabilities are computed
    model: ModelSettings
    chat: Annotated[str, one_of(*FORMATS)]  # the format of instructions and answers
    chat_system: str | None  # the system prompt of every exchange, "" for none; None: what the model's template has
    lora: LoraConfig  # of SFT and DPO
    mesh: MeshShape
    engine: EngineConfig
    endpoint: EndpointConfig  # a server that samples from this run's models, in place of the engine
    world: WorldRules | None  # None together with `pretraining`: there is no embedded world, and M0 comes from a folder
    seed_data: SeedData
    pretraining: Pretraining | None
    sft: SupervisedFineTuning
    eft: EftRules
    self_instruction: SelfInstruction
    responses: SamplingParams
    judging: Judging
    dpo: PreferenceTraining
    validation: Validation

    def __post_init__(self):
        if self.chat_system and FORMATS[self.chat].around_system is None:
            raise BadConfig(
                f"config.chat_system is {self.chat_system!r}, and config.chat={self.chat} has no place for a system "
                "prompt: leave it out, or choose another format"
            )
        if self.responses.samples < 2:
            raise BadConfig(f"config.responses.samples is {self.responses.samples}: a pair needs at least 2 responses")
        if self.seed_data.ift is None:
            prompts = self.seed_data.rules.ift_prompts
            self.check_demonstrations("config.seed_data.rules.ift_prompts is", prompts)
            if prompts == 0:
                raise BadConfig("config.seed_data.rules.ift_prompts is 0: the SFT baseline needs answers to learn from")
            if self.seed_data.rules.eft_eval_prompts < 2:
                raise BadConfig(
                    f"config.seed_data.rules.eft_eval_prompts is {self.seed_data.rules.eft_eval_prompts}: judges are "
                    "measured on at least 2 prompts"
                )
        if self.endpoint.url is not None and "{name}" not in (self.endpoint.model or ""):
            raise BadConfig(
                f"config.endpoint.model is {self.endpoint.model!r}: it must hold {{name}}, which stands for m0, sft, "
                "m1, ...: each time the server samples from another model of this run"
            )
        self._check_judging()
        if self.model.path is not None:
            self._check_given_model()

    def _check_judging(self) -> None:
        s = self.judging
        for field, server in (("config.endpoint", self.endpoint), ("config.judging.endpoint", s.endpoint)):
            if server.url is None:
                continue
            if s.score == "expected":
                raise BadConfig(
                    f"config.judging.score is 'expected' and {field}.url is given: a server does not give the "
                    "probabilities of all scores; take 'votes', or judge with the model on this job's devices"
                )
            if s.prefix:
                raise BadConfig(
                    f"config.judging.prefix is {s.prefix!r} and {field}.url is given: a chat server cannot be made to "
                    "begin with given words; leave the prefix out, or ask for them in a rubric of your own "
                    "(config.judging.rubric)"
                )

    def _check_given_model(self) -> None:
        """What a model from a folder needs besides."""
        if self.seed_data.trees is None and self.seed_data.ift is None:
            raise BadConfig(
                "config.model.path is given, and no human data: give config.seed_data.trees, an Open Assistant export, "
                "or config.seed_data.ift, .eft_train and .eft_eval"
            )
        s = self.self_instruction
        if self.models > 1 and s.generator is None and s.prompts_file is None and s.endpoint.url is None:
            raise BadConfig(
                "config.self_instruction.generator is not given: the folder of the model that writes new prompts (the "
                "paper's is Llama 2-Chat 70B), 'current' for the model that the round starts from, a server "
                "(config.self_instruction.endpoint.url), or prompts of your own (config.self_instruction.prompts_file)"
            )

    def check_demonstrations(self, said: str, prompts: int) -> None:
        """Refuses fewer IFT prompts than self-instruction shows; `said` and their number begin the message."""
        shots = self.self_instruction.from_seeds + self.self_instruction.from_generated
        if self.models > 1 and self.self_instruction.prompts_file is None and prompts < shots:
            raise BadConfig(
                f"{said} {prompts}: self-instruction shows {shots} prompts (config.self_instruction.from_seeds + "
                "from_generated)"
            )


def read(config: Mapping) -> Settings:
    """A config file's tree as settings.

    Raises:
      BadConfig: a field is missing, unknown or of the wrong type, or its value is refused; the message has its name.
    """
    return _build(Settings, config, "config")


def _build(cls: type[T], tree: Mapping, path: str) -> T:
    kinds = typing.get_type_hints(cls)
    unknown = [name for name in tree if name not in kinds]
    if unknown:
        near = difflib.get_close_matches(unknown[0], kinds, 1)
        raise BadConfig(f"{path}.{unknown[0]} is no field" + (f"; did you mean {path}.{near[0]}?" if near else ""))
    if missing := [name for name in kinds if name not in tree]:
        raise BadConfig(f"{path}.{missing[0]} is missing")
    try:
        values = {name: _value(kind, tree[name], f"{path}.{name}") for name, kind in kinds.items()}
        for name, kind in typing.get_type_hints(cls, include_extras=True).items():
            if reason := limits.refusal(kind, values[name], f"{path}.{name}"):
                raise BadConfig(reason)
        return cls(**values)
    except BadConfig:
        raise
    except UserError as error:
        raise BadConfig(f"{path}: {error}") from error


def _value(kind: type, value: object, path: str) -> object:
    if value is None and type(None) in typing.get_args(kind):
        return None
    kind = _given(kind)
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, Mapping):
            raise BadConfig(f"{path} must hold fields, not {value!r}")
        return _build(kind, value, path)
    if typing.get_origin(kind) is tuple:
        arguments = typing.get_args(kind)
        if not isinstance(value, tuple | list) or (arguments[-1] is not ... and len(value) != len(arguments)):
            raise BadConfig(f"{path} must be a tuple like {kind}, not {value!r}")
        return tuple(_value(arguments[0], item, f"{path}[{i}]") for i, item in enumerate(value))
    if kind is float and type(value) is int and abs(value) <= sys.float_info.max:
        return float(value)
    if type(value) is not kind:
        raise BadConfig(f"{path} must be {kind.__name__}, not {value!r}")
    return value


def _given(kind: type) -> type:
    """The type of a field that is not None."""
    options = typing.get_args(kind)
    return next(option for option in options if option is not type(None)) if type(None) in options else kind


def field_names(cls: type, path: str) -> list[str]:
    """["config.dpo.beta", ...]: the full name of every field of a settings class that holds a value."""
    names: list[str] = []
    for name, kind in typing.get_type_hints(cls).items():
        kind, full = _given(kind), f"{path}.{name}"
        names += field_names(kind, full) if dataclasses.is_dataclass(kind) else [full]
    return names


def flatten(settings: object, path: str) -> dict[str, object]:
    """{"config.dpo.beta": 0.1, ...}: every field of a settings dataclass by its full name, values as JSON has them."""
    flat: dict[str, object] = {}
    for field in dataclasses.fields(settings):
        value, name = getattr(settings, field.name), f"{path}.{field.name}"
        if dataclasses.is_dataclass(value):
            flat |= flatten(value, name)
        else:
            flat[name] = list(value) if isinstance(value, tuple) else value
    return flat
