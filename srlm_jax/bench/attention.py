"""Attention alone (`attention`), as judgements that are being written read it: over levels that they share, and over a
copy of everything for each of them."""

import dataclasses
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

from srlm_jax.bench import cost, sides
from srlm_jax.bench.ceilings import Ceilings
from srlm_jax.bench.setting import Setting, sample_mesh
from srlm_jax.bench.sides import OURS, Side
from srlm_jax.errors import BadInput
from srlm_jax.model import attention
from srlm_jax.model import cache as kv
from srlm_jax.model.attention import ALL, Part
from srlm_jax.model.config import LlamaConfig
from srlm_jax.sampling import engine

# Of outputs, as a share of their norm: both ways round at other places.
_TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}


def measure(setting: Setting, ceilings: Ceilings) -> dict[str, object]:
    """Times `attention`: what `report.document` takes. A step is one token of every row, in all layers.

    Raises:
      ValueError: what is shared gives something else than the copies.
    """
    w, c = setting.workload, setting.config
    tokens = _level_tokens(setting)
    rows = max(rows for rows, _ in tokens)
    context, unique = sum(n for _, n in tokens), sum(rows * n for rows, n in tokens)
    compared, needs = [], {}
    for dtype in setting.dtypes:
        compared += _sides(setting, dtype, tokens)
        flops, read = rows * cost.attention_flops(c, context - 1, 1), unique * cost.kv_token_bytes(c, dtype)
        need = cost.Need(tokens=w.steps * rows, flops=w.steps * flops, memory_bytes=w.steps * read)
        needs[dtype] = {"seconds": [need]}
    runs = sides.measure(compared, setting.repeat, setting.command)
    return {
        "work": {"steps": w.steps, "rows": rows, "tokens_of_a_row": context, "tokens_of_all_rows": unique},
        "units": (w.steps, "step"),
        "versions": {},
        "runs": runs,
        "summary": [sides.summary(side, runs[side.label], needs[side.dtype], ceilings) for side in compared],
    }


def _level_tokens(setting: Setting) -> list[tuple[int, int]]:
    """(rows, tokens of each) of every level from the judge's template down, at mean lengths and half way through the
    judgements, of about as many as are written at once."""
    w = setting.workload
    instructions = max(1, w.rows // (w.samples * w.votes))
    answers = instructions * w.samples
    behind = w.response_mean + w.behind
    own = -(-w.judgement_mean // 2)
    return [(1, w.before), (instructions, w.instruction), (answers, behind), (answers * w.votes, own)]


def _sides(setting: Setting, dtype: str, tokens: list[tuple[int, int]]) -> list[Side]:
    c, rows = setting.of(dtype), tokens[-1][0]
    q_BN1H = jax.random.normal(jax.random.key(0), (rows, c.N, 1, c.H), dtype)
    levels = [_level(c, rows, count, i) for i, (rows, count) in enumerate(tokens)]
    copies = [_copies(levels, rows)]
    attend = jax.jit(lambda q_BN1H, parts: attention.attend(q_BN1H, parts, [], None))
    with jax.set_mesh(sample_mesh()), jax.default_matmul_precision("highest"):
        found, wanted = (np.asarray(attend(q_BN1H, parts), np.float32) for parts in (levels, copies))
    apart = float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
    if not apart <= _TOLERANCE[dtype]:
        raise BadInput(f"shared levels give other outputs than copies in {dtype}: {apart:.2g} of their norm apart")
    run = functools.partial(_run, attend, q_BN1H, calls=setting.workload.steps * c.L)
    shared = Side(name=OURS, dtype=dtype, run=functools.partial(run, levels))
    alone = Side(name=f"{OURS}, nothing shared", dtype=dtype, run=functools.partial(run, copies))
    return [shared, alone] if setting.unshared else [shared]


def _level(config: LlamaConfig, rows: int, tokens: int, seed: int) -> Part:
    """Rows of random keys and values of a layer, so many of which hold something."""
    (empty,) = kv.empty(config, (1,), rows, engine.prefix_slots(tokens), None)
    k, v = (jax.random.normal(key, empty.shape, empty.dtype) for key in jax.random.split(jax.random.key(seed + 1)))
    return Part(k, v, jnp.int32(0), dataclasses.replace(ALL, length_R=jnp.full(rows, tokens)))


def _copies(levels: list[Part], rows: int) -> Part:
    """All levels as one, of which each of so many rows has its own."""
    tokens = [int(level.readable.length_R[0]) for level in levels]
    pad = engine.prefix_slots(sum(tokens)) - sum(tokens)

    def joined(stacks: list[jax.Array]) -> jax.Array:
        each = [jnp.repeat(x[:, :, :count], rows // len(x), axis=0) for x, count in zip(stacks, tokens, strict=True)]
        return jnp.pad(jnp.concatenate(each, axis=2), ((0, 0), (0, 0), (0, pad), (0, 0)))

    k, v = joined([level.k_LRKSH for level in levels]), joined([level.v_LRKSH for level in levels])
    return Part(k, v, jnp.int32(0), dataclasses.replace(ALL, length_R=jnp.full(rows, sum(tokens))))


def _run(attend, q_BN1H: jax.Array, parts: list[Part], *, calls: int) -> dict[str, float]:
    sides.forget_peak_memory()
    with jax.set_mesh(sample_mesh()):
        jax.block_until_ready(attend(q_BN1H, parts))
        start = time.perf_counter()
        for _ in range(calls):
            found = attend(q_BN1H, parts)
        jax.block_until_ready(found)
    return {"seconds": time.perf_counter() - start, "peak_bytes": sides.peak_memory()}
