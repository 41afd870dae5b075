"""Judging examples of the user's own."""

import json
import re

import pytest

from srlm_jax.data.judging_examples import JudgingExample, filled_examples, from_ranks, read_judging_examples
from srlm_jax.judge.rubric import Rubric
from srlm_jax.records import RankedPrompt
from srlm_jax.storage.jsonl import BadRecord

RUBRIC = Rubric(template="<INSTRUCTION_HERE>|<RESPONSE_HERE>", stop=())


def row(**changes):
    return {"prompt": "why?", "response": "because", "judgement": "It is short.\nScore: 2"} | changes


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_rows_are_read_in_order_and_other_columns_are_not_looked_at(tmp_path):
    source = write(tmp_path / "eft.jsonl", row(), row(response="", label=3))
    assert read_judging_examples(source) == [JudgingExample(**row()), JudgingExample(**row(response=""))]


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"prompt": "p", "response": "r"}, "no 'judgement'; a judging example has prompt, response, judgement"),
        (row(response=None), "field 'response': expected str, found None"),
        (row(prompt=" "), "'prompt' is blank"),
        (row(judgement="It is good."), "'judgement' has no score from 0 to 5 (no_score): end it in a line"),
        (row(judgement="Score: 9"), "'judgement' has no score from 0 to 5 (out_of_range)"),
        (row(judgement="Score: four"), "'judgement' has no score from 0 to 5 (not_a_number)"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(tmp_path, second, message):
    with pytest.raises(BadRecord, match=rf"eft\.jsonl:2: {re.escape(message)}"):
        read_judging_examples(write(tmp_path / "eft.jsonl", row(), second))


def test_examples_hold_the_filled_rubric_and_none_is_asked_in_the_evaluation():
    rows = [row(), row(prompt="Who?"), row(), row(judgement="Score: 1"), row(response="so")]
    evaluation = [RankedPrompt(id="e", prompt="WHO? ", responses=("a", "b"), ranks=(0, 1))]
    made = filled_examples([JudgingExample(**r) for r in rows], evaluation, RUBRIC)
    assert [(e.id, e.prompt, e.response, e.finished) for e in made.examples] == [
        ("eft-000001", "why?|because", "It is short.\nScore: 2", True),
        ("eft-000004", "why?|because", "Score: 1", True),
        ("eft-000005", "why?|so", "It is short.\nScore: 2", True),
    ]
    assert made.counts == {"rows": 5, "in_eft_eval": 1, "duplicate": 1, "examples": 3}


def test_ranks_give_an_example_for_every_answer():
    ranked = [RankedPrompt(id="a", prompt="Name a fruit.", responses=("fig", "car", "kiwi"), ranks=(1, 2, 0))]
    assert [(e.prompt, e.response, e.judgement) for e in from_ranks(ranked, "Score: <SCORE_HERE>")] == [
        ("Name a fruit.", "fig", "Score: 3"),
        ("Name a fruit.", "car", "Score: 1"),
        ("Name a fruit.", "kiwi", "Score: 5"),
    ]
