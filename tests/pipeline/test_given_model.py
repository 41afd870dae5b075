"""Runs from a Llama's folder: what they take from it, what they ask for besides, and the whole algorithm on a real
model of stories, with a server for its mouth."""

import dataclasses
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from completions_server import Reply, Server, serving
from config_trees import put
from etils import epath

from configs.base import SCALES, get_config
from srlm_jax.convert import convert
from srlm_jax.judge.rubric import paper_rubric
from srlm_jax.model import config_files, llama, sources, weights
from srlm_jax.parallel import rules
from srlm_jax.pipeline import answering, checks, evaluation, judging, seeding, training
from srlm_jax.pipeline.endpoint import EndpointError, EndpointGenerate
from srlm_jax.pipeline.generate import ModelGenerate
from srlm_jax.pipeline.ledger import EmptyStage, Outcome, StaleStage
from srlm_jax.pipeline.run import make_run
from srlm_jax.pipeline.settings import BadConfig, read
from srlm_jax.records import Completion, Example, Request, Responses, SamplingParams
from srlm_jax.storage import jsonl
from srlm_jax.text.chat import LLAMA2, encode_prompt

ROOT = Path(__file__).parents[2]
LIGHT = {f"{part}__train__batch_size": 2 for part in ("sft", "dpo")}
GREEDY = SamplingParams(samples=1, temperature=0.0, top_p=1.0, max_new_tokens=12, stop=())


@pytest.fixture
def few(stories260k, shared_data, tmp_path):
    """The paper's run on the model of stories and the real Open Assistant, with few of all: what is changed."""
    changes = {
        "workdir": str(tmp_path / "run"),
        "model__path": str(stories260k / "hf"),
        "model__compute_dtype": "float32",
        "seed_data__trees": str(shared_data("oasst/oasst1_en-validation.jsonl")),
        "seed_data__rules__ift_prompts": 16,
        "seed_data__rules__eft_train_prompts": 14,
        "seed_data__rules__eft_eval_prompts": 10,
        "context_length": 1_500,  # the rubric alone is 1,097 tokens of such a vocabulary
        "max_prompt_tokens": 128,
        "shard_prompts": 8,
        "engine__rows": 12,
        "responses__max_new_tokens": 16,
        "judging__max_new_tokens": 12,
        "self_instruction__prompts": 8,
        "self_instruction__max_candidates": 64,
        "self_instruction__batch": 8,
        "self_instruction__generator": "current",
        "self_instruction__sampling__max_new_tokens": 32,
    }
    for part in ("sft", "dpo"):
        train = {"steps": 4, "batch_size": 8, "checkpoint_every": 2, "log_every": 1, "optimizer__warmup_steps": 1}
        changes |= {f"{part}__train__{name}": value for name, value in train.items()}
    return changes


@pytest.fixture
def config(few):
    """`config(dpo__beta=0.2)`: a config's tree with these fields changed besides."""

    def make(models=3, **changes):
        return put(get_config("llama2_7b", models).to_dict(), few | changes)

    return make


def open_run(tree):
    return make_run(read(tree), "test")


def copied(folder, target):
    """A copy that can be written to, whatever the modes of the files."""
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def points(text, sample):
    return hashlib.sha256(f"{text}{sample}".encode()).digest()[0] % 6


def say(prompt, sample):
    """Verdicts, new prompts and answers, each as the prompt asks, and never two alike."""
    if prompt.startswith("Review the user's question"):
        return f"It has some points. Score: {points(prompt, sample)}"
    if prompt.startswith("Come up with a series of tasks:"):
        words = [f"{letter}{points(prompt, letter)}" for letter in "abcdefgh"]
        return f" Tell me about {' '.join(words)}\n10."
    return f"answer {points(prompt, sample)} {sample}"


@pytest.fixture
def server(monkeypatch):
    pytest.importorskip("openai", reason="needs the extra `openai`")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serving(Server(say)) as server:
        yield server


def served(server, model):
    return {"url": f"http://127.0.0.1:{server.server_port}/v1", "model": model, "key_variable": None} | {
        "parameters": ("n", "temperature", "top_p", "max_tokens"), "timeout_s": 30.0, "patience_s": 0.0,
        "concurrency": 4, "requests_per_minute": 600_000,
    }  # fmt: skip


# --- what comes from the folder ---------------------------------------------------------------------------------------


def test_the_model_its_tokenizer_and_the_paper_s_rubric_come_with_the_folder(config, stories260k):
    run = open_run(config())
    model = run.settings.model
    assert (model.V, model.D, model.L, model.N, model.K, model.tied) == (512, 64, 5, 8, 4, True)
    assert (model.param_dtype, model.compute_dtype, model.remat) == ("float32", "float32", "full")
    assert run.tokenizer.vocabulary == 512
    assert (run.chat, run.rubric) == (LLAMA2, paper_rubric())
    # The ledger knows the model by its own numbers, and not by those of the scale.
    assert run.config("model")["config.model.D"] == 64
    assert "config.model.llama" not in run.config("model")


def test_m0_is_the_folder_s_model_with_all_that_other_commands_need(config, stories260k, tmp_path):
    run = open_run(config(model__path=str(stories260k / "meta")))
    training.make_base(run)
    m0 = tmp_path / "run" / "m0" / "checkpoint"
    sizes = {"param_dtype": "float32", "compute_dtype": "float32", "remat": "full"}
    source = weights.read_config(stories260k / "hf", **sizes)
    assert weights.read_config(m0, **sizes) == source
    places = rules.model_shardings(run.train_mesh, rules.TRAIN, llama.abstract(source))
    wanted = weights.load(stories260k / "hf", source, places)
    jax.tree.map(np.testing.assert_array_equal, run.to_train("m0"), wanted)
    assert config_files.hf_fields(epath.Path(m0)) == config_files.hf_fields(epath.Path(stories260k / "meta"))
    assert (m0 / "tokenizer.model").read_bytes() == (stories260k / "hf" / "tokenizer.model").read_bytes()


def test_every_checkpoint_has_what_stands_beside_the_weights_and_nothing_else(config, stories260k, tmp_path):
    copy = copied(stories260k / "hf", tmp_path / "model")
    beside = {"chat_template.jinja": "{{ x }}", "added_tokens.json": "{}", "special_tokens_map.json": "{}"}
    beside |= {"generation_config.json": '{"top_k": 3}'}
    for name, text in (beside | {"modeling_x.py": "", "secret.txt": ""}).items():
        (copy / name).write_text(text)
    run = open_run(config(model__path=str(copy)))
    training.make_base(run)
    identity = training._save(run, "m1", run.to_train("m0"))
    assert identity == json.loads((tmp_path / "run" / "m1" / "checkpoint" / "manifest.json").read_text())["hash"]
    for name in ("m0", "m1"):
        folder = tmp_path / "run" / name / "checkpoint"
        assert not beside.keys() - {path.name for path in folder.iterdir()}
        assert (folder / "generation_config.json").read_text() == beside["generation_config.json"]
        assert not (folder / "modeling_x.py").exists() and not (folder / "secret.txt").exists()
    convert(tmp_path / "run" / "m1" / "checkpoint", tmp_path / "out", to="hf", dtype=None, shard_bytes=10**9)
    assert not beside.keys() - {path.name for path in (tmp_path / "out").iterdir()}


def test_m0_is_taken_once(config, stories260k, tmp_path):
    training.make_base(open_run(config()))
    written = (tmp_path / "run" / "m0" / "checkpoint" / "manifest.json").stat().st_mtime_ns
    training.make_base(open_run(config()))
    assert (tmp_path / "run" / "m0" / "checkpoint" / "manifest.json").stat().st_mtime_ns == written
    with pytest.raises(StaleStage, match=r"m0/train .*config\.model\.path was .*hf\", is .*meta"):
        training.make_base(open_run(config(model__path=str(stories260k / "meta"))))


def test_a_damaged_folder_is_named_by_its_field_and_leaves_no_model(config, stories260k, tmp_path):
    copy = copied(stories260k / "hf", tmp_path / "model")
    data = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(data[: len(data) // 2])
    run = open_run(config(model__path=str(copy)))
    with pytest.raises(BadConfig, match=r"^config\.model\.path: .*model\.safetensors is no whole safetensors file"):
        checks.check(run, [])
    assert not (tmp_path / "run").exists()
    (copy / "model.safetensors").write_bytes(data[:-4] + b"\xff\xff\xff\x7f")  # a NaN, which is seen by reading alone
    run = open_run(config(model__path=str(copy)))
    checks.check(run, [])
    with pytest.raises(BadConfig, match=r"^config\.model\.path: .* holds numbers that are no weights"):
        training.make_base(run)
    assert not (tmp_path / "run" / "m0").exists()


def test_the_folder_s_weights_are_not_needed_once_m0_is_there(config, stories260k, tmp_path):
    copy = copied(stories260k / "hf", tmp_path / "model")
    training.make_base(open_run(config(model__path=str(copy))))
    (copy / "model.safetensors").unlink()
    run = open_run(config(model__path=str(copy)))
    checks.check(run, [])
    with pytest.raises(BadConfig, match=r"^config\.model\.path: "):
        checks.check(run, ["m0/train"])  # which --redo is about to remove
    training.make_base(run)


# --- what has to be given ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [scale for scale in SCALES if scale not in ("tiny", "smoke")])
def test_without_a_folder_the_scale_says_what_it_wants(scale, tmp_path):
    tree = put(get_config(scale, 1).to_dict(), {"workdir": str(tmp_path / "run")})
    with pytest.raises(BadConfig, match=r"^config\.model\.path is not given"):
        open_run(tree)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__path": "/no/such"}, r"^config\.model\.path: /no/such: there is no such folder"),
        ({"seed_data__trees": None}, r"^config\.model\.path is given, and no human data"),
        ({"self_instruction__generator": None}, r"^config\.self_instruction\.generator is not given"),
        ({"dpo__train__batch_size": 12}, r"^config\.dpo\.train\.batch_size is 12, which 8 groups of devices"),
        ({"chat": "alpaca"}, r"^config\.chat is 'alpaca': it must be 'plain' or "),
        ({"chat": "llama3"}, r"^config\.chat: .*tokenizer\.model has no control token '<\|start_header_id\|>'"),
        (
            {"validation__endpoint__url": "http://localhost/v1"},
            r"^config\.validation\.endpoint.*url.*model is not given",
        ),
        ({"endpoint__url": "http://localhost/v1", "endpoint__model": "m"}, r"^config\.endpoint\.model .*\{name\}"),
        ({"endpoint__url": "localhost", "endpoint__model": "{name}"}, r"^config\.endpoint: url must be like"),
    ],
)
def test_what_is_missing_or_wrong_is_named_before_anything_is_made(config, tmp_path, changes, message):
    with pytest.raises(BadConfig, match=message):
        open_run(config(**changes))
    assert not (tmp_path / "run").exists()


def test_one_iteration_needs_no_generator(config):
    open_run(config(models=1, self_instruction__generator=None))


def test_a_tokenizer_of_another_model_is_refused(config, stories260k, llama2_folder, tmp_path):
    copy = copied(stories260k / "hf", tmp_path / "model")
    (copy / "tokenizer.model").write_bytes((llama2_folder / "tokenizer.model").read_bytes())
    with pytest.raises(BadConfig, match=r"^config\.model\.path: the tokenizer has 32000 ids and the model 512"):
        open_run(config(model__path=str(copy)))


def test_a_key_that_is_not_there_is_missed_before_anything_is_trained(config, server, monkeypatch):
    monkeypatch.delenv("NO_KEY", raising=False)
    with pytest.raises(EndpointError, match="NO_KEY"):
        checks.check_servers(open_run(config(endpoint=served(server, "{name}") | {"key_variable": "NO_KEY"})), [])


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("endpoint", {}),
        ("self_instruction.endpoint", {}),
        ("judging.endpoint", {}),
        ("validation.endpoint", {"validation__prompts_file": "prompts.jsonl"}),
    ],
)
def test_a_server_that_cannot_be_used_is_missed_before_anything_is_trained(config, server, field, changes):
    server.script = lambda fields: Reply({"error": "no such model"}, 404)
    server.models = Reply({"error": "who?"}, 401)
    changes = changes | {field.replace(".", "__"): served(server, "{name}")}
    with pytest.raises(EndpointError, match=rf"^config\.{field} \(http://.*: HTTP 40[14]"):
        checks.check_servers(open_run(config(**changes)), [])


def test_a_finished_run_asks_no_server_at_the_start(config, server):
    servers = {"endpoint": served(server, "{name}"), "self_instruction__endpoint": served(server, "writer")}
    run = open_run(config(**servers))
    run.ledger.run(f"m{run.settings.models}/eval", lambda: Outcome({}, None), config={}, inputs=(), outputs=())
    checks.check_servers(open_run(config(**servers)), [])
    assert server.asked == []


def test_a_server_that_no_round_needs_is_not_asked(config, server):
    checks.check_servers(open_run(config(models=1, self_instruction__endpoint=served(server, "writer"))), [])
    assert server.asked == []


def test_too_few_short_human_prompts_are_missed_before_anything_is_trained(config):
    run = open_run(config(max_prompt_tokens=24))
    with pytest.raises(
        BadConfig, match=r"at most config\.max_prompt_tokens \(24\) tokens: \d: self-instruction shows 8"
    ):
        seeding.split_seed(run)


def test_a_generator_that_cannot_be_read_is_missed_before_anything_is_made(
    config, stories260k, llama2_folder, tmp_path
):
    (tmp_path / "empty").mkdir()
    cut, short, odd, other = (copied(stories260k / "hf", tmp_path / name) for name in ("cut", "short", "odd", "other"))
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:-1])
    numbers = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps(numbers | {"num_hidden_layers": 6}))
    (odd / "config.json").write_text(json.dumps(numbers | {"model_type": "mistral"}))
    (other / "tokenizer.model").write_bytes((llama2_folder / "tokenizer.model").read_bytes())
    for writer, problem in (
        (tmp_path / "empty", r".*empty holds no model"),
        (cut, r".*model\.safetensors is no whole safetensors file"),
        (short, r".*model\.layers\.5\.input_layernorm\.weight is missing.* and 6 more"),
        (odd, r".*model_type is 'mistral', which is another model"),
        (other, r"the tokenizer has 32000 ids and the model 512"),
        ("some/model", r".*'some/model' is neither 'current', .*, nor a folder; if it is the name of a model on a hub"),
    ):
        run = open_run(config(self_instruction__generator=str(writer)))
        with pytest.raises(BadConfig, match=rf"^config\.self_instruction\.generator: {problem}") as raised:
            checks.check(run, [])
        assert len(str(raised.value).replace(str(tmp_path), "")) < 400
        assert not (tmp_path / "run").exists()
    # Where nobody asks it, it need not be there.
    checks.check(open_run(config(models=1, self_instruction__generator=str(cut))), [])


# --- lengths ----------------------------------------------------------------------------------------------------------


def test_answers_that_the_judge_could_not_see_whole_are_left_out_and_counted(config, tmp_path):
    run = open_run(config())
    seeding.split_seed(run)
    fitting, too_long = judging.ranked_prompts(run, "eft_train")
    assert len(fitting) + too_long == 14 and fitting and too_long
    for prompt in fitting:
        for response in prompt.responses:
            text = paper_rubric().template.replace("<INSTRUCTION_HERE>", prompt.prompt)
            text = text.replace("<RESPONSE_HERE>", response)
            assert len(encode_prompt(run.tokenizer, LLAMA2, text)) + 12 <= 1_500


def test_where_no_answer_could_be_judged_the_run_stops_before_any_training(config):
    run = open_run(config(context_length=1_150, max_prompt_tokens=8, models=1, responses__max_new_tokens=16))
    with pytest.raises(
        EmptyStage, match=r"none of 14 prompts of eft_train can be judged in config\.context_length 1150"
    ):
        seeding.split_seed(run)


# --- who speaks -------------------------------------------------------------------------------------------------------


def test_a_writer_from_elsewhere_speaks_with_its_own_weights_and_tokenizer(config, stories260k):
    run = open_run(config(self_instruction__generator=str(stories260k / "meta")))
    writer = answering._prompt_writer(run, "m1", "m2/prompts")
    assert isinstance(writer, ModelGenerate)
    training.make_base(run)
    requests = [Request(id="a", prompts=("Once upon a time",), chat=False)]
    assert writer(requests, GREEDY, print) == run.generate("m0", "other")(requests, GREEDY, print)


def mixed(folder):
    """The model in a folder with its norms in float32 and the rest in bfloat16."""
    found = {}
    for name, tensor in sources.hugging_face(epath.Path(folder)).items():
        dtype = "float32" if "norm" in name else "bfloat16"
        numbers = tensor.whole().astype(jax.numpy.dtype(dtype))
        found[name] = sources.Tensor(tensor.shape, dtype, lambda index, numbers=numbers: numbers[index])
    sources.write_safetensors(folder / "model.safetensors", found)
    return folder


def test_a_writer_of_several_types_computes_in_that_of_most_parameters(config, stories260k, tmp_path):
    folder = mixed(copied(stories260k / "hf", tmp_path / "model"))
    run = open_run(config(self_instruction__generator=str(folder), model__path=str(folder)))
    writer = answering._prompt_writer(run, "m1", "m2/prompts")
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(writer.model)} == {"bfloat16"}
    assert writer.model.config.compute_dtype == "bfloat16"
    ((completions,),) = writer([Request(id="a", prompts=("Once upon a time",), chat=False)], GREEDY, print)
    assert completions[0].text
    training.make_base(run)  # in config.model.param_dtype, as every model that is trained
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(run.to_train("m0"))} == {"float32"}


def test_a_writer_need_not_know_the_marks_of_this_run_s_chat_format(config, stories260k):
    run = open_run(config(self_instruction__generator=str(stories260k / "hf")))
    run = dataclasses.replace(run, settings=dataclasses.replace(run.settings, chat="chatml"))
    writer = answering._prompt_writer(run, "m1", "m2/prompts")
    assert writer([Request(id="a", prompts=("Once upon a time",), chat=False)], GREEDY, print)


def test_a_server_stands_in_for_the_writer_alone(config, server):
    run = open_run(config(self_instruction__endpoint=served(server, "chat-70b"), self_instruction__generator=None))
    checks.check(run, [])  # which misses no generator
    writer = answering._prompt_writer(run, "m1", "m2/prompts")
    assert isinstance(writer, EndpointGenerate)
    assert [path for path, *_ in server.asked] == ["/v1/completions"]  # a look at the server
    server.asked.clear()
    writer([Request(id="a", prompts=("Come up with a series of tasks:",), chat=False)], GREEDY, lambda *_: None)
    ((path, _, fields),) = server.asked
    assert (path, fields["model"]) == ("/v1/completions", "chat-70b")


def test_a_server_is_asked_for_this_run_s_models_by_name(config, server):
    run = open_run(config(endpoint=served(server, "srlm-{name}")))
    run.generate("m1", "m2/responses")([Request(id="a", prompts=("hi",), chat=True)], GREEDY, lambda *_: None)
    assert server.asked[0][2]["model"] == "srlm-m1"


def test_where_a_server_is_and_how_patiently_it_is_asked_makes_no_stage_stale(config, server):
    one, other = (open_run(config(endpoint=served(server, "{name}") | {"timeout_s": t})) for t in (5.0, 6.0))
    assert one.config(*one.SAMPLING) == other.config(*other.SAMPLING)
    assert one.config("endpoint")["config.endpoint.model"] == "{name}"


# --- validation -------------------------------------------------------------------------------------------------------


def enter(run, *names):
    for name in names:
        run.ledger.run(name, lambda: Outcome({}, None), config={}, inputs=(), outputs=())


def test_validation_answers_are_judged_by_the_server_and_by_nobody_else(config, server, monkeypatch, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"question {i}"}) + "\n" for i in range(5)))
    run = open_run(config(validation__prompts_file=str(prompts), validation__endpoint=served(server, "judge")))
    seeding.split_seed(run)
    enter(run, "m0/train")

    def generate(requests, params, report):
        assert params.samples == 1 or not any(prompt.startswith("question") for r in requests for prompt in r.prompts)
        one = lambda i: Completion(text=f"answer {i}. Score: {i % 6}", tokens=3 + i % 2, finished=True)
        return [tuple(tuple(map(one, range(params.samples))) for _ in request.prompts) for request in requests]

    monkeypatch.setattr(type(run), "generate", lambda run, name, stage: generate)
    monkeypatch.setattr(evaluation, "human_loss", lambda run, name: {})  # there is no model
    evaluation.evaluate(run, "m0")
    metrics = jsonl.read_json(tmp_path / "run" / "m0" / "eval" / "metrics.json")
    asked = [fields["messages"][0]["content"] for _, _, fields in server.asked]
    assert len(asked) == 5 and all("answer 0" in prompt for prompt in asked)
    wanted = np.mean([points(prompt, sample) for prompt in asked for sample in range(3)])
    assert metrics["validation_score"]["value"] == pytest.approx(wanted)
    assert metrics["validation_score"]["n"] == 5
    assert metrics["response_tokens"]["value"] == 3
    assert "oracle_score" not in metrics


def test_a_validation_prompt_that_is_too_long_is_named(config, tmp_path, monkeypatch):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "word " * 200, "id": "long"}) + "\n")
    run = open_run(config(validation__prompts_file=str(prompts)))
    with pytest.raises(BadConfig, match=r"^config\.validation\.prompts_file: prompt 'long' has .*max_prompt_tokens"):
        evaluation._validation_metrics(run, "m0", "m0/eval")


# --- all of it --------------------------------------------------------------------------------------------------------


@pytest.fixture
def command(few, command_environment):
    """`command(2, endpoint__model="m")`: the main command on one device; its status, what it printed, its last line."""

    def run(models, **changes):
        flags = [f"--config.{name.replace('__', '.')}={value}" for name, value in (few | LIGHT | changes).items()]
        done = subprocess.run(
            [sys.executable, "-m", "srlm_jax.main", f"--config=configs/iter{models}.py:llama2_7b", *flags],
            cwd=ROOT, env=command_environment, capture_output=True, text=True, timeout=900,
        )  # fmt: skip
        return done.returncode, done.stdout, done.stderr.strip().split("\n")[-1]

    return run


@pytest.mark.slow
def test_a_model_that_cannot_judge_stops_where_its_judgements_are_needed(command, tmp_path):
    status, printed, error = command(3)
    assert status == 1
    assert "260,032 parameters" in printed
    assert "warning: config.context_length is 1,500, and this model was made for texts of 512 tokens" in printed
    assert error.startswith("error: eft/judgements: judged by the SFT baseline, 0 % of ")
    assert "config.judging.prefix='Score: '" in error and error.endswith("add --redo=eft/judgements,m0/eval,sft/eval")
    # What was done until then stays, and the same command comes to the same place at once.
    done = {path.stem for path in (tmp_path / "run" / "ledger").glob("*.json")}
    assert done == {"seed", "m0.train", "m0.eval", "sft.train", "sft.eval", "eft.judgements"}
    assert command(3)[2] == error


@pytest.mark.slow
def test_with_a_server_that_can_the_whole_algorithm_runs_on_it(command, server, tmp_path):
    status, printed, error = command(
        2, **{f"endpoint__{name}": value for name, value in served(server, "{name}").items() if value}
    )
    assert status == 0, error
    assert "pairwise" in printed
    run, names = tmp_path / "run", ("m0", "sft", "m1", "m2")
    assert {fields["model"] for _, _, fields in server.asked if fields is not None} == {*names}
    lines = (run / "m2" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]
    hashes = {jsonl.read_json(run / name / "checkpoint" / "manifest.json")["hash"] for name in names}
    assert len(hashes) == 4
    assert all(len(answer.completions) == 4 for answer in jsonl.read(run / "m2" / "responses", Responses))
    eft = jsonl.read(run / "eft" / "examples", Example)
    assert eft and all(example.prompt.startswith("Review the user's question") for example in eft)
    assert "no round has exact scores" in (run / "report.html").read_text()
    assert not (run / "world").exists()
