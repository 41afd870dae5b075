"""Judging examples of the user's own."""

from srlm_jax.data.judging_examples import JudgingExample, filled_examples, from_ranks
from srlm_jax.judge.rubric import Rubric
from srlm_jax.records import RankedPrompt

RUBRIC = Rubric(template="<INSTRUCTION_HERE>|<RESPONSE_HERE>", stop=())


def row(**changes):
    return {"prompt": "why?", "response": "because", "judgement": "It is short.\nScore: 2"} | changes


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
