"""From a configuration and a slice to a plan: does it fit, what bounds each program, what does the iteration cost."""

import dataclasses
from collections.abc import Callable, Mapping

from srlm_jax.parallel.mesh import MeshShape, resolve
from srlm_jax.pipeline.run import check_adapters, check_batches, with_numbers
from srlm_jax.pipeline.settings import BadConfig, Settings
from srlm_jax.plan import chips, hlo, programs, stages
from srlm_jax.plan.chips import Slice
from srlm_jax.plan.formulas import Cost
from srlm_jax.plan.programs import Compiled, TooLarge
from srlm_jax.plan.stages import Roofline


@dataclasses.dataclass(frozen=True)
class PlannedProgram:
    """One program on the slice. `compiled` is None where the plan is by formula alone."""

    name: str
    cost: Cost
    compiled: Compiled | TooLarge | None
    limit: float  # bytes of memory a chip
    roofline: Roofline
    arguments: list[tuple[str, float]]  # the largest by name, in bytes a chip
    kept: float  # bytes a chip that the run keeps beside the program's own

    @property
    def needed(self) -> float:
        """Bytes of memory a chip; the formula's where the compiler says no number."""
        own = self.cost.resident_bytes
        if isinstance(self.compiled, Compiled):
            own = self.compiled.peak
        elif isinstance(self.compiled, TooLarge) and self.compiled.needed is not None:
            own = self.compiled.needed
        return own + self.kept

    @property
    def fits(self) -> bool:
        return not isinstance(self.compiled, TooLarge) and self.needed <= self.limit


@dataclasses.dataclass(frozen=True)
class Plan:
    """A configuration on a slice."""

    settings: Settings
    where: Slice
    mesh: MeshShape
    programs: list[PlannedProgram]

    @property
    def fits(self) -> bool:
        return all(program.fits for program in self.programs)

    @property
    def data(self) -> int:
        """Groups of chips that sample different rows."""
        return self.mesh.data * self.mesh.fsdp

    @property
    def times(self) -> Mapping[str, Roofline]:
        return {program.name: program.roofline for program in self.programs}

    @property
    def seconds(self) -> float:
        """Of the iteration, at the least."""
        return stages.iteration_seconds(self.settings, self.data, self.times)

    @property
    def chip_hours(self) -> float:
        return self.seconds * self.where.chips / 3600


def refusal(settings: Settings, shape: MeshShape) -> str | None:
    """Why a mesh cannot be used for this model and these batches, None where it can."""
    c = settings.model.llama
    for name, size in {"model.N": c.N, "model.K": c.K, "model.F": c.F, "model.V": c.V}.items():
        if size % shape.tensor:
            return f"config.mesh.tensor is {shape.tensor}, which does not divide config.{name} ({size})"
    if c.D % shape.fsdp:
        return f"config.mesh.fsdp is {shape.fsdp}, which does not divide config.model.D ({c.D})"
    try:
        check_batches(settings, shape.data * shape.fsdp)
    except BadConfig as error:
        return str(error)
    return None


def by_formula(settings: Settings, where: Slice, shape: MeshShape) -> Plan:
    """The plan without a compiler."""
    found = [
        PlannedProgram(
            name,
            cost,
            None,
            where.chip.memory,
            stages.roofline(cost, cost.link_bytes, where),
            [],
            programs.kept_bytes(settings, shape, name),
        )
        for name, cost in programs.costs(settings, shape).items()
    ]
    return Plan(settings, where, shape, found)


def by_compiler(
    settings: Settings, where: Slice, shape: MeshShape, report: Callable[[str], None], *, until_refused: bool
) -> Plan:
    """The plan with every program compiled; `report` is told of each before and after.

    With `until_refused`, what comes after a program that does not fit is left out.
    """
    found = []
    for program in programs.programs(settings, shape, chips.devices(where)):
        report(f"compiling {program.name}")
        compiled = programs.compile_program(program)
        link = program.cost.link_bytes
        if isinstance(compiled, Compiled) and compiled.collectives is not None:
            link = sum(one["bytes"] for one in hlo.by_kind(compiled.collectives).values())
        limit = where.chip.memory
        if isinstance(compiled, TooLarge) and compiled.limit is not None:
            limit = compiled.limit
        times = stages.roofline(program.cost, link, where)
        arguments = programs.argument_bytes(program)[:5]
        kept = programs.kept_bytes(settings, shape, program.name)
        found.append(PlannedProgram(program.name, program.cost, compiled, limit, times, arguments, kept))
        report(f"{program.name}: {found[-1].needed / chips.GIB:.2f} of {limit / chips.GIB:.2f} GiB a chip")
        if until_refused and not found[-1].fits:
            break
    return Plan(settings, where, shape, found)


def candidates(settings: Settings, where: Slice) -> list[Plan]:
    """Plans by formula for every mesh of the slice that fits by formula, the fastest first."""
    shapes = [MeshShape(data=1, fsdp=fsdp, tensor=tensor) for fsdp, tensor in chips.splits(where.chips)]
    plans = [by_formula(settings, where, shape) for shape in shapes if refusal(settings, shape) is None]
    return sorted((plan for plan in plans if plan.fits), key=lambda plan: plan.seconds)


def smallest(settings: Settings, family: str, report: Callable[[str], None]) -> Plan:
    """The plan on the smallest slice of a family that fits, with the mesh that is fastest by the formulas.

    A slice is tried when a mesh of it fits by formula; for a TPU it is taken when the compiler says so too.

    Raises:
      BadConfig: not even the largest slice fits.
    """
    for where in chips.slices(family):
        for plan in candidates(settings, where):
            if not where.chip.tpu:
                return plan
            name = f"{where.name}, fsdp {plan.mesh.fsdp} x tensor {plan.mesh.tensor}"
            tried = by_compiler(
                settings, where, plan.mesh, lambda program, name=name: report(f"{name}: {program}"), until_refused=True
            )
            if tried.fits:
                return tried
    raise BadConfig(
        f"no slice of {family} up to {chips.slices(family)[-1].name} fits: lower config.context_length, "
        "config.engine.rows or the batch sizes, raise accumulate, or take chips with more memory"
    )


def make_plan(settings: Settings, topology: str, report: Callable[[str], None]) -> Plan:
    """The plan for a slice ("v5p:4x4x4", "h100:8") or for the smallest of a family ("auto:v5p").

    Raises:
      BadConfig, ValueError: the slice does not exist, or the mesh does not fit it, the model or the batches.
      MissingExtra: the compiler is not installed.
    """
    settings = with_numbers(settings)
    check_adapters(settings)
    if topology.startswith("auto:"):
        return smallest(settings, topology.removeprefix("auto:"), report)
    where = chips.parse_slice(topology)
    shape = resolve(settings.mesh, where.chips)
    if (why := refusal(settings, shape)) is not None:
        others = [f"{f} x {t}" for f, t in chips.splits(where.chips)
                  if refusal(settings, MeshShape(data=1, fsdp=f, tensor=t)) is None]  # fmt: skip
        raise BadConfig(f"{why}. On {where.name} config.mesh.fsdp x tensor can be: {', '.join(others) or 'nothing'}")
    if not where.chip.tpu:
        return by_formula(settings, where, shape)
    return by_compiler(settings, where, shape, report, until_refused=False)
