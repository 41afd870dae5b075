"""Completions from a server: `records.Generate` over an OpenAI-compatible HTTP endpoint."""

import dataclasses
import email.utils
import json
import math
import os
import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent import futures
from typing import Annotated
from urllib.parse import urlsplit

from srlm_jax import limits
from srlm_jax.errors import BadInput, MissingExtra, UserError
from srlm_jax.limits import Count, Text, above, at_least
from srlm_jax.records import Completion, Request, SamplingParams


@dataclasses.dataclass(frozen=True, kw_only=True)
class EndpointConfig:
    """Which server is asked, and how patiently."""

    url: Text | None  # up to and with the version, "http://localhost:8000/v1"; None: no server is asked
    model: Text | None  # its name there
    key_variable: Text | None  # the environment variable that holds the key; None for a server that wants none
    timeout_s: Annotated[float, above(0)]  # without a sign from the server
    retries: Annotated[int, at_least(0)]  # of one request, after its first attempt
    concurrency: Count  # requests under way at once
    requests_per_minute: Count  # attempts started, retries among them

    def __post_init__(self):
        limits.check(self)
        if self.url is None:
            return
        if not self.model:
            raise BadInput(f"url is {self.url!r} and model is not given: the name that the server knows the model by")
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc or parts.query:
            raise BadInput(
                "url must be like 'http://localhost:8000/v1', without a key or password in it (the key is read from "
                "the environment variable that key_variable names)"
            )


class EndpointError(UserError, RuntimeError):
    """The endpoint cannot be used, or what it answered: the message names it and says what was wrong."""


class EndpointGenerate:
    """`records.Generate` by a server; one HTTP request for all samples of a prompt.

    A chat request is sent as one user message, and the server puts its own chat format around it; any other is text to
    continue. Unlike a model on this job's devices, the same id draws other completions each time.

    Stop strings are not sent but searched for in what comes back: servers leave the string itself out, which a score
    may be part of, and take four of them at most. So a request may cost tokens that are then dropped.

    What passes (429, 408, 5xx, no connection, no answer in time) is tried again, after the time that the server asks
    for in Retry-After, or else after twice the time of the try before, between half and all of it at random.

    Raises:
      MissingExtra: the package `openai` is missing.
      EndpointError: the environment variable holds no key.
    """

    def __init__(self, config: EndpointConfig):
        try:
            import openai
        except ImportError as error:
            raise MissingExtra(
                "an endpoint is asked through the package openai: pip install 'srlm_jax[openai]'"
            ) from error
        self._openai = openai
        self._config = config
        self._key = _read_key(config.key_variable)
        # Without a key of its own the client would send the one in OPENAI_API_KEY, which is for another server.
        self._client = openai.OpenAI(
            base_url=config.url, api_key=self._key or "none", timeout=config.timeout_s, max_retries=0
        )
        self._pace = _Pace(config.requests_per_minute)

    def __call__(
        self, requests: Sequence[Request], params: SamplingParams, report: Callable[[int, int], None]
    ) -> list[tuple[tuple[Completion, ...], ...]]:
        """See `records.Generate`. `Completion.tokens` is a prompt's total, as the server counts it, shared out by
        length of text; 0 where it does not count.

        Raises:
          EndpointError: a request failed for good, or its answer was nonsense; what else is under way is given up.
        """
        results: list[list[tuple[Completion, ...]]] = [[()] * len(request.prompts) for request in requests]
        halt = threading.Event()
        pool = futures.ThreadPoolExecutor(self._config.concurrency, thread_name_prefix="endpoint")
        try:
            places = {
                pool.submit(self._complete, request, prompt, params, halt): (i, j)
                for i, request in enumerate(requests)
                for j, prompt in enumerate(request.prompts)
            }
            for future in futures.as_completed(places):
                i, j = places[future]
                results[i][j] = completions = future.result()
                report(len(completions), sum(completion.tokens for completion in completions))
        finally:
            halt.set()
            pool.shutdown(wait=False, cancel_futures=True)
        return [tuple(prompts) for prompts in results]

    def _complete(
        self, request: Request, prompt: str, params: SamplingParams, halt: threading.Event
    ) -> tuple[Completion, ...]:
        """All samples of one prompt."""
        where = f"endpoint {self._config.url}, model {self._config.model!r}, request {request.id!r}"
        tries = self._config.retries + 1
        for attempt in range(tries):
            if halt.wait(self._pace.wait_s(time.monotonic())):
                raise EndpointError(f"{where}: given up")
            answer = self._post(request.chat, prompt, params)
            if isinstance(answer, bytes):
                try:
                    return _read_completions(answer, request.chat, params)
                except _Nonsense as error:
                    what = f"{error}; the answer begins {self._public(answer.decode(errors='replace'))[:200]!r}"
                break
            what = answer.what if attempt == 0 else f"{answer.what} ({attempt + 1} tries)"
            if not answer.passes:
                break
            pause_s = _pause_s(attempt, answer.retry_after_s)
            if pause_s > _LONGEST_PAUSE_S:
                what += f"; it asks to wait {pause_s:.0f} s: try again later, or lower requests_per_minute"
                break
            if attempt + 1 < tries:
                halt.wait(pause_s)
        # Outside of every `except`, so that no traceback shows what an error said before the key was taken out.
        raise EndpointError(f"{where}: {what}")

    def _post(self, chat: bool, prompt: str, params: SamplingParams) -> "bytes | _Failure":
        sampling = {
            "model": self._config.model,
            "n": params.samples,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "max_tokens": params.max_new_tokens,
        }
        try:
            if chat:
                messages = [{"role": "user", "content": prompt}]
                raw = self._client.chat.completions.with_raw_response.create(messages=messages, **sampling)
            else:
                raw = self._client.completions.with_raw_response.create(prompt=prompt, **sampling)
            return raw.http_response.content
        except self._openai.APITimeoutError:
            return _Failure(f"no answer within timeout_s = {self._config.timeout_s:g} s", True, None)
        except self._openai.APIConnectionError as error:
            return _Failure(f"no connection: {self._public(str(error.__cause__ or error))[:200]}", True, None)
        except self._openai.APIStatusError as error:
            status, text = error.status_code, self._public(error.response.text)[:200]
            passes = status in (408, 429) or status >= 500
            advice = f" (key_variable is {self._config.key_variable!r})" if status in (401, 403) else ""
            return _Failure(
                f"HTTP {status}{advice}: {text!r}", passes, _retry_after_s(error.response.headers.get("retry-after"))
            )

    def _public(self, text: str) -> str:
        """Servers quote keys in their complaints."""
        return text.replace(self._key, "<key>") if self._key else text


@dataclasses.dataclass(frozen=True)
class _Failure:
    """An attempt without an answer; `passes` says whether another may have one."""

    what: str
    passes: bool
    retry_after_s: float | None


class _Nonsense(ValueError):
    """An answer that is not what the protocol says."""


class _Pace:
    """Evenly spaced times at which requests may start, whatever thread asks."""

    def __init__(self, per_minute: int):
        self._gap_s = 60 / per_minute
        self._next_s = -math.inf
        self._lock = threading.Lock()

    def wait_s(self, now_s: float) -> float:
        """Seconds from now to the next free start, which is then taken."""
        with self._lock:
            start_s = max(now_s, self._next_s)
            self._next_s = start_s + self._gap_s
        return start_s - now_s


_FIRST_PAUSE_S, _LONGEST_BACKOFF_S, _LONGEST_PAUSE_S = 1.0, 60.0, 600.0


def _pause_s(attempt: int, retry_after_s: float | None) -> float:
    """Seconds to wait after the failed attempt 0, 1, 2, ..."""
    if retry_after_s is not None:
        return retry_after_s
    return min(_FIRST_PAUSE_S * 2**attempt, _LONGEST_BACKOFF_S) * random.uniform(0.5, 1.0)


def _retry_after_s(header: str | None) -> float | None:
    """Retry-After in seconds from now: the header holds seconds or a date. None where it is absent or neither."""
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(header).timestamp() - time.time()
        except (ValueError, OverflowError):
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None


def _read_key(variable: str | None) -> str | None:
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise EndpointError(f"the environment variable {variable} holds no key; set it, or key_variable to None")
    if not (key.isascii() and key.isprintable() and " " not in key):
        # Said here, since the HTTP library would quote it.
        raise EndpointError(f"the environment variable {variable} holds what cannot be a key: white space or no ASCII")
    return key


def _read_completions(body: bytes, chat: bool, params: SamplingParams) -> tuple[Completion, ...]:
    """The samples of an answer, checked: the client's own classes take anything for a field's value."""
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        raise _Nonsense("the answer is not JSON") from None
    choices = document.get("choices") if isinstance(document, dict) else None
    if not isinstance(choices, list) or not choices:
        raise _Nonsense("the answer has no choices")
    if len(choices) != params.samples:
        raise _Nonsense(f"{params.samples} samples were asked for and {len(choices)} came; perhaps it takes no n")
    read = [_read_choice(choice, chat, params.stop) for choice in choices]
    usage = document.get("usage")
    total = usage.get("completion_tokens", 0) if isinstance(usage, dict) else 0
    if type(total) is not int or total < 0:
        raise _Nonsense("usage.completion_tokens is no count")
    written = [length for *_, length in read]
    # Rounded at the ends of the shares, which so add up to the total.
    ends = [round(total * sum(written[: k + 1]) / max(1, sum(written))) for k in range(len(written))]
    return tuple(
        Completion(text=text, tokens=end - start, finished=finished)
        for (text, finished, _), start, end in zip(read, [0, *ends], ends, strict=False)
    )


def _read_choice(choice: object, chat: bool, stop: Sequence[str]) -> tuple[str, bool, int]:
    """Text up to and with the first stop string, whether it is finished, and how long it was before the cut."""
    holder = choice.get("message") if chat and isinstance(choice, dict) else choice
    name = "message.content" if chat else "text"
    text = holder.get(name.split(".")[-1]) if isinstance(holder, dict) else None
    reason = choice.get("finish_reason") if isinstance(choice, dict) else None
    if not isinstance(text, str):
        raise _Nonsense(f"a choice's {name} is no text but {type(text).__name__}")
    if not isinstance(reason, str):
        raise _Nonsense(f"a choice's finish_reason is no text but {type(reason).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _Nonsense(f"a choice's {name} holds half a character (a lone surrogate)") from None
    cuts = [text.index(string) + len(string) for string in stop if string in text]
    finished = bool(cuts) or reason not in ("length", "content_filter")
    return text[: min(cuts, default=len(text))], finished, len(text)
