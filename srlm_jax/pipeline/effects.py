"""Which fields of a configuration change nothing in a run, because another field makes them idle."""

from collections.abc import Iterable, Iterator

from srlm_jax.pipeline.settings import Settings


def without_effect(settings: Settings, given: Iterable[str]) -> dict[str, str]:
    """The fields among `given` that this run does not read, each with the reason.

    Args:
      given: full names, such as "config.lora.alpha".
    """
    idle = {}
    for name in given:
        for field, spared, reason in _idle(settings):
            inside = name == field or name.startswith(f"{field}.")
            if inside and name not in spared:
                idle.setdefault(name, reason)
    return idle


def _idle(s: Settings) -> Iterator[tuple[str, tuple[str, ...], str]]:
    """(field or group of fields, fields of the group that are read all the same, reason)."""
    if s.model.path is not None:
        # These are ours to choose for any model; see `ModelSettings`.
        ours = tuple(f"config.model.{name}" for name in ("path", "param_dtype", "compute_dtype", "remat"))
        yield "config.model", ours, "config.model.path is given, and the folder has its own numbers"
        yield "config.world", (), "config.model.path is given"
        yield "config.pretraining", (), "config.model.path is given"
    else:
        yield "config.validation", (), "the oracle of the embedded world measures the answers"
    if s.seed_data.ift is not None:
        yield "config.seed_data.rules", (), "config.seed_data.ift is given"
    if s.seed_data.eft is not None:
        yield "config.eft", (), "config.seed_data.eft is given"
    if s.seed_data.eft_file is not None:
        yield "config.seed_data.rules.eft_train_prompts", (), "config.seed_data.eft is given"
    if s.models < 2:
        for field in ("config.self_instruction", "config.dpo"):
            yield field, (), "config.models is 1: there is no round"
    if s.self_instruction.prompts_file is not None:
        fixed = ("config.self_instruction.prompts_file",)
        yield "config.self_instruction", fixed, "config.self_instruction.prompts_file is given"
    if s.self_instruction.endpoint.url is not None:
        yield "config.self_instruction.generator", (), "config.self_instruction.endpoint.url is given"
    for name, endpoint in (
        ("config.endpoint", s.endpoint),
        ("config.self_instruction.endpoint", s.self_instruction.endpoint),
        ("config.judging.endpoint", s.judging.endpoint),
        ("config.validation.endpoint", s.validation.endpoint),
    ):
        if endpoint.url is None:
            yield name, (), f"{name}.url is not given"
    if s.endpoint.url is not None and not _samples_here(s):
        yield "config.engine", (), "config.endpoint.url is given, and no model samples here"
    if s.lora.rank is None:
        yield "config.lora.alpha", (), "config.lora.rank is not given"
    if s.coordinator is None:
        yield "config.start_timeout_s", (), "config.coordinator is not given"


def _samples_here(s: Settings) -> bool:
    """Whether a model from another folder writes the prompts, on the devices of this job."""
    writer = s.self_instruction
    elsewhere = writer.prompts_file is None and writer.endpoint.url is None
    return s.models > 1 and elsewhere and writer.generator not in ("current", "m0", "sft", "m1")
