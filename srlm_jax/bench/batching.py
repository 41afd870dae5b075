"""The one place where the benchmarks meet `data.batches`: documents and pairs in, batches of equal shapes out."""

from collections.abc import Sequence

import jax
import numpy as np

from srlm_jax.bench.setting import train_mesh
from srlm_jax.bench.workload import Pair
from srlm_jax.data import batches
from srlm_jax.data.batches import PairBatch, PairRow, Row, TokenBatch
from srlm_jax.data.packing import Shape, pack
from srlm_jax.model.llama import Llama
from srlm_jax.parallel import hosts, rules
from srlm_jax.train.objectives import response_logprobs

_MULTIPLE = 64  # of a row's positions
_LOGPROB_CHUNK = 256  # positions of a row whose logits are held at once

_compiled_logprobs = jax.jit(response_logprobs, static_argnames=("documents", "logprob_chunk", "dropout"))


def rows_of(pairs: Sequence[Pair]) -> list[Row]:
    """Chosen and rejected answer of each pair in turn, with its prompt, the loss on the answer."""
    return [Row((*pair.prompt, *answer), len(pair.prompt)) for pair in pairs for answer in (pair.chosen, pair.rejected)]


def logprob_chunk() -> int:
    return _LOGPROB_CHUNK


def token_batches(documents: Sequence[Row], size: int) -> list[TokenBatch]:
    """Batches of `size` documents each, in their order, packed into as few positions as were found."""
    return _packed([documents[i : i + size] for i in range(0, len(documents), size)])


def pair_batches(pairs: Sequence[PairRow], size: int) -> list[PairBatch]:
    """Batches of `size` pairs, in their order, packed as documents are."""
    parts = [pairs[i : i + size] for i in range(0, len(pairs) // size * size, size)]
    rows = _packed([[pair.chosen for pair in part] + [pair.rejected for pair in part] for part in parts])
    reference = lambda part, name: np.asarray([getattr(pair, name) for pair in part], np.float32)
    return [
        PairBatch(batch, reference(part, "ref_chosen"), reference(part, "ref_rejected"))
        for batch, part in zip(rows, parts, strict=True)
    ]


def _packed(parts: Sequence[Sequence[Row]]) -> list[TokenBatch]:
    """Each part's documents as a batch, all of one shape: the smallest of a few."""
    lengths = [[row.length for row in part] for part in parts]
    longest = batches.padded_length([length for part in lengths for length in part], _MULTIPLE)
    found = []
    for length in (longest, 2 * longest):
        groups = [pack(part, length) for part in lengths]
        found.append((Shape(max(map(len, groups)), length), groups))
    shape, groups = min(found, key=lambda one: one[0].rows * one[0].length)
    return [batches.packed_batch(part, group, shape) for part, group in zip(parts, groups, strict=True)]


def logprobs(model: Llama, rows: Sequence[Row], size: int) -> np.ndarray:
    """What the model gives each row's answer, `size` rows at a time: the reference pass."""
    mesh, parts = train_mesh(), [rows[i : i + size] for i in range(0, len(rows), size)]
    place, found = rules.sharding(mesh, rules.TRAIN, ("batch",)), []
    with jax.set_mesh(mesh):
        for batch in _packed(parts):
            found.append(_compiled_logprobs(model, hosts.spread(batch, place), size, _LOGPROB_CHUNK, None))
    return np.concatenate([x[: len(part)] for x, part in zip(hosts.fetch(found), parts, strict=True)])
