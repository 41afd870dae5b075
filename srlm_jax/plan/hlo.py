"""What a compiled program's text says of the traffic between chips and with their memory, and of the operations of its
matrix products.

The text is XLA's own (HLO). A loop's body is written once, so what stands in it is multiplied by how often it runs.
"""

import collections
import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence

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
    def numbers(self) -> int:
        """How many numbers `result` has."""
        return math.prod(int(size) for size in self.result.split("[")[1].rstrip("]").split(",") if size)

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


@dataclasses.dataclass(frozen=True)
class _Instruction:
    """One line of a program that is run: the name of its result, the result's type, and what stands around it."""

    name: str
    shape: str
    opcode: str
    line: str
    computation: str
    loop: str  # the body of the innermost loop around it
    runs: int


def collectives(text: str, *, unknown_trips: Sequence[int]) -> list[Collective]:
    """All exchanges of a compiled program.

    `unknown_trips` is how often loops run whose end depends on data, in the order in which the program comes to them;
    the last number is that of all which follow.
    """
    lines, entry = computations(text)
    found: dict[tuple[str, str, str], Collective] = {}
    for one in _walk(lines, entry, 1, "", _unending(unknown_trips)):
        kind = one.opcode.removesuffix("-start")
        if kind in KINDS:
            # One exchange that is spread over several fused operations is written in each of them.
            channel = re.search(r"channel_id=(\d+)", one.line)
            key = (one.loop, kind, channel[1] if channel else one.name)
            if key not in found:
                found[key] = _collective(kind, one.shape, one.line, one.runs)
    return list(found.values())


def product_flops(text: str, *, unknown_trips: Sequence[int]) -> float:
    """Operations of all matrix products of a compiled program on one chip, two for each multiplication; what a kernel
    computes is not among them. `unknown_trips` as for `collectives`."""
    lines, entry = computations(text)
    sizes = {name: _sizes(inside) for name, inside in lines.items()}
    counts = {"dot": _dot_flops, "convolution": _convolution_flops}
    return float(
        sum(
            one.runs * counts[one.opcode](one, sizes[one.computation])
            for one in _walk(lines, entry, 1, "", _unending(unknown_trips))
            if one.opcode in counts
        )
    )


# What is a name for something that is there, or is counted where it ends.
_NOTHING_MOVES = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "call"}
_CUTS = {"dynamic-slice", "slice", "gather"}
_STACK = re.compile(r"[a-z]+\d*\[(\d+)(?:,\d+){4}\]")
_FAST_MEMORY = re.compile(r"\b[a-z]+\d*[a-z\d]*\[[\d,]*\]\{[^}]*S\(1\)[^}]*\}")


def memory_bytes(text: str, *, unknown_trips: Sequence[int]) -> float:
    """Bytes between one chip and its memory, over a whole program for TPUs: what its operations read and write, but for
    what stays in the chip's fast memory. Of what is cut out or updated in place that part counts; and of a stack
    of layers of a cache (five axes) that a kernel is given one layer, all of its slots. `unknown_trips` as for
    `collectives`."""
    lines, entry = computations(text)
    found = {name: {one[1]: one for line in inside if (one := _OPCODE.match(line))} for name, inside in lines.items()}
    fused = {
        called
        for inside in found.values()
        for one in inside.values()
        if one[3] == "fusion"
        for called in _called(one.string)
    }

    def read(one: re.Match, inside: Mapping[str, re.Match], name: str) -> float:
        """What an instruction reads of one of its operands."""
        whole, operands = _in_memory(inside[name][2], fast=True), _names(one[3], one.string)
        if one[3] in _CUTS and operands[0] == name:
            return min(whole, _in_memory(one[2], fast=True))
        if one[3] == "dynamic-update-slice" and operands[0] == name:
            return 0.0
        if one[3] == "bitcast":
            return read_by_all(inside, one[1])
        if one[3] == "fusion":
            callee = found[_called(one.string)[0]]
            places = {
                int(re.search(r"parameter\((\d+)\)", p.string)[1]): p[1] for p in callee.values() if p[3] == "parameter"
            }
            return min(whole, sum(read_by_all(callee, places[i]) for i, other in enumerate(operands) if other == name))
        return whole

    def read_by_all(inside: Mapping[str, re.Match], name: str) -> float:
        whole = _in_memory(inside[name][2], fast=True)
        return min(whole, sum(read(one, inside, name) for one in inside.values() if name in _names(one[3], one.string)))

    def written(one: re.Match, inside: Mapping[str, re.Match]) -> float:
        if one[3] == "dynamic-update-slice":
            return _in_memory(inside[_names(one[3], one.string)[1]][2], fast=True)
        if one[3] == "bitcast" and _names(one[3], one.string)[0] in inside:
            return written(inside[_names(one[3], one.string)[0]], inside)
        if one[3] == "fusion":
            callee = found[_called(one.string)[0]]
            return written(next(x for x in callee.values() if x.string.lstrip().startswith("ROOT")), callee)
        return _in_memory(one[2], fast=True)

    def moved(one: re.Match, inside: Mapping[str, re.Match]) -> float:
        if one[3] in _NOTHING_MOVES or one[3].endswith("-start"):
            return 0.0
        if one[3].endswith("-done"):
            return _in_memory(one[2], fast=True) + _in_memory(one[2])
        operands = [(name, _in_memory(inside[name][2])) for name in dict.fromkeys(_names(one[3], one.string))]
        if one[3] == "custom-call":
            if 'custom_call_target="tpu_custom_call"' not in one.string:
                return 0.0
            stacks = {name: _STACK.match(inside[name][2]) for name, _ in operands}
            return _in_memory(one[2]) + sum(n / int(stacks[name][1] if stacks[name] else 1) for name, n in operands)
        return min(_in_memory(one[2]), written(one, inside)) + sum(
            min(size, read(one, inside, name)) for name, size in operands
        )

    return sum(
        one.runs * moved(found[one.computation][one.name], found[one.computation])
        for one in _walk(lines, entry, 1, "", _unending(unknown_trips))
        if one.computation not in fused
    )


def _names(opcode: str, line: str) -> list[str]:
    """The operands of an instruction."""
    given = re.search(rf" {opcode}\((.*?)\)(?:,|$)", line)
    return re.findall(r"%([\w.\-]+)", given[1]) if given else []


def _called(line: str) -> list[str]:
    """The computations that an instruction calls, but for those of a loop."""
    return [called.strip().lstrip("%") for group in _CALLED.findall(line) for called in group.split(",")]


def _in_memory(shape: str, *, fast: bool = False) -> float:
    """Bytes of the arrays of a type; without those in fast memory, unless these are wanted too."""
    return sum(size for _, size in array_bytes(shape if fast else _FAST_MEMORY.sub("", shape)))


def _unending(numbers: Sequence[int]) -> Iterator[int]:
    return itertools.chain(numbers, itertools.repeat(numbers[-1]))


def _walk(
    lines: Mapping[str, list[str]], name: str, runs: int, loop: str, unknown_trips: Iterator[int]
) -> Iterator[_Instruction]:
    """Every instruction that is run, with what is called before what calls it."""
    for line in lines.get(name, ()):
        if (match := _OPCODE.match(line)) is None:
            continue
        if match[3] == "while":
            body, condition = (re.search(rf"{part}=%?([\w.\-]+)", line)[1] for part in ("body", "condition"))
            known = re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', line)
            trips = int(known[1]) if known else _trips(lines.get(condition, []), lines.get(body, []))
            trips = next(unknown_trips) if trips is None else trips
            yield from _walk(lines, body, runs * trips, body, unknown_trips)
        else:
            for called in _called(line):
                yield from _walk(lines, called, runs, loop, unknown_trips)
        yield _Instruction(match[1], match[2], match[3], line, name, loop, runs)


def _sizes(lines: list[str]) -> dict[str, list[int]]:
    """The sizes of each result in a computation that is an array."""
    found = {}
    for line in lines:
        match = _OPCODE.match(line)
        if match is not None and (array := re.match(r"[a-z]+\d*[a-z\d]*\[([\d,]*)\]", match[2])) is not None:
            found[match[1]] = [int(size) for size in array[1].split(",") if size]
    return found


def _operands(one: _Instruction, sizes: Mapping[str, list[int]]) -> tuple[list[int], list[int]]:
    """The sizes of both sides of a product."""
    left, right = (sizes[name] for name in _names(one.opcode, one.line))
    return left, right


def _dot_flops(one: _Instruction, sizes: Mapping[str, list[int]]) -> int:
    left, _ = _operands(one, sizes)
    summed = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.line)[1]
    return 2 * math.prod(sizes[one.name]) * math.prod(left[int(axis)] for axis in summed.split(",") if axis)


def _convolution_flops(one: _Instruction, sizes: Mapping[str, list[int]]) -> int:
    """A TPU's compiler writes every product as a convolution, and axes beyond the two of a matrix as places of a window
    that moves over padding; what is multiplied with padding counts for nothing."""
    left, right = _operands(one, sizes)
    result = sizes[one.name]
    of_left, of_right, of_result = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.line).groups()
    flops = 2 * result[of_result.index("b")] * result[of_result.index("f")] * right[of_right.index("i")]
    window = dict(re.findall(r"(\w+)=([\dx_\-]+)", (re.search(r"window=\{(.*?)\}", one.line) or [""] * 2)[1]))
    for axis in range(len(of_result) - 2):
        part = {key: value.split("x")[axis] for key, value in window.items()}
        stride, wide, apart = (int(part.get(key, 1)) for key in ("stride", "lhs_dilate", "rhs_dilate"))
        before = int(part.get("pad", "0_0").split("_")[0])
        places = (left[of_left.index(str(axis))] - 1) * wide + 1
        flops *= sum(
            0 <= (place := at * stride + tap * apart - before) < places and place % wide == 0
            for at in range(result[of_result.index(str(axis))])
            for tap in range(int(part.get("size", 1)))
        )
    return flops


def _trips(condition: list[str], body: list[str]) -> int | None:
    """How often a loop runs whose condition is `counter < constant`; of any other it is not known."""
    root = next((line for line in condition if line.lstrip().startswith("ROOT")), "")
    compared = re.search(r" compare\(([^)]*)\).*direction=LT", root)
    if compared is None:
        return None
    counter, end = re.findall(r"%([\w.\-]+)", compared[1])
    constants = _constants(condition)
    if end not in constants or counter in constants:
        return None
    return -(-constants[end] // _step(counter, condition, body))


def _step(counter: str, condition: list[str], body: list[str]) -> int:
    """By how much a loop's counter grows each time: by more than one where the compiler has unrolled the loop."""
    place = next(
        (re.search(r"index=(\d+)$", line.split(", metadata")[0]) for line in condition if f"%{counter} =" in line), None
    )
    root = next((line for line in body if line.lstrip().startswith("ROOT")), "")
    results = re.search(r" tuple\((.*?)\)(?:,|$)", root)
    if place is None or results is None:
        return 1
    result = re.findall(r"%([\w.\-]+)", results[1])[int(place[1])]
    added = next(
        (match[1] for line in body if (match := re.match(rf"\s*%{re.escape(result)} = .*? add\(([^)]*)\)", line))), ""
    )
    constants = _constants(body)
    return next((constants[name] for name in re.findall(r"%([\w.\-]+)", added) if name in constants), 1)


def _constants(lines: list[str]) -> dict[str, int]:
    numbers = (re.match(r"\s*%?([\w.\-]+) = .*? constant\((\d+)\)", line) for line in lines)
    return {match[1]: int(match[2]) for match in numbers if match is not None}


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
