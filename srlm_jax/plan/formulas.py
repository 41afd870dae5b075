"""Operations, memory traffic and memory of each program, from the numbers of the model.

The compiler's own count takes a loop's body once, so these formulas count what the loops run; tests hold them against
the compiler's count of programs without loops. Everything is for one chip of a mesh of `data` x `fsdp` x `tensor`.

No attention score passes between chip and memory: the kernels of TPUs and GPUs keep them (`model.attention`).
"""

import dataclasses
import math

from srlm_jax.model.config import LlamaConfig
from srlm_jax.sampling.decode import Shape
from srlm_jax.sampling.prefill import CHUNK

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Split:
    """Over how many chips the rows of a batch, the stored weights, and each matrix product are split."""

    rows: int
    weights: int
    tensor: int

    def own_rows(self, rows: int) -> int:
        """Rows of a batch that a chip computes: all of them where they cannot be shared evenly."""
        return rows // self.rows if rows % self.rows == 0 else rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """What a program asks of one chip each time it runs."""

    flops: float
    memory_bytes: float  # the least that must pass between memory and chip
    link_bytes: float  # what must arrive from other chips
    resident_bytes: float  # weights, optimizer state, caches and the largest intermediate results


def param_bytes(c: LlamaConfig) -> int:
    """Of all weights, as they are kept."""
    return c.parameters * _BYTES[c.param_dtype]


def sample_bytes(c: LlamaConfig, weights: str | None) -> int:
    """Of all weights, as they are sampled with: config.engine.weights."""
    wide = _BYTES[c.compute_dtype]
    return c.parameters * wide if weights is None else (c.parameters - projections(c)) * wide + rounded_bytes(c)


def rounded_bytes(c: LlamaConfig) -> int:
    """Of the projections in 8 bits, with a scale for each output."""
    return projections(c) + c.L * ((c.N + 2 * c.K) * c.H + 2 * c.F + 2 * c.D) * _BYTES[c.compute_dtype]


def projections(c: LlamaConfig) -> int:
    """Numbers of all that `model.quantized` rounds."""
    return c.L * (c.D * c.H * (2 * c.N + 2 * c.K) + 3 * c.D * c.F)


def kv_token_bytes(c: LlamaConfig, cache: str | None) -> int:
    """Of one token's keys and values over all layers: config.engine.cache."""
    of_a_head = c.H * _BYTES[c.compute_dtype] if cache is None else c.H + 4  # a scale in float32
    return 2 * c.L * c.K * of_a_head


def block_flops(c: LlamaConfig, tokens: int, keys: int) -> float:
    """One forward pass of `tokens` through all blocks, each token scored against `keys` keys, masked ones included.

    So plain attention computes. A fused causal kernel skips nearly half of the scores, and computes some of them twice
    more on the way back; neither is counted.
    """
    return 2.0 * tokens * (projections(c) + c.L * 2 * c.N * c.H * keys)


def head_flops(c: LlamaConfig, tokens: int) -> float:
    """Logits of `tokens` positions."""
    return 2.0 * tokens * c.D * c.V


def forward_flops(c: LlamaConfig, rows: int, length: int) -> float:
    """Log-probabilities of all targets of a batch, nothing kept for a gradient."""
    return block_flops(c, rows * length, length) + head_flops(c, rows * length)


def train_flops(c: LlamaConfig, rows: int, length: int, rank: int | None) -> float:
    """Gradients of a batch: twice the forward pass besides itself, and what is computed again on the way back: the
    logits, and of each block its attention or, as the model says, all but its last product. With adapters of some
    `rank`, their products too, and none for the gradients of the weights."""
    tokens = rows * length
    adapters = 0.0 if rank is None else 2.0 * tokens * sum(_adapter_sizes(c, rank))
    forward = forward_flops(c, rows, length) + adapters
    again = head_flops(c, tokens)
    if c.remat == "full":
        again += adapters + block_flops(c, tokens, length) - 2.0 * c.L * tokens * c.F * c.D
    else:
        again += block_flops(c, tokens, length) - block_flops(c, tokens, 0)
    frozen = 0.0 if rank is None else block_flops(c, tokens, 0) + head_flops(c, tokens)
    return 3 * forward + again - frozen


def _adapter_sizes(c: LlamaConfig, rank: int) -> tuple[int, int]:
    """Numbers of all adapters' sides: those along the model's width, and those along heads and MLP."""
    return c.L * rank * 7 * c.D, c.L * rank * (2 * c.N * c.H + 2 * c.K * c.H + 3 * c.F)


def _gathered(size: float, group: int) -> float:
    """What arrives at a chip when an array of `size` bytes is gathered from, or reduced over, `group` chips."""
    return size * (group - 1) / group


def _activations(c: LlamaConfig, split: Split, rows: int, length: int, *, kept: bool) -> float:
    """Intermediate results alive at once: a block's, and each block's input where gradients are wanted."""
    wide = _BYTES[c.compute_dtype]
    own = split.own_rows(rows) * length
    mlp, attention = c.F / split.tensor, 2 * (c.N + c.K) * c.H / split.tensor  # of attention operands and output
    if not kept:
        return own * wide * (4 * c.D + attention + 3 * mlp)
    # Between blocks the chips that split a product share its tokens; within, all of them hold the width of each. How
    # many arrays a block's way back has at once is set to the TPU compiler's count: see the figures in docs/plan.md.
    stored = own * wide * c.L * c.D / split.tensor
    if c.remat == "dots":
        stored += own * wide * c.L * ((c.N + 2 * c.K) * c.H + 2 * c.F + 2 * c.D) / split.tensor
    return stored + own * wide * (24 * c.D + 12 * mlp)


def forward_cost(c: LlamaConfig, split: Split, rows: int, length: int) -> Cost:
    """Reference log-probabilities of `rows` rows."""
    own, wide = split.own_rows(rows), _BYTES[c.compute_dtype]
    fsdp = split.weights // split.tensor
    weights = c.parameters * wide / split.tensor
    reduced = 2 * c.L * own * length * c.D * wide
    return Cost(
        flops=forward_flops(c, own, length) / split.tensor,
        memory_bytes=weights,
        link_bytes=_gathered(weights, fsdp) + 2 * _gathered(reduced, split.tensor),
        resident_bytes=param_bytes(c) / split.weights + _activations(c, split, rows, length, kept=False),
    )


def train_cost(c: LlamaConfig, split: Split, rows: int, length: int, accumulate: int, rank: int | None) -> Cost:
    """One update by AdamW from `rows` rows, cut into `accumulate` microbatches: of all weights, or of adapters of some
    `rank`, in float32, beside weights that are read alone."""
    own, wide = split.own_rows(rows), _BYTES[c.compute_dtype]
    fsdp = split.weights // split.tensor
    weights = c.parameters * wide / split.tensor
    passes = 3 if c.remat == "full" else 2  # forward, again, and back
    kept, narrow = param_bytes(c) / split.weights, sample_bytes(c, None) / split.weights
    if rank is None:
        trained, gradients, frozen, reduced_grads = kept, narrow, 0.0, weights
    else:
        along, across = _adapter_sizes(c, rank)
        trained = gradients = 4 * (along / fsdp + across / split.tensor)
        frozen = kept
        reduced_grads = 4 * (along + across / split.tensor)
    reduced = 2 * passes * c.L * own * length * c.D * wide
    return Cost(
        flops=train_flops(c, own, length, rank) / split.tensor,
        # AdamW reads weights, gradients and two moments and writes all but the gradients.
        memory_bytes=accumulate * passes * weights + 7 * trained,
        # Gradients are reduced as often as weights are gathered for a pass.
        link_bytes=accumulate * _gathered(passes * weights + reduced_grads, fsdp)
        + 2 * _gathered(reduced, split.tensor),
        # Weights, two moments and gradients; and the sum of the gradients so far beside a microbatch's own. Weights
        # wider than what is computed in are narrowed before the loop over layers, and their gradients are as narrow.
        resident_bytes=frozen
        + (0.0 if c.param_dtype == c.compute_dtype else narrow)
        + (3 if accumulate == 1 else 4) * trained
        + gradients
        + _activations(c, split, rows // accumulate, length, kept=True),
    )


def prefill_cost(c: LlamaConfig, split: Split, room: Shape, at_once: int, weights: str | None, held: float) -> Cost:
    """Reading `at_once` groups: what prompts share, then the rest of each, as long as there is room for."""
    own, wide = split.own_rows(at_once), _BYTES[c.compute_dtype]
    shared, rest, _ = room.slots
    flops = block_flops(c, own * shared, shared) + block_flops(c, own * room.prompts * rest, rest + shared)
    tokens = own * (shared + room.prompts * rest)
    written = tokens * kv_token_bytes(c, room.cache) / split.tensor
    # Each chunk of the group's level and of the prompts' is a pass over all weights.
    passes = sum(math.ceil(slots / CHUNK) for slots in (shared, rest))
    return Cost(
        flops=flops / split.tensor,
        memory_bytes=passes * sample_bytes(c, weights) / split.weights + written,
        link_bytes=2 * _gathered(2 * c.L * tokens * c.D * wide, split.tensor),
        resident_bytes=held + 2 * written,
    )


def decode_cost(c: LlamaConfig, split: Split, room: Shape, weights: str | None, steps: int) -> Cost:
    """`steps` tokens of every row; each step reads all slots of each level once for all rows that share them."""
    rows, groups, wide = split.own_rows(room.rows), split.own_rows(room.groups), _BYTES[c.compute_dtype]
    shared, rest, own = room.slots
    held = (groups * (shared + room.prompts * rest) + rows * own) * kv_token_bytes(c, room.cache) / split.tensor
    flops = block_flops(c, rows, sum(room.slots)) + head_flops(c, rows)
    read = sample_bytes(c, weights) / split.weights
    reduced = 2 * c.L * rows * c.D * wide
    return Cost(
        flops=steps * flops / split.tensor,
        memory_bytes=steps * (read + held),
        link_bytes=steps * 2 * _gathered(reduced, split.tensor),
        resident_bytes=read + held,
    )
