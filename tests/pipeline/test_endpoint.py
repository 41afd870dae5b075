"""A server that speaks the protocol, and the many ways in which one can fail to."""

import dataclasses
import email.utils
import logging
import time

import pytest
from completions_server import Reply, Server, echo, serving

from srlm_jax.pipeline import endpoint
from srlm_jax.pipeline.endpoint import EndpointConfig, EndpointError, EndpointGenerate
from srlm_jax.records import Completion, Request, SamplingParams

pytest.importorskip("openai", reason="needs the extra `openai`")

PARAMS = SamplingParams(samples=2, temperature=0.7, top_p=0.9, max_new_tokens=20, stop=())
KEY = "sk-local-0123456789"


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("LOCAL_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(endpoint, "_FIRST_PAUSE_S", 0.01)
    with serving(Server(echo)) as server:
        yield server


@pytest.fixture
def config(server):
    return EndpointConfig(
        url=f"http://127.0.0.1:{server.server_port}/v1", model="small", key_variable="LOCAL_KEY", timeout_s=5.0,
        retries=3, concurrency=4, requests_per_minute=600_000,
    )  # fmt: skip


@pytest.fixture
def ask(config):
    """`ask(request, ..., retries=0, samples=1)`: completions; `ask.reported` holds what was reported."""
    clients = []

    def ask(*requests, **changes):
        fields = {name: changes.pop(name) for name in list(changes) if hasattr(config, name)}
        generate = EndpointGenerate(dataclasses.replace(config, **fields))
        clients.append(generate)
        ask.reported = []
        report = lambda finished, tokens: ask.reported.append((finished, tokens))
        return generate(requests, dataclasses.replace(PARAMS, **changes), report)

    yield ask
    for generate in clients:
        generate._client.close()


def request(name, *prompts, chat=True):
    return Request(id=name, prompts=prompts or ("w",), chat=chat)


def completions(*texts, tokens=5, finished=True):
    return tuple(Completion(text=text, tokens=tokens, finished=finished) for text in texts)


# What is asked and what comes back.


def test_a_chat_request_is_a_message_and_any_other_a_text(ask, server):
    assert ask(request("a", "hi"), concurrency=1) == [(completions("hi 0", "hi 1"),)]
    assert ask(request("b", "1. One\n2.", chat=False)) == [(completions("1. One\n2. 0", "1. One\n2. 1"),)]
    sampling = {"model": "small", "n": 2, "temperature": 0.7, "top_p": 0.9, "max_tokens": 20}
    (first, headers, fields), (second, _, other) = server.asked
    assert (first, fields) == ("/v1/chat/completions", sampling | {"messages": [{"role": "user", "content": "hi"}]})
    assert (second, other) == ("/v1/completions", sampling | {"prompt": "1. One\n2."})
    assert headers["authorization"] == f"Bearer {KEY}"


def test_completions_are_in_the_order_of_requests_and_reported_as_they_finish(ask, server):
    server.slow = {"a": 0.4, "b": 0.2}
    drawn = ask(request("1", "a", "c"), request("2", "b"), request("3", "d"), samples=1)
    assert [[[c.text for c in samples] for samples in prompts] for prompts in drawn] == [
        [["a 0"], ["c 0"]], [["b 0"]], [["d 0"]],
    ]  # fmt: skip
    assert ask.reported == [(1, 5)] * 4
    assert ask() == []


def test_no_more_requests_are_under_way_than_allowed(ask, server):
    server.slow = {str(i): 0.1 for i in range(12)}
    ask(*(request(str(i), str(i)) for i in range(12)), concurrency=3)
    assert 1 < server.most_under_way <= 3
    assert len(server.asked) == 12


def test_a_text_ends_with_its_first_stop_string(ask, server):
    body = {"choices": [{"finish_reason": "length", "text": "so: Score: 4 or Score: 5"}]}
    server.replies.append(Reply(body))
    assert ask(request("a", chat=False), samples=1, stop=("Score: 5", "Score: 4")) == [
        (completions("so: Score: 4", tokens=0),)
    ]
    assert "stop" not in server.asked[0][2]  # the server would leave the score out


@pytest.mark.parametrize(
    ("reason", "finished"), [("stop", True), ("eos", True), ("length", False), ("content_filter", False)]
)
def test_what_was_cut_is_not_finished(ask, server, reason, finished):
    server.replies.append(Reply({"choices": [{"finish_reason": reason, "message": {"content": "hi"}}]}))
    assert ask(request("a"), samples=1) == [(completions("hi", tokens=0, finished=finished),)]


def test_tokens_are_shared_out_by_length_and_add_up(ask, server):
    choices = [{"finish_reason": "stop", "text": text} for text in ("a" * 10, "", "b" * 20, "c")]
    server.replies.append(Reply({"choices": choices, "usage": {"completion_tokens": 11}}))
    ((drawn,),) = ask(request("a", chat=False), samples=4)
    assert [c.tokens for c in drawn] == [4, 0, 7, 0]
    assert ask.reported == [(4, 11)]


# What passes.


@pytest.mark.parametrize(
    "reply",
    [Reply({}, 429), Reply({}, 500), Reply(b"<html>", 503), Reply({}, 408), Reply(hang_up=True), Reply(delay_s=1.2)],
    ids=["429", "500", "503", "408", "hangs up", "times out"],
)
def test_what_passes_is_tried_again(ask, server, reply):
    server.replies.extend([reply, reply])
    assert ask(request("a"), timeout_s=0.6 if reply.delay_s else 5.0) == [(completions("w 0", "w 1"),)]
    assert len(server.asked) == 3


def test_retries_come_to_an_end(ask, server):
    server.replies.extend([Reply({"error": "busy"}, 503)] * 9)
    with pytest.raises(EndpointError, match=r"model 'small', request 'a': HTTP 503: .*busy.* \(3 tries\)"):
        ask(request("a"), retries=2)
    assert len(server.asked) == 3


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
def test_what_does_not_pass_is_said_at_once(ask, server, status):
    server.replies.append(Reply({"error": {"message": "no such thing"}}, status))
    with pytest.raises(EndpointError, match=rf"endpoint http://127\.0\.0\.1:\d+/v1, .*HTTP {status}.*no such thing"):
        ask(request("a"))
    assert len(server.asked) == 1


def test_pauses_double_up_to_a_limit_and_differ():
    for attempt, longest in [(0, 1), (1, 2), (2, 4), (5, 32), (6, 60), (50, 60)]:
        drawn = [endpoint._pause_s(attempt, None) for _ in range(50)]
        assert longest / 2 <= min(drawn) < max(drawn) <= longest
    assert endpoint._pause_s(7, 3.5) == 3.5


def test_a_server_says_when_to_try_again(ask, server, monkeypatch):
    paused = []
    monkeypatch.setattr(endpoint, "_pause_s", lambda attempt, retry_after_s: paused.append(retry_after_s) or 0.0)
    server.replies.extend([Reply({}, 429, (("Retry-After", "17"),)), Reply({}, 503)])
    ask(request("a"))
    assert paused == [17.0, None]


def test_retry_after_is_seconds_or_a_date():
    assert endpoint._retry_after_s("0.5") == 0.5
    assert endpoint._retry_after_s("-3") == 0.0
    later = email.utils.formatdate(time.time() + 1e6, usegmt=True)
    assert 0.9e6 < endpoint._retry_after_s(later) <= 1e6
    assert endpoint._retry_after_s("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0
    assert [endpoint._retry_after_s(header) for header in (None, "soon", "", "nan", "inf")] == [None] * 5


def test_nobody_waits_for_hours(ask, server):
    server.replies.append(Reply({}, 429, (("Retry-After", "86400"),)))
    with pytest.raises(EndpointError, match="it asks to wait 86400 s"):
        ask(request("a"))


def test_requests_start_evenly_spaced():
    pace = endpoint._Pace(120)
    assert [pace.wait_s(100.0) for _ in range(3)] == [0.0, 0.5, 1.0]
    assert pace.wait_s(101.25) == 0.25
    assert pace.wait_s(500.0) == 0.0  # what was not used is not saved up
    assert pace.wait_s(500.0) == 0.5


def test_every_attempt_waits_for_its_start(ask, server, monkeypatch):
    starts = []
    monkeypatch.setattr(endpoint._Pace, "wait_s", lambda self, now_s: starts.append(now_s) or 0.0)
    server.replies.extend([Reply({}, 500)] * 2)
    ask(request("a"), request("b"))
    assert len(starts) == len(server.asked) == 4


def test_one_failure_ends_the_rest(ask, server):
    server.replies.extend([Reply(b"{}", 400)])
    with pytest.raises(EndpointError, match="HTTP 400"):
        ask(*(request(str(i)) for i in range(40)), concurrency=1)
    assert len(server.asked) < 5


def test_a_server_that_is_not_there_is_named(ask, server):
    with pytest.raises(EndpointError, match=r"endpoint http://127\.0\.0\.1:1/v1.*no connection: .* \(2 tries\)"):
        ask(request("a"), url="http://127.0.0.1:1/v1", retries=1)


def test_a_slow_server_is_told_from_an_absent_one(ask, server):
    server.replies.append(Reply(delay_s=0.6))
    with pytest.raises(EndpointError, match=r"no answer within timeout_s = 0\.2 s"):
        ask(request("a"), timeout_s=0.2, retries=0)


# Nonsense.


def chat_choice(**changes):
    return {"finish_reason": "stop", "message": {"content": "hi"}} | changes


@pytest.mark.parametrize(
    ("body", "wrong"),
    [
        (b"", "the answer is not JSON"),
        (b"<html>hello</html>", "the answer is not JSON; the answer begins '<html>"),
        (b'{"choices": [', "the answer is not JSON"),
        (b"\xff\xfe\xff", "the answer is not JSON"),
        (b"[" * 100_000, "the answer is not JSON"),
        ([], "the answer has no choices"),
        ("hi", "the answer has no choices"),
        ({}, "the answer has no choices"),
        ({"choices": None}, "the answer has no choices"),
        ({"choices": []}, "the answer has no choices"),
        ({"choices": {"0": chat_choice()}}, "the answer has no choices"),
        ({"choices": [chat_choice()]}, "2 samples were asked for and 1 came"),
        ({"choices": [chat_choice()] * 3}, "2 samples were asked for and 3 came"),
        ({"choices": [chat_choice(), None]}, "message.content is no text but NoneType"),
        ({"choices": [chat_choice(), chat_choice(message={"content": None})]}, "message.content is no text but None"),
        ({"choices": [chat_choice(), chat_choice(message={"content": 5})]}, "message.content is no text but int"),
        ({"choices": [chat_choice(), chat_choice(message={"content": ["hi"]})]}, "message.content is no text but list"),
        ({"choices": [chat_choice(), chat_choice(message="hi")]}, "message.content is no text"),
        ({"choices": [chat_choice(), {"finish_reason": "stop", "text": "hi"}]}, "message.content is no text"),
        ({"choices": [chat_choice(), chat_choice(finish_reason=None)]}, "finish_reason is no text but NoneType"),
        ({"choices": [chat_choice(), chat_choice(finish_reason=1)]}, "finish_reason is no text but int"),
        ({"choices": [chat_choice(), chat_choice(message={"content": "\ud83d"})]}, "holds half a character"),
        ({"choices": [chat_choice()] * 2, "usage": {"completion_tokens": "7"}}, "completion_tokens is no count"),
        ({"choices": [chat_choice()] * 2, "usage": {"completion_tokens": -1}}, "completion_tokens is no count"),
        ({"choices": [chat_choice()] * 2, "usage": {"completion_tokens": True}}, "completion_tokens is no count"),
    ],
)  # fmt: skip
def test_nonsense_is_one_clear_error(ask, server, body, wrong):
    server.replies.append(Reply(body, headers=(("x-should-retry", "true"),)))
    with pytest.raises(EndpointError) as caught:
        ask(request("m2-00007"))
    text = str(caught.value)
    assert f"endpoint http://127.0.0.1:{server.server_port}/v1, model 'small', request 'm2-00007': " in text
    assert wrong in text
    assert len(server.asked) == 1


def test_a_plain_answer_has_text(ask, server):
    server.replies.append(Reply({"choices": [chat_choice(), chat_choice()]}))
    with pytest.raises(EndpointError, match="a choice's text is no text but NoneType"):
        ask(request("a", chat=False))


# Keys.


def said(caught) -> str:
    """All that the error and those it came from say."""
    texts, error = [], caught.value
    while error is not None:
        texts += [str(error), repr(error), *map(str, getattr(error, "__notes__", []))]
        error = error.__cause__ or error.__context__
    return "\n".join(texts)


@pytest.mark.parametrize(
    "reply",
    [
        Reply({"error": {"message": f"Incorrect API key provided: {KEY}"}}, 401),
        Reply({"error": {"message": "x" * 165 + KEY}}, 400),
        Reply(f"<html>Bearer {KEY}".encode()),
        Reply(("x" * 190 + KEY).encode()),
        Reply(f"Bearer {KEY}".encode(), 503),
        Reply({"choices": [], "authorization": KEY}),
        Reply({"choices": [{"finish_reason": KEY, "message": {"content": None}}] * 2}),
    ],
)
def test_a_key_is_neither_said_nor_logged(ask, server, caplog, capfd, reply):
    caplog.set_level(logging.DEBUG)
    server.replies.extend([reply, reply])
    with pytest.raises(EndpointError) as caught:
        ask(request("a"), retries=1)
    server.replies.clear()
    ask(request("b"))
    printed = capfd.readouterr()
    for text in (said(caught), caplog.text, printed.out, printed.err):
        assert KEY[:9] not in text
    assert server.asked[0][1]["authorization"] == f"Bearer {KEY}"


def test_a_refused_key_is_named_by_its_variable(ask, server):
    server.replies.append(Reply({"error": "who?"}, 401))
    with pytest.raises(EndpointError, match="key_variable is 'LOCAL_KEY'"):
        ask(request("a"))


@pytest.mark.parametrize("value", [None, "", "  \n"])
def test_a_missing_key_is_an_error_that_names_the_variable(config, monkeypatch, value):
    monkeypatch.delenv("LOCAL_KEY") if value is None else monkeypatch.setenv("LOCAL_KEY", value)
    with pytest.raises(EndpointError, match="environment variable LOCAL_KEY holds no key"):
        EndpointGenerate(config)


@pytest.mark.parametrize("value", ["sk-secret\nsk-other", "sk secret", "sk-secrét"])
def test_what_no_header_can_hold_is_not_shown(config, monkeypatch, value):
    monkeypatch.setenv("LOCAL_KEY", value)
    with pytest.raises(EndpointError, match="LOCAL_KEY holds what cannot be a key") as caught:
        EndpointGenerate(config)
    assert "sec" not in said(caught)


def test_a_server_without_a_key_is_not_sent_the_key_of_another(ask, server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-somebody-else")
    ask(request("a"), key_variable=None)
    assert "sk-of-somebody-else" not in str(server.asked[0][1])


def test_a_key_has_no_place_in_the_configuration():
    assert "key" not in {field.name for field in dataclasses.fields(EndpointConfig)}


@pytest.mark.parametrize(
    "change",
    [
        {"url": "localhost:8000/v1"}, {"url": "ftp://host/v1"}, {"url": "http://"}, {"timeout_s": 0.0}, {"retries": -1},
        {"concurrency": 0}, {"requests_per_minute": 0}, {"timeout_s": float("nan")},
        {"url": "http://:sk-secret@host/v1"}, {"url": "http://host/v1?key=sk-secret"},
    ],
)  # fmt: skip
def test_settings_that_cannot_work_are_refused(config, change):
    with pytest.raises(ValueError, match="must be") as caught:
        dataclasses.replace(config, **change)
    assert "sk-secret" not in str(caught.value)
