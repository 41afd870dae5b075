"""What a row of each layout says, and why some rows cannot be used."""

import pytest

from srlm_jax.data import layouts
from srlm_jax.data.layouts import EXAMPLES, PROMPTS, RANKINGS, Unusable
from srlm_jax.data.scalars import Misfit


def said(known, row, *mapped):
    """(prompt, responses, ranks, what is left out) of a row, by the layout that its columns show."""
    found = layouts.read(layouts.choose(known, row, mapped), row)
    return found.prompt, found.responses, found.ranks, {str(one) for one in found.left_out}


def turns(*texts, first="user"):
    roles = ("user", "assistant") if first == "user" else ("assistant", "user")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


def share(*texts):
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


SYSTEM = {"role": "system", "content": "be brief"}


@pytest.mark.parametrize(
    ("row", "prompt", "left_out"),
    [
        ({"prompt": "q", "response": "r", "rejected": "x"}, "q", set()),
        ({"prompt": "q", "completion": "r"}, "q", set()),
        ({"prompt": turns("q"), "completion": turns("r", first="assistant")}, "q", set()),
        ({"prompt": [SYSTEM, *turns("q")], "completion": turns("r", first="assistant")}, "q", {"system_message"}),
        ({"instruction": "q", "input": "about", "output": "r"}, "q\n\nabout", set()),
        ({"instruction": "q", "input": "", "output": "r", "text": "Below is ..."}, "q", set()),
        ({"instruction": "q", "input": None, "output": "r"}, "q", set()),
        ({"instruction": "q", "input": "<noinput>", "output": "r"}, "q", set()),
        ({"instruction": "q", "output": "r"}, "q", set()),
        ({"instruction": "q", "context": "about", "response": "r", "category": "qa"}, "q\n\nabout", set()),
        ({"instruction": "q", "instances": [{"input": "about", "output": "r"}]}, "q\n\nabout", set()),
        ({"instruction": "q", "instances": [{"input": "", "output": "r"}, {"output": "s"}]}, "q", {"other_instances"}),
        ({"messages": turns("q", "r")}, "q", set()),
        ({"messages": [SYSTEM, *turns("q", "r")]}, "q", {"system_message"}),
        ({"messages": [SYSTEM | {"content": " "}, *turns("q", "r")]}, "q", set()),
        ({"messages": turns("q", "r", "q2", "r2")}, "q", {"later_turns"}),
        ({"messages": {"role": ["user", "assistant"], "content": ["q", "r"]}}, "q", set()),  # a table, as in Parquet
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, turns("", "r")[1]]}, "q", set()),
        ({"conversations": share("q", "r")}, "q", set()),
        ({"conversations": [{"from": "system", "value": "s"}, *share("q", "r", "t")]}, "q",
         {"system_message", "later_turns"}),
        ({"conversations": turns("q", "r")}, "q", set()),
        ({"conversations": [{"from": "human", "value": "q", "role": None}, *share("", "r")[1:]]}, "q", set()),
        ({"prompt": "q", "response": "r", "system": "s"}, "q", {"system_message"}),
        ({"system_prompt": "", "instruction": "q", "output": "r", "history": []}, "q", set()),
    ],
)  # fmt: skip
def test_examples(row, prompt, left_out):
    assert said(EXAMPLES, row) == (prompt, ("r",), (), left_out)


@pytest.mark.parametrize(
    ("row", "left_out"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, set()),
        ({"prompt": "q", "chosen": turns("q", "a"), "rejected": turns("q ", "b")}, set()),  # UltraFeedback's
        ({"prompt": turns("q"), "chosen": turns("a", first="assistant"), "rejected": turns("b", first="assistant")},
         set()),
        ({"chosen": [SYSTEM, *turns("q", "a")], "rejected": turns("q", "b")}, {"system_message"}),
    ],
)  # fmt: skip
def test_preferences(row, left_out):
    assert said(RANKINGS, row) == ("q", ("a", "b"), (0, 1), left_out)


def test_ranks():
    row = {"prompt": "q", "responses": ["a", "b", "c"], "ranks": [2.0, "0", 2]}
    assert said(RANKINGS, row) == ("q", ("a", "b", "c"), (2, 0, 2), set())


@pytest.mark.parametrize(
    ("row", "prompt", "left_out"),
    [
        ({"prompt": "q"}, "q", set()),
        ({"prompt": "q", "instruction": "other", "messages": []}, "q", set()),
        ({"prompt": turns("q", "r")}, "q", set()),
        ({"prompt": turns("q", "r", "q2")}, "q", {"later_turns"}),
        ({"instruction": "q", "input": "about"}, "q\n\nabout", set()),
        ({"instruction": "q", "context": "about", "response": "r"}, "q\n\nabout", set()),
        ({"instruction": "q", "instances": [{"input": "about", "output": "r"}]}, "q\n\nabout", set()),
        ({"turns": ["q"]}, "q", set()),
        ({"turns": ["q", "q2"]}, "q", {"later_turns"}),
        ({"turns": [{"role": "user", "content": "q"}]}, "q", set()),
        ({"messages": turns("q", "r")}, "q", set()),
        ({"messages": turns("q")}, "q", set()),
        ({"messages": [*turns("q"), *turns("q2")]}, "q", {"later_turns"}),
        ({"conversations": share("q", "r", "q2")}, "q", {"later_turns"}),
    ],
)
def test_prompts(row, prompt, left_out):
    assert said(PROMPTS, row) == (prompt, (), (), left_out)


def test_a_mapped_column_decides_between_layouts():
    row = {"prompt": "p", "response": "r", "instruction": "i", "output": "o"}
    assert said(EXAMPLES, row)[:2] == ("p", ("r",))
    assert said(EXAMPLES, row, "output")[:2] == ("i", ("o",))
    assert layouts.choose(EXAMPLES, {"prompt": "p", "text": "t"}, ()) is None
    assert layouts.choose(EXAMPLES, row, ("messages",)) is None


@pytest.mark.parametrize(
    ("known", "row", "reason"),
    [
        (EXAMPLES, {"prompt": " \n", "response": "r"}, "blank_prompt"),
        (EXAMPLES, {"prompt": None, "response": "r"}, "blank_prompt"),
        (EXAMPLES, {"instruction": " ", "input": "about", "output": "r"}, "blank_prompt"),
        (EXAMPLES, {"prompt": "q", "response": ""}, "blank_response"),
        (EXAMPLES, {"prompt": "q", "response": None}, "blank_response"),
        (EXAMPLES, {"messages": turns("q", None)}, "blank_response"),  # a call of a tool
        (EXAMPLES, {"messages": []}, "no_first_turn"),
        (EXAMPLES, {"messages": None}, "no_first_turn"),
        (EXAMPLES, {"messages": turns("q")}, "no_first_turn"),
        (EXAMPLES, {"messages": turns("hello", "q", "r", first="assistant")}, "no_first_turn"),
        (EXAMPLES, {"messages": [*turns("q"), {"role": "tool", "content": "x"}]}, "no_first_turn"),
        (EXAMPLES, {"messages": [turns("q")[0] | {"content": [{"type": "image"}]}]}, "not_text"),
        (EXAMPLES, {"prompt": turns("q", "r", "q2"), "completion": "r2"}, "several_turns"),
        (EXAMPLES, {"instruction": "q2", "output": "r2", "history": [["q", "r"]]}, "several_turns"),
        (RANKINGS, {"chosen": turns("q", "r", "q2", "a"), "rejected": turns("q", "r", "q2", "b")}, "several_turns"),
        (RANKINGS, {"chosen": turns("q", "a"), "rejected": turns("p", "b")}, "other_prompt"),
        (RANKINGS, {"prompt": "p", "chosen": turns("q", "a"), "rejected": turns("q", "b")}, "other_prompt"),
        (RANKINGS, {"prompt": "q", "chosen": "a", "rejected": "a"}, "same_response"),
        (RANKINGS, {"prompt": "q", "chosen": "a", "rejected": None}, "blank_response"),
        (RANKINGS, {"prompt": "q", "responses": ["a", None], "ranks": [0, 1]}, "blank_response"),
        (RANKINGS, {"prompt": "q", "responses": ["a", "b"], "ranks": [0, None]}, "unranked_response"),
        (RANKINGS, {"prompt": "q", "responses": ["a", "b"], "ranks": [0, 0]}, "unordered"),
        (RANKINGS, {"prompt": "q", "responses": ["a"], "ranks": [0]}, "unordered"),
        (RANKINGS, {"prompt": "q", "responses": ["a", "b", "a"], "ranks": [0, 1, 2]}, "same_response"),
        (PROMPTS, {"turns": [None]}, "blank_prompt"),
        (PROMPTS, {"messages": [SYSTEM]}, "no_first_turn"),
    ],
)
def test_rows_that_cannot_be_used(known, row, reason):
    with pytest.raises(Unusable) as raised:
        said(known, row)
    assert raised.value.args == (reason,)


@pytest.mark.parametrize(
    ("known", "row", "problem"),
    [
        (EXAMPLES, {"prompt": "q", "response": 3}, "field 'response': expected str, found 3"),
        (EXAMPLES, {"prompt": "\ud83d", "response": "r"}, "field 'prompt': not text that UTF-8 can hold"),
        (EXAMPLES, {"messages": "q"}, "field 'messages': expected a list of messages, found 'q'$"),
        (EXAMPLES, {"messages": "[{}]"}, r"found '\[{}\]' \(a list as text, which is not read: give"),
        (EXAMPLES, {"messages": ["q", "r"]}, r"field 'messages\[0\]': expected a message with role and content"),
        (EXAMPLES, {"messages": [{"role": "user", "txt": "q"}]}, r"\[0\]': neither 'content' nor 'value', only role"),
        (EXAMPLES, {"messages": [{"content": "q"}]}, r"\[0\]': neither 'role' nor 'from', only content"),
        (EXAMPLES, {"messages": turns("q", "r", 3)}, r"field 'messages\[2\].content': expected str, found 3"),
        (EXAMPLES, {"instruction": "q", "instances": []}, "field 'instances': expected a list of objects"),
        (EXAMPLES, {"instruction": "q", "instances": [{"output": 3}]}, r"'instances\[0\].output': expected str"),
        (PROMPTS, {"turns": "q"}, "field 'turns': expected a list of texts"),
        (PROMPTS, {"prompt": {"message_id": "x"}}, "a message tree of Open Assistant, which config.seed_data.trees"),
        (RANKINGS, {"chosen": "\n\nHuman: q", "rejected": "x"}, "field 'chosen': expected a list of messages where"),
        (RANKINGS, {"prompt": "q", "responses": "good", "ranks": [0]}, "field 'responses': expected a list"),
        (RANKINGS, {"prompt": "q", "responses": ["a", "b"], "ranks": "[0, 1]"}, "'ranks': .*a list as text, which is"),
        (RANKINGS, {"prompt": "q", "responses": ["a", 3], "ranks": [0, 1]}, r"field 'responses\[1\]': expected str"),
        (RANKINGS, {"prompt": "q", "responses": ["a", "b"], "ranks": [0, 1.5]}, "expected int, found 1.5"),
        (RANKINGS, {"prompt": "q", "responses": ["a", "b"], "ranks": [0, True]}, r"'ranks\[1\]': expected int"),
        (RANKINGS, {"prompt": "q", "responses": ["a", "b"], "ranks": [0]}, "2 responses and 1 ranks"),
        (RANKINGS, {"prompt": "q", "responses": ["a", "b"], "ranks": [1, 2]},
         r"ranks \[1, 2\] begin at 1: the best has 0, so take 1 from each"),
        (RANKINGS, {"prompt": "q", "responses": ["a", "b"], "ranks": [-1, 0]}, r"ranks \[-1, 0\] begin at -1: the"),
    ],
)  # fmt: skip
def test_wrong_types_are_named_with_their_field(known, row, problem):
    with pytest.raises(Misfit, match=problem):
        said(known, row)


def test_a_column_that_only_some_rows_have_is_missed():
    with pytest.raises(Misfit, match=r"no 'response', which rows of this kind have \(prompt, response\)"):
        layouts.read(EXAMPLES[0], {"prompt": "q"})
