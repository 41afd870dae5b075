import dataclasses

import pytest

from srlm_jax.data.oasst import read_export
from srlm_jax.data.trees import SeedRules, split_seed
from srlm_jax.records import Example, RankedPrompt

RULES = SeedRules(lang="en", min_ranked=2, ift_prompts=0, eft_train_prompts=0, eft_eval_prompts=0)


def reply(name, rank, **change):
    message = {"message_id": name, "text": f"text {name}", "role": "assistant", "lang": "en", "deleted": False}
    return message | ({} if rank is None else {"rank": rank}) | {"replies": []} | change


def tree(name, *replies, **change):
    message = {"message_id": name, "text": f"question {name}", "role": "prompter", "lang": "en", "deleted": False}
    return {"message_tree_id": name, "prompt": message | {"replies": list(replies)} | change}


def ranked_trees(n):
    return [tree(f"t{i}", reply(f"t{i}a", 0), reply(f"t{i}b", 1), reply(f"t{i}c", 2)) for i in range(n)]


def split(trees, seed=0, **change):
    return split_seed(trees, dataclasses.replace(RULES, **change), seed)


def ids(examples):
    return [example.id for example in examples]


def test_the_three_sides_share_no_prompt():
    result = split(ranked_trees(30), ift_prompts=12, eft_train_prompts=10, eft_eval_prompts=6)
    assert (len(result.ift), len(result.eft_train), len(result.eft_eval)) == (12, 10, 6)
    assert len({*ids(result.ift), *ids(result.eft_train), *ids(result.eft_eval)}) == 28
    assert result.counts == {"trees": 30, "ift": 12, "eft_train": 10, "eft_eval": 6, "unused": 2}


def test_the_split_depends_on_the_seed_and_not_on_the_order():
    trees = ranked_trees(30)
    counts = {"ift_prompts": 12, "eft_train_prompts": 10, "eft_eval_prompts": 6}
    assert split(trees, **counts) == split(trees[::-1], **counts)
    assert set(ids(split(trees, **counts).eft_eval)) != set(ids(split(trees, seed=1, **counts).eft_eval))


def test_other_counts_leave_the_evaluation_prompts_as_they_are():
    few = split(ranked_trees(30), ift_prompts=2, eft_train_prompts=3, eft_eval_prompts=6)
    many = split(ranked_trees(30), ift_prompts=10, eft_train_prompts=14, eft_eval_prompts=6)
    assert few.eft_eval == many.eft_eval


def test_ift_takes_the_answer_of_rank_0():
    result = split([tree("t", reply("worse", 1), reply("best", 0), reply("unranked", None))], ift_prompts=1)
    assert result.ift == [Example(id="t", prompt="question t", response="text best", finished=True)]
    assert result.counts["unranked_reply"] == 1


def test_a_deleted_best_answer_gives_no_ift_example_and_ranks_close_up():
    trees = [tree("t", reply("a", 0, deleted=True), reply("b", 3), reply("c", 1), reply("d", None))]
    with pytest.raises(ValueError, match=r"ift_prompts asks for 1 prompts, .* 0 in 'en' .* lower ift_prompts"):
        split(trees, ift_prompts=1)
    result = split(trees, eft_train_prompts=1)
    (ranked,) = result.eft_train
    assert isinstance(ranked, RankedPrompt)
    assert dict(zip(ranked.responses, ranked.ranks, strict=True)) == {"text c": 0, "text b": 1}
    assert (result.counts["deleted_reply"], result.counts["unranked_reply"]) == (1, 1)


@pytest.mark.parametrize(("mark", "name"), [({"synthetic": True}, "synthetic"), ({"review_result": False}, "rejected")])
def test_a_withdrawn_answer_is_neither_the_best_nor_ranked(mark, name):
    trees = [tree("t", reply("a", 0, **mark), reply("b", 3), reply("c", 1)), tree("u", reply("d", 0), synthetic=True)]
    result = split(trees, ift_prompts=1, eft_train_prompts=1)
    assert ids(result.ift) == ["u"]
    (ranked,) = result.eft_train
    assert sorted(ranked.responses) == ["text b", "text c"]
    assert result.counts[f"{name}_reply"] == 1


def test_the_place_of_a_response_says_nothing_of_its_rank():
    result = split(ranked_trees(60), eft_train_prompts=60)
    first = [ranked.ranks[0] for ranked in result.eft_train]
    assert set(first) == {0, 1, 2}
    assert all(sorted(ranked.ranks) == [0, 1, 2] for ranked in result.eft_train)
    for ranked in result.eft_train:
        assert ranked.responses[ranked.ranks.index(0)] == f"text {ranked.id}a"


def test_a_tree_with_two_replies_of_one_rank_has_no_ranking():
    trees = [tree("t", reply("a", 0), reply("b", 1), reply("c", 1))]
    with pytest.raises(ValueError, match="0 in 'en' have at least 2 ranked replies"):
        split(trees, eft_train_prompts=1)
    assert ids(split(trees, ift_prompts=1).ift) == ["t"]


def test_the_same_reply_twice_is_one_reply_with_the_better_rank():
    result = split([tree("t", reply("a", 0), reply("b", 1), reply("c", 2, text="text a"))], eft_eval_prompts=1)
    (ranked,) = result.eft_eval
    assert dict(zip(ranked.responses, ranked.ranks, strict=True)) == {"text a": 0, "text b": 1}
    assert result.counts["same_reply"] == 1


def test_what_is_dropped_is_counted():
    two = (reply("a", 0), reply("b", 1))
    trees = [
        tree("1", *two),
        tree("2", *two, text="Question  1 "),  # the same question but for case and white space
        tree("3", *two, lang="de"),
        tree("4", *two, deleted=True),
        tree("5", *two, text=" \n"),
        tree("6", reply("a", None)),
        tree("7", reply("a", 0), reply("b", 1, lang="fr"), reply("c", 1, text=" ")),
        tree("8", *two, review_result=False),
    ]
    result = split(trees, ift_prompts=1, eft_train_prompts=1)
    assert result.counts == {
        "trees": 8,
        "ift": 1,
        "eft_train": 1,
        "eft_eval": 0,
        "unused": 0,
        "same_prompt": 1,
        "other_language": 1,
        "deleted_prompt": 1,
        "rejected_prompt": 1,
        "empty_prompt": 1,
        "no_usable_ranking": 1,
        "unranked_reply": 1,
        "other_language_reply": 1,
        "empty_reply": 1,
    }
    assert ids(result.ift) == ["7"]


def test_one_question_never_lands_on_two_sides():
    # 15 questions, each asked by two trees: 15 sides at most, however they are shared out.
    trees = ranked_trees(30)
    for index, one in enumerate(trees):
        one["prompt"]["text"] = f"Question {index % 15}"
    for seed in range(5):
        result = split(trees, seed=seed, ift_prompts=5, eft_train_prompts=5, eft_eval_prompts=5)
        texts = [example.prompt for example in result.ift + result.eft_train + result.eft_eval]
        assert len(set(texts)) == 15
        assert result.counts["same_prompt"] == 15


def test_too_few_trees_say_how_many_and_what_to_lower():
    with pytest.raises(ValueError, match=r"ask for 40 prompts, and of 30 trees 30 .* lower eft_train_prompts"):
        split(ranked_trees(30), eft_train_prompts=30, eft_eval_prompts=10)
    with pytest.raises(ValueError, match=r"ask for 3 prompts, and of 30 trees 0 .* at least 4 ranked"):
        split(ranked_trees(30), eft_train_prompts=3, min_ranked=4)
    with pytest.raises(ValueError, match=r"ift_prompts asks for 3200 prompts, and of 30 trees 20 .* 10 for EFT"):
        split(ranked_trees(30), ift_prompts=3200, eft_train_prompts=10)


def test_an_id_that_occurs_twice_is_refused():
    with pytest.raises(ValueError, match="'t0' occurs 2 times"):
        split(ranked_trees(1) * 2)


@pytest.mark.parametrize(("field", "value"), [("min_ranked", 1), ("ift_prompts", -1), ("eft_eval_prompts", -1)])
def test_rules_that_make_no_sense(field, value):
    with pytest.raises(ValueError, match=field):
        dataclasses.replace(RULES, **{field: value})


def test_real_open_assistant_trees(shared_data):
    trees = read_export(shared_data("oasst/en_100_tree.jsonl")).trees
    assert len(trees) == 100
    result = split(trees, ift_prompts=50, eft_train_prompts=30, eft_eval_prompts=12)
    assert result.counts == {
        "trees": 100,
        "ift": 50,
        "eft_train": 30,
        "eft_eval": 12,
        "unused": 2,
        "no_usable_ranking": 6,
        "unranked_reply": 3,
        "synthetic_reply": 17,  # all the replies of five trees
    }
    by_id = {one["message_tree_id"]: one["prompt"] for one in trees}
    for example in result.ift:
        (best,) = [r["text"] for r in by_id[example.id]["replies"] if r.get("rank") == 0]
        assert (example.prompt, example.response) == (by_id[example.id]["text"], best)
    for ranked in result.eft_train + result.eft_eval:
        truth = {r["text"]: r["rank"] for r in by_id[ranked.id]["replies"] if "rank" in r}
        assert dict(zip(ranked.responses, ranked.ranks, strict=True)) == truth
