"""The engine behind text: the one place that sees both a tokenizer and an engine."""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence

import jax
from etils import epath

from srlm_jax.model import llama, quantized, weights
from srlm_jax.model.llama import Llama
from srlm_jax.parallel import rules
from srlm_jax.records import Completion, Request, SamplingParams
from srlm_jax.sampling import engine
from srlm_jax.text import chat
from srlm_jax.text.tokenizer import Tokenizer, check_vocabulary, load_tokenizer


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
        ends = self._ends()
        groups = [
            engine.Group(
                address=words_32(request.id, 2),
                prompts=tuple(self._encode(request, text) for text in request.prompts),
                limits=None,
            )
            for request in requests
        ]
        draw = engine.Draw(
            samples=params.samples,
            temperature=params.temperature,
            top_p=params.top_p,
            max_new_tokens=params.max_new_tokens,
            stops=(*((end,) for end in ends), *(self._encode_stop(stop) for stop in params.stop)),
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
        return [
            tuple(tuple(self._decode(sample, ends, params.stop) for sample in samples) for samples in prompts)
            for prompts in drawn
        ]

    def _ends(self) -> tuple[int, ...]:
        """The tokens after which nothing more comes, whether the model was asked in a chat or not."""
        return tuple(dict.fromkeys((chat.end_of_response(self.tokenizer, self.chat_format), *self.tokenizer.ends)))

    def _encode(self, request: Request, text: str) -> engine.Ids:
        if request.chat:
            return tuple(chat.encode_prompt(self.tokenizer, self.chat_format, text))
        return tuple(chat.encode_opening(self.tokenizer, text))

    def _encode_stop(self, stop: str) -> engine.Ids:
        """A stop string as it looks behind other text: SentencePiece puts a space before the first word of all."""
        before = self.tokenizer.encode("\n")
        both = self.tokenizer.encode(f"\n{stop}")
        return tuple(both[len(before) :] if both[: len(before)] == before else self.tokenizer.encode(stop))

    def _decode(self, sample: engine.Sample, ends: Sequence[int], stop: Sequence[str]) -> Completion:
        ids = sample.ids[:-1] if sample.ids and sample.ids[-1] in ends else sample.ids
        text = self.tokenizer.decode(ids)
        # The engine compares tokens, and a stop string's first letters may be in a token with those before it.
        cuts = [text.index(string) + len(string) for string in stop if string in text]
        return Completion(
            text=text[: min(cuts, default=len(text))], tokens=len(sample.ids), finished=sample.finished or bool(cuts)
        )


def open_model(
    folder: epath.PathLike,
    mesh: jax.sharding.Mesh,
    *,
    chat_format: chat.ChatFormat,
    config: engine.EngineConfig,
    key: jax.Array,
) -> ModelGenerate:
    """A Llama from its folder, in any layout that `model.weights` reads, with the tokenizer beside it; laid out for
    sampling, in the type it is kept in or as `config` rounds it.

    Raises:
      BadModelFile, BadCheckpoint: the model cannot be read.
      ValueError: the tokenizer cannot be used, or is another model's.
      FileNotFoundError: the folder, or a tokenizer in it, is missing.
    """
    folder = epath.Path(folder)
    sizes = weights.read_config(folder, param_dtype="float32", compute_dtype="float32", remat="dots")
    dtype = weights.source_dtype(folder, sizes)
    sizes = dataclasses.replace(sizes, param_dtype=dtype, compute_dtype=dtype)
    tokenizer = load_tokenizer(folder)
    check_vocabulary(tokenizer, sizes.V)
    places = rules.model_shardings(mesh, rules.SAMPLE, llama.abstract(sizes))
    model = quantized.quantize(weights.load(folder, sizes, places), config.weights)
    return ModelGenerate(
        model=engine.decoding_model(model, mesh),
        tokenizer=tokenizer,
        chat_format=chat_format,
        config=config,
        mesh=mesh,
        key=key,
        work=engine.Work(),
    )
