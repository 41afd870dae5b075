"""Tunix's sampler: batches of one length, each decoded until its longest row is done."""

import functools
import importlib.metadata
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from talk import Talk, batches, timed
from tunix.generate.sampler import CacheConfig, Sampler
from tunix.models.llama3 import model as llama
from tunix.models.llama3 import params

_PAD = 0
_NEVER = -1  # no token: no row ends before its limit


class Numbers:
    """A tokenizer for texts that are lists of token ids."""

    def encode(self, text: str, **_: object) -> list[int]:
        return [int(number) for number in text.split()]

    def decode(self, ids: list[int], **_: object) -> str:
        return " ".join(map(str, ids))

    def bos_id(self) -> int:
        return 0  # taken for none: nothing is put before a prompt

    def eos_id(self) -> int:
        return _NEVER

    def pad_id(self) -> int:
        return _PAD


def open_model(job: dict, mesh):
    """Tunix's Llama with the weights of the job's folder."""
    c = json.loads((Path(job["folder"]) / "config.json").read_text())
    theta = c.get("rope_theta") or c["rope_parameters"]["rope_theta"]
    # Tunix 0.1.7 reads `rope_theta` nowhere and turns by 1,000,000: given here, the same work on the right angles.
    llama.apply_rope = functools.partial(llama.apply_rope, rope_theta=theta)
    config = llama.ModelConfig(
        num_layers=c["num_hidden_layers"], vocab_size=c["vocab_size"], embed_dim=c["hidden_size"],
        hidden_dim=c["intermediate_size"], num_heads=c["num_attention_heads"], head_dim=c["head_dim"],
        num_kv_heads=c["num_key_value_heads"], rope_theta=theta, norm_eps=c["rms_norm_eps"],
        weight_tying=c["tie_word_embeddings"],
    )  # fmt: skip
    return params.create_model_from_safe_tensors(job["folder"], config, mesh=mesh, dtype=getattr(jnp, job["dtype"]))


def sample(model, prompts, limits, draw: dict, rows: int) -> list[list[list[int]]]:
    """`rows` rows at a time, in the order of the prompts' lengths; all samples of a prompt are rows of their own."""
    wanted = [(i, c) for i, row in enumerate(limits) for c in range(len(row))]
    wanted.sort(key=lambda row: len(prompts[row[0]]))
    found = [[None] * len(row) for row in limits]
    how = {"temperature": draw["temperature"], "top_p": draw["top_p"]} if draw["temperature"] > 0 else {}
    for part in batches(len(wanted), rows):
        chosen = [wanted[n] for n in part]
        width = max(len(prompts[i]) for i, _ in chosen)
        most = max(limits[i][c] for i, c in chosen)
        sampler = _sampler(model, width + most)
        texts = [" ".join(map(str, prompts[i])) for i, _ in chosen]
        out = sampler(texts, max_generation_steps=most, max_prompt_length=width, eos_tokens=[_NEVER], seed=0, **how)
        for (i, c), ids in zip(chosen, out.tokens, strict=True):
            found[i][c] = np.asarray(ids).tolist()[: limits[i][c]]
    return found


@functools.cache
def _sampler(model, length: int) -> Sampler:
    """Kept, because its compiled functions are its own."""
    c = model.config
    cache = CacheConfig(cache_size=length, num_layers=c.num_layers, num_kv_heads=c.num_kv_heads, head_dim=c.head_dim)
    return Sampler(model, Numbers(), cache)


def check(model, question: dict) -> dict:
    """Greedy continuations, and the logits that led to the tokens asked about."""
    greedy = {"temperature": 0.0, "top_p": 1.0}
    limits = [[question["steps"]] for _ in question["prompts"]]
    ids = sample(model, question["prompts"], limits, greedy, len(limits))
    logits = []
    for prompt, forced in zip(question["prompts"], question["forced"], strict=True):
        tokens = jnp.asarray([prompt + forced[:-1]], jnp.int32)
        T = tokens.shape[1]
        causal = jnp.tril(jnp.ones((T, T), bool))[None]
        found, _ = model(tokens, jnp.arange(T)[None], None, causal)
        logits.append(np.asarray(found[0, len(prompt) - 1 :], np.float32))
    np.save(question["out"], np.stack(logits))
    return {"ids": [rows[0] for rows in ids]}


def main() -> None:
    talk = Talk()
    job = talk.ask()
    jax.config.update("jax_platforms", "cpu" if job["device"] == "cpu" else None)
    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=auto, devices=jax.devices()[:1])
    with mesh:
        model = open_model(job, mesh)
        names = {"tunix": "google-tunix", "tunix's jax": "jax"}
        talk.answer(versions={name: importlib.metadata.version(package) for name, package in names.items()})
        while (question := talk.ask()) is not None:
            if question["do"] == "check":
                with jax.default_matmul_precision("highest"):
                    talk.answer(**check(model, question))
                continue
            asked = [question[name] for name in ("prompts", "limits", "draw", "rows")]
            found, took = timed(functools.partial(sample, model, *asked), lambda: None)
            talk.answer(**took, complete=[[len(ids) for ids in row] for row in found] == question["limits"])


if __name__ == "__main__":
    main()
