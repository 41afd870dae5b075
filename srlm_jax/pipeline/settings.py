"""A run's configuration: here the ConfigDict of a config file becomes frozen dataclasses, and nothing below sees it."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import TypeVar

from srlm_jax.data.eft import EftRules
from srlm_jax.data.trees import SeedRules
from srlm_jax.data.world_corpus import WorldRules
from srlm_jax.model.config import LlamaConfig
from srlm_jax.parallel.mesh import MeshShape
from srlm_jax.records import SamplingParams
from srlm_jax.sampling.engine import EngineConfig
from srlm_jax.text.self_instruct import Filters
from srlm_jax.train.loop import TrainConfig

T = TypeVar("T")


class BadConfig(ValueError):
    """The configuration cannot be run; the message names the field."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SeedData:
    """Where the human data come from: the embedded world (nothing is given), an Open Assistant export, or three sources
    of one's own, each a path or a "tfds:" name as in `srlm_jax.storage.rows`."""

    trees: str | None  # of Open Assistant: see `srlm_jax.data.oasst`
    ift: str | None  # these three, all or none: see `srlm_jax.data.sources`
    eft_train: str | None
    eft_eval: str | None
    rules: SeedRules  # how trees are divided

    def __post_init__(self):
        own = {name: getattr(self, name) for name in ("ift", "eft_train", "eft_eval")}
        given = [name for name, source in own.items() if source is not None]
        absent = [name for name, source in own.items() if source is None]
        if given and absent:
            raise BadConfig(
                f"config.seed_data.{absent[0]} is not given, and config.seed_data.{given[0]} is: give all of "
                f"{', '.join(own)}, or none of them"
            )
        if given and self.trees is not None:
            raise BadConfig(f"config.seed_data.trees and config.seed_data.{given[0]} are both given: keep one")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pretraining:
    """M0, where no pretrained model is given: trained on the world's base corpus."""

    train: TrainConfig
    sequence_length: int  # positions of a packed row
    dropout: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class SupervisedFineTuning:
    """SFT of the baseline (IFT) and of M1 (IFT + EFT), both from M0."""

    train: TrainConfig
    dropout: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreferenceTraining:
    """DPO of a round, from and against the model that the round starts from."""

    train: TrainConfig
    dropout: float
    beta: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelfInstruction:
    """How a round's new prompts are made, or where they are taken from."""

    prompts_file: str | None  # a fixed set for every round, instead of all below; see `srlm_jax.data.sources`
    prompts: int  # wanted
    max_candidates: int  # completions drawn before the round makes do with fewer prompts
    batch: int  # completions drawn between two looks at what was accepted
    from_seeds: int  # demonstrations that are human prompts
    from_generated: int  # demonstrations that are prompts made earlier in the round
    generator: str  # "current", a model of this run ("m1"), or the folder of a checkpoint
    filters: Filters
    sampling: SamplingParams


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything a run depends on."""

    seed: int
    workdir: str
    models: int  # the last model to make: 1 stops at M1, 3 at M3
    coordinator: str | None  # address for a job of several hosts; "auto" where the platform knows it
    context_length: int  # tokens that the model may see at once
    max_prompt_tokens: int  # of an instruction
    shard_prompts: int  # prompts between two files that a killed run keeps
    logprob_chunk: int  # positions of a row whose logits are held at once
    length_multiple: int  # row lengths are rounded up to it
    reference_batch: int  # rows at a time when log-probabilities are computed
    model: LlamaConfig
    mesh: MeshShape
    engine: EngineConfig
    world: WorldRules
    seed_data: SeedData
    pretraining: Pretraining
    sft: SupervisedFineTuning
    eft: EftRules
    self_instruction: SelfInstruction
    responses: SamplingParams
    judging: SamplingParams
    dpo: PreferenceTraining

    def __post_init__(self):
        if self.responses.samples < 2:
            raise BadConfig(f"config.responses.samples is {self.responses.samples}: a pair needs at least 2 responses")
        if self.judging.samples < 1:
            raise BadConfig(f"config.judging.samples is {self.judging.samples}: a score needs at least 1 judgement")
        if self.world.held_out < 2:
            raise BadConfig(f"config.world.held_out is {self.world.held_out}: a standard error needs at least 2")
        if self.seed_data.ift is None:
            self.check_demonstrations("config.seed_data.rules.ift_prompts is", self.seed_data.rules.ift_prompts)

    def check_demonstrations(self, said: str, prompts: int) -> None:
        """Refuses fewer IFT prompts than self-instruction shows; `said` and their number begin the message."""
        shots = self.self_instruction.from_seeds + self.self_instruction.from_generated
        if self.self_instruction.prompts_file is None and prompts < shots:
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
        return cls(**{name: _value(kind, tree[name], f"{path}.{name}") for name, kind in kinds.items()})
    except BadConfig:
        raise
    except ValueError as error:
        raise BadConfig(f"{path}: {error}") from error


def _value(kind: type, value: object, path: str) -> object:
    if typing.get_origin(kind) is types.UnionType:
        if value is None:
            return None
        kind = next(option for option in typing.get_args(kind) if option is not type(None))
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, Mapping):
            raise BadConfig(f"{path} must hold fields, not {value!r}")
        return _build(kind, value, path)
    if typing.get_origin(kind) is tuple:
        arguments = typing.get_args(kind)
        if not isinstance(value, tuple | list) or (arguments[-1] is not ... and len(value) != len(arguments)):
            raise BadConfig(f"{path} must be a tuple like {kind}, not {value!r}")
        return tuple(_value(arguments[0], item, f"{path}[{i}]") for i, item in enumerate(value))
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise BadConfig(f"{path} must be {kind.__name__}, not {value!r}")
    return value


def field_names(cls: type, path: str) -> list[str]:
    """["config.dpo.beta", ...]: the full name of every field of a settings class that holds a value."""
    names: list[str] = []
    for name, kind in typing.get_type_hints(cls).items():
        full = f"{path}.{name}"
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
