"""Llama in Flax NNX: one forward for training, prefill and decoding.

A module is a named bag of weights and a `__call__` that never assigns to it. The blocks are stacked by construction
(every weight has a leading layer axis) and `lax.scan` peels them off, so a program's size does not grow with depth.

Axes: B rows, T new tokens, S cached positions, D width, N query heads, K key-value heads, H head width, F MLP width,
V vocabulary, L layers.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from srlm_jax.model import attention, ops
from srlm_jax.model.attention import Part
from srlm_jax.model.cache import Cache, write
from srlm_jax.model.config import LlamaConfig
from srlm_jax.model.folding import Folding
from srlm_jax.parallel import rules


def weight(rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str, ...], scale: float, dtype: str) -> nnx.Param:
    """A normally distributed weight and the logical name of each of its axes."""
    return nnx.Param(scale * rngs.params.normal(shape, dtype), axes=axes)


def norm_scale(shape: tuple[int, ...], axes: tuple[str, ...], dtype: str) -> nnx.Param:
    """The scale of an RMSNorm, which starts at one."""
    return nnx.Param(jnp.ones(shape, dtype), axes=axes)


class Blocks(nnx.Module):
    """All L transformer blocks, stacked on the leading axis."""

    def __init__(self, c: LlamaConfig, *, rngs: nnx.Rngs):
        # Products of unit variance at any width, so that attention is sharp enough to learn from the first step on;
        # what is added to the residual stream is smaller by the number of additions (GPT-2).
        narrow = c.D**-0.5
        wide = narrow / (2 * c.L) ** 0.5
        t = c.param_dtype
        self.attention_norm = norm_scale((c.L, c.D), ("layers", "norm"), t)
        self.q = weight(rngs, (c.L, c.D, c.N, c.H), ("layers", "embed", "heads", "head"), narrow, t)
        self.k = weight(rngs, (c.L, c.D, c.K, c.H), ("layers", "embed", "kv_heads", "head"), narrow, t)
        self.v = weight(rngs, (c.L, c.D, c.K, c.H), ("layers", "embed", "kv_heads", "head"), narrow, t)
        self.o = weight(rngs, (c.L, c.N, c.H, c.D), ("layers", "heads", "head", "embed"), wide, t)
        self.mlp_norm = norm_scale((c.L, c.D), ("layers", "norm"), t)
        self.gate = weight(rngs, (c.L, c.D, c.F), ("layers", "embed", "mlp"), narrow, t)
        self.up = weight(rngs, (c.L, c.D, c.F), ("layers", "embed", "mlp"), narrow, t)
        self.down = weight(rngs, (c.L, c.F, c.D), ("layers", "mlp", "embed"), wide, t)


class Llama(nnx.Module):
    """Token ids in, final hidden states out; `head` turns those into logits where they are wanted.

    The logits are left to the caller because nobody needs all of them at once: the losses take them in chunks, the
    sampler takes the last position's.
    """

    def __init__(self, c: LlamaConfig, *, rngs: nnx.Rngs):
        self.config = nnx.static(c)
        # Unit variance where the head is another matrix: who a token is must outweigh what the first blocks add to
        # it, or heads that copy are slow to form. A tied embedding has to give logits of unit variance instead.
        identity = c.D**-0.5 if c.tied else 1.0
        self.embedding = weight(rngs, (c.V, c.D), ("vocab", "embed"), identity, c.param_dtype)
        self.blocks = Blocks(c, rngs=rngs)
        self.norm = norm_scale((c.D,), ("norm",), c.param_dtype)
        if not c.tied:
            self.output = weight(rngs, (c.D, c.V), ("embed", "vocab"), c.D**-0.5, c.param_dtype)

    @property
    def stacks(self) -> list[Blocks]:
        """The blocks, all in one stack or each in one of its own (`by_layer`)."""
        return list(self.blocks) if isinstance(self.blocks, nnx.List) else [self.blocks]

    @property
    def layers(self) -> tuple[int, ...]:
        """How many blocks each stack has."""
        return tuple(blocks.attention_norm.shape[0] for blocks in self.stacks)

    def head(self) -> Float[Array, "D V"]:
        """The output projection, in the compute dtype: logits = hidden @ head."""
        head = self.embedding[...].T if self.config.tied else self.output[...]
        return rules.constrain(head.astype(self.config.compute_dtype), "embed", "vocab")

    def __call__(
        self,
        tokens_BT: Int[Array, "B T"],
        positions_BT: Int[Array, "B T"],
        *,
        segments_BT: Int[Array, "B T"] | Folding | None,
        cache: Cache | None,
        dropout: ops.Dropout | None,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        """Final hidden states, and the cache with the new tokens in it.

        Args:
          tokens_BT: token ids.
          positions_BT: each token's place in its own document, from 0.
          segments_BT: without a cache, which document of a packed row a token belongs to; tokens attend within their
            document only, to themselves and what came before. None: each row is one document. A `Folding`: documents
            share the tokens that they begin with.
          cache: with one, tokens attend as it says (see `Cache`), and `segments_BT` must be None.
          dropout: of the attention probabilities, for training; as `attention_dropout` of transformers. No kernel has
            it, so attention is then computed by XLA, with a random number for every score.
        """
        c = self.config
        assert cache is None or segments_BT is None
        assert dropout is None or (cache is None and len(self.stacks) == 1)
        unfold = fold = lambda x: x
        if isinstance(segments_BT, Folding):
            unfold, fold, segments_BT = segments_BT.unfold, segments_BT.fold, segments_BT.segments_BU
            positions_BT = unfold(positions_BT[..., None])[..., 0]
        own = dataclasses.replace(attention.CAUSAL, segments_BT=segments_BT)
        cos, sin = ops.rope_angles(positions_BT, c.H, c.rope_theta, c.rope_scaling)

        # Between the halves of a block, and so in what gradients keep of it, the tokens of a row are shared by the
        # devices that split its products (Megatron's sequence parallelism, arXiv 2205.05198). The products' operands
        # and results are whole all the same: else the compiler splits them over tokens, and then has to reduce whole
        # gradients of weights.
        whole = lambda x_BTD: rules.constrain(x_BTD, "batch", "tokens", "embed")
        stored = whole if cache is not None else lambda x_BTD: rules.constrain(x_BTD, "batch", "stored_tokens", "embed")
        scattered = lambda x_BTD: stored(whole(x_BTD))

        def block(stack, carry, scanned):
            x_BTD, leaf = carry
            w, layer = scanned
            drop = None if dropout is None else dropout.fold(layer)
            cast = jax.tree.map(lambda p: p.astype(c.compute_dtype), w)
            h_BTD = whole(ops.rms_norm(x_BTD, cast.attention_norm[...], c.norm_eps))
            q_BNTH = ops.rotate(head_major(unfold(project(h_BTD, cast.q[...])), c.H), cos, sin)
            k_BKTH = ops.rotate(head_major(unfold(project(h_BTD, cast.k[...])), c.H), cos, sin)
            v_BKTH = head_major(unfold(project(h_BTD, cast.v[...])), c.H)
            parts = [attention.alone(k_BKTH, v_BKTH, own)] if cache is None or cache.among_themselves else []
            shared, siblings = [], None
            if cache is not None:
                # The stacked cache travels in the carry, so that it is updated in place.
                leaf = tuple(write(kv, new, layer, cache.slot) for kv, new in zip(leaf, (k_BKTH, v_BKTH), strict=True))
                if cache.readable is not None:
                    parts.append(Part(*leaf, layer, cache.readable))
                parts += [level.part(stack, layer) for level in cache.parents]
                shared, siblings = [level.part(stack, layer) for level in cache.shared], cache.siblings
            a_BNTH = attention.attend(q_BNTH, parts, shared, siblings, drop)
            a_BTX = fold(token_major(a_BNTH))
            a_BTD = scattered(ops.linear(a_BTX, cast.o[...].reshape(-1, c.D)))
            x_BTD = x_BTD + a_BTD
            h_BTD = whole(ops.rms_norm(x_BTD, cast.mlp_norm[...], c.norm_eps))
            m_BTD = scattered(ops.swiglu(h_BTD, cast.gate[...], cast.up[...], cast.down[...]))
            x_BTD = stored(x_BTD + m_BTD)
            return (x_BTD, leaf), None

        x_BTD = self.embedding[...].astype(c.compute_dtype)[tokens_BT]
        x_BTD = stored(x_BTD)
        kept = jax.checkpoint_policies.save_only_these_names(ops.PRODUCT) if c.remat == "dots" else None
        body = block if cache is not None else jax.checkpoint(block, static_argnums=0, policy=kept)
        leaves = []
        for stack, (blocks, layers) in enumerate(zip(self.stacks, self.layers, strict=True)):
            leaf = None if cache is None else (cache.k_LBKSH[stack], cache.v_LBKSH[stack])
            scanned = (blocks, jnp.arange(layers))
            (x_BTD, leaf), _ = jax.lax.scan(functools.partial(body, stack), (x_BTD, leaf), scanned)
            leaves.append(leaf)
        x_BTD = whole(ops.rms_norm(x_BTD, self.norm[...].astype(c.compute_dtype), c.norm_eps))
        if cache is None:
            return x_BTD, None
        k_LBKSH, v_LBKSH = zip(*leaves, strict=True)
        return x_BTD, dataclasses.replace(cache, k_LBKSH=k_LBKSH, v_LBKSH=v_LBKSH)


def project(
    x_BTD: Float[Array, "B T D"], w_DNH: Float[Array, "D N H"] | ops.Adapted | ops.Quantized
) -> Float[Array, "B T X"]:
    """Queries, keys or values of all heads, one after the other."""
    D, N, H = w_DNH.shape
    return ops.linear(x_BTD, w_DNH.reshape(D, N * H))


def head_major(x_BTX: Float[Array, "B T X"], head_width: int) -> Float[Array, "B N T H"]:
    """The layout in which attention is two plain batched matrix products."""
    B, T, _ = x_BTX.shape
    return x_BTX.reshape(B, T, -1, head_width).swapaxes(1, 2)


def token_major(x_BNTH: Float[Array, "B N T H"]) -> Float[Array, "B T X"]:
    """The way back of `head_major`."""
    B, _, T, _ = x_BNTH.shape
    return x_BNTH.swapaxes(1, 2).reshape(B, T, -1)


def init(config: LlamaConfig, key: PRNGKeyArray) -> Llama:
    """A randomly initialised model. Under `jax.jit` with shardings, each device makes its own part only."""
    return Llama(config, rngs=nnx.Rngs(key))


def by_layer(model: Llama) -> Llama:
    """`model` with each block's weights as arrays of their own, and so each layer of its cache: to decode with on CPUs
    and GPUs, where a loop over a stack copies of it at every token what a layer reads. A TPU reads it in place."""
    (layers,) = model.layers
    apart, stacked = jax.tree.map(lambda leaf: leaf, model), jax.tree.leaves(model.blocks)
    places = tuple(x.sharding for x in stacked)
    one = lambda layer: jax.tree.unflatten(jax.tree.structure(model.blocks), _of_layer(stacked, layer, places))
    apart.blocks = nnx.List([one(layer) for layer in range(layers)])
    return apart


@functools.partial(jax.jit, static_argnames="places")
def _of_layer(
    stacked: list[jax.Array], layer: int | Int[Array, ""], places: tuple[jax.sharding.Sharding, ...]
) -> list[jax.Array]:
    """One layer of stacks, each as a stack of it alone."""
    cut = lambda x, place: jax.lax.with_sharding_constraint(jax.lax.dynamic_slice_in_dim(x, layer, 1), place)
    return list(map(cut, stacked, places))


def abstract(config: LlamaConfig) -> Llama:
    """The model with shapes and dtypes in place of arrays."""
    return jax.eval_shape(lambda: init(config, jax.random.key(0)))
