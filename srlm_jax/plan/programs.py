"""The programs of an iteration: the pipeline's own compiled functions, with shapes in place of arrays."""

import dataclasses
import functools
import math
import re
import resource
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from srlm_jax.data.batches import PairBatch, TokenBatch
from srlm_jax.data.packing import Shape
from srlm_jax.judge.score import POINTS
from srlm_jax.model import llama, lora, quantized
from srlm_jax.model.llama import Llama
from srlm_jax.parallel import mesh as meshes
from srlm_jax.parallel import reshard as resharding
from srlm_jax.parallel import rules
from srlm_jax.parallel.mesh import MeshShape
from srlm_jax.pipeline.settings import Settings
from srlm_jax.plan import formulas, hlo
from srlm_jax.plan.formulas import Cost, Split
from srlm_jax.records import SamplingParams
from srlm_jax.sampling import decode as dec
from srlm_jax.sampling import engine
from srlm_jax.sampling.decode import Admission, DecodeConfig, DecodeState
from srlm_jax.sampling.prefill import CHUNK, prefill_prefix
from srlm_jax.train.objectives import DpoObjective, Objective, SftObjective, compiled_logprobs
from srlm_jax.train.step import make_train_step

# What stands around an instruction, in tokens: the marks of a chat, and the judge's rubric (379 tokens of Llama 2's,
# of which 272 come before the instruction and 107 behind the answer).
CHAT_FRAME = 16
RUBRIC_BEFORE, RUBRIC_BEHIND = 272, 107
STOP_LENGTH = 8  # tokens of the longest stop sequence; a few numbers a row
WATCHED = 2 * len(POINTS)  # while judging: each of the points, with a space before it and without
# Mean lengths in tokens where a program's own length is only the most that it may be, and how many positions packed
# documents take for each of their tokens: assumptions, stated in the output.
ANSWER, EXAMPLE, PACKED = 400, 700, 1.03  # an example of SFT: two of IFT to one of EFT, which the rubric is part of
ANSWERED = CHAT_FRAME + 80 + ANSWER  # an instruction and its answer


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled function and what it is called with, each array as its shape, type and place on the mesh."""

    name: str
    function: Callable
    arguments: dict[str, object]  # by the name that a user knows them by, in the function's order
    mesh: jax.sharding.Mesh
    unknown_trips: tuple[int, ...]  # how often loops run whose end depends on data, at most: see hlo.collectives
    cost: Cost  # by formula


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says of a program, in bytes a chip."""

    arguments: int
    output: int
    temporaries: int
    aliased: int  # of the output, what takes an argument's place
    collectives: list[hlo.Collective] | None  # None: the compiler cannot write its program down
    product_flops: float | None  # of all matrix products outside kernels; None as above
    memory_bytes: float | None  # between a chip and its memory, as `hlo.memory_bytes` counts them; None as above
    wall_s: float
    cpu_s: float
    host_bytes: int  # the most memory that this process has had so far

    @property
    def peak(self) -> int:
        return self.arguments + self.output - self.aliased + self.temporaries


@dataclasses.dataclass(frozen=True)
class TooLarge:
    """A program that the compiler refuses: what it would need and what there is, in bytes a chip (None: not said)."""

    needed: float | None
    limit: float | None
    largest: list[str]  # results that take most, as the compiler says
    said: str  # the refusal's first line


@dataclasses.dataclass(frozen=True)
class SamplingShape:
    """How the engine lays out a stage's prompts; see `sampling.engine`."""

    room: dec.Shape
    at_once: int
    prefix: int
    params: SamplingParams
    watched: int  # tokens whose probabilities are wanted


def sampling_shapes(s: Settings, data: int) -> dict[str, SamplingShape]:
    """The largest that the engine may be asked for, by stage: answers to instructions, and judgements of answers."""
    instruction, answer = s.max_prompt_tokens, s.responses.max_new_tokens

    def shape(prompts: int, params: SamplingParams, prefix: int, shared: int, rest: int, watched: int) -> SamplingShape:
        slots = (engine.bucket(shared), engine.bucket(rest), engine.leaf_slots(params.max_new_tokens))
        room, at_once = engine.shape(s.engine, s.shard_prompts, prompts, params.samples, slots, STOP_LENGTH, data)
        return SamplingShape(room, at_once, prefix, params, watched)

    before = RUBRIC_BEFORE // 16 * 16
    return {
        "responses": shape(1, s.responses, 0, CHAT_FRAME + instruction, 0, 0),
        "judgements": shape(
            s.responses.samples, s.judging, before, instruction, answer + RUBRIC_BEHIND + CHAT_FRAME, WATCHED
        ),
    }


def _token_batch(shape: Shape, place: jax.sharding.NamedSharding, *, packed: bool) -> TokenBatch:
    array = lambda dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=place)
    segments = array(jnp.int32) if packed else None
    return TokenBatch(array(jnp.int32), array(jnp.int32), array(jnp.float32), array(jnp.int32), segments)


def _key(mesh: jax.sharding.Mesh) -> jax.ShapeDtypeStruct:
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=rules.replicated(mesh))


def train_shapes(s: Settings, groups: int) -> dict[str, Shape]:
    """Rows and positions of each training program's batch: rows of the most positions, and as many as its examples need
    at mean lengths where they are packed."""

    def shape(documents: int, tokens: int, accumulate: int) -> Shape:
        if not s.packed:
            return Shape(documents, row_length(s))
        together = groups * accumulate
        return Shape(math.ceil(packed_rows(s, documents, tokens) / together) * together, row_length(s))

    return {
        "SFT step": shape(s.sft.train.batch_size, EXAMPLE, s.sft.train.accumulate),
        "reference": Shape(s.reference_batch, row_length(s)),
        "DPO step": shape(2 * s.dpo.train.batch_size, ANSWERED, s.dpo.train.accumulate),
    }


def packed_rows(s: Settings, documents: float, tokens: int) -> float:
    """That so many documents of so many tokens fill on average."""
    return PACKED * documents * min(tokens, row_length(s)) / row_length(s)


def row_length(s: Settings) -> int:
    """Positions of a row at most."""
    return -(-s.context_length // s.length_multiple) * s.length_multiple


def train_split(shape: MeshShape) -> Split:
    return Split(rows=shape.data * shape.fsdp, weights=shape.fsdp * shape.tensor, tensor=shape.tensor)


def sample_split(shape: MeshShape) -> Split:
    return Split(rows=shape.data * shape.fsdp, weights=shape.tensor, tensor=shape.tensor)


def costs(s: Settings, shape: MeshShape) -> dict[str, Cost]:
    """Every program's cost on one chip, by formula."""
    c, split, sample = s.model.llama, train_split(shape), sample_split(shape)
    shapes = train_shapes(s, split.rows)
    found = {"reference": formulas.forward_cost(c, split, *shapes["reference"])}
    for name, part in (("SFT step", s.sft), ("DPO step", s.dpo)):
        found[name] = formulas.train_cost(c, split, *shapes[name], part.train.accumulate, s.lora.rank)
    for stage, x in sampling_shapes(s, sample.rows).items():
        decode = formulas.decode_cost(c, sample, x.room, s.engine.weights, s.engine.steps)
        found[f"prefill, {stage}"] = formulas.prefill_cost(
            c, sample, x.room, x.at_once, s.engine.weights, decode.resident_bytes
        )
        found[f"decode, {stage}"] = decode
    sampled = formulas.sample_bytes(c, s.engine.weights)
    kept, copy = formulas.param_bytes(c) / split.weights, sampled / sample.weights
    # What is rounded first is there once more, beside `kept_bytes`, and is written and read on the way.
    rounded = 0.0 if s.engine.weights is None else formulas.rounded_bytes(c) / split.weights
    found["reshard"] = Cost(
        flops=0.0,
        memory_bytes=kept + copy + 2 * rounded,
        link_bytes=sampled * (1 / sample.weights - 1 / split.weights),
        resident_bytes=kept + copy + rounded - kept_bytes(s, shape, "reshard"),
    )
    return found


def kept_bytes(s: Settings, shape: MeshShape, name: str) -> float:
    """What a run keeps on a chip beside a program's own arrays: while it samples with a copy of the weights, they
    themselves; and of what it rounds before it moves it, what that was."""
    c = s.model.llama
    if name == "reshard" and s.engine.weights is not None:
        return formulas.projections(c) / c.parameters * formulas.param_bytes(c) / train_split(shape).weights
    one_and_the_same = shape.fsdp == 1 and c.param_dtype == c.compute_dtype and s.engine.weights is None
    if not name.startswith(("prefill", "decode")) or one_and_the_same:
        return 0.0
    return formulas.param_bytes(c) / train_split(shape).weights


def programs(s: Settings, shape: MeshShape, devices: Sequence[jax.Device]) -> list[Program]:
    """Every program of the iteration, for devices that may be descriptions alone."""
    train_mesh, sample_mesh = meshes.train_mesh_over(shape, devices), meshes.sample_mesh_over(shape, devices)
    shapes, cost = llama.abstract(s.model.llama), costs(s, shape)
    narrow = llama.abstract(dataclasses.replace(s.model.llama, param_dtype=s.model.compute_dtype))
    as_sampled = functools.partial(quantized.quantize, weights=s.engine.weights)
    to_train = rules.placed(train_mesh, rules.TRAIN, shapes)
    to_move = rules.placed(train_mesh, rules.TRAIN, jax.eval_shape(as_sampled, shapes))
    to_sample = rules.placed(sample_mesh, rules.SAMPLE, jax.eval_shape(as_sampled, narrow))
    trainable, frozen = to_train, None
    if s.lora.rank is not None:
        adapters = jax.eval_shape(lambda: lora.init(shapes, s.lora, jax.random.key(0)))
        trainable, frozen = rules.placed(train_mesh, rules.TRAIN, adapters), to_train
    rows = rules.sharding(train_mesh, rules.TRAIN, ("batch",))
    batch = {
        name: _token_batch(size, rows, packed=s.packed)
        for name, size in train_shapes(s, train_split(shape).rows).items()
    }

    turns = (-(-row_length(s) // s.logprob_chunk),)  # of logits, where every position has a loss

    def step(name: str, objective: Objective, part, batch) -> Program:
        function, tx = make_train_step(objective, part.train.optimizer, part.train.steps, part.train.accumulate)
        state = rules.placed(train_mesh, rules.TRAIN, jax.eval_shape(tx.init, trainable))
        arguments = {"optimizer": state, "frozen weights": frozen, "batch": batch, "key": _key(train_mesh)}
        arguments = {"weights" if frozen is None else "adapters": trainable} | arguments
        return Program(name, function, arguments, train_mesh, turns, cost[name])

    sft = SftObjective(dropout=s.sft.dropout, logprob_chunk=s.logprob_chunk)
    dpo = DpoObjective(beta=s.dpo.beta, logprob_chunk=s.logprob_chunk)
    sums = jax.ShapeDtypeStruct((s.dpo.train.batch_size,), jnp.float32, sharding=rows)
    documents = 2 * s.shard_prompts if s.packed else s.reference_batch
    found = [
        step("SFT step", sft, s.sft, batch["SFT step"]),
        Program(
            "reference",
            lambda weights, batch: compiled_logprobs(weights, batch, documents, s.logprob_chunk),
            {"weights": to_train, "batch": batch["reference"]},
            train_mesh,
            turns,
            cost["reference"],
        ),
        step("DPO step", dpo, s.dpo, PairBatch(batch["DPO step"], sums, sums)),
    ]
    for stage, x in sampling_shapes(s, sample_mesh.shape["data"]).items():
        found += _sampling(s, stage, x, to_sample, sample_mesh, cost)
    return [*found, _reshard(to_move, to_sample, cost["reshard"])]


def _reshard(model: Llama, like: Llama, cost: Cost) -> Program:
    kept, places = (tuple(x.sharding for x in jax.tree.leaves(tree)) for tree in (model, like))
    dtypes = tuple(x.dtype for x in jax.tree.leaves(like))
    function = lambda weights: resharding.relaid(weights, kept, places, dtypes)
    return Program("reshard", function, {"weights": model}, places[0].mesh, (1,), cost)


def _sampling(s: Settings, stage: str, x: SamplingShape, model: Llama, mesh, cost) -> list[Program]:
    seed = jax.eval_shape(lambda: jax.random.key(0))
    prefix = None
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        if x.prefix:
            shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.int32)
            prefill = functools.partial(prefill_prefix, cache=x.room.cache)
            prefix = jax.eval_shape(prefill, model, shape(1, engine.prefix_slots(x.prefix)), shape(1))
        state = jax.eval_shape(lambda prefix, seed: dec.start(model, prefix, x.room, seed), prefix, seed)
    state: DecodeState = jax.tree.map(
        lambda leaf, to: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=to), state, engine.shardings(mesh, state)
    )
    whole = rules.replicated(mesh)
    array = lambda dtype, *sizes: jax.ShapeDtypeStruct(sizes, dtype, sharding=whole)
    A, P, C, slots = x.at_once, x.room.prompts, x.room.samples, x.room.slots
    new = Admission(
        slot_A=array(jnp.int32, A),
        group_tokens_AT=array(jnp.int32, A, slots[0]),
        group_length_A=array(jnp.int32, A),
        prompt_tokens_APT=array(jnp.int32, A, P, slots[1]),
        prompt_length_AP=array(jnp.int32, A, P),
        last_AP=array(jnp.int32, A, P),
        limit_APC=array(jnp.int32, A, P, C),
        address_A=array(jnp.uint32, A, 2),
    )
    config = DecodeConfig(temperature=x.params.temperature, top_p=x.params.top_p, steps=s.engine.steps)
    names = [f"prefill, {stage}", f"decode, {stage}"]
    given = {"weights": model, "cache": state}
    # Rows all as long as may be go on together to their end, so that none is read with fewer beside it.
    chunks = [slot // CHUNK for slot in slots[:2] if slot > CHUNK]
    return [
        Program(names[0], dec.admit, given | {"admission": new, "key": _key(mesh)}, mesh, (*chunks, 0), cost[names[0]]),
        Program(
            names[1],
            jax.jit(
                lambda weights, state, stops, watched: dec.decode(weights, state, stops, watched, config),
                donate_argnums=1,
            ),
            given | {"stops": array(jnp.int32, 3, STOP_LENGTH), "watched": array(jnp.int32, x.watched)},
            mesh,
            (s.engine.steps,),
            cost[names[1]],
        ),
    ]


def argument_bytes(program: Program) -> list[tuple[str, float]]:
    """What each array among the arguments takes on one chip, the largest first."""
    found = []
    for name, tree in program.arguments.items():
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            keys = re.sub(r"\.value$|\[\.\.\.\]", "", jax.tree_util.keystr(path))
            size = math.prod(leaf.sharding.shard_shape(leaf.shape)) * (leaf.dtype.itemsize or 8)
            found.append((f"{name}{keys}", float(size)))
    return sorted(found, key=lambda one: -one[1])


def compile_program(program: Program) -> Compiled | TooLarge:
    """Compiles for the program's devices; nothing is allocated."""
    wall, cpu = time.perf_counter(), time.process_time()
    platform = program.mesh.devices.flat[0].platform
    try:
        with jax.sharding.use_abstract_mesh(program.mesh.abstract_mesh):
            function = program.function if hasattr(program.function, "trace") else jax.jit(program.function)
            traced = function.trace(*program.arguments.values())
        compiled = traced.lower(lowering_platforms=(platform,)).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) and "CompileTimeHbmOom" not in str(error):
            raise
        return too_large(str(error))
    said = compiled.memory_analysis()
    try:
        text = compiled.as_text()
        collectives = hlo.collectives(text, unknown_trips=program.unknown_trips)
        products = hlo.product_flops(text, unknown_trips=program.unknown_trips)
        moved = hlo.memory_bytes(text, unknown_trips=program.unknown_trips)
    except jax.errors.JaxRuntimeError:
        # A libtpu newer than its jax writes some exchanges in a form unknown to it.
        collectives = products = moved = None
    return Compiled(
        arguments=said.argument_size_in_bytes,
        output=said.output_size_in_bytes,
        temporaries=said.temp_size_in_bytes,
        aliased=said.alias_size_in_bytes,
        collectives=collectives,
        product_flops=products,
        memory_bytes=moved,
        wall_s=time.perf_counter() - wall,
        cpu_s=time.process_time() - cpu,
        host_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )


_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40, "": 1}


def too_large(said: str) -> TooLarge:
    """The compiler's refusal, read."""
    used = re.search(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm", said)
    sizes = re.findall(r"Size: ([\d.]+[KMGT]?)\b.*?(?:Shape: (\S+?)[{\s])", said, re.DOTALL)
    return TooLarge(
        needed=float(used[1]) * _UNITS[used[2]] if used else None,
        limit=float(used[3]) * _UNITS[used[4]] if used else None,
        largest=[f"{shape} ({size})" for size, shape in sizes[:3]],
        said=said.strip().splitlines()[0][:300],
    )
