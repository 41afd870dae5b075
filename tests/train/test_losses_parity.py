"""The preference losses against TRL's own code, on the same numbers and through a whole model."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from srlm_jax.data.batches import PairBatch, Row, packed_batch
from srlm_jax.data.packing import Shape
from srlm_jax.train import losses
from srlm_jax.train.objectives import DpoObjective, response_logprobs

pytestmark = pytest.mark.parity

BETA = 0.1


@pytest.fixture(scope="module")
def torch():
    import torch

    return torch


@pytest.fixture(scope="module")
def trl_loss(torch):
    """TRL's DPO loss of log-probabilities of whole answers, and its gradient with respect to the policy's.

    Its own method runs on a stand-in for the trainer. Every answer is one token long, so that a token's
    log-probability is its answer's, and dividing by the length (which TRL does for IPO) changes nothing.
    """
    import collections

    from trl import DPOTrainer

    accelerator = types.SimpleNamespace(
        device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x, unwrap_model=lambda model: model
    )

    def run(kind, pairs, label_smoothing=0.0):
        chosen, rejected, ref_chosen, ref_rejected = (torch.tensor(np.asarray(x, np.float64)) for x in pairs)
        policy = torch.cat([chosen, rejected]).requires_grad_()
        P = len(policy)

        def model(**inputs):
            nothing = torch.zeros(P, 1)
            return types.SimpleNamespace(
                log_probs=policy[:, None], entropy=nothing, mean_logits=nothing, is_top1=nothing.bool()
            )

        model.training = True
        trainer = types.SimpleNamespace(
            accelerator=accelerator, model=model, aux_loss_enabled=False, ld_alpha=None, precompute_ref_logps=True,
            f_divergence_type="reverse_kl", beta=BETA, label_smoothing=label_smoothing, loss_types=[kind],
            loss_weights=[1.0], use_weighting=False, _metrics={"train": collections.defaultdict(list)},
            _total_train_tokens=0, _tp_size=1, args=types.SimpleNamespace(gradient_checkpointing_kwargs=None),
        )  # fmt: skip
        inputs = {
            "input_ids": torch.ones(P, 2, dtype=torch.long),
            "attention_mask": torch.ones(P, 2, dtype=torch.long),
            "completion_mask": torch.tensor([[0, 1]] * P),
            "ref_chosen_logps": ref_chosen,
            "ref_rejected_logps": ref_rejected,
        }
        loss = DPOTrainer._compute_loss(trainer, model, inputs, return_outputs=False)
        loss.backward()
        return float(loss.detach()), policy.grad.numpy()

    return run


def random_pairs(pairs):
    return np.random.default_rng(0).uniform(-60, -1, (4, pairs)).astype(np.float32)


def assert_same(ours, pairs, theirs):
    mean = lambda policy: ours(*jnp.split(policy, 2), *map(jnp.asarray, pairs[2:])).mean()
    loss, gradient = jax.value_and_grad(mean)(jnp.concatenate(list(map(jnp.asarray, pairs[:2]))))
    np.testing.assert_allclose(loss, theirs[0], rtol=1e-6)
    np.testing.assert_allclose(gradient, theirs[1], rtol=1e-5, atol=1e-9)


def test_dpo(trl_loss):
    pairs = random_pairs(16)
    assert_same(lambda *pairs: losses.dpo_loss(*pairs, BETA), pairs, trl_loss("sigmoid", pairs))


def test_ipo(trl_loss):
    pairs = random_pairs(16)
    assert_same(lambda *pairs: losses.ipo_loss(*pairs, BETA), pairs, trl_loss("ipo", pairs))


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 0.4])
@pytest.mark.parametrize("pair", range(4))
def test_conservative_dpo(trl_loss, label_smoothing, pair):
    # TRL smooths labels like this in its AOT loss alone, which sorts the pairs of a batch and then does the same: of
    # one pair it is conservative DPO.
    pairs = random_pairs(4)[:, pair : pair + 1]
    ours = lambda *pairs: losses.conservative_dpo_loss(*pairs, BETA, label_smoothing)
    assert_same(ours, pairs, trl_loss("aot", pairs, label_smoothing))


# A whole model: TRL's trainer on transformers' Llama, our objective on ours.

CHOSEN = [((1, 5, 6, 7, 9, 11, 2), 3), ((1, 9, 8, 2), 2)]
REJECTED = [((1, 5, 6, 30, 2), 3), ((1, 9, 12, 13, 14, 15, 16, 2), 2)]


@pytest.mark.filterwarnings("ignore:.(is_)?gradient_checkpointing. is deprecated:FutureWarning")  # TRL sets it
def test_a_whole_training_loss_and_its_gradient(tiny_llama, as_transformers, transformers_block, tmp_path):
    import datasets
    import tokenizers
    import transformers
    from trl import DPOConfig, DPOTrainer

    reference = jax.tree.map(lambda x: x + 0.05 * jnp.sin(100 * x), tiny_llama)
    # A tokenizer whose words are the ids, and the answers as text, to which TRL adds the end token.
    text = lambda ids: "".join(f"{i} " for i in ids)
    data = datasets.Dataset.from_list(
        [
            {"prompt": text(c[:n]), "chosen": text(c[n:-1]), "rejected": text(r[n:-1])}
            for (c, n), (r, _) in zip(CHOSEN, REJECTED, strict=True)
        ]
    )
    names = {"<pad>": 0, "</s>": 2} | {str(i): i for i in range(40) if i not in (0, 2)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(names, "<pad>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>")
    config = DPOConfig(
        output_dir=str(tmp_path), beta=BETA, report_to="none", use_cpu=True, per_device_train_batch_size=2,
        disable_dropout=True, bf16=False, max_length=None,
    )  # fmt: skip
    policy = as_transformers(tiny_llama)
    trainer = DPOTrainer(
        model=policy, ref_model=as_transformers(reference), args=config, train_dataset=data,
        processing_class=tokenizer,
    )  # fmt: skip
    inputs = trainer.data_collator([trainer.train_dataset[i] for i in range(2)])
    assert inputs["completion_mask"].sum(dim=1).tolist() == [4, 2, 2, 6]
    theirs = trainer.compute_loss(trainer.model, inputs)
    theirs.backward()

    documents = [Row(ids, loss_from) for ids, loss_from in CHOSEN + REJECTED]
    rows = jax.tree.map(jnp.asarray, packed_batch(documents, [[0, 1], [3, 2]], Shape(2, 12)))
    stored = jnp.split(response_logprobs(reference, rows, 4, 4), 2)
    objective = DpoObjective(beta=BETA, logprob_chunk=4)
    pairs = PairBatch(rows, *stored)
    mean = lambda model: objective(model, pairs, jax.random.key(0)).loss / 2
    loss, gradient = jax.jit(jax.value_and_grad(mean))(tiny_llama)
    assert abs(float(loss) - np.log(2)) > 1e-2  # policy and reference differ
    np.testing.assert_allclose(loss, float(theirs.detach()), rtol=1e-5)
    found = {
        "model.embed_tokens.weight": gradient.embedding[...],
        "model.norm.weight": gradient.norm[...],
        "lm_head.weight": gradient.head().T,
    }
    for layer in range(tiny_llama.config.L):
        for name, (mine, turn) in transformers_block.items():
            found[f"model.layers.{layer}.{name}"] = turn(getattr(gradient.blocks, mine)[layer])
    assert found.keys() == {name for name, _ in policy.named_parameters()}
    for name, ours in found.items():
        wanted = policy.get_parameter(name).grad.numpy()
        np.testing.assert_allclose(ours, wanted, rtol=1e-3, atol=1e-4 * np.abs(wanted).max(), err_msg=name)
