"""transformers as a sampler: `generate` in batches, and `generate_batch`, its continuous batching."""

import functools
import os
import time

import numpy as np
import torch
import transformers
from talk import Talk, batches, timed

_PAD = 0


class Limits(transformers.StoppingCriteria):
    """Each row ends with its own number of new tokens."""

    def __init__(self, start: int, limits: torch.Tensor):
        self.start, self.limits = start, limits

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids.shape[1] - self.start >= self.limits


def open_model(job: dict):
    """The model of the job's folder, on its device, to sample from."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        job["folder"], dtype=getattr(torch, job["dtype"]), attn_implementation="sdpa"
    )
    return model.to(job["device"]).eval()


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def versions() -> dict[str, str]:
    return {"torch": torch.__version__, "transformers": transformers.__version__}


def _config(draw: dict, samples: int, most: int) -> transformers.GenerationConfig:
    # top_k 0: transformers draws from the 50 most probable tokens unless told otherwise.
    how = {"do_sample": False}
    if draw["temperature"] > 0:
        how = {"do_sample": True, "temperature": draw["temperature"], "top_p": draw["top_p"], "top_k": 0}
    return transformers.GenerationConfig(
        max_new_tokens=most, num_return_sequences=samples, pad_token_id=_PAD, eos_token_id=None, **how
    )


def generate(model, prompts: list[list[int]], limits: list[list[int]], draw: dict, rows: int) -> list[list[list[int]]]:
    """As many prompts at a time as give `rows` rows, those of like length together, padded on the left."""
    samples = len(limits[0])
    # A trainer gives the model the tokenizer's end token, which takes the place of one that is None.
    model.generation_config.eos_token_id = None
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    found: list = [None] * len(prompts)
    for part in batches(len(prompts), max(1, rows // samples)):
        chosen = [order[i] for i in part]
        width = max(len(prompts[i]) for i in chosen)
        ids = torch.tensor([[_PAD] * (width - len(prompts[i])) + prompts[i] for i in chosen], device=model.device)
        mask = torch.tensor([[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in chosen])
        wanted = torch.tensor([limit for i in chosen for limit in limits[i]], device=model.device)
        out = model.generate(
            ids,
            attention_mask=mask.to(model.device),
            generation_config=_config(draw, samples, int(wanted.max())),
            stopping_criteria=[Limits(width, wanted)],
        )
        new = out[:, width:].tolist()
        for row, i in enumerate(chosen):
            found[i] = [new[row * samples + c][:limit] for c, limit in enumerate(limits[i])]
    return found


def generate_batch(model, prompts, limits, draw: dict, rows: int) -> list[list[list[int]]]:
    """Continuous batching: each sample is a request with its own limit; requests share what begins alike, by pages."""
    config = _config(draw, 1, max(max(row) for row in limits))
    config.eos_token_id = -1
    settings = transformers.ContinuousBatchingConfig(max_requests_per_batch=rows, page_size=32)
    settings = _sized(settings, prompts, limits, rows) if model.device.type == "cpu" else settings
    manager = model.init_continuous_batching(generation_config=config, continuous_batching_config=settings)
    manager.start()
    try:
        wanted = {}
        for i, (prompt, row) in enumerate(zip(prompts, limits, strict=True)):
            for c, limit in enumerate(row):
                name = f"{i}-{c}"
                manager.add_request(list(prompt), request_id=name, max_new_tokens=limit, eos_token_id=-1)
                wanted[name] = (i, c)
        found: list = [[None] * len(row) for row in limits]
        left, since = len(wanted), time.monotonic()
        while left:
            result = manager.get_result(timeout=1)
            if result is None:
                if not manager.is_running() or time.monotonic() - since > 600:
                    raise RuntimeError("generate_batch stopped before its requests were done")
                continue
            if result.error:
                raise RuntimeError(f"generate_batch: {result.error}")
            if result.is_finished():
                i, c = wanted[result.request_id]
                found[i][c] = list(result.generated_tokens)
                left, since = left - 1, time.monotonic()
    finally:
        manager.stop(block=True)
    return found


def _sized(settings, prompts, limits, rows: int):
    """On a CPU the cache is not sized by what memory is free: room for `rows` of the longest."""
    most = max(len(prompt) for prompt in prompts) + max(max(row) for row in limits)
    settings.num_blocks = rows * (-(-most // settings.page_size) + 1)
    settings.max_batch_tokens = 512
    return settings


METHODS = {"generate": generate, "generate_batch": generate_batch}


def check(model, question: dict) -> dict:
    """Greedy continuations by the method that is to be timed, and the logits that led to the tokens asked about."""
    greedy = {"temperature": 0.0, "top_p": 1.0}
    limits = [[question["steps"]] for _ in question["prompts"]]
    ids = METHODS[question["method"]](model, question["prompts"], limits, greedy, len(limits))
    logits = []
    with torch.no_grad():
        for prompt, forced in zip(question["prompts"], question["forced"], strict=True):
            tokens = torch.tensor([prompt + forced[:-1]], device=model.device)
            logits.append(model(tokens).logits[0, len(prompt) - 1 :].float().cpu().numpy())
    np.save(question["out"], np.stack(logits))
    return {"ids": [rows[0] for rows in ids]}


def main() -> None:
    talk = Talk()
    model = open_model(talk.ask())
    talk.answer(versions=versions())
    while (question := talk.ask()) is not None:
        if question["do"] == "check":
            talk.answer(**check(model, question))
            continue
        asked = [question[name] for name in ("prompts", "limits", "draw", "rows")]
        found, took = timed(functools.partial(METHODS[question["method"]], model, *asked), wait)
        complete = [[len(ids) for ids in row] for row in found] == question["limits"]
        talk.answer(**took, complete=complete)


if __name__ == "__main__":
    main()
