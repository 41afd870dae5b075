"""Settings: what a config file may hold, and what it is told where it may not."""

import dataclasses
import math
import typing

import pytest

from configs.base import get_config
from srlm_jax import limits
from srlm_jax.errors import BadInput
from srlm_jax.model.config import RopeScaling
from srlm_jax.pipeline.settings import BadConfig, Settings, field_names, flatten, read
from srlm_jax.records import SamplingParams


@pytest.fixture
def tree():
    return get_config("smoke", 3).to_dict()


def put(tree, name, value):
    *parts, last = name.split(".")
    for part in parts:
        tree = tree[part]
    tree[last] = value


def test_a_config_file_becomes_settings(tree):
    settings = read(tree)
    assert settings.dpo.beta == tree["dpo"]["beta"]
    assert (settings.model.D, settings.model.L) == (64, 2)
    assert settings.self_instruction.sampling.stop == ("\n10.",)
    assert settings.coordinator is None


def test_an_unknown_field_names_itself_and_the_nearest(tree):
    put(tree, "dpo.train.optimizer.warmup_step", 3)
    with pytest.raises(BadConfig, match=r"optimizer\.warmup_step is no field; did you mean config\.dpo.*_steps"):
        read(tree)


def test_an_unknown_field_like_no_other_still_names_itself(tree):
    put(tree, "zzz", 3)
    with pytest.raises(BadConfig, match=r"^config\.zzz is no field$"):
        read(tree)


def test_a_missing_field_is_named(tree):
    del tree["eft"]["draws_per_prompt"]
    with pytest.raises(BadConfig, match=r"config\.eft\.draws_per_prompt is missing"):
        read(tree)


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("dpo.beta", "0.1", "must be float, not '0.1'"),
        ("dpo.beta", True, "must be float, not True"),
        ("dpo.beta", None, "must be float, not None"),
        ("seed", 1.0, "must be int, not 1.0"),
        ("seed", True, "must be int, not True"),
        ("model.tied", 1, "must be bool, not 1"),
        ("workdir", 3, "must be str, not 3"),
        ("coordinator", 3, "must be str, not 3"),
        ("judging.stop", "Score", "must be a tuple"),
        ("world.replies", (2,), "must be a tuple"),
        ("dpo", 3, "must hold fields, not 3"),
    ],
)
def test_a_value_of_the_wrong_type_is_named(tree, name, value, wanted):
    put(tree, name, value)
    with pytest.raises(BadConfig) as raised:
        read(tree)
    assert str(raised.value).startswith(f"config.{name} ") and wanted in str(raised.value)


def test_an_optional_group_of_fields_is_read_typed(tree):
    assert read(tree).model.rope_scaling is None
    fields = {"factor": 8, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_context": 64}
    put(tree, "model.rope_scaling", fields)
    settings = read(tree)
    assert dataclasses.asdict(settings.model.rope_scaling) == fields
    assert flatten(settings, "config")["config.model.rope_scaling.original_context"] == 64
    put(tree, "model.rope_scaling.factr", 2.0)
    with pytest.raises(BadConfig, match=r"rope_scaling\.factr is no field; did you mean .*\.factor\?"):
        read(tree)


def test_the_place_in_a_tuple_is_named(tree):
    put(tree, "judging.stop", ("a", 3))
    with pytest.raises(BadConfig, match=r"config\.judging\.stop\[1\] must be str, not 3"):
        read(tree)


def test_a_whole_number_does_for_a_float_and_is_one_then(tree):
    put(tree, "dpo.beta", 1)
    beta = read(tree).dpo.beta
    assert (beta, type(beta)) == (1.0, float)


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("model.K", 3, r"^config\.model: model\.N .* multiple of model\.K"),
        ("model.H", 15, r"^config\.model: model\.H must be even, not 15"),
        ("world.replies", (3, 2), r"^config\.world: replies is \(3, 2\): the fewest must not be above the most"),
        ("chat_system", "x", r"^config\.chat_system is 'x', and config\.chat=plain has no place for a system prompt"),
        ("responses.samples", 1, r"^config\.responses\.samples is 1: a pair needs at least 2 responses"),
        ("dpo.train.accumulate", 3, r"^config\.dpo\.train: batch_size \(8\) must be a multiple of accumulate \(3\)"),
        ("dpo.train.optimizer.warmup_steps", 19, r"^config\.dpo\.train: warmup_steps \(19\) must leave two"),
        ("dpo.train.optimizer.end_learning_rate", 1.0, r"optimizer: end_learning_rate is 1\.0: it must not be above"),
        ("self_instruction.filters.min_words", 151, r"filters: min_words is 151: it must not be above max_words"),
    ],
)
def test_values_that_do_not_fit_one_another_are_named(tree, name, value, wanted):
    put(tree, name, value)
    with pytest.raises(BadConfig, match=wanted):
        read(tree)


NEGATIVE, NOT_FINITE = "must be at least 0", "must be a finite number"
POSITIVE, COUNT = "must be above 0", "must be at least 1 and be below 2147483648"
OPTIMIZER = "dpo.train.optimizer"
OUT_OF_RANGE = [
    ("responses.temperature", -1.0, NEGATIVE),
    ("responses.temperature", math.nan, NOT_FINITE),
    ("judging.temperature", math.inf, NOT_FINITE),
    ("self_instruction.sampling.temperature", -math.inf, NOT_FINITE),
    ("responses.top_p", 0.0, "must be above 0 and be at most 1"),
    ("judging.top_p", -0.5, "must be above 0 and be at most 1"),
    ("judging.top_p", 1.5, "must be above 0 and be at most 1"),
    ("responses.max_new_tokens", 0, COUNT),
    ("responses.max_new_tokens", 10**30, COUNT),
    ("judging.samples", 0, COUNT),
    ("judging.stop", ("",), "must not be empty"),
    ("sft.dropout", 1.5, "must be at least 0 and be below 1"),
    ("sft.dropout", -0.1, "must be at least 0 and be below 1"),
    ("pretraining.dropout", 1.0, "must be at least 0 and be below 1"),
    ("pretraining.sequence_length", 0, COUNT),
    ("dpo.beta", -1.0, POSITIVE),
    ("dpo.beta", 0.0, POSITIVE),
    ("dpo.beta", math.nan, NOT_FINITE),
    (f"{OPTIMIZER}.learning_rate", -1e-5, POSITIVE),
    (f"{OPTIMIZER}.learning_rate", math.inf, NOT_FINITE),
    (f"{OPTIMIZER}.end_learning_rate", -1e-6, NEGATIVE),
    (f"{OPTIMIZER}.warmup_steps", -1, NEGATIVE),
    (f"{OPTIMIZER}.b1", 1.0, "must be at least 0 and be below 1"),
    (f"{OPTIMIZER}.eps", 0.0, POSITIVE),
    (f"{OPTIMIZER}.weight_decay", -0.1, NEGATIVE),
    (f"{OPTIMIZER}.clip_norm", 0.0, POSITIVE),
    ("dpo.train.steps", 0, COUNT),
    ("dpo.train.batch_size", 0, COUNT),
    ("sft.train.log_every", -3, COUNT),
    ("sft.train.checkpoint_every", 0, COUNT),
    ("lora.rank", 0, COUNT),
    ("lora.alpha", -16.0, POSITIVE),
    ("engine.rows", 0, COUNT),
    ("engine.steps", -1, COUNT),
    ("engine.weights", "int4", "must be 'int8'"),
    ("engine.cache", "bfloat16", "must be 'int8'"),
    ("endpoint.timeout_s", 0.0, POSITIVE),
    ("endpoint.patience_s", -1.0, NEGATIVE),
    ("endpoint.parameters", ("",), "must be 'n' or 'temperature'"),
    ("endpoint.concurrency", 0, COUNT),
    ("validation.endpoint.requests_per_minute", 0, COUNT),
    ("mesh.data", 0, COUNT),
    ("mesh.fsdp", -2, "must be at least -1"),
    ("mesh.tensor", 0, COUNT),
    ("shard_prompts", 0, COUNT),
    ("reference_batch", 0, COUNT),
    ("context_length", 0, COUNT),
    ("max_prompt_tokens", -5, COUNT),
    ("logprob_chunk", 0, COUNT),
    ("length_multiple", 0, COUNT),
    ("models", 0, COUNT),
    ("models", -1, COUNT),
    ("seed", -1, "must be at least 0 and be below 4294967296"),
    ("processes", 0, COUNT),
    ("process", -1, NEGATIVE),
    ("start_timeout_s", 0, COUNT),
    ("workdir", " ", "must not be blank"),
    ("chat", "plian", "must be 'plain' or"),
    ("model.V", 0, COUNT),
    ("model.D", 2**31, COUNT),
    ("model.rope_theta", 0.0, POSITIVE),
    ("model.norm_eps", -1e-5, POSITIVE),
    ("model.compute_dtype", "float8", "must be 'float32' or 'bfloat16' or 'float16'"),
    ("model.remat", "all", "must be 'full' or 'dots'"),
    ("world.documents", 0, COUNT),
    ("world.held_out", 1, "must be at least 2"),
    ("world.reply_flaw", 1.5, "must be at least 0 and be at most 1"),
    ("world.rank_noise", -0.4, NEGATIVE),
    ("seed_data.rules.min_ranked", 1, "must be at least 2"),
    ("seed_data.rules.ift_prompts", -1, NEGATIVE),
    ("eft.min_scored", 1, "must be at least 2"),
    ("eft.draws_per_prompt", 0, COUNT),
    ("eft.most_common_share", 1.5, "must be above 0 and be at most 1"),
    ("self_instruction.prompts", 0, COUNT),
    ("self_instruction.from_seeds", -1, NEGATIVE),
    ("self_instruction.filters.max_rouge_l", 7.0, "must be at least 0 and be at most 1"),
    ("self_instruction.filters.banned_words", ("image", ""), "must not be blank"),
    ("self_instruction.prompts_file", "", "must not be blank"),
]


@pytest.mark.parametrize(("name", "value", "allowed"), OUT_OF_RANGE)
def test_a_value_out_of_range_is_refused_with_what_is_allowed(tree, name, value, allowed):
    put(tree, name, value)
    index = next((f"[{i}]" for i, item in enumerate(value) if not item), "") if isinstance(value, tuple) else ""
    shown = value if not isinstance(value, tuple) else ""
    with pytest.raises(BadConfig) as raised:
        read(tree)
    said = str(raised.value)
    number = str(shown) if isinstance(shown, float) and not math.isfinite(shown) else f"{shown!r:.60}"
    assert said.startswith(f"config.{name}{index} is {number}: it {allowed}")


def test_every_number_of_the_configuration_has_a_range():
    """A field without one takes any number, and a training of hours may end in nothing."""

    def numbers(cls, path):
        for name, kind in typing.get_type_hints(cls, include_extras=True).items():
            options = [
                option
                for option in (kind, *typing.get_args(kind))
                if isinstance(option, type) and dataclasses.is_dataclass(option)
            ]
            if options:
                yield from numbers(options[0], f"{path}.{name}")
            elif {int, float} & set(leaves(kind)):
                yield f"{path}.{name}", kind

    def leaves(kind):
        if typing.get_origin(kind) is typing.Annotated:
            return leaves(kind.__origin__)
        inner = typing.get_args(kind)
        return [leaf for part in inner for leaf in leaves(part)] if inner else [kind]

    def limited(kind):
        if typing.get_origin(kind) is tuple:
            return all(limits.limits_of(part) for part in typing.get_args(kind) if part is not ...)
        return bool(limits.limits_of(kind))

    found = dict(numbers(Settings, "config"))
    assert {name for name, kind in found.items() if not limited(kind)} == set()
    assert len(found) > 60  # or the test reads nothing


def test_samples_are_checked_wherever_they_are_asked_for():
    fields = {"samples": 1, "temperature": 0.7, "top_p": 0.9, "max_new_tokens": 8, "stop": ("\n",)}
    SamplingParams(**fields)
    for name, value in {"temperature": math.nan, "top_p": 0.0, "max_new_tokens": 0, "stop": ("",)}.items():
        with pytest.raises(BadInput, match=rf"^{name}.* is .*: it must "):
            SamplingParams(**fields | {name: value})


def test_flat_settings_hold_every_field_by_its_full_name(tree):
    flat = flatten(read(tree), "config")
    assert flat["config.dpo.train.optimizer.b2"] == 0.95
    assert flat["config.world.replies"] == [2, 3]  # as JSON has it
    # Of an optional group that is absent there is only its name.
    absent = {f"config.model.rope_scaling.{field.name}" for field in dataclasses.fields(RopeScaling)}
    assert set(flat) - {"config.model.rope_scaling"} == set(field_names(Settings, "config")) - absent
