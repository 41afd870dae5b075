"""The one place where the benchmarks meet `data.batches`: documents and pairs in, batches of equal shapes out."""

from collections.abc import Sequence

import jax
import numpy as np

from srlm_jax.bench.setting import train_mesh
from srlm_jax.bench.workload import Pair
from srlm_jax.data import batches
from srlm_jax.data.batches import PairBatch, PairRow, Row, TokenBatch
from srlm_jax.model.llama import Llama
from srlm_jax.parallel import hosts, rules
from srlm_jax.train.objectives import response_logprobs

_MULTIPLE = 64  # of a row's positions
_LOGPROB_CHUNK = 256  # positions of a row whose logits are held at once

_compiled_logprobs = jax.jit(response_logprobs, static_argnames=("logprob_chunk", "dropout"))


def rows_of(pairs: Sequence[Pair]) -> list[Row]:
    """Chosen and rejected answer of each pair in turn, with its prompt, the loss on the answer."""
    return [Row((*pair.prompt, *answer), len(pair.prompt)) for pair in pairs for answer in (pair.chosen, pair.rejected)]


def logprob_chunk() -> int:
    return _LOGPROB_CHUNK


def token_batches(documents: Sequence[Row], size: int) -> list[TokenBatch]:
    """Batches of `size` documents each, in their order, packed into as few positions as were found."""
    parts = [documents[i : i + size] for i in range(0, len(documents), size)]
    longest = batches.padded_length([row.length for row in documents], _MULTIPLE)
    choices = []
    for length in (longest, 2 * longest, 4 * longest):
        packed = [batches.pack(part, length) for part in parts]
        choices.append((max(len(groups) for groups in packed) * length, length, packed))
    positions, length, packed = min(choices, key=lambda choice: choice[:2])
    return [batches.packed_batch(_spread(groups, positions // length), length) for groups in packed]


def _spread(groups: list[tuple[Row, ...]], rows: int) -> list[tuple[Row, ...]]:
    """The groups cut in as many as there are rows, so that none is empty."""
    groups = sorted(groups, key=len)
    while len(groups) < rows and len(groups[-1]) > 1:
        last = groups.pop()
        groups = sorted([*groups, last[: len(last) // 2], last[len(last) // 2 :]], key=len)
    return groups


def pair_batches(pairs: Sequence[PairRow], size: int) -> list[PairBatch]:
    """All pairs once, in batches of `size`. Made without a pipeline of `grain`: a training starts one once, and a
    measurement would each time."""
    length = batches.padded_length([row.length for pair in pairs for row in (pair.chosen, pair.rejected)], _MULTIPLE)
    return [
        PairBatch(
            batches.token_batch([pair.chosen for pair in part], length),
            batches.token_batch([pair.rejected for pair in part], length),
            np.asarray([pair.ref_chosen for pair in part], np.float32),
            np.asarray([pair.ref_rejected for pair in part], np.float32),
        )
        for part in (pairs[i : i + size] for i in range(0, len(pairs) - size + 1, size))
    ]


def logprobs(model: Llama, rows: Sequence[Row], size: int) -> np.ndarray:
    """What the model gives each row's answer, `size` rows at a time: the reference pass."""
    length = batches.padded_length([row.length for row in rows], _MULTIPLE)
    mesh, found = train_mesh(), []
    for first in range(0, len(rows), size):
        part = list(rows[first : first + size])
        batch = batches.token_batch(part + part[:1] * (size - len(part)), length)
        batch = hosts.spread(batch, rules.sharding(mesh, rules.TRAIN, ("batch",)))
        with jax.set_mesh(mesh):
            found.append(_compiled_logprobs(model, batch, _LOGPROB_CHUNK, None))
    return np.concatenate(hosts.fetch(found))[: len(rows)]
