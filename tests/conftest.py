"""Eight CPU devices, array shapes checked at every call, and small models."""

import dataclasses
import importlib.util
import os

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
import pytest
from jaxtyping import install_import_hook

jax.config.update("jax_numpy_rank_promotion", "raise")

# Before anything imports them: every annotated shape in these packages is checked. The losses are left out, which
# carry no such annotations and must not need jaxtyping.
install_import_hook(["srlm_jax.model", "srlm_jax.sampling"], "beartype.beartype")

from srlm_jax.model import llama
from srlm_jax.model.config import LlamaConfig


def pytest_runtest_setup(item):
    if item.get_closest_marker("parity") is None:
        return
    missing = [name for name in ("torch", "transformers", "trl") if importlib.util.find_spec(name) is None]
    if missing and os.environ.get("SRLM_REQUIRE_PARITY") == "1":
        pytest.fail(f"SRLM_REQUIRE_PARITY=1, and {', '.join(missing)} cannot be imported", pytrace=False)
    if missing:
        pytest.skip("needs the extra `parity`")


@pytest.fixture(scope="session")
def tiny_config():
    """Every mechanism of the large models, in 5 thousand parameters."""
    return LlamaConfig(
        V=40, D=16, L=2, N=4, K=2, H=8, F=24, rope_theta=100.0, norm_eps=1e-5, tied=False,
        param_dtype="float32", compute_dtype="float32", remat=False,
    )  # fmt: skip


@pytest.fixture(scope="session")
def make_llama(tiny_config):
    """`make_llama(L=1, tied=True)`: the tiny Llama with some numbers changed.

    All its weights, norm scales too, are moved far enough from their start that its predictions differ from token to
    token. Do not donate it: copy it first.
    """
    made = {}

    def make(**changes):
        config = dataclasses.replace(tiny_config, **changes)
        if config not in made:
            model = llama.init(config, jax.random.key(0))
            leaves, tree = jax.tree.flatten(model)
            rng = np.random.default_rng(0)
            leaves = [x + 0.3 * rng.standard_normal(x.shape).astype(np.float32) for x in leaves]
            made[config] = jax.tree.unflatten(tree, leaves)
        return made[config]

    return make


@pytest.fixture(scope="session")
def tiny_llama(make_llama):
    """The tiny Llama, untied, with grouped queries."""
    return make_llama()


@pytest.fixture(scope="session")
def one_device():
    """`one_device("data", "tensor")`: a mesh with these axes over the first device."""

    def mesh(*axes):
        axis_types = (jax.sharding.AxisType.Auto,) * len(axes)
        return jax.make_mesh((1,) * len(axes), axes, axis_types=axis_types, devices=jax.devices()[:1])

    return mesh
