"""What the word-list world is made of: a base corpus to pretrain on, human-ranked message trees, held-out prompts."""

import dataclasses
import random
from collections.abc import Iterator
from typing import Annotated

from srlm_jax import limits
from srlm_jax.data import world
from srlm_jax.errors import BadInput
from srlm_jax.judge.rubric import fill
from srlm_jax.limits import Count, Share, at_least, below
from srlm_jax.records import Prompt
from srlm_jax.text.chat import PLAIN
from srlm_jax.text.self_instruct import creation_prompt


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorldRules:
    """How large the world is, and how good its people are."""

    documents: Count  # of the base corpus
    trees: Count  # prompts with ranked replies
    replies: tuple[Count, Count]  # fewest and most replies to a prompt
    held_out: Annotated[int, at_least(2), below(2**31)]  # prompts for the evaluation; a standard error needs 2
    corpus_flaw: Share  # probability of each flaw in the corpus' answers
    corpus_wrong_verdict: Share  # share of the corpus' reviews whose points are wrong somewhere
    reply_flaw: Share  # probability of each flaw in the annotators' answers
    rank_noise: Annotated[float, at_least(0)]  # standard deviation of an annotator's error, in points

    def __post_init__(self) -> None:
        limits.check(self)
        if self.replies[0] > self.replies[1]:
            raise BadInput(f"replies is {self.replies}: the fewest must not be above the most")


def draw_prompt(rng: random.Random) -> str:
    """An instruction for a random task."""
    return world.draw_instruction(rng, world.draw_task(rng))


def _plain_document(rng: random.Random, rules: WorldRules) -> str:
    """What a judge's walk is made of, and facts: which words belong together, how they are ordered, how one counts."""
    kind = rng.random()
    if kind < 0.3:  # a list said twice: what teaches a model to copy
        items = world.write_answer(rng.sample(sorted(world.CATEGORY_OF), rng.randint(2, 8)))
        return f"{items} . again : {items} ."
    task = world.draw_task(rng)
    order = f" {rng.choice(world.ORDERS)}" if task.ordered else ""
    if kind < 0.6:  # a long walk in which every third item is said again at once
        pool = rng.sample(world.CATEGORIES[task.category], 8) + rng.sample(sorted(world.CATEGORY_OF), 2)
        rng.shuffle(pool)
        answer = world.write_answer([item for item in pool for _ in range(1 if rng.random() < 0.67 else 2)])
        return f"notes on {task.category}{order} : {world.write_walk(task.category, task.ordered, answer)} ."
    if kind < 0.8:  # a list and its walk
        answer = world.draw_answer(rng, task, 2 * rules.corpus_flaw)
        walk = world.write_walk(task.category, task.ordered, answer)
        return f"notes on {task.category}{order} : {answer} . {walk} ."
    return _fact(rng)


def _fact(rng: random.Random) -> str:
    name = rng.choice(sorted(world.CATEGORIES))
    words = world.CATEGORIES[name]
    kind = rng.randrange(4)
    if kind == 0:
        items = rng.sample(words, rng.randint(2, 8))
        return f"some {name} are {world.write_answer(items)} ."
    if kind == 1:
        items = sorted(rng.sample(words, rng.randint(3, 10)))
        return f"{name} in alphabetical order : {world.write_answer(items)} ."
    if kind == 2:
        first, second = sorted(rng.sample(words, 2))
        return (
            f"the {name} {first} comes before {second} ." if rng.random() < 0.5 else f"{second} comes after {first} ."
        )
    count = rng.randint(1, len(world.NUMBERS))
    items = rng.sample(words, count)
    numbered = " ".join(f"{world.NUMBERS[i]} {item}" for i, item in enumerate(items))
    return f"{numbered} . total {world.NUMBERS[count - 1]} {name} ."


def _turns(prompt: str, response: str) -> str:
    return f"{PLAIN.before_prompt}{prompt}{PLAIN.before_response}{PLAIN.begin_response}{response}"


def _answer_document(rng: random.Random, rules: WorldRules) -> str:
    task = world.draw_task(rng)
    return _turns(world.draw_instruction(rng, task), world.draw_answer(rng, task, rules.corpus_flaw))


def _review_document(rng: random.Random, rules: WorldRules) -> str:
    task = world.draw_task(rng)
    instruction = world.draw_instruction(rng, task)
    answer = world.draw_answer(rng, task, rng.choice((rules.corpus_flaw, 2 * rules.corpus_flaw)))
    marks = world.mark(task, answer)
    if rng.random() < rules.corpus_wrong_verdict:
        point = rng.choice([field.name for field in dataclasses.fields(marks)])
        marks = dataclasses.replace(marks, **{point: not getattr(marks, point)})
    return _turns(fill(world.RUBRIC, instruction, answer), world.write_verdict(task, answer, marks))


def _task_list_document(rng: random.Random) -> str:
    prompts = [draw_prompt(rng) for _ in range(9)]
    return f"{creation_prompt(prompts[:8])} {prompts[8]}\n10."


def draw_corpus(rules: WorldRules, seed: int) -> Iterator[str]:
    """The base corpus: facts, question-answer documents of mixed quality, reviews, task lists."""
    for i in range(rules.documents):
        rng = random.Random(f"{seed}/corpus/{i}")
        kind = rng.random()
        if kind < 0.5:
            yield _plain_document(rng, rules)
        elif kind < 0.63:
            yield _answer_document(rng, rules)
        elif kind < 0.96:
            yield _review_document(rng, rules)
        else:
            yield _task_list_document(rng)


def draw_trees(rules: WorldRules, seed: int) -> Iterator[dict]:
    """Message trees in Open Assistant's form, no prompt twice; replies ranked by noisy readers of the true score."""
    taken: set[str] = set()
    for i in range(rules.trees):
        rng = random.Random(f"{seed}/tree/{i}")
        prompt = draw_prompt(rng)
        while prompt in taken:
            prompt = draw_prompt(rng)
        taken.add(prompt)
        task = world.read_instruction(prompt)
        answers = [world.draw_answer(rng, task, rules.reply_flaw) for _ in range(rng.randint(*rules.replies))]
        seen_quality = [world.mark(task, answer).score + rng.gauss(0, rules.rank_noise) for answer in answers]
        best_first = sorted(range(len(answers)), key=lambda j: -seen_quality[j])
        replies = [
            _message(f"tree-{i:05}-{j}", answer, "assistant", rank=best_first.index(j), replies=[])
            for j, answer in enumerate(answers)
        ]
        yield {
            "message_tree_id": f"tree-{i:05}",
            "tree_state": "ready_for_export",
            "prompt": _message(f"tree-{i:05}", prompt, "prompter", rank=None, replies=replies),
        }


def _message(message_id: str, text: str, role: str, *, rank: int | None, replies: list[dict]) -> dict:
    message = {"message_id": message_id, "text": text, "role": role, "lang": "en", "deleted": False}
    return message | ({} if rank is None else {"rank": rank}) | {"replies": replies}


def draw_held_out(rules: WorldRules, seed: int, seen: set[str]) -> list[Prompt]:
    """Prompts for the evaluation, none of which is in `seen`."""
    rng = random.Random(f"{seed}/held-out")
    prompts: dict[str, None] = {}
    while len(prompts) < rules.held_out:
        prompt = draw_prompt(rng)
        if prompt not in seen:
            prompts[prompt] = None
    return [Prompt(id=f"held-out-{i:05}", text=text, origin="seed") for i, text in enumerate(prompts)]
