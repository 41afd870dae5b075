"""What is compared, measured in turn: A B A B, so that what else the machine does hits all of them alike."""

import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from srlm_jax.bench.ceilings import Ceilings
from srlm_jax.bench.cost import Need

OURS = "ours"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Side:
    """One way to do the work.

    run: does all of it once, and says how long that took (`seconds`), of which parts it had (`NAME_seconds`) and what
      it counted on the way, the most memory of its process (`peak_bytes`) among it.
    """

    name: str
    dtype: str
    run: Callable[[], Mapping[str, float]]

    @property
    def label(self) -> str:
        return f"{self.name}, {self.dtype}"


def measure(sides: Sequence[Side], repeat: int, title: str) -> dict[str, list[dict[str, float]]]:
    """Each side's runs, by its label: a first one, which compiles and warms up, and `repeat` more, all sides in turn.

    Besides what a run says there is `wall_seconds`, all of the time that went by.
    """
    runs: dict[str, list[dict[str, float]]] = {side.label: [] for side in sides}
    with tqdm(total=(1 + repeat) * len(sides), desc=title, unit="run", dynamic_ncols=True, file=sys.stderr) as bar:
        for _ in range(1 + repeat):
            for side in sides:
                start = time.perf_counter()
                found = dict(side.run())
                runs[side.label].append(found | {"wall_seconds": time.perf_counter() - start})
                bar.update()
    return runs


def summary(
    side: Side, runs: Sequence[Mapping[str, float]], needs: Mapping[str, Sequence[Need]], ceilings: Ceilings
) -> dict[str, object]:
    """Of a side's runs, the first of which was cold.

    Args:
      needs: what the work asks for, by the part that it is the work of ("seconds" is the whole); phases that follow
        one another apart, since none can hide behind another.

    Returns:
      name, dtype, `cold_seconds`, medians of whatever the warm runs said, `seconds_min`, `seconds_max`, and for each
      part in `needs` its `tokens_per_second`, `flops_per_second`, `bytes_per_second`, `mfu` and `roofline`: shares of
      what this device was measured to do.
    """
    cold, *warm = runs
    medians = {name: statistics.median(run[name] for run in warm) for name in warm[0]}
    seconds = [run["seconds"] for run in warm]
    found: dict[str, object] = {
        "name": side.name,
        "dtype": side.dtype,
        "cold_seconds": cold["wall_seconds"],
        **medians,
        "seconds_min": min(seconds),
        "seconds_max": max(seconds),
        "spread": (max(seconds) - min(seconds)) / statistics.median(seconds),
        "parts": {},
    }
    peak, read = ceilings.flops_per_second[side.dtype], ceilings.read_bytes_per_second
    for part, phases in needs.items():
        if part not in medians or medians[part] <= 0:
            continue
        taken = medians[part]
        flops = sum(need.flops for need in phases)
        # Of phases that follow one another, the last is what the work was for.
        found["parts"][part] = {
            "tokens_per_second": phases[-1].tokens / taken,
            "flops_per_second": flops / taken,
            "bytes_per_second": sum(need.memory_bytes for need in phases) / taken,
            "mfu": flops / taken / peak,
            "roofline": sum(need.seconds(peak, read) for need in phases) / taken,
        }
    return found


def ratios(summaries: Sequence[Mapping[str, object]], part: str) -> dict[str, float]:
    """How many times longer than ours each other way takes, each with the better of its types."""
    best: dict[str, float] = {}
    for found in summaries:
        if part in found:
            name = found["name"]
            best[name] = min(best.get(name, float("inf")), found[part])
    ours = best.pop(OURS, None)
    return {name: seconds / ours for name, seconds in best.items()} if ours else {}


def forget_peak_memory() -> None:
    """Lets the most memory that this process has had so far begin anew, where the system can."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak_memory() -> int:
    """The most memory that this process has had since, in bytes, 0 where the system does not say."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0)
