import dataclasses
import gzip
import json
import logging
import math

import pytest
from completions_server import Reply, Server, echo, serving
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from srlm_jax.pipeline import endpoint
from srlm_jax.pipeline.endpoint import EndpointConfig, EndpointError, EndpointGenerate
from srlm_jax.records import Completion, Request, SamplingParams

openai = pytest.importorskip("openai", reason="needs the extra `openai`")

PARAMS = SamplingParams(samples=2, temperature=0.7, top_p=0.9, max_new_tokens=20, stop=())
KEY = "sk-local-0123456789"
PLAIN = endpoint._PLAIN_PROMPT
FIELD = "config.judge.endpoint"


class Clock:
    """Time that passes only where the endpoint waits."""

    def __init__(self):
        self.now_s, self.waits = 0.0, []

    def halted(self, halt, seconds):
        self.now_s += seconds
        if seconds > 0.01:  # the pace of the tests is faster
            self.waits.append(seconds)
        return halt.is_set()


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(endpoint, "_now_s", lambda: clock.now_s)
    monkeypatch.setattr(endpoint, "_halted", clock.halted)
    return clock


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("LOCAL_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    # To read the certificates of the world takes longer than most of these tests.
    make = openai.OpenAI
    plain = lambda **given: make(http_client=openai.DefaultHttpxClient(verify=False), **given)
    monkeypatch.setattr(openai, "OpenAI", plain)
    with serving(Server(echo)) as server:
        yield server


def config_of(server, **changes):
    fields = {
        "url": f"http://127.0.0.1:{server.server_port}/v1", "model": "small", "key_variable": "LOCAL_KEY",
        "parameters": ("n", "temperature", "top_p", "max_tokens"), "timeout_s": 5.0, "patience_s": 900.0,
        "concurrency": 4, "requests_per_minute": 600_000,
    }  # fmt: skip
    return EndpointConfig(**fields | changes)


@pytest.fixture
def config(server):
    return config_of(server)


@pytest.fixture
def ask(config, clock):
    """`ask(request, ..., patience_s=0.0, samples=1)`: completions; `ask.reported` holds what was reported."""
    clients = []

    def ask(*requests, **changes):
        fields = {name: changes.pop(name) for name in list(changes) if hasattr(config, name)}
        generate = EndpointGenerate(dataclasses.replace(config, **fields), FIELD)
        clients.append(generate)
        ask.generate, ask.reported = generate, []
        report = lambda finished, tokens: ask.reported.append((finished, tokens))
        return generate(requests, dataclasses.replace(PARAMS, **changes), report)

    yield ask
    for generate in clients:
        generate._client.close()


def request(name, *prompts, chat=True):
    return Request(id=name, prompts=prompts or ("w",), chat=chat)


def completions(*texts, tokens=5, finished=True):
    return tuple(Completion(text=text, tokens=tokens, finished=finished) for text in texts)


def nothing(samples):
    return completions(*[""] * samples, tokens=0, finished=False)


def prompt_of(fields):
    return fields["messages"][0]["content"] if "messages" in fields else fields["prompt"]


def always(reply, prompt=None):
    """A script: this reply to everything, or to one prompt."""
    return lambda fields: reply if prompt in (None, prompt_of(fields)) else None


def chat_choice(**changes):
    return {"finish_reason": "stop", "message": {"content": "hi"}} | changes


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


def test_tokens_are_shared_out_by_length_and_add_up(ask, server):
    choices = [{"finish_reason": "stop", "text": text} for text in ("a" * 10, "", "b" * 20, "c")]
    server.replies.append(Reply({"choices": choices, "usage": {"completion_tokens": 11}}))
    ((drawn,),) = ask(request("a", chat=False), samples=4)
    assert [c.tokens for c in drawn] == [4, 0, 7, 0]
    assert ask.reported == [(4, 11)]


@pytest.mark.parametrize(
    ("chat", "choice"),
    [
        (True, chat_choice(message={"content": None})),
        (True, chat_choice(message={"content": None, "tool_calls": [{}]}, finish_reason="tool_calls")),
        (True, chat_choice(message={"content": None, "reasoning_content": "hm"}, finish_reason="length")),
        (True, chat_choice(message={"refusal": "no"})),
        (True, chat_choice(message=None, finish_reason=None)),
        (False, {"text": None, "finish_reason": None}),
        (False, {"text": None, "finish_reason": "content_filter"}),
    ],
)
def test_null_for_a_text_is_an_empty_completion(ask, server, chat, choice):
    server.script = always(Reply({"choices": [choice, chat_choice(text="hi")], "usage": None}), "w")
    ((drawn,),) = ask(request("a", chat=chat))
    assert drawn == (*nothing(1), *completions("hi", tokens=0))
    assert len(server.asked) == 1


def test_choices_beyond_those_asked_for_are_dropped(ask, server):
    body = {"choices": [chat_choice(), chat_choice(message={"content": "ho"}), chat_choice()]}
    server.replies.append(Reply(body | {"usage": {"completion_tokens": 9}}))
    assert ask(request("a")) == [(completions("hi", "ho", tokens=3),)]
    assert len(server.asked) == 1


@pytest.mark.parametrize(("most", "requests"), [(1, [4, 3, 2, 1]), (3, [4, 1])])
def test_a_server_that_gives_fewer_samples_is_asked_more_often(ask, server, most, requests):
    server.most = most
    ((drawn,),) = ask(request("a"), samples=4)
    assert [completion.tokens for completion in drawn] == [5] * 4
    assert all(completion.finished for completion in drawn)
    assert ask.reported == [(4, 20)]
    server.asked.clear()
    ask.generate([request("b"), request("c")], dataclasses.replace(PARAMS, samples=4), lambda *_: None)
    assert sorted(fields["n"] for *_, fields in server.asked) == sorted([min(most, n) for n in requests] * 2)


def test_samples_are_asked_for_one_by_one_where_n_is_no_parameter(ask, server):
    drawn = ask(request("a", "x", "y"), samples=3, parameters=("max_tokens",))
    assert drawn == [(completions(*["x 0"] * 3), completions(*["y 0"] * 3))]
    assert all(set(fields) == {"model", "messages", "max_tokens"} for *_, fields in server.asked)
    assert len(server.asked) == 6


@pytest.mark.parametrize("chat", [True, False])
def test_a_setting_chooses_what_is_sent(ask, server, chat):
    ask(request("a", chat=chat), parameters=("max_completion_tokens", "top_p", "n"))
    fields = {"model": "small", "n": 2, "top_p": 0.9, "max_completion_tokens": 20}
    prompt = {"messages": [{"role": "user", "content": "w"}]} if chat else {"prompt": "w"}
    assert server.asked[0][2] == fields | prompt


def test_an_answer_may_be_compressed(ask, server):
    body = gzip.compress(json.dumps({"choices": [chat_choice()] * 2}).encode())
    server.replies.append(Reply(body, headers=(("content-encoding", "gzip"),)))
    assert ask(request("a")) == [(completions("hi", "hi", tokens=0),)]


# What passes.


PASSING = {
    "429": Reply({}, 429),
    "500": Reply({}, 500),
    "503": Reply(b"<html>", 503),
    "529": Reply({}, 529),
    "408": Reply({}, 408),
    "409": Reply({}, 409),
    "425": Reply({}, 425),
    "hangs up": Reply(hang_up=True),
    "times out": Reply(delay_s=1.2),
    "cut body": Reply({"choices": [chat_choice()] * 2}, cut=20),
    "cut JSON": Reply(b'{"choices": ['),
    "empty body": Reply(b""),
    "damaged gzip": Reply(b"no gzip", headers=(("content-encoding", "gzip"),)),
    "a proxy's HTML": Reply(b"<html>back soon</html>", headers=(("content-type", "text/html"),)),
    "event stream": Reply(b'data: {"choices": []}\n\ndata: [DONE]\n\n'),
    "error object": Reply({"error": {"message": "overloaded", "code": 503}}),
    "error object without a status": Reply({"error": {"message": "overloaded", "type": "server_error"}}),
    "error text": Reply({"error": "overloaded"}),
    "error object of its own": Reply({"object": "error", "message": "overloaded", "code": 50002}),
    "error beside no choices": Reply({"choices": [], "error": {"message": "overloaded", "code": "rate_limit"}}),
    "error beside null": Reply({"choices": None, "error": {"code": "429"}}),
    "no choices": Reply({"choices": []}),
    "null choices": Reply({"choices": None}),
    "no choice": Reply({"choices": [None, None]}),
    "no text": Reply({"choices": [chat_choice(message={"content": 5})]}),
}


@pytest.mark.parametrize("reply", PASSING.values(), ids=PASSING)
def test_what_passes_is_tried_again(ask, server, reply):
    server.replies.extend([reply, reply])
    assert ask(request("a"), timeout_s=0.6 if reply.delay_s else 5.0) == [(completions("w 0", "w 1"),)]
    assert len(server.asked) == 3


def test_a_restart_of_two_minutes_is_waited_out(ask, server, clock, capfd):
    server.script = lambda fields: Reply(hang_up=True) if clock.now_s < 120 else None
    assert ask(*(request(str(i)) for i in range(20))) == [(completions("w 0", "w 1"),)] * 20
    printed = capfd.readouterr()
    lines = printed.err.strip().split("\n")
    assert printed.out == "" and 1 <= len(lines) <= 3  # after 0, 30 and 90 s
    assert lines[0].startswith(f"warning: {FIELD} (http://127.0.0.1:{server.server_port}/v1, model 'small'): no conn")
    assert lines[0].endswith("(each request is tried again for 900 s)")
    assert all("failures so far; each request is tried again for 900 s" in line for line in lines[1:])


def test_a_server_that_often_has_too_much_to_do_is_waited_for(ask, server, capfd):
    refused = iter([i % 10 < 3 for i in range(10_000)])
    server.script = lambda fields: Reply({"error": "too many"}, 429) if next(refused) else None
    assert ask(*(request(str(i)) for i in range(100))) == [(completions("w 0", "w 1"),)] * 100
    lines = capfd.readouterr().err.strip().split("\n")
    assert "HTTP 429: 'too many'" in lines[0]
    assert len(lines) < 6  # of 40 failures


def test_failures_are_told_in_growing_intervals():
    news = endpoint._News()
    assert [now_s for now_s in range(10_000) if news.due(now_s)] == [0, 30, 90, 210, 450, 930, 1890, 3810, 7650]
    assert news.due(20_000) == 10_001


def test_patience_comes_to_an_end(ask, server, clock):
    server.script = always(Reply({"error": "busy"}, 503))
    with pytest.raises(EndpointError, match=r"model 'small'\), request 'a': after \d+ attempts: HTTP 503: 'busy'"):
        ask(request("a"), patience_s=100.0)
    assert sum(clock.waits) <= 100 < sum(clock.waits) + 60


def test_without_patience_there_is_one_attempt(ask, server, clock):
    server.script = always(Reply({"error": "busy"}, 503))
    with pytest.raises(EndpointError, match=r"request 'a': HTTP 503: 'busy'"):
        ask(request("a"), patience_s=0.0)
    assert [prompt_of(fields) for *_, fields in server.asked] == ["w", PLAIN]
    assert clock.waits == []


REFUSALS = (400, 401, 402, 403, 404, 405, 413, 422, 501)


@pytest.mark.parametrize("status", REFUSALS)
def test_what_does_not_pass_is_said_at_once(ask, server, status):
    server.script = always(Reply({"error": {"message": "no such thing"}}, status))
    with pytest.raises(EndpointError, match=rf"^config\.judge\.endpoint \(http.*HTTP {status}.*'no such thing'"):
        ask(request("a"))
    assert len(server.asked) <= 2  # the second time with a plain prompt


@pytest.mark.parametrize("status", [401, 403, 404, "401"])
def test_an_error_in_place_of_an_answer_counts_as_its_status(ask, server, status):
    server.script = always(Reply({"error": {"message": "who?", "code": status}}))
    with pytest.raises(EndpointError, match=rf"an error in place of an answer \(status {status}\).*: 'who\?'"):
        ask(request("a"))
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    ("said", "advice"),
    [
        ("Use 'max_completion_tokens' instead of 'max_tokens'", "give 'max_completion_tokens' in the place of"),
        ("Unsupported value: 'temperature' does not support 0.7", "says whether temperature is sent"),
        ("temperature and top_p cannot both be given", "says whether temperature, top_p is sent"),
        ("'n' must be 1", "says whether n is sent"),
        ("n > 1 is not supported", "says whether n is sent"),
    ],
)
def test_a_refused_parameter_names_the_field(ask, server, said, advice):
    server.script = always(Reply({"error": {"message": said}}, 400))
    with pytest.raises(
        EndpointError, match=rf"HTTP 400 \(.*config\.judge\.endpoint\.parameters.*{said[-20:]}"
    ) as caught:
        ask(request("a"))
    assert advice in str(caught.value)


def test_other_refusals_name_no_parameter(ask, server):
    server.script = always(Reply({"error": {"message": "no new words in one sentence"}}, 400))
    with pytest.raises(EndpointError, match=r"HTTP 400: 'no new words"):
        ask(request("a"))


def test_pauses_double_up_to_a_limit_and_differ():
    for attempt, longest in [(0, 1), (1, 2), (2, 4), (5, 32), (6, 60), (5_000, 60)]:
        drawn = [endpoint._pause_s(attempt, None) for _ in range(50)]
        assert longest / 2 <= min(drawn) < max(drawn) <= longest
    assert endpoint._pause_s(7, 3.5) == 3.5
    assert endpoint._pause_s(7, 0.0) == 0.5  # no server is asked without a pause


@pytest.mark.parametrize(
    "reply",
    [
        Reply({}, 429, (("Retry-After", "17"),)),
        Reply({"error": {"code": 429, "retry_after": 17}}),
        Reply({"error": {"code": 429, "retry_after": "17"}}),
        Reply({"error": {"code": 429}}, headers=(("Retry-After", "17"),)),
    ],
)
def test_a_server_says_when_to_try_again(ask, server, clock, reply):
    server.replies.extend([reply])
    ask(request("a"))
    assert clock.waits == [17.0]


@pytest.mark.parametrize("patience_s", [0.0, 900.0])
def test_nobody_waits_for_hours(ask, server, clock, patience_s):
    server.script = always(Reply({"error": "quota"}, 429, (("Retry-After", "86400"),)))
    said = f"it asks to wait 86400 s, longer than patience_s = {patience_s:g} s: HTTP 429: 'quota'"
    with pytest.raises(EndpointError, match=said):
        ask(request("a"), patience_s=patience_s)
    assert clock.waits == []


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


def test_a_server_that_refuses_ends_the_rest(ask, server):
    server.replies.append(Reply(b"{}", 401))
    with pytest.raises(EndpointError, match="HTTP 401"):
        ask(*(request(str(i)) for i in range(40)), concurrency=1)
    assert len(server.asked) < 5


def test_a_server_that_is_not_there_is_named(ask, server):
    with pytest.raises(
        EndpointError, match=r"endpoint \(http://127\.0\.0\.1:1/v1.* after \d+ attempts: no connection: "
    ):
        ask(request("a"), url="http://127.0.0.1:1/v1", patience_s=60.0)


def test_a_slow_server_is_told_from_an_absent_one(ask, server):
    server.script = always(Reply(delay_s=0.6))
    with pytest.raises(EndpointError, match=r"no answer within 0\.2 s \(timeout_s\)"):
        ask(request("a"), timeout_s=0.2, patience_s=0.0)


def test_a_redirection_is_followed_without_the_key_where_it_leads_to_another_server(ask, server):
    with serving(Server(echo)) as other:
        place = f"http://127.0.0.1:{other.server_port}/v1/chat/completions"
        server.script = always(Reply(b"", 307, (("location", place),)))
        assert ask(request("a")) == [(completions("w 0", "w 1"),)]
        assert "authorization" not in other.asked[0][1]
        other.script = always(Reply({"error": "key?"}, 401))
        with pytest.raises(EndpointError, match=rf"HTTP 401 .* \(redirected to {place}\): 'key\?'"):
            ask(request("a"))


def test_a_redirection_in_a_circle_comes_to_an_end(ask, server):
    server.script = always(Reply(b"", 307, (("location", "/v1/chat/completions"),)))
    with pytest.raises(EndpointError, match=r"no connection: .*redirects"):
        ask(request("a"), patience_s=0.0)


# A prompt without an answer.


UNANSWERABLE = {
    "500": Reply({"error": {"message": "a bug"}}, 500),
    "400": Reply({"error": {"message": "the context has 4096 tokens"}}, 400),
    "413": Reply(b"too large", 413),
    "422": Reply({"detail": "no"}, 422),
    "hangs up": Reply(hang_up=True),
    "cut": Reply(b'{"choices": ['),
    "error object": Reply({"error": {"message": "a bug", "code": 500}}),
    "no choices": Reply({"choices": []}),
    "no text": Reply({"choices": [chat_choice(message={"content": 5})] * 2}),
    "null": Reply({"choices": [chat_choice(message={"content": None}, finish_reason=None)] * 2}),
    "reasoning": Reply(
        {"choices": [{"finish_reason": "length", "message": {"content": "", "reasoning_content": "hm"}}] * 2}
    ),
}


@pytest.mark.parametrize("concurrency", [1, 4])
@pytest.mark.parametrize("reply", UNANSWERABLE.values(), ids=UNANSWERABLE)
def test_a_prompt_that_has_no_answer_does_not_end_the_run(ask, server, capfd, reply, concurrency):
    server.script = always(reply, "bad")
    drawn = ask(request("a", "x", "bad"), request("b", "y"), concurrency=concurrency)
    assert drawn == [(completions("x 0", "x 1"), nothing(2)), (completions("y 0", "y 1"),)]
    assert sorted(ask.reported) == [(2, 0), (2, 10), (2, 10)]
    (told,) = [line for line in capfd.readouterr().err.split("\n") if "have no answer" in line]
    assert told.startswith(f"warning: {FIELD} (")
    assert "1 of 3 prompts have no answer and count as empty completions that are not finished; the last" in told
    assert "request 'a': " in told


def test_an_answer_that_cannot_be_read_is_paid_for_three_times(ask, server):
    server.script = always(Reply({"choices": [{"delta": {"content": "hi"}}]}), "bad")
    ask(request("a", "bad"), request("b"), concurrency=1)
    assert [prompt_of(fields) for *_, fields in server.asked] == ["bad"] * 3 + [PLAIN, "w"]


def test_samples_that_came_before_are_kept(ask, server):
    server.most = 1
    server.replies.extend([Reply(), Reply({"error": "too long"}, 400)])
    ((drawn,),) = ask(request("a"), samples=3)
    assert drawn == (*completions("w 0"), *nothing(2))


def test_what_a_content_filter_withholds_is_an_answer(ask, server, capfd):
    withheld = {"choices": [{"finish_reason": "content_filter", "message": {"content": None}}] * 2}
    server.script = always(Reply(withheld))
    assert ask(*(request(str(i)) for i in range(9))) == [(nothing(2),)] * 9
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(("bad", "total", "ends"), [(1, 1, False), (2, 39, True), (2, 40, False), (3, 40, True)])
@pytest.mark.parametrize("reply", [UNANSWERABLE["400"], UNANSWERABLE["null"]])
def test_more_than_one_prompt_in_20_without_an_answer_ends_the_run(ask, server, bad, total, ends, reply):
    server.script = lambda fields: reply if prompt_of(fields).startswith("bad") else None
    prompts = [f"bad {i}" if i < bad else f"{i}" for i in range(total)]
    if not ends:
        assert ask(request("a", *prompts), concurrency=1)[0][:bad] == (nothing(2),) * bad
        return
    with pytest.raises(EndpointError, match=rf"{bad} of {total} prompts have no answer, more than one in 20; the last"):
        ask(request("a", *prompts), concurrency=1)


def test_prompts_of_earlier_calls_count(ask, server):
    server.script = always(UNANSWERABLE["400"], "bad")
    ask(*(request(str(i)) for i in range(38)), request("x", "bad"))
    ask.generate([request("y", "bad")], PARAMS, lambda *_: None)
    with pytest.raises(EndpointError, match="3 of 41 prompts have no answer"):
        ask.generate([request("z", "bad")], PARAMS, lambda *_: None)


def test_reasoning_alone_names_the_length(ask, server):
    server.script = always(UNANSWERABLE["reasoning"])
    with pytest.raises(EndpointError, match=r"no text but reasoning: raise max_new_tokens; finish_reason: 'length'"):
        ask(*(request(str(i)) for i in range(9)))


@pytest.mark.parametrize(
    ("body", "wrong"),
    [
        (b"", "the answer is not JSON"),
        (b"<html>hello</html>", "the answer is not JSON: '<html>hello"),
        (b"data: {}", "the answer is an event stream, which was not asked for: 'data: {}'"),
        (b'{"choices": [', "the answer is not JSON"),
        (b"\xff\xfe\xff", "the answer is not JSON"),
        (b"[" * 100_000, "the answer is not JSON"),
        (b'{"choices": ' + b"9" * 5_000 + b"}", "the answer is not JSON"),
        ([], "the answer has no choices"),
        ("hi", "the answer has no choices"),
        ({}, "the answer has no choices"),
        ({"choices": None}, "the answer has no choices"),
        ({"choices": []}, "the answer has no choices"),
        ({"choices": {"0": chat_choice()}}, "the answer has no choices"),
        ({"choices": [chat_choice(), None]}, "a choice is no object but NoneType"),
        ({"choices": [chat_choice(), chat_choice(message={"content": 5})]}, "message.content is no text but int"),
        ({"choices": [chat_choice(), chat_choice(message={"content": {}})]}, "message.content is no text but dict"),
        ({"choices": [chat_choice(message={"content": [5]})]}, "message.content is no text but list"),
        ({"choices": [chat_choice(message={"content": [{"text": 5}]})]}, "message.content is no text but list"),
        ({"choices": [chat_choice(), chat_choice(message="hi")]}, "message is no object but str"),
        ({"choices": [chat_choice(), {"finish_reason": "stop", "text": "hi"}]}, "a choice has no message.content"),
    ],
)  # fmt: skip
def test_nonsense_is_one_clear_error(ask, server, body, wrong):
    server.script = always(Reply(body, headers=(("x-should-retry", "true"),)))
    with pytest.raises(EndpointError) as caught:
        ask(request("m2-00007"))
    text = str(caught.value)
    where = f"{FIELD} (http://127.0.0.1:{server.server_port}/v1, model 'small'), request 'm2-00007': after "
    assert text.startswith(where)
    assert wrong in text and "\n" not in text


def test_a_plain_answer_has_text(ask, server):
    server.script = always(Reply({"choices": [chat_choice(), chat_choice()]}))
    with pytest.raises(EndpointError, match="a choice has no text"):
        ask(request("a", chat=False))


# Any answer at all.


VALID = {
    "object": "chat.completion",
    "choices": [
        {"index": i, "finish_reason": "stop", "message": {"role": "assistant", "content": "hi"}, "text": "hi"}
        for i in range(2)
    ],
    "usage": {"completion_tokens": 7, "prompt_tokens": 3},
}
WORDS = st.sampled_from(["", "7", "stop", "text", KEY, f"Bearer {KEY}", "\ud83d", "\x1b[2J\n"]) | st.text(max_size=5)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | WORDS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["error", "message", "code", "content", "text", "type", "index", "retry_after"]) | WORDS,
            inner,
            max_size=3,
        )
    ),
    max_leaves=6,
)


def places(tree, path=()):
    """The path of every value in a JSON document."""
    yield path
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for name, value in items:
        yield from places(value, (*path, name))


def put(tree, path, value):
    if not path:
        return value
    tree = list(tree) if isinstance(tree, list) else dict(tree)
    tree[path[0]] = put(tree[path[0]], path[1:], value)
    return tree


@given(
    path=st.sampled_from(list(places(VALID))),
    value=JSON,
    chat=st.booleans(),
    status=st.sampled_from([200] * 8 + [201, 204, 400, 429, 500]),
    cut=st.none() | st.integers(0, 200),
)
@hypothesis_settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)
def test_any_answer_is_read_or_an_endpoint_error(server, clock, capfd, path, value, chat, status, cut):
    body = json.dumps(put(VALID, path, value)).encode()
    server.script = lambda fields: None if prompt_of(fields) == PLAIN else Reply(body, status, cut=cut)
    generate = EndpointGenerate(config_of(server, concurrency=1, patience_s=3.0), FIELD)
    try:
        (((one, other),),) = generate([request("a", chat=chat)], PARAMS, lambda *_: None)
    except EndpointError as error:
        said = str(error)
    else:
        said = ""
        for completion in (one, other):
            assert type(completion.finished) is bool
            assert type(completion.tokens) is int and completion.tokens >= 0
            completion.text.encode()
    finally:
        generate._client.close()
    said += capfd.readouterr().err
    assert KEY not in said
    assert "\x1b" not in said
    assert all(FIELD in line for line in said.splitlines())


# Before the first stage.


def check(config, chat=True, **changes):
    generate = EndpointGenerate(dataclasses.replace(config, **changes), FIELD)
    try:
        generate.check(chat, PARAMS)
    finally:
        generate._client.close()


def check_connection(config, **changes):
    generate = EndpointGenerate(dataclasses.replace(config, **changes), FIELD)
    try:
        generate.check_connection()
    finally:
        generate._client.close()


@pytest.mark.parametrize("chat", [True, False])
def test_a_server_is_checked_with_what_a_stage_sends(config, server, clock, chat):
    check(config, chat)
    ((path, _, fields),) = server.asked
    assert path == ("/v1/chat/completions" if chat else "/v1/completions")
    assert {name: fields[name] for name in config.parameters} == {
        "n": 2, "temperature": 0.7, "top_p": 0.9, "max_tokens": 20,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (Reply({"error": "who?"}, 401), r"HTTP 401 \(config\.judge\.endpoint\.key_variable is 'LOCAL_KEY'\): 'who\?'"),
        (Reply({"error": {"message": "The model `small` does not exist."}}, 404), "HTTP 404: 'The model `small` does"),
        (Reply({"error": "temperature"}, 400), r"HTTP 400 \(config\.judge\.endpoint\.parameters says whether temperat"),
        (Reply(b"<html>"), "the answer is not JSON: '<html>'"),
        (Reply(b"<html>", 502), "HTTP 502: '<html>'"),
        (Reply(hang_up=True), "no connection: "),
        (Reply({"error": {"message": "no such model"}}), "an error in place of an answer: 'no such model'"),
        (Reply({"choices": []}), "the answer has no choices"),
    ],
)
def test_a_server_that_cannot_be_used_is_told_within_seconds(config, server, clock, reply, said):
    server.script = always(reply)
    with pytest.raises(EndpointError, match=rf"^config\.judge\.endpoint \(http://.*, model 'small'\): {said}"):
        check(config)
    assert len(server.asked) <= 3 and sum(clock.waits) <= 2


@pytest.mark.parametrize("reply", [Reply({}, 429), Reply(delay_s=0.5)], ids=["busy", "slow"])
def test_a_server_that_has_much_to_do_is_there(config, server, clock, reply):
    server.script = always(reply)
    server.models = reply if reply.delay_s == 0 else server.models
    check(config, timeout_s=0.1)
    check_connection(config)


def test_one_lost_connection_is_no_reason_to_refuse_a_run(config, server, clock):
    server.replies.append(Reply(hang_up=True))
    check(config)


@pytest.mark.parametrize("look", [check, check_connection])
def test_a_server_that_is_not_running_is_told_with_its_field(config, server, clock, look):
    with pytest.raises(EndpointError, match=r"^config\.judge\.endpoint \(http://127\.0\.0\.1:1/v1, .*no connection"):
        look(config, url="http://127.0.0.1:1/v1")
    assert sum(clock.waits) <= 2


@pytest.mark.parametrize(
    "models",
    [
        Reply({"data": []}),
        Reply({"data": [{"id": "another"}]}),
        Reply([]),
        Reply({}, 404),
        Reply({}, 405),
        Reply({}, 501),
    ],
)
def test_a_server_may_serve_another_model_or_list_none(config, server, clock, models):
    server.models = models
    check_connection(config)
    assert [path for path, *_ in server.asked] == ["/v1/models"]


@pytest.mark.parametrize(
    ("models", "said"),
    [
        (Reply({"error": f"wrong key {KEY}"}, 401), r"HTTP 401 \(.*key_variable is 'LOCAL_KEY'\): 'wrong key <key>'"),
        (Reply({}, 403), r"HTTP 403 \(.*key_variable is 'LOCAL_KEY'\)"),
        (Reply({}, 503), "HTTP 503"),
        (Reply(b"<html>"), "the answer is not JSON: '<html>'"),
        (Reply(b"[" * 100_000), "the answer is not JSON"),
        (Reply(hang_up=True), "no connection"),
    ],
)
def test_a_connection_that_cannot_be_used_is_told(config, server, clock, models, said):
    server.models = models
    with pytest.raises(EndpointError, match=rf"^config\.judge\.endpoint \(http://.*\): {said}"):
        check_connection(config)


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
        Reply({"choices": [{"finish_reason": KEY, "message": {"content": 5}}] * 2}),
        Reply({"error": {"message": f"{KEY}?"}}),
        Reply(b'{"error": {"message": "\\u0073k-local-0123456789"}}', 400),
    ],
)
def test_a_key_is_neither_said_nor_logged(ask, server, caplog, capfd, reply):
    caplog.set_level(logging.DEBUG)
    server.script = always(reply)
    with pytest.raises(EndpointError) as caught:
        ask(request("a"))
    server.script = lambda fields: None
    ask(request("b"))
    printed = capfd.readouterr()
    for text in (said(caught), caplog.text, printed.out, printed.err):
        assert KEY[:9] not in text
    assert server.asked[0][1]["authorization"] == f"Bearer {KEY}"


def test_a_refused_key_is_named_by_its_variable(ask, server):
    server.replies.append(Reply({"error": "who?"}, 401))
    with pytest.raises(EndpointError, match=r"config\.judge\.endpoint\.key_variable is 'LOCAL_KEY'"):
        ask(request("a"))


@pytest.mark.parametrize("value", [None, "", "  \n"])
def test_a_missing_key_is_an_error_that_names_the_variable(config, monkeypatch, value):
    monkeypatch.delenv("LOCAL_KEY") if value is None else monkeypatch.setenv("LOCAL_KEY", value)
    with pytest.raises(
        EndpointError, match=r"^config\.judge\.endpoint: the environment variable LOCAL_KEY holds no key"
    ):
        EndpointGenerate(config, FIELD)


@pytest.mark.parametrize("value", ["sk-secret\nsk-other", "sk secret", "sk-secrét"])
def test_what_no_header_can_hold_is_not_shown(config, monkeypatch, value):
    monkeypatch.setenv("LOCAL_KEY", value)
    with pytest.raises(EndpointError, match="LOCAL_KEY holds what cannot be a key") as caught:
        EndpointGenerate(config, FIELD)
    assert "sec" not in said(caught)


def test_a_server_without_a_key_is_not_sent_the_key_of_another(ask, server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-somebody-else")
    ask(request("a"), key_variable=None)
    assert "sk-of-somebody-else" not in str(server.asked[0][1])


def test_a_key_has_no_place_in_the_configuration():
    assert "key" not in {field.name for field in dataclasses.fields(EndpointConfig)}


def test_a_key_is_taken_out_in_any_spelling(config, monkeypatch):
    monkeypatch.setenv("LOCAL_KEY", "sk/a+b")
    generate = EndpointGenerate(config, FIELD)
    assert generate._public('"sk/a+b", "sk\\/a+b", sk%2Fa%2Bb') == '"<key>", "<key>", <key>'
    generate._client.close()


def test_what_was_silent_names_no_key(ask, server, capfd):
    server.script = always(Reply({"choices": [{"finish_reason": KEY, "message": {"content": None}}] * 2}))
    assert ask(request("a")) == [(nothing(2),)]
    said = capfd.readouterr().err
    assert "finish_reason: '<key>'" in said and KEY not in said


@pytest.mark.parametrize(
    "change",
    [
        {"url": "localhost:8000/v1"}, {"url": "ftp://host/v1"}, {"url": "http://"}, {"timeout_s": 0.0},
        {"patience_s": -1.0},
        {"concurrency": 0}, {"requests_per_minute": 0}, {"timeout_s": float("nan")},
        {"timeout_s": math.inf}, {"patience_s": math.nan}, {"patience_s": math.inf}, {"url": "http://[::1/v1"},
        {"url": "http://host:99999/v1"}, {"parameters": ()}, {"parameters": ("n", "temperature")},
        {"parameters": ("max_tokens", "max_completion_tokens")}, {"parameters": ("max_tokens", "top_k")},
        {"parameters": ("n", "n", "max_tokens")}, {"parameters": ("n,max_tokens",)},
        {"url": "http://:sk-secret@host/v1"}, {"url": "http://host/v1?key=sk-secret"},
    ],
)  # fmt: skip
def test_settings_that_cannot_work_are_refused(config, change):
    with pytest.raises(ValueError, match=r"must (be|hold)") as caught:
        dataclasses.replace(config, **change)
    assert "sk-secret" not in str(caught.value)
