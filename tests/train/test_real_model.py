"""Ten steps of SFT and of DPO on a real model are those of a plain PyTorch loop, step by step.

The model is SmolLM2-135M-Instruct as a Hugging Face folder in float32, the texts are short answers of Open Assistant.
Each case takes some minutes on one core:

    SRLM_SMOLLM2=/path/to/folder XLA_FLAGS= pytest tests/train/test_real_model.py -m long -s
"""

import json
import math
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from srlm_jax.data import batches
from srlm_jax.data.batches import PairRow, Row
from srlm_jax.data.packing import Packing
from srlm_jax.model import llama, lora, weights
from srlm_jax.model.lora import LoraConfig
from srlm_jax.parallel import rules
from srlm_jax.text.chat import CHATML, encode_prompt, encode_response
from srlm_jax.text.tokenizer import load_tokenizer
from srlm_jax.train.objectives import DpoObjective, SftObjective
from srlm_jax.train.optimizer import OptimizerConfig
from srlm_jax.train.step import init_optimizer, make_train_step

pytestmark = [pytest.mark.long, pytest.mark.parity]

STEPS, EXAMPLES, PAIRS, BETA = 10, 4, 2, 0.1
LONGEST = 48  # tokens of a prompt, and of an answer
OPTIMIZER = OptimizerConfig(
    learning_rate=2e-5, end_learning_rate=4e-6, warmup_steps=2, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1,
    clip_norm=1.0,
)  # fmt: skip
LORA = LoraConfig(rank=8, alpha=16.0)
LINEAR = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
          "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}  # fmt: skip


@pytest.fixture(scope="module")
def folder():
    if not os.environ.get("SRLM_SMOLLM2"):
        pytest.skip("SRLM_SMOLLM2 does not name the folder of SmolLM2-135M-Instruct")
    return os.environ["SRLM_SMOLLM2"]


@pytest.fixture(scope="module")
def mesh(one_device):
    return one_device("data", "fsdp", "tensor")


@pytest.fixture(scope="module")
def load(folder, mesh):
    config = weights.read_config(epath.Path(folder), param_dtype="float32", compute_dtype="float32", remat="dots")
    places = rules.model_shardings(mesh, rules.TRAIN, llama.abstract(config))
    return lambda: weights.load(epath.Path(folder), config, places)


@pytest.fixture(scope="module")
def ranked(folder, shared_data):
    """The best and the worst answer to each prompt, as token ids, where all of them are short."""
    tokenizer = load_tokenizer(folder)
    lines = shared_data("oasst/oasst1_en-validation.jsonl").read_text(encoding="utf-8").splitlines()
    messages = {line["message_id"]: line for line in map(json.loads, lines)}
    answers = {}
    for line in messages.values():
        asked = messages.get(line["parent_id"])
        if asked is not None and asked["parent_id"] is None and line.get("rank") is not None:
            answers.setdefault(asked["message_id"], []).append(line)
    found = []
    for asked, replies in answers.items():
        best, *_, worst = sorted(replies, key=lambda line: line["rank"]) if len(replies) > 1 else (None, None)
        if best is None:
            continue
        prompt = encode_prompt(tokenizer, CHATML, messages[asked]["text"])
        # The rest of a long answer is left out, as a length limit leaves it out.
        both = [encode_response(tokenizer, CHATML, line["text"], finished=True)[:LONGEST] for line in (best, worst)]
        if len(prompt) <= LONGEST and both[0] != both[1]:
            found.append(tuple(Row((*prompt, *answer), len(prompt)) for answer in both))
    assert len(found) >= STEPS * EXAMPLES
    return found


def packing(lengths, size):
    return Packing(
        lengths=np.asarray(lengths), batch_size=size, accumulate=1, most=4 * LONGEST, length_multiple=16,
        rows_multiple=1, seed=0,
    )  # fmt: skip


# --- the plain loop ---------------------------------------------------------------------------------------------------


class Plain:
    """transformers' forward, torch's AdamW, one document at a time."""

    def __init__(self, folder, adapters):
        import torch
        from transformers import AutoModelForCausalLM

        self.torch = torch
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
        self.model.eval()  # it has no dropout; nothing else differs
        if adapters is None:
            trained = list(self.model.named_parameters())
        else:
            self.model.requires_grad_(False)
            trained = self._adapt(adapters)
        norms = [weight for name, weight in trained if "norm" in name]
        others = [weight for name, weight in trained if "norm" not in name]
        self.trained = norms + others
        groups = [{"params": norms, "weight_decay": 0.0}] if norms else []
        groups.append({"params": others, "weight_decay": OPTIMIZER.weight_decay})
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(OPTIMIZER.b1, OPTIMIZER.b2), eps=OPTIMIZER.eps)

    def _adapt(self, adapters):
        torch, trained, scale = self.torch, [], LORA.alpha / LORA.rank
        for index, layer in enumerate(self.model.model.layers):
            for ours, theirs in LINEAR.items():
                linear, adapter = layer.get_submodule(theirs), getattr(adapters, ours)
                a = torch.nn.Parameter(torch.tensor(np.asarray(adapter.a[index]).reshape(-1, LORA.rank)))
                b = torch.nn.Parameter(torch.tensor(np.asarray(adapter.b[index]).reshape(LORA.rank, -1)))
                linear.register_forward_hook(lambda _, x, out, a=a, b=b: out + scale * (x[0] @ a @ b))
                linear.adapter = (a, b)
                trained += [(f"{theirs}.a", a), (f"{theirs}.b", b)]
        return trained

    def logprob(self, row):
        ids = self.torch.tensor([row.ids])
        logits = self.model(ids).logits[0, row.loss_from - 1 : -1]
        answer = ids[0, row.loss_from :]
        return logits.log_softmax(-1).gather(-1, answer[:, None]).sum()

    def step(self, step, losses):
        """One update by losses, each a function, whose gradients add up; their sum and the gradient's norm."""
        total = 0.0
        for loss in losses:
            value = loss()
            value.backward()
            total += value.item()
        norm = self.torch.nn.utils.clip_grad_norm_(self.trained, OPTIMIZER.clip_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total, norm.item()

    def weights(self):
        found = {name: weight.detach().numpy() for name, weight in self.model.named_parameters()}
        for index, layer in enumerate(self.model.model.layers):
            for theirs in LINEAR.values():
                linear = layer.get_submodule(theirs)
                if hasattr(linear, "adapter"):
                    a, b = (x.detach() for x in linear.adapter)
                    added = (LORA.alpha / LORA.rank * (a @ b).T).numpy()
                    found[f"model.layers.{index}.{theirs}.weight"] = linear.weight.numpy() + added
        return found


def learning_rate(step):
    """Linear to the peak, of which the first step has a share; then a cosine to the end."""
    c = OPTIMIZER
    if step < c.warmup_steps:
        return c.learning_rate * (step + 1) / (c.warmup_steps + 1)
    share = (step - c.warmup_steps) / (STEPS - 1 - c.warmup_steps)
    return c.end_learning_rate + (c.learning_rate - c.end_learning_rate) * (1 + math.cos(math.pi * share)) / 2


@pytest.fixture(scope="module")
def start(folder):
    """The weights before training."""
    return Plain(folder, None).weights()


def new_adapters(load, mesh):
    adapters, _ = lora.split(load(), LORA, jax.random.key(7), mesh)
    return adapters


@pytest.fixture(scope="module", params=["sft", "dpo"])
def kind(request):
    return request.param


@pytest.fixture(scope="module", params=[None, LORA], ids=["all weights", "adapters"])
def adapted(request):
    return request.param


@pytest.fixture(scope="module")
def packed(kind, ranked, folder):
    """The ten batches, packed."""
    if kind == "sft":
        rows = [best for best, _ in ranked][: STEPS * EXAMPLES]
        return list(batches.packed_batches(rows, packing([[row.length] for row in rows], EXAMPLES), STEPS))
    reference, pairs = Plain(folder, None), []
    with reference.torch.no_grad():
        for both in ranked[: STEPS * PAIRS]:
            pairs.append(PairRow(*both, *(reference.logprob(row).item() for row in both)))
    lengths = [[row.length for row in both] for both in ranked[: STEPS * PAIRS]]
    return list(batches.packed_pairs(pairs, packing(lengths, PAIRS), STEPS))


@pytest.fixture(scope="module")
def wanted(kind, adapted, packed, folder, load, mesh):
    """Losses, gradient norms and final weights of the plain loop."""
    plain = Plain(folder, None if adapted is None else new_adapters(load, mesh))
    torch, steps = plain.torch, []
    for step, batch in enumerate(packed):
        if kind == "sft":
            rows = batches.unpacked(batch)
            tokens = sum(len(row.ids) - row.loss_from for row in rows)
            losses = [lambda row=row, tokens=tokens: -plain.logprob(row) / tokens for row in rows]
        else:
            rows = batches.unpacked(batch.rows)

            def of_pair(i, batch=batch, rows=rows):
                chosen, rejected = plain.logprob(rows[i]), plain.logprob(rows[PAIRS + i])
                margin = (chosen - float(batch.ref_chosen_P[i])) - (rejected - float(batch.ref_rejected_P[i]))
                return -torch.nn.functional.logsigmoid(BETA * margin) / PAIRS

            losses = [lambda i=i, of_pair=of_pair: of_pair(i) for i in range(PAIRS)]
        steps.append(plain.step(step, losses))
    return np.asarray(steps), plain.weights()


def unpack(batch):
    """The same batch, a row for each document."""
    if isinstance(batch, batches.PairBatch):
        rows = batches.unpacked(batch.rows)
        return batch._replace(rows=batches.token_batch(rows, 2 * LONGEST))
    return batches.token_batch(batches.unpacked(batch), 2 * LONGEST)


@pytest.mark.parametrize("layout", ["packed", "unpacked"])
def test_ten_steps_are_those_of_a_plain_loop(kind, adapted, layout, packed, wanted, start, load, mesh):
    model = load()
    trainable, frozen = lora.split(model, adapted, jax.random.key(7), mesh)
    sft, dpo = SftObjective(dropout=0.0, logprob_chunk=64), DpoObjective(beta=BETA, logprob_chunk=64)
    train_step, tx = make_train_step(sft if kind == "sft" else dpo, OPTIMIZER, STEPS, 1)
    state, steps = init_optimizer(tx, trainable, mesh), []
    with jax.set_mesh(mesh):
        for batch in packed if layout == "packed" else map(unpack, packed):
            on_device = jax.tree.map(jnp.asarray, batch)
            trainable, state, metrics = train_step(trainable, state, frozen, on_device, jax.random.key(0))
            steps.append((float(metrics["loss"]), float(metrics["gradient_norm"])))
    del state
    trained = lora.merge(trainable, frozen)
    losses, norms = np.abs(np.asarray(steps) - wanted[0]).T
    norms /= wanted[0][:, 1]
    # How far the weights are apart, against how far the training moved them.
    apart = moved = largest = 0.0
    for name, tensor in weights.hf_tensors(trained).items():
        ours, theirs = tensor.whole(), wanted[1][name]
        apart += float(np.sum(np.square(ours - theirs, dtype=np.float64)))
        moved += float(np.sum(np.square(theirs - start[name], dtype=np.float64)))
        largest = max(largest, float(np.max(np.abs(ours - theirs))))
    share = math.sqrt(apart / moved)
    print(
        f"\n{kind}, {'adapters' if adapted else 'all weights'}, {layout}: losses {wanted[0][0, 0]:.4f} to "
        f"{wanted[0][-1, 0]:.4f}, apart at most {losses.max():.1e}; gradient norms {norms.max():.1e} of themselves; "
        f"weights {largest:.1e} at most, {share:.1e} of the way they went"
    )
    assert losses.max() < 1e-3
    assert norms.max() < 1e-3
    assert share < 1e-2
