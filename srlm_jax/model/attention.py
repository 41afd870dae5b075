"""Attention by the best kernel that a platform has, chosen in `kernel` and nowhere else.

What may be read is described, not written out: a fused kernel works the description into its own loops, so that no
[T, S] array of scores or of a mask exists. `ops.attend` is the definition that every kernel agrees with.

Axes: L layers, B rows, T new tokens, S keys, N query heads, K key-value heads, G = N / K, H head width, R rows of a
part, C siblings that share one of them, D groups of devices with rows of their own, X places for siblings.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash_kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask
from jaxtyping import Array, Bool, Float, Int

from srlm_jax.model import decode_attention, decode_triton, flash_triton, ops
from srlm_jax.model.int8 import Slots
from srlm_jax.parallel import rules

# The smallest piece of a row that a TPU's kernel works on; below it the scores are small, and plain attention is best.
LANES = 128
# Up to so many keys plain attention's scores are small beside a block's other results.
PLAIN_KEYS = 1_024
QUERY_BLOCK = 128  # the fewest queries whose scores `blocked` computes at once
QUERY_BLOCKS = 8  # of a row, at most


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Readable:
    """Which keys a query may read: those that all of this allows.

    causal: query t reads keys 0 to t.
    segments_BT: with as many keys as queries, and rows of their own: a query reads the keys of its own segment, which
      are next to each other.
    length_R: so many keys of each row hold something; None: all.
    start_R: where these begin, the row being a ring; None: at its first key.
    """

    causal: bool = dataclasses.field(metadata={"static": True})
    segments_BT: Int[Array, "B T"] | None
    length_R: Int[Array, "R"] | None
    start_R: Int[Array, "R"] | None

    def valid_RS(self, keys: int) -> Bool[Array, "R S"]:
        """Which of so many keys hold something, where `length_R` says so.

        start 4, length 3 of 6   ->   1 . . . 1 1
        """
        age_RS = jnp.arange(keys)[None]
        if self.start_R is not None:
            age_RS = (age_RS - self.start_R[:, None]) % keys
        return age_RS < self.length_R[:, None]

    def mask_RCTS(self, first: int | Int[Array, ""], queries: int, keys: int) -> Bool[Array, "#R 1 #T S"]:
        """All of it, written out for `queries` queries from query `first` on.

        causal, segments a a b b ->   1 . . .
                                      1 1 . .
                                      . . 1 .
                                      . . 1 1
        """
        mask = jnp.ones((1, 1, 1, keys), bool)
        if self.causal:
            mask &= (first + jnp.arange(queries)[:, None] >= jnp.arange(keys)[None])[None, None]
        if self.segments_BT is not None:
            own = jax.lax.dynamic_slice_in_dim(self.segments_BT, first, queries, axis=1)
            mask &= (own[:, :, None] == self.segments_BT[:, None, :keys])[:, None]
        if self.length_R is not None:
            mask &= self.valid_RS(keys)[:, None, None]
        return mask


ALL = Readable(causal=False, segments_BT=None, length_R=None, start_R=None)
CAUSAL = dataclasses.replace(ALL, causal=True)


# Keys, or values, of some layers. A stack of one layer has no axis for it: XLA's CPU backend would copy it to cut that
# off, where it reads what it has just written.
Stack = Float[Array, "L R K S H"] | Float[Array, "R K S H"] | Slots


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Part:
    """One layer's keys and values of R rows, and which of them a query may read.

    They stay in the stack of all layers, from which XLA reads the one it wants, and a kernel does too: cut out
    before, they would be copied for it. Row b of the queries reads row b * R // B, siblings being adjacent.
    """

    k_LRKSH: Stack
    v_LRKSH: Stack
    layer: Int[Array, ""]
    readable: Readable

    @property
    def k_RKSH(self) -> Float[Array, "R K S H"] | Slots:
        return self._own(self.k_LRKSH)

    @property
    def v_RKSH(self) -> Float[Array, "R K S H"] | Slots:
        return self._own(self.v_LRKSH)

    def _own(self, stack: jax.Array | Slots) -> jax.Array | Slots:
        index = lambda x: x if x.ndim == 4 else jax.lax.dynamic_index_in_dim(x, self.layer, keepdims=False)
        return jax.tree.map(index, stack)


def alone(k_RKSH: Float[Array, "R K S H"], v_RKSH: Float[Array, "R K S H"], readable: Readable) -> Part:
    """Keys and values that are in no stack."""
    return Part(k_RKSH, v_RKSH, jnp.int32(0), readable)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Siblings:
    """Who reads the rows of a part, where rows of queries come and go and siblings are not adjacent.

    Each of D groups of devices has X places for its rows, and a part's row r is read from the places r * X // R to
    (r + 1) * X // R of all groups' places together.

    readers_DX: which of its group's rows stands at a place; any number where none does.
    place_B: at which of its group's places a row stands; any number where at none, and then what it reads is nothing
      to build on.
    """

    readers_DX: Int[Array, "D X"]
    place_B: Int[Array, "B"]

    def placed(self, q_BNTH: jax.Array) -> jax.Array:
        """Rows, put to their places."""
        return _taken(q_BNTH, self.readers_DX)

    def rows(self, at_places: jax.Array) -> jax.Array:
        """What was found at the places, for each row."""
        return _taken(at_places, self.place_B.reshape(self.readers_DX.shape[0], -1))


def _taken(x: jax.Array, index_DI: jax.Array) -> jax.Array:
    """x[index], where each group has a share of its own of x and counts from its first."""
    shares = x.reshape(index_DI.shape[0], -1, *x.shape[1:])
    # A gather with the groups as a batch axis: the compiler leaves it to each device.
    found = jax.vmap(lambda share, index: jnp.take(share, index, axis=0, mode="clip"))(shares, index_DI)
    return found.reshape(-1, *x.shape[1:])


def attend(
    q_BNTH: Float[Array, "B N T H"],
    parts: list[Part],
    shared: list[Part],
    siblings: Siblings | None,
    dropout: ops.Dropout | None = None,
) -> Float[Array, "B N T H"]:
    """Softmax attention over the keys of all parts together; query head n reads key-value head n // G.

    Args:
      parts: read as `Part` says.
      shared: read as `siblings` says, which is None where there are none.
      dropout: of the probabilities, with one part alone. No kernel has it: the scores are then computed by XLA.

    Differentiable with one part; several are a cache's, which nobody differentiates through.
    """
    single = len(parts) + len(shared) == 1
    if dropout is not None:
        assert single and parts
        return by_xla(q_BNTH, parts[0])(q_BNTH, parts[0], with_lse=False, dropout=dropout)[0]
    kernels = [kernel(rules.platform(), q_BNTH, part, single=single) for part in (*parts, *shared)]
    arrays, tree = jax.tree.flatten((q_BNTH, parts, shared, siblings))

    def run(*arrays: jax.Array) -> jax.Array:
        q_BNTH, parts, shared, siblings = tree.unflatten(arrays)
        if single:
            return kernels[0](q_BNTH, parts[0], with_lse=False)[0]
        found = [one(q_BNTH, part, with_lse=True) for one, part in zip(kernels, parts, strict=False)]
        if shared:
            q_XNTH = siblings.placed(q_BNTH)
            at_places = [
                one(q_XNTH, part, with_lse=True) for one, part in zip(kernels[len(parts) :], shared, strict=True)
            ]
            found += [(siblings.rows(out), siblings.rows(lse)) for out, lse in at_places]
        return ops.merge_attention(*map(list, zip(*found, strict=True)))

    if {*kernels} <= {plain, blocked}:
        return run(*arrays)
    # What is no operation of XLA's own the compiler cannot split: each device runs it on its own rows and heads.
    axes = {
        5: ("layers", "batch", "kv_heads", "slots", "head"),
        4: ("batch", "kv_heads", "tokens", "head"),
        2: ("batch", "tokens"),
        1: ("batch",),
        0: (),
    }
    return rules.on_each_device(run, arrays, [axes[jnp.ndim(array)] for array in arrays])


def kernel(platform: str, q_BNTH: jax.Array, part: Part, *, single: bool) -> Callable:
    """The function for this part on this platform: from queries and a part to the output and, `with_lse`, the
    log-sum-exp of the scores (float32), by which parts are merged. `single`: it is the only part, and nobody asks.
    """
    (T, H), S = q_BNTH.shape[2:], part.k_LRKSH.shape[-2]
    half = q_BNTH.dtype in (jnp.bfloat16, jnp.float16)
    even = H >= 16 and H & (H - 1) == 0  # as this package's kernels for GPUs want it
    of_cache = T == 1 or (part.readable.length_R is not None and not part.readable.causal)
    if platform == "gpu" and half and even and of_cache and decode_triton.block_size(S) is not None:
        return decoding_gpu
    if T == 1:
        fits = H % LANES == 0 and decode_attention.block_of(part.k_LRKSH) is not None
        return decoding if platform == "tpu" and fits else plain
    if platform == "tpu" and min(T, S) >= LANES:
        return splash
    # jax gives cuDNN's log-sum-exp in the output's 16 bits, too few to merge parts by.
    if platform == "gpu" and half and single and H % 8 == 0 and H <= 128 and T == S and part.readable.length_R is None:
        if part.readable.segments_BT is None:
            return cudnn
        if even and part.readable.causal:
            return triton
    return by_xla(q_BNTH, part)


def by_xla(q_BNTH: jax.Array, part: Part) -> Callable:
    """As `kernel`, of the functions that run on every platform."""
    T, S = q_BNTH.shape[2], part.k_LRKSH.shape[-2]
    return blocked if T > QUERY_BLOCK and (S > PLAIN_KEYS or part.readable.causal) else plain


def plain(
    q_BNTH: jax.Array, part: Part, *, with_lse: bool, dropout: ops.Dropout | None = None
) -> tuple[jax.Array, jax.Array]:
    """All scores at once, by XLA."""
    mask = part.readable.mask_RCTS(0, q_BNTH.shape[2], part.k_LRKSH.shape[-2])
    return ops.attend(q_BNTH, part.k_RKSH, part.v_RKSH, mask, dropout)


def blocked(
    q_BNTH: jax.Array, part: Part, *, with_lse: bool, dropout: ops.Dropout | None = None
) -> tuple[jax.Array, jax.Array]:
    """The scores of one block of queries after the other, by XLA: where they are causal, of the keys up to the block's
    end alone. Scores of many keys are computed again on the way back."""
    T, S, readable = q_BNTH.shape[2], part.k_LRKSH.shape[-2], part.readable
    size = max(QUERY_BLOCK, -(-T // QUERY_BLOCKS))

    def one(start: int) -> tuple[jax.Array, jax.Array]:
        end = min(start + size, T)
        keys = min(end, S) if readable.causal else S
        mask = readable.mask_RCTS(start, end - start, keys)
        attend = jax.checkpoint(ops.attend) if S > PLAIN_KEYS else ops.attend
        k, v = (x if keys == S else x[:, :, :keys] for x in (part.k_RKSH, part.v_RKSH))
        return attend(q_BNTH[:, :, start:end], k, v, mask, None if dropout is None else dropout.fold(start))

    outs, lses = zip(*map(one, range(0, T, size)), strict=True)
    return jnp.concatenate(outs, axis=2), jnp.concatenate(lses, axis=2)


def decoding(q_BNTH: jax.Array, part: Part, *, with_lse: bool) -> tuple[jax.Array, jax.Array]:
    """A TPU's kernel for one new token a row."""
    return _decoding(q_BNTH, part, decode_attention.flash_decode)


def decoding_gpu(q_BNTH: jax.Array, part: Part, *, with_lse: bool) -> tuple[jax.Array, jax.Array]:
    """A GPU's kernel for a part of a cache, and for one new token a row or many."""
    return _decoding(q_BNTH, part, decode_triton.flash_decode)


def _decoding(q_BNTH: jax.Array, part: Part, flash_decode: Callable) -> tuple[jax.Array, jax.Array]:
    B, N, T, H = q_BNTH.shape
    R, K, S, _ = part.k_LRKSH.shape[-4:]
    C, readable = B // R, part.readable
    # Siblings, and tokens, are so many more query heads of a key-value head.
    q_RKQH = q_BNTH.reshape(R, C, K, N // K * T, H).swapaxes(1, 2).reshape(R, K, C * N // K * T, H)
    zeros_R = jnp.zeros(R, jnp.int32)
    out, lse = flash_decode(
        q_RKQH * H**-0.5,
        *(jax.tree.map(lambda x: x[None] if x.ndim == 4 else x, stack) for stack in (part.k_LRKSH, part.v_LRKSH)),
        part.layer,
        zeros_R if readable.start_R is None else readable.start_R,
        zeros_R + S if readable.length_R is None else readable.length_R,
    )
    out = out.reshape(R, K, C, N // K * T, H).swapaxes(1, 2).reshape(B, N, T, H)
    return out, lse.reshape(R, K, C, N // K * T).swapaxes(1, 2).reshape(B, N, T)


def splash(q_BNTH: jax.Array, part: Part, *, with_lse: bool) -> tuple[jax.Array, jax.Array | None]:
    """JAX's splash attention for TPUs; differentiable without the log-sum-exp alone."""
    B, N, T, H = q_BNTH.shape
    R, K, S, _ = part.k_LRKSH.shape[-4:]
    C, readable = B // R, part.readable
    queries, keys = (-(-length // LANES) * LANES for length in (T, S))
    # Siblings are so many more query heads of a key-value head.
    q = q_BNTH.reshape(R, C, K, N // K, T, H).swapaxes(1, 2).reshape(R, K * C * N // K, T, H)
    q = _pad(q * H**-0.5, 2, queries, 0)
    # What is rounded it reads multiplied out: a layer of a parent, for many queries.
    k, v = (x.multiplied(q.dtype) if isinstance(x, Slots) else x for x in (part.k_RKSH, part.v_RKSH))
    k, v = _pad(k, 2, keys, 0), _pad(v, 2, keys, 0)
    # Keys beyond the row come after all of its queries, or have a segment that these have not.
    ids = None
    if readable.segments_BT is not None:
        own = _pad(readable.segments_BT, 1, queries, -1)
        ids = splash_kernel.SegmentIds(own, own)
    elif readable.length_R is not None or not readable.causal:
        valid = jnp.ones((R, S), bool) if readable.length_R is None else readable.valid_RS(S)
        ids = splash_kernel.SegmentIds(jnp.ones((R, queries), jnp.int32), _pad(valid.astype(jnp.int32), 1, keys, 0))
    mask = (splash_mask.CausalMask if readable.causal else splash_mask.FullMask)((queries, keys))
    run = splash_kernel.make_splash_mha(
        splash_mask.MultiHeadMask([mask] * q.shape[1]),
        block_sizes=_splash_blocks(queries, keys),
        save_residuals=with_lse,
        head_shards=1,
        q_seq_shards=1,
    )
    found = jax.vmap(run)(q, k, v, ids)
    out, lse = (found[0], found[1][0]) if with_lse else (found, None)
    out = out[:, :, :T].reshape(R, K, C, N // K, T, H).swapaxes(1, 2).reshape(B, N, T, H)
    if lse is not None:
        lse = lse[:, :, :T].reshape(R, K, C, N // K, T).swapaxes(1, 2).reshape(B, N, T)
        lse = jnp.maximum(lse, ops.MASKED)
    return out, lse


def _splash_blocks(queries: int, keys: int) -> splash_kernel.BlockSizes:
    """The largest pieces that a row falls into evenly, up to the 512 that suit every TPU's memory."""
    q, k = (max(size for size in (128, 256, 384, 512) if length % size == 0) for length in (queries, keys))
    return splash_kernel.BlockSizes(
        block_q=q, block_kv=k, block_kv_compute=k, block_q_dkv=q, block_kv_dkv=k, block_kv_dkv_compute=k,
        block_q_dq=q, block_kv_dq=k,
    )  # fmt: skip


def cudnn(q_BNTH: jax.Array, part: Part, *, with_lse: bool) -> tuple[jax.Array, None]:
    """cuDNN's flash attention for GPUs; it knows no segments."""
    assert not with_lse
    q, k, v = (x.swapaxes(1, 2) for x in (q_BNTH, part.k_RKSH, part.v_RKSH))
    out = jax.nn.dot_product_attention(q, k, v, is_causal=part.readable.causal, implementation="cudnn")
    return out.swapaxes(1, 2), None


def triton(q_BNTH: jax.Array, part: Part, *, with_lse: bool) -> tuple[jax.Array, None]:
    """A GPU's kernel for packed rows."""
    assert not with_lse
    return flash_triton.flash_attention(q_BNTH, part.k_RKSH, part.v_RKSH, part.readable.segments_BT), None


def _pad(x: jax.Array, axis: int, length: int, value: int) -> jax.Array:
    """`x`, filled up behind to `length` along `axis`."""
    widths = np.zeros((x.ndim, 2), int)
    widths[axis, 1] = length - x.shape[axis]
    return jnp.pad(x, widths, constant_values=value)
