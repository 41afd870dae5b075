"""What the world is made of: same seed, same world; nothing of the evaluation in what is trained on."""

import collections
import random

import pytest
from etils import epath

from configs.base import get_config
from srlm_jax.data import oasst, trees, world, world_corpus
from srlm_jax.data.trees import SeedRules
from srlm_jax.data.world_corpus import WorldRules
from srlm_jax.errors import BadInput
from srlm_jax.judge.parse import parse_vote
from srlm_jax.storage import jsonl
from srlm_jax.text.chat import PLAIN, encode_document
from srlm_jax.text.tokenizer import WordTokenizer

RULES = WorldRules(
    documents=600, trees=120, replies=(2, 4), held_out=60, corpus_flaw=0.25, corpus_wrong_verdict=0.2, reply_flaw=0.3,
    rank_noise=0.0,
)  # fmt: skip


def changed(**changes):
    return WorldRules(**{**vars(RULES), **changes})


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"held_out": 1}, "held_out is 1: it must be at least 2"),
        ({"corpus_flaw": 1.5}, "corpus_flaw is 1.5: it must be at least 0 and be at most 1"),
        ({"replies": (0, 4)}, r"replies\[0\] is 0: it must be at least 1"),
        ({"replies": (4, 2)}, r"replies is \(4, 2\): the fewest must not be above the most"),
    ],
)
def test_rules_out_of_their_limits_are_refused(changes, problem):
    with pytest.raises(BadInput, match=problem):
        changed(**changes)


@pytest.fixture(scope="module")
def corpus():
    return list(world_corpus.draw_corpus(RULES, 0))


@pytest.fixture(scope="module")
def grown():
    return list(world_corpus.draw_trees(RULES, 0))


def test_one_seed_gives_one_world(corpus, grown):
    assert list(world_corpus.draw_corpus(RULES, 0)) == corpus
    assert list(world_corpus.draw_trees(RULES, 0)) == grown
    assert world_corpus.draw_held_out(RULES, 0, set()) == world_corpus.draw_held_out(RULES, 0, set())


def test_another_seed_gives_another(corpus, grown):
    assert list(world_corpus.draw_corpus(RULES, 1)) != corpus
    assert list(world_corpus.draw_trees(RULES, 1)) != grown
    assert world_corpus.draw_held_out(RULES, 1, set()) != world_corpus.draw_held_out(RULES, 0, set())


def test_a_larger_world_begins_as_the_smaller_does(corpus, grown):
    assert list(world_corpus.draw_corpus(changed(documents=700), 0))[:600] == corpus
    assert list(world_corpus.draw_trees(changed(trees=130), 0))[:120] == grown


def test_no_text_has_an_unknown_word(corpus, grown):
    tokenizer = WordTokenizer(world.vocabulary())
    texts = corpus + [reply["text"] for tree in grown for reply in tree["prompt"]["replies"]]
    texts += [tree["prompt"]["text"] for tree in grown]
    assert [text for text in texts if tokenizer.unknown in tokenizer.encode(text)] == []


@pytest.mark.parametrize("scale", ["tiny", "smoke"])
def test_every_document_fits_the_sequences_of_pretraining(scale):
    config = get_config(scale, 3).to_dict()
    rules = WorldRules(**config["world"] | {"documents": 1_000})
    tokenizer = WordTokenizer(world.vocabulary())
    longest = max(len(encode_document(tokenizer, text)) for text in world_corpus.draw_corpus(rules, config["seed"]))
    assert longest - 1 <= config["pretraining"]["sequence_length"]


def test_the_corpus_holds_every_kind_of_text(corpus):
    reviews = [text for text in corpus if world.RUBRIC.template.split("\n")[0] in text]
    lists = [text for text in corpus if text.startswith("Come up with a series of tasks:")]
    answers = [text for text in corpus if text.startswith(PLAIN.before_prompt) and text not in reviews]
    plain = len(corpus) - len(reviews) - len(lists) - len(answers)
    assert min(len(reviews), len(lists), len(answers), plain) > 20
    assert all(text.count("\n") == 10 and text.endswith("\n10.") for text in lists)


def verdicts(rules):
    """(true marks, score that the review gives) of every review of a corpus."""
    for text in world_corpus.draw_corpus(rules, 0):
        if world.RUBRIC.template.split("\n")[0] not in text:
            continue
        prompt, verdict = text.split(PLAIN.before_response)
        question, answer = prompt.split("\nquestion: ")[1].split("\npoints:")[0].split("\nanswer: ")
        yield world.mark(world.read_instruction(question), answer), parse_vote(verdict, finished=True).score


def test_reviews_are_right_but_for_the_share_that_is_not_to_be():
    assert all(marks.score == score for marks, score in verdicts(changed(corpus_wrong_verdict=0.0)))
    wrong = [marks.score != score for marks, score in verdicts(changed(corpus_wrong_verdict=1.0))]
    # One point turned changes the score, but for an answer that is not relevant: it has none either way.
    assert sum(wrong) > 0.8 * len(wrong)
    assert sum(marks.score != score for marks, score in verdicts(RULES)) < 0.4 * len(wrong)


def test_trees_are_what_the_seed_split_reads(tmp_path, grown):
    path = epath.Path(tmp_path) / "trees.jsonl"
    jsonl.write_documents(path, grown)
    rules = SeedRules(lang="en", min_ranked=2, ift_prompts=60, eft_train_prompts=30, eft_eval_prompts=10)
    split = trees.split_seed(oasst.read_export(path).trees, rules, 0)
    dropped = {name: split.counts.get(name, 0) for name in ("same_prompt", "deleted_prompt", "empty_prompt")}
    assert dropped == dict.fromkeys(dropped, 0)
    assert (split.counts["ift"], split.counts["eft_train"], split.counts["eft_eval"]) == (60, 30, 10)
    # Noiseless annotators: the oracle agrees with every ranking, and IFT has the best answer.
    for prompt in split.eft_train + split.eft_eval:
        scores = [world.oracle_score(prompt.prompt, text) for text in prompt.responses]
        by_rank = [score for _, score in sorted(zip(prompt.ranks, scores, strict=True))]
        assert by_rank == sorted(scores, reverse=True)


def test_trees_have_the_replies_and_ranks_asked_for(grown):
    counts = collections.Counter(len(tree["prompt"]["replies"]) for tree in grown)
    assert set(counts) == {2, 3, 4}
    for tree in grown:
        replies = tree["prompt"]["replies"]
        assert sorted(reply["rank"] for reply in replies) == list(range(len(replies)))
        # Their order gives nothing away.
    assert any(tree["prompt"]["replies"][0]["rank"] != 0 for tree in grown)


def test_noise_makes_annotators_err():
    def inversions(noise):
        wrong = 0
        for tree in world_corpus.draw_trees(changed(rank_noise=noise), 0):
            replies = sorted(tree["prompt"]["replies"], key=lambda reply: reply["rank"])
            scores = [world.oracle_score(tree["prompt"]["text"], reply["text"]) for reply in replies]
            wrong += scores != sorted(scores, reverse=True)
        return wrong

    assert inversions(0.0) == 0 < inversions(0.4) < inversions(4.0)


def test_no_prompt_stands_twice_and_none_is_held_out_and_trained_on(grown):
    prompts = {tree["prompt"]["text"] for tree in grown}
    assert len(prompts) == len(grown)
    held_out = world_corpus.draw_held_out(RULES, 0, prompts)
    texts = {prompt.text for prompt in held_out}
    assert len(texts) == len({prompt.id for prompt in held_out}) == RULES.held_out
    assert not texts & prompts
    assert all(world.read_instruction(text) is not None for text in texts)


def test_what_would_be_held_out_but_is_seen_is_left_out():
    first = world_corpus.draw_held_out(RULES, 0, set())
    seen = {prompt.text for prompt in first[::2]}
    again = world_corpus.draw_held_out(RULES, 0, seen)
    assert not seen & {prompt.text for prompt in again}
    assert [prompt.text for prompt in again][:30] == [prompt.text for prompt in first[1::2]]


def test_prompts_are_drawn_from_all_categories_and_numbers():
    rng = random.Random(0)
    tasks = [world.read_instruction(world_corpus.draw_prompt(rng)) for _ in range(500)]
    assert {task.category for task in tasks} == set(world.CATEGORIES)
    assert {task.count for task in tasks} == {2, 3, 4, 5, 6}
    assert {task.ordered for task in tasks} == {True, False}
