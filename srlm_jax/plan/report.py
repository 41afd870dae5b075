"""A plan as text and as a document for JSON."""

import dataclasses
from collections.abc import Sequence

from srlm_jax.plan import hlo, stages
from srlm_jax.plan.chips import GIB
from srlm_jax.plan.planning import Plan, PlannedProgram
from srlm_jax.plan.programs import Compiled, TooLarge

_KINDS = {
    "all-gather": "gather",
    "all-reduce": "reduce",
    "reduce-scatter": "scatter",
    "all-to-all": "exchange",
    "collective-permute": "permute",
}


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns side by side, the first to the left and the others to the right."""
    widths = [max(len(row[i]) for row in (heads, *rows)) for i in range(len(heads))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (heads, *rows)
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"


def _duration(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds * 1e3:.2f} ms"
    return (
        f"{seconds:.2f} s"
        if seconds < 120
        else f"{seconds / 60:.1f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )


def _verdict(program: PlannedProgram) -> str:
    if program.fits:
        return "fits"
    over = program.needed - program.limit
    return f"no: {_gib(over)} too much" if over > 0 else "no"


def memory_table(plan: Plan) -> str:
    """What each program takes of a chip's memory, in GiB."""
    rows = []
    for program in plan.programs:
        compiled = program.compiled
        parts = ["-"] * 4
        if isinstance(compiled, Compiled):
            parts = [_gib(x) for x in (compiled.arguments, compiled.temporaries, compiled.output, compiled.aliased)]
        parts.append(_gib(program.kept))
        used = f"{_gib(program.needed)} of {_gib(program.limit)}"
        rows.append([program.name, _verdict(program), *parts, used])
    return table(["GiB a chip", "", "arguments", "temporaries", "output", "aliased", "kept", "in all"], rows)


def cost_table(plan: Plan) -> str:
    """What each program asks of a chip, and how long it takes at the least."""
    rows = []
    for program in plan.programs:
        cost, roof, compiled = program.cost, program.roofline, program.compiled
        if isinstance(compiled, Compiled) and compiled.collectives is not None:
            sums = hlo.by_kind(compiled.collectives)
            moved = f"{sum(one['bytes'] for one in sums.values()) / 1e9:.2f}"
            kinds = ", ".join(
                f"{_KINDS[kind]} {one['bytes'] / 1e9:.2f}" for kind, one in sums.items() if one["bytes"] > 5e6
            )
        else:
            moved, kinds = f"{cost.link_bytes / 1e9:.2f}", "by formula"
        rows.append(
            [program.name, f"{cost.flops / 1e12:.2f}", f"{cost.memory_bytes / 1e9:.2f}", moved]
            + [_duration(x) for x in (roof.compute_s, roof.memory_s, roof.links_s)]
            + [f"{_duration(roof.seconds)} ({roof.bound})", kinds]
        )
    heads = ["a chip, each run", "TFLOP", "HBM GB", "ICI GB", "compute", "HBM", "ICI", "at least", "of ICI, GB"]
    return table(heads, rows)


def stage_table(plan: Plan, price: float | None) -> str:
    """How often each program runs, and what the iteration costs."""
    rows, times = [], plan.times
    for stage in stages.stages(plan.settings, plan.data):
        seconds = stages.seconds(stage, times)
        runs = ", ".join(f"{count:,.0f} x {name}" for name, count in stage.runs.items())
        rows.append([stage.name, _duration(seconds), f"{seconds * plan.where.chips / 3600:.2f}", runs])
    rows.append(["in all", _duration(plan.seconds), f"{plan.chip_hours:.2f}", ""])
    text = table(["stage", "at least", "chip-hours", "runs"], rows)
    if price is not None:
        text += f"\n{plan.chip_hours:.2f} chip-hours at {price:g} each: {plan.chip_hours * price:.2f}"
    return text


def advice(program: PlannedProgram) -> list[str]:
    """Of a program that does not fit: which arrays it is, and what to change."""
    lines = [f"{program.name} does not fit: it needs {_gib(program.needed)} GiB a chip of {_gib(program.limit)}."]
    if program.arguments:
        largest = ", ".join(f"{name} {_gib(size)}" for name, size in program.arguments[:3])
        lines.append(f"  largest arguments, GiB: {largest}")
    if isinstance(program.compiled, TooLarge):
        if program.compiled.largest:
            lines.append(f"  largest results: {', '.join(program.compiled.largest)}")
        lines.append(f"  the compiler: {program.compiled.said}")
    if program.name.startswith(("prefill", "decode")):
        change = (
            "raise config.mesh.tensor (weights and heads on more chips), lower config.engine.rows, or use more chips"
        )
    elif program.name == "reshard":
        change = "raise config.mesh.tensor, or use more chips: both copies of the weights are held for a moment"
    elif program.name == "reference":
        change = "lower config.reference_batch or config.context_length, or use more chips"
    else:
        part = program.name.split()[0].lower()
        change = (
            f"raise config.{part}.train.accumulate or config.mesh.tensor, lower config.context_length, train adapters "
            "alone (config.lora.rank), or use more chips"
        )
    return [*lines, f"  to change: {change}"]


def text(plan: Plan, price: float | None) -> str:
    """The whole plan."""
    c, mesh, chip = plan.settings.model.llama, plan.mesh, plan.where.chip
    how = "compiled, nothing run" if chip.tpu else "by formula, nothing compiled"
    trained = "" if (rank := plan.settings.lora.rank) is None else f", in training adapters of rank {rank} alone,"
    parts = [
        f"{c.parameters:,} parameters{trained} on {plan.where.name}, {plan.where.chips} chips: data {mesh.data} x "
        f"fsdp {mesh.fsdp} x tensor {mesh.tensor}; {how}",
        memory_table(plan),
    ]
    for program in plan.programs:
        if not program.fits:
            parts.append("\n".join(advice(program)))
    parts += [
        cost_table(plan),
        stage_table(plan, price),
        "Assumed: " + ".\nAssumed: ".join(stages.assumptions(plan.settings, plan.data)) + ".",
        f"A chip: {chip.flops / 1e12:g} TFLOP/s (bfloat16), {chip.bandwidth / 1e9:g} GB/s of memory, "
        f"{plan.where.link_bandwidth / 1e9:g} GB/s from other chips in this shape of slice.",
    ]
    done = [program.compiled for program in plan.programs if isinstance(program.compiled, Compiled)]
    if done:
        parts.append(
            f"Compiled in {sum(one.wall_s for one in done):.0f} s ({sum(one.cpu_s for one in done):.0f} s of one "
            f"processor), {max(one.host_bytes for one in done) / GIB:.2f} GiB of this machine's memory at most."
        )
    return "\n\n".join(parts)


def document(plan: Plan, price: float | None) -> dict[str, object]:
    """The plan for JSON: bytes, seconds and operations for one chip and one run of a program."""

    def one(program: PlannedProgram) -> dict[str, object]:
        compiled = program.compiled
        said: dict[str, object] | None = None
        if isinstance(compiled, Compiled):
            said = {
                "arguments": compiled.arguments,
                "temporaries": compiled.temporaries,
                "output": compiled.output,
                "aliased": compiled.aliased,
                "collectives": None if compiled.collectives is None else hlo.by_kind(compiled.collectives),
                "product_flops": compiled.product_flops,
                "memory_bytes": compiled.memory_bytes,
                "wall_s": compiled.wall_s,
                "cpu_s": compiled.cpu_s,
                "host_bytes": compiled.host_bytes,
            }
        elif isinstance(compiled, TooLarge):
            said = dataclasses.asdict(compiled)
        return {
            "name": program.name,
            "fits": program.fits,
            "needed": program.needed,
            "kept": program.kept,
            "limit": program.limit,
            "largest_arguments": dict(program.arguments),
            "formula": dataclasses.asdict(program.cost),
            "compiler": said,
            "roofline": dataclasses.asdict(program.roofline) | {"bound": program.roofline.bound},
        }

    times = plan.times
    return {
        "topology": plan.where.name,
        "chips": plan.where.chips,
        "mesh": dataclasses.asdict(plan.mesh),
        "parameters": plan.settings.model.llama.parameters,
        "fits": plan.fits,
        "programs": [one(program) for program in plan.programs],
        "stages": [
            {"name": stage.name, "seconds": stages.seconds(stage, times), "runs": dict(stage.runs)}
            for stage in stages.stages(plan.settings, plan.data)
        ],
        "seconds": plan.seconds,
        "chip_hours": plan.chip_hours,
        "price": None if price is None else plan.chip_hours * price,
        "assumptions": stages.assumptions(plan.settings, plan.data),
    }
