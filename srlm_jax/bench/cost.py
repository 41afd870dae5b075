"""The least that a piece of work asks of a device: operations, and bytes between it and its memory.

Every side of a comparison is measured against the same numbers, whatever it computes besides: padding, what it reads
twice, rows that have ended. Attention is causal here, so a score that a mask throws away does not count, and neither
does what is computed again on the way back; the formulas of `srlm_jax.plan` count what the compiled programs do.
"""

import dataclasses
from collections.abc import Sequence

from srlm_jax.bench.workload import Pair, Tree
from srlm_jax.data.batches import Row
from srlm_jax.model.config import LlamaConfig

_BYTES = {"float32": 4, "bfloat16": 2}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Need:
    """What work asks for at the least, and the tokens that it is counted in."""

    tokens: int
    flops: float
    memory_bytes: float

    def seconds(self, flops_per_second: float, bytes_per_second: float) -> float:
        """How long it takes a device that is busy with the scarcer of the two all the time."""
        return max(self.flops / flops_per_second, self.memory_bytes / bytes_per_second)


def block_weights(c: LlamaConfig) -> int:
    """Numbers in the matrices of all blocks: two operations a token each."""
    return c.L * (c.D * c.H * (2 * c.N + 2 * c.K) + 3 * c.D * c.F)


def head_weights(c: LlamaConfig) -> int:
    return c.D * c.V


def kv_token_bytes(c: LlamaConfig, dtype: str) -> int:
    """Of one token's keys and values over all layers."""
    return 2 * c.L * c.K * c.H * _BYTES[dtype]


def weight_bytes(c: LlamaConfig, dtype: str) -> int:
    """Of the weights that every step of decoding reads: all but the embedding, of which it takes some rows."""
    return (block_weights(c) + head_weights(c)) * _BYTES[dtype]


def attention_flops(c: LlamaConfig, start: int, tokens: int) -> float:
    """Scores and sums of `tokens` tokens in a row, the first of which reads itself and the `start` before it."""
    keys = tokens * start + tokens * (tokens + 1) // 2
    return 4.0 * c.L * c.N * c.H * keys


def _levels(tree: Tree) -> tuple[int, list[tuple[int, list[int]]]]:
    """Tokens that all prompts share; and of each group those that its prompts share beyond, and the rest of each
    prompt. The last token of a prompt is nobody's: it is decoded."""
    heads = [prompt[:-1] for group in tree.prompts for prompt in group]
    prefix = _common(heads) if len(heads) > 1 else 0
    found = []
    for group in tree.prompts:
        shared = _common([prompt[:-1] for prompt in group]) - prefix if len(group) > 1 else 0
        found.append((shared, [len(prompt) - 1 - prefix - shared for prompt in group]))
    return prefix, found


def _common(sequences: Sequence[tuple[int, ...]]) -> int:
    """Length of the longest common beginning: that of the first and the last in order."""
    first, last = min(sequences), max(sequences)
    return next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))


def reading(c: LlamaConfig, tree: Tree, dtype: str) -> Need:
    """Reading all prompts, what they share once."""
    prefix, groups = _levels(tree)
    spans = [(0, prefix)]
    for shared, rests in groups:
        spans += [(prefix, shared), *((prefix + shared, rest) for rest in rests)]
    tokens = sum(length for _, length in spans)
    return Need(
        tokens=tokens,
        flops=2.0 * tokens * block_weights(c) + sum(attention_flops(c, start, length) for start, length in spans),
        memory_bytes=weight_bytes(c, dtype) + tokens * kv_token_bytes(c, dtype),
    )


def writing(c: LlamaConfig, tree: Tree, rows: int, dtype: str) -> Need:
    """Decoding all rows, `rows` at once: a step reads all weights, each row's own keys and values, and those that rows
    share once."""
    tokens = tree.tokens
    steps = max(-(-tokens // rows), tree.longest)
    prefix, groups = _levels(tree)
    read = prefix * steps + sum(limit * (limit + 1) // 2 for _, limit in tree.rows)
    for (shared, rests), limits in zip(groups, tree.limits, strict=True):
        read += shared * max(max(of_prompt) for of_prompt in limits)
        read += sum(rest * max(of_prompt) for rest, of_prompt in zip(rests, limits, strict=True))
    return Need(
        tokens=tokens,
        flops=2.0 * tokens * (block_weights(c) + head_weights(c))
        + sum(attention_flops(c, len(prompt) - 1, limit) for prompt, limit in tree.rows),
        memory_bytes=steps * weight_bytes(c, dtype) + read * kv_token_bytes(c, dtype),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Documents:
    """What is trained on: the tokens that it is counted in, and what of them has to be computed."""

    tokens: int  # positions of all documents
    spans: tuple[tuple[int, int], ...]  # tokens that are read once: how many there are before them, and how many
    predicted: int  # tokens whose log-probabilities are wanted


def of_rows(rows: Sequence[Row]) -> Documents:
    """Documents that share nothing."""
    spans = tuple((0, row.length) for row in rows)
    return Documents(
        tokens=sum(row.length for row in rows),
        spans=spans,
        predicted=sum(len(row.ids) - row.loss_from for row in rows),
    )


def of_pairs(pairs: Sequence[Pair]) -> Documents:
    """Preference pairs, each answer with its prompt, of which all tokens but the last are read once for both; an
    answer's last token is only a target."""
    answers = [(len(pair.prompt), len(answer)) for pair in pairs for answer in (pair.chosen, pair.rejected)]
    return Documents(
        tokens=sum(prompt + answer - 1 for prompt, answer in answers),
        spans=tuple(
            [(0, len(pair.prompt) - 1) for pair in pairs] + [(prompt - 1, answer) for prompt, answer in answers]
        ),
        predicted=sum(answer for _, answer in answers),
    )


def forward(c: LlamaConfig, documents: Documents, dtype: str) -> Need:
    """Log-probabilities of the predicted tokens."""
    return Need(
        tokens=documents.tokens,
        flops=2.0 * sum(length for _, length in documents.spans) * block_weights(c)
        + 2.0 * documents.predicted * head_weights(c)
        + sum(attention_flops(c, start, length) for start, length in documents.spans),
        memory_bytes=weight_bytes(c, dtype),
    )


def training(c: LlamaConfig, documents: Documents, updates: int, dtype: str) -> Need:
    """`updates` updates by AdamW on all of these documents: a forward pass and twice that back; weights are read both
    ways, and the optimizer reads weights, gradients and two moments and writes all but the gradients."""
    once = forward(c, documents, dtype)
    kept = 7 * c.parameters * _BYTES[dtype]
    return Need(tokens=once.tokens, flops=3 * once.flops, memory_bytes=updates * (2 * weight_bytes(c, dtype) + kept))
