"""Sampling many prompts: slots, shared prefixes, N samples of each.

The engine speaks token ids: lists of ints in, lists of ints out.
"""

import collections
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated

import jax
import numpy as np

from srlm_jax import limits
from srlm_jax.limits import Count, one_of
from srlm_jax.model.llama import Llama, by_layer
from srlm_jax.parallel import hosts, rules
from srlm_jax.sampling import decode as dec
from srlm_jax.sampling import filters
from srlm_jax.sampling.decode import Admission, DecodeConfig, Decoded, DecodeState, Shape
from srlm_jax.sampling.diagnosis import not_finite
from srlm_jax.sampling.prefill import CHUNK, HALVINGS, positions_read, prefill_prefix

Ids = tuple[int, ...]
Rounded = Annotated[str, one_of("int8")]

# Samples that are held for each that is decoded. Where lengths are spread as those of answers are, a group stays until
# its longest sample ends, so that this many must be there for every row to find another when it has ended one.
HELD_PER_ROW = 1.75


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How wide and how patient the engine is, neither of which changes what is sampled; and what it rounds."""

    rows: Count  # samples decoded at once on a process's devices, or on all where only they hold the weights
    steps: Count  # tokens between two looks at which rows have ended
    weights: Rounded | None  # "int8": the projections are sampled with in 8 bits (`model.quantized`); None: as they are
    cache: Rounded | None  # "int8": keys and values are kept in 8 bits (`model.cache`); None: as they are

    def __post_init__(self):
        limits.check(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """Prompts that are sampled together because they share their beginning."""

    address: tuple[int, int]  # two unsigned 32-bit integers that seed their random numbers
    prompts: tuple[Ids, ...]
    limits: tuple[tuple[int, ...], ...] | None  # most tokens of each sample of each prompt; None: as `Draw` says


@dataclasses.dataclass(frozen=True, kw_only=True)
class Draw:
    """How to sample: `samples` completions of each prompt, each ended by any of `stops` (which it then includes).

    `watched` are W token ids whose log-probabilities are wanted at every step; they change no sample.
    """

    samples: int
    temperature: float
    top_p: float
    max_new_tokens: int
    stops: tuple[Ids, ...]
    watched: Ids = ()


@dataclasses.dataclass(frozen=True)
class Sample:
    """One completion. `finished` is False where `max_new_tokens` cut it.

    `watched_TW[t, w]` is the log-probability, at temperature 1 and over the whole vocabulary, of `Draw.watched[w]` in
    the place of token t; None where nothing was watched.
    """

    ids: Ids
    finished: bool
    watched_TW: np.ndarray | None = dataclasses.field(default=None, compare=False, repr=False)


# One group's samples, by prompt.
Samples = tuple[tuple[Sample, ...], ...]


@dataclasses.dataclass
class Work:
    """What an engine has done: prompt tokens it was asked to read, those it computed, and decoding slots used."""

    prompt_tokens: int = 0  # over all rows, as if nothing were shared
    prefilled_tokens: int = 0  # computed, without padding
    padded_tokens: int = 0  # computed all the same, to fill up rows and batches
    row_steps: int = 0  # rows x decoding steps run
    sampled_tokens: int = 0  # of them, tokens that belong to a completion


def bucket(length: int) -> int:
    """`length` rounded up to 0, 8, 12, 16, 24, 32, 48, 64, 96, 128, 256, 384, 512, 768, 1,024 and then by a quarter of
    each of its doublings: few sizes, so few compilations, and each of them either one chunk of a prefill or several
    whole ones."""
    if length > 1_024:
        step = 1 << (length - 1).bit_length() - 3
        return -(-length // step) * step
    size = 8 if length else 0
    while size < length or (size > CHUNK and size % CHUNK):
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


def prefix_slots(length: int) -> int:
    """Slots for what all prompts begin with, which is prefilled in one piece: whole blocks of the TPU's kernel."""
    return -(-length // 64) * 64


def leaf_slots(max_new_tokens: int) -> int:
    """Slots for what is decoded. It is the same number in all calls of a stage, so it need not be one of few."""
    return bucket(max_new_tokens) if max_new_tokens <= 64 else -(-max_new_tokens // 32) * 32


def _common(sequences: Sequence[Ids]) -> int:
    """Length of the longest common beginning: that of the first and the last in order."""
    first, last = min(sequences), max(sequences)
    return next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))


def shape(
    config: EngineConfig,
    groups: int,
    prompts: int,
    samples: int,
    slots: tuple[int, int, int],
    stop_length: int,
    data: int,
) -> tuple[Shape, int]:
    """The room that so many groups are sampled in, and how many of them are read at once; all of it alike on each of
    `data` groups of devices. Few groups take few shapes, so that the last of many calls compiles nothing new."""
    up = lambda n: -(-n // data) * data
    per_group = prompts * samples
    rows = up(min(config.rows, groups * per_group))
    at_once = up(max(1, rows // per_group // 4))
    held = math.ceil(HELD_PER_ROW * rows / per_group) + at_once
    held = up(min(held, 1 << (groups - 1).bit_length()))
    return Shape(
        data=data,
        groups=held,
        prompts=prompts,
        samples=samples,
        rows=rows,
        slots=slots,
        stop_length=stop_length,
        cache=config.cache,
    ), min(at_once, held)


@dataclasses.dataclass(frozen=True)
class _Layout:
    """How the prompts of a call are cut into levels."""

    prefix: Ids  # what all prompts begin with
    shared: tuple[int, ...]  # by group: how many tokens beyond the prefix its prompts share
    slots: tuple[int, int, int]  # of the group level, the prompt level, the leaf
    prompts: int  # of the widest group

    @classmethod
    def of(cls, groups: Sequence[Group], max_new_tokens: int) -> "_Layout":
        # The last token of a prompt is decoded, not prefilled, so no level may hold it.
        heads = [prompt[:-1] for group in groups for prompt in group.prompts]
        prefix = _common(heads) // 16 * 16 if len(groups) > 1 else 0
        shared = tuple(_common([prompt[:-1] for prompt in group.prompts]) - prefix for group in groups)
        rest = [len(p) - 1 - prefix - n for group, n in zip(groups, shared, strict=True) for p in group.prompts]
        slots = (bucket(max(shared)), bucket(max(rest)), leaf_slots(max_new_tokens))
        return cls(heads[0][:prefix], shared, slots, max(len(group.prompts) for group in groups))


def decoding_model(model: Llama, mesh: jax.sharding.Mesh) -> Llama:
    """`model` as it decodes fastest on the devices of `mesh` (see `by_layer`): for `sample`, which takes any."""
    stacked = len(model.stacks) == 1 and mesh.devices.flat[0].platform != "tpu"
    return by_layer(model) if stacked else model


def sample(
    model: Llama,
    groups: Sequence[Group],
    draw: Draw,
    *,
    key: jax.Array,
    config: EngineConfig,
    mesh: jax.sharding.Mesh,
    report: Callable[[int, int], None],
    work: Work,
) -> list[Samples]:
    """Samples every prompt of every group; results in the order of `groups`.

    Equal (key, address, prompt's index, sample's index) give equal completions, whatever else is in the call and
    however wide the engine is, as far as the device adds in the same order. Of a cache in 8 bits tokens read rounded
    what is in another level or chunk than they, so that what all prompts begin with counts too.

    Args:
      key: what the random numbers of this stage derive from.
      report: called with (completions finished, tokens sampled) since the last call.
      work: counters, added to.

    Raises:
      NotFinite: the model's logits are NaN or infinite.
      ValueError: a prompt without tokens, or limits that are not one for each sample, or out of bounds.
    """
    if not groups:
        return []
    if any(not group.prompts or not all(group.prompts) for group in groups):
        raise ValueError("every group needs a prompt and every prompt a token (the begin token, say)")
    for group in groups:
        wanted = [draw.samples] * len(group.prompts)
        if group.limits is not None and (
            [len(limits) for limits in group.limits] != wanted
            or not all(0 < limit <= draw.max_new_tokens for limits in group.limits for limit in limits)
        ):
            raise ValueError(
                f"limits of a group are one for each of {draw.samples} samples of each of its {len(wanted)} prompts, "
                f"from 1 to max_new_tokens ({draw.max_new_tokens})"
            )
    layout = _Layout.of(groups, draw.max_new_tokens)
    results: list[Samples | None] = [None] * len(groups)
    try:
        for index, samples in _run(model, groups, draw, layout, key, config, mesh, report, work):
            results[index] = samples
    except _Undrawn as undrawn:
        with jax.set_mesh(mesh):
            raise not_finite(model, undrawn.ids) from undrawn
    return results


@dataclasses.dataclass
class _Undrawn(Exception):
    """No token could be drawn behind these."""

    ids: Ids


@dataclasses.dataclass(frozen=True)
class _Open:
    """A group that is held: its number, and the tokens of each of its samples so far, None where there is none."""

    group: int
    tokens: list[list[int] | None]
    watched: list[list[np.ndarray]]  # of each sample: log-probabilities of watched tokens, [T, W] each
    unfinished: set[int]  # numbers of samples within the group


def _run(
    model: Llama,
    groups: Sequence[Group],
    draw: Draw,
    layout: _Layout,
    key: jax.Array,
    config: EngineConfig,
    mesh: jax.sharding.Mesh,
    report: Callable[[int, int], None],
    work: Work,
) -> Iterator[tuple[int, Samples]]:
    stops, watched = _pad_stops(draw.stops), np.asarray(draw.watched, np.int32)
    room, at_once = shape(
        config, len(groups), layout.prompts, draw.samples, layout.slots, stops.shape[1], mesh.shape["data"]
    )
    decode_config = DecodeConfig(temperature=draw.temperature, top_p=draw.top_p, steps=config.steps)
    prefix = None
    if layout.prefix:
        length = len(layout.prefix)
        tokens = np.zeros((1, prefix_slots(length)), np.int32)
        tokens[0, :length] = layout.prefix
        prefix = prefill_prefix(model, tokens, np.full(1, length, np.int32), cache=room.cache)
        work.prefilled_tokens += length
    state = _start(model, prefix, room, key, mesh)

    # The longest first: those that are read together are then alike, and little is computed to fill them up.
    longest = lambda index: (max(map(len, groups[index].prompts)), layout.shared[index])
    queue = collections.deque(sorted(range(len(groups)), key=longest, reverse=True))
    held: dict[int, _Open] = {}  # by slot
    flying: collections.deque[Decoded] = collections.deque()
    while queue or held:
        # Read when a whole admission has room, or when nothing else is left to do; each costs the same.
        while queue and (room.groups - len(held) >= min(at_once, len(queue)) or not held):
            chosen = [(place, slot, queue.popleft()) for place, slot in _places(held, room, at_once)[: len(queue)]]
            with jax.set_mesh(mesh):
                state = dec.admit(model, state, _admission(groups, layout, draw, chosen, at_once, room, work), key)
            held |= {slot: _opened(groups[index], index, room) for _, slot, index in chosen}
        with jax.set_mesh(mesh):
            state, decoded = dec.decode(model, state, stops, watched, decode_config)
        # The device goes on with these tokens while the host looks at those before them.
        flying.append(decoded)
        if len(flying) > 1:
            yield from _look(flying.popleft(), held, groups, draw, room, report, work)


def _places(held: Mapping[int, _Open], room: Shape, at_once: int) -> list[tuple[int, int]]:
    """(place in an admission, slot) for new groups: each group of devices reads into its own free slots, its share of
    the admission at most. What all of them can take first comes first."""
    own, share = room.groups // room.data, at_once // room.data
    found = []
    for number in range(room.data):
        free = [slot for slot in range(number * own, (number + 1) * own) if slot not in held]
        found += [(turn, number * share + turn, slot) for turn, slot in enumerate(free[:share])]
    return [(place, slot) for _, place, slot in sorted(found)]


def _opened(group: Group, index: int, room: Shape) -> _Open:
    there = [p < len(group.prompts) for p in range(room.prompts) for _ in range(room.samples)]
    tokens = [[] if one else None for one in there]
    return _Open(index, tokens, [[] for _ in there], {number for number, one in enumerate(there) if one})


def _look(
    decoded: Decoded,
    held: dict[int, _Open],
    groups: Sequence[Group],
    draw: Draw,
    room: Shape,
    report: Callable[[int, int], None],
    work: Work,
) -> Iterator[tuple[int, Samples]]:
    """Hands out the tokens that the device has decoded; yields the groups that are done, which leave their slots."""
    tokens, sample, ended, watched = hosts.fetch(
        (decoded.tokens_BN, decoded.sample_BN, decoded.ended_BN, decoded.watched_BNW)
    )
    per_group, per_data = room.prompts * room.samples, room.held_samples // room.data
    own = sample >= 0
    work.row_steps += own.shape[0] * int(own.any(axis=0).sum())
    work.sampled_tokens += int(own.sum())
    # Samples are numbered within their group of devices; then all tokens of a sample side by side, in their order.
    sample = sample + np.arange(room.rows)[:, None] // (room.rows // room.data) * per_data
    sample, tokens, ended = (x.T[own.T] for x in (sample, tokens, ended))
    watched = None if watched is None else watched.swapaxes(0, 1)[own.T]
    order = np.argsort(sample, kind="stable")
    numbers, starts = np.unique(sample[order], return_index=True)
    finished, done = 0, []
    for number, (start, end) in zip(numbers, itertools.pairwise([*starts, len(order)]), strict=True):
        own_sample = order[start:end]
        slot, within = divmod(int(number), per_group)
        one = held[slot]
        one.tokens[within].extend(tokens[own_sample].tolist())
        if filters.UNDRAWN in tokens[own_sample]:
            drawn = one.tokens[within][: one.tokens[within].index(filters.UNDRAWN)]
            raise _Undrawn((*groups[one.group].prompts[within // draw.samples], *drawn))
        if watched is not None:
            one.watched[within].append(watched[own_sample])
        if ended[own_sample[-1]]:
            finished += 1
            one.unfinished.remove(within)
            if not one.unfinished:
                done.append(slot)
    report(finished, int(own.sum()))
    for slot in done:
        one = held.pop(slot)
        yield one.group, _collect(one, len(groups[one.group].prompts), draw)


def _collect(held: _Open, prompts: int, draw: Draw) -> Samples:
    def one(number: int) -> Sample:
        ids, watched = tuple(held.tokens[number]), held.watched[number]
        finished = any(ids[-len(stop) :] == stop for stop in draw.stops)
        return Sample(ids, finished, np.concatenate(watched) if watched else None)

    return tuple(tuple(one(p * draw.samples + c) for c in range(draw.samples)) for p in range(prompts))


def _pad_stops(stops: Sequence[Ids]) -> np.ndarray:
    """Stop sequences side by side, the short ones filled on the left with what matches any token."""
    width = max((len(stop) for stop in stops), default=1)
    padded = [(dec.NO_TOKEN,) * (width - len(stop)) + stop for stop in stops]
    return np.asarray(padded, np.int32).reshape(len(stops), width)


def _admission(
    groups: Sequence[Group],
    layout: _Layout,
    draw: Draw,
    chosen: Sequence[tuple[int, int, int]],
    at_once: int,
    room: Shape,
    work: Work,
) -> Admission:
    """The chosen (place, slot, group) as arrays, the places that are not taken as padding."""
    P, C, prefix, own = room.prompts, room.samples, len(layout.prefix), room.groups // room.data
    new = Admission(
        slot_A=np.full(at_once, own, np.int32),
        group_tokens_AT=np.zeros((at_once, layout.slots[0]), np.int32),
        group_length_A=np.zeros(at_once, np.int32),
        prompt_tokens_APT=np.zeros((at_once, P, layout.slots[1]), np.int32),
        prompt_length_AP=np.zeros((at_once, P), np.int32),
        last_AP=np.zeros((at_once, P), np.int32),
        limit_APC=np.zeros((at_once, P, C), np.int32),
        address_A=np.zeros((at_once, 2), np.uint32),
    )
    for i, slot, index in chosen:
        group, shared = groups[index], layout.shared[index]
        new.slot_A[i] = slot % own
        new.address_A[i] = group.address
        new.group_length_A[i] = shared
        new.group_tokens_AT[i, :shared] = group.prompts[0][prefix : prefix + shared]
        for p, prompt in enumerate(group.prompts):
            rest = prompt[prefix + shared : -1]
            new.prompt_tokens_APT[i, p, : len(rest)] = rest
            new.prompt_length_AP[i, p] = len(rest)
            new.last_AP[i, p] = prompt[-1]
            new.limit_APC[i, p] = draw.max_new_tokens if group.limits is None else group.limits[p]
            work.prompt_tokens += C * (len(prompt) - 1)
    reads = ((new.group_length_A, layout.slots[0], 0), (new.prompt_length_AP, layout.slots[1], HALVINGS))
    for lengths, slots, halvings in reads:
        computed = positions_read(lengths.reshape(room.data, -1), slots, halvings)
        work.prefilled_tokens += int(lengths.sum())
        work.padded_tokens += computed - int(lengths.sum())
    return new


_LEVEL_AXES = ("layers", "batch", "kv_heads", "slots", "head")


def shardings(mesh: jax.sharding.Mesh, state: DecodeState) -> DecodeState:
    """Rows of every level over the data axis, heads over the tensor axis; what has no rows everywhere."""

    def place(path: tuple, leaf: jax.Array) -> jax.sharding.NamedSharding:
        name = jax.tree_util.keystr(path)
        table: Mapping[str, rules.MeshAxes] = rules.SAMPLE | ({"batch": ()} if "prefix" in name else {})
        axes = _LEVEL_AXES[-leaf.ndim :] if leaf.ndim >= 4 else ("batch", "slots")[: leaf.ndim]
        return rules.sharding(mesh, table, axes)

    return jax.tree_util.tree_map_with_path(place, state)


@functools.partial(jax.jit, static_argnames=("room", "mesh"))
def _start(model: Llama, prefix, room: Shape, seed, mesh) -> DecodeState:
    """As `decode.start`, each device making its own part of the cache only."""
    state = dec.start(model, prefix, room, seed)
    return jax.lax.with_sharding_constraint(state, shardings(mesh, state))
