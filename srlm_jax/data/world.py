"""The word-list world: a task small enough to learn on two cores and exact enough that quality is measured.

An instruction asks for a number of words of a category, sometimes in alphabetical order; an answer is a list. The
rubric is an exact function, the *oracle*, with five additive points as the paper's has (section 2.1). The oracle plays
the human annotators (with noise) when the world is made; from M0 on only the evaluation may call it.
"""

import dataclasses
import random
import re

from srlm_jax.judge.rubric import Rubric

CATEGORIES: dict[str, tuple[str, ...]] = {
    name: tuple(sorted(words.split()))
    for name, words in {
        "fruits": "apple banana cherry fig grape kiwi lemon mango orange peach pear plum",
        "animals": "bear cat dog fox goat horse lion mouse rabbit sheep tiger wolf",
        "cities": "berlin cairo delhi lima london madrid oslo paris rome seoul tokyo vienna",
        "colors": "black blue brown gold green grey pink purple red silver white yellow",
        "drinks": "ale cider cocoa coffee juice milk punch rum soda tea water wine",
        "tools": "axe chisel clamp drill hammer knife pliers rake saw shovel spade wrench",
        "birds": "crow dove duck eagle goose hawk heron owl parrot robin swan wren",
        "metals": "brass bronze chrome cobalt copper iron lead nickel steel tin titanium zinc",
        "sports": "archery boxing chess cricket fencing golf hockey judo rowing rugby skiing tennis",
        "clothes": "belt boots cap coat dress gloves hat jacket scarf shirt shoes socks",
        "trees": "ash birch cedar elm fir maple oak palm pine poplar spruce willow",
        "jobs": "actor baker chef doctor farmer judge lawyer nurse pilot sailor teacher waiter",
    }.items()
}
CATEGORY_OF = {word: name for name, words in CATEGORIES.items() for word in words}
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight")

OPENERS = (
    "", "please", "can you help me :", "for my class ,", "hello ,", "a quick question :", "we play a game ,",
    "my friend asks :", "when you have time ,", "i am writing a story ,", "today i learn english ,", "dear assistant ,",
    "at the party ,", "here is a task :",
)  # fmt: skip
VERBS = ("list", "name", "give me", "tell me", "write down", "think of", "show us", "find")
SIZES = ("", "common", "good", "nice", "different")
ORDERS = ("in alphabetical order", "sorted from a to z", "by first letter of the alphabet")
NO_ORDERS = ("", "", "in any order", "as you like", "that you know")
CLOSERS = (
    "", "thanks", "for my notes", "for a quiz", "to teach my sister", "so i can remember them", "and nothing else",
    "for the school wall", "before dinner", "it is for work", "side by side", "as fast as possible",
)  # fmt: skip
ET_CETERA = "etc"  # how a lazy writer ends a list: an item on no topic
_ORDER_WORDS = {"alphabetical", "sorted", "alphabet"}


@dataclasses.dataclass(frozen=True)
class Task:
    """What an instruction asks for."""

    category: str
    count: int
    ordered: bool


RUBRIC = Rubric(
    template=(
        "review this answer and add its points .\nquestion: <INSTRUCTION_HERE>\nanswer: <RESPONSE_HERE>\npoints:"
    ),
    stop=tuple(f"Score: {points}" for points in range(6)),
)


def vocabulary() -> tuple[str, ...]:
    """Every word of the world, in a fixed order."""
    texts = [*OPENERS, *VERBS, *SIZES, *ORDERS, *NO_ORDERS, *CLOSERS, *NUMBERS, *CATEGORIES, *CATEGORY_OF, ET_CETERA]
    texts += [re.sub("<.*?>", "", RUBRIC.template), "user: assistant: someone \n . , :"]
    texts += [
        "on off again on-down off-down again-down total relevant topic count distinct order yes no Score: 0 1 2 3 4 5",
        "Come up with a series of tasks:",
    ]
    texts += [" ".join(f"{i}." for i in range(1, 13)), "are comes before after some again notes on"]
    return tuple(dict.fromkeys(word for text in texts for word in text.replace("\n", " \n ").split(" ") if word))


def draw_task(rng: random.Random) -> Task:
    """A task, uniformly: any category, two to six words, in order half the time."""
    return Task(rng.choice(sorted(CATEGORIES)), rng.randint(2, 6), rng.random() < 0.5)


def draw_instruction(rng: random.Random, task: Task) -> str:
    """One of the many phrasings of a task."""
    order = rng.choice(ORDERS if task.ordered else NO_ORDERS)
    parts = [rng.choice(OPENERS), rng.choice(VERBS), NUMBERS[task.count - 1], rng.choice(SIZES), task.category]
    return " ".join(part for part in [*parts, order, rng.choice(CLOSERS), "."] if part)


def read_instruction(text: str) -> Task | None:
    """The task that a text asks for; None where it does not ask for exactly one number of one category."""
    words = text.split()
    categories = [word for word in words if word in CATEGORIES]
    counts = [NUMBERS.index(word) + 1 for word in words if word in NUMBERS]
    if len(categories) != 1 or len(counts) != 1 or counts[0] < 2:
        return None
    return Task(categories[0], counts[0], bool(_ORDER_WORDS & set(words)))


def write_answer(items: list[str]) -> str:
    """apple pear plum"""
    return " ".join(items)


def read_answer(text: str) -> list[str]:
    """The items of an answer: its words, whatever they are."""
    return text.split()


def draw_answer(rng: random.Random, task: Task, flaw: float) -> str:
    """An answer to a task, with the flaws of hasty writers, each with a probability in proportion to `flaw`.

    They are habits, not accidents: one item too many or too few, no heed to the order, "etc" for the last item, a word
    said twice. A model can pick up a habit from its corpus, show it in its samples and be trained out of it; a word
    drawn by accident it would hardly ever sample.
    """
    count = task.count
    if rng.random() < flaw:
        count += rng.choice((1, 1, -1))  # top-p hides most of a weak inclination to go on, none of one to stop early
    topic = CATEGORIES[task.category]
    if rng.random() < flaw / 4:  # an answer to another question
        topic = CATEGORIES[rng.choice([name for name in sorted(CATEGORIES) if name != task.category])]
    items = rng.sample(topic, count)
    if rng.random() < flaw / 4:
        items[rng.randrange(count)] = rng.choice(sorted(CATEGORY_OF))
    if count > 1 and rng.random() < flaw / 4:
        again = rng.randrange(1, count)
        items[again] = items[again - 1]
    if task.ordered and rng.random() >= flaw:
        items.sort()
    if count > 1 and rng.random() < flaw:
        items[-1] = ET_CETERA
    return write_answer(items)


@dataclasses.dataclass(frozen=True)
class Marks:
    """The five points of the rubric for one answer."""

    relevant: bool
    topic: bool
    count: bool
    distinct: bool
    order: bool

    @property
    def score(self) -> int:
        """Additive, as the paper's; an answer that is not relevant earns nothing."""
        return sum(dataclasses.astuple(self)) if self.relevant else 0


def mark(task: Task, answer: str) -> Marks:
    """The oracle, point by point."""
    items = read_answer(answer)
    on_topic = [item in CATEGORIES[task.category] for item in items]
    return Marks(
        relevant=any(on_topic),
        topic=all(on_topic),
        count=len(items) == task.count,
        distinct=len(set(items)) == len(items),
        order=not task.ordered or items == sorted(items),
    )


def oracle_score(instruction: str, answer: str) -> int | None:
    """The exact score, 0 to 5; None where the instruction asks for nothing that can be scored."""
    task = read_instruction(instruction)
    return None if task is None else mark(task, answer).score


def write_walk(category: str, ordered: bool, answer: str) -> str:
    """The items of an answer, each with one word on it: on or off the topic, or there again; and "down" where an order
    was asked for and the item comes before its predecessor.

    One word after each item, and nothing between the items of an answer, is what lets a small model learn to copy them:
    with commas, or with a second note, that takes twice the training.

        apple on dog off apple again-down
    """
    walk, seen, previous = [], set(), ""
    for item in read_answer(answer):
        note = "again" if item in seen else "on" if item in CATEGORIES[category] else "off"
        walk.append(f"{item} {note}-down" if ordered and item < previous else f"{item} {note}")
        seen.add(item)
        previous = item
    return " ".join(walk)


def write_verdict(task: Task, answer: str, marks: Marks) -> str:
    """A judgement as this world writes it: a walk through the items, the five points, the score.

    The walk is what makes the score learnable: each item is compared with the category and with what came before it,
    so the points at the end only read off what is already written.

        apple on dog off apple again-down . relevant yes topic no count yes distinct no order no Score: 2
    """
    walk = write_walk(task.category, task.ordered, answer)
    points = " ".join(f"{name} {'yes' if earned else 'no'}" for name, earned in dataclasses.asdict(marks).items())
    return f"{walk} . {points} Score: {marks.score}"
