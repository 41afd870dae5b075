"""Two processes and work for one: every stage that deals its records out has a single file, or none at all."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from xla_flags import xla_flags

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
STAGES = """
import contextlib, sys
import jax
from configs.base import get_config
from srlm_jax.model import llama
from srlm_jax.parallel import hosts, mesh, rules
from srlm_jax.pipeline import answering, evaluation, judging, seeding, training
from srlm_jax.pipeline.ledger import EmptyStage, Outcome
from srlm_jax.pipeline.run import make_run
from srlm_jax.pipeline.settings import read
from srlm_jax.records import PreferencePair, Prompt
from srlm_jax.storage import checkpoint, jsonl

address, process, workdir = sys.argv[1:]
config = get_config("smoke", 2)
config.update({"workdir": workdir, "coordinator": address, "processes": 2, "process": int(process)})
config.update({"shard_prompts": 1_000, "start_timeout_s": 100})
config.model.update({"D": 32, "L": 1, "F": 32})
config.engine.rows = 8
config.world.update({"documents": 10, "trees": 40, "held_out": 3})
config.seed_data.rules.update({"ift_prompts": 20, "eft_train_prompts": 3, "eft_eval_prompts": 3})
config.self_instruction.update({"prompts": 1, "max_candidates": 2, "batch": 1})
for part in (config.self_instruction.sampling, config.responses, config.judging):
    part.max_new_tokens = 4

settings = read(config.to_dict())
mesh.start(settings.coordinator, settings.processes, settings.process, settings.start_timeout_s)
run = make_run(settings, "test")
seeding.make_world(run)
seeding.split_seed(run)

shapes = settings.model.llama
places = rules.model_shardings(run.train_mesh, rules.TRAIN, llama.abstract(shapes))
model = jax.jit(lambda key: llama.init(shapes, key), out_shardings=places)(jax.random.key(0))
for name in ("sft", "m1"):
    checkpoint.save_model(run.workdir / name / "checkpoint", model, {})
run.write(run.workdir / "m2" / "prompts" / "00000.jsonl", [Prompt(id="0", text="what", origin="seed")])
pair = PreferencePair(
    id="0", prompt="what", chosen="this", rejected="that", chosen_finished=True, rejected_finished=True,
    chosen_score=4.0, rejected_score=1.0,
)
run.write(run.workdir / "m2" / "pairs" / "00000.jsonl", [pair])
for name in ("sft/train", "m1/train", "m2/prompts", "m2/pairs"):
    run.ledger.run(name, lambda: Outcome({}, None), config={}, inputs=(), outputs=())

written = []
def write(path, records, was=jsonl.write):
    written.append(str(path.relative_to(run.workdir)))
    was(path, records)
jsonl.write = write

def stage(what, *arguments):
    try:
        what(*arguments)
    except EmptyStage:  # a model that has not learned anything
        hosts.barrier("nothing came of it")

stage(judging.judge_ranked, run)
stage(evaluation.evaluate, run, "m1")
stage(answering.respond, run, "m2", "m1")
stage(judging.judge_responses, run, "m2", "m1")
stage(training.reference_logprobs, run, "m2", "m1")
stage(answering.create_prompts, run, "m3", "m1")
nothing = judging.judge_all(run, "m1", "none", [], "none", by_expected=False)
print(process, nothing, *sorted(written), file=sys.stderr)
"""


def test_a_process_that_has_nothing_to_do_in_a_stage_holds_up_none(tmp_path):
    with socket.create_server(("localhost", 0)) as server:
        address = f"localhost:{server.getsockname()[1]}"
    job = [
        subprocess.Popen(
            [sys.executable, "-c", STAGES, address, str(number), str(tmp_path)],
            cwd=ROOT, env=os.environ | {"XLA_FLAGS": xla_flags()},
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for number in range(2)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=500)[1] for process in job]
    finally:
        for process in job:
            process.kill()
    assert [process.returncode for process in job] == [0, 0], said
    files = (
        "eft/judgements", "m1/eval/judgements", "m1/eval/responses", "m2/judgements", "m2/reference", "m2/responses",
        "m3/candidates",
    )  # fmt: skip
    files = sorted([*(f"{stage}/00000.jsonl" for stage in files), "m1/eval/oracle.jsonl", "m3/candidates/00001.jsonl"])
    assert said[0].splitlines()[-1] == f"0 [] {' '.join(files)}"
    assert said[1].splitlines()[-1] == "1 []"
