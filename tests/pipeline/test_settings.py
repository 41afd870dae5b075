"""Settings: what a config file may hold, and what it is told where it may not."""

import dataclasses

import pytest

from configs.base import get_config
from srlm_jax.model.config import RopeScaling
from srlm_jax.pipeline.settings import BadConfig, Settings, field_names, flatten, read


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
        ("eft.most_common_share", 1.5, r"^config\.eft: most_common_share .* 1\.5"),
        ("dpo.train.batch_size", 0, r"^config\.dpo\.train: batch_size must be at least 1"),
        ("lora.rank", 0, r"^config\.lora: rank must be at least 1"),
        ("engine.weights", "int4", r"^config\.engine: weights can be 'int8', or left out .* not 'int4'$"),
        ("engine.cache", "bfloat16", r"^config\.engine: cache can be 'int8', or left out .* not 'bfloat16'$"),
        ("model.K", 3, r"^config\.model: model\.N .* multiple of model\.K"),
        ("self_instruction.filters.max_rouge_l", 7.0, r"^config\.self_instruction\.filters: max_rouge_l"),
    ],
)
def test_a_value_that_is_refused_is_named(tree, name, value, wanted):
    put(tree, name, value)
    with pytest.raises(BadConfig, match=wanted):
        read(tree)


def test_flat_settings_hold_every_field_by_its_full_name(tree):
    flat = flatten(read(tree), "config")
    assert flat["config.dpo.train.optimizer.b2"] == 0.95
    assert flat["config.world.replies"] == [2, 3]  # as JSON has it
    # Of an optional group that is absent there is only its name.
    absent = {f"config.model.rope_scaling.{field.name}" for field in dataclasses.fields(RopeScaling)}
    assert set(flat) - {"config.model.rope_scaling"} == set(field_names(Settings, "config")) - absent
