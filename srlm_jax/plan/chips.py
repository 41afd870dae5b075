"""What one chip can do, and the slices that chips come in."""

import dataclasses
import importlib.util
import math
import os
import re

import jax
from jax.experimental import topologies

from srlm_jax.errors import BadInput, MissingExtra

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip by its data sheet. Nothing here is measured."""

    name: str
    tpu: bool
    flops: float  # bfloat16 operations a second
    bandwidth: float  # bytes a second to and from its memory
    memory: float  # bytes that a program may use: for a TPU the compiler's own limit
    link: float  # bytes a second that arrive over all links between chips
    sizes: tuple[str, ...]  # slices, smallest first
    ring: int  # an axis of at least this many chips closes to a ring; shorter ones have half the bandwidth

    def link_bandwidth(self, shape: tuple[int, ...]) -> float:
        """Bytes a second that arrive at a chip of a slice of this shape, all axes in use at once."""
        if len(shape) < 2:
            return self.link
        shares = [0.0 if size == 1 else 0.5 if size == 2 or size < self.ring else 1.0 for size in shape]
        return self.link * sum(shares) / len(shape)


_FLAT = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBE = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
_NODES = ("1", "2", "4", "8", "16", "32", "64", "128")

# TPU: docs.cloud.google.com/tpu/docs/v5e, v5p, v6e; what a link carries one way, over all links of the chip. GPU: the
# data sheets; `link` is NVLink within a node of eight, which the formula takes for larger numbers too.
CHIPS: dict[str, Chip] = {
    name: Chip(name, tpu, flops, bandwidth, memory * GIB, link, sizes, ring)
    for name, tpu, flops, bandwidth, memory, link, sizes, ring in (
        ("v5e", True, 197e12, 819e9, 15.75, 1.8e11, _FLAT, 16),
        ("v6e", True, 918e12, 1638e9, 31.25, 3.6e11, _FLAT, 16),
        ("v5p", True, 459e12, 2765e9, 95.74, 5.4e11, _CUBE, 4),
        ("a100", False, 312e12, 2039e9, 75.0, 3.0e11, _NODES, 0),
        ("h100", False, 989e12, 3350e9, 75.0, 4.5e11, _NODES, 0),
        ("h200", False, 989e12, 4800e9, 132.0, 4.5e11, _NODES, 0),
    )
}


@dataclasses.dataclass(frozen=True)
class Slice:
    """Chips of one kind that are rented together."""

    chip: Chip
    shape: tuple[int, ...]

    @property
    def chips(self) -> int:
        return math.prod(self.shape)

    @property
    def name(self) -> str:
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def link_bandwidth(self) -> float:
        """Bytes a second that arrive at each chip from the others."""
        return self.chip.link_bandwidth(self.shape)


def parse_slice(text: str) -> Slice:
    """A slice by its name, "v5p:4x4x4" or "h100:8".

    Raises:
      ValueError: no such chip, or no such shape of slice.
    """
    match = re.fullmatch(r"([a-z0-9]+):(\d+(?:x\d+)*)", text)
    if match is None or match[1] not in CHIPS:
        raise BadInput(
            f"--topology={text!r} is no slice: give one of {', '.join(CHIPS)}, a colon and its shape, as in "
            "v5p:4x4x4 or h100:8, or auto:v5p for the smallest that fits"
        )
    chip, shape = CHIPS[match[1]], tuple(map(int, match[2].split("x")))
    dimensions = chip.sizes[0].count("x") + 1
    if len(shape) != dimensions or not all(shape):
        raise BadInput(f"--topology={text!r}: a slice of {chip.name} has {dimensions} numbers, as {chip.sizes[-1]} has")
    return Slice(chip, shape)


def slices(family: str) -> list[Slice]:
    """All slices of a kind of chip, smallest first."""
    if family not in CHIPS:
        raise BadInput(f"no chip is named {family!r}: choose one of {', '.join(CHIPS)}")
    return [parse_slice(f"{family}:{size}") for size in CHIPS[family].sizes]


def devices(where: Slice) -> list[jax.Device]:
    """The slice's devices as the compiler knows them; there is no hardware behind them.

    Raises:
      MissingExtra: libtpu is not installed.
      ValueError: the compiler knows no such slice.
    """
    # libtpu asks the machine's metadata server otherwise, and lets one process in at a time for the chips' sake.
    for name, value in (
        ("TPU_SKIP_MDS_QUERY", "1"),
        ("TPU_ACCELERATOR_TYPE", "v5p-8"),
        ("TPU_WORKER_HOSTNAMES", "localhost"),
        ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"),
        ("TPU_MIN_LOG_LEVEL", "3"),
    ):
        os.environ.setdefault(name, value)
    if importlib.util.find_spec("libtpu") is None:
        raise MissingExtra("a plan for a TPU needs its compiler: pip install -e '.[plan]'")
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=where.name).devices)
    except jax.errors.JaxRuntimeError as error:
        raise BadInput(f"--topology={where.name}: the compiler knows no such slice ({error!s:.200})") from error


def splits(chips: int) -> list[tuple[int, int]]:
    """(fsdp, tensor) whose product is `chips`, least tensor first."""
    return [(chips // tensor, tensor) for tensor in range(1, chips + 1) if chips % tensor == 0]
