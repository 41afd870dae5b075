"""What can be measured, and beside whom."""

import dataclasses
from collections.abc import Callable, Sequence

from srlm_jax.bench import attention, iteration, load, report, sampling, training
from srlm_jax.bench.ceilings import Ceilings
from srlm_jax.bench.setting import Setting

# What each command can be compared with.
VS: dict[str, tuple[str, ...]] = {
    "load": tuple(load.PEERS),
    "attention": (),
    "decode": ("transformers", "tunix"),
    "prefill": ("transformers",),
    "judge": ("transformers",),
    "sft": ("transformers", "trl"),
    "dpo": ("trl",),
    "iteration": ("trl",),
}

MEASURES: dict[str, Callable[[Setting, Ceilings], dict[str, object]]] = {
    "attention": attention.measure,
    "decode": sampling.measure,
    "prefill": sampling.measure,
    "judge": sampling.measure,
    "sft": training.measure,
    "dpo": training.measure,
    "iteration": iteration.measure,
}


def measured(setting: Setting, top: Ceilings) -> dict[str, object]:
    """The document of a command."""
    return report.document(setting, top, MEASURES[setting.command](setting, top))


def grown(setting: Setting, top: Ceilings, times: Sequence[int]) -> dict[str, object]:
    """The document of a command with so many times its work, one after the other."""
    training_only = setting.command in ("sft", "dpo")
    found = {}
    for factor in times:
        more = dataclasses.replace(setting, workload=setting.workload.times(factor, training_only))
        found[factor] = measured(more, top)
    return report.growth(found)
