"""Self-Rewarding Language Models (arXiv 2401.10020) in JAX.

The losses load nothing but jax and numpy; everything else is imported when it is asked for.
"""

import importlib

__version__ = "0.2.0"

_HOME = {
    "dpo_loss": "srlm_jax.train.losses",
    "conservative_dpo_loss": "srlm_jax.train.losses",
    "ipo_loss": "srlm_jax.train.losses",
    "sft_loss": "srlm_jax.train.losses",
    "sequence_logprobs": "srlm_jax.train.losses",
    "token_logprobs": "srlm_jax.train.losses",
    "Llama": "srlm_jax.model.llama",
    "LlamaConfig": "srlm_jax.model.config",
}

__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'srlm_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
