"""A Llama with random weights and what it samples: the same in whatever process asks."""

import dataclasses

import jax
import numpy as np

from srlm_jax.model import llama
from srlm_jax.model.config import LlamaConfig
from srlm_jax.sampling.engine import Draw, EngineConfig, Group, Work, sample

CONFIG = LlamaConfig(
    V=40, D=16, L=2, N=4, K=2, H=8, F=24, rope_theta=100.0, rope_scaling=None, norm_eps=1e-5,
    tied=False, param_dtype="float32", compute_dtype="float32", remat="dots",
)  # fmt: skip


def model():
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: (0.3 * rng.standard_normal(x.shape)).astype(x.dtype), llama.abstract(CONFIG))


def draw(model, mesh):
    """[[tokens of each sample of each prompt, by group], greedy and then random]"""
    rng = np.random.default_rng(1)
    groups = [
        Group(
            address=(i, 0),
            prompts=tuple((1, 2, 3, 4, 5, *rng.integers(1, 40, 3 + p).tolist()) for p in range(2)),
            limits=None,
        )
        for i in range(3)
    ]
    greedy = Draw(samples=1, temperature=0.0, top_p=1.0, max_new_tokens=8, stops=((0,),))
    found = []
    for how in (greedy, dataclasses.replace(greedy, samples=2, temperature=0.9, top_p=0.9)):
        drawn = sample(
            model, groups, how, key=jax.random.key(0), mesh=mesh, report=lambda finished, tokens: None, work=Work(),
            config=EngineConfig(rows=8, steps=4, weights=None, cache=None),
        )  # fmt: skip
        found.append([[[list(new.ids) for new in prompt] for prompt in group] for group in drawn])
    return found
