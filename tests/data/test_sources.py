"""The user's own data: what is read, what is refused and where, and that nothing of the evaluation is trained on."""

import json

import pytest

from srlm_jax.data.sources import read_examples, read_prompts, read_ranked, usable_prompts, without_overlap
from srlm_jax.records import Example, Prompt, RankedPrompt
from srlm_jax.storage.jsonl import BadRecord

RANKED = {"prompt": "q", "responses": ["good", "bad"], "ranks": [0, 1]}


def write(tmp_path, *documents):
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(document) + "\n" for document in documents))
    return path


def example(prompt):
    return Example(id=f"id {prompt}", prompt=prompt, response="r", finished=True)


def ranked(prompt):
    return RankedPrompt(id=f"id {prompt}", prompt=prompt, responses=("a", "b"), ranks=(1, 0))


def test_rows_become_records(tmp_path):
    path = write(
        tmp_path, {"prompt": "q", "response": "r", "source": "us"}, {"id": "mine", "prompt": "p", "response": "s"}
    )
    assert read_examples(path, "ift")[0] == [
        Example(id="ift-000001", prompt="q", response="r", finished=True),
        Example(id="mine", prompt="p", response="s", finished=True),
    ]
    path = write(tmp_path, {"prompt": "q", "responses": ["a", "b", "c"], "ranks": [2, 0, 2], "id": None})
    assert read_ranked(path, "eft")[0] == [
        RankedPrompt(id="eft-000001", prompt="q", responses=("a", "b", "c"), ranks=(2, 0, 2))
    ]
    path = write(tmp_path, {"prompt": "q"})
    assert read_prompts(path, "prompt")[0] == [Prompt(id="prompt-000001", text="q", origin="user")]


@pytest.mark.parametrize(
    ("read", "row", "problem"),
    [
        (read_examples, {"prompt": "q", "answer": "r"}, "no 'response'; a row of this kind has prompt, response and"),
        (read_examples, {"prompt": "q", "response": 3}, "field 'response': expected str, found 3"),
        (read_examples, {"prompt": " ", "response": "r"}, "'prompt' is blank"),
        (read_examples, {"prompt": "q", "response": "\n"}, "'response' is blank"),
        (read_examples, {"prompt": "q", "response": "r", "id": 7}, "field 'id': expected str, found 7"),
        (read_examples, {"prompt": "q", "response": "r", "id": "first"}, r"id 'first' is already that of .*x\.jsonl:1"),
        (read_examples, ["q", "r"], "expected an object"),
        (read_prompts, {"text": "q"}, "no 'prompt'"),
        (read_prompts, {"prompt": None}, "field 'prompt': expected str, found None"),
        (read_prompts, {"prompt": ""}, "'prompt' is blank"),
        (read_ranked, RANKED | {"responses": "good"}, "field 'responses': expected a list"),
        (read_ranked, RANKED | {"responses": ["a", " "]}, r"'responses\[1\]' is blank"),
        (read_ranked, RANKED | {"ranks": [0, 1.5]}, r"field 'ranks\[1\]': expected int, found 1.5"),
        (read_ranked, RANKED | {"ranks": [0, True]}, r"field 'ranks\[1\]': expected int, found True"),
        (read_ranked, RANKED | {"ranks": [0]}, "2 responses and 1 ranks"),
        (read_ranked, RANKED | {"ranks": [1, 2]}, r"ranks \[1, 2\] begin at 1: the best has 0"),
        (read_ranked, RANKED | {"ranks": [-1, 0]}, r"ranks \[-1, 0\] begin at -1"),
        (read_ranked, RANKED | {"ranks": [0, 0]}, r"ranks \[0, 0\] order nothing"),
        (read_ranked, RANKED | {"responses": ["a"], "ranks": [0]}, r"ranks \[0\] order nothing"),
    ],
)
def test_a_wrong_row_is_named(tmp_path, read, row, problem):
    good = {"id": "first", "response": "r"} | RANKED
    with pytest.raises(BadRecord, match=rf"x\.jsonl:2: {problem}"):
        read(write(tmp_path, good, row), "name")


def test_nothing_of_the_evaluation_is_trained_on():
    split = without_overlap(
        [example("one"), example("Shared  Question"), example("two"), example("Two"), example("three")],
        [ranked("shared question"), ranked("three"), ranked("four")],
        [ranked("shared question "), ranked("five")],
    )
    assert [record.prompt for record in split.ift] == ["one", "two", "Two", "three"]
    assert [record.prompt for record in split.eft_train] == ["three", "four"]
    assert [record.prompt for record in split.eft_eval] == ["shared question ", "five"]
    assert split.counts == {
        "ift": 4,
        "ift_in_eft_eval": 1,
        "ift_same_prompt": 1,
        "ift_in_eft_train": 1,
        "eft_train": 2,
        "eft_train_in_eft_eval": 1,
        "eft_train_same_prompt": 0,
        "eft_eval": 2,
        "eft_eval_same_prompt": 0,
    }


def test_sets_that_are_all_evaluation_are_refused():
    with pytest.raises(ValueError, match="all 1 prompts of eft_train are in eft_eval"):
        without_overlap([example("one")], [ranked("two")], [ranked("Two")])


def test_fixed_prompts_are_taken_once_and_none_from_the_evaluation():
    prompts = [Prompt(id=str(i), text=text, origin="user") for i, text in enumerate(["a", "B", "b ", "c", "A"])]
    kept, counts = usable_prompts(prompts, [ranked("C")])
    assert [prompt.text for prompt in kept] == ["a", "B"]
    assert counts == {"in_eft_eval": 1, "same_prompt": 2}
