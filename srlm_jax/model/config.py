"""The numbers that make a Llama, and the published ones."""

import dataclasses
from collections.abc import Callable
from typing import Annotated

from srlm_jax import limits
from srlm_jax.errors import BadInput
from srlm_jax.limits import Count, above, at_least, one_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Llama 3's stretch of the rotary angles to a longer context (Llama 3.1; rope type "llama3" of transformers).

    A pair that turns fewer than `low_freq_factor` times within the original context turns `factor` times slower, one
    that turns more than `high_freq_factor` times as fast as before, and one between them in proportion.
    """

    factor: Annotated[float, at_least(1)]
    low_freq_factor: Annotated[float, above(0)]
    high_freq_factor: Annotated[float, above(0)]
    original_context: Count  # tokens

    def __post_init__(self):
        limits.check(self)
        if self.low_freq_factor >= self.high_freq_factor:
            raise BadInput(
                f"low_freq_factor is {self.low_freq_factor}: it must be below high_freq_factor, which is "
                f"{self.high_freq_factor}"
            )


REMAT = ("full", "dots")

Dtype = Annotated[str, one_of("float32", "bfloat16", "float16")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """A Llama-architecture decoder. The letters are the ones that name array axes everywhere in this package."""

    V: Count  # vocabulary
    D: Count  # width of the residual stream
    L: Count  # layers
    N: Count  # query heads
    K: Count  # key-value heads; N / K query heads share one (GQA)
    H: Count  # width of a head
    F: Count  # width of the gated MLP
    rope_theta: Annotated[float, above(0)]  # base of the rotary angles
    rope_scaling: RopeScaling | None  # None: the angles as they are
    norm_eps: Annotated[float, above(0)]  # added to the mean square in RMSNorm
    tied: bool  # the embedding is also the output head
    param_dtype: Dtype  # what the weights are kept in
    compute_dtype: Dtype  # what the matrix products run in
    # What training computes again of a block on the way back: all of it from its input ("full"), or what lies between
    # the results of its products ("dots"), which are then kept: most of a forward pass less, and more memory.
    remat: Annotated[str, one_of(*REMAT)]

    def __post_init__(self):
        limits.check(self)
        if self.N % self.K:
            raise BadInput(f"model.N ({self.N} query heads) must be a multiple of model.K ({self.K} key-value heads)")
        if self.H % 2:
            raise BadInput(f"model.H must be even, not {self.H}: rotary position embedding turns pairs")

    @property
    def parameters(self) -> int:
        """How many numbers the model holds."""
        attention = self.D * self.H * (2 * self.N + 2 * self.K)
        block = attention + 3 * self.D * self.F + 2 * self.D
        return self.L * block + self.D + self.V * self.D * (1 if self.tied else 2)


def _published(
    *, V: int, D: int, L: int, N: int, K: int, H: int, F: int,
    rope_theta: float, rope_scaling: RopeScaling | None, tied: bool,
) -> LlamaConfig:  # fmt: skip
    return LlamaConfig(
        V=V, D=D, L=L, N=N, K=K, H=H, F=F, rope_theta=rope_theta, rope_scaling=rope_scaling, norm_eps=1e-5,
        tied=tied, param_dtype="float32", compute_dtype="bfloat16", remat="full",
    )  # fmt: skip


def _llama2(*, D: int, L: int, N: int, K: int, F: int) -> LlamaConfig:
    return _published(V=32_000, D=D, L=L, N=N, K=K, H=128, F=F, rope_theta=10_000.0, rope_scaling=None, tied=False)


def llama2_7b() -> LlamaConfig:
    """Llama 2 7B: 6,738,415,616 parameters."""
    return _llama2(D=4096, L=32, N=32, K=32, F=11_008)


def llama2_13b() -> LlamaConfig:
    """Llama 2 13B: 13,015,864,320 parameters."""
    return _llama2(D=5120, L=40, N=40, K=40, F=13_824)


def llama2_70b() -> LlamaConfig:
    """Llama 2 70B, the paper's model: 68,976,648,192 parameters."""
    return _llama2(D=8192, L=80, N=64, K=8, F=28_672)


def tinyllama_1b() -> LlamaConfig:
    """TinyLlama 1.1B: 1,100,048,384 parameters, the vocabulary of Llama 2."""
    return _published(
        V=32_000, D=2048, L=22, N=32, K=4, H=64, F=5632, rope_theta=10_000.0, rope_scaling=None, tied=False
    )


def _smollm2(*, D: int, L: int, N: int, K: int, F: int, rope_theta: float) -> LlamaConfig:
    return _published(V=49_152, D=D, L=L, N=N, K=K, H=64, F=F, rope_theta=rope_theta, rope_scaling=None, tied=True)


def smollm2_135m() -> LlamaConfig:
    """SmolLM2 135M: 134,515,008 parameters. Its three key-value heads can be split in three only."""
    return _smollm2(D=576, L=30, N=9, K=3, F=1536, rope_theta=100_000.0)


def smollm2_360m() -> LlamaConfig:
    """SmolLM2 360M: 361,821,120 parameters. Its five key-value heads can be split in five only."""
    return _smollm2(D=960, L=32, N=15, K=5, F=2560, rope_theta=100_000.0)


def smollm2_1_7b() -> LlamaConfig:
    """SmolLM2 1.7B: 1,711,376,384 parameters."""
    return _smollm2(D=2048, L=24, N=32, K=32, F=8192, rope_theta=130_000.0)


def _llama3(*, D: int, L: int, N: int, H: int, F: int, factor: float, tied: bool) -> LlamaConfig:
    scaling = RopeScaling(factor=factor, low_freq_factor=1.0, high_freq_factor=4.0, original_context=8192)
    return _published(V=128_256, D=D, L=L, N=N, K=8, H=H, F=F, rope_theta=500_000.0, rope_scaling=scaling, tied=tied)


def llama3_1_8b() -> LlamaConfig:
    """Llama 3.1 8B: 8,030,261,248 parameters."""
    return _llama3(D=4096, L=32, N=32, H=128, F=14_336, factor=8.0, tied=False)


def llama3_2_1b() -> LlamaConfig:
    """Llama 3.2 1B: 1,235,814,400 parameters."""
    return _llama3(D=2048, L=16, N=32, H=64, F=8192, factor=32.0, tied=True)


def llama3_2_3b() -> LlamaConfig:
    """Llama 3.2 3B: 3,212,749,824 parameters."""
    return _llama3(D=3072, L=28, N=24, H=128, F=8192, factor=32.0, tied=True)


def tiny() -> LlamaConfig:
    """The model of the embedded world: 0.8 million parameters, every mechanism of the large ones."""
    return LlamaConfig(
        V=320, D=128, L=4, N=8, K=4, H=16, F=384,
        rope_theta=500.0,  # angles that turn within the few hundred tokens it ever sees
        rope_scaling=None, norm_eps=1e-5, tied=False, param_dtype="float32", compute_dtype="float32",
        remat="dots",
    )  # fmt: skip


PRESETS: dict[str, Callable[[], LlamaConfig]] = {
    "llama2_7b": llama2_7b,
    "llama2_13b": llama2_13b,
    "llama2_70b": llama2_70b,
    "tinyllama_1b": tinyllama_1b,
    "smollm2_135m": smollm2_135m,
    "smollm2_360m": smollm2_360m,
    "smollm2_1_7b": smollm2_1_7b,
    "llama3_1_8b": llama3_1_8b,
    "llama3_2_1b": llama3_2_1b,
    "llama3_2_3b": llama3_2_3b,
    "tiny": tiny,
}
