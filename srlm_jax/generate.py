"""`python -m srlm_jax.generate --checkpoint=DIR --prompts=FILE.jsonl --output=FILE.jsonl`: completions of any Llama."""

import sys
from collections.abc import Sequence

import jax
from absl import flags
from etils import epath

from srlm_jax import commandline
from srlm_jax.data import sources
from srlm_jax.errors import BadInput
from srlm_jax.model import config_files, folders
from srlm_jax.parallel import mesh as meshes
from srlm_jax.parallel.mesh import MeshShape
from srlm_jax.pipeline.generate import ModelGenerate, open_model, stage_key
from srlm_jax.pipeline.run import progress
from srlm_jax.records import Prompt, Request, Responses, SamplingParams
from srlm_jax.sampling.engine import EngineConfig
from srlm_jax.storage import jsonl, paths, rows
from srlm_jax.text import templates
from srlm_jax.text.chat import DIALOGUE, FORMATS, ChatFormat, encode_opening, encode_prompt
from srlm_jax.text.tokenizer import Tokenizer, load_tokenizer

_CONTINUE = "none"
_FIELDS = templates.Fields(chat="--format", system="--system")

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "A model's folder: Hugging Face's, Meta's or our own layout.")
_PROMPTS = flags.DEFINE_string(
    "prompts",
    None,
    'Rows {"prompt": "..."}, or of another layout that holds prompts (Alpaca, ShareGPT, chat messages, ...), as JSON '
    "Lines, a JSON array, CSV, Parquet or Arrow; FILE?prompt=COLUMN names a column of yours.",
)
_OUTPUT = flags.DEFINE_string("output", None, "The file to make: one prompt and its completions a line.")
_FORMAT = flags.DEFINE_enum(
    "format", _CONTINUE, [_CONTINUE, *FORMATS], "The chat format of the model; none: it continues the text."
)
_SYSTEM = flags.DEFINE_string(
    "system", None, "The system prompt, '' for none; unless given, what the model's own chat template has."
)
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 256, "The most tokens of a completion.", lower_bound=1)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.7, "0 is greedy.", lower_bound=0.0)
_TOP_P = flags.DEFINE_float("top_p", 0.9, "The probability of the likeliest tokens that are drawn from.")
_N = flags.DEFINE_integer("n", 1, "Completions of each prompt.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "The seed of the random numbers.")
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
    system: str | None,
    params: SamplingParams,
    seed: int,
    engine: EngineConfig,
    tensor: int,
    shard_prompts: int,
) -> None:
    """Writes a `records.Responses` for each prompt to `output`.

    Until it is whole the work lies in a folder beside it, `shard_prompts` prompts a file: killed and called again with
    the same arguments it goes on from there, and ends with the same file. What the user should know of prompts, model
    and chat format is printed on standard error.

    Args:
      chat_format: a name in `text.chat.FORMATS`, or "none" for text that is continued as it stands.
      system: the system prompt, "" for none; None: what the model's own chat template has.
      tensor: devices among which each copy of the weights is split; it divides the heads.

    Raises UserError or OSError.
    """
    checkpoint, output = paths.given(checkpoint), paths.given(output)
    if output.exists():
        raise FileExistsError(f"{output} is there already: choose another --output, or remove it")
    if jax.device_count() % tensor:
        raise BadInput(f"--tensor={tensor} does not divide the {jax.device_count()} devices")
    folders.layout_of(checkpoint)
    asked, dropped = sources.read_prompts(prompts, "prompt", blank=True)
    for reason, count in dropped.items():
        print(f"{prompts}: {reason}: {count}", file=sys.stderr)
    tokenizer = load_tokenizer(checkpoint)
    chat = _chat(checkpoint, tokenizer, chat_format, system)
    _check_blanks(asked, tokenizer, chat_format)
    source = open_model(
        checkpoint,
        tokenizer,
        meshes.sample_mesh(MeshShape(data=1, fsdp=-1, tensor=tensor)),
        chat_format=chat,
        config=engine,
        key=stage_key(seed, "generate"),
    )
    _warn_of_length(checkpoint, source, asked, chat_format, params)
    parts = output.parent / f".{output.name}.parts"
    facts = {"checkpoint": str(checkpoint), "prompts": rows.digest(prompts), "format": chat_format, "seed": seed}
    facts |= {"system": chat.system} | {name: value for name, value in vars(params).items() if name != "stop"}
    shard_prompts = _go_on(parts, facts, shard_prompts)
    done = jsonl.shards_done(parts)
    with progress("generate", params.samples * len(asked), "completion") as report:
        for index, start in enumerate(range(0, len(asked), shard_prompts)):
            part = asked[start : start + shard_prompts]
            if index in done:
                report(params.samples * len(part), 0)
                continue
            requests = [Request(id=p.id, prompts=(p.text,), chat=chat_format != _CONTINUE) for p in part]
            jsonl.write(jsonl.shard(parts, index), _answers(part, source(requests, params, report)))
    answers = jsonl.read(parts, Responses)
    if [answer.id for answer in answers] != [prompt.id for prompt in asked]:
        raise BadInput(f"{parts} does not hold a line for each prompt: a file in it is damaged; remove the folder")
    jsonl.write(output, answers)
    parts.rmtree()


def _chat(checkpoint: epath.Path, tokenizer: Tokenizer, name: str, system: str | None) -> ChatFormat:
    """The chat format with its system prompt; says where the model's own template differs."""
    if name == _CONTINUE:
        if system is not None:
            raise BadInput("--system is given, and --format=none continues texts: choose the model's chat format")
        return DIALOGUE  # or any other: continuing a text uses none of it
    chat, note = templates.resolve(checkpoint, tokenizer, name, system, _FIELDS)
    if note is not None:
        print(f"note: {note}", file=sys.stderr)
    return chat


def _check_blanks(prompts: Sequence[Prompt], tokenizer: Tokenizer, chat_format: str) -> None:
    """Says how many prompts are blank: in a chat they are empty messages, and else the begin token alone is continued.

    Raises BadInput where there is nothing to continue.
    """
    blank = [prompt for prompt in prompts if not prompt.text.strip()]
    if chat_format == _CONTINUE:
        nothing = [prompt.id for prompt in blank if not encode_opening(tokenizer, prompt.text)]
        if nothing:
            raise BadInput(
                f"prompt {nothing[0]!r} is empty, and {tokenizer.name} puts no begin token before a text: there is "
                "nothing to continue; give it words"
            )
    elif blank:
        print(f"note: {len(blank)} of {len(prompts)} prompts are blank: empty messages", file=sys.stderr)


def _warn_of_length(
    checkpoint: epath.Path, source: ModelGenerate, prompts: Sequence[Prompt], chat_format: str, params: SamplingParams
) -> None:
    """Says how many prompts, with their completions, may be longer than the texts that the model was made for."""
    most = config_files.hf_fields(checkpoint).get("max_position_embeddings")
    if not isinstance(most, int):
        return
    if chat_format == _CONTINUE:
        lengths = [len(encode_opening(source.tokenizer, prompt.text)) for prompt in prompts]
    else:
        lengths = [len(encode_prompt(source.tokenizer, source.chat_format, prompt.text)) for prompt in prompts]
    if longer := sum(length + params.max_new_tokens > most for length in lengths):
        print(
            f"warning: {longer:,} of {len(prompts):,} prompts have more than {most:,} tokens together with "
            f"--max_new_tokens={params.max_new_tokens}, and this model was made for texts of {most:,}: it may write "
            "nonsense beyond",
            file=sys.stderr,
        )


def _answers(prompts: Sequence[Prompt], drawn: Sequence[Sequence[tuple]]) -> list[Responses]:
    return [
        Responses(id=prompt.id, prompt=prompt.text, completions=completions)
        for prompt, (completions,) in zip(prompts, drawn, strict=True)
    ]


def _go_on(parts: epath.Path, facts: dict[str, object], shard_prompts: int) -> int:
    """Notes what an output is made of, or checks that one of which parts are done is made of the same; returns the
    prompts of a part, as many as in those.

    Raises:
      BadInput: names what has changed, or the note is gone or damaged.
    """
    note = parts / "arguments.json"
    if not jsonl.shards_done(parts):
        parts.mkdir(parents=True, exist_ok=True)
        jsonl.write_json(note, facts | {"shard_prompts": shard_prompts})
        return shard_prompts
    known = jsonl.read_json(note) if note.exists() else None
    if not isinstance(known, dict) or "shard_prompts" not in known:
        raise BadInput(f"{parts} holds a begun output, and {note.name} not what it is made of: remove the folder")
    changed = [name for name in facts if known.get(name) != facts[name]]
    if changed:
        raise BadInput(
            f"{parts} holds a begun output for which {changed[0]} was {known.get(changed[0])!r}, and is now "
            f"{facts[changed[0]]!r}: go back to the former, choose another --output, or remove the folder"
        )
    return known["shard_prompts"]


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
            system=_SYSTEM.value,
            params=params,
            seed=_SEED.value,
            engine=EngineConfig(rows=_ROWS.value, steps=16, weights=None, cache=None),
            tensor=_TENSOR.value,
            shard_prompts=max(1, _ROWS.value // _N.value),  # a part is decoded at once: a few minutes of work
        )
    print(_OUTPUT.value)


if __name__ == "__main__":
    commandline.run(main, ["checkpoint", "prompts", "output"])
