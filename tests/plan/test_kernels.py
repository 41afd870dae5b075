"""Attention in programs compiled for TPUs that are not there."""

import dataclasses
import importlib.util
import re

import jax
import jax.numpy as jnp
import pytest

from configs import base
from srlm_jax.model.folding import Folding
from srlm_jax.pipeline.settings import read
from srlm_jax.plan import chips, hlo, programs

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the extra `plan`"),
    pytest.mark.slow,
]


SIZES = {"V": 512, "D": 128, "L": 2, "N": 4, "K": 2, "H": 64, "F": 256}


def compiled_text(monkeypatch, name, **changes):
    """What the compiler writes of the smoke scale's program for a model of narrow layers."""
    s = read(base.get_config("smoke", 2).to_dict() | {"mesh": {"data": 1, "fsdp": 4, "tensor": 2}} | changes)
    s = dataclasses.replace(s, model=dataclasses.replace(s.model, **SIZES))
    found = programs.programs(s, s.mesh, chips.devices(chips.parse_slice("v5e:2x4")))
    texts = []
    monkeypatch.setattr(hlo, "collectives", lambda text, unknown_trips: texts.append(text))
    programs.compile_program(next(program for program in found if program.name == name))
    return texts[0]


def score_arrays(text):
    """Arrays that have a number for each of at least 128 queries and more than 128 keys; no weight has so many axes.

    The kernel itself writes 128 numbers a query: its log-sum-exp, as often as a TPU's register is wide.
    """
    shapes = re.findall(r"\b(?:f32|bf16|pred)\[([0-9,]+)\]", text)
    sizes = {tuple(map(int, shape.split(","))) for shape in shapes}
    return [shape for shape in sizes if len(shape) > 3 and shape[-2] >= 128 < shape[-1]]


KERNELS = {
    "DPO step": {
        f"splash_mha_{one}"
        for one in ("fwd_segmented_residuals", "dq_segmented_no_residuals", "dkv_segmented_no_residuals")
    },
    "prefill, judgements": {"splash_mha_fwd_residuals", "splash_mha_fwd_segmented_residuals"},
}


@pytest.mark.parametrize("name", sorted(KERNELS))
def test_a_tpu_computes_attention_in_its_kernel_and_holds_no_scores(monkeypatch, name):
    text = compiled_text(monkeypatch, name)
    assert "tpu_custom_call" in text
    assert set(re.findall(r"splash_mha_[a-z_]+residuals", text)) == KERNELS[name]
    assert score_arrays(text) == []


def test_a_tpu_keeps_its_kernel_where_two_answers_share_their_prompt(monkeypatch):
    token_batch = programs._token_batch

    def folded(shape, place, *, packed):
        array = lambda length: jax.ShapeDtypeStruct((shape.rows, length), jnp.int32, sharding=place)
        wide, narrow = array(shape.length + 128), array(shape.length)
        return token_batch(shape, place, packed=packed)._replace(folding=Folding(wide, narrow, narrow, wide))

    monkeypatch.setattr(programs, "_token_batch", folded)
    text = compiled_text(monkeypatch, "DPO step")
    assert set(re.findall(r"splash_mha_[a-z_]+residuals", text)) == KERNELS["DPO step"]
    assert score_arrays(text) == []


def test_a_tpu_decodes_in_its_kernel_from_8_bits_and_never_widens_a_stack_of_weights(monkeypatch):
    """Layers of heads of 128 numbers, three of them, so that their stacks have shapes that nothing else has."""
    monkeypatch.setitem(SIZES, "H", 128)
    monkeypatch.setitem(SIZES, "L", 3)
    monkeypatch.setitem(SIZES, "compute_dtype", "bfloat16")
    engine = {"rows": 96, "steps": 8, "weights": "int8", "cache": "int8"}
    text = compiled_text(monkeypatch, "decode, judgements", engine=engine)
    assert re.search(r"custom-call\(.*flash_decode", text)
    # A chip's half of each: queries, keys and values, and what comes behind attention; then the three of the MLP.
    stacks = {"3,128,2,128", "3,128,1,128", "3,2,128,128", "3,128,128"}
    assert stacks <= set(re.findall(r"\bs8\[([0-9,]+)\]", text))
    assert not stacks & set(re.findall(r"\b(?:bf16|f32)\[([0-9,]+)\]", text))
