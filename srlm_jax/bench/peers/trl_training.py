"""TRL: SFTTrainer and DPOTrainer, stopped between two measurements by a callback that waits for the next question."""

import contextlib
import os
import tempfile
import time

import datasets
import torch
import transformers
import trl
from talk import Talk, batches, peak_memory
from tokenizers import Tokenizer, models, pre_tokenizers
from torch_sampling import open_model, versions, wait
from torch_training import logprobs

_MARKS = {0: "<pad>", 1: "<s>", 2: "</s>"}


def word(index: int) -> str:
    """The text that stands for a token id."""
    return _MARKS.get(index, f"t{index}")


def words(ids: list[int]) -> str:
    return " ".join(map(word, ids))


def tokenizer(vocabulary: int) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer for which each word is the id that it names: TRL takes text."""
    ids = {word(i): i for i in range(vocabulary)}
    whole = Tokenizer(models.WordLevel(ids, unk_token=_MARKS[0]))
    whole.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    pad, begin, end = _MARKS.values()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=whole, pad_token=pad, bos_token=begin, eos_token=end, clean_up_tokenization_spaces=False
    )


def settings(job: dict, folder: str) -> dict:
    """Arguments of either trainer. Only what makes the work the same, and what is faster than the default here."""
    cpu = job["device"] == "cpu"
    return {
        "output_dir": folder,
        "per_device_train_batch_size": job["batch"],
        "max_length": None,
        "learning_rate": 1e-6,
        "max_grad_norm": 1.0,
        "adam_beta2": 0.95,
        "bf16": job["dtype"] == "bfloat16",
        "use_cpu": cpu,
        "dataloader_pin_memory": not cpu,
        # It trades time for memory, of which a host has enough for these models.
        "gradient_checkpointing": not cpu,
        "report_to": "none",
        "logging_strategy": "no",
        "save_strategy": "no",
        "disable_tqdm": True,
    }


def dpo_trainer(model, job: dict, folder: str, first: bool, **how) -> trl.DPOTrainer:
    """A DPOTrainer on the job's pairs; `first`: the reference's log-probabilities before, not in each step."""
    config = trl.DPOConfig(**settings(job, folder), **how, beta=job["beta"], precompute_ref_log_probs=first)
    rows = [
        {"prompt": words(pair["prompt"]), **{name: " " + words(pair[name]) for name in ("chosen", "rejected")}}
        for pair in job["work"]
    ]
    return trl.DPOTrainer(
        model=model, args=config, train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer(model.config.vocab_size),
    )  # fmt: skip


def sft_trainer(model, job: dict, folder: str, **how) -> trl.SFTTrainer:
    """An SFTTrainer on the job's documents, the loss on the answers."""
    config = trl.SFTConfig(**settings(job, folder), **how, completion_only_loss=True)
    rows = [{"prompt": words(d["prompt"]), "completion": " " + words(d["answer"])} for d in job["work"]]
    return trl.SFTTrainer(
        model=model, args=config, train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer(model.config.vocab_size),
    )  # fmt: skip


def reference_pass(trainer: trl.DPOTrainer, batch: int) -> list[float]:
    """What TRL does before training: each pair's log-probabilities, chosen and rejected in turn."""
    found, rows = [], trainer.train_dataset
    keep = ("prompt_ids", "chosen_ids", "rejected_ids")
    for part in batches(len(rows), batch):
        inputs = trainer.data_collator([{name: rows[i][name] for name in keep} for i in part])
        inputs = {name: x.to(trainer.accelerator.device) for name, x in inputs.items()}
        chosen, rejected = trainer.compute_ref_log_probs(trainer.model, inputs)
        found += torch.stack([chosen, rejected], dim=1).flatten().tolist()
    return found


class Measured(transformers.TrainerCallback):
    """Runs `updates` steps for each question, and waits for the next one."""

    def __init__(self, talk: Talk, job: dict):
        self.talk, self.job, self.trainer, self.steps = talk, job, None, 0
        self.reference = job["method"] == "DPOTrainer, reference first"

    def next(self, control) -> None:
        while (question := self.talk.ask()) is not None and question["do"] == "check":
            self.talk.answer(logprobs=self.check(question["count"]))
        if question is None:
            control.should_training_stop = True
            return
        with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        self.took = {}
        wait()
        if self.reference:
            start = time.perf_counter()
            reference_pass(self.trainer, self.job["batch"])
            wait()
            self.took["reference_seconds"] = time.perf_counter() - start
        self.steps, self.start = 0, time.perf_counter()

    def check(self, count: int) -> list[float]:
        if self.reference:
            return reference_pass(self.trainer, self.job["batch"])[:count]
        return logprobs(self.trainer.model, self.job["work"][:count])

    def on_train_begin(self, args, state, control, **kwargs):
        self.next(control)

    def on_step_end(self, args, state, control, **kwargs):
        self.steps += 1
        if self.steps < self.job["updates"]:
            return
        wait()
        train = time.perf_counter() - self.start
        if self.reference:
            self.took["train_seconds"] = train
        seconds = train + self.took.get("reference_seconds", 0.0)
        self.talk.answer(**self.took, seconds=seconds, peak_bytes=peak_memory())
        self.next(control)


def main() -> None:
    os.environ["TQDM_DISABLE"] = "1"
    talk = Talk()
    job = talk.ask()
    model = open_model(job)
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        if job["command"] == "sft":
            trainer = sft_trainer(model, job, folder, max_steps=10**6)
        else:
            trainer = dpo_trainer(model, job, folder, job["method"] != "DPOTrainer", max_steps=10**6)
        callback = Measured(talk, job)
        callback.trainer = trainer
        trainer.add_callback(callback)
        talk.answer(versions=versions() | {"trl": trl.__version__})
        trainer.train()


if __name__ == "__main__":
    main()
