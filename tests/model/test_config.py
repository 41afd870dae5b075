"""The published sizes, and configurations that cannot be."""

import dataclasses
import math

import jax
import pytest

from srlm_jax.model import llama
from srlm_jax.model.config import PRESETS, RopeScaling, tiny

# As published; the tiny one is counted by hand:
# 320 * 128 embedding + 4 * (128 * 32 * (2 * 4 + 2 * 2) attention + 3 * 128 * 384 MLP + 2 * 128 norms) + 128.
PARAMETERS = {
    "llama2_7b": 6_738_415_616,
    "llama2_13b": 13_015_864_320,
    "llama2_70b": 68_976_648_192,
    "tinyllama_1b": 1_100_048_384,
    "smollm2_135m": 134_515_008,
    "smollm2_360m": 361_821_120,
    "smollm2_1_7b": 1_711_376_384,
    "llama3_1_8b": 8_030_261_248,
    "llama3_2_1b": 1_235_814_400,
    "llama3_2_3b": 3_212_749_824,
    "tiny": 869_504,
}


def test_every_preset_has_a_known_size():
    assert PRESETS.keys() == PARAMETERS.keys()


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_preset_has_as_many_parameters_as_published(name):
    config = PRESETS[name]()
    assert config.parameters == PARAMETERS[name]
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(llama.abstract(config))) == PARAMETERS[name]


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_preset_keeps_its_weights_in_the_parameter_dtype(name):
    config = PRESETS[name]()
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(llama.abstract(config))} == {config.param_dtype}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"L": 0}, r"^L is 0: it must be at least 1 and be below 2147483648$"),
        ({"D": 2**31}, r"^D is 2147483648: it must be at least 1 and be below"),
        ({"N": 4, "K": 3}, r"model.N \(4 query heads\) must be a multiple of model.K \(3 key-value heads\)"),
        ({"H": 7}, "model.H must be even, not 7"),
    ],
)
def test_an_impossible_model_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(tiny(), **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"factor": 0.5}, "factor is 0.5: it must be at least 1"),
        ({"low_freq_factor": 4.0}, "low_freq_factor is 4.0: it must be below high_freq_factor"),
    ],
)
def test_an_impossible_rope_scaling_is_refused(change, message):
    scaling = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=64)
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(scaling, **change)
