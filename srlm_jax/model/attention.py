"""Attention by the best kernel that a platform has, chosen in `kernel` and nowhere else.

What may be read is described, not written out: a fused kernel works the description into its own loops, so that no
[T, S] array of scores or of a mask exists. `ops.attend` is the definition that every kernel agrees with.

Axes: B rows, T new tokens, S keys, N query heads, K key-value heads, G = N / K, H head width, R rows of a part,
C = B / R siblings that share one of them.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.gpu import attention as triton_attention
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash_kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask
from jaxtyping import Array, Bool, Float, Int

from srlm_jax.model import ops
from srlm_jax.parallel import rules

# The smallest piece of a row that a TPU's kernel works on; below it the scores are small, and plain attention is best.
LANES = 128
# Up to so many keys plain attention's scores are small beside a block's other results.
PLAIN_KEYS = 1_024
QUERY_BLOCK = 256  # queries whose scores `blocked` holds at once
TRITON_BLOCK = 64


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Readable:
    """Which keys a query may read: those that all of this allows.

    causal: query t reads keys 0 to t.
    segments_BT: with as many keys as queries, and rows of their own: a query reads the keys of its own segment.
    valid_RS: which keys hold something.
    """

    causal: bool = dataclasses.field(metadata={"static": True})
    segments_BT: Int[Array, "B T"] | None
    valid_RS: Bool[Array, "R S"] | None

    def mask_RCTS(self, first: int | Int[Array, ""], queries: int, keys: int) -> Bool[Array, "#R 1 #T S"]:
        """The same, written out for `queries` queries from query `first` on.

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
        if self.valid_RS is not None:
            mask &= self.valid_RS[:, None, None]
        return mask


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Part:
    """Keys and values of R rows, and which of them a query may read. Row b of the queries reads row b * R // B."""

    k_RKSH: Float[Array, "R K S H"]
    v_RKSH: Float[Array, "R K S H"]
    readable: Readable


def attend(q_BNTH: Float[Array, "B N T H"], parts: list[Part]) -> Float[Array, "B N T H"]:
    """Softmax attention over the keys of all parts together; query head n reads key-value head n // G.

    Differentiable with one part; several are a cache's, which nobody differentiates through.
    """
    kernels = [kernel(platform(), q_BNTH, part, alone=len(parts) == 1) for part in parts]
    arrays, tree = jax.tree.flatten((q_BNTH, parts))

    def run(*arrays: jax.Array) -> jax.Array:
        q_BNTH, parts = tree.unflatten(arrays)
        if len(parts) == 1:
            return kernels[0](q_BNTH, parts[0], with_lse=False)[0]
        found = [one(q_BNTH, part, with_lse=True) for one, part in zip(kernels, parts, strict=True)]
        return ops.merge_attention(*map(list, zip(*found, strict=True)))

    if {*kernels} <= {plain, blocked}:
        return run(*arrays)
    # What is no operation of XLA's own the compiler cannot split: each device runs it on its own rows and heads.
    axes = {4: ("batch", "kv_heads", "tokens", "head"), 2: ("batch", "tokens")}
    return rules.on_each_device(run, arrays, [axes[array.ndim] for array in arrays])


def platform() -> str:
    """Where the function that is being traced will run: "cpu", "gpu" or "tpu".

    The mesh knows, also where its devices are descriptions alone and this process has none of their kind.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return jax.default_backend() if mesh.empty else mesh.abstract_device.platform


def kernel(platform: str, q_BNTH: jax.Array, part: Part, *, alone: bool) -> Callable:
    """The function for this part on this platform: from queries and a part to the output and, `with_lse`, the
    log-sum-exp of the scores (float32), by which parts are merged. `alone`: it is the only part, so nobody asks for it.
    """
    (T, H), S = q_BNTH.shape[2:], part.k_RKSH.shape[2]
    if T == 1:
        return plain  # the place of a kernel for decoding, which reads each key once and writes few scores
    if platform == "tpu" and min(T, S) >= LANES:
        return splash
    # jax gives cuDNN's log-sum-exp in the output's 16 bits, too few to merge parts by.
    half = q_BNTH.dtype in (jnp.bfloat16, jnp.float16)
    if platform == "gpu" and half and alone and H % 8 == 0 and H <= 128 and T == S and part.readable.valid_RS is None:
        return cudnn if part.readable.segments_BT is None else triton
    return blocked if S > PLAIN_KEYS and T > QUERY_BLOCK else plain


def plain(q_BNTH: jax.Array, part: Part, *, with_lse: bool) -> tuple[jax.Array, jax.Array]:
    """All scores at once, by XLA."""
    mask = part.readable.mask_RCTS(0, q_BNTH.shape[2], part.k_RKSH.shape[2])
    return ops.attend(q_BNTH, part.k_RKSH, part.v_RKSH, mask)


def blocked(q_BNTH: jax.Array, part: Part, *, with_lse: bool) -> tuple[jax.Array, jax.Array]:
    """The scores of one block of queries after the other, by XLA; on the way back they are computed again."""
    B, N, T, H = q_BNTH.shape
    S, blocks = part.k_RKSH.shape[2], -(-T // QUERY_BLOCK)
    q = _pad(q_BNTH, 2, blocks * QUERY_BLOCK, 0).reshape(B, N, blocks, QUERY_BLOCK, H)
    readable = part.readable
    if readable.segments_BT is not None:
        # The last block's queries beyond the row slice past its end: give them a segment to slice.
        readable = dataclasses.replace(readable, segments_BT=_pad(readable.segments_BT, 1, blocks * QUERY_BLOCK, -1))

    @jax.checkpoint
    def one(block: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        index, q_block = block
        mask = readable.mask_RCTS(index * QUERY_BLOCK, QUERY_BLOCK, S)
        return ops.attend(q_block, part.k_RKSH, part.v_RKSH, mask)

    out, lse = jax.lax.map(one, (jnp.arange(blocks), jnp.moveaxis(q, 2, 0)))
    joined = jnp.moveaxis(out, 0, 2).reshape(B, N, -1, H), jnp.moveaxis(lse, 0, 2).reshape(B, N, -1)
    return joined[0][:, :, :T], joined[1][:, :, :T]


def splash(q_BNTH: jax.Array, part: Part, *, with_lse: bool) -> tuple[jax.Array, jax.Array | None]:
    """JAX's splash attention for TPUs; differentiable without the log-sum-exp alone."""
    B, N, T, H = q_BNTH.shape
    R, K, S, _ = part.k_RKSH.shape
    C, readable = B // R, part.readable
    queries, keys = (-(-length // LANES) * LANES for length in (T, S))
    # Siblings are so many more query heads of a key-value head.
    q = q_BNTH.reshape(R, C, K, N // K, T, H).swapaxes(1, 2).reshape(R, K * C * N // K, T, H)
    q = _pad(q * H**-0.5, 2, queries, 0)
    k, v = _pad(part.k_RKSH, 2, keys, 0), _pad(part.v_RKSH, 2, keys, 0)
    # Keys beyond the row come after all of its queries, or have a segment that these have not.
    ids = None
    if readable.segments_BT is not None:
        own = _pad(readable.segments_BT, 1, queries, -1)
        ids = splash_kernel.SegmentIds(own, own)
    elif readable.valid_RS is not None or not readable.causal:
        valid = jnp.ones((R, S), bool) if readable.valid_RS is None else readable.valid_RS
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
    """JAX's flash attention for GPUs in Triton, which knows segments, and no grouped queries: keys are repeated."""
    assert not with_lse
    N, T, H = q_BNTH.shape[1:]
    length = -(-T // TRITON_BLOCK) * TRITON_BLOCK
    k, v = (jnp.repeat(x, N // x.shape[1], axis=1) for x in (part.k_RKSH, part.v_RKSH))
    q, k, v = (_pad(x, 2, length, 0).swapaxes(1, 2) for x in (q_BNTH, k, v))
    sizes = ("block_q", "block_k", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")
    out = triton_attention.mha(
        q,
        k,
        v,
        _pad(part.readable.segments_BT, 1, length, -1),
        sm_scale=H**-0.5,
        causal=part.readable.causal,
        block_sizes=triton_attention.BlockSizes(**dict.fromkeys(sizes, TRITON_BLOCK)),
    )
    return out[:, :T].swapaxes(1, 2), None


def _pad(x: jax.Array, axis: int, length: int, value: int) -> jax.Array:
    """`x`, filled up behind to `length` along `axis`."""
    widths = np.zeros((x.ndim, 2), int)
    widths[axis, 1] = length - x.shape[axis]
    return jnp.pad(x, widths, constant_values=value)
