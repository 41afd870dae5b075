"""An iteration as one would write it with transformers and TRL: generate, generate as the judge, DPOTrainer."""

import contextlib
import os
import tempfile
import time

import datasets
import trl
from talk import Talk, peak_memory
from torch_sampling import generate, open_model, versions, wait
from trl_training import dpo_trainer

_END = 2


def to_sample(model) -> None:
    """What a trainer has left behind is taken back."""
    model.gradient_checkpointing_disable()
    model.config.use_cache = True
    model.eval()


def iterate(model, job: dict, folder: str) -> dict[str, float]:
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    to_sample(model)
    wait()
    marks = [time.perf_counter()]
    answers = generate(model, job["prompts"], job["limits"], job["draw"], job["rows"])
    marks.append(time.perf_counter())
    judged = [
        [*job["before"], *prompt, *answer, *job["behind"]]
        for prompt, of_prompt in zip(job["prompts"], answers, strict=True)
        for answer in of_prompt
    ]
    votes = generate(model, judged, job["judge_limits"], job["draw"], job["rows"])
    pairs = [
        {"prompt": prompt, "chosen": [*of_prompt[best][:-1], _END], "rejected": [*of_prompt[worst][:-1], _END]}
        for prompt, of_prompt, (best, worst) in zip(job["prompts"], answers, job["order"], strict=True)
    ]
    wait()
    marks.append(time.perf_counter())
    work = {"work": pairs[: job["batch"] * job["updates"]]}
    trainer = dpo_trainer(model, job | work, folder, True, max_steps=job["updates"])
    wait()
    marks.append(time.perf_counter())
    trainer.train()
    wait()
    marks.append(time.perf_counter())
    names = ("answering_seconds", "judging_seconds", "reference_seconds", "train_seconds")
    took = {name: end - start for name, start, end in zip(names, marks[:-1], marks[1:], strict=True)}
    lengths = [[len(ids) for ids in rows] for rows in (*answers, *votes)]
    if lengths != [*job["limits"], *job["judge_limits"]]:
        raise RuntimeError("rows of other lengths than were to be written")
    return {"seconds": marks[-1] - marks[0], **took, "peak_bytes": peak_memory()}


def main() -> None:
    os.environ["TQDM_DISABLE"] = "1"
    talk = Talk()
    job = talk.ask()
    model = open_model(job)
    datasets.disable_progress_bars()
    talk.answer(versions=versions() | {"trl": trl.__version__})
    while talk.ask() is not None:
        with tempfile.TemporaryDirectory() as folder:
            talk.answer(**iterate(model, job, folder))


if __name__ == "__main__":
    main()
