"""The one place where the benchmarks meet `data.batches`: documents and pairs in, batches of equal shapes out."""

from collections.abc import Sequence

import jax
import numpy as np

from srlm_jax.bench.setting import train_mesh
from srlm_jax.bench.workload import Pair
from srlm_jax.data import batches
from srlm_jax.data.batches import PairBatch, PairRow, Row, TokenBatch
from srlm_jax.data.packing import Packing, Shape
from srlm_jax.model.llama import Llama
from srlm_jax.parallel import hosts, rules
from srlm_jax.train.objectives import response_logprobs

_MULTIPLE = 32  # of a row's positions
_LOGPROB_CHUNK = 64  # positions of a row whose logits are held at once

_compiled_logprobs = jax.jit(response_logprobs, static_argnames=("documents", "logprob_chunk", "dropout"))


def rows_of(pairs: Sequence[Pair]) -> list[Row]:
    """Chosen and rejected answer of each pair in turn, with its prompt, the loss on the answer."""
    return [Row((*pair.prompt, *answer), len(pair.prompt)) for pair in pairs for answer in (pair.chosen, pair.rejected)]


def logprob_chunk() -> int:
    return _LOGPROB_CHUNK


def token_batches(documents: Sequence[Row], size: int) -> list[TokenBatch]:
    """Batches of `size` documents each, dealt and packed as the pipeline does it."""
    packing, shape = _packing([[row.length] for row in documents], size)
    return list(batches.packed_batches(documents, shape, packing, packing.batches))


def pair_batches(pairs: Sequence[PairRow], size: int) -> list[PairBatch]:
    """Batches of `size` pairs, dealt and packed as the pipeline does it."""
    packing, shape = _packing([[pair.chosen.length, pair.rejected.length] for pair in pairs], size)
    return list(batches.packed_pairs(pairs, shape, packing, packing.batches))


def _packing(lengths: Sequence[Sequence[int]], size: int) -> tuple[Packing, Shape]:
    """How examples of these documents' lengths make batches of `size`, and the one shape of all of these."""
    known = np.asarray(lengths)
    packing = Packing(
        lengths=known, batch_size=size, accumulate=1, most=2 * int(known.max()), length_multiple=_MULTIPLE,
        rows_multiple=1, seed=0,
    )  # fmt: skip
    return packing, packing.smallest_shape(packing.batches)


def logprobs(model: Llama, rows: Sequence[Row], size: int) -> np.ndarray:
    """What the model gives each row's answer, `size` rows at a time: the reference pass."""
    packing, shape = _packing([[row.length] for row in rows], size)
    made = batches.packed_batches(rows, shape, packing, packing.batches)
    mesh, found = train_mesh(), []
    place = rules.sharding(mesh, rules.TRAIN, ("batch",))
    with jax.set_mesh(mesh):
        for batch in made:
            found.append(_compiled_logprobs(model, hosts.spread(batch, place), size, _LOGPROB_CHUNK, None))
    result = np.empty(len(rows), np.float32)
    for (lot,), of_lot in zip(packing.epoch(0, shape), hosts.fetch(found), strict=True):
        result[lot.examples] = of_lot
    return result
