"""The world's exact score, point by point, and that its texts say what they mean."""

import dataclasses
import random

import pytest

from srlm_jax.data import world
from srlm_jax.data.world import Marks, Task
from srlm_jax.judge.parse import parse_vote
from srlm_jax.judge.rubric import fill
from srlm_jax.text.chat import PLAIN
from srlm_jax.text.self_instruct import creation_prompt
from srlm_jax.text.tokenizer import WordTokenizer

TOKENIZER = WordTokenizer(world.vocabulary())
FRUITS = Task("fruits", 3, ordered=False)
IN_ORDER = Task("fruits", 3, ordered=True)
ALL = {"relevant", "topic", "count", "distinct", "order"}


@pytest.mark.parametrize(
    ("task", "answer", "lost"),
    [
        (FRUITS, "plum fig kiwi", set()),
        (FRUITS, "plum  fig\nkiwi", set()),  # any white space is as good as another
        (FRUITS, "plum fig , kiwi", {"topic", "count"}),  # whatever is not white space is an item
        (FRUITS, "plum fig", {"count"}),
        (FRUITS, "plum fig kiwi pear", {"count"}),
        (FRUITS, "plum fig plum", {"distinct"}),
        (FRUITS, "plum fig horse", {"topic"}),
        (FRUITS, "plum fig etc", {"topic"}),
        (FRUITS, "plum horse", {"topic", "count"}),
        (FRUITS, "horse wolf cat", {"relevant", "topic"}),
        (FRUITS, "", {"relevant", "count"}),
        (FRUITS, "horse horse", {"relevant", "topic", "count", "distinct"}),
        (IN_ORDER, "fig kiwi plum", set()),
        (IN_ORDER, "plum fig kiwi", {"order"}),
        (IN_ORDER, "fig fig plum", {"distinct"}),  # equal words are in order
        (IN_ORDER, "plum horse", {"topic", "count", "order"}),
        (IN_ORDER, "plum", {"count"}),
    ],
)
def test_each_point_is_lost_by_its_own_flaw(task, answer, lost):
    marks = world.mark(task, answer)
    assert {name for name, earned in dataclasses.asdict(marks).items() if not earned} == lost
    assert marks.score == (0 if "relevant" in lost else 5 - len(lost))


@pytest.mark.parametrize(
    ("instruction", "task"),
    [
        ("please list three fruits .", FRUITS),
        ("list three fruits in alphabetical order thanks .", IN_ORDER),
        ("fruits three", FRUITS),
        ("three fruits sorted from a to z", IN_ORDER),
        ("list fruits .", None),  # no number
        ("list three words .", None),  # no category
        ("list one fruits .", None),  # one is not a list
        ("list three or four fruits .", None),
        ("list three fruits and birds .", None),
        ("", None),
    ],
)
def test_what_an_instruction_asks_for(instruction, task):
    assert world.read_instruction(instruction) == task


def test_the_score_of_an_instruction_that_asks_for_nothing_is_none():
    assert world.oracle_score("list fruits .", "plum") is None
    assert world.oracle_score("list three fruits .", "plum fig kiwi") == 5
    assert world.oracle_score("list three fruits .", "wolf") == 0


def drawn(count=400):
    for i in range(count):
        rng = random.Random(i)
        task = world.draw_task(rng)
        yield task, world.draw_instruction(rng, task), world.draw_answer(rng, task, 0.4)


def test_every_phrasing_asks_for_its_task():
    assert all(world.read_instruction(instruction) == task for task, instruction, _ in drawn())
    for opener in world.OPENERS:
        for closer in world.CLOSERS:
            for ordered, order in [(True, o) for o in world.ORDERS] + [(False, o) for o in world.NO_ORDERS]:
                text = f"{opener} list three good fruits {order} {closer} ."
                assert world.read_instruction(text) == Task("fruits", 3, ordered)


def test_answers_without_flaws_are_perfect():
    for task, _, _ in drawn():
        assert world.mark(task, world.draw_answer(random.Random(1), task, 0.0)).score == 5


def test_every_flaw_occurs_and_so_does_none():
    scores = [world.mark(task, answer).score for task, _, answer in drawn()]
    assert set(scores) == set(range(6))
    lost = [Marks(**{name: name != flaw for name in ALL}) for flaw in ALL]
    seen = {world.mark(task, answer) for task, _, answer in drawn()}
    assert sum(marks in seen for marks in lost) >= 4  # each by itself; "relevant" takes "topic" with it


def test_the_verdict_on_the_true_points_parses_to_the_score():
    for task, _, answer in drawn():
        marks = world.mark(task, answer)
        vote = parse_vote(world.write_verdict(task, answer, marks), finished=True)
        assert vote.score == marks.score == world.mark(task, answer).score


@pytest.mark.parametrize(
    ("ordered", "answer", "walk"),
    [
        (False, "plum wolf fig fig", "plum on wolf off fig on fig again"),
        (True, "plum wolf fig fig", "plum on wolf off fig on-down fig again"),
        (True, "plum wolf plum", "plum on wolf off plum again-down"),  # said before, though not just before
        (True, "wolf cat", "wolf off cat off-down"),
        (True, "", ""),
    ],
)
def test_a_walk_has_one_word_on_each_item(ordered, answer, walk):
    assert world.write_walk("fruits", ordered, answer) == walk


def test_a_verdict_walks_through_the_items_and_ends_with_the_points():
    verdict = world.write_verdict(IN_ORDER, "plum wolf plum", world.mark(IN_ORDER, "plum wolf plum"))
    assert verdict.split(" . ")[0] == "plum on wolf off plum again-down"
    assert verdict.endswith("relevant yes topic no count yes distinct no order no Score: 2")


def test_the_judge_stops_after_the_score_and_nowhere_before():
    for task, _, answer in drawn(50):
        verdict = world.write_verdict(task, answer, world.mark(task, answer))
        assert verdict.endswith(world.RUBRIC.stop)
        assert not any(stop in verdict[:-1] for stop in world.RUBRIC.stop)


def test_the_vocabulary_covers_every_text():
    texts = [*PLAIN.control, PLAIN.neutral, PLAIN.before_prompt, PLAIN.before_response, *world.RUBRIC.stop]
    for task, instruction, answer in drawn():
        verdict = world.write_verdict(task, answer, world.mark(task, answer))
        texts += [instruction, answer, verdict, fill(world.RUBRIC, instruction, answer)]
    texts += [creation_prompt([instruction for _, instruction, _ in drawn(10)]) + "\n11. \n12."]
    texts += [*world.OPENERS, *world.CLOSERS]
    for text in texts:
        assert TOKENIZER.unknown not in TOKENIZER.encode(text), text


def test_no_word_means_two_things():
    words = [word for names in world.CATEGORIES.values() for word in names]
    assert len(words) == len(set(words)) == len(world.CATEGORY_OF)
    assert not set(words) & {*world.NUMBERS, *world.CATEGORIES, *world.VERBS, *world.SIZES}
    assert all(list(names) == sorted(names) for names in world.CATEGORIES.values())
    # Longer answers than asked for have to be possible: two more than the largest number.
    assert all(len(names) >= 8 for names in world.CATEGORIES.values())


def test_control_words_are_tokens_that_only_the_format_writes():
    assert all(len(TOKENIZER.encode(control)) == 1 for control in PLAIN.control)
    texts = [text for _, instruction, answer in drawn() for text in (instruction, answer)]
    texts += [world.write_verdict(task, answer, world.mark(task, answer)) for task, _, answer in drawn()]
    for control in PLAIN.control:
        assert not any(control in text.split() for text in texts)
