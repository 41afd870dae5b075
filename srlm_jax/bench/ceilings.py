"""What this device can do at most, measured before anything else in a run: matrix products and memory.

A share of a data sheet's peak says little about a machine that others use too; a share of what the same process got out
of the same device a minute ago does.
"""

import dataclasses
import functools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

# Large enough to fill the device, small enough to take a second or two in all.
_SIDE = {"cpu": 2048, "other": 8192}  # of the square matrices
_BYTES = {"cpu": 2**28, "other": 2**31}  # of what is read and copied
_TRIALS = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ceilings:
    """The most of each that was seen."""

    flops_per_second: dict[str, float]  # of a square matrix product, by type
    read_bytes_per_second: float  # of a sum over an array
    copy_bytes_per_second: float  # read and written


def measure(dtypes: tuple[str, ...], side: int | None = None, size: int | None = None) -> Ceilings:
    """The ceilings of the first device, for products of each of `dtypes`.

    Args:
      side: of the matrices; None: what suits the device.
      size: of what is read and copied, in bytes; None: what suits the device.
    """
    kind = "cpu" if jax.default_backend() == "cpu" else "other"
    side, size = side or _SIDE[kind], size or _BYTES[kind]
    with jax.default_device(jax.devices()[0]):
        flops = {}
        for dtype in dtypes:
            a, b = (jax.random.normal(jax.random.key(i), (side, side), dtype) for i in range(2))
            # Asked for sums in 32 bits, XLA's CPU backend takes other products than without, which may be faster.
            products = (jnp.matmul, functools.partial(jnp.matmul, preferred_element_type=jnp.float32))
            flops[dtype] = 2.0 * side**3 / min(_least_seconds(jax.jit(one), a, b) for one in products)
        # Ones that are not constants to the compiler, in rows as wide as a model's.
        numbers = jax.random.normal(jax.random.key(2), (size // 4 // 4096, 4096), jnp.float32)
        read = max(numbers.nbytes / _least_seconds(jax.jit(one), numbers) for one in (jnp.sum, jnp.max))
        copy = 2 * numbers.nbytes / _least_seconds(jax.jit(lambda x: x + 1), numbers)
    return Ceilings(flops_per_second=flops, read_bytes_per_second=read, copy_bytes_per_second=copy)


def _least_seconds(function: Callable, *arguments: jax.Array) -> float:
    """Of several calls, as many at a time as take about a tenth of a second: an accelerator is kept waiting by a host
    that starts them one by one."""

    def timed(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            found = function(*arguments)
        jax.block_until_ready(found)
        return (time.perf_counter() - start) / calls

    timed(1)
    calls = max(1, min(100, round(0.1 / timed(1))))
    return min(timed(calls) for _ in range(_TRIALS))
