import hashlib

import pytest

from srlm_jax.judge.rubric import Rubric, fill, paper_rubric


def test_the_papers_prompt_word_for_word():
    template = paper_rubric().template
    assert template.startswith("Review the user's question and the corresponding response using the additive 5-point")
    assert template.endswith("attribute points based on the outlined criteria.")
    assert "\n\nUser: <INSTRUCTION_HERE>\n\n<response><RESPONSE_HERE></response>\n\n" in template
    assert '- Conclude with the score using the format: "Score: <total points>"\n' in template
    assert [line.split()[1] for line in template.split("\n") if line.startswith("- ")][:5] == [
        "Add",
        "Add",
        "Award",
        "Grant",
        "Bestow",
    ]
    assert template.isascii()  # straight quotes, unlike the PDF
    assert paper_rubric().stop == ()
    # Whoever edits the prompt changes what every score means: let it be on purpose.
    assert hashlib.sha256(template.encode()).hexdigest()[:16] == "8056a059fc882e50"


def test_both_places_are_filled():
    rubric = Rubric(template="U: <INSTRUCTION_HERE> R: <RESPONSE_HERE>.", stop=())
    assert fill(rubric, "why?", "because") == "U: why? R: because."


def test_a_placeholder_in_the_texts_stays_text():
    rubric = Rubric(template="U: <INSTRUCTION_HERE> R: <RESPONSE_HERE>", stop=())
    filled = fill(rubric, r"say <RESPONSE_HERE> \1", r"<INSTRUCTION_HERE> \g<0>")
    assert filled == r"U: say <RESPONSE_HERE> \1 R: <INSTRUCTION_HERE> \g<0>"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("<INSTRUCTION_HERE>", "<RESPONSE_HERE> once, it holds it 0 times"),
        ("<RESPONSE_HERE>", "<INSTRUCTION_HERE> once, it holds it 0 times"),
        ("<INSTRUCTION_HERE><RESPONSE_HERE><RESPONSE_HERE>", "<RESPONSE_HERE> once, it holds it 2 times"),
    ],
)
def test_a_template_without_its_places_is_refused(template, message):
    with pytest.raises(ValueError, match=message):
        Rubric(template=template, stop=())
