"""The engine behind text: the one place that sees both a tokenizer and an engine."""

import bisect
import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Sequence

import jax
import numpy as np
from etils import epath

from srlm_jax.model import llama, quantized, weights
from srlm_jax.model.llama import Llama
from srlm_jax.parallel import rules
from srlm_jax.records import Completion, Request, SamplingParams, WatchedCompletion
from srlm_jax.sampling import engine
from srlm_jax.text import chat
from srlm_jax.text.tokenizer import Tokenizer, check_vocabulary


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
        """See `records.Generate`. The texts hold the stop string that ended them, but never the end token.

        Prompt and text together are what a model wrote that continues a text: where it went on with a new word, the
        text begins with a space. An answer in a chat begins with its first word.
        """
        ends = self._ends()
        watched = watched_ids(self.tokenizer, requests[0].watched if requests else ())
        if any(request.watched != requests[0].watched for request in requests):
            raise ValueError("the requests of a call watch different texts")
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
            stops=(
                *((end,) for end in ends),
                *(tuple(chat.encode_within(self.tokenizer, stop)) for stop in params.stop),
            ),
            watched=tuple(id for ids in watched for id in ids),
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
            tuple(
                tuple(self._decode(sample, ends, params.stop, watched, request, ids) for sample in samples)
                for ids, samples in zip(group.prompts, prompts, strict=True)
            )
            for request, group, prompts in zip(requests, groups, drawn, strict=True)
        ]

    def _ends(self) -> tuple[int, ...]:
        """The tokens after which nothing more comes, whether the model was asked in a chat or not."""
        return tuple(dict.fromkeys((chat.end_of_response(self.tokenizer, self.chat_format), *self.tokenizer.ends)))

    def _encode(self, request: Request, text: str) -> engine.Ids:
        if request.chat:
            return tuple(chat.encode_prompt_with_opening(self.tokenizer, self.chat_format, text, request.opening))
        return tuple(chat.encode_opening(self.tokenizer, text))

    def _decode(
        self,
        sample: engine.Sample,
        ends: Sequence[int],
        stop: Sequence[str],
        watched: Sequence[engine.Ids],
        request: Request,
        prompt: engine.Ids,
    ) -> Completion:
        ids = sample.ids[:-1] if sample.ids and sample.ids[-1] in ends else sample.ids
        decode = self.tokenizer.decode if sample.finished else self.tokenizer.decode_cut
        whole, left_out = decode(ids), ""
        if not request.chat:
            whole = self._continued(whole, decode((*prompt, *ids)), prompt)
        elif not request.opening and whole.startswith(self.chat_format.begin_response):
            left_out = self.chat_format.begin_response
        text = whole.removeprefix(left_out)
        # The engine compares tokens, and a stop string's first letters may be in a token with those before it.
        text, found = chat.until_stop(text, stop)
        completion = Completion(text=text, tokens=len(sample.ids), finished=sample.finished or found)
        if sample.watched_TW is None:
            return completion
        return WatchedCompletion(
            **vars(completion),
            probabilities=lambda start, skipped: self._probabilities(
                sample, ends, watched, len(left_out) + start, skipped
            ),
        )

    def _continued(self, alone: str, both: str, prompt: engine.Ids) -> str:
        """What follows the prompt in the text of `both`. `alone` is that text by itself, from which a tokenizer may
        have left out the space before its first word."""
        known = self.tokenizer.decode(prompt)
        return both.removeprefix(known) if both.startswith(known) else alone

    def _probabilities(
        self,
        sample: engine.Sample,
        ends: Sequence[int],
        watched: Sequence[engine.Ids],
        start: int,
        skipped: str,
    ) -> tuple[float, ...] | None:
        """See `records.WatchedCompletion`."""
        ids = sample.ids
        text = self.tokenizer.decode([id for id in ids if id not in ends])
        begins = lambda count: self.tokenizer.decode(ids[:count])[:start] == text[:start]
        # U+FFFD is a character whose other bytes are still to come.
        behind = lambda count: self.tokenizer.decode(ids[:count])[start:].strip(f"{skipped}\ufffd \t\r\n\u00a0")
        place = bisect.bisect_left(range(len(ids)), True, key=begins)
        if behind(place):
            return None  # one token holds what is before `start` and what is behind it: it has no place of its own
        while place < len(ids) and ids[place] not in ends and not behind(place + 1):
            place += 1
        if place == len(ids):
            return None
        sizes = np.cumsum([0, *map(len, watched)])
        chances = np.exp(sample.watched_TW[place].astype(np.float64))
        return tuple(float(chances[a:b].sum()) for a, b in itertools.pairwise(sizes))


def watched_ids(tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[engine.Ids, ...]:
    """The tokens that each of some short texts may be behind a colon, with a space between or without; nothing at all
    where one of the texts is no single token there."""
    found = []
    for text in texts:
        last = [tokenizer.encode(before + text)[-1] for before in (": ", ":")]
        found.append(tuple(dict.fromkeys(id for id in last if tokenizer.decode([id]).strip() == text)))
    return tuple(found) if all(found) else ()


def open_model(
    folder: epath.PathLike,
    tokenizer: Tokenizer,
    mesh: jax.sharding.Mesh,
    *,
    chat_format: chat.ChatFormat,
    config: engine.EngineConfig,
    key: jax.Array,
) -> ModelGenerate:
    """A Llama from its folder, in any layout that `model.weights` reads, with its tokenizer; laid out for sampling, in
    the type of most of its parameters or as `config` rounds it.

    Raises:
      BadModelFile, BadCheckpoint: the model cannot be read.
      BadInput: the tokenizer is another model's, or the chat format is.
      FileNotFoundError: the folder is missing.
    """
    sizes = weights.read_config(folder, param_dtype="float32", compute_dtype="float32", remat="dots")
    dtype = weights.source_dtype(folder, sizes)
    sizes = dataclasses.replace(sizes, param_dtype=dtype, compute_dtype=dtype)
    check_vocabulary(tokenizer, sizes.V)
    chat.check_format(tokenizer, chat_format, sizes.V)
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
