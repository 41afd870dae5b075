"""Llama 2's own programs on slices that people rent: whether they fit with room to spare, the kernels in them, that
they compute nothing twice that they need not, and that decoding reads what it must and moves no weights."""

import importlib.util

import pytest

from configs import base
from srlm_jax.parallel.mesh import MeshShape
from srlm_jax.pipeline.settings import read
from srlm_jax.plan import chips, formulas, hlo, programs
from srlm_jax.plan.programs import Compiled

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the extra `plan`"),
    pytest.mark.long,
]

# Each program with the kernel that it is to have.
PROGRAMS = {"DPO step": "splash_mha", "prefill, judgements": "splash_mha", "decode, judgements": "flash_decode"}
PODS = [
    ("llama2_7b", "v5e:4x4", 2, 8),
    ("llama2_7b", "v6e:4x4", 8, 2),
    ("llama2_13b", "v5e:4x4", 2, 8),
    ("llama2_13b", "v5e:4x8", 4, 8),
    ("llama2_13b", "v6e:4x4", 2, 8),
    ("llama2_70b", "v5p:2x4x4", 4, 8),
]


def needed_flops(s, shape, name):
    """A chip's share of the model's own products, forward and back, attention's scores left out: what nobody can do
    without; and how much of it a program may do."""
    c, split = s.model.llama, programs.train_split(shape)
    if name == "DPO step":
        rows, length = programs.train_shapes(s, split.rows)[name]
        tokens = split.own_rows(rows) * length
        forward = formulas.block_flops(c, tokens, 0) + formulas.head_flops(c, tokens)
        return 3 * forward / split.tensor, 1.36 if c.remat == "full" else 1.05
    split = programs.sample_split(shape)
    sampled = programs.sampling_shapes(s, split.rows)["judgements"]
    room = sampled.room
    if name == "prefill, judgements":
        shared, rest, _ = room.slots
        tokens = split.own_rows(sampled.at_once) * (shared + room.prompts * rest)
        return formulas.block_flops(c, tokens, 0) / split.tensor, 1.05
    rows = split.own_rows(room.rows)
    forward = formulas.block_flops(c, rows, 0) + formulas.head_flops(c, rows)
    return s.engine.steps * forward / split.tensor, 1.05


@pytest.mark.parametrize(("scale", "topology", "fsdp", "tensor"), PODS)
def test_a_pod_has_room_for_each_program_and_a_tenth_to_spare(monkeypatch, capsys, scale, topology, fsdp, tensor):
    """What each takes to compile is printed, since no test asserts a time."""
    s, where = read(base.get_config(scale, 2).to_dict()), chips.parse_slice(topology)
    texts, collectives = [], hlo.collectives

    def read_program(text, unknown_trips):
        texts.append(text)
        return collectives(text, unknown_trips=unknown_trips)

    monkeypatch.setattr(hlo, "collectives", read_program)
    shape = MeshShape(data=1, fsdp=fsdp, tensor=tensor)
    for program in programs.programs(s, shape, chips.devices(where)):
        if program.name not in PROGRAMS:
            continue
        said = programs.compile_program(program)
        assert isinstance(said, Compiled), said
        needed = said.peak + programs.kept_bytes(s, shape, program.name)
        flops, most = needed_flops(s, shape, program.name)
        with capsys.disabled():
            print(
                f"\n{scale}, {topology}: {program.name}: {needed / chips.GIB:.2f} of "
                f"{where.chip.memory / chips.GIB:.2f} GiB, {said.product_flops / flops:.3f} x the products, "
                f"{said.memory_bytes / program.cost.memory_bytes:.2f} x the bytes, "
                f"compiled in {said.wall_s:.0f} s ({said.cpu_s:.0f} s of a processor)"
            )
        assert needed <= 0.9 * where.chip.memory, program.name
        assert PROGRAMS[program.name] in texts[-1]
        assert 0.99 <= said.product_flops / flops <= most, program.name
        if program.name.startswith("decode"):
            c = s.model.llama
            assert program.cost.memory_bytes / said.memory_bytes >= 0.85, "more is read and written than must be"
            wide = [one for one in said.collectives if one.numbers >= c.D * c.K * c.H // tensor]
            assert not wide, "a chip's part of a layer's smallest matrix, or more, moves in each step"
