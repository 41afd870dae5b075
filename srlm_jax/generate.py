"""`python -m srlm_jax.generate --checkpoint=DIR --prompts=FILE.jsonl --output=FILE.jsonl`: completions of any Llama."""

import sys
from collections.abc import Sequence

import jax
from absl import app, flags
from etils import epath

from srlm_jax import commandline
from srlm_jax.data import sources
from srlm_jax.errors import BadInput
from srlm_jax.parallel import mesh as meshes
from srlm_jax.parallel.mesh import MeshShape
from srlm_jax.pipeline.generate import open_model, stage_key
from srlm_jax.pipeline.run import progress
from srlm_jax.records import Prompt, Request, Responses, SamplingParams
from srlm_jax.sampling.engine import EngineConfig
from srlm_jax.storage import jsonl, rows
from srlm_jax.text.chat import FORMATS, PLAIN

_CONTINUE = "none"

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "A model's folder: Hugging Face's, Meta's or our own layout.")
_PROMPTS = flags.DEFINE_string("prompts", None, 'Rows {"prompt": "..."}, with an id if they like.')
_OUTPUT = flags.DEFINE_string("output", None, "The file to make: one prompt and its completions a line.")
_FORMAT = flags.DEFINE_enum(
    "format", _CONTINUE, [_CONTINUE, *FORMATS], "The chat format of the model; none: it continues the text."
)
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 256, "The most tokens of a completion.", lower_bound=1)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.7, "0 is greedy.", lower_bound=0.0)
_TOP_P = flags.DEFINE_float("top_p", 0.9, "The probability of the likeliest tokens that are drawn from.")
_N = flags.DEFINE_integer("n", 1, "Completions of each prompt.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Of the random numbers.")
_TENSOR = flags.DEFINE_integer(
    "tensor", 1, "Devices that share one copy of the weights, for a model that one cannot hold.", lower_bound=1
)
_ROWS = flags.DEFINE_integer("rows", 64, "Completions decoded at once; it changes no sample.", lower_bound=1)


def generate(
    checkpoint: epath.PathLike,
    prompts: epath.PathLike,
    output: epath.PathLike,
    *,
    chat_format: str,
    params: SamplingParams,
    seed: int,
    engine: EngineConfig,
    tensor: int,
    shard_prompts: int,
) -> None:
    """Writes a `records.Responses` for each prompt to `output`.

    Until it is whole the work lies in a folder beside it, `shard_prompts` prompts a file: killed and called again with
    the same arguments it goes on from there, and ends with the same file.

    Args:
      chat_format: a name in `text.chat.FORMATS`, or "none" for text that is continued as it stands.
      tensor: devices among which each copy of the weights is split; it divides the heads.

    Raises UserError or OSError.
    """
    checkpoint, output = epath.Path(checkpoint), epath.Path(output)
    if output.exists():
        raise FileExistsError(f"{output} is there already: choose another --output, or remove it")
    if jax.device_count() % tensor:
        raise BadInput(f"--tensor={tensor} does not divide the {jax.device_count()} devices")
    asked, dropped = sources.read_prompts(prompts, "prompt")
    for reason, count in dropped.items():
        print(f"{prompts}: {reason}: {count}", file=sys.stderr)
    source = open_model(
        checkpoint,
        meshes.sample_mesh(MeshShape(data=1, fsdp=-1, tensor=tensor)),
        chat_format=FORMATS.get(chat_format, PLAIN),
        config=engine,
        key=stage_key(seed, "generate"),
    )
    parts = output.parent / f".{output.name}.parts"
    facts = {"checkpoint": str(checkpoint), "prompts": rows.digest(prompts), "format": chat_format, "seed": seed}
    _go_on(parts, facts | {name: value for name, value in vars(params).items() if name != "stop"})
    done = jsonl.shards_done(parts)
    with progress("generate", params.samples * len(asked), "completion") as report:
        for index, start in enumerate(range(0, len(asked), shard_prompts)):
            part = asked[start : start + shard_prompts]
            if index in done:
                report(params.samples * len(part), 0)
                continue
            requests = [Request(id=p.id, prompts=(p.text,), chat=chat_format != _CONTINUE) for p in part]
            jsonl.write(jsonl.shard(parts, index), _answers(part, source(requests, params, report)))
    jsonl.write(output, jsonl.read(parts, Responses))
    parts.rmtree()


def _answers(prompts: Sequence[Prompt], drawn: Sequence[Sequence[tuple]]) -> list[Responses]:
    return [
        Responses(id=prompt.id, prompt=prompt.text, completions=completions)
        for prompt, (completions,) in zip(prompts, drawn, strict=True)
    ]


def _go_on(parts: epath.Path, facts: dict[str, object]) -> None:
    """Notes what a begun output is made of, or checks that it is being made of the same.

    Raises:
      BadInput: names what has changed.
    """
    note = parts / "arguments.json"
    if not note.exists():
        parts.mkdir(parents=True, exist_ok=True)
        jsonl.write_json(note, facts)
        return
    known = jsonl.read_json(note)
    changed = [name for name in facts if known.get(name) != facts[name]]
    if changed:
        raise BadInput(
            f"{parts} holds a begun output for which {changed[0]} was {known.get(changed[0])!r}, and is now "
            f"{facts[changed[0]]!r}: go back to the former, choose another --output, or remove the folder"
        )


def main(argv: list[str]) -> None:
    with commandline.begin(argv, "--checkpoint=DIR"):
        meshes.keep_programs(meshes.PROGRAMS)
        params = SamplingParams(
            samples=_N.value,
            temperature=_TEMPERATURE.value,
            top_p=_TOP_P.value,
            max_new_tokens=_MAX_NEW_TOKENS.value,
            stop=(),
        )
        generate(
            _CHECKPOINT.value,
            _PROMPTS.value,
            _OUTPUT.value,
            chat_format=_FORMAT.value,
            params=params,
            seed=_SEED.value,
            engine=EngineConfig(rows=_ROWS.value, steps=16, weights=None, cache=None),
            tensor=_TENSOR.value,
            shard_prompts=4 * _ROWS.value,
        )
    print(_OUTPUT.value)


if __name__ == "__main__":
    flags.mark_flags_as_required(["checkpoint", "prompts", "output"])
    app.run(main)
