"""The command that makes judging examples from ranked answers."""

import json
import re

import pytest

from srlm_jax.data.judging_examples import score_of_rank
from srlm_jax.data.sources import read_judging_examples
from srlm_jax.errors import BadInput
from srlm_jax.judging_examples import write_examples


def make(output, **changes):
    write_examples(output, **({"ranked": None, "trees": None, "lang": "en", "template": None} | changes))
    return [(row.response, row.judgement) for row in read_judging_examples(output)[0]]


def ranked(path, *rankings):
    rows = [
        {"prompt": f"q{i}", "responses": [f"a{rank}" for rank in ranks], "ranks": list(ranks)}
        for i, ranks in enumerate(rankings)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("ranks", "scores"),
    [
        ((0, 1), (5, 1)),
        ((0, 1, 2), (5, 3, 1)),
        ((0, 1, 2, 3), (5, 4, 2, 1)),  # 3 2/3 and 2 1/3
        ((0, 1, 2, 3, 4), (5, 4, 3, 2, 1)),
        (tuple(range(9)), (5, 5, 4, 4, 3, 3, 2, 2, 1)),  # halves up
        ((1, 0, 1), (1, 5, 1)),
        ((0, 7), (5, 1)),
    ],
)
def test_the_score_of_a_rank(ranks, scores):
    assert tuple(score_of_rank(rank, ranks) for rank in ranks) == scores


def test_every_ranked_answer_gives_an_example(tmp_path, capsys):
    source = ranked(tmp_path / "ranked.jsonl", (1, 0), (0, 2, 1))
    assert make(tmp_path / "eft.jsonl", ranked=source) == [
        ("a1", "The response meets 1 of the five criteria.\nScore: 1"),
        ("a0", "The response meets 5 of the five criteria.\nScore: 5"),
        ("a0", "The response meets 5 of the five criteria.\nScore: 5"),
        ("a2", "The response meets 1 of the five criteria.\nScore: 1"),
        ("a1", "The response meets 3 of the five criteria.\nScore: 3"),
    ]
    assert "eft.jsonl: 5 judging examples (prompts 2, " in capsys.readouterr().out
    make(tmp_path / "again.jsonl", ranked=source)
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "eft.jsonl").read_bytes()


def test_a_template_words_the_judgements(tmp_path):
    template = tmp_path / "verdict.txt"
    template.write_text("Place <RANK_HERE> among <COUNT_HERE>.\nScore: <SCORE_HERE>\n")
    found = make(tmp_path / "eft.jsonl", ranked=ranked(tmp_path / "ranked", (0, 1)), template=template)
    assert found == [("a0", "Place 1 among 2.\nScore: 5"), ("a1", "Place 2 among 2.\nScore: 1")]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (b"Score: 4", "does not hold <SCORE_HERE>"),
        (b"It earns <SCORE_HERE> points.", "the score is not found"),
        (b"Score: <SCORE_HERE>\nScore: <RANK_HERE>", "the score is not found"),
        (b"\xff<SCORE_HERE>", "not UTF-8"),
    ],
)
def test_a_template_whose_score_is_not_found_is_refused(tmp_path, template, message):
    (tmp_path / "verdict.txt").write_bytes(template)
    with pytest.raises(BadInput, match=rf"verdict\.txt: .*{message}"):
        make(tmp_path / "eft", ranked=ranked(tmp_path / "ranked", (0, 1)), template=tmp_path / "verdict.txt")
    assert not (tmp_path / "eft").exists()


def test_what_does_not_go_together_is_refused(tmp_path):
    source = ranked(tmp_path / "ranked", (0, 1))
    for sources in ({}, {"ranked": source, "trees": source}):
        with pytest.raises(BadInput, match=r"one of --ranked=FILE and --trees=FILE"):
            make(tmp_path / "eft", **sources)
    with pytest.raises(BadInput, match=rf"--examples={re.escape(str(source))} is there already"):
        make(source, ranked=source)


def test_open_assistants_ranks(tmp_path, capsys, shared_data):
    assert len(make(tmp_path / "flat", trees=shared_data("oasst/oasst1_en-validation.jsonl"))) == 540
    assert "prompts 186" in capsys.readouterr().out
    assert len(make(tmp_path / "nested", trees=shared_data("oasst/en_100_tree.jsonl"))) > 300


def test_trees_in_no_such_language_are_refused(tmp_path):
    message = {"message_id": "m", "text": "t", "role": "prompter", "lang": "en"}
    (tmp_path / "trees").write_text(json.dumps({"message_tree_id": "t", "prompt": message}) + "\n")
    with pytest.raises(BadInput, match=r"holds no prompt with two ranked answers .*other_language 1"):
        make(tmp_path / "eft", trees=tmp_path / "trees", lang="de")
