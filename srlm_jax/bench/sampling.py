"""Sampling: answers (`decode`), reading alone (`prefill`) and judgements (`judge`), by this package and by others."""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from srlm_jax.bench import cost, sides
from srlm_jax.bench.ceilings import Ceilings
from srlm_jax.bench.peer_process import Peer, python_of, started
from srlm_jax.bench.setting import Setting, checkpoint, random_model, sample_mesh
from srlm_jax.bench.sides import OURS, Side
from srlm_jax.bench.workload import Ids, Tree, Workload, answering, judging
from srlm_jax.errors import BadInput
from srlm_jax.model.llama import Llama
from srlm_jax.parallel import rules
from srlm_jax.sampling import engine

# What the peers can do: the script, and the ways in which it samples, each a row of its own.
PEERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "transformers": ("torch_sampling", ("generate", "generate_batch")),
    "tunix": ("tunix_sampling", ("sampler",)),
}

# Sections 2.2 and 3.1.3 of the paper.
DRAW = {"temperature": 0.7, "top_p": 0.9}
GREEDY = {"temperature": 0.0, "top_p": 1.0}

_CHECK_STEPS = 32
_CHECK_PROMPTS = 2
_TOLERANCE = 1e-3  # of logits, whose variance the random weights make about one


def work_of(command: str, w: Workload, vocabulary: int) -> Tree:
    """The prompts of a command, and what is to be written to each."""
    if command == "decode":
        return answering(w, vocabulary)
    tree = judging(w, vocabulary)
    return tree.read_only() if command == "prefill" else tree


def measure(setting: Setting, ceilings: Ceilings) -> dict[str, object]:
    """Times `decode`, `prefill` or `judge` by each side: what `report.document` takes.

    Raises:
      ValueError: the peer is missing, fails, or computes something else than this package.
    """
    tree = work_of(setting.command, setting.workload, setting.config.V)
    with contextlib.ExitStack() as opened:
        compared, versions = _sides(setting, tree, opened)
        runs = sides.measure(compared, setting.repeat, setting.command)
    needs = {dtype: _needs(setting, tree, dtype) for dtype in setting.dtypes}
    work = {
        "prompts": sum(len(group) for group in tree.prompts),
        "rows": len(tree.rows),
        "prompt_tokens": sum(len(prompt) - 1 for prompt, _ in tree.rows),
        "unique_prompt_tokens": needs[setting.dtypes[0]]["reading"].tokens,
        "new_tokens": tree.tokens,
    }
    parts = {dtype: _parts(setting.command, of_type) for dtype, of_type in needs.items()}
    return {
        "work": work,
        "units": (len(tree.rows), "row"),
        "versions": versions,
        "runs": runs,
        "summary": [sides.summary(side, runs[side.label], parts[side.dtype], ceilings) for side in compared],
    }


def _needs(setting: Setting, tree: Tree, dtype: str) -> dict[str, cost.Need]:
    config = setting.of(dtype)
    return {
        "reading": cost.reading(config, tree, dtype),
        "writing": cost.writing(config, tree, setting.workload.rows, dtype),
    }


def _parts(command: str, needs: Mapping[str, cost.Need]) -> dict[str, list[cost.Need]]:
    if command == "prefill":
        return {"seconds": [needs["reading"]]}
    whole = {"seconds": [needs["reading"], needs["writing"]]}
    if command == "decode":
        return whole
    return whole | {"reading_seconds": [needs["reading"]], "writing_seconds": [needs["writing"]]}


def _sides(setting: Setting, tree: Tree, opened: contextlib.ExitStack) -> tuple[list[Side], dict[str, str]]:
    found, versions = [], {}
    for dtype in setting.dtypes:
        model = to_sample(random_model(setting.of(dtype), setting.made_in))
        found.append(Side(name=OURS, dtype=dtype, run=functools.partial(_run_ours, setting, model, tree)))
        if setting.unshared:
            alone = functools.partial(_run_ours, setting, model, tree.unshared())
            found.append(Side(name="ours, nothing shared", dtype=dtype, run=alone))
    if setting.peer is not None:
        script, methods = PEERS[setting.peer]
        python = python_of(setting.peer, setting.peer_python)
        folder = opened.enter_context(checkpoint(setting))
        agree(setting, tree, script, methods, python, folder)
        for dtype in setting.dtypes:
            for method in methods:
                peer = opened.enter_context(started(script, python, job(setting, folder, dtype)))
                versions |= peer.versions
                run = functools.partial(_run_peer, setting, peer, method, tree)
                found.append(Side(name=f"{setting.peer}, {method}", dtype=dtype, run=run))
    return found, versions


def job(setting: Setting, folder: str, dtype: str) -> dict[str, object]:
    """What a peer is told first: which model, where and in which type."""
    place = "cpu" if jax.default_backend() == "cpu" else "cuda"
    return {"folder": folder, "dtype": dtype, "device": place, "rows": setting.peer_rows}


# --- this package -----------------------------------------------------------------------------------------------------


def to_sample(model: Llama) -> Llama:
    """`model` as it decodes fastest, each weight where sampling has it."""
    apart = engine.decoding_model(model, sample_mesh())
    return jax.device_put(apart, rules.model_shardings(sample_mesh(), rules.SAMPLE, apart))


def sample(
    model: Llama, tree: Tree, draw: Mapping[str, float], rows: int, steps: int, most: int
) -> tuple[list[engine.Samples], dict[str, float]]:
    """All rows of `tree`, each of its length, where there is room for `most` tokens; what took how long (`seconds`) and
    the engine's counts."""
    work, mesh = engine.Work(), sample_mesh()
    sides.forget_peak_memory()
    start = time.perf_counter()
    samples = engine.sample(
        model,
        _groups(tree),
        engine.Draw(samples=tree.samples, max_new_tokens=most, stops=(), **draw),
        key=jax.random.key(0),
        config=engine.EngineConfig(rows=rows, steps=steps, weights=None, cache=None),
        mesh=mesh,
        report=lambda finished, tokens: None,
        work=work,
    )
    found = {"seconds": time.perf_counter() - start, "peak_bytes": sides.peak_memory(), **dataclasses.asdict(work)}
    return samples, found


def _groups(tree: Tree) -> list[engine.Group]:
    return [
        engine.Group(address=(0, i), prompts=prompts, limits=limits)
        for i, (prompts, limits) in enumerate(zip(tree.prompts, tree.limits, strict=True))
    ]


def _run_ours(setting: Setting, model: Llama, tree: Tree) -> dict[str, float]:
    run = functools.partial(sample, model, draw=DRAW, rows=setting.workload.rows, steps=setting.workload.steps)
    # In the same room, and so by the same programs.
    read = run(tree.read_only(), most=tree.longest)[1] if setting.command == "judge" else None
    samples, found = run(tree, most=tree.longest)
    _check_complete(OURS, [[len(s.ids) for s in of_prompt] for group in samples for of_prompt in group], tree)
    return found if read is None else _with_reading(found, read)


def _with_reading(whole: Mapping[str, float], read: Mapping[str, float]) -> dict[str, float]:
    """Writing takes what the whole does beyond a pass that reads all prompts and writes one token each."""
    return {
        **whole,
        "reading_seconds": read["seconds"],
        "writing_seconds": max(whole["seconds"] - read["seconds"], 1e-9),
    }


def _check_complete(name: str, lengths: list[list[int]], tree: Tree) -> None:
    if lengths != [list(limits) for group in tree.limits for limits in group]:
        raise BadInput(f"{name} wrote rows of other lengths than it was to write")


# --- others -----------------------------------------------------------------------------------------------------------


def _run_peer(setting: Setting, peer: Peer, method: str, tree: Tree) -> dict[str, float]:
    read = ask(peer, method, tree.read_only(), DRAW, setting.peer_rows) if setting.command == "judge" else None
    found = ask(peer, method, tree, DRAW, setting.peer_rows)
    return found if read is None else _with_reading(found, read)


def ask(peer: Peer, method: str, tree: Tree, draw: Mapping[str, float], rows: int) -> dict[str, float]:
    """All rows of `tree` by a peer."""
    found = peer.ask(
        do="sample",
        method=method,
        prompts=[list(prompt) for group in tree.prompts for prompt in group],
        limits=[list(limits) for group in tree.limits for limits in group],
        draw=draw,
        rows=rows,
    )
    if not found.pop("complete"):
        raise BadInput(f"{peer.name}, {method} wrote rows of other lengths than it was to write")
    return found


def agree(setting: Setting, tree: Tree, script: str, methods: Sequence[str], python: Path, folder: str) -> None:
    """Nothing is timed before both sides are seen to compute the same thing, in float32.

    Raises:
      ValueError: a peer's logits, or its most probable tokens, are others.
    """
    model = random_model(setting.of("float32"), setting.made_in)
    prompts = [prompt for group in tree.prompts for prompt in group][:_CHECK_PROMPTS]
    with jax.default_matmul_precision("highest"):
        forced, logits_PTV = greedy(model, prompts, _CHECK_STEPS)
    with started(script, python, job(setting, folder, "float32")) as peer:
        for method in methods:
            out = f"{folder}/check.npy"
            asked = {"prompts": [list(p) for p in prompts], "forced": [list(ids) for ids in forced], "out": out}
            found = peer.ask(do="check", method=method, steps=_CHECK_STEPS, **asked)
            compare(f"{setting.peer}, {method}", forced, logits_PTV, found["ids"], np.load(out))


def greedy(model: Llama, prompts: Sequence[Ids], steps: int) -> tuple[list[Ids], np.ndarray]:
    """The most probable continuations by the engine, and by one forward pass the logits that led to each token."""
    tree = Tree(tuple((prompt,) for prompt in prompts), (((steps,),),) * len(prompts))
    samples, _ = sample(model, tree, GREEDY, rows=len(prompts), steps=steps, most=steps)
    forced = [group[0][0].ids for group in samples]
    forward = jax.jit(_logits)
    logits = []
    for prompt, ids in zip(prompts, forced, strict=True):
        logits.append(np.asarray(forward(model, np.asarray([prompt + ids[:-1]], np.int32)))[len(prompt) - 1 :])
    return forced, np.stack(logits)


def _logits(model: Llama, tokens_1T: jax.Array) -> jax.Array:
    positions_1T = jnp.arange(tokens_1T.shape[1])[None]
    hidden_1TD, _ = model(tokens_1T, positions_1T, segments_BT=None, cache=None, dropout=None)
    return jnp.einsum("td,dv->tv", hidden_1TD[0], model.head(), preferred_element_type=jnp.float32)


def compare(
    name: str,
    ours: Sequence[Ids],
    logits_PTV: np.ndarray,
    theirs: Sequence[Sequence[int]],
    their_logits_PTV: np.ndarray,
) -> None:
    """Both sides' most probable tokens, and their logits along ours.

    Two numbers that are equal but for rounding may come in either order: where our two highest logits are closer than
    the two sides' may differ, another token is no disagreement, and what follows it is another text.

    Raises:
      ValueError: they differ.
    """
    far = float(np.max(np.abs(logits_PTV - their_logits_PTV)))
    if far > _TOLERANCE:
        raise BadInput(f"{name} computes other logits than this package: {far:.2g} apart, {_TOLERANCE:g} allowed")
    for prompt, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        if len(mine) != len(other):
            raise BadInput(f"{name} wrote {len(other)} tokens to prompt {prompt}, not {len(mine)}")
        apart = [step for step, (a, b) in enumerate(zip(mine, other, strict=True)) if a != b]
        if not apart:
            continue
        second, first = np.sort(logits_PTV[prompt, apart[0]])[-2:]
        if first - second > 2 * _TOLERANCE:
            raise BadInput(
                f"{name} takes token {other[apart[0]]} at step {apart[0]} of prompt {prompt}, and this package "
                f"{mine[apart[0]]}: nothing is timed before both write the same"
            )
