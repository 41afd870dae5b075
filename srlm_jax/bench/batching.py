"""The one place where the benchmarks meet `data.batches`: documents and pairs in, batches of equal shapes out."""

from collections.abc import Sequence

import jax
import numpy as np

from srlm_jax.bench.setting import train_mesh
from srlm_jax.bench.workload import Pair
from srlm_jax.data import batches
from srlm_jax.data.batches import PairBatch, PairRow, Row, TokenBatch
from srlm_jax.data.packing import Packing
from srlm_jax.model.llama import Llama
from srlm_jax.parallel import hosts, rules
from srlm_jax.train.objectives import compiled_logprobs

_MULTIPLE = 32  # of a row's positions
_LOGPROB_CHUNK = 64  # positions of a row whose logits are held at once


def rows_of(pairs: Sequence[Pair]) -> list[Row]:
    """Chosen and rejected answer of each pair in turn, with its prompt, the loss on the answer."""
    return [Row((*pair.prompt, *answer), len(pair.prompt)) for pair in pairs for answer in (pair.chosen, pair.rejected)]


def logprob_chunk() -> int:
    return _LOGPROB_CHUNK


def token_batches(documents: Sequence[Row], size: int) -> list[TokenBatch]:
    """Batches of `size` documents each, dealt and packed as the pipeline does it."""
    packing = _packing([[row.length] for row in documents], size)
    return list(batches.packed_batches(documents, packing, packing.batches))


def pair_batches(pairs: Sequence[PairRow], size: int) -> list[PairBatch]:
    """Batches of `size` pairs, dealt and packed as the pipeline does it."""
    packing = _packing([[pair.chosen.length, pair.rejected.length] for pair in pairs], size)
    return list(batches.packed_pairs(pairs, packing, packing.batches))


def _packing(lengths: Sequence[Sequence[int]], size: int) -> Packing:
    """How examples of these documents' lengths make batches of `size`."""
    known = np.asarray(lengths)
    return Packing(
        lengths=known, batch_size=size, accumulate=1, most=2 * int(known.max()), length_multiple=_MULTIPLE,
        rows_multiple=1, seed=0,
    )  # fmt: skip


def logprobs(model: Llama, rows: Sequence[Row]) -> np.ndarray:
    """What the model gives each row's answer, padded and all at once."""
    batch = batches.token_batch(rows, batches.padded_length([row.length for row in rows], _MULTIPLE))
    return _logprobs(model, [batch], len(rows))[0]


def reference_pass(model: Llama, made: Sequence[PairBatch]) -> list[PairBatch]:
    """The batches with what the model gives their answers as the reference's."""
    found = _logprobs(model, [batch.rows for batch in made], 2 * len(made[0].ref_chosen_P))
    return [PairBatch(batch.rows, *np.split(of_batch, 2)) for batch, of_batch in zip(made, found, strict=True)]


def _logprobs(model: Llama, made: Sequence[TokenBatch], documents: int) -> list[np.ndarray]:
    mesh = train_mesh()
    place = rules.sharding(mesh, rules.TRAIN, ("batch",))
    with jax.set_mesh(mesh):
        found = [compiled_logprobs(model, hosts.spread(x, place), documents, _LOGPROB_CHUNK) for x in made]
    return hosts.fetch(found)
