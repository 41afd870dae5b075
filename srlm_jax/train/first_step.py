"""The first step of a training is checked against the model that it starts from.

A training step computes log-probabilities in its own way: packed rows, adapters, dropout, gradients. Before the first
update they must be those that the starting model gives by a plain forward pass with a row for each document. If they
are not, the training would move the model away from something else than what it is.
"""

import dataclasses
import math
import sys
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from tqdm import tqdm

from srlm_jax.data import batches
from srlm_jax.data.batches import PairBatch, Row, TokenBatch
from srlm_jax.errors import UserError
from srlm_jax.model.llama import Llama
from srlm_jax.parallel import hosts, rules
from srlm_jax.train.objectives import compiled_logprobs

COARSE = 10  # see `FirstStep`
_SHORTEST = 64  # positions of the shortest rows


class BadFirstStep(UserError):
    """The first step of a training does not start from the model that it was given; the message says what differs."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FirstStep:
    """How the first step of a training is checked.

    tolerance: how far its loss may be from the expected one, in nats a token (SFT) or a pair (DPO). Measured on
      SmolLM2-135M: 1e-6 in float32, 0.002 where it computes in bfloat16. The stored log-probability of an answer of n
      tokens may be `tolerance` sqrt(n) nats from the recomputed one in float32 on CPUs (measured 2e-5 sqrt(n)) and
      COARSE times as much elsewhere (0.075 sqrt(n) in bfloat16): rounding errors of tokens add up like a random walk.
    accumulate, rows: microbatches of the batch, and how many rows are computed at once.
    names: the id of each preference pair by the token ids of its two documents; empty for SFT.
    """

    tolerance: float
    accumulate: int
    rows: int
    logprob_chunk: int
    names: Mapping[tuple[tuple[int, ...], tuple[int, ...]], str]

    def expected(self, model: Llama, batch: TokenBatch | PairBatch, mesh: jax.sharding.Mesh) -> float:
        """The loss that the first step on `batch` (numpy arrays) must have if it starts from `model`.

        Raises:
          BadFirstStep: stored reference log-probabilities are not those of `model`; the message names the pair.
        """
        parts = batches.microbatches(batch, self.accumulate)
        if isinstance(batch, PairBatch):
            for part in parts:
                self._compare(model, part, mesh)
            return math.log(2)
        documents = [row for part in parts for row in batches.unpacked(part)]
        tokens = sum(len(row.ids) - row.loss_from for row in documents)
        return -float(np.sum(self._logprobs(model, documents, mesh))) / max(tokens, 1)

    def check(
        self, title: str, found: Mapping[str, float], undropped: float | None, *, adapted: bool, packed: bool
    ) -> None:
        """Compares the loss of the first step with the expected one; with dropout, the loss without it (`undropped`).

        What dropout alone changes is wanted, and gives a warning. A loss that is no number is left to the caller.

        Raises BadFirstStep where the two losses differ; the message names what may be the cause.
        """
        loss, expected = found["loss"], found["expected"]
        if not math.isfinite(loss):
            return
        if undropped is not None:
            if abs(loss - expected) > self.tolerance and hosts.is_main():
                said = f"warning: {title}: dropout changes the first loss from {expected:.3f} to {loss:.3f}"
                tqdm.write(said, file=sys.stderr)
            loss = undropped
        if abs(loss - expected) <= self.tolerance:
            return
        causes = ["the adapter is not zero"] * adapted
        causes += ["packed rows give other log-probabilities than rows of their own (config.packed)"] * packed
        cause = ", or ".join(causes) or "the training step computes another forward pass"
        raise BadFirstStep(
            f"{title}: the first loss is {loss:.4f}, and {expected:.4f} was expected from the model that the training "
            f"starts from: {cause}. Nothing was saved. The tolerance is {self.tolerance} nats (first_loss_tolerance)"
        )

    def _compare(self, model: Llama, part: PairBatch, mesh: jax.sharding.Mesh) -> None:
        rows = batches.unpacked(part.rows)
        found = self._logprobs(model, rows, mesh)
        pairs = len(part.ref_chosen_P)
        if len(rows) != 2 * pairs:
            raise BadFirstStep(f"the first batch holds {len(rows)} answers of {pairs} pairs: packed rows lost some")
        stored = np.concatenate([part.ref_chosen_P, part.ref_rejected_P])
        tokens = np.asarray([len(row.ids) - row.loss_from for row in rows])
        exact = model.config.compute_dtype == "float32" and rules.platform() == "cpu"
        tolerance = self.tolerance * (1 if exact else COARSE)
        apart = np.abs(found - stored) / np.sqrt(np.maximum(tokens, 1))
        worst = int(np.argmax(np.where(np.isfinite(apart), apart, np.inf)))
        if not apart[worst] <= tolerance:
            chosen, rejected = (rows[worst % pairs + side * pairs].ids for side in (0, 1))
            side = "chosen" if worst < pairs else "rejected"
            raise BadFirstStep(
                f"pair '{self.names.get((chosen, rejected), 'unknown')}': the stored log-probability of its {side} "
                f"answer of {tokens[worst]} tokens is {stored[worst]:.4f}, and the model that the training starts from "
                f"gives {found[worst]:.4f}: the reference stage used another model or other texts. Make it again "
                f"(--redo=ROUND/reference). The tolerance is {tolerance:g} nats times the root of the tokens "
                "(first_loss_tolerance)"
            )

    def _logprobs(self, model: Llama, documents: Sequence[Row], mesh: jax.sharding.Mesh) -> np.ndarray:
        length = row_length(max(row.length for row in documents))
        return row_logprobs(model, documents, length, self.rows, self.logprob_chunk, mesh)


def row_length(positions: int) -> int:
    """The length of a row that holds so many positions: a power of two, so that few programs are compiled."""
    return max(_SHORTEST, 1 << (positions - 1).bit_length())


def row_logprobs(
    model: Llama, rows: Sequence[Row], length: int, size: int, logprob_chunk: int, mesh: jax.sharding.Mesh
) -> np.ndarray:
    """The log-probability of each row's answer, float32 [rows], in nats: one document a row of `length` positions,
    `size` rows at a time, which the mesh's groups of devices must be able to share."""
    filled = [*rows, *[rows[0]] * (-len(rows) % size)]
    place = rules.sharding(mesh, rules.TRAIN, ("batch",))
    parts = [batches.token_batch(filled[i : i + size], length) for i in range(0, len(filled), size)]
    with jax.set_mesh(mesh):
        found = hosts.fetch(
            [compiled_logprobs(model, hosts.spread(part, place), size, logprob_chunk) for part in parts]
        )
    return np.concatenate(found)[: len(rows)]
