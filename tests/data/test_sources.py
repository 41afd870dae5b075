"""The user's own data: what is read, what is refused and where, and that nothing of the evaluation is trained on."""

import json

import pytest

from srlm_jax.data.judging_examples import JudgingExample
from srlm_jax.data.sources import (
    read_examples,
    read_judging_examples,
    read_prompts,
    read_ranked,
    usable_prompts,
    without_overlap,
)
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
        (read_examples, {"prompt": "q", "answer": "r"}, "no 'response', which rows of this kind have"),
        (read_examples, {"prompt": "q", "response": 3}, "field 'response': expected str, found 3"),
        (read_examples, {"prompt": "q", "response": "r", "id": True}, "field 'id': expected str, found True"),
        (read_examples, ["q", "r"], "expected an object"),
        (read_prompts, {"text": "q"}, "no 'prompt'"),
        (read_prompts, {"prompt": 3}, "field 'prompt': expected str, found 3"),
        (read_ranked, RANKED | {"ranks": [0, 1.5]}, r"field 'ranks\[1\]': expected int, found 1.5"),
        (read_ranked, RANKED | {"ranks": [1, 2]}, r"ranks \[1, 2\] begin at 1: the best has 0"),
    ],
)
def test_a_wrong_row_is_named(tmp_path, read, row, problem):
    good = {"id": "first", "response": "r"} | RANKED
    with pytest.raises(BadRecord, match=rf"x\.jsonl:2: {problem}"):
        read(write(tmp_path, good, row), "name")


def test_all_wrong_rows_are_counted(tmp_path):
    good, wrong = {"prompt": "q", "response": "r"}, {"prompt": "q", "response": 3}
    with pytest.raises(BadRecord, match=r"x\.jsonl:4: field 'response': .*; 2 of 6 rows are wrong, this is the first"):
        read_examples(write(tmp_path, good, good, good, wrong, good, wrong | {"prompt": None}), "name")


def test_blank_answers_are_dropped_and_counted(tmp_path):
    """Of 999 rows 54 have no answer, and 3 repeat an id."""
    answers = [{"id": i, "prompt": f"ask {i}", "response": "" if i % 18 == 0 else "r"} for i in range(18 * 54)]
    path = write(tmp_path, *answers, *answers[1:4], *({"prompt": "p", "response": "r"} for _ in range(24)))
    examples, counts = read_examples(path, "ift")
    assert len(examples) == 999 - 54 - 3 and counts == {"blank_response": 54, "same_id": 3}
    assert [example.id for example in (examples[0], examples[-1])] == ["1", "ift-000999"]


def test_what_is_left_out_of_rows_is_counted(tmp_path):
    turns = [{"from": ("human", "gpt")[i % 2], "value": str(i)} for i in range(4)]
    system = {"from": "system", "value": "be brief"}
    path = write(tmp_path, *({"conversations": said} for said in (turns, [system, *turns], turns[:2], turns[1:])))
    examples, counts = read_examples(path, "ift")
    assert [(example.prompt, example.response) for example in examples] == [("0", "1")] * 3
    assert counts == {"later_turns": 2, "system_message": 1, "no_first_turn": 1}


def test_a_source_that_is_mostly_unusable_is_refused_with_the_counts(tmp_path):
    rows = [{"prompt": "q", "response": response} for response in ("r", "", None, "r", " ")]
    path = write(tmp_path, *rows, {"prompt": " ", "response": "r"})
    problem = (
        r"x\.jsonl: 4 of 6 rows cannot be used: blank_response 3 \(the first: .*x\.jsonl:2\), blank_prompt 1 \(the "
        r"first: .*x\.jsonl:6\); correct them, or take other columns, as by FILE\?prompt=YOUR_PROMPT&response="
    )
    with pytest.raises(BadRecord, match=problem):
        read_examples(path, "ift")
    assert len(read_examples(write(tmp_path, *rows[:2]), "ift")[0]) == 1


def judged(**changes):
    return {"prompt": "why?", "response": "because", "judgement": "It is short.\nScore: 2"} | changes


def test_judging_examples_are_read_in_order_whatever_their_ids(tmp_path):
    path = write(tmp_path, judged(id="p", label=3), judged(id="p", response="so"))
    made = [JudgingExample(**judged()), JudgingExample(**judged(response="so"))]
    assert read_judging_examples(path) == (made, {})


def test_judging_examples_that_cannot_be_used_are_dropped_and_counted(tmp_path):
    judgements = [{"judgement": said} for said in ("It is good.", "Score: 9", "Score: four", None)]
    rows = [{"prompt": " "}, {"response": None}, {"response": ""}, *judgements]
    path = write(tmp_path, *(judged(**changes) for changes in rows), *[judged()] * 7)
    examples, counts = read_judging_examples(path)
    assert len(examples) == 7 and counts == {"blank_prompt": 1, "blank_response": 2, "no_score": 4}
    with pytest.raises(BadRecord, match=r"4 of 7 rows cannot be used: no_score 4 \(the first: .*x\.jsonl:1\); correct"):
        read_judging_examples(write(tmp_path, *(judged(**changes) for changes in judgements), *[judged()] * 3))


def test_all_wrong_judging_examples_are_counted(tmp_path):
    path = write(tmp_path, judged(), judged(response=3), {"prompt": "p", "response": "r"})
    with pytest.raises(BadRecord, match=r"x\.jsonl:2: field 'response': .*found 3; 2 of 3 rows are wrong"):
        read_judging_examples(path)
    path = write(tmp_path, {"prompt": "p", "response": "r"})
    with pytest.raises(
        BadRecord, match=r"x\.jsonl:1: the columns are .*; wanted: prompt \+ response \+ judgement; name"
    ):
        read_judging_examples(path)


def test_columns_that_no_layout_has_are_named_with_those_known(tmp_path):
    path = write(tmp_path, {"question": "q", "answer": "r"})
    problem = (
        r"x\.jsonl:1: the columns are question, answer; wanted: prompt \+ response, or .*instruction \+ output, or .*"
        r"messages, or conversations; name yours at the end of the path, as in FILE\?prompt=YOUR_PROMPT&response="
    )
    with pytest.raises(BadRecord, match=problem):
        read_examples(path, "ift")
    (example,), _ = read_examples(f"{path}?prompt=question&response=answer", "ift")
    assert (example.prompt, example.response) == ("q", "r")
    with pytest.raises(BadRecord, match=r"x\.jsonl:1: an Open Assistant export, which config\.seed_data\.trees takes"):
        read_prompts(write(tmp_path, {"message_id": "q", "text": "?"}), "prompt")


def test_preferences_of_csv_are_rankings(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("id,prompt,chosen,rejected\n7,q,good,bad\n8,p,good,\n")
    assert read_ranked(path, "eft") == (
        [RankedPrompt(id="7", prompt="q", responses=("good", "bad"), ranks=(0, 1))],
        {"blank_response": 1},
    )


def test_numbers_of_pandas_are_whole(tmp_path):
    row = {"id": 7.0, "prompt": "q", "responses": ["a", "b"], "ranks": [0.0, 1.0]}
    path = write(tmp_path, row, row | {"id": float("nan")})
    first, second = read_ranked(path, "eft")[0]
    assert (first.id, second.id) == ("7", "eft-000002") and first.ranks == second.ranks == (0, 1)


@pytest.mark.parametrize(
    ("name", "prompts", "counts"),
    [
        ("self_instruct/seed_tasks", 175, {}),
        ("self_instruct/user_oriented_instructions", 252, {}),
        ("mt_bench/mt_bench__question", 80, {"later_turns": 80}),
        ("ifeval/input_data", 541, {}),
        ("ifbench/IFBench_test", 300, {}),
        ("arena_hard/question_v0.1", 500, {}),
        ("arena_hard/question_v2.0", 750, {}),
    ],
)
def test_public_sets_of_prompts_are_read_as_they_are(shared_data, name, prompts, counts):
    found, left_out = read_prompts(shared_data(f"{name}.jsonl"), "prompt")
    assert (len(found), left_out) == (prompts, counts)


def test_an_instruction_of_self_instruct_comes_with_its_input(shared_data):
    path = shared_data("self_instruct/seed_tasks.jsonl")
    documents = [json.loads(line) for line in path.read_text().splitlines()]
    examples, _ = read_examples(path, "ift")
    for document, example in zip(documents, examples, strict=True):
        (instance,) = document["instances"]
        asked = [text for text in (document["instruction"], instance["input"]) if text.strip()]
        assert (example.prompt, example.response) == ("\n\n".join(asked), instance["output"])


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


def test_prompts_may_be_blank_where_that_is_asked_for(tmp_path):
    path = write(tmp_path, {"prompt": ""}, {"prompt": "q"})
    assert [prompt.text for prompt in read_prompts(path, "prompt", blank=True)[0]] == ["", "q"]
    assert read_prompts(path, "prompt")[1] == {"blank_prompt": 1}
