"""Configurations of other people's folders: what is read, what is written, and what is refused by name."""

import dataclasses
import json

import numpy as np
import pytest
from etils import epath
from hypothesis import given
from hypothesis import strategies as st

from srlm_jax.model.config import PRESETS, RopeScaling
from srlm_jax.model.config_files import (
    from_hf,
    from_manifest,
    from_meta,
    generation_config,
    hf_fields,
    to_hf,
)
from srlm_jax.model.folders import BadModelFile, read_json
from srlm_jax.storage.checkpoint import config_facts

CHOICES = {"param_dtype": "float32", "compute_dtype": "bfloat16", "remat": "full"}
HF = {
    "model_type": "llama", "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 24, "rms_norm_eps": 1e-5, "hidden_act": "silu",
    "tie_word_embeddings": False, "rope_theta": 100.0,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
SCALING = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=64)


def read_hf(**changes):
    return from_hf(HF | changes, "config.json", **CHOICES)


# --- Hugging Face -----------------------------------------------------------------------------------------------------


def test_every_number_of_a_config_json_is_read():
    wanted = {"V": 40, "D": 16, "L": 2, "N": 4, "K": 2, "H": 4, "F": 24, "rope_theta": 100.0, "rope_scaling": None}
    assert dataclasses.asdict(read_hf()) == wanted | {"norm_eps": 1e-5, "tied": False} | CHOICES


# As they are published.
PUBLISHED = {
    "tinyllama_1b": {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "bos_token_id": 1, "eos_token_id": 2,
        "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 5632,
        "max_position_embeddings": 2048, "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 22,
        "num_key_value_heads": 4, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None,
        "rope_theta": 10000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "transformers_version": "4.35.0", "use_cache": True, "vocab_size": 32000,
    },
    "smollm2_135m": {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 0,
        "eos_token_id": 0, "hidden_act": "silu", "hidden_size": 576, "initializer_range": 0.041666666666666664,
        "intermediate_size": 1536, "is_llama_config": True, "max_position_embeddings": 8192, "mlp_bias": False,
        "model_type": "llama", "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3,
        "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_interleaved": False, "rope_scaling": None,
        "rope_theta": 100000, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
        "transformers_version": "4.40.1", "use_cache": True, "vocab_size": 49152,
    },
    "llama3_2_1b": {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 128000, "eos_token_id": 128001, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048,
        "initializer_range": 0.02, "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": False,
        "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8,
        "pretraining_tp": 1, "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192, "rope_type": "llama3",
        },
        "rope_theta": 500000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
        "transformers_version": "4.45.0.dev0", "use_cache": True, "vocab_size": 128256,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_config_json_make_the_presets(name):
    assert from_hf(PUBLISHED[name], "", **CHOICES) == PRESETS[name]()


def test_what_transformers_assumes_where_a_field_is_missing_is_assumed():
    assert from_hf({k: v for k, v in HF.items() if k != "num_key_value_heads"}, "", **CHOICES).K == 4
    assert from_hf({k: v for k, v in HF.items() if k != "rope_theta"}, "", **CHOICES).rope_theta == 10_000.0
    assert not from_hf({k: v for k, v in HF.items() if k != "tie_word_embeddings"}, "", **CHOICES).tied


def test_a_head_width_is_honoured():
    assert (read_hf(head_dim=8).H, read_hf(head_dim=None).H) == (8, 4)


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 5e5, "rope_scaling": LLAMA3},
        {"rope_theta": 5e5, "rope_scaling": {"type" if k == "rope_type" else k: v for k, v in LLAMA3.items()}},
        {"rope_theta": None, "rope_parameters": LLAMA3 | {"rope_theta": 5e5}},
        {"rope_theta": 5e5, "rope_scaling": LLAMA3, "rope_parameters": LLAMA3},
    ],
    ids=["transformers 4", "its first releases", "transformers 5", "both"],
)  # fmt: skip
def test_a_rope_scaling_is_read_in_every_spelling(spelling):
    config = read_hf(**spelling)
    assert (config.rope_theta, config.rope_scaling) == (5e5, SCALING)


@pytest.mark.parametrize("plain", [None, {"rope_type": "default"}, {"rope_theta": 100, "rope_type": "default"}])
def test_plain_angles_are_read_in_every_spelling(plain):
    assert read_hf(rope_parameters=plain).rope_scaling is None
    assert read_hf(rope_scaling=plain).rope_theta == 100.0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_type", "mistral"), ("hidden_act", "gelu"), ("attention_bias", True), ("mlp_bias", True),
        ("sliding_window", 4096), ("partial_rotary_factor", 0.5), ("is_encoder_decoder", True),
        ("pruned_heads", {"0": [1]}), ("logit_scale", 0.0625), ("residual_multiplier", 0.22), ("use_rope", False),
        ("is_causal", False), ("model_type", "qwen2"), ("model_type", "gemma2"), ("hidden_act", "x" * 10_000),
    ],
)  # fmt: skip
def test_a_field_that_changes_the_mathematics_is_named(field, value):
    with pytest.raises(BadModelFile, match=rf"^config.json: {field} is .*, which is another model") as raised:
        read_hf(**{field: value})
    assert len(str(raised.value)) < 250


def test_unknown_fields_are_named_the_first_three_and_how_many_more_there_are():
    with pytest.raises(BadModelFile, match=r"^config.json: unknown field attention_multiplier, zzz: it may change"):
        read_hf(zzz=1, attention_multiplier=2.0)
    with pytest.raises(BadModelFile, match=r"unknown field u000, u001, u002, and 297 more: it may") as raised:
        read_hf(**{f"u{i:03}": 1 for i in range(300)})
    assert len(str(raised.value)) < 250


def test_an_unknown_field_may_be_off_but_not_zero():
    for off in (None, False, "", [], {}):
        assert read_hf(use_something=off) == read_hf()
    for on in (True, 0, 0.0, 1, "yes", [0], {"a": None}):
        with pytest.raises(BadModelFile, match=r"unknown field use_something: "):
            read_hf(use_something=on)


HARMLESS = {
    "architectures": ["LlamaForCausalLM"], "torch_dtype": "float16", "dtype": "bfloat16", "use_cache": False,
    "pretraining_tp": 2, "max_position_embeddings": 512, "unsloth_fixed": True, "unsloth_version": "2025.1",
    "_attn_implementation": "flash_attention_2", "_attn_implementation_autoset": True, "_name_or_path": "a/b",
    "_flash_attn_2_enabled": True, "_commit_hash": "0" * 40, "attn_implementation": "sdpa", "neftune_noise_alpha": 5.0,
    "hidden_act": "swish", "transformers_version": "4.45.0", "quantization_config": None, "sliding_window": None,
    "attention_dropout": 0.1, "gradient_checkpointing": True, "logit_scale": 1.0, "attention_bias": None,
    "tie_word_embeddings": None, "auto_map": {"AutoTokenizer": ["tokenization_x.X", None]}, "use_rope": True,
}  # fmt: skip


@pytest.mark.parametrize("field", HARMLESS)
def test_a_field_that_does_not_touch_the_logits_is_passed_over(field):
    assert read_hf(**{field: HARMLESS[field]}) == read_hf()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("quantization_config", {"quant_method": "gptq", "bits": 4, "desc_act": False}, "are quantized .gptq., which"),
        ("quantization_config", {"bits": 4}, "are quantized .method unknown., which is not read; give the folder"),
        ("quantization_config", "int8", "are quantized .method unknown., which is not read"),
        ("auto_map", {"AutoConfig": "c.C", "AutoModelForCausalLM": "m.M"}, "computed by code in its folder, which is"),
        ("auto_map", "m.M", "computed by code in its folder, which is never run"),
    ],
)
def test_a_model_that_is_not_kept_as_plain_weights_is_refused_with_the_reason(field, value, message):
    with pytest.raises(BadModelFile, match=rf"^config.json: {field}: .*{message}") as raised:
        read_hf(**{field: value})
    assert len(str(raised.value)) < 250


@pytest.mark.parity
@pytest.mark.parametrize("field", ["pretraining_tp", "hidden_act", "_attn_implementation", "unsloth_fixed"])
def test_transformers_computes_the_same_logits_with_such_a_field(field):
    import torch
    import transformers

    value = "sdpa" if field == "_attn_implementation" else HARMLESS[field]
    logits = []
    for changes in ({}, {field: value}):
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**HF | {"pad_token_id": 0} | changes)).eval()
        logits.append(model(torch.arange(1, 9)[None]).logits.detach().numpy())
    np.testing.assert_allclose(logits[1], logits[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": "16"}, "hidden_size must be a whole number, not '16'"),
        ({"hidden_size": 16.0}, "hidden_size must be a whole number, not 16.0"),
        ({"hidden_size": None}, "hidden_size must be a whole number, not None"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be more than 0 and less than 2.63, not 0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be more than 0 and less than 2.63, not nan"),
        ({"rms_norm_eps": 10**400}, r"rms_norm_eps must be more than 0 and less than 2.63, not 1000*$"),
        ({"hidden_size": 10**400}, r"hidden_size must be more than 0 and less than 2.63, not 1000*$"),
        ({"vocab_size": 2**40}, "config.json: V is 1099511627776: it must be at least 1 and be below 2147483648"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings must be true or false, not 1"),
        ({"hidden_size": 18}, "hidden_size 18 is no multiple of num_attention_heads 4; give head_dim"),
        ({"num_key_value_heads": 3}, "model.N .* must be a multiple of model.K"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling: type is 'linear', which is another model"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling: rope_type is 'yarn', which is another model"),
        ({"rope_scaling": 2.0}, "rope_scaling must hold fields or null, not 2.0"),
        ({"rope_scaling": LLAMA3 | {"beta": 1}}, "rope_scaling: unknown field beta"),
        ({"rope_scaling": LLAMA3 | {"factor": None}}, "rope_scaling: factor must be a number, not None"),
        (
            {"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}},
            "rope_scaling: low_freq_factor is 4.0: it must be below high",
        ),
        ({"rope_scaling": LLAMA3 | {"type": "default"}}, "rope_scaling: rope_type and type contradict each other"),
        ({"rope_scaling": LLAMA3, "rope_parameters": {"rope_type": "default"}}, "contradict each other"),
        ({"rope_parameters": {"rope_theta": 7.0}}, "rope_parameters: rope_theta is 7.0, and 100.0 outside of it"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5, which is another model"),
    ],
)
def test_a_field_with_an_impossible_value_is_named(changes, message):
    with pytest.raises(BadModelFile, match=message):
        read_hf(**changes)


@given(tied=st.booleans(), scaled=st.booleans(), name=st.sampled_from(sorted(PRESETS)))
def test_what_is_written_is_read_again(tied, scaled, name):
    config = dataclasses.replace(PRESETS[name](), tied=tied, rope_scaling=SCALING if scaled else None)
    document = json.loads(json.dumps(to_hf(config, {"bos_token_id": 1})))
    choices = {name: getattr(config, name) for name in CHOICES}
    assert from_hf(document, "", **choices) == config


@pytest.mark.parity
@pytest.mark.parametrize("scaling", [None, SCALING])
def test_transformers_reads_what_is_written_and_the_other_way_round(tmp_path, tiny_config, scaling):
    import transformers

    config = dataclasses.replace(tiny_config, rope_theta=5e5, rope_scaling=scaling)
    (tmp_path / "config.json").write_text(json.dumps(to_hf(config, {"bos_token_id": 3, "eos_token_id": 4})))
    theirs = transformers.LlamaConfig.from_pretrained(tmp_path)
    assert theirs.rope_parameters["rope_theta"] == 5e5
    assert theirs.rope_parameters["rope_type"] == ("default" if scaling is None else "llama3")
    assert (theirs.head_dim, theirs.bos_token_id, theirs.rms_norm_eps) == (8, 3, 1e-5)
    theirs.save_pretrained(tmp_path)
    saved = read_json(epath.Path(tmp_path / "config.json"))
    assert "rope_parameters" in saved
    assert from_hf(saved, "", param_dtype="float32", compute_dtype="float32", remat="dots") == config


# --- Meta -------------------------------------------------------------------------------------------------------------

LLAMA2_7B = {"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-5, "vocab_size": -1}
LLAMA2_70B = {
    "dim": 8192, "multiple_of": 4096, "ffn_dim_multiplier": 1.3, "n_heads": 64, "n_kv_heads": 8, "n_layers": 80,
    "norm_eps": 1e-5, "vocab_size": -1,
}  # fmt: skip


def read_meta(document, vocabulary=32_000):
    return from_meta(document, "params.json", vocabulary=vocabulary, tied=False, **CHOICES)


@pytest.mark.parametrize(("name", "params"), [("llama2_7b", LLAMA2_7B), ("llama2_70b", LLAMA2_70B)])
def test_the_published_params_json_make_the_presets(name, params):
    assert read_meta(params) == PRESETS[name]()


# As they are published with Llama 3.1 and 3.2. The factors are not in the files.
LLAMA3_PARAMS = {"n_kv_heads": 8, "norm_eps": 1e-5, "rope_theta": 500_000.0, "vocab_size": 128_256}
SCALED = {
    "llama3_1_8b": {"dim": 4096, "n_heads": 32, "n_layers": 32, "ffn_dim_multiplier": 1.3, "multiple_of": 1024},
    "llama3_2_1b": {"dim": 2048, "n_heads": 32, "n_layers": 16, "ffn_dim_multiplier": 1.5, "multiple_of": 256},
    "llama3_2_3b": {"dim": 3072, "n_heads": 24, "n_layers": 28, "ffn_dim_multiplier": 1.0, "multiple_of": 256},
}


@pytest.mark.parametrize("name", SCALED)
def test_scaled_angles_of_a_params_json_are_those_published(name):
    params, wanted = LLAMA3_PARAMS | SCALED[name], PRESETS[name]()
    found = from_meta(params | {"use_scaled_rope": True}, "", vocabulary=128_256, tied=wanted.tied, **CHOICES)
    assert found == wanted
    assert found.rope_scaling.factor == (8.0 if name == "llama3_1_8b" else 32.0)
    plain = from_meta(params | {"use_scaled_rope": False}, "", vocabulary=128_256, tied=wanted.tied, **CHOICES)
    assert plain.rope_scaling is None


def test_llama_3_widths_and_angles_are_those_published():
    params = LLAMA2_7B | {"ffn_dim_multiplier": 1.3, "multiple_of": 1024, "n_kv_heads": 8, "rope_theta": 500_000.0}
    config = read_meta(params | {"vocab_size": 128_256}, vocabulary=128_256)
    assert (config.F, config.K, config.rope_theta) == (14_336, 8, 500_000.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 512}, "params.json: vocab_size is 512, and the weights have 32000"),
        ({"use_scaled_rope": 8.0}, "params.json: use_scaled_rope must be true or false, not 8.0"),
        ({"moe": {"experts": 8}}, "params.json: unknown field moe"),
        ({"dim": 4097}, "params.json: dim 4097 is no multiple of n_heads 32"),
        ({"multiple_of": 0}, "params.json: multiple_of must be more than 0"),
        ({"dim": 10**400}, "params.json: dim must be more than 0 and less than 2.63"),
        ({"ffn_dim_multiplier": 1e308}, "params.json: ffn_dim_multiplier must be more than 0 and less than 2.63"),
        ({"norm_eps": None}, "params.json: norm_eps must be a number, not None"),
    ],
)
def test_params_json_of_another_model_are_refused(changes, message):
    with pytest.raises(BadModelFile, match=message):
        read_meta(LLAMA2_7B | changes)


# --- ours, and the folder ---------------------------------------------------------------------------------------------


def test_a_manifest_is_read_also_from_before_there_were_scalings(tiny_config):
    facts = config_facts(dataclasses.replace(tiny_config, rope_scaling=SCALING))
    choices = {"param_dtype": "bfloat16", "compute_dtype": "float32", "remat": "full"}
    wanted = dataclasses.replace(tiny_config, rope_scaling=SCALING, **choices)
    assert from_manifest({"config": facts}, "", **choices) == wanted
    del facts["rope_scaling"]
    assert from_manifest({"config": facts}, "", **choices).rope_scaling is None
    with pytest.raises(BadModelFile, match="m lacks the field 'config'"):
        from_manifest({"hash": "0"}, "m", **choices)
    with pytest.raises(ValueError, match=r"m: config: field 'D': expected int, found 'x'"):
        from_manifest({"config": facts | {"D": "x"}}, "m", **choices)


def test_special_tokens_come_from_the_configuration_or_else_from_the_tokenizer(tmp_path, stories260k):
    (tmp_path / "config.json").write_text(json.dumps(HF | {"eos_token_id": [7, 8], "max_position_embeddings": 99}))
    carried = hf_fields(epath.Path(tmp_path))
    assert carried == {"max_position_embeddings": 99, "eos_token_id": [7, 8]}
    assert generation_config(carried) == {"_from_model_config": True, "eos_token_id": [7, 8]}
    assert hf_fields(epath.Path(stories260k / "meta")) == {"bos_token_id": 1, "eos_token_id": 2}
    (tmp_path / "config.json").rename(tmp_path / "params.json")
    assert hf_fields(epath.Path(tmp_path)) == {"bos_token_id": None, "eos_token_id": None}
    (tmp_path / "words.json").write_text('["two", "words"]')
    assert hf_fields(epath.Path(tmp_path)) == {"bos_token_id": 1, "eos_token_id": 2}
    (tmp_path / "words.json").write_text('["two"')
    assert hf_fields(epath.Path(tmp_path)) == {"bos_token_id": None, "eos_token_id": None}
