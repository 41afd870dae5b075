"""Records survive a round trip, and a file that is not what it should be says where and why."""

import dataclasses
import enum
import json

import pytest

from srlm_jax.records import (
    Completion,
    Example,
    JudgedPrompt,
    JudgedResponse,
    Metric,
    NoVote,
    Prompt,
    RankedPrompt,
    Vote,
)
from srlm_jax.storage import jsonl

JUDGED = JudgedPrompt(
    id="p",
    prompt="two\nlines, a line separator \u2028 and an accent é",
    responses=(
        JudgedResponse(
            response="r",
            tokens=3,
            finished=True,
            votes=(
                Vote(text="Score: 4", finished=True, score=4.0, no_vote=None, expected=3.5),
                Vote(text="?", finished=False, score=None, no_vote=NoVote.NO_SCORE),
            ),
            score=4.0,
        ),
        JudgedResponse(response="", tokens=0, finished=False, votes=(), score=None),
    ),
)
COMPLETION = {"text": "t", "tokens": 1, "finished": True}
VOTE = {"text": "t", "finished": True, "score": None, "no_vote": "no_score", "expected": None}


def lines(path, *documents):
    path.write_text("".join(json.dumps(document) + "\n" for document in documents))
    return path


def test_nested_records_come_back_equal(tmp_path):
    path = tmp_path / "new" / "judged.jsonl"
    jsonl.write(path, [JUDGED, JUDGED])
    assert jsonl.read(path, JudgedPrompt) == [JUDGED, JUDGED]
    assert path.read_bytes().count(b"\n") == 2


def test_bytes_are_plain_and_in_field_order(tmp_path):
    path = tmp_path / "x.jsonl"
    jsonl.write(path, [Example(response="é", prompt="p", id="1", finished=True)])
    assert path.read_text("utf-8") == '{"id": "1", "prompt": "p", "response": "é", "finished": true}\n'


def test_no_records_are_an_empty_file(tmp_path):
    jsonl.write(tmp_path / "x.jsonl", [])
    assert jsonl.read(tmp_path / "x.jsonl", Prompt) == []


def test_a_write_that_fails_leaves_the_old_file_and_no_litter(tmp_path):
    path = tmp_path / "x.jsonl"
    jsonl.write(path, [Prompt(id="old", text="", origin="seed")])

    def records():
        yield Prompt(id="new", text="", origin="seed")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        jsonl.write(path, records())
    assert [record.id for record in jsonl.read(path, Prompt)] == ["old"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.jsonl"]


def test_what_cannot_be_read_back_is_not_written(tmp_path):
    for metric in (Metric(value=float("nan"), stderr=0.0, n=1), Metric(value=0.5, stderr=0.1, n=1.5)):
        with pytest.raises(jsonl.BadRecord, match=r"record 0 .*field '(value|n)'"):
            jsonl.write(tmp_path / "x.jsonl", [metric])
    with pytest.raises(jsonl.BadRecord, match=r"field 'text'.*surrogate"):
        jsonl.write(tmp_path / "x.jsonl", [Prompt(id="1", text="\ud800", origin="seed")])


@pytest.mark.parametrize(
    ("cls", "document", "message"),
    [
        (Completion, COMPLETION | {"tokens": "abc"}, "field 'tokens': expected int, found 'abc'"),
        (Completion, COMPLETION | {"tokens": True}, "field 'tokens': expected int, found True"),
        (Completion, COMPLETION | {"tokens": 1.0}, "field 'tokens': expected int, found 1.0"),
        (Completion, COMPLETION | {"finished": 1}, "field 'finished': expected bool, found 1"),
        (Completion, COMPLETION | {"text": None}, "field 'text': expected str, found None"),
        (Completion, COMPLETION | {"logprob": 1}, "field 'logprob': Completion has no such field"),
        (Completion, {"text": "t", "tokens": 1}, "field 'finished': missing"),
        (Completion, [1], "expected an object"),
        (Completion, COMPLETION | {"text": "\ud800"}, "field 'text': .*surrogate"),
        (Vote, VOTE | {"no_vote": "bored"}, "field 'no_vote': expected one of 'unfinished'"),
        (Vote, VOTE | {"score": "4"}, "field 'score': expected float, found '4'"),
        (Vote, VOTE | {"score": False}, "field 'score': expected float, found False"),
        (Vote, VOTE | {"score": 10**400}, "field 'score': expected a finite number"),
        (
            RankedPrompt,
            {"id": "1", "prompt": "p", "responses": "ab", "ranks": []},
            "field 'responses': expected a list",
        ),
        (RankedPrompt, {"id": "1", "prompt": "p", "responses": [], "ranks": [0, "1"]}, r"field 'ranks\[1\]'"),
    ],
)
def test_a_misfit_is_named(tmp_path, cls, document, message):
    good = COMPLETION if cls is Completion else VOTE if cls is Vote else document | {"responses": [], "ranks": []}
    path = lines(tmp_path / "x.jsonl", good, document)
    with pytest.raises(jsonl.BadRecord, match=rf"x\.jsonl:2: .*{message}"):
        jsonl.read(path, cls)


def test_a_misfit_deep_inside_is_named(tmp_path):
    document = dataclasses.asdict(JUDGED)
    document["responses"][0]["votes"][1]["score"] = "4"
    with pytest.raises(jsonl.BadRecord, match=r"field 'responses\[0\].votes\[1\].score': expected float"):
        jsonl.read(lines(tmp_path / "x.jsonl", document), JudgedPrompt)


def test_an_integer_serves_as_a_float(tmp_path):
    (vote,) = jsonl.read(lines(tmp_path / "x.jsonl", VOTE | {"score": 4, "no_vote": None}), Vote)
    assert vote.score == 4.0
    assert isinstance(vote.score, float)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"text": "t", "finished": true, "score": NaN, "no_vote": null}\n', ":1: not valid JSON: NaN"),
        (b'{"text": "t", "finished": true, "score": -Infinity, "no_vote": null}\n', ":1: not valid JSON: -Infinity"),
        (b'{"text": "t", "finished": true, "score": 1e999, "no_vote": null}\n', ":1: not valid JSON: .*too large"),
        (b'{"text": "t", "finished": true, "score": %s, "no_vote": null}\n' % (b"9" * 5000), ":1: not valid JSON"),
        (b"[" * 200_000 + b"\n", ":1: not valid JSON"),
        (b'{"text": "t", "text": "u", "score": 1, "no_vote": null}\n', ":1: .*twice"),
        (b'{"text": "\xff", "score": 1, "no_vote": null}\n', ":1: not UTF-8"),
        (b'{"text": "t", "finished": true, "score": 1, "no_vote": null, "expected": null}\n\n', ":2: not valid JSON"),
        (b'{"text": "t", "finished": true, "score": 1, "no_vote": null}\n{"text": "t"', ":2: .*cut short"),
        (b'{"text": "t", "finished": true, "score": 1, "no_vote": null}', ":1: .*cut short"),
        (b'{"text": "t"\n', ":1: not valid JSON"),
    ],
)
def test_a_broken_file_is_named(tmp_path, data, message):
    path = tmp_path / "x.jsonl"
    path.write_bytes(data)
    with pytest.raises(jsonl.BadRecord, match=message):
        jsonl.read(path, Vote)


def prompts(*names):
    return [Prompt(id=name, text=name, origin="seed") for name in names]


def test_a_folder_reads_as_its_shards_in_order_of_their_number(tmp_path):
    # Ten or more shards, so that an order by anything but the number would show.
    for index in reversed(range(12)):
        jsonl.write(jsonl.shard(tmp_path, index), prompts(f"p{index}"))
    (tmp_path / "notes.txt").write_text("not a shard")
    assert [record.id for record in jsonl.read(tmp_path, Prompt)] == [f"p{index}" for index in range(12)]
    assert jsonl.shards_done(tmp_path) == frozenset(range(12))
    assert jsonl.shard(tmp_path, 3).name == "00003.jsonl"


def test_a_gap_between_shards_is_an_error(tmp_path):
    for index in (0, 1, 3):
        jsonl.write(jsonl.shard(tmp_path, index), prompts("p"))
    with pytest.raises(jsonl.BadRecord, match=r"00002\.jsonl is missing"):
        jsonl.read(tmp_path, Prompt)


def test_a_folder_without_shards(tmp_path):
    assert jsonl.shards_done(tmp_path / "none") == frozenset()
    with pytest.raises(FileNotFoundError, match="no shard"):
        jsonl.read(tmp_path, Prompt)


def test_an_unfinished_shard_does_not_count(tmp_path):
    jsonl.write(jsonl.shard(tmp_path, 0), prompts("p"))
    (tmp_path / ".00001.jsonl.123.partial").write_text("{")
    assert jsonl.shards_done(tmp_path) == {0}
    assert len(jsonl.read(tmp_path, Prompt)) == 1


class Colour(enum.Enum):
    RED = 1


def test_json_documents(tmp_path):
    path = tmp_path / "results.json"
    jsonl.write_json(path, {"accuracy": Metric(value=0.5, stderr=0.1, n=3), "reasons": [NoVote.NO_SCORE, Colour.RED]})
    expected = {"accuracy": {"value": 0.5, "stderr": 0.1, "n": 3}, "reasons": ["no_score", 1]}
    assert jsonl.read_json(path) == expected
    with pytest.raises(jsonl.BadRecord, match=r"results\.json: cannot be written"):
        jsonl.write_json(path, {"loss": float("inf")})
    assert jsonl.read_json(path) == expected
    path.write_text('{"a": ')
    with pytest.raises(jsonl.BadRecord, match=r"results\.json: not valid JSON"):
        jsonl.read_json(path)
