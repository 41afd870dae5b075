"""Completions from a server: `records.Generate` over an OpenAI-compatible HTTP endpoint."""

import dataclasses
import functools
import itertools
import json
import math
import os
import random
import re
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable, Sequence
from concurrent import futures
from typing import Annotated, TypeVar

from tqdm import tqdm

from srlm_jax import limits
from srlm_jax.errors import BadInput, MissingExtra, UserError
from srlm_jax.limits import Count, Text, above, at_least, one_of
from srlm_jax.pipeline.protocol import Answer, Failure, read_answer, read_error, read_json, retry_after_s
from srlm_jax.records import Completion, Request, SamplingParams

Read = TypeVar("Read")

_LENGTHS = ("max_tokens", "max_completion_tokens")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EndpointConfig:
    """Which server is asked, and how patiently."""

    url: Text | None  # up to and with the version, "http://localhost:8000/v1"; None: no server is asked
    model: Text | None  # its name there
    key_variable: Text | None  # the environment variable that holds the key; None for a server that wants none
    # What is sent with a prompt.
    parameters: tuple[Annotated[str, one_of("n", "temperature", "top_p", *_LENGTHS)], ...]
    timeout_s: Annotated[float, above(0)]  # without a sign from the server
    patience_s: Annotated[float, at_least(0)]  # how long a request that fails is tried again
    concurrency: Count  # requests under way at once
    requests_per_minute: Count  # attempts started, repeated ones included

    def __post_init__(self):
        limits.check(self)
        if self.url is None:
            return
        if not self.model:
            raise BadInput(f"url is {self.url!r} and model is not given: the name that the server knows the model by")
        try:
            parts = urllib.parse.urlsplit(self.url)
            good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:
            good = False
        if not good or "@" in parts.netloc or parts.query or parts.fragment:
            raise BadInput(
                "url must be like 'http://localhost:8000/v1', without a key or password in it (the key is read from "
                "the environment variable that key_variable names)"
            )
        lengths = [name for name in self.parameters if name in _LENGTHS]
        if len(lengths) != 1 or len(set(self.parameters)) < len(self.parameters):
            raise BadInput(
                f"parameters is {self.parameters!r}: it must hold one of {' and '.join(_LENGTHS)}, and no name twice, "
                "like \"('n', 'max_tokens')\""
            )


class EndpointError(UserError, RuntimeError):
    """The server cannot be used, or what it answered: the message names its field and says what was wrong."""


class EndpointGenerate:
    """`records.Generate` by a server; one HTTP request for all samples of a prompt, or more where the server returns
    fewer than it is asked for, or where `config.parameters` lacks "n".

    A chat request is sent as one user message, and the server puts its own chat format around it; any other is text to
    continue. Unlike a model on this job's devices, the same id draws other completions each time.

    Stop strings are not sent but searched for in what comes back: servers leave the string itself out, which a score
    may be part of, and take four of them at most. So a request may cost tokens that are then dropped.

    A request whose failure may pass is tried again for `patience_s` seconds after the first failure: no connection, no
    answer in time, status 408, 409, 425, 429 and 5xx, a body that is no JSON, an error object in place of an answer. A
    request whose answer has completions that cannot be read is sent three times at most. A pause is as long as the
    server asks for in Retry-After; else it doubles up to a minute, less up to half of it at random. Failures are
    printed on stderr, at growing intervals.

    What follows when a request has failed for good:

    - After status 401, 403, 404 and other refusals than 400, 413 and 422 the call ends.
    - After any other failure a plain prompt is sent. If it fails too, the server or a setting is at fault, and the call
      ends.
    - If it is answered, the prompt is at fault. Its missing completions are empty and not finished, and it counts as a
      prompt without an answer.

    A prompt also counts as one without an answer if the server sends only empty completions that are not finished,
    unless its content filter withheld them. A warning says how many such prompts there are. If they are more than one
    in 20 of the prompts of this object, and more than one, the call ends.

    `field` is the full name of the configuration's field that `config` comes from; every message begins with it.

    Raises:
      MissingExtra: the package `openai` is missing.
      EndpointError: the environment variable holds no key.
    """

    def __init__(self, config: EndpointConfig, field: str):
        try:
            import openai
        except ImportError as error:
            raise MissingExtra(
                f"{field}.url is given, and a server is asked through the package openai: pip install "
                "'srlm_jax[openai]'"
            ) from error
        self._openai = openai
        self._config = config
        self._field = field
        self._name = f"{field} ({config.url}, model {config.model!r})"
        self._key = _read_key(config.key_variable, field)
        # Without a key of its own the client would send the one in OPENAI_API_KEY, which is for another server.
        self._client = openai.OpenAI(base_url=config.url, api_key=self._key or "none", max_retries=0)
        self._pace = _Pace(config.requests_per_minute)
        self._news = _News()
        self._most = None if "n" in config.parameters else 1  # samples in an answer; None: as many as are asked for
        self._asked = self._unanswered = 0  # prompts

    def __call__(
        self, requests: Sequence[Request], params: SamplingParams, report: Callable[[int, int], None]
    ) -> list[tuple[tuple[Completion, ...], ...]]:
        """See `records.Generate`. `Completion.tokens` is a prompt's total, as the server counts it, shared out by
        length of text; 0 where it does not count.

        Raises:
          EndpointError: the server or a setting is at fault, or too many prompts have no answer; what else is under
            way is given up.
        """
        results: list[list[tuple[Completion, ...]]] = [[()] * len(request.prompts) for request in requests]
        self._asked += sum(len(request.prompts) for request in requests)
        before, why = self._unanswered, ""
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
                completions, failure = future.result()
                if failure is not None:
                    self._unanswered += 1
                    why = f"the last one, request {requests[i].id!r}: {self._said(failure)}"
                    if self._unanswered > max(1, self._asked // _ASKED_TO_ONE_UNANSWERED):
                        raise EndpointError(f"{self._without_answer()}, more than one in 20; {why}")
                results[i][j] = completions
                report(len(completions), sum(completion.tokens for completion in completions))
        finally:
            halt.set()
            pool.shutdown(wait=False, cancel_futures=True)
        if self._unanswered > before:
            self._tell(f"{self._without_answer()} and count as empty completions that are not finished; {why}")
        return [tuple(prompts) for prompts in results]

    def check(self, chat: bool, params: SamplingParams) -> None:
        """Asks for completions of a short prompt, as a stage with these `params` will. It takes seconds: a server that
        takes longer to answer is there, and passes.

        Raises:
          EndpointError: it cannot be reached, or refuses the key, the model or a parameter, or answers nonsense.
        """
        self._check(lambda timeout_s: self._post(chat, _PLAIN_PROMPT, params.samples, params, timeout_s))

    def check_connection(self) -> None:
        """Looks whether the server answers and takes the key; not which models it has.

        Raises:
          EndpointError: it does not.
        """

        def models(timeout_s: float) -> Failure | None:
            answer = self._exchange(self._client.models.with_raw_response.list, timeout_s, read_json)
            refused = isinstance(answer, Failure) and (answer.passes or answer.status in (401, 403))
            return answer if refused else None  # with another status it is there and lists no models

        self._check(models)

    def _check(self, ask: Callable[[float], object]) -> None:
        for attempt in range(_CHECKS):
            answer = ask(min(self._config.timeout_s, _CHECK_TIMEOUT_S))
            if not isinstance(answer, Failure) or answer.busy:
                return
            if not answer.passes:
                break
            if attempt + 1 < _CHECKS:
                _halted(threading.Event(), _CHECK_PAUSE_S)
        raise EndpointError(f"{self._name}: {self._said(answer)}")

    def _complete(
        self, request: Request, prompt: str, params: SamplingParams, halt: threading.Event
    ) -> tuple[tuple[Completion, ...], Failure | None]:
        """All samples of one prompt, and why it has no answer where that is so."""
        drawn: list[Completion] = []
        while (missing := params.samples - len(drawn)) > 0:
            n = missing if self._most is None else min(self._most, missing)
            answer = self._ask(request, prompt, n, params, halt)
            if isinstance(answer, Failure):
                return (*drawn, *[Completion(text="", tokens=0, finished=False)] * missing), answer
            if len(answer.completions) < n:
                self._most = len(answer.completions)
            drawn += answer.completions[:n]
        silent = not any(completion.text or completion.finished for completion in drawn)
        return tuple(drawn), answer.silence if silent else None

    def _ask(
        self, request: Request, prompt: str, n: int, params: SamplingParams, halt: threading.Event
    ) -> Answer | Failure:
        """Up to `n` samples, or more where the server sends more; a failure where the prompt is at fault."""
        timeout_s, patience_s = self._config.timeout_s, self._config.patience_s
        where = f"{self._name}, request {request.id!r}"
        give_up_s, readings = None, 0
        for attempt in itertools.count():
            if _halted(halt, self._pace.wait_s(_now_s())):
                raise EndpointError(f"{where}: given up")
            answer = self._post(request.chat, prompt, n, params, timeout_s)
            if isinstance(answer, Answer):
                return answer
            now_s = _now_s()
            give_up_s = now_s + patience_s if give_up_s is None else give_up_s
            readings += answer.answered
            pause_s = _pause_s(attempt, answer.retry_after_s)
            if not answer.passes or now_s + pause_s > give_up_s or readings == _READINGS:
                break
            if failures := self._news.due(now_s):
                count = f"{failures:,} failures so far; " if failures > 1 else ""
                self._tell(f"{self._said(answer)} ({count}each request is tried again for {patience_s:g} s)")
            if _halted(halt, pause_s):
                raise EndpointError(f"{where}: given up")
        if attempt:
            answer = dataclasses.replace(answer, what=f"after {attempt + 1} attempts: {answer.what}")
        if answer.retry_after_s is not None and answer.retry_after_s > patience_s:
            asks = f"it asks to wait {answer.retry_after_s:.0f} s, longer than patience_s = {patience_s:g} s: "
            answer = dataclasses.replace(answer, what=asks + answer.what)
        if answer.of_the_prompt and not _halted(halt, self._pace.wait_s(_now_s())):
            plain = self._post(request.chat, _PLAIN_PROMPT, n, params, timeout_s)
            if isinstance(plain, Answer):
                return answer
        # Outside of every `except`, so that no traceback shows what an error said before the key was taken out.
        raise EndpointError(f"{where}: {self._said(answer)}")

    def _post(self, chat: bool, prompt: str, n: int, params: SamplingParams, timeout_s: float) -> Answer | Failure:
        values = {
            "n": n,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "max_tokens": params.max_new_tokens,
            "max_completion_tokens": params.max_new_tokens,
        }
        fields = {
            "model": self._config.model,
            # Not every one of these is a parameter of both of the client's functions.
            "extra_body": {name: values[name] for name in self._config.parameters},
        }
        if chat:
            create = self._client.chat.completions.with_raw_response.create
            fields["messages"] = [{"role": "user", "content": prompt}]
        else:
            create = self._client.completions.with_raw_response.create
            fields["prompt"] = prompt
        return self._exchange(create, timeout_s, lambda body: read_answer(body, chat, params.stop), **fields)

    def _exchange(
        self, send: Callable, timeout_s: float, read: Callable[[bytes], Read | Failure], **fields: object
    ) -> Read | Failure:
        """One HTTP request: what `read` makes of the body of an answer with status 200."""
        timeout = self._openai.Timeout(timeout_s, connect=min(timeout_s, _CONNECT_TIMEOUT_S))
        try:
            response = send(timeout=timeout, **fields).http_response
        except self._openai.APITimeoutError as error:
            if "Connect" in type(error.__cause__).__name__:
                return Failure(what=f"no connection within {timeout.connect:g} s")
            return Failure(what=f"no answer within {timeout_s:g} s (timeout_s)", busy=True)
        except self._openai.APIStatusError as error:
            response = error.response
        except self._openai.APIConnectionError as error:
            return Failure(what="no connection", quoted=str(error.__cause__ or error))
        read = read if response.is_success else functools.partial(read_error, response.status_code)
        answer = read(response.content)
        if not isinstance(answer, Failure):
            return answer
        what = answer.what + self._advice(answer)
        if response.history:
            what += f" (redirected to {self._public(str(response.url))})"
        after_s = retry_after_s(response.headers.get("retry-after")) if answer.retry_after_s is None else None
        return dataclasses.replace(
            answer, what=what, retry_after_s=answer.retry_after_s if after_s is None else after_s
        )

    def _advice(self, failure: Failure) -> str:
        """Which field has to do with a refusal."""
        if failure.status in (401, 403):
            return f" ({self._field}.key_variable is {self._config.key_variable!r})"
        if failure.status not in (400, 422):
            return ""
        if "max_completion_tokens" in failure.quoted and "max_completion_tokens" not in self._config.parameters:
            return f" (give 'max_completion_tokens' in the place of 'max_tokens' in {self._field}.parameters)"
        named = [
            name
            for name in self._config.parameters
            if re.search(r"['\"`]n['\"`]|\bn\s*[=>:]" if name == "n" else rf"\b{name}\b", failure.quoted)
        ]
        return f" ({self._field}.parameters says whether {', '.join(named)} is sent)" if named else ""

    def _said(self, failure: Failure) -> str:
        return failure.what + (f": {self._public(failure.quoted)[:200]!r}" if failure.quoted else "")

    def _public(self, text: str) -> str:
        """Servers quote keys in their complaints, in one spelling or another."""
        if self._key is None:
            return text
        key = self._key
        for spelling in (key, json.dumps(key)[1:-1], key.replace("/", "\\/"), urllib.parse.quote(key, safe="")):
            text = text.replace(spelling, "<key>")
        return text

    def _without_answer(self) -> str:
        return f"{self._name}: {self._unanswered:,} of {self._asked:,} prompts have no answer"

    def _tell(self, line: str) -> None:
        """A line above the progress bars."""
        line = line if line.startswith(self._field) else f"{self._name}: {line}"
        tqdm.write(f"warning: {line}", file=sys.stderr)


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


class _News:
    """When one of many failures is worth a line: the first, then one after every pause of 30 s, 1 min, 2 min, ..."""

    def __init__(self):
        self._gap_s = 30.0
        self._next_s = -math.inf
        self._failures = 0
        self._lock = threading.Lock()

    def due(self, now_s: float) -> int:
        """How many failures there were, this one included, if it is time to say so; else 0."""
        with self._lock:
            self._failures += 1
            if now_s < self._next_s:
                return 0
            self._next_s, self._gap_s = now_s + self._gap_s, 2 * self._gap_s
            return self._failures


_FIRST_PAUSE_S, _LONGEST_BACKOFF_S = 1.0, 60.0
_READINGS = 3  # of answers to one prompt that cannot be read
_ASKED_TO_ONE_UNANSWERED = 20
_PLAIN_PROMPT = "Say hello."
_CONNECT_TIMEOUT_S = 10.0
_CHECKS, _CHECK_PAUSE_S, _CHECK_TIMEOUT_S = 3, 1.0, 10.0


def _now_s() -> float:
    return time.monotonic()


def _halted(halt: threading.Event, seconds: float) -> bool:
    """Waits, unless or until `halt` is set; whether it is."""
    return halt.wait(seconds)


def _pause_s(attempt: int, retry_after_s: float | None) -> float:
    """Seconds to wait after the failed attempt 0, 1, 2, ..."""
    if retry_after_s is not None:
        return max(retry_after_s, _FIRST_PAUSE_S / 2)
    return min(_FIRST_PAUSE_S * 2 ** min(attempt, 10), _LONGEST_BACKOFF_S) * random.uniform(0.5, 1.0)


def _read_key(variable: str | None, field: str) -> str | None:
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise EndpointError(
            f"{field}: the environment variable {variable} holds no key; set it, or {field}.key_variable to None"
        )
    if not (key.isascii() and key.isprintable() and " " not in key):
        # Said here, since the HTTP library would quote it.
        raise EndpointError(
            f"{field}: the environment variable {variable} holds what cannot be a key: white space or no ASCII"
        )
    return key
