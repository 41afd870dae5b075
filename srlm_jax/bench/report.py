"""What was measured: as a document, and as a table to be read."""

import dataclasses
from collections.abc import Mapping

import jax

from srlm_jax.bench import peer_process, sides
from srlm_jax.bench.ceilings import Ceilings
from srlm_jax.bench.setting import Setting, device

_LETTERS = "VDLNKHF"
_PARTS = {"seconds": "all", "reading_seconds": "reading", "writing_seconds": "writing"}


def document(setting: Setting, ceilings: Ceilings, measured: Mapping[str, object]) -> dict[str, object]:
    """All of a command, ready to be written as JSON."""
    summary = measured["summary"]
    parts = list(dict.fromkeys(part for found in summary for part in found["parts"]))
    return {
        "command": setting.command,
        "device": device(),
        "backend": jax.default_backend(),
        "versions": peer_process.our_versions() | measured["versions"],
        "shape_name": setting.shape,
        "shape": {letter: getattr(setting.config, letter) for letter in _LETTERS},
        "parameters": setting.config.parameters,
        "dtypes": setting.dtypes,
        "workload": dataclasses.asdict(setting.workload),
        "work": measured["work"],
        "units": measured["units"],
        "peer_rows": setting.peer_rows,
        "repeat": setting.repeat,
        "ceilings": dataclasses.asdict(ceilings),
        "device_peak_bytes": device_peak(),
        "runs": measured["runs"],
        "summary": summary,
        "ratio": {part: found for part in parts if (found := sides.ratios(summary, part))},
    }


def device_peak() -> int | None:
    """The most of the device's own memory that this process has had so far, None where it has none of its own."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def table(found: Mapping[str, object]) -> str:
    """A document as text. GF/s and GB/s are thousand millions a second, MB millions of bytes."""
    shape = " ".join(f"{letter}={size}" for letter, size in found["shape"].items())
    top = found["ceilings"]
    lines = [
        f"{found['command']}: {found['device']}; "
        + ", ".join(f"{name} {version}" for name, version in found["versions"].items()),
        f"random Llama {found['shape_name']}, {shape}: {found['parameters']:,} parameters",
        "work: " + ", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in found["work"].items()),
        "ceilings, measured before: "
        + "".join(f"{dtype} {flops / 1e9:,.0f} GF/s, " for dtype, flops in top["flops_per_second"].items())
        + f"read {top['read_bytes_per_second'] / 1e9:,.1f} GB/s, copy {top['copy_bytes_per_second'] / 1e9:,.1f} GB/s",
        "",
        f"{'':42}{'seconds':>9}{'spread':>8}{'cold':>8}{'tokens/s':>10}{'GF/s':>9}{'MFU':>6}{'GB/s':>8}{'roof':>6}"
        f"{'peak MB':>9}",
    ]
    for side in found["summary"]:
        label = f"{side['name']}, {side['dtype']}"
        for part, rates in side["parts"].items():
            whole = part == "seconds"
            name = label if whole else f"  {_PARTS.get(part, part.removesuffix('_seconds').replace('_', ' '))}"
            spread, cold = (f"{side['spread']:.0%}", f"{side['cold_seconds']:.1f}") if whole else ("", "")
            peak = f"{side['peak_bytes'] / 1e6:,.0f}" if whole and side.get("peak_bytes") else ""
            lines.append(
                f"{name:42}{side[part]:9.2f}{spread:>8}{cold:>8}{rates['tokens_per_second']:10,.0f}"
                f"{rates['flops_per_second'] / 1e9:9,.0f}{rates['mfu']:6.0%}{rates['bytes_per_second'] / 1e9:8,.1f}"
                f"{rates['roofline']:6.0%}{peak:>9}"
            )
    count, unit = found["units"]
    for side in found["summary"]:
        label = f"{side['name']}, {side['dtype']}"
        lines.append(f"{label}: {side['seconds'] / count:.3f} s per {unit}")
        if "row_steps" in side:
            read, padding, whole = (side[f"{name}_tokens"] for name in ("prefilled", "padded", "prompt"))
            lines.append(
                f"{label}: {read:,.0f} tokens read, {padding:,.0f} of padding, where single rows have {whole:,.0f}; "
                f"{side['sampled_tokens'] / side['row_steps']:.0%} of rows in use"
            )
        if "save_seconds" in side:
            lines.append(
                f"{label}: held for {side['save_held_seconds']:.2f} s until the writing begins; updates and train "
                f"state are done after {side['save_seconds']:.2f} s"
            )
    if found["device_peak_bytes"] is not None:
        lines.append(f"memory of the device, at most so far: {found['device_peak_bytes'] / 1e9:,.1f} GB")
    for part, ratio in found["ratio"].items():
        what = "" if part == "seconds" else f" ({_PARTS.get(part, part.removesuffix('_seconds').replace('_', ' '))})"
        lines += [f"{name} / ours{what}: {times:.2f}" for name, times in ratio.items()]
    lines += [
        "",
        f"Medians of {found['repeat']} runs, all sides in turn; spread: (most - least) / median; cold: the first run,",
        "compilation included. Tokens are useful ones. MFU and roof: the least that the work asks for, as a share of",
        "what this device was measured to do. A ratio takes the better type of each side.",
    ]
    return "\n".join(lines)


def growth_table(found: Mapping[str, object]) -> str:
    """The same work some times over: what a unit of it costs each time."""
    lines = [
        f"growth of {found['command']}: {found['device']}; random Llama {found['shape_name']}",
        "",
        f"{'':42}{'times':>7}{'units':>8}{'seconds':>10}{'s a unit':>10}{'of first':>10}{'peak MB':>9}",
    ]
    first: dict[str, float] = {}
    for row in found["growth"]:
        each = row["seconds"] / row["units"]
        first.setdefault(row["label"], each)
        lines.append(
            f"{row['label']:42}{row['times']:7}{row['units']:8}{row['seconds']:10.2f}{each:10.4f}"
            f"{each / first[row['label']]:10.2f}{row['peak_bytes'] / 1e6:9,.0f}"
        )
    return "\n".join([*lines, "", f"A unit is a {found['unit']}. Medians of {found['repeat']} runs."])


def growth(documents: Mapping[int, Mapping[str, object]]) -> dict[str, object]:
    """The documents of the same command with so many times the work, as one."""
    some = next(iter(documents.values()))
    rows = [
        {
            "times": times,
            "label": f"{side['name']}, {side['dtype']}",
            "units": found["units"][0],
            "seconds": side["seconds"],
            "peak_bytes": side.get("peak_bytes", 0),
        }
        for times, found in documents.items()
        for side in found["summary"]
    ]
    rows.sort(key=lambda row: row["label"])
    kept = {name: some[name] for name in ("command", "device", "shape_name", "repeat", "ceilings")}
    return kept | {"unit": some["units"][1], "growth": rows, "documents": {str(n): d for n, d in documents.items()}}
