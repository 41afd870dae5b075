"""What is checked before the first stage: whatever would stop a run hours later.

Nothing is written and no stage is removed until all of it has passed.
"""

from collections.abc import Collection

from etils import epath

from srlm_jax.judge import rubric as rubrics
from srlm_jax.model import folders, llama, weights
from srlm_jax.parallel import rules
from srlm_jax.pipeline import answering, evaluation, report, seeding
from srlm_jax.pipeline.endpoint import EndpointGenerate
from srlm_jax.pipeline.run import Run, naming
from srlm_jax.pipeline.settings import BadConfig
from srlm_jax.storage import paths
from srlm_jax.text import chat, self_instruct
from srlm_jax.text.tokenizer import check_vocabulary, load_tokenizer


def check(run: Run, removed: Collection[str]) -> None:
    """Refuses a run that would fail later.

    Args:
      removed: stages that are going to be made again, done as they may be.

    Raises:
      BadConfig: a file cannot be read, a folder holds no model, or prompts do not fit the model; with the field's name.
      EndpointError, MissingExtra: a server cannot be asked.
    """
    report.template()
    check_lengths(run)
    check_sources(run, removed)
    check_model(run, removed)
    check_writer(run)
    check_servers(run, removed)


def _stays(run: Run, stage: str, removed: Collection[str]) -> bool:
    """Whether a stage is done and not to be made again."""
    return run.ledger.done(stage) and stage not in removed


def check_model(run: Run, removed: Collection[str]) -> None:
    """Refuses weights in config.model.path that could not be loaded, as far as the headers of their files tell. Once M0
    has been made of them they are not needed.

    Raises:
      BadConfig: says what is wrong with them.
    """
    path = run.settings.model.path
    if path is not None and not _stays(run, "m0/train", removed):
        with naming("config.model.path"):
            weights.check(path, run.settings.model.llama)


def check_sources(run: Run, removed: Collection[str]) -> None:
    """Reads the files that the configuration names. Human data that the finished stage "seed" has read are not read
    again.

    Raises:
      BadConfig: a file cannot be read or used; the message has its field.
    """
    s = run.settings
    config = seeding.seed_config(run)
    read = _stays(run, "seed", removed) and run.ledger.entry("seed")["config"] == config
    if not read and (s.seed_data.trees is not None or s.seed_data.ift is not None):
        seeding.read_seed(run)
    if s.seed_data.eft_file is not None:
        seeding.read_judging_examples(run)
    if s.models > 1 and s.self_instruction.prompts_file is not None:
        answering.read_prompts(run)
    if not run.embedded and s.validation.prompts_file is not None:
        evaluation.read_prompts(run)


def check_writer(run: Run) -> None:
    """Refuses a source of new prompts that will not be there when a round needs it.

    Raises:
      BadConfig: it is neither a model of this run nor a folder with a model and a tokenizer.
    """
    s = run.settings
    if s.models < 2 or s.self_instruction.prompts_file is not None or s.self_instruction.endpoint.url is not None:
        return
    writer = s.self_instruction.generator
    if writer in ("current", "m0", "sft", "m1"):
        return
    with naming("config.self_instruction.generator"):
        if writer is None or not paths.given(writer).exists():
            raise BadConfig(
                f"{writer!r} is neither 'current', nor a model that every round finds (m0, sft, m1), nor a folder"
                + ("" if writer is None else folders.hub_hint(epath.Path(writer)))
            )
        sizes = weights.read_config(writer, param_dtype="float32", compute_dtype="float32", remat="dots")
        weights.check(writer, sizes)
        rules.model_shardings(run.sample_mesh, rules.SAMPLE, llama.abstract(sizes))
        check_vocabulary(load_tokenizer(writer), sizes.V)


def check_servers(run: Run, removed: Collection[str]) -> None:
    """Asks each server of this run for something short, as its stages will; the server of the run's own models only
    whether it is there and takes the key, since none of them may be served yet. A finished run may need no server any
    more: only the keys are looked for.

    Raises:
      EndpointError: a key is missing; a server cannot be reached, or refuses the key, the model or a parameter.
      MissingExtra: the package that asks servers is missing.
    """
    s, writer = run.settings, run.settings.self_instruction
    ask = not _stays(run, f"m{s.models}/eval", removed)
    if s.endpoint.url is not None:
        generate = EndpointGenerate(s.endpoint, "config.endpoint")
        if ask:
            generate.check_connection()
    others = []  # (field, server, whether it is asked as in a chat, sampling)
    if s.models > 1:
        others.append(("config.judging.endpoint", s.judging.endpoint, True, s.judging))
        if writer.prompts_file is None:
            others.append(("config.self_instruction.endpoint", writer.endpoint, False, writer.sampling))
    if not run.embedded:
        others.append(("config.validation.endpoint", s.validation.endpoint, True, s.judging))
    for field, server, chatting, params in others:
        if server.url is not None:
            generate = EndpointGenerate(server, field)
            if ask:
                generate.check(chatting, params)


def check_lengths(run: Run) -> None:
    """Refuses a configuration whose longest judge or 8-shot prompt would not fit the model.

    Raises:
      BadConfig: names the fields whose sum is too large.
    """
    s = run.settings

    asked = rubrics.fill(run.rubric, "", "")
    frame = len(chat.encode_prompt_with_opening(run.tokenizer, run.chat, asked, s.judging.prefix))
    needed = frame + s.max_prompt_tokens + s.responses.max_new_tokens + s.judging.max_new_tokens
    if needed > s.context_length:
        raise BadConfig(
            f"the judge's prompt cannot be held: {frame} tokens of rubric and prefix + config.max_prompt_tokens "
            f"{s.max_prompt_tokens} + config.responses.max_new_tokens {s.responses.max_new_tokens} + "
            f"config.judging.max_new_tokens {s.judging.max_new_tokens} = {needed} > config.context_length "
            f"{s.context_length}: lower one or raise the last"
        )
    if s.models < 2 or s.self_instruction.prompts_file is not None:
        return
    shots = s.self_instruction.from_seeds + s.self_instruction.from_generated
    frame = len(chat.encode_opening(run.tokenizer, self_instruct.creation_prompt(["x"] * shots)))
    needed = frame + shots * s.max_prompt_tokens + s.self_instruction.sampling.max_new_tokens
    if needed > s.context_length:
        raise BadConfig(
            f"the prompt for new instructions cannot be held: {frame} tokens of frame + {shots} x "
            f"config.max_prompt_tokens {s.max_prompt_tokens} + config.self_instruction.sampling.max_new_tokens "
            f"{s.self_instruction.sampling.max_new_tokens} = {needed} > config.context_length {s.context_length}: "
            "lower one or raise the last"
        )
