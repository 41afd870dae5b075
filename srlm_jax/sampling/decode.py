"""Admission and decoding as compiled functions of an explicit state.

What is sampled is a tree (see `model.cache`): groups of prompts, P prompts each, C samples of each prompt. A level
holds the tokens that a group's prompts share, the next the rest of each prompt but its last token; the leaf holds what
is decoded, the prompt's last token first.

G groups are held at once, with R = G * P prompts and X = R * C samples. Fewer samples than are held are decoded at a
time, in B rows: a row that has ended a sample takes the next one in the queue at the very next token, of whatever
prompt it is. So all rows have work while new groups are read and finished ones leave; the host only looks on.

Axes: L layers, K key-value heads, S slots of a level, H head width, T tokens of a prefill, V vocabulary, M longest stop
sequence, Q stop sequences, W watched tokens, A groups admitted at once, D groups of devices, each with G / D groups,
B / D rows and X / D samples of its own: rows and samples are numbered within them.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from srlm_jax.model import cache as kv
from srlm_jax.model.attention import ALL, Siblings
from srlm_jax.model.cache import Cache, Level, Stacks
from srlm_jax.model.int8 import Slots
from srlm_jax.model.llama import Llama
from srlm_jax.parallel import rules
from srlm_jax.sampling import filters
from srlm_jax.sampling.prefill import CHUNK, HALVINGS, Below, prefill

NO_TOKEN = -1  # in a stop sequence: any token matches
NO_SAMPLE = -1  # what an idle row decodes


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """What a compiled decoding depends on besides shapes."""

    temperature: float
    top_p: float
    steps: int  # tokens between two looks of the host


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """How many of everything a state has room for."""

    data: int  # D
    groups: int  # G
    prompts: int  # P
    samples: int  # C
    rows: int  # B
    slots: tuple[int, int, int]  # of the group level, the prompt level and the leaf
    stop_length: int  # M
    cache: str | None  # "int8": keys and values are kept in 8 bits

    @property
    def held_samples(self) -> int:
        """X."""
        return self.groups * self.prompts * self.samples


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """Everything a decoding carries from one token to the next.

    prefix: the level of one row that all prompts share, or None.
    groups, prompts: the levels of G and R rows.
    k, v: the leaf level, a ring: all rows write slot `clock % S`, and row b owns the `written_B[b]` slots before it.
    clock: tokens decoded since the start, by any row.

    Of the samples that are held: how a row begins with one.
    first_X: the token that it reads first.
    start_X: that token's place in its document.
    limit_X: how many tokens it may have.
    seed_X: what its random numbers derive from: a key of its own.
    readers_DX: the row that decodes it; B / D where none does.

    queue_DX: samples that wait for a row, from `head_D` to `tail_D`, both modulo X / D.

    Of the rows: where each is with its sample.
    sample_B: the sample; NO_SAMPLE where the row is idle.
    written_B: tokens that the row has in the leaf.
    last_B: the token that it reads next.
    recent_BM: its last M tokens, the newest last, for the stop sequences; NO_TOKEN before its first.
    """

    prefix: Level | None
    groups: Level
    prompts: Level
    k_LBKSH: Stacks
    v_LBKSH: Stacks
    clock: Int[Array, ""]
    first_X: Int[Array, "X"]
    start_X: Int[Array, "X"]
    limit_X: Int[Array, "X"]
    seed_X: Array
    readers_DX: Int[Array, "D X"]
    queue_DX: Int[Array, "D X"]
    head_D: Int[Array, "D"]
    tail_D: Int[Array, "D"]
    sample_B: Int[Array, "B"]
    written_B: Int[Array, "B"]
    last_B: Int[Array, "B"]
    recent_BM: Int[Array, "B M"]


def start(model: Llama, prefix: Level | None, shape: Shape, seed: Array) -> DecodeState:
    """A state without any groups yet."""
    config, D, B, X = model.config, shape.data, shape.rows, shape.held_samples

    def level(rows: int, slots: int) -> Level:
        # Two arrays, not one twice: the state is donated, and no buffer can be donated twice.
        k, v = (kv.empty(config, model.layers, rows, slots, shape.cache) for _ in range(2))
        return Level(k, v, jnp.zeros(rows, jnp.int32))

    leaf = level(B, shape.slots[2])
    zeros = lambda *sizes: jnp.zeros(sizes, jnp.int32)
    return DecodeState(
        prefix=prefix,
        groups=level(shape.groups, shape.slots[0]),
        prompts=level(shape.groups * shape.prompts, shape.slots[1]),
        k_LBKSH=leaf.k_LRKSH,
        v_LBKSH=leaf.v_LRKSH,
        clock=zeros(),
        first_X=zeros(X),
        start_X=zeros(X),
        limit_X=zeros(X),
        seed_X=jnp.repeat(seed[None], X, axis=0),
        readers_DX=jnp.full((D, X // D), B // D, jnp.int32),
        queue_DX=zeros(D, X // D),
        head_D=zeros(D),
        tail_D=zeros(D),
        sample_B=jnp.full(B, NO_SAMPLE, jnp.int32),
        written_B=zeros(B),
        last_B=zeros(B),
        recent_BM=jnp.full((B, shape.stop_length), NO_TOKEN, jnp.int32),
    )


# --- admission --------------------------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Admission:
    """New work for A groups, A / D for each group of devices; one whose slot is past the end is padding and changes
    nothing."""

    slot_A: Int[Array, "A"]  # counted within the group of devices
    group_tokens_AT: Int[Array, "A T"]  # what the prompts of the group share, beyond the prefix
    group_length_A: Int[Array, "A"]
    prompt_tokens_APT: Int[Array, "A P T"]  # the rest of each prompt, but its last token
    prompt_length_AP: Int[Array, "A P"]
    last_AP: Int[Array, "A P"]  # the last token of each prompt
    limit_APC: Int[Array, "A P C"]  # of each sample's tokens; 0: there is no such sample
    address_A: Int[Array, "A 2"]  # what the group's random numbers derive from: a hash of its id


@functools.partial(jax.jit, donate_argnames="state")
def admit(model: Llama, state: DecodeState, new: Admission, root_key: Array) -> DecodeState:
    """Reads new groups into their slots, each prompt once, and puts their samples at the end of the queue."""
    A, P, C = new.limit_APC.shape
    D = state.head_D.shape[0]
    parents = () if state.prefix is None else (state.prefix,)
    start_A = jnp.full(A, 0 if state.prefix is None else state.prefix.length_R[0])
    read = functools.partial(
        prefill, model, parents, data=D, chunk=CHUNK, cache="int8" if isinstance(state.k_LBKSH[0], Slots) else None
    )
    group_level = read(None, new.group_tokens_AT, new.group_length_A, start_A, halvings=0)
    start_AP = jnp.broadcast_to((start_A + new.group_length_A)[:, None], (A, P))
    # The rows of each group of devices by their length, so that those that end early are out of the way of the others.
    order_DX = jnp.argsort(-new.prompt_length_AP.reshape(D, -1), axis=1)
    by_length = lambda x: jax.vmap(lambda x, order: x[order])(x.reshape(*order_DX.shape, *x.shape[2:]), order_DX)
    flat = lambda x: by_length(x).reshape(A * P, *x.shape[2:])
    prompt_level = read(
        Below(group_level, order_DX),
        flat(new.prompt_tokens_APT),
        flat(new.prompt_length_AP),
        flat(start_AP),
        halvings=HALVINGS,
    )

    slot_DA = new.slot_A.reshape(D, A // D)
    every = lambda per_group: (slot_DA[:, :, None] * per_group + jnp.arange(per_group)[None, None]).reshape(D, -1)

    def put(old: Array, fresh: Array, axis: int, entries_DI: Array) -> Array:
        """Writes what is new to its entries along `axis`; padding's are past the end, and dropped.

        Each group of devices has its own entries and, of what is new, its own share: nothing moves between them.
        """
        axis = axis % old.ndim
        shares = [x.reshape(*x.shape[:axis], D, x.shape[axis] // D, *x.shape[axis + 1 :]) for x in (old, fresh)]
        write = lambda old, fresh, entries: old.at[(slice(None),) * axis + (entries,)].set(fresh, mode="drop")
        return jax.vmap(write, (axis, axis, 0), axis)(*shares, entries_DI).reshape(old.shape)

    def put_level(old: Level, fresh: Level, entries_DI: Array) -> Level:
        stacks = [(level.k_LRKSH, level.v_LRKSH) for level in (old, fresh)]
        k, v = jax.tree.map(lambda old, fresh: put(old, fresh, kv.ROWS, entries_DI), *stacks)
        return Level(k, v, put(old.length_R, fresh.length_R, 0, entries_DI))

    def put_samples(old: Array, fresh_APC: Array) -> Array:
        return put(old, jnp.broadcast_to(fresh_APC, (A, P, C)).reshape(-1), 0, every(P * C))

    # One key a sample, from (stage, group, prompt, sample): where it sits in the batch has no part in it.
    def key(address_2: Array, prompt: Array, sample: Array) -> Array:
        key = jax.random.fold_in(jax.random.fold_in(root_key, address_2[0]), address_2[1])
        return jax.random.fold_in(jax.random.fold_in(key, prompt), sample)

    over_samples = jax.vmap(key, (None, None, 0))
    over_prompts = jax.vmap(over_samples, (None, 0, None))
    keys_APC = jax.vmap(over_prompts, (0, None, None))(new.address_A, jnp.arange(P), jnp.arange(C))

    waits_X = put_samples(jnp.zeros(state.first_X.shape, bool), new.limit_APC > 0)
    queue_DX, tail_D = jax.vmap(_queued)(state.queue_DX, state.tail_D, waits_X.reshape(state.queue_DX.shape))
    return dataclasses.replace(
        state,
        groups=put_level(state.groups, group_level, every(1)),
        prompts=put_level(state.prompts, prompt_level, by_length(every(P).reshape(A, P)).reshape(D, -1)),
        first_X=put_samples(state.first_X, new.last_AP[:, :, None]),
        start_X=put_samples(state.start_X, (start_AP + new.prompt_length_AP)[:, :, None]),
        limit_X=put_samples(state.limit_X, new.limit_APC),
        seed_X=put_samples(state.seed_X, keys_APC),
        queue_DX=queue_DX,
        tail_D=tail_D,
    )


def _queued(queue_X: Array, tail: Array, waits_X: Array) -> tuple[Array, Array]:
    """The queue with more samples at its end, in the order of their numbers."""
    X = waits_X.size
    place_X = jnp.where(waits_X, (tail + jnp.cumsum(waits_X) - 1) % X, X)
    return queue_X.at[place_X].set(jnp.arange(X), mode="drop"), tail + jnp.sum(waits_X)


# --- decoding ---------------------------------------------------------------------------------------------------------


def _refilled(state: DecodeState) -> DecodeState:
    """Idle rows with the next samples of the queue, as far as there are any."""
    D, X = state.queue_DX.shape
    B = state.sample_B.shape[0]

    def of_group(sample_B: Array, queue_X: Array, head: Array, tail: Array):
        idle_B = sample_B == NO_SAMPLE
        turn_B = head + jnp.cumsum(idle_B) - 1
        taken_B = idle_B & (turn_B < tail)
        sample_B = jnp.where(taken_B, queue_X[turn_B % X], sample_B)
        place_B = jnp.where(sample_B == NO_SAMPLE, X, sample_B)
        readers_X = jnp.full(X, B // D, jnp.int32).at[place_B].set(jnp.arange(B // D), mode="drop")
        return sample_B, taken_B, readers_X, head + jnp.sum(taken_B)

    sample_DB, taken_DB, readers_DX, head_D = jax.vmap(of_group)(
        state.sample_B.reshape(D, -1), state.queue_DX, state.head_D, state.tail_D
    )
    taken_B = taken_DB.reshape(-1)
    return dataclasses.replace(
        state,
        readers_DX=readers_DX,
        head_D=head_D,
        sample_B=sample_DB.reshape(-1),
        written_B=jnp.where(taken_B, 0, state.written_B),
        last_B=jnp.where(taken_B, _of_sample(state.first_X, sample_DB), state.last_B),
        recent_BM=jnp.where(taken_B[:, None], NO_TOKEN, state.recent_BM),
    )


def _of_sample(x_X: Array, sample_DB: Array) -> Array:
    """For each row what `x_X` has for its sample; for an idle one, anything."""
    D = sample_DB.shape[0]
    return jax.vmap(lambda x, index: x[index])(x_X.reshape(D, -1), jnp.maximum(sample_DB, 0)).reshape(-1)


def _read_by_any(level: Level, readers_DX: Array, rows: int) -> Level:
    """A level in which the rows that no active sample attends to have length 0, so that kernels skip them."""
    read_R = jnp.any((readers_DX < rows).reshape(level.length_R.shape[0], -1), axis=1)
    return dataclasses.replace(level, length_R=jnp.where(read_R, level.length_R, 0))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Decoded:
    """What `decode` gives the host to look at: N steps, those that it did not need without a sample in any row."""

    tokens_BN: Int[Array, "B N"]
    sample_BN: Int[Array, "B N"]  # whose the token is; NO_SAMPLE where the row was idle
    ended_BN: Int[Array, "B N"]  # 1 where it is its sample's last
    watched_BNW: (
        Float[Array, "B N W"] | None
    )  # log-probabilities of the watched tokens in its place; None: none watched


@functools.partial(jax.jit, static_argnames="config", donate_argnames="state")
def decode(
    model: Llama, state: DecodeState, stops_QM: Int[Array, "Q M"], watched_W: Int[Array, "W"], config: DecodeConfig
) -> tuple[DecodeState, Decoded]:
    """Decodes `config.steps` tokens of every row that has work, or fewer where all work ends earlier.

    A sample ends with a stop sequence, which is among its tokens, or after as many tokens as it may have. The
    log-probabilities of the tokens `watched_W` are those of the model, whatever the temperature and top-p are.
    """
    B, S, D = state.sample_B.shape[0], state.k_LBKSH[0].shape[-2], state.queue_DX.shape[0]
    W = watched_W.shape[0]
    head_DV = model.head()
    # The arrays that a refill changes. The others must not pass through the branch, which would copy them.
    names = ("readers_DX", "head_D", "sample_B", "written_B", "last_B", "recent_BM")

    def alive(carry):
        step, state, _ = carry
        return (
            (step < config.steps)  # the host wants a look
            & (jnp.any(state.sample_B != NO_SAMPLE) | jnp.any(state.head_D < state.tail_D))  # all work has ended
        )

    def one_token(carry):
        step, state, out = carry
        wanted = jnp.any(state.sample_B == NO_SAMPLE) & jnp.any(state.head_D < state.tail_D)
        changing = tuple(getattr(state, name) for name in names)

        def refill(changing):
            refilled = _refilled(dataclasses.replace(state, **dict(zip(names, changing, strict=True))))
            return tuple(getattr(refilled, name) for name in names)

        changed = jax.lax.cond(wanted, refill, lambda changing: changing, changing)
        state = dataclasses.replace(state, **dict(zip(names, changed, strict=True)))
        sample_DB = state.sample_B.reshape(D, -1)
        slot = state.clock % S
        # A ring of S slots, this token written at slot 1, rows that own 3, 1 and 0 slots before it:
        #   slots   0 1 2 3 4 5
        #   row 0   x x . . x x
        #   row 1   x x . . . .
        #   row 2   . x . . . .
        own = dataclasses.replace(
            ALL,
            length_R=jnp.where(state.sample_B == NO_SAMPLE, 1, state.written_B + 1),
            start_R=(slot - state.written_B) % S,
        )
        cache = Cache(
            parents=() if state.prefix is None else (state.prefix,),
            shared=tuple(
                _read_by_any(level, state.readers_DX, B // D)
                for level in (state.groups, state.prompts)
                if level.slots > 0
            ),
            siblings=Siblings(state.readers_DX, jnp.maximum(state.sample_B, 0)),
            k_LBKSH=state.k_LBKSH,
            v_LBKSH=state.v_LBKSH,
            slot=slot,
            readable=own,
            among_themselves=False,
        )
        position_B = _of_sample(state.start_X, sample_DB) + state.written_B
        hidden_B1D, cache = model(
            state.last_B[:, None], position_B[:, None], segments_BT=None, cache=cache, dropout=None
        )
        logits_BV = jnp.einsum("bd,dv->bv", hidden_B1D[:, 0], head_DV, preferred_element_type=jnp.float32)
        keys_B = jax.vmap(jax.random.fold_in)(_of_sample(state.seed_X, sample_DB), state.written_B)
        drawn_B = filters.draw(logits_BV, keys_B, config.temperature, config.top_p)
        recent_BM = jnp.concatenate([state.recent_BM[:, 1:], drawn_B[:, None]], axis=1)
        matches_BQM = (recent_BM[:, None] == stops_QM[None]) | (stops_QM[None] == NO_TOKEN)
        written_B = state.written_B + 1
        ended_B = jnp.any(jnp.all(matches_BQM, axis=-1), axis=-1) | (written_B >= _of_sample(state.limit_X, sample_DB))
        put = lambda old, column: jax.lax.dynamic_update_slice(old, column[:, None].astype(jnp.int32), (0, step))
        watched_BNW = out.watched_BNW
        if W:
            logprobs_BW = logits_BV[:, watched_W] - jax.nn.logsumexp(logits_BV, axis=-1, keepdims=True)
            watched_BNW = jax.lax.dynamic_update_slice(watched_BNW, logprobs_BW[:, None], (0, step, 0))
        out = Decoded(
            put(out.tokens_BN, drawn_B),
            put(out.sample_BN, state.sample_B),
            put(out.ended_BN, ended_B),
            watched_BNW,
        )
        state = dataclasses.replace(
            state,
            k_LBKSH=cache.k_LBKSH,
            v_LBKSH=cache.v_LBKSH,
            clock=state.clock + 1,
            sample_B=jnp.where(ended_B, NO_SAMPLE, state.sample_B),
            written_B=written_B,
            last_B=drawn_B,
            recent_BM=recent_BM,
        )
        return step + 1, state, out

    blank = lambda value: jnp.full((B, config.steps), value, jnp.int32)
    watched_BNW = jnp.zeros((B, config.steps, W), jnp.float32) if W else None
    _, state, out = jax.lax.while_loop(
        alive, one_token, (jnp.int32(0), state, Decoded(blank(0), blank(NO_SAMPLE), blank(0), watched_BNW))
    )
    # Whole on every device, so that each process can read it without asking the others for anything.
    return state, jax.tree.map(lambda x: rules.constrain(x, *("slots", "tokens", "slots")[: x.ndim]), out)
