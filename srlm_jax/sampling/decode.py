"""Prefill, admission and decoding as compiled functions of an explicit state.

A batch is a tree (see `model.cache`): G groups of prompts, P prompts each, C samples of each prompt. A level holds the
tokens that a group's prompts share, the next the rest of each prompt but its last token; the leaf holds what each row
decodes, its prompt's last token first. Every group is a slot that can be given to new work while the others go on.

Axes: L layers, G groups, R = G * P prompts, B = R * C rows, K key-value heads, S slots of a level, H head width,
T tokens of a prefill, V vocabulary, M longest stop sequence, Q stop sequences, A groups admitted at once.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from srlm_jax.model import cache as kv
from srlm_jax.model.attention import Readable
from srlm_jax.model.cache import Cache, Level
from srlm_jax.model.llama import Llama
from srlm_jax.sampling import filters

NO_TOKEN = -1  # in a stop sequence: any token matches


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """What a compiled decoding depends on besides shapes."""

    temperature: float
    top_p: float
    max_new_tokens: int
    steps: int  # tokens between two looks of the host


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """Everything a decoding carries from one token to the next.

    prefix: the level of one row that all prompts share, or None.
    groups, prompts: the levels of G and R rows.
    k, v: the leaf level, a ring: all rows write slot `clock % S`, and row b owns the `written_B[b]` slots before it.
    clock: tokens decoded since the start, by any row.
    written_B: tokens that row b has in the leaf.
    last_B: the token that row b reads next.
    position_B: that token's place in its document.
    recent_BM: the last M tokens of row b, the newest last, for the stop sequences; NO_TOKEN before its first.
    seed_B: what the row's random numbers derive from: a key of its own.
    active_B: whether row b is still decoding.
    """

    prefix: Level | None
    groups: Level
    prompts: Level
    k_LBKSH: Float[Array, "L B K S H"]
    v_LBKSH: Float[Array, "L B K S H"]
    clock: Int[Array, ""]
    written_B: Int[Array, "B"]
    last_B: Int[Array, "B"]
    position_B: Int[Array, "B"]
    recent_BM: Int[Array, "B M"]
    seed_B: Array
    active_B: Bool[Array, "B"]


def _ancestors(prefix: Level | None, *levels: Level) -> tuple[Level, ...]:
    return (() if prefix is None else (prefix,)) + levels


def _prefill(model: Llama, parents: tuple[Level, ...], tokens_RT, lengths_R, start_R) -> Level:
    R, T = tokens_RT.shape
    valid_RT = jnp.arange(T)[None] < lengths_R[:, None]
    empty = kv.empty(model.config, R, T)
    cache = Cache(
        parents=parents,
        k_LBKSH=empty,
        v_LBKSH=empty,
        slot=jnp.int32(0),
        # What fills a row up lies to the right of its tokens, so that none of them reads it.
        readable=Readable(causal=True, segments_BT=None, valid_RS=None),
    )
    positions_RT = start_R[:, None] + jnp.arange(T)[None]
    _, cache = model(tokens_RT, positions_RT, segments_BT=None, cache=cache, dropout=None)
    return Level(cache.k_LBKSH, cache.v_LBKSH, valid_RT)


@jax.jit
def prefill_prefix(model: Llama, tokens_1T: Int[Array, "1 T"]) -> Level:
    """The level of the tokens that all prompts begin with."""
    length = jnp.full(1, tokens_1T.shape[1])
    return _prefill(model, (), tokens_1T, length, jnp.zeros(1, jnp.int32))


def start(model: Llama, prefix: Level | None, groups: int, prompts: int, samples: int, lengths, stop_length, seed):
    """An idle state for `groups` groups of `prompts` prompts of `samples` samples.

    `lengths` are the slots of the group level, the prompt level and the leaf.
    """
    config = model.config
    R, B = groups * prompts, groups * prompts * samples

    def level(rows: int, slots: int) -> Level:
        # Two arrays, not one twice: the state is donated, and no buffer can be donated twice.
        return Level(kv.empty(config, rows, slots), kv.empty(config, rows, slots), jnp.zeros((rows, slots), bool))

    leaf = level(B, lengths[2])
    return DecodeState(
        prefix=prefix,
        groups=level(groups, lengths[0]),
        prompts=level(R, lengths[1]),
        k_LBKSH=leaf.k_LRKSH,
        v_LBKSH=leaf.v_LRKSH,
        clock=jnp.int32(0),
        written_B=jnp.zeros(B, jnp.int32),
        last_B=jnp.zeros(B, jnp.int32),
        position_B=jnp.zeros(B, jnp.int32),
        recent_BM=jnp.full((B, stop_length), NO_TOKEN, jnp.int32),
        seed_B=jnp.repeat(seed[None], B, axis=0),
        active_B=jnp.zeros(B, bool),
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Admission:
    """New work for A groups; a group whose slot is past the end is padding and changes nothing."""

    slot_A: Int[Array, "A"]
    group_tokens_AT: Int[Array, "A T"]  # what the prompts of the group share, beyond the prefix
    group_length_A: Int[Array, "A"]
    prompt_tokens_APT: Int[Array, "A P T"]  # the rest of each prompt, but its last token
    prompt_length_AP: Int[Array, "A P"]
    last_AP: Int[Array, "A P"]  # the last token of each prompt
    present_AP: Bool[Array, "A P"]  # a group may have fewer prompts than the widest
    address_A: Int[Array, "A 2"]  # what the group's random numbers derive from: a hash of its id


@functools.partial(jax.jit, donate_argnames="state")
def admit(model: Llama, state: DecodeState, new: Admission, root_key: Array) -> DecodeState:
    """Prefills new groups into their slots. Each prompt is prefilled once, whatever its samples."""
    A, P = new.last_AP.shape
    G = state.groups.valid_RS.shape[0]
    C = state.last_B.shape[0] // (G * P)
    prefix_length = 0 if state.prefix is None else state.prefix.valid_RS.shape[1]

    start_A = jnp.full(A, prefix_length)
    group_level = _prefill(model, _ancestors(state.prefix), new.group_tokens_AT, new.group_length_A, start_A)
    start_AP = jnp.broadcast_to((start_A + new.group_length_A)[:, None], (A, P))
    prompt_level = _prefill(
        model,
        _ancestors(state.prefix, group_level),
        new.prompt_tokens_APT.reshape(A * P, -1),
        new.prompt_length_AP.reshape(-1),
        start_AP.reshape(-1),
    )

    def put(old: Array, fresh: Array, axis: int, per_group: int) -> Array:
        """Writes A groups of `per_group` rows each into their slots, along `axis`; padding's slots are dropped."""
        rows = (new.slot_A[:, None] * per_group + jnp.arange(per_group)[None]).reshape(-1)
        index = (slice(None),) * axis + (rows,)
        return old.at[index].set(fresh.astype(old.dtype), mode="drop")

    def put_level(old: Level, fresh: Level, per_group: int) -> Level:
        return Level(
            put(old.k_LRKSH, fresh.k_LRKSH, 1, per_group),
            put(old.v_LRKSH, fresh.v_LRKSH, 1, per_group),
            put(old.valid_RS, fresh.valid_RS, 0, per_group),
        )

    def put_rows(old: Array, fresh_AP: Array) -> Array:
        fresh = jnp.repeat(fresh_AP.reshape(A * P, *fresh_AP.shape[2:]), C, axis=0)
        return put(old, fresh, 0, P * C)

    # One key a row, from (stage, group, prompt, sample): where a row sits in the batch has no part in it.
    def row_key(address_2: Array, prompt: Array, sample: Array) -> Array:
        key = jax.random.fold_in(jax.random.fold_in(root_key, address_2[0]), address_2[1])
        return jax.random.fold_in(jax.random.fold_in(key, prompt), sample)

    over_samples = jax.vmap(row_key, (None, None, 0))
    over_prompts = jax.vmap(over_samples, (None, 0, None))
    keys_APC = jax.vmap(over_prompts, (0, None, None))(new.address_A, jnp.arange(P), jnp.arange(C))
    row_slots = (new.slot_A[:, None] * P * C + jnp.arange(P * C)[None]).reshape(-1)
    return dataclasses.replace(
        state,
        groups=put_level(state.groups, group_level, 1),
        prompts=put_level(state.prompts, prompt_level, P),
        written_B=put_rows(state.written_B, jnp.zeros((A, P), jnp.int32)),
        last_B=put_rows(state.last_B, new.last_AP),
        position_B=put_rows(state.position_B, start_AP + new.prompt_length_AP),
        recent_BM=put_rows(state.recent_BM, jnp.full((A, P, state.recent_BM.shape[1]), NO_TOKEN)),
        seed_B=state.seed_B.at[row_slots].set(keys_APC.reshape(-1), mode="drop"),
        active_B=put_rows(state.active_B, new.present_AP),
    )


@functools.partial(jax.jit, static_argnames="config", donate_argnames="state")
def decode(
    model: Llama, state: DecodeState, stops_QM: Int[Array, "Q M"], config: DecodeConfig
) -> tuple[DecodeState, Int[Array, "B steps"], Bool[Array, "B steps"]]:
    """Decodes `config.steps` tokens of every active row, or fewer where all rows end earlier.

    Returns the state, the tokens, and which of them are a row's own: a row that ended owns none from there on. A row
    ends with a stop sequence, which is among its tokens, or after `config.max_new_tokens`.
    """
    B, S = state.last_B.shape[0], state.k_LBKSH.shape[3]
    head_DV = model.head()

    def alive(carry):
        step, state, _, _ = carry
        return (
            (step < config.steps)  # the host wants a look
            & jnp.any(state.active_B)  # every row has ended
        )

    def one_token(carry):
        step, state, tokens, owned = carry
        slot = state.clock % S
        # A ring of S slots, this token written at slot 1, rows that own 3, 1 and 0 slots before it:
        #   slots   0 1 2 3 4 5
        #   row 0   x x . . x x        age = (slot - s) mod S <= written
        #   row 1   x x . . . .
        #   row 2   . x . . . .
        age_S = (slot - jnp.arange(S)) % S
        cache = Cache(
            parents=_ancestors(state.prefix, state.groups, state.prompts),
            k_LBKSH=state.k_LBKSH,
            v_LBKSH=state.v_LBKSH,
            slot=slot,
            readable=Readable(causal=False, segments_BT=None, valid_RS=age_S[None] <= state.written_B[:, None]),
        )
        hidden_B1D, cache = model(
            state.last_B[:, None], state.position_B[:, None], segments_BT=None, cache=cache, dropout=None
        )
        logits_BV = jnp.einsum("bd,dv->bv", hidden_B1D[:, 0], head_DV, preferred_element_type=jnp.float32)
        keys_B = jax.vmap(jax.random.fold_in)(state.seed_B, state.written_B)
        drawn_B = filters.draw(logits_BV, keys_B, config.temperature, config.top_p)
        recent_BM = jnp.concatenate([state.recent_BM[:, 1:], drawn_B[:, None]], axis=1)
        matches_BQM = (recent_BM[:, None] == stops_QM[None]) | (stops_QM[None] == NO_TOKEN)
        stopped_B = jnp.any(jnp.all(matches_BQM, axis=-1), axis=-1)
        written_B = state.written_B + 1
        tokens = jax.lax.dynamic_update_slice(tokens, drawn_B[:, None], (0, step))
        owned = jax.lax.dynamic_update_slice(owned, state.active_B[:, None], (0, step))
        state = dataclasses.replace(
            state,
            k_LBKSH=cache.k_LBKSH,
            v_LBKSH=cache.v_LBKSH,
            clock=state.clock + 1,
            written_B=written_B,
            last_B=drawn_B,
            position_B=state.position_B + 1,
            recent_BM=recent_BM,
            active_B=state.active_B & ~stopped_B & (written_B < config.max_new_tokens),
        )
        return step + 1, state, tokens, owned

    blank = (jnp.zeros((B, config.steps), jnp.int32), jnp.zeros((B, config.steps), bool))
    _, state, tokens, owned = jax.lax.while_loop(alive, one_token, (jnp.int32(0), state, *blank))
    return state, tokens, owned
