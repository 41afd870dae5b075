"""The engine behind text: the one place that sees both a tokenizer and an engine."""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence

import jax

from srlm_jax.model.llama import Llama
from srlm_jax.records import Completion, Request, SamplingParams
from srlm_jax.sampling import engine
from srlm_jax.text import chat
from srlm_jax.text.tokenizer import Tokenizer


def words_32(text: str, count: int) -> tuple[int, ...]:
    """`count` unsigned 32-bit integers that stand for a text: how names address random numbers."""
    digest = hashlib.sha256(text.encode()).digest()
    return tuple(int.from_bytes(digest[4 * i : 4 * i + 4], "little") for i in range(count))


def stage_key(seed: int, stage: str) -> jax.Array:
    """The key from which a stage's random numbers derive."""
    return jax.random.fold_in(jax.random.key(seed), words_32(stage, 1)[0])


@dataclasses.dataclass(frozen=True)
class ModelGenerate:
    """`records.Generate` by a model that lives on this job's devices."""

    model: Llama
    tokenizer: Tokenizer
    chat_format: chat.ChatFormat
    config: engine.EngineConfig
    mesh: jax.sharding.Mesh
    key: jax.Array
    work: engine.Work

    def __call__(
        self, requests: Sequence[Request], params: SamplingParams, report: Callable[[int, int], None]
    ) -> list[tuple[tuple[Completion, ...], ...]]:
        """See `records.Generate`. The texts hold the stop string that ended them, but never the end token."""
        groups = [
            engine.Group(
                address=words_32(request.id, 2), prompts=tuple(self._encode(request, text) for text in request.prompts)
            )
            for request in requests
        ]
        draw = engine.Draw(
            samples=params.samples,
            temperature=params.temperature,
            top_p=params.top_p,
            max_new_tokens=params.max_new_tokens,
            stops=((self.tokenizer.eos,), *(tuple(self.tokenizer.encode(stop)) for stop in params.stop)),
        )
        drawn = engine.sample(
            self.model,
            groups,
            draw,
            key=self.key,
            config=self.config,
            mesh=self.mesh,
            report=report,
            work=self.work,
        )
        return [tuple(tuple(map(self._decode, samples)) for samples in prompts) for prompts in drawn]

    def _encode(self, request: Request, text: str) -> engine.Ids:
        if request.chat:
            return tuple(chat.encode_prompt(self.tokenizer, self.chat_format, text))
        return tuple(chat.encode_opening(self.tokenizer, text))

    def _decode(self, sample: engine.Sample) -> Completion:
        return Completion(text=self.tokenizer.decode(sample.ids), tokens=len(sample.ids), finished=sample.finished)
