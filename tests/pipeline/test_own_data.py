"""Runs on data of the user's own: where the seed comes from, what the ledger sees of it, and fixed prompts."""

import json

import pytest

from configs.base import get_config
from srlm_jax import judging_examples
from srlm_jax.pipeline import answering, checks, seeding
from srlm_jax.pipeline.ledger import EmptyStage, Outcome, StaleStage
from srlm_jax.pipeline.run import make_run
from srlm_jax.pipeline.settings import BadConfig, read
from srlm_jax.records import Example, Prompt, RankedPrompt
from srlm_jax.storage import jsonl


def settings(workdir, prompts_file=None, rules=None, rubric=None, models=2, **seed_data):
    tree = get_config("smoke", models).to_dict() | {"workdir": str(workdir)}
    tree["seed_data"] |= {name: str(path) for name, path in seed_data.items()}
    tree["seed_data"]["rules"] |= rules or {}
    tree["self_instruction"]["prompts_file"] = None if prompts_file is None else str(prompts_file)
    tree["judging"]["rubric"] = None if rubric is None else str(rubric)
    return read(tree)


def open_run(workdir, **changes):
    return make_run(settings(workdir, **changes), "test")


def write(path, documents):
    path.write_text("".join(json.dumps(document) + "\n" for document in documents))
    return path


def messages(n):
    """Flat messages of `n` trees, each a prompt and two ranked answers."""
    for i in range(n):
        yield {"message_id": f"q{i}", "text": f"question {i}", "role": "prompter", "lang": "en"}
        for rank in range(2):
            answer = {"message_id": f"a{i}{rank}", "text": f"answer {rank}", "role": "assistant", "rank": rank}
            yield answer | {"parent_id": f"q{i}"}


def ranked(*prompts):
    return [{"prompt": prompt, "responses": ["a", "b"], "ranks": [0, 1]} for prompt in prompts]


@pytest.fixture
def own(tmp_path):
    """Three files; a prompt of the evaluation is in each of the training sets."""
    return {
        "ift": write(tmp_path / "ift", [{"prompt": f"ask {i}", "response": "r"} for i in range(12)]),
        "eft_train": write(tmp_path / "train", ranked("Ask  0", "train")),
        "eft_eval": write(tmp_path / "eval", ranked("ask 0", "eval")),
    }


RULES = {"ift_prompts": 10, "eft_train_prompts": 6, "eft_eval_prompts": 4}


def test_an_open_assistant_export_gives_the_seed(tmp_path):
    run = open_run(tmp_path / "run", trees=write(tmp_path / "x", messages(20)), rules=RULES)
    seeding.split_seed(run)
    counts = run.ledger.entry("seed")["counts"]
    assert {name: counts[name] for name in ("messages", "roots", "ift", "eft_train", "eft_eval")} == {
        "messages": 60, "roots": 20, "ift": 10, "eft_train": 6, "eft_eval": 4,
    }  # fmt: skip
    (first, *_) = jsonl.read(run.workdir / "seed" / "ift.jsonl", Example)
    assert first.prompt.startswith("question ") and first.response == "answer 0"


def test_three_files_give_the_seed_without_overlap(tmp_path, own):
    run = open_run(tmp_path / "run", **own)
    seeding.split_seed(run)
    assert len(jsonl.read(run.workdir / "seed" / "ift.jsonl", Example)) == 11
    assert [p.prompt for p in jsonl.read(run.workdir / "seed" / "eft_train.jsonl", RankedPrompt)] == ["train"]
    assert [p.prompt for p in jsonl.read(run.workdir / "seed" / "eft_eval.jsonl", RankedPrompt)] == ["ask 0", "eval"]
    assert run.ledger.entry("seed")["counts"]["ift_in_eft_eval"] == 1


def test_rows_that_are_dropped_are_counted_by_file_and_reason(tmp_path, own):
    with own["ift"].open("a") as file:
        file.write('{"prompt": "more", "response": ""}\n')
    with own["eft_eval"].open("a") as file:
        file.write('{"prompt": "more", "responses": ["a", "b"], "ranks": [0.0, 0.0]}\n')
    run = open_run(tmp_path / "run", **own)
    seeding.split_seed(run)
    counts = run.ledger.entry("seed")["counts"]
    assert {name: counts[name] for name in ("ift", "ift_blank_response", "eft_eval", "eft_eval_unordered")} == {
        "ift": 11, "ift_blank_response": 1, "eft_eval": 2, "eft_eval_unordered": 1,
    }  # fmt: skip


def test_a_source_may_map_its_columns(tmp_path, own):
    write(own["ift"], [{"question": f"ask {i}", "answer": "r", "prompt": "other"} for i in range(12)])
    mapped = own | {"ift": f"{own['ift']}?prompt=question&response=answer"}
    seeding.split_seed(open_run(tmp_path / "run", **mapped))
    assert jsonl.read(tmp_path / "run" / "seed" / "ift.jsonl", Example)[0].prompt == "ask 1"
    with pytest.raises(StaleStage, match=r"config\.seed_data\.ift was .*prompt=question"):
        seeding.split_seed(open_run(tmp_path / "run", **own))


def test_a_file_that_changed_under_its_name_makes_the_seed_stale(tmp_path, own):
    seeding.split_seed(open_run(tmp_path / "run", **own))
    seeding.split_seed(open_run(tmp_path / "run", **own))
    with own["eft_train"].open("a") as file:
        file.write(json.dumps(ranked("another")[0]) + "\n")
    with pytest.raises(StaleStage, match=r"config\.seed_data\.eft_train \(content\) was .* --redo=seed"):
        seeding.split_seed(open_run(tmp_path / "run", **own))


def test_the_world_does_not_touch_a_seed_of_ones_own(tmp_path, own):
    run = open_run(tmp_path / "run", **own)
    run.ledger.run("world", lambda: Outcome({}, None), config={}, inputs=(), outputs=())
    seeding.split_seed(run)
    assert run.ledger.redo("world") == ["world"]


@pytest.mark.parametrize("name", ["ift", "eft_train", "eft_eval"])
def test_a_source_that_cannot_be_read_is_named_with_its_field(tmp_path, own, name):
    own[name].write_text('{"prompt": 3}\n')
    with pytest.raises(BadConfig, match=rf"^config\.seed_data\.{name}: .*/{own[name].name}:1: "):
        seeding.split_seed(open_run(tmp_path / "run", **own))
    own[name].unlink()
    with pytest.raises(BadConfig, match=rf"^config\.seed_data\.{name}: .*No such file"):
        seeding.split_seed(open_run(tmp_path / "run", **own))


def test_trees_that_cannot_be_used_are_named_with_their_field(tmp_path):
    trees = write(tmp_path / "x", messages(1))
    trees.write_text(trees.read_text().splitlines()[0] + "\n{")
    with pytest.raises(BadConfig, match=r"^config\.seed_data\.trees: .*:2: not valid JSON"):
        seeding.split_seed(open_run(tmp_path / "run", trees=trees))
    # The first stage made nothing, so the corrected file needs no redo.
    with pytest.raises(BadConfig, match=r"^config\.seed_data\.rules: eft_eval_prompts .* of 3 trees 3"):
        seeding.split_seed(open_run(tmp_path / "run", trees=write(tmp_path / "x", messages(3))))


def test_sources_that_do_not_go_together_are_refused(tmp_path):
    with pytest.raises(BadConfig, match=r"^config\.seed_data\.eft_train is not given, and config\.seed_data\.ift is"):
        settings(tmp_path, ift="x")
    with pytest.raises(BadConfig, match=r"^config\.seed_data\.trees and config\.seed_data\.ift are both given"):
        settings(tmp_path, trees="x", ift="x", eft_train="x", eft_eval="x")


def test_self_instruction_needs_enough_prompts_to_show(tmp_path, own):
    with pytest.raises(BadConfig, match=r"^config\.seed_data\.rules\.ift_prompts is 7: self-instruction shows 8"):
        settings(tmp_path, rules={"ift_prompts": 7})
    write(own["ift"], [{"prompt": f"ask {i}", "response": "r"} for i in range(8)])
    with pytest.raises(BadConfig, match=r"^config\.seed_data\.ift: .* 7: self-instruction shows 8"):
        seeding.split_seed(open_run(tmp_path / "run", **own))
    fixed = write(tmp_path / "prompts", [{"prompt": "ask"}])
    seeding.split_seed(open_run(tmp_path / "run", **own, prompts_file=fixed))
    settings(tmp_path, rules={"ift_prompts": 7}, prompts_file=fixed)
    settings(tmp_path, rules={"ift_prompts": 7}, models=1)  # which has no round, and shows none


def take(tmp_path, own, *prompts):
    path = write(tmp_path / "prompts", [{"prompt": prompt} for prompt in prompts])
    run = open_run(tmp_path / "run", **own, prompts_file=path)
    seeding.split_seed(run)
    answering.create_prompts(run, "m2", "m1")  # there is no m1: no model is asked
    return run


def test_fixed_prompts_replace_self_instruction(tmp_path, own):
    asked = ("name two fruits .", "ASK 0", "name  two fruits .", "apple " * 40, "list one city .", "")
    run = take(tmp_path, own, *asked)
    assert jsonl.read(run.workdir / "m2" / "prompts", Prompt) == [
        Prompt(id="prompt-000001", text="name two fruits .", origin="user"),
        Prompt(id="prompt-000005", text="list one city .", origin="user"),
    ]
    counts = run.ledger.entry("m2/prompts")["counts"]
    assert counts == {"kept": 2, "in_eft_eval": 1, "same_prompt": 1, "too_many_tokens": 1, "blank_prompt": 1}


def test_fixed_prompts_that_change_make_the_round_stale(tmp_path, own):
    take(tmp_path, own, "name two fruits .")
    take(tmp_path, own, "name two fruits .")
    with pytest.raises(StaleStage, match=r"config\.self_instruction\.prompts_file \(content\) was"):
        take(tmp_path, own, "name three fruits .")


def test_fixed_prompts_that_cannot_be_used_are_refused(tmp_path, own):
    with pytest.raises(EmptyStage, match=r"^m2/prompts: none of the 1 prompts .*prompts_file .*'in_eft_eval': 1"):
        take(tmp_path, own, "ask 0")
    with pytest.raises(BadConfig, match=r"^config\.self_instruction\.prompts_file: .*1 of 1 rows .* blank_prompt 1"):
        take(tmp_path, own, " ")


def test_fixed_prompts_need_no_room_for_demonstrations(tmp_path):
    tree = get_config("smoke", 2).to_dict() | {"workdir": str(tmp_path)}
    tree["self_instruction"] |= {"from_seeds": 20}

    def check():
        run = make_run(read(tree), "test")
        checks.check_lengths(run)

    with pytest.raises(BadConfig, match="the prompt for new instructions cannot be held"):
        check()
    tree["self_instruction"]["prompts_file"] = "prompts"
    check()


# --- judging examples of one's own ------------------------------------------------------------------------------------


def judging_rows(*prompts):
    return [{"prompt": prompt, "response": "apple", "judgement": "yes Score: 4"} for prompt in prompts]


def take_eft(workdir, **sources):
    run = open_run(workdir, **sources)
    seeding.split_seed(run)
    seeding.take_eft(run)
    return run


def test_judging_examples_take_the_place_of_the_baselines_judgements(tmp_path, own):
    del own["eft_train"]
    own["eft"] = write(tmp_path / "eft", judging_rows("train", "ASK 0", "more"))
    run = take_eft(tmp_path / "run", **own)
    assert jsonl.read(run.workdir / "seed" / "eft_train.jsonl", RankedPrompt) == []
    made = jsonl.read(run.workdir / "eft" / "examples", Example)
    assert [(e.id, e.response) for e in made] == [("eft-000001", "yes Score: 4"), ("eft-000003", "yes Score: 4")]
    assert made[0].prompt == run.rubric.template.replace("<INSTRUCTION_HERE>", "train").replace(
        "<RESPONSE_HERE>", "apple"
    )
    assert run.ledger.entry("eft/examples")["counts"] == {"rows": 3, "in_eft_eval": 1, "duplicate": 0, "examples": 2}
    write(own["eft"], judging_rows("other"))
    with pytest.raises(StaleStage, match=r"config\.seed_data\.eft \(content\) was .* --redo=eft/examples"):
        take_eft(tmp_path / "run", **own)


def test_judging_examples_beside_trees(tmp_path):
    trees, eft = write(tmp_path / "trees", messages(20)), write(tmp_path / "eft", judging_rows("train"))
    run = take_eft(tmp_path / "run", trees=trees, eft=eft, rules=RULES)
    counts = run.ledger.entry("seed")["counts"]
    assert {name: counts[name] for name in ("ift", "eft_train", "eft_eval")} == {
        "ift": 10,
        "eft_train": 0,
        "eft_eval": 4,
    }
    assert len(jsonl.read(run.workdir / "eft" / "examples", Example)) == 1


def test_judging_examples_made_from_ranks_are_accepted(tmp_path):
    trees = write(tmp_path / "trees", messages(20))
    judging_examples.write_examples(tmp_path / "eft", ranked=None, trees=trees, lang="en", template=None)
    run = take_eft(tmp_path / "run", trees=trees, eft=tmp_path / "eft", rules=RULES)
    counts = run.ledger.entry("eft/examples")["counts"]
    assert counts == {"rows": 40, "in_eft_eval": 8, "duplicate": 0, "examples": 32}


def test_judging_examples_hold_the_rubric_so_that_its_content_counts_and_not_its_name(tmp_path):
    sources = {"trees": write(tmp_path / "trees", messages(20)), "rules": RULES}
    sources["eft"] = write(tmp_path / "eft", judging_rows("train"))
    rubric, moved = tmp_path / "rubric", tmp_path / "moved"
    rubric.write_text("<INSTRUCTION_HERE> <RESPONSE_HERE> Score:")
    take_eft(tmp_path / "run", rubric=rubric, **sources)
    moved.write_text(rubric.read_text())
    take_eft(tmp_path / "run", rubric=moved, **sources)
    moved.write_text("<RESPONSE_HERE> <INSTRUCTION_HERE> Score:")
    with pytest.raises(StaleStage, match=r"config\.judging\.rubric \(content\) was"):
        take_eft(tmp_path / "run", rubric=moved, **sources)


def test_judging_examples_from_the_ranks_of_the_training_prompts(tmp_path):
    trees = write(tmp_path / "trees", messages(20))
    run = take_eft(tmp_path / "run", trees=trees, eft="ranks", rules=RULES)
    assert run.ledger.entry("seed")["counts"]["eft_train"] == RULES["eft_train_prompts"]
    made = jsonl.read(run.workdir / "eft" / "examples", Example)
    assert len(made) == 2 * RULES["eft_train_prompts"]
    assert {example.response for example in made} == {"Score: 5", "Score: 1"}


def test_the_seed_stays_where_its_split_does(tmp_path):
    """Examples from ranks may be asked for when the baseline's own judgements have failed, hours after the seed."""
    sources = {"trees": write(tmp_path / "trees", messages(20)), "rules": RULES}
    seeding.split_seed(open_run(tmp_path / "run", **sources))
    take_eft(tmp_path / "run", eft="ranks", **sources)
    with pytest.raises(
        StaleStage, match=r"stage seed made otherwise: config\.seed_data\.rules\.eft_train_prompts was 6"
    ):
        take_eft(tmp_path / "run", eft=write(tmp_path / "eft", judging_rows("train")), **sources)


def test_judging_examples_that_cannot_be_used_are_named_with_their_field(tmp_path, own):
    del own["eft_train"]
    without_score = judging_rows("b")[0] | {"judgement": "fine"}
    own["eft"] = write(tmp_path / "eft", [judging_rows("a")[0], without_score, without_score])
    with pytest.raises(BadConfig, match=r"^config\.seed_data\.eft: .*/eft: 2 of 3 rows cannot be used: no_score 2"):
        checks.check_sources(open_run(tmp_path / "run", **own), [])
    write(own["eft"], [*judging_rows("train"), without_score])
    counts = take_eft(tmp_path / "run", **own).ledger.entry("eft/examples")["counts"]
    assert (counts["rows"], counts["examples"], counts["no_score"]) == (1, 1, 1)
    write(own["eft"], judging_rows("ask 0"))
    with pytest.raises(EmptyStage, match=r"^eft/examples: all prompts of config\.seed_data\.eft are in the evaluation"):
        take_eft(tmp_path / "other", **own)


def test_judging_examples_that_do_not_go_together_with_other_sources_are_refused(tmp_path):
    with pytest.raises(BadConfig, match=r"config\.seed_data\.eft and config\.seed_data\.eft_train are both given"):
        settings(tmp_path, eft="x", ift="x", eft_train="x", eft_eval="x")
    with pytest.raises(BadConfig, match=r"config\.seed_data\.eft_eval is not given, and config\.seed_data\.ift is"):
        settings(tmp_path, eft="x", ift="x")
    settings(tmp_path, eft="x", ift="x", eft_eval="x")
    settings(tmp_path, eft="x", trees="x")


def test_without_ranked_prompts_to_learn_from_judging_examples_are_needed(tmp_path):
    for eft in ({}, {"eft": "ranks"}):
        with pytest.raises(BadConfig, match=r"config\.seed_data\.rules\.eft_train_prompts is 0, and nothing else"):
            settings(tmp_path, rules={"eft_train_prompts": 0}, **eft)
    settings(tmp_path, rules={"eft_train_prompts": 0}, eft="x", trees="x")
    settings(tmp_path, rules={"eft_train_prompts": 0}, ift="x", eft_train="x", eft_eval="x")
