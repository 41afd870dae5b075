"""transformers under plain PyTorch: forward, backward, clip, AdamW, on batches padded to their longest document."""

import torch
from talk import Talk, batches, timed
from torch_sampling import open_model, versions, wait

_PAD = 0


def padded(documents: list[dict], device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids, which of them are no padding, and targets (-100 where there is no loss) of a batch."""
    width = max(len(d["prompt"]) + len(d["answer"]) for d in documents)
    ids = [d["prompt"] + d["answer"] for d in documents]
    fill = [width - len(row) for row in ids]
    tokens = [row + [_PAD] * n for row, n in zip(ids, fill, strict=True)]
    mask = [[1] * len(row) + [0] * n for row, n in zip(ids, fill, strict=True)]
    targets = [[-100] * len(d["prompt"]) + d["answer"] + [-100] * n for d, n in zip(documents, fill, strict=True)]
    return tuple(torch.tensor(x, device=device) for x in (tokens, mask, targets))


def logprobs(model, documents: list[dict]) -> list[float]:
    """Of each document's answer."""
    found = []
    with torch.no_grad():
        for document in documents:
            tokens, mask, targets = padded([document], model.device)
            logits = model(tokens, attention_mask=mask).logits[:, :-1].float()
            wanted = targets[:, 1:]
            taken = torch.log_softmax(logits, -1).gather(-1, wanted.clamp(min=0)[..., None])[..., 0]
            found.append(float((taken * (wanted >= 0)).sum()))
    return found


def main() -> None:
    talk = Talk()
    job = talk.ask()
    model = open_model(job)
    if job["device"] != "cpu":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.config.use_cache = False
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    talk.answer(versions=versions())

    def train() -> None:
        model.train()
        for part in batches(len(job["work"]), job["batch"]):
            tokens, mask, targets = padded([job["work"][i] for i in part], model.device)
            model(tokens, attention_mask=mask, labels=targets).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    while (question := talk.ask()) is not None:
        if question["do"] == "check":
            talk.answer(logprobs=logprobs(model, job["work"][: question["count"]]))
        else:
            talk.answer(**timed(train, wait)[1])


if __name__ == "__main__":
    main()
