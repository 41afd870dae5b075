"""Llama 2's own programs on slices that people rent: whether they fit with room to spare, and the kernels in them."""

import importlib.util

import pytest

from configs import base
from srlm_jax.parallel.mesh import MeshShape
from srlm_jax.pipeline.settings import read
from srlm_jax.plan import chips, hlo, programs
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
    ("llama2_13b", "v5e:4x8", 4, 8),
    ("llama2_13b", "v6e:4x4", 2, 8),
    ("llama2_70b", "v5p:2x4x4", 4, 8),
]


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
        with capsys.disabled():
            found = f"{needed / chips.GIB:.2f} of {where.chip.memory / chips.GIB:.2f} GiB"
            taken = f"compiled in {said.wall_s:.0f} s ({said.cpu_s:.0f} s of a processor)"
            print(f"\n{scale}, {topology}: {program.name}: {found}, {taken}")
        assert needed <= 0.9 * where.chip.memory, program.name
        assert PROGRAMS[program.name] in texts[-1]
