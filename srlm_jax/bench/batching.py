"""The one place where the benchmarks meet `data.batches`: documents and pairs in, batches of equal shapes out."""

from collections.abc import Sequence

import jax
import numpy as np

from srlm_jax.bench.setting import train_mesh
from srlm_jax.bench.workload import Pair
from srlm_jax.data import batches
from srlm_jax.data.batches import PairBatch, PairRow, Row, TokenBatch
from srlm_jax.data.packing import Lot, Packing
from srlm_jax.model.llama import Llama
from srlm_jax.parallel import hosts, rules
from srlm_jax.train.objectives import response_logprobs

_MULTIPLE = 32  # of a row's positions
_LOGPROB_CHUNK = 256  # positions of a row whose logits are held at once

_compiled_logprobs = jax.jit(response_logprobs, static_argnames=("documents", "logprob_chunk", "dropout"))


def rows_of(pairs: Sequence[Pair]) -> list[Row]:
    """Chosen and rejected answer of each pair in turn, with its prompt, the loss on the answer."""
    return [Row((*pair.prompt, *answer), len(pair.prompt)) for pair in pairs for answer in (pair.chosen, pair.rejected)]


def logprob_chunk() -> int:
    return _LOGPROB_CHUNK


def token_batches(documents: Sequence[Row], size: int) -> list[TokenBatch]:
    """Batches of `size` documents each, dealt and packed as the pipeline does it."""
    return [batch for _, batch in _dealt([[row] for row in documents], size)]


def pair_batches(pairs: Sequence[PairRow], size: int) -> list[PairBatch]:
    """Batches of `size` pairs, dealt and packed as the pipeline does it."""
    found = []
    for lot, batch in _dealt([[pair.chosen, pair.rejected] for pair in pairs], size):
        reference = lambda name, lot=lot: np.asarray([getattr(pairs[i], name) for i in lot.examples], np.float32)
        found.append(PairBatch(batch, reference("ref_chosen"), reference("ref_rejected")))
    return found


def _dealt(examples: Sequence[Sequence[Row]], size: int) -> list[tuple[Lot, TokenBatch]]:
    """All examples in batches of `size`, of one shape, with what each holds."""
    lengths = np.asarray([[row.length for row in example] for example in examples])
    packing = Packing(
        lengths=lengths, batch_size=size, accumulate=1, most=2 * int(lengths.max()), length_multiple=_MULTIPLE,
        rows_multiple=1, seed=0,
    )  # fmt: skip
    shape = packing.smallest_shape(packing.batches)
    found = []
    for (lot,) in packing.epoch(0, shape):
        rows = [examples[i][document] for document in range(lengths.shape[1]) for i in lot.examples]
        found.append((lot, batches.packed_batch(rows, lot.rows, shape)))
    return found


def logprobs(model: Llama, rows: Sequence[Row], size: int) -> np.ndarray:
    """What the model gives each row's answer, `size` rows at a time: the reference pass."""
    mesh, dealt = train_mesh(), _dealt([[row] for row in rows], size)
    place, found = rules.sharding(mesh, rules.TRAIN, ("batch",)), []
    with jax.set_mesh(mesh):
        for _, batch in dealt:
            found.append(_compiled_logprobs(model, hosts.spread(batch, place), size, _LOGPROB_CHUNK, None))
    result = np.empty(len(rows), np.float32)
    for (lot, _), of_lot in zip(dealt, hosts.fetch(found), strict=True):
        result[lot.examples] = of_lot
    return result
