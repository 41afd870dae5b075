"""The command, for chips by formula and, where their compiler is installed, for a slice of TPUs that is not there."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from configs import base
from srlm_jax.model.lora import LoraConfig
from srlm_jax.parallel.mesh import MeshShape
from srlm_jax.pipeline.settings import BadConfig, read
from srlm_jax.plan import chips, formulas, planning, programs, report, stages
from srlm_jax.plan.programs import Compiled, TooLarge

ROOT = Path(__file__).parents[2]
needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the extra `plan`")


def settings(scale, models=2, **mesh):
    return read(base.get_config(scale, models).to_dict() | ({"mesh": {"data": 1} | mesh} if mesh else {}))


def silent(said):
    pass


# --- by formula -------------------------------------------------------------------------------------------------------


def test_a_gpu_is_planned_by_formula():
    plan = planning.make_plan(settings("llama2_7b"), "h200:8", silent)
    assert plan.fits
    assert {program.compiled for program in plan.programs} == {None}
    text = report.text(plan, 2.5)
    assert "6,738,415,616 parameters on h200:8, 8 chips: data 1 x fsdp 8 x tensor 1; by formula" in text
    assert f"{plan.chip_hours:.2f} chip-hours at 2.5 each: {plan.chip_hours * 2.5:.2f}" in text


def test_adapters_make_room_for_a_7b_on_one_gpu():
    s = settings("llama2_7b")
    kept = dataclasses.replace(s.model, param_dtype="bfloat16")
    adapted = dataclasses.replace(s, model=kept, lora=LoraConfig(rank=16, alpha=16.0))
    plan = planning.make_plan(adapted, "h100:1", silent)
    assert plan.fits
    assert "6,738,415,616 parameters, in training adapters of rank 16 alone, on h100:1" in report.text(plan, None)
    assert "train adapters alone (config.lora.rank)" in report.text(planning.make_plan(s, "h100:1", silent), None)
    full = planning.make_plan(dataclasses.replace(s, model=kept), "h100:1", silent)
    step, whole = (next(one for one in p.programs if one.name == "SFT step") for p in (plan, full))
    assert whole.needed - step.needed == pytest.approx(3 * 2 * s.model.llama.parameters, rel=0.05)
    with pytest.raises(BadConfig, match=r"^config\.lora: rank is 5000, more than the 4096 .*model\.D\)$"):
        planning.make_plan(dataclasses.replace(s, lora=LoraConfig(rank=5_000, alpha=16.0)), "h100:1", silent)


def test_weights_in_8_bits_make_room_to_sample_from_a_70b_on_v5e():
    """Its eight key-value heads bound `tensor`: an eighth of the weights in bfloat16 is more than a chip has."""
    exact, where, mesh = settings("llama2_70b"), chips.parse_slice("v5e:8x16"), MeshShape(data=1, fsdp=16, tensor=8)
    rounded = dataclasses.replace(exact, engine=dataclasses.replace(exact.engine, weights="int8"))
    refused = [program.name for program in planning.by_formula(exact, where, mesh).programs if not program.fits]
    assert {"decode, judgements", "reshard"} <= set(refused)
    plan = planning.by_formula(rounded, where, mesh)
    assert plan.fits
    # The model as it is trained, the same rounded, and the rounded copy of an eighth.
    reshard, c = plan.programs[-1], exact.model.llama
    wanted = 4 * c.parameters / 128 + formulas.rounded_bytes(c) / 128 + formulas.sample_bytes(c, "int8") / 8
    assert (reshard.name, reshard.needed) == ("reshard", pytest.approx(wanted))


def test_what_does_not_fit_says_which_program_by_how_much_and_what_to_change():
    """A 70B on eight H100s: 8 bytes of every parameter are moments alone, 69 GB a chip."""
    plan = planning.make_plan(settings("llama2_70b", fsdp=-1, tensor=8), "h100:8", silent)
    assert not plan.fits
    step = next(program for program in plan.programs if program.name == "DPO step")
    text = report.text(plan, None)
    assert f"DPO step does not fit: it needs {step.needed / 2**30:.2f} GiB a chip of 75.00." in text
    assert "raise config.dpo.train.accumulate" in text


def test_the_smallest_slice_and_its_fastest_mesh():
    plan = planning.make_plan(settings("llama2_7b"), "auto:h200", silent)
    smaller = [where for where in chips.slices("h200") if where.chips < plan.where.chips]
    assert plan.fits
    assert all(planning.candidates(plan.settings, where) == [] for where in smaller)
    others = [
        planning.by_formula(plan.settings, plan.where, MeshShape(data=1, fsdp=f, tensor=t))
        for f, t in chips.splits(plan.where.chips)
    ]
    assert plan.seconds == min(other.seconds for other in others if other.fits)


@pytest.mark.parametrize(
    ("topology", "said"),
    [
        ("v5p", "is no slice"),
        ("v9:4x4", "is no slice"),
        ("v5p:4x4", "a slice of v5p has 3 numbers"),
        ("v5e:0x4", "a slice of v5e has 2 numbers"),
        ("auto:v9", "no chip is named 'v9'"),
    ],
)
def test_slices_that_do_not_exist(topology, said):
    with pytest.raises(ValueError, match=said):
        planning.make_plan(settings("llama2_7b"), topology, silent)


def test_a_mesh_that_the_model_or_the_batches_do_not_allow_is_refused_with_those_that_they_do():
    with pytest.raises(BadConfig, match=r"does not divide config.model.K \(8\)\. On h100:16 .* can be: 16 x 1, 8 x 2"):
        planning.make_plan(settings("llama2_70b", fsdp=1, tensor=16), "h100:16", silent)
    with pytest.raises(BadConfig, match=r"32 groups of devices .* cannot share"):
        planning.make_plan(settings("llama2_7b", fsdp=32, tensor=1), "h100:32", silent)


def test_stages_follow_the_numbers_of_the_configuration():
    s = settings("llama2_7b")
    found = {stage.name: stage.runs for stage in stages.stages(s, 16)}
    assert found["DPO"]["DPO step"] == s.dpo.train.steps
    answers = 2 * 0.75 * s.self_instruction.prompts
    assert found["reference"]["reference"] == pytest.approx(answers * 1.03 * 496 / 2048 / s.reference_batch)
    padded = {stage.name: stage.runs for stage in stages.stages(dataclasses.replace(s, packed=False), 16)}
    assert padded["reference"]["reference"] == answers / s.reference_batch
    # Sixteen groups are held at once, four rows each; 400 tokens in calls of `steps`.
    assert found["responses"]["decode, responses"] == 8_000 * 4 * 400 / (64 * s.engine.steps)
    own = dataclasses.replace(s, self_instruction=dataclasses.replace(s.self_instruction, prompts_file="prompts.jsonl"))
    assert "new prompts" not in {stage.name for stage in stages.stages(own, 16)}
    one = settings("llama2_7b", models=1)
    assert [stage.name for stage in stages.stages(one, 16)][:2] == ["SFT baseline", "EFT judgements"]
    ranks = dataclasses.replace(one, seed_data=dataclasses.replace(one.seed_data, eft="ranks"))
    assert [stage.name for stage in stages.stages(ranks, 16)][:2] == ["SFT baseline", "SFT of M1"]
    server = dataclasses.replace(s.judging.endpoint, url="http://localhost:9/v1", model="judge")
    outside = dataclasses.replace(s, judging=dataclasses.replace(s.judging, endpoint=server))
    assert "judgements" not in {stage.name for stage in stages.stages(outside, 16)}


# --- what the compiler says -------------------------------------------------------------------------------------------

REFUSAL = """RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. \
Used 20.90G of 15.75G hbm. Exceeded hbm capacity by 5.15G.

Total hbm usage >= 21.15G:
  Largest program allocations in hbm:

  1. Size: 16.00G
     Operator: op_name="jit(f)/mul"
     Shape: f32[65536,65536]{1,0:T(8,128)}
     Unpadded size: 16.00G
"""


def test_a_refusal_is_read():
    found = programs.too_large(REFUSAL)
    assert (found.needed, found.limit) == (20.9 * 2**30, 15.75 * 2**30)
    assert found.largest == ["f32[65536,65536] (16.00G)"]
    assert found.said.startswith("RESOURCE_EXHAUSTED: XLA:TPU") and "\n" not in found.said


@pytest.fixture(scope="module")
def tiny_plan():
    """The smoke scale's batches on eight TPUs, fsdp 4 x tensor 2, for a model whose sizes the TPU need not pad."""
    s = settings("smoke", fsdp=4, tensor=2)
    sizes = {"V": 512, "D": 512, "L": 4, "N": 4, "K": 2, "H": 128, "F": 1024}
    s = dataclasses.replace(s, model=dataclasses.replace(s.model, **sizes), reference_batch=16)
    return planning.make_plan(s, "v5e:2x4", silent)


@needs_libtpu
@pytest.mark.slow
def test_every_program_is_compiled_for_a_slice_that_is_not_there(tiny_plan):
    names = ["SFT step", "reference", "DPO step"]
    names += [f"{part}, {stage}" for stage in ("responses", "judgements") for part in ("prefill", "decode")]
    assert [program.name for program in tiny_plan.programs] == [*names, "reshard"]
    assert tiny_plan.fits
    assert all(isinstance(program.compiled, Compiled) for program in tiny_plan.programs)
    document = json.loads(json.dumps(report.document(tiny_plan, 1.2)))
    assert document["fits"] and len(document["programs"]) == len(names) + 1
    assert "compiled, nothing run" in report.text(tiny_plan, 1.2)


@needs_libtpu
@pytest.mark.slow
def test_a_training_step_updates_in_place(tiny_plan):
    """Weights and moments, 12 bytes a parameter, are given and returned in the same memory, an eighth on a chip."""
    for program in tiny_plan.programs:
        if program.name.endswith("step"):
            kept = 12 * tiny_plan.settings.model.llama.parameters / 8
            assert program.compiled.aliased > 0.99 * kept
            assert program.compiled.arguments < 1.5 * kept


@needs_libtpu
@pytest.mark.slow
def test_a_step_of_adapters_takes_frozen_weights_and_returns_none():
    s = settings("smoke", fsdp=4, tensor=2)
    sizes = {"V": 512, "D": 512, "L": 4, "N": 4, "K": 2, "H": 128, "F": 1024, "param_dtype": "bfloat16"}
    s = dataclasses.replace(s, model=dataclasses.replace(s.model, **sizes), reference_batch=16)
    s = dataclasses.replace(s, lora=LoraConfig(rank=8, alpha=16.0))
    step, *_ = programs.programs(s, s.mesh, chips.devices(chips.parse_slice("v5e:2x4")))
    names = {name.split(".")[0] for name, _ in programs.argument_bytes(step)}
    assert {"adapters", "frozen weights"} <= names and "weights" not in names
    said, frozen = programs.compile_program(step), 2 * s.model.llama.parameters / 8
    assert said.arguments < 1.05 * (frozen + said.output)  # weights; adapters and moments; a batch
    assert said.aliased > 0.99 * said.output < frozen  # of all weights and moments it would be six times `frozen`


@needs_libtpu
@pytest.mark.slow
def test_a_training_step_moves_a_layer_at_a_time_and_each_chip_its_own_rows(tiny_plan):
    """A chip's rows of the residual stream are 4 x 320 x 512 numbers, all rows four times that; a stacked weight of the
    MLP is 4 x 512 x 1024, half of it on a chip when it is gathered."""
    c = tiny_plan.settings.model.llama
    steps = [program for program in tiny_plan.programs if program.name.endswith("step")]
    for program in steps:
        wide = [one for one in program.compiled.collectives if one.numbers >= c.L * c.D * c.F // 2]
        assert not wide, program.name
        assert any(one.runs % c.L == 0 and one.numbers >= c.D * c.D // 2 for one in program.compiled.collectives)


@needs_libtpu
@pytest.mark.slow
def test_no_program_gathers_all_layers(tiny_plan):
    c = tiny_plan.settings.model.llama
    for program in tiny_plan.programs:
        gathered = [one for one in program.compiled.collectives if one.kind == "all-gather"]
        # What has five axes is no weight: new keys and values, on their way to the slots of their rows.
        weights = [one for one in gathered if one.result.count(",") < 4]
        if program.name != "reshard":
            assert all(one.numbers < c.L * c.D * c.F // 2 for one in weights), program.name


@needs_libtpu
@pytest.mark.slow
def test_decoding_moves_no_weights(tiny_plan):
    """Nothing that a decoding gathers is as large as a chip's part of a layer's smallest matrix."""
    c = tiny_plan.settings.model.llama
    for program in tiny_plan.programs:
        if program.name.startswith("decode"):
            gathered = [one for one in program.compiled.collectives if one.kind == "all-gather"]
            assert all(one.numbers < c.D * c.K * c.H // 2 for one in gathered), program.name


@needs_libtpu
@pytest.mark.slow
def test_a_program_that_is_too_large_is_told_and_not_raised():
    s = settings("smoke", fsdp=4, tensor=2)
    s = dataclasses.replace(s, model=dataclasses.replace(s.model, D=16_384, F=131_072, V=65_536), reference_batch=4)
    (found,) = (
        p for p in programs.programs(s, s.mesh, chips.devices(chips.parse_slice("v5e:2x4"))) if p.name == "reshard"
    )
    said = programs.compile_program(found)
    assert isinstance(said, TooLarge)
    assert programs.argument_bytes(found)[0][0].startswith("weights")


# --- the command ------------------------------------------------------------------------------------------------------


def run(*flags):
    command = [sys.executable, "-m", "srlm_jax.plan", *flags]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)


def test_the_command(tmp_path):
    done = run(
        "--config=configs/iter2.py:llama2_7b",
        "--topology=auto",
        "--family=h200",
        "--price=3",
        f"--json={tmp_path}/plan.json",
    )
    assert done.returncode == 0, done.stderr
    document = json.loads((tmp_path / "plan.json").read_text())
    assert document["fits"] and document["topology"] in done.stdout
    assert document["price"] == pytest.approx(3 * document["chip_hours"])


def test_the_command_tells_what_is_wrong_in_a_line():
    done = run("--config=configs/iter2.py:llama2_7b", "--topology=v5p:4x4")
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("error: --topology='v5p:4x4'")
    assert "Traceback" not in done.stderr


def test_a_plan_that_does_not_fit_ends_with_a_code_of_its_own():
    done = run("--config=configs/iter2.py:llama2_70b", "--topology=h100:8")
    assert (done.returncode, "does not fit" in done.stdout) == (3, True)
