"""What a compiled program's text says of the traffic between chips.

The text is XLA's own (HLO). A loop's body is written once, so what stands in it is multiplied by how often it runs.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_BITS = {"pred": 8, "bf16": 16, "f16": 16, "s4": 4, "u4": 4}
_HEAD = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z\d]*)\[([\d,]*)\]")
_OPCODE = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z\-]*)\(")
_CALLED = re.compile(r"(?:calls|to_apply|called_computations|branch_computations|true_computation|false_computation)"
                     r"=\{?(%?[\w.\-]+(?:, ?%[\w.\-]+)*)")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Collective:
    """One exchange between chips. `received` is what it brings to each chip, in bytes, each time it runs."""

    kind: str
    result: str  # the largest array of its result, as "bf16[4096,11008]"
    received: float
    runs: int
    group: int  # chips that take part together

    @property
    def total(self) -> float:
        """Bytes to each chip over the whole program."""
        return self.received * self.runs


def array_bytes(shape: str) -> list[tuple[str, float]]:
    """("bf16[2,3]", 12.0) for each array of a type, which may be a tuple."""
    found = []
    for dtype, sizes in _ARRAY.findall(shape):
        bits = _BITS.get(dtype) or int(re.sub(r"\D.*", "", dtype.lstrip("abcdefghijklmnopqrstuvwxyz")) or 32)
        found.append((f"{dtype}[{sizes}]", math.prod(int(size) for size in sizes.split(",") if size) * bits / 8))
    return found


def computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation by its name, and the name of the one that is run."""
    found, entry, lines = {}, "", []
    for line in text.splitlines():
        if (head := _HEAD.match(line)) is not None:
            lines = found[head[1]] = []
            entry = head[1] if line.startswith("ENTRY") else entry
        elif line == "}":  # a kernel's own notes have lines that begin so
            lines = []
        else:
            lines.append(line)
    return found, entry


def collectives(text: str, *, unknown_trips: int) -> list[Collective]:
    """All exchanges of a compiled program. A loop whose end depends on data is taken to run `unknown_trips` times."""
    lines, entry = computations(text)
    seen: set[tuple[str, str, str]] = set()
    return list(_walk(lines, entry, 1, "", unknown_trips, seen))


def _walk(
    lines: Mapping[str, list[str]],
    name: str,
    runs: int,
    loop: str,
    unknown_trips: int,
    seen: set[tuple[str, str, str]],
) -> Iterator[Collective]:
    for line in lines.get(name, ()):
        if (match := _OPCODE.match(line)) is None:
            continue
        shape, opcode = match[2], match[3]
        kind = opcode.removesuffix("-start")
        if kind in KINDS:
            # One exchange that is spread over several fused operations is written in each of them.
            channel = re.search(r"channel_id=(\d+)", line)
            key = (loop, kind, channel[1] if channel else match[1])
            if key not in seen:
                seen.add(key)
                yield _collective(kind, shape, line, runs)
        elif opcode == "while":
            body, condition = (re.search(rf"{part}=%?([\w.\-]+)", line)[1] for part in ("body", "condition"))
            known = re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', line)
            trips = int(known[1]) if known else _trips(lines.get(condition, ()), unknown_trips)
            yield from _walk(lines, body, runs * trips, body, unknown_trips, seen)
        else:
            for group in _CALLED.findall(line):
                for called in group.split(","):
                    yield from _walk(lines, called.strip().lstrip("%"), runs, loop, unknown_trips, seen)


def _trips(condition: list[str], unknown: int) -> int:
    """How often a loop runs whose condition is `counter < constant`; any other condition is not known."""
    root = next((line for line in condition if line.lstrip().startswith("ROOT")), "")
    if " compare(" not in root or "direction=LT" not in root:
        return unknown
    numbers = (re.match(r"\s*%?([\w.\-]+) = .*? constant\((\d+)\)", line) for line in condition)
    constants = {match[1]: int(match[2]) for match in numbers if match is not None}
    named = [name for name in constants if re.search(rf"%?{re.escape(name)}[,)]", root)]
    return constants[named[0]] if len(named) == 1 else unknown


def _collective(kind: str, shape: str, line: str, runs: int) -> Collective:
    arrays = array_bytes(shape)
    group = group_size(line)
    largest, most = max(arrays, key=lambda array: array[1])
    # A started exchange names its operands and its results: the larger of the two is the result or as large.
    size = most if "-start(" in line or kind == "collective-permute" else sum(count for _, count in arrays)
    others = (group - 1) / group
    received = {
        "all-gather": size * others,
        "all-reduce": 2 * size * others,  # reduced in parts, and these gathered
        "reduce-scatter": size * (group - 1),
        "all-to-all": size * others,
        "collective-permute": size,
    }[kind]
    return Collective(kind, largest, received, runs, group)


def group_size(line: str) -> int:
    """How many chips take part together, from an instruction's replica_groups in any of XLA's three notations."""
    if (match := re.search(r"replica_groups=\{\{([\d,]+)\}", line)) is not None:  # {{0,1},{2,3}}
        return match[1].count(",") + 1
    if (match := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", line)) is not None:  # [groups,size]<=[...]
        return int(match[2])
    if (match := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", line)) is not None:
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", match[1])}
        parts = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", match[2])
        return math.prod(int(part) if part else sizes[name] for name, part in parts)
    return 2  # a permutation has pairs


def by_kind(found: list[Collective]) -> dict[str, dict[str, float]]:
    """{"all-gather": {"count": ..., "bytes": ...}}: how often each kind runs and what it brings to each chip."""
    sums: dict[str, dict[str, float]] = collections.defaultdict(lambda: {"count": 0, "bytes": 0.0})
    for one in found:
        sums[one.kind]["count"] += one.runs
        sums[one.kind]["bytes"] += one.total
    return dict(sums)
