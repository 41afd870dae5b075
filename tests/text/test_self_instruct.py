import dataclasses
import random

import pytest

from srlm_jax.records import Completion
from srlm_jax.text.self_instruct import (
    Filters,
    NoveltyPool,
    Rejection,
    check,
    choose_demonstrations,
    creation_prompt,
    first_task,
)

FILTERS = Filters(
    min_words=4,
    max_words=150,
    banned_words=("image", "images", "map", "draw", "go to"),
    banned_starts=("Write a program",),
    max_rouge_l=0.7,
)


def test_the_prompt_is_a_numbered_list_that_ends_with_the_next_number():
    demonstrations = [f"Task {letter}." for letter in "abcdefgh"]
    expected = (
        "Come up with a series of tasks:\n1. Task a.\n2. Task b.\n3. Task c.\n4. Task d.\n5. Task e.\n6. Task f.\n"
        "7. Task g.\n8. Task h.\n9."
    )
    assert creation_prompt(demonstrations) == expected
    assert creation_prompt(["Sort these:\n\n 3, 1", "Do this:"]).splitlines()[1:] == [
        "1. Sort these: 3, 1",
        "2. Do this",
        "3.",
    ]
    with pytest.raises(ValueError, match="at least one"):
        creation_prompt([])


SEEDS = [f"seed {i}" for i in range(20)]
GENERATED = [f"generated {i}" for i in range(20)]


@pytest.mark.parametrize(("machine", "expected"), [(0, 0), (1, 1), (2, 2), (20, 2)])
def test_seeds_stand_in_until_there_are_generated_prompts(machine, expected):
    for seed in range(20):
        chosen = choose_demonstrations(random.Random(seed), SEEDS, GENERATED[:machine], from_seeds=6, from_generated=2)
        assert len(set(chosen)) == 8
        assert sum(text.startswith("generated") for text in chosen) == expected


def test_the_order_is_shuffled_and_repeats():
    def draw(seed):
        return choose_demonstrations(random.Random(seed), SEEDS, GENERATED, from_seeds=6, from_generated=2)

    assert draw(1) == draw(1)
    places = {i for seed in range(50) for i, text in enumerate(draw(seed)) if text.startswith("generated")}
    assert places == set(range(8))  # a place is missed by 50 draws of 2 in 8 with odds of 10^-6


def test_no_text_is_shown_twice():
    chosen = choose_demonstrations(
        random.Random(0), ["a", "a", "b", "c"], ["a", "d", "d"], from_seeds=3, from_generated=1
    )
    assert sorted(chosen) == ["a", "b", "c", "d"]
    with pytest.raises(ValueError, match=r"3 different seed prompts are needed .* there are 2"):
        choose_demonstrations(random.Random(0), ["a", "a", "b"], ["a"], from_seeds=2, from_generated=1)


@pytest.mark.parametrize(
    ("text", "task"),
    [
        (" Name three rivers.\n10. Name a lake.", "Name three rivers."),
        (" Name three rivers.\n10 . Name a lake.", "Name three rivers."),
        (" Name three rivers.\n10.", "Name three rivers."),  # a stop string ended it
        ("9. Name three rivers.", "Name three rivers."),
        (" Name three\n  rivers  of Asia.", "Name three rivers of Asia."),
        (" Name three rivers.\n\nThe Nile, ...", "Name three rivers."),
        (" Name three rivers.\n---\nThe Nile", "Name three rivers."),
        (" Name three rivers.\nOutput: the Nile", "Name three rivers."),
        (" Name three rivers.\nAnswer : the Nile", "Name three rivers."),
        (" Add 3.5 and 2. 1 more?", "Add 3.5 and 2. 1 more?"),  # a number inside a line starts no task
        ("\n Name three rivers.", "Name three rivers."),
        (" name an NGO", "name an NGO"),
        ("  \n ", Rejection.EMPTY),
        ("\n10. Name a lake.", "Name a lake."),
        ("", Rejection.EMPTY),
    ],
)
def test_the_first_task(text, task):
    assert first_task(Completion(text=text, tokens=9, finished=True)) == task


@pytest.mark.parametrize(
    "text",
    [
        "Sure! Here are some tasks:\n\n1. TASK\n2. Name a lake.",
        "Sure, here are a few more tasks:\n9. TASK",
        "Here is a task:\nTASK",
        "Here is a task: TASK",
        "Here\u2019s another task for you to try:\n\n- TASK\n- Name a lake.",
        "Okay, here's one: TASK",
        "Here is one for you to try: TASK",
        "Here are a few more ones\n9. TASK",
        "Of course! Here's a new task:\n**Instruction:** TASK",
        "Certainly!\n\nTASK",
        "Certainly! TASK",
        "**Task 9:** TASK\n**Task 10:** Name a lake.",
        "**Task 9**: TASK\n\n**Task 10**: Name a lake.",
        "### Task 9\nTASK\n### Task 10\nName a lake.",
        "Task 9: TASK\nTask 10: Name a lake.",
        "Task: TASK\nOutput: the Nile",
        "Instruction: TASK",
        'Prompt: "TASK"',
        "9) TASK\n10) Name a lake.",
        "(9) TASK\n(10) Name a lake.",
        "- TASK\n- Name a lake.",
        "\u2022 TASK\n\u2022 Name a lake.",
        "- **Task 9:** TASK",
        '"TASK"',
        "\u201cTASK\u201d",
        "**TASK**",
        "9. **TASK**",
    ],
)
def test_what_chat_models_write_before_a_task_is_no_part_of_it(text):
    task = "Name three rivers of Asia."
    assert first_task(Completion(text=text.replace("TASK", task), tokens=9, finished=True)) == task


@pytest.mark.parametrize(
    "text",
    [
        "Here is a list of numbers: 3, 1, 2. Sort them.",
        "Here is a paragraph about cats. Summarize it.",
        "Okay computer is an album. Who made it?",
        "Great expectations: who wrote it?",
        "Task force members need a plan. Write one.",
        "'Write' a poem with 'love'",
        '"Hi" is English. Say "Bye"',
        "Write about a task: cooking",
        'Here is one sentence: "The cat sat." Translate it to French.',
        "Here are some ones and zeros: 1010. Convert them to decimal.",
    ],
)
def test_a_task_that_begins_like_an_announcement_stays_whole(text):
    assert first_task(Completion(text=text, tokens=9, finished=True)) == text


def test_lists_inside_a_task_stay():
    for text in ("Choose one:\n1) a\n2) b", "Make a list with\n- a\n- b"):
        assert first_task(Completion(text=text, tokens=9, finished=True)) == " ".join(text.split())


@pytest.mark.parametrize("text", ["Sure!", "Sure! Here are some tasks:", "Here is a task", "**Task 9:**", "-"])
def test_an_announcement_alone_is_no_task(text):
    assert first_task(Completion(text=text, tokens=9, finished=True)) == Rejection.EMPTY


@pytest.mark.parametrize(
    "text",
    ["Translate this sentence:\n\nHello.", "Translate this sentence:\nOutput: x", "Translate this sentence to me:"],
)
def test_a_task_that_announces_a_text_which_is_not_there_is_refused(text):
    task = first_task(Completion(text=text, tokens=9, finished=True))
    assert check(task, FILTERS) == Rejection.INCOMPLETE


def test_a_completion_cut_by_the_length_limit_is_refused_whole():
    cut = Completion(text=" Name three rivers.\n10. Na", tokens=9, finished=False)
    assert first_task(cut) == Rejection.UNFINISHED


@pytest.mark.parametrize(
    ("task", "reason"),
    [
        ("", Rejection.EMPTY),
        ("Name three rivers", Rejection.TOO_SHORT),
        ("Name three rivers please", None),
        ("word " * 150, None),
        ("word " * 151, Rejection.TOO_LONG),
        ("Describe what this Image shows", Rejection.BANNED_WORD),
        ("Imagine you mapped a drawing room", None),  # whole words only
        ("Then go  to the shop, please", Rejection.BANNED_WORD),
        ("write a program that sorts numbers", Rejection.BANNED_START),
        ("Write a programme for the concert", None),
        ("How to write a program that sorts", None),
        ("(Optional) name three rivers here", Rejection.PUNCTUATION_START),
        ("\u00c9crivez le nom de trois rivi\u00e8res", Rejection.NON_ASCII_START),
        ("\u201cTo be\u201d is from what play?", Rejection.NON_ASCII_START),
        ("List 3 rivi\u00e8res of France", None),
    ],
)
def test_each_filter(task, reason):
    assert check(task, FILTERS) == reason


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"min_words": 0}, "min_words"),
        ({"max_words": 3}, "min_words is 4: it must not be above max_words"),
        ({"max_rouge_l": 70.0}, r"max_rouge_l is 70\.0: it must be at least 0 and be at most 1"),
        ({"banned_words": ("image", " ")}, r"banned_words\[1\] is ' ': it must not be blank"),
    ],
)
def test_filters_that_make_no_sense(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(FILTERS, **change)


def similar(known, task, limit):
    return NoveltyPool([known], limit).admit(task) == Rejection.SIMILAR


def test_rouge_l_by_hand():
    # "the cat sat" and "the cat ran off": L = 2 of 3 and 4 words, F1 = 4 / 7 = 0.5714...
    assert similar("the cat sat", "the cat ran off", 0.571)
    assert not similar("the cat sat", "the cat ran off", 0.572)
    # Order matters: of "a b c" and "c b a" one word is common in order, F1 = 2 / 6.
    assert similar("a b c", "c b a", 0.33)
    assert not similar("a b c", "c b a", 0.34)
    # Words, not letters; case and punctuation do not count; digits do.
    assert similar("It's 3 o'clock!", "it S 3 O CLOCK", 0.99)
    assert not similar("abc", "abd", 0.0)
    assert not similar("name 3 rivers", "name 4 rivers", 0.7)


@pytest.mark.parametrize("tenths", range(1, 10))
def test_equal_to_the_limit_is_allowed(tenths):
    # Two texts of ten words with `tenths` of them common: F1 is tenths / 10 exactly, where floats often miss it.
    known = " ".join(f"k{i}" for i in range(10))
    task = " ".join(f"k{i}" if i < tenths else f"t{i}" for i in range(10))
    assert not similar(known, task, tenths / 10)
    assert similar(known, task, tenths / 10 - 0.001)


def rouge_l_f1(a, b):
    """By the definition: longest common subsequence of the words, by dynamic programming."""
    row = [0] * (len(b) + 1)
    for x in a:
        row, above = [0], row
        for j, y in enumerate(b):
            row.append(above[j] + 1 if x == y else max(above[j + 1], row[j]))
    return 2 * row[-1] / (len(a) + len(b))


def test_rouge_l_against_the_definition():
    rng = random.Random(0)
    similarities = []
    for _ in range(300):
        texts = [[rng.choice("abcde") for _ in range(rng.randint(1, 12))] for _ in range(4)]
        *known, task = texts
        closest = max(rouge_l_f1(text, task) for text in known)
        similarities.append(closest)
        for limit, expected in ((closest - 1e-3, Rejection.SIMILAR), (closest + 1e-3, None)):
            if 0 <= limit <= 1:
                pool = NoveltyPool([" ".join(text) for text in known], limit)
                assert pool.admit(" ".join(task)) == expected
    assert min(similarities) < 0.4 < 0.9 < max(similarities)


def test_the_pool_grows_by_what_it_admits_only():
    pool = NoveltyPool(["name three rivers in asia"], 0.7)
    assert pool.admit("describe a very large old oak") is None
    assert pool.admit("describe a very large old elm") == Rejection.SIMILAR  # 5 of 6 words
    assert pool.admit("draw a quite large young elm") is None  # like the refused one only
    assert pool.admit("describe a very large old oak") == Rejection.SIMILAR


def test_texts_without_words_are_similar_to_nothing():
    pool = NoveltyPool(["\u4f60\u597d", ""], 0.7)
    assert pool.admit("\u4f60\u597d") is None
    assert pool.admit("?!") is None


def test_each_word_has_a_character_of_its_own():
    # Far more words than a byte, or the 55,296 characters below the surrogates, leave room for.
    many = [" ".join(f"w{i}" for i in range(start, start + 10)) for start in range(0, 70_000, 10)]
    pool = NoveltyPool(many[:1], 0.0)
    assert [pool.admit(text) for text in many[1:]] == [None] * (len(many) - 1)
    assert all(pool.admit(many[i]) == Rejection.SIMILAR for i in (0, 25, 5600, 6999))
