"""Sampling many prompts: slots, shared prefixes, N samples of each.

The engine speaks token ids: lists of ints in, lists of ints out.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import numpy as np

from srlm_jax.model.llama import Llama
from srlm_jax.parallel import hosts, rules
from srlm_jax.sampling import decode as dec
from srlm_jax.sampling.decode import Admission, DecodeConfig, DecodeState

Ids = tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How wide and how patient the engine is; neither changes what is sampled."""

    rows: int  # completions decoded at once on a process's devices, or on all where only they hold the weights
    steps: int  # tokens between two looks at which rows have ended


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """Prompts that are sampled together because they share their beginning; `address` seeds their random numbers."""

    address: tuple[int, int]  # two unsigned 32-bit integers
    prompts: tuple[Ids, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Draw:
    """How to sample: `samples` completions of each prompt, each ended by any of `stops` (which it then includes)."""

    samples: int
    temperature: float
    top_p: float
    max_new_tokens: int
    stops: tuple[Ids, ...]


@dataclasses.dataclass(frozen=True)
class Sample:
    """One completion. `finished` is False where `max_new_tokens` cut it."""

    ids: Ids
    finished: bool


# One group's samples, by prompt.
Samples = tuple[tuple[Sample, ...], ...]


@dataclasses.dataclass
class Work:
    """What an engine has done: prompt tokens it was asked to read, those it computed, and decoding slots used."""

    prompt_tokens: int = 0  # over all rows, as if nothing were shared
    prefilled_tokens: int = 0  # computed, without padding
    row_steps: int = 0  # rows x decoding steps run
    sampled_tokens: int = 0  # of them, tokens that belong to a completion


def bucket(length: int) -> int:
    """`length` rounded up to 8, 12, 16, 24, 32, 48, ...: few sizes, so few compilations, and a third at most lost."""
    size = 8
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


def _common(sequences: Sequence[Ids]) -> int:
    """Length of the longest common beginning: that of the first and the last in order."""
    first, last = min(sequences), max(sequences)
    return next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))


def groups_at_once(rows: int, rows_per_group: int, groups: int, data: int) -> int:
    """How many groups are held at once: as `rows` allows, no more than there are, and as many on each data group."""
    return -(-min(max(1, rows // rows_per_group), groups) // data) * data


def admitted_at_once(held: int, data: int) -> int:
    """How many of `held` groups are prefilled together: a quarter, and as many on each data group."""
    return max(data, held // 4 // data * data)


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
        prefix = _common(heads) // 4 * 4 if len(groups) > 1 else 0
        shared = tuple(_common([prompt[:-1] for prompt in group.prompts]) - prefix for group in groups)
        rest = [len(p) - 1 - prefix - n for group, n in zip(groups, shared, strict=True) for p in group.prompts]
        slots = (bucket(max(shared)), bucket(max(rest)), bucket(max_new_tokens))
        return cls(heads[0][:prefix], shared, slots, max(len(group.prompts) for group in groups))


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
    however wide the engine is, as far as the device adds in the same order.

    Args:
      key: what the random numbers of this stage derive from.
      report: called with (completions finished, tokens sampled) since the last call.
      work: counters, added to.

    Raises:
      ValueError: a prompt without tokens.
    """
    if not groups:
        return []
    if any(not group.prompts or not all(group.prompts) for group in groups):
        raise ValueError("every group needs a prompt and every prompt a token (the begin token, say)")
    layout = _Layout.of(groups, draw.max_new_tokens)
    results: list[Samples | None] = [None] * len(groups)
    for index, samples in _run(model, groups, draw, layout, key, config, mesh, report, work):
        results[index] = samples
    return results


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
    P, C = layout.prompts, draw.samples
    data = mesh.shape["data"]
    G = groups_at_once(config.rows, P * C, len(groups), data)
    at_once = admitted_at_once(G, data)
    stops = _pad_stops(draw.stops)
    decode_config = DecodeConfig(
        temperature=draw.temperature, top_p=draw.top_p, max_new_tokens=draw.max_new_tokens, steps=config.steps
    )
    prefix = None
    if layout.prefix:
        prefix = dec.prefill_prefix(model, np.asarray([layout.prefix], np.int32))
        work.prefilled_tokens += len(layout.prefix)
    state = _start(model, prefix, G, P, C, layout.slots, stops.shape[1], key, mesh)

    queue = collections.deque(range(len(groups)))
    held: list[int | None] = [None] * G  # which group each slot works on
    tokens: dict[int, list[list[int]]] = {}  # by slot, by row
    while queue or any(group is not None for group in held):
        # Admit when a whole admission fits, or when nothing else is left to do; each costs the same.
        while queue and (held.count(None) >= min(at_once, len(queue)) or held.count(None) == G):
            free = [slot for slot, group in enumerate(held) if group is None]
            chosen = [(slot, queue.popleft()) for slot in free[: min(at_once, len(queue))]]
            with jax.set_mesh(mesh):
                state = dec.admit(model, state, _admission(groups, layout, chosen, at_once, G, C, work), key)
            for slot, group in chosen:
                held[slot] = group
                tokens[slot] = [[] for _ in range(P * C)]
        with jax.set_mesh(mesh):
            state, new, owned = dec.decode(model, state, stops, decode_config)
        new, owned, active = hosts.fetch((new, owned, state.active_B))
        finished, sampled = 0, int(owned.sum())
        work.row_steps += owned.shape[0] * int(owned.any(axis=0).sum())
        work.sampled_tokens += sampled
        for slot, group in enumerate(held):
            if group is None:
                continue
            rows = range(slot * P * C, (slot + 1) * P * C)
            for row, kept in zip(rows, tokens[slot], strict=True):
                kept.extend(new[row][owned[row]].tolist())
            if not active[rows.start : rows.stop].any():
                held[slot] = None
                finished += len(groups[group].prompts) * C
                yield group, _collect(tokens.pop(slot), len(groups[group].prompts), C, draw)
        report(finished, sampled)


def _collect(rows: list[list[int]], prompts: int, samples: int, draw: Draw) -> Samples:
    def one(ids: list[int]) -> Sample:
        return Sample(tuple(ids), any(tuple(ids[-len(stop) :]) == stop for stop in draw.stops))

    return tuple(tuple(one(rows[p * samples + c]) for c in range(samples)) for p in range(prompts))


def _pad_stops(stops: Sequence[Ids]) -> np.ndarray:
    """Stop sequences side by side, the short ones filled on the left with what matches any token."""
    width = max((len(stop) for stop in stops), default=1)
    padded = [(dec.NO_TOKEN,) * (width - len(stop)) + stop for stop in stops]
    return np.asarray(padded, np.int32).reshape(len(stops), width)


def _admission(
    groups: Sequence[Group],
    layout: _Layout,
    chosen: Sequence[tuple[int, int]],
    at_once: int,
    past_the_end: int,
    samples: int,
    work: Work,
) -> Admission:
    """The chosen (slot, group) pairs as arrays, padded to `at_once` groups."""
    P, prefix = layout.prompts, len(layout.prefix)
    new = Admission(
        slot_A=np.full(at_once, past_the_end, np.int32),
        group_tokens_AT=np.zeros((at_once, layout.slots[0]), np.int32),
        group_length_A=np.zeros(at_once, np.int32),
        prompt_tokens_APT=np.zeros((at_once, P, layout.slots[1]), np.int32),
        prompt_length_AP=np.zeros((at_once, P), np.int32),
        last_AP=np.zeros((at_once, P), np.int32),
        present_AP=np.zeros((at_once, P), bool),
        address_A=np.zeros((at_once, 2), np.uint32),
    )
    for i, (slot, index) in enumerate(chosen):
        group, shared = groups[index], layout.shared[index]
        new.slot_A[i] = slot
        new.address_A[i] = group.address
        new.group_length_A[i] = shared
        new.group_tokens_AT[i, :shared] = group.prompts[0][prefix : prefix + shared]
        work.prefilled_tokens += shared
        for p, prompt in enumerate(group.prompts):
            rest = prompt[prefix + shared : -1]
            new.prompt_tokens_APT[i, p, : len(rest)] = rest
            new.prompt_length_AP[i, p] = len(rest)
            new.last_AP[i, p] = prompt[-1]
            new.present_AP[i, p] = True
            work.prefilled_tokens += len(rest)
            work.prompt_tokens += samples * (len(prompt) - 1)
    return new


_LEVEL_AXES = ("layers", "batch", "kv_heads", "slots", "head")


def shardings(mesh: jax.sharding.Mesh, state: DecodeState) -> DecodeState:
    """Rows of every level over the data axis, heads over the tensor axis; what has no rows everywhere."""

    def place(path: tuple, leaf: jax.Array) -> jax.sharding.NamedSharding:
        name = jax.tree_util.keystr(path)
        table: Mapping[str, rules.MeshAxes] = rules.SAMPLE | ({"batch": ()} if "prefix" in name else {})
        axes = _LEVEL_AXES if leaf.ndim == 5 else ("batch", "slots")[: leaf.ndim]
        return rules.sharding(mesh, table, axes)

    return jax.tree_util.tree_map_with_path(place, state)


@functools.partial(jax.jit, static_argnames=("groups", "prompts", "samples", "lengths", "stop_length", "mesh"))
def _start(model: Llama, prefix, groups, prompts, samples, lengths, stop_length, seed, mesh) -> DecodeState:
    """As `decode.start`, each device making its own part of the cache only."""
    state = dec.start(model, prefix, groups, prompts, samples, lengths, stop_length, seed)
    return jax.lax.with_sharding_constraint(state, shardings(mesh, state))
