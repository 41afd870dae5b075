import email.utils
import json
import math
import time

import pytest

from srlm_jax.pipeline import protocol
from srlm_jax.records import Completion


def chat_choice(**changes):
    return {"finish_reason": "stop", "message": {"content": "hi"}} | changes


def read(choice, *, chat=True, **document):
    """The only completion of an answer with this choice."""
    answer = protocol.read_answer(json.dumps({"choices": [choice]} | document).encode(), chat, ())
    assert isinstance(answer, protocol.Answer), answer
    (completion,) = answer.completions
    return completion


@pytest.mark.parametrize(
    ("reason", "finished"),
    [
        ("stop", True), ("STOP", True), ("eos", True), ("eos_token", True), ("end_turn", True), ("stop_sequence", True),
        ("length", False), ("MAX_TOKENS", False), ("content_filter", False), ("error", False), ("abort", False),
        ("tool_calls", False), ("function_call", False), ("no such reason", False), ("", False), (None, False),
        (5, False), (["stop"], False), ({"stop": 1}, False), (True, False),
    ],
)  # fmt: skip
def test_only_a_text_that_the_model_ended_is_finished(reason, finished):
    assert read(chat_choice(finish_reason=reason)) == Completion(text="hi", tokens=0, finished=finished)


def test_a_choice_without_a_reason_is_not_finished():
    assert read({"message": {"content": "hi"}}) == Completion(text="hi", tokens=0, finished=False)


@pytest.mark.parametrize(
    ("usage", "tokens"),
    [
        ({"completion_tokens": 7}, 7), ({"completion_tokens": "7"}, 7), ({"completion_tokens": 7.0}, 7), (None, 0),
        ({}, 0), ([], 0), ("7", 0), ({"completion_tokens": None}, 0), ({"completion_tokens": -1}, 0),
        ({"completion_tokens": True}, 0), ({"completion_tokens": 7.5}, 0), ({"completion_tokens": 10**300}, 0),
        ({"completion_tokens": math.nan}, 0), ({"completion_tokens": math.inf}, 0), ({"completion_tokens": [7]}, 0),
        ({"completion_tokens": "²"}, 0), ({"completion_tokens": "9" * 5_000}, 0),
    ],
)  # fmt: skip
def test_tokens_are_counted_where_the_server_counts(usage, tokens):
    assert read(chat_choice(), usage=usage).tokens == tokens


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([{"type": "text", "text": "so"}, {"type": "text", "text": " it is"}], "so it is"),
        ([{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}, {"type": "text", "text": "4"}], "4"),
        ([{"type": "output_text", "text": "a"}, "b", {"text": "c"}, {"type": "image_url"}], "abc"),
        ([], ""),
        ("half \ud83d", "half \ufffd"),
        ("whole \ud83d\ude00", "whole \U0001f600"),
    ],
)
def test_content_may_be_parts_and_hold_half_a_character(content, text):
    assert read(chat_choice(message={"content": content})).text == text


def test_reasoning_is_no_part_of_the_text():
    message = {"content": "Score: 4", "reasoning_content": "Score: 1?", "reasoning": "Score: 2?"}
    assert read(chat_choice(message=message)).text == "Score: 4"


def test_null_is_no_finished_text_whatever_the_reason():
    assert read(chat_choice(message={"content": None})) == Completion(text="", tokens=0, finished=False)
    thought = [{"type": "thinking", "thinking": "hm"}]
    assert read(chat_choice(message={"content": thought})) == Completion(text="", tokens=0, finished=False)
    assert read(chat_choice(message={"content": ""})) == Completion(text="", tokens=0, finished=True)


def test_choices_are_put_in_order_where_they_are_numbered():
    def texts(*indices):
        choices = [{"text": str(i), "index": index} for i, index in enumerate(indices)]
        answer = protocol.read_answer(json.dumps({"choices": choices}).encode(), False, ())
        return "".join(completion.text for completion in answer.completions)

    assert texts(2, 0, 1) == texts("2", "0", "1") == texts(2.0, 0, "1") == "120"
    assert texts(0, 0, 0) == texts(2, None, 1) == texts(2, "x", []) == "012"


def test_retry_after_is_seconds_or_a_date():
    assert protocol.retry_after_s("0.5") == 0.5
    assert protocol.retry_after_s("-3") == 0.0
    later = email.utils.formatdate(time.time() + 1e6, usegmt=True)
    assert 0.9e6 < protocol.retry_after_s(later) <= 1e6
    assert protocol.retry_after_s("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0
    assert [protocol.retry_after_s(header) for header in (None, "soon", "", "nan", "inf", "9" * 400)] == [None] * 6
