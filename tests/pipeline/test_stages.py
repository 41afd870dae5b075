"""Stages on their own, with models that say what they are told: what they write, count, refuse and go on with."""

import contextlib
import dataclasses

import jax
import numpy as np
import pytest
from config_trees import put

from configs.base import get_config
from srlm_jax.data import world
from srlm_jax.model import llama, quantized
from srlm_jax.parallel import hosts, rules
from srlm_jax.pipeline import answering, checks, judging, seeding, training
from srlm_jax.pipeline.ledger import EmptyStage, Ledger, Outcome
from srlm_jax.pipeline.run import Run, make_run, open_workdir
from srlm_jax.pipeline.settings import BadConfig, read
from srlm_jax.records import (
    Completion,
    Example,
    JudgedPrompt,
    JudgedResponse,
    NoVote,
    PreferencePair,
    Prompt,
    RankedPrompt,
    Responses,
    Vote,
)
from srlm_jax.storage import checkpoint, jsonl
from srlm_jax.storage.checkpoint import BadCheckpoint
from srlm_jax.text.self_instruct import Candidate


class Killed(BaseException):
    """As a kill: no stage can catch it."""


def open_run(workdir, **changes):
    """A run of the smoke scale; `changes` are of the config, dots written as two underscores."""
    tree = put(get_config("smoke", 2).to_dict(), {"workdir": str(workdir)} | changes)
    return make_run(read(tree), "test")


def pretend(run, *names):
    """Enters stages as done, for others to depend on."""
    for name in names:
        run.ledger.run(name, lambda: Outcome({}, None), config={}, inputs=(), outputs=())


@pytest.fixture
def speak(monkeypatch):
    """`speak(write)`: every model writes `write(request id, prompt, sample)`; `speak.asked` lists the request ids."""

    def install(write):
        install.asked = []

        def generate(requests, params, report):
            drawn = []
            for request in requests:
                install.asked.append(request.id)
                prompts = []
                for prompt in request.prompts:
                    texts = [write(request.id, prompt, sample) for sample in range(params.samples)]
                    prompts.append(tuple(Completion(text=t, tokens=len(t.split()), finished=True) for t in texts))
                drawn.append(tuple(prompts))
            return drawn

        monkeypatch.setattr(Run, "generate", lambda run, name, stage: generate)

    return install


def answers(*names, texts=("plum", "fig", "pear", "kiwi")):
    completions = tuple(Completion(text=text, tokens=1, finished=text != "kiwi") for text in texts)
    return [Responses(id=name, prompt=f"question {name}", completions=completions) for name in names]


def judged(name, *scores):
    """A judged prompt whose answers are called by their place, with these scores."""
    responses = tuple(
        JudgedResponse(response=f"answer {i}", tokens=2, finished=True, votes=(), score=score)
        for i, score in enumerate(scores)
    )
    return JudgedPrompt(id=name, prompt=f"question {name}", responses=responses)


# --- going on after a kill --------------------------------------------------------------------------------------------


def double(run, folder, items, seen, die_at=None, together=False):
    def work(part, report):
        seen.append(list(part))
        if die_at in part:
            raise Killed
        report(len(part), 1)
        return [Prompt(id=str(item), text="x" * item, origin="seed") for item in part]

    return run.in_shards(folder, items, Prompt, work, title="", completions=lambda item: 1, together=together)


def test_shards_that_are_there_are_not_made_again(tmp_path):
    run = open_run(tmp_path, shard_prompts=4)
    folder, seen = run.workdir / "stage", []
    with pytest.raises(Killed):
        double(run, folder, range(10), seen, die_at=5)
    assert seen == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert jsonl.shards_done(folder) == {0}

    seen.clear()
    records = double(run, folder, range(10), seen)
    assert seen == [[4, 5, 6, 7], [8, 9]]
    assert [record.id for record in records] == [str(i) for i in range(10)]

    jsonl.shard(folder, 1).unlink()  # the one in the middle
    seen.clear()
    assert double(run, folder, range(10), seen) == records
    assert seen == [[4, 5, 6, 7]]


class Waiting(Exception):
    """Stands for a process that waits for the others."""


def test_shards_are_dealt_out_to_processes_and_read_by_all_in_their_order(tmp_path, monkeypatch):
    run = open_run(tmp_path, shard_prompts=4)
    folder, seen, records = run.workdir / "stage", [], []

    def barrier(name):
        if name.endswith("written") and jax.process_index() != 1:
            raise Waiting

    monkeypatch.setattr(hosts, "barrier", barrier)
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    for number, share in ((3, []), (2, [[8, 9]]), (0, [[0, 1, 2, 3]]), (1, [[4, 5, 6, 7]])):
        monkeypatch.setattr(jax, "process_index", lambda number=number: number)
        with contextlib.suppress(Waiting):
            records = double(run, folder, range(10), seen)
        assert seen == share
        seen.clear()
    assert [record.id for record in records] == [str(i) for i in range(10)]


def test_what_all_devices_work_on_together_is_written_by_the_first_process(tmp_path, monkeypatch):
    run = open_run(tmp_path, shard_prompts=4)
    seen = []
    monkeypatch.setattr(hosts, "barrier", lambda name: None)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for number, written in ((1, 0), (0, 3)):
        monkeypatch.setattr(jax, "process_index", lambda number=number: number)
        with contextlib.suppress(FileNotFoundError):
            double(run, run.workdir / "stage", range(10), seen, together=True)
        assert seen == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
        assert len(jsonl.shards_done(run.workdir / "stage")) == written
        seen.clear()


def test_nothing_to_do_gives_no_records(tmp_path):
    run = open_run(tmp_path)
    assert double(run, run.workdir / "stage", [], []) == []


# --- before training --------------------------------------------------------------------------------------------------


def test_the_world_and_its_split_are_counted(tmp_path):
    run = open_run(tmp_path)
    seeding.make_world(run)
    seeding.split_seed(run)
    world_counts = run.ledger.entry("world")["counts"]
    rules, wanted = run.settings.world, run.settings.seed_data.rules
    assert world_counts == {"documents": rules.documents, "trees": rules.trees, "held_out": rules.held_out}
    counts = run.ledger.entry("seed")["counts"]
    assert counts["trees"] == rules.trees
    for name, cls, number in (
        ("ift", Example, wanted.ift_prompts),
        ("eft_train", RankedPrompt, wanted.eft_train_prompts),
        ("eft_eval", RankedPrompt, wanted.eft_eval_prompts),
    ):
        assert len(jsonl.read(run.workdir / "seed" / f"{name}.jsonl", cls)) == counts[name] == number


def test_a_judge_prompt_that_cannot_fit_stops_before_training(tmp_path):
    with pytest.raises(BadConfig) as raised:
        checks.check(open_run(tmp_path, context_length=100), [])
    for field in ("context_length", "max_prompt_tokens", "responses.max_new_tokens", "judging.max_new_tokens"):
        assert f"config.{field}" in str(raised.value)
    assert not (tmp_path / "m0").exists()


def test_the_longest_judge_prompt_that_fits_is_accepted(tmp_path):
    with pytest.raises(BadConfig, match=r": (\d+) tokens of rubric") as raised:
        checks.check_lengths(open_run(tmp_path, context_length=10))
    frame = int(str(raised.value).split(" tokens of rubric")[0].split()[-1])
    rubric_words = world.RUBRIC.template.replace("\n", " \n ").split(" ")
    assert frame == len(rubric_words) - 2 + len(["<s>", "user:", "\n", "assistant:"])
    exact = {
        "max_prompt_tokens": 20,
        "responses__max_new_tokens": 20,
        "judging__max_new_tokens": 200 - 40 - frame,
        "self_instruction__from_seeds": 1,
        "self_instruction__from_generated": 0,
    }
    checks.check_lengths(open_run(tmp_path, context_length=200, **exact))
    with pytest.raises(BadConfig, match=r"= 200 > config\.context_length 199"):
        checks.check_lengths(open_run(tmp_path, context_length=199, **exact))


def test_a_prompt_for_new_instructions_that_cannot_fit_stops_before_training(tmp_path):
    run = open_run(tmp_path, self_instruction__from_seeds=20)
    with pytest.raises(BadConfig, match=r"22 x config\.max_prompt_tokens .* config\.self_instruction\.sampling"):
        checks.check_lengths(run)


def test_more_token_ids_than_the_model_has_are_refused(tmp_path):
    with pytest.raises(BadConfig, match=r"config\.model\.V: the tokenizer has \d+ ids and the model 64"):
        open_run(tmp_path, model__V=64)


def test_adapters_wider_than_the_model_are_refused(tmp_path):
    with pytest.raises(BadConfig, match=r"^config\.lora: rank is 65, more than the 64 of the narrowest projection"):
        open_run(tmp_path, lora__rank=65)


def test_a_workdir_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BadConfig, match=r"config\.workdir .*file/runs cannot be written"):
        open_workdir(open_run(tmp_path / "file" / "runs").workdir)


def test_examples_that_all_exceed_the_context_stop_the_training(tmp_path):
    run = open_run(tmp_path, context_length=290)
    pretend(run, "seed", "m0/train")
    jsonl.write(run.workdir / "long.jsonl", [Example(id="a", prompt="list", response="apple " * 400, finished=True)])
    with pytest.raises(EmptyStage, match=r"none of 1 examples fits config\.context_length"):
        training.fine_tune(run, "sft", ["long.jsonl"], ["seed", "m0/train"])


def test_how_far_a_first_loss_may_be_off_makes_no_model_stale(tmp_path, monkeypatch):
    """A tolerance that is raised for M1 is the baseline's too, which would be trained again."""
    configs = []
    monkeypatch.setattr(Ledger, "run", lambda ledger, stage, work, *, config, **_: configs.append(config))
    for tolerance, steps in ((0.02, 20), (0.5, 20), (0.02, 21)):
        run = open_run(tmp_path, sft__train__first_loss_tolerance=tolerance, sft__train__steps=steps)
        training.fine_tune(run, "sft", [], [])
    first, tolerant, longer = configs
    assert first == tolerant != longer


# --- judging ----------------------------------------------------------------------------------------------------------


def judge(run, names=("a", "b", "c")):
    pretend(run, "m2/responses", "m1/train")
    jsonl.write(jsonl.shard(run.workdir / "m2" / "responses", 0), answers(*names))
    judging.judge_responses(run, "m2", "m1")


def test_votes_and_their_failures_are_counted(tmp_path, speak):
    said = {"plum": "Score: 4", "fig": "no idea", "pear": "Score: 9", "kiwi": "Score: four"}
    speak(lambda name, prompt, sample: next(text for word, text in said.items() if word in prompt))
    run = open_run(tmp_path)
    judge(run)
    counts = run.ledger.entry("m2/judgements")["counts"]
    assert counts == {"votes": 36, "cut": 0, "unfinished": 0, "no_score": 9, "out_of_range": 9, "not_a_number": 9}
    records = jsonl.read(run.workdir / "m2" / "judgements", JudgedPrompt)
    assert [[response.score for response in record.responses] for record in records] == [[4.0, None, None, None]] * 3


def test_judgements_that_the_limit_cut_are_counted_and_many_of_them_give_advice(tmp_path, monkeypatch, capsys):
    cut = Completion(text="Score: 4 because of", tokens=4, finished=False)
    whole = Completion(text="Score: 4", tokens=4, finished=True)

    def generate(requests, params, report):
        return [tuple((cut, whole, whole) for _ in request.prompts) for request in requests]

    monkeypatch.setattr(Run, "generate", lambda run, name, stage: generate)
    run = open_run(tmp_path)
    judge(run)
    counts = run.ledger.entry("m2/judgements")["counts"]
    assert (counts["votes"], counts["cut"]) == (36, 12)
    said = "the length limit cut 12 of 36 judgements (33%); raise config.judging.max_new_tokens"
    assert f"warning: m2/judgements: {said}\n" in capsys.readouterr().err


def test_judgements_without_any_score_stop_with_advice(tmp_path, speak):
    speak(lambda name, prompt, sample: "i cannot say")
    run = open_run(tmp_path)
    with pytest.raises(EmptyStage) as raised:
        judge(run)
    message = str(raised.value)
    assert message.startswith(
        "m2/judgements: judged by M1, 0 % of 36 judgements have a score (100 % no score). config.judging.min_scored is "
    )
    for field in ("prefix='Score: '", "rubric", "endpoint"):
        assert f"config.judging.{field}" in message
    assert "config.seed_data.eft" in message and "max_new_tokens" not in message
    # What was judged can be looked at, and the stage is not done.
    assert len(jsonl.read(run.workdir / "m2" / "judgements", JudgedPrompt)) == 3
    assert run.ledger.entry("m2/judgements")["status"] == "started"


def test_a_killed_judge_goes_on_with_the_shards_that_lack(tmp_path, speak):
    def dying(name, prompt, sample):
        if name == "c":
            raise Killed
        return f"Score: {sample}"

    speak(dying)
    with pytest.raises(Killed):
        judge(open_run(tmp_path, shard_prompts=2))
    speak(lambda name, prompt, sample: f"Score: {sample}")
    judge(open_run(tmp_path, shard_prompts=2))
    assert speak.asked == ["c"]


def test_a_baseline_that_never_agrees_stops_with_advice(tmp_path):
    run = open_run(tmp_path)
    pretend(run, "seed", "eft/judgements")
    ranked = [RankedPrompt(id="a", prompt="question a", responses=("answer 0", "answer 1"), ranks=(0, 1))]
    jsonl.write(run.workdir / "seed" / "eft_train.jsonl", ranked)
    verdict = judged("a", 1.0, 5.0)
    responses = tuple(
        JudgedResponse(**{**vars(r), "votes": (Vote(text="", finished=True, score=r.score, no_vote=None),)})
        for r in verdict.responses
    )
    jsonl.write(
        jsonl.shard(run.workdir / "eft" / "judgements", 0),
        [JudgedPrompt(id=verdict.id, prompt=verdict.prompt, responses=responses)],
    )
    with pytest.raises(EmptyStage, match=r"^eft/examples: no judgement .* config\.eft\.max_tied_share"):
        judging.make_eft(run)


# --- a round ----------------------------------------------------------------------------------------------------------


def make_pairs(run, *records):
    pretend(run, "m2/judgements")
    jsonl.write(jsonl.shard(run.workdir / "m2" / "judgements", 0), records)
    judging.make_pairs(run, "m2")
    return jsonl.read(run.workdir / "m2" / "pairs", PreferencePair)


def test_pairs_are_the_highest_against_the_lowest_and_counted(tmp_path):
    run = open_run(tmp_path)
    (pair,) = make_pairs(run, judged("a", 2.0, 5.0, 1.0), judged("b", 3.0, 3.0), judged("c", None, 4.0), judged("d"))
    assert (pair.id, pair.chosen, pair.rejected) == ("a", "answer 1", "answer 2")
    counts = run.ledger.entry("m2/pairs")["counts"]
    assert counts.pop("chosen_cut") == counts.pop("rejected_cut") == 0
    assert counts == {"kept": 1, "unparseable": 1, "one_score": 1, "tie": 1, "same_text": 0}


def test_cut_answers_of_pairs_are_counted_and_many_of_them_give_advice(tmp_path, capsys):
    cut = judged("a", 1.0, 5.0)
    best = dataclasses.replace(cut.responses[1], finished=False)
    (pair,) = make_pairs(open_run(tmp_path), dataclasses.replace(cut, responses=(cut.responses[0], best)))
    assert (pair.chosen_finished, pair.rejected_finished) == (False, True)
    counts = open_run(tmp_path).ledger.entry("m2/pairs")["counts"]
    assert (counts["chosen_cut"], counts["rejected_cut"]) == (1, 0)
    assert capsys.readouterr().err == (
        "warning: m2/pairs: the length limit cut 1 of 1 chosen answers (100%); raise config.responses.max_new_tokens\n"
    )


def test_ties_alone_stop_with_advice(tmp_path):
    run = open_run(tmp_path)
    with pytest.raises(EmptyStage) as raised:
        make_pairs(run, judged("a", 3.0, 3.0), judged("b", 0.0, 0.0))
    assert "'tie': 2" in str(raised.value) and "config.responses.temperature" in str(raised.value)
    assert not (tmp_path / "m2" / "pairs").exists()


def test_answers_that_the_limit_cut_are_counted(tmp_path, monkeypatch, capsys):
    run = open_run(tmp_path)
    pretend(run, "m2/prompts", "m1/train")
    jsonl.write(jsonl.shard(run.workdir / "m2" / "prompts", 0), [Prompt(id="a", text="list", origin="self-instruct")])
    (answer,) = answers("a")

    def generate(requests, params, report):
        assert [(request.id, request.prompts, request.chat) for request in requests] == [("a", ("list",), True)]
        return [(answer.completions,)]

    monkeypatch.setattr(Run, "generate", lambda run, name, stage: generate)
    answering.respond(run, "m2", "m1")
    assert run.ledger.entry("m2/responses")["counts"] == {"responses": 4, "cut": 1}
    assert (
        "warning: m2/responses: the length limit cut 1 of 4 answers (25%); raise config.responses.max_new_tokens\n"
        in capsys.readouterr().err
    )
    (made,) = jsonl.read(run.workdir / "m2" / "responses", Responses)
    assert (made.prompt, made.completions) == ("list", answer.completions)


SEEDS = [
    "please list three fruits in alphabetical order .",
    "name five animals as you like .",
    "show us two cities before dinner .",
    "dear assistant , find six tools .",
]


def new_prompts(workdir, **changes):
    run = open_run(
        workdir,
        **{
            "self_instruction__prompts": 5,
            "self_instruction__batch": 4,
            "self_instruction__max_candidates": 16,
            "self_instruction__from_seeds": 3,
            "self_instruction__from_generated": 1,
            **changes,
        },
    )
    pretend(run, "seed", "m1/train")
    (workdir / "m1" / "checkpoint").mkdir(parents=True, exist_ok=True)
    seeds = [Example(id=str(i), prompt=prompt, response="plum", finished=True) for i, prompt in enumerate(SEEDS)]
    jsonl.write(run.workdir / "seed" / "ift.jsonl", seeds)
    answering.create_prompts(run, "m2", "m1")
    return run


def inventive(name, prompt, sample):
    """A new instruction for two of three requests; else a known one: a seed, and later the first that was made."""
    index = int(name.split("/")[-2]) * 4 + int(name.split("/")[-1])
    if index == 2:
        return SEEDS[0] + "\n10."
    index = 0 if index % 3 == 2 else index
    category = sorted(world.CATEGORIES)[index]
    return f"{world.OPENERS[index + 1]} {world.VERBS[index % 8]} {world.NUMBERS[index % 8]} {category} .\n10."


def test_new_prompts_are_kept_up_to_the_number_wanted(tmp_path, speak):
    speak(inventive)
    run = new_prompts(tmp_path)
    prompts = jsonl.read(run.workdir / "m2" / "prompts", Prompt)
    assert [prompt.id for prompt in prompts] == [f"m2-{i:05}" for i in range(5)]
    assert all(prompt.origin == "self-instruct" and "\n" not in prompt.text for prompt in prompts)
    candidates = jsonl.read(run.workdir / "m2" / "candidates", Candidate)
    assert len(candidates) == 8  # two batches give 5 or more, so there is no third
    accepted = [candidate.text for candidate in candidates if candidate.rejection is None]
    assert [prompt.text for prompt in prompts] == accepted[:5]
    counts = run.ledger.entry("m2/prompts")["counts"]
    assert counts["kept"] == 5
    assert counts["similar"] == sum(candidate.rejection == "similar" for candidate in candidates) >= 2


def test_a_killed_search_for_prompts_ends_as_it_would_have(tmp_path, speak):
    speak(inventive)
    new_prompts(tmp_path / "whole", self_instruction__prompts=8)

    def dying(name, prompt, sample):
        if name.startswith("m2/prompts/2/"):
            raise Killed
        return inventive(name, prompt, sample)

    speak(dying)
    with pytest.raises(Killed):
        new_prompts(tmp_path / "killed", self_instruction__prompts=8)
    speak(inventive)
    new_prompts(tmp_path / "killed", self_instruction__prompts=8)
    assert speak.asked and all(name.startswith(("m2/prompts/2/", "m2/prompts/3/")) for name in speak.asked)
    for folder in ("candidates", "prompts"):
        files = {path.name: path.read_bytes() for path in (tmp_path / "whole" / "m2" / folder).iterdir()}
        assert files == {path.name: path.read_bytes() for path in (tmp_path / "killed" / "m2" / folder).iterdir()}


def test_demonstrations_are_seeds_and_what_was_made_before(tmp_path, speak):
    shown = []

    def write(name, prompt, sample):
        shown.append(prompt)
        return inventive(name, prompt, sample)

    speak(write)
    new_prompts(tmp_path)
    assert all(prompt.startswith("Come up with a series of tasks:\n1. ") for prompt in shown)
    known = [sum(seed in prompt for seed in SEEDS) for prompt in shown]
    assert known == [4] * 4 + [3] * 4  # in the first batch a seed stands in for the prompt that is not made yet


def test_an_instruction_too_long_for_the_judge_is_refused(tmp_path, speak):
    speak(lambda name, prompt, sample: "name nine words and then one more word .\n10.")
    with pytest.raises(EmptyStage, match="'too_many_tokens': 16"):
        new_prompts(tmp_path, max_prompt_tokens=8)


def test_completions_without_an_instruction_stop_with_advice(tmp_path, speak):
    speak(lambda name, prompt, sample: "yes")
    with pytest.raises(EmptyStage) as raised:
        new_prompts(tmp_path)
    message = str(raised.value)
    assert message.startswith("m2/prompts: none of 16 completions") and "'too_short': 16" in message
    assert "config.self_instruction.filters" in message


def test_a_generator_that_is_nowhere_is_named(tmp_path):
    run = open_run(tmp_path, self_instruction__generator="/no/such/model")
    with pytest.raises(BadConfig, match=r"^config\.self_instruction\.generator: '/no/such/model' is neither"):
        checks.check(run, [])


def test_no_vote_is_told_apart_from_all_reasons():
    votes = [Vote(text="", finished=True, score=None, no_vote=reason) for reason in NoVote] + [
        Vote(text="", finished=False, score=0.0, no_vote=None)
    ]
    response = JudgedResponse(response="", tokens=0, finished=True, votes=tuple(votes), score=0.0)
    counts = judging.vote_counts([JudgedPrompt(id="a", prompt="", responses=(response, response))])
    assert counts == {"votes": 10, "cut": 2, "unfinished": 2, "no_score": 2, "out_of_range": 2, "not_a_number": 2}


# --- the model that a run keeps ---------------------------------------------------------------------------------------


def test_a_kept_model_is_trained_and_sampled_from_without_its_file(tmp_path):
    run = open_run(tmp_path, model__compute_dtype="bfloat16")
    shapes = rules.placed(run.train_mesh, rules.TRAIN, llama.abstract(run.settings.model.llama))
    model = jax.jit(lambda: llama.init(run.settings.model.llama, jax.random.key(0)),
                    out_shardings=jax.tree.map(lambda x: x.sharding, shapes))()  # fmt: skip
    run.keep("m1", model)
    sampled = run.to_sample("m1")
    assert run.to_train("m1") is model
    for kept, copy in zip(jax.tree.leaves(llama.by_layer(model)), jax.tree.leaves(sampled), strict=True):
        assert (kept.dtype, copy.dtype) == ("float32", "bfloat16")
        np.testing.assert_array_equal(kept.astype("bfloat16"), copy)
    assert run.give_away("m1") is model
    with pytest.raises(BadCheckpoint):  # now it would be read
        run.to_train("m1")


def test_a_model_is_rounded_for_sampling_alone(tmp_path):
    run = open_run(tmp_path, model__compute_dtype="bfloat16", engine__weights="int8", mesh__fsdp=4, mesh__tensor=2)
    config = run.settings.model.llama
    places = rules.model_shardings(run.train_mesh, rules.TRAIN, llama.abstract(config))
    model = jax.jit(lambda: llama.init(config, jax.random.key(0)), out_shardings=places)()
    run.keep("m1", model)
    sampled = run.to_sample("m1")
    assert {x.dtype for x in jax.tree.leaves(run.to_train("m1"))} == {np.dtype("float32")}
    assert (sampled.embedding.dtype, sampled.stacks[0].q.scale.dtype) == ("bfloat16", "bfloat16")
    wanted = quantized.quantize(model, "int8").blocks.down.values
    found, place = sampled.stacks[1].down.values, rules.sharding(run.sample_mesh, rules.SAMPLE, wanted.axes)
    assert found[...].sharding.is_equivalent_to(place, 3)
    np.testing.assert_array_equal(found[...], wanted[1:2])
    assert run.config("engine")["config.engine.weights"] == "int8"  # what the ledger compares


def test_one_model_is_kept_at_a_time(tmp_path):
    run = open_run(tmp_path)
    config = run.settings.model.llama
    for seed, name in enumerate(("m1", "m2")):
        model = jax.jit(lambda key: llama.init(config, key))(jax.random.key(seed))
        checkpoint.save_model(run.workdir / name / "checkpoint", model, {})
    first = run.to_train("m1")
    assert run.to_train("m1") is first
    second = run.to_train("m2")
    assert (run.live.name, run.live.model is second) == ("m2", True)
    assert np.any(first.embedding[...] != second.embedding[...])
