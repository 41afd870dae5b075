"""Eight CPU devices, array shapes checked at every call, and small models."""

import dataclasses
import importlib.util
import os
from pathlib import Path

from xla_flags import xla_flags

os.environ.setdefault("XLA_FLAGS", xla_flags(8))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import install_import_hook

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_enable_compilation_cache", False)  # tests compile what they test

# Before anything imports them: every annotated shape in these modules is checked. The trees of arrays in other modules
# are also made of shapes and shardings at times, which their annotations do not say; the losses carry none, so that
# they need no jaxtyping.
CHECKED = ["srlm_jax.model.attention", "srlm_jax.model.ops", "srlm_jax.model.llama", "srlm_jax.sampling.filters"]
install_import_hook(CHECKED, "beartype.beartype")


def pytest_runtest_setup(item):
    if item.get_closest_marker("parity") is None:
        return
    missing = [name for name in ("torch", "transformers", "trl") if importlib.util.find_spec(name) is None]
    if missing and os.environ.get("SRLM_REQUIRE_PARITY") == "1":
        pytest.fail(f"SRLM_REQUIRE_PARITY=1, and {', '.join(missing)} cannot be imported", pytrace=False)
    if missing:
        pytest.skip("needs the extra `parity`")


@pytest.fixture(autouse=True, scope="module")
def programs_are_let_go():
    """Compiled programs take some of the 65,530 pieces of memory that Linux lets a process have, and where none is left
    the compiler ends it: those of a file go when it is done."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def command_environment(tmp_path_factory):
    """The environment of a command that a test starts: one device, and what one command has compiled the next one
    finds, whichever worker starts it."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    return os.environ | {
        "XLA_FLAGS": xla_flags(),
        "JAX_COMPILATION_CACHE_DIR": os.environ.get("JAX_COMPILATION_CACHE_DIR", str(folder / "compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


@pytest.fixture(scope="session")
def shared_data():
    """`shared_data("oasst/en_100_tree.jsonl")`: a public file that is not part of the project, or the test is skipped.

    They lie in a folder shared/data beside the checkout or beside a folder that it is in.
    """

    def find(name):
        places = [folder / "shared" / "data" / name for folder in Path(__file__).resolve().parents[2:]]
        found = [place for place in places if place.exists()]
        if not found:
            pytest.skip(f"needs ../shared/data/{name}, which is not part of the project")
        return found[0]

    return find


@pytest.fixture(scope="session")
def tiny_config():
    """Every mechanism of the large models, in 7 thousand parameters."""
    from srlm_jax.model.config import LlamaConfig

    return LlamaConfig(
        V=40, D=16, L=2, N=4, K=2, H=8, F=24, rope_theta=100.0, rope_scaling=None, norm_eps=1e-5,
        tied=False, param_dtype="float32", compute_dtype="float32", remat="dots",
    )  # fmt: skip


@pytest.fixture(scope="session")
def make_llama(tiny_config):
    """`make_llama(L=1, tied=True)`: the tiny Llama with some numbers changed.

    Its weights, norm scales too, are random and far enough from their usual start that its predictions differ from
    token to token. Do not donate it: copy it first.
    """
    from srlm_jax.model import llama

    made = {}

    def make(**changes):
        config = dataclasses.replace(tiny_config, **changes)
        if config not in made:
            rng = np.random.default_rng(0)

            def draw(path, weight):
                start = 1.0 if "norm" in jax.tree_util.keystr(path) else 0.0
                return jnp.asarray(start + 0.3 * rng.standard_normal(weight.shape), weight.dtype)

            made[config] = jax.tree_util.tree_map_with_path(draw, llama.abstract(config))
        return made[config]

    return make


@pytest.fixture(scope="session")
def tiny_llama(make_llama):
    """The tiny Llama, untied, with grouped queries."""
    return make_llama()


@pytest.fixture(scope="session")
def transformers_block():
    """The weights of a block: transformers' name -> ours, and how ours [in..., out...] becomes a matrix [out, in]."""
    return {
        "input_layernorm.weight": ("attention_norm", lambda w: w),
        "self_attn.q_proj.weight": ("q", lambda w: w.reshape(w.shape[0], -1).T),
        "self_attn.k_proj.weight": ("k", lambda w: w.reshape(w.shape[0], -1).T),
        "self_attn.v_proj.weight": ("v", lambda w: w.reshape(w.shape[0], -1).T),
        "self_attn.o_proj.weight": ("o", lambda w: w.reshape(-1, w.shape[-1]).T),
        "post_attention_layernorm.weight": ("mlp_norm", lambda w: w),
        "mlp.gate_proj.weight": ("gate", lambda w: w.T),
        "mlp.up_proj.weight": ("up", lambda w: w.T),
        "mlp.down_proj.weight": ("down", lambda w: w.T),
    }


@pytest.fixture(scope="session")
def as_transformers(transformers_block):
    """`as_transformers(model)`: transformers' Llama with the same weights. For tests marked `parity`."""
    import torch
    import transformers

    def convert(ours):
        c, rope = ours.config, {"rope_type": "default"}
        if (scaling := c.rope_scaling) is not None:
            rope = {
                "rope_type": "llama3", "factor": scaling.factor, "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_context,
            }  # fmt: skip
        config = transformers.LlamaConfig(
            vocab_size=c.V, hidden_size=c.D, num_hidden_layers=c.L, num_attention_heads=c.N, num_key_value_heads=c.K,
            head_dim=c.H, intermediate_size=c.F, rms_norm_eps=c.norm_eps, tie_word_embeddings=c.tied,
            rope_parameters=rope | {"rope_theta": c.rope_theta}, attn_implementation="eager",
            pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        theirs = transformers.LlamaForCausalLM(config).eval()
        weights = {
            "model.embed_tokens.weight": ours.embedding[...],
            "model.norm.weight": ours.norm[...],
            "lm_head.weight": ours.head().T,
        }
        for layer in range(c.L):
            for name, (mine, turn) in transformers_block.items():
                weights[f"model.layers.{layer}.{name}"] = turn(getattr(ours.blocks, mine)[layer])
        theirs.load_state_dict({name: torch.tensor(np.asarray(w)) for name, w in weights.items()}, strict=True)
        return theirs

    return convert


@pytest.fixture(scope="session")
def stories260k(shared_data):
    """The folder of a small trained Llama in Hugging Face's layout (hf) and Meta's (meta)."""
    return shared_data("stories260k")


@pytest.fixture(scope="session")
def llama2_folder(shared_data):
    """The folder of Llama 2's tokenizer.model and of golden rows for it."""
    return shared_data("llama2_tokenizer")


@pytest.fixture(scope="session")
def llama2(llama2_folder):
    """Llama 2's tokenizer."""
    from srlm_jax.text.tokenizer import SentencePieceTokenizer

    return SentencePieceTokenizer(llama2_folder / "tokenizer.model")


@pytest.fixture(scope="session")
def one_device():
    """`one_device("data", "tensor")`: a mesh with these axes over the first device."""

    def mesh(*axes):
        axis_types = (jax.sharding.AxisType.Auto,) * len(axes)
        return jax.make_mesh((1,) * len(axes), axes, axis_types=axis_types, devices=jax.devices()[:1])

    return mesh
