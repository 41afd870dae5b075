"""Redoes two rounds of a finished run in a process of its own, and prints what each compiled that reads a model:
`python counted_programs.py WORKDIR`."""

import json
import logging
import re
import sys

from configs.base import get_config
from srlm_jax.pipeline import iteration
from srlm_jax.pipeline.command import run_command

# A round's programs that read weights; what else is compiled makes empty caches, adds numbers up and the like.
NAMES = ("prefill_prefix", "admit", "decode", "response_logprobs", "train_step", "relaid")

compiled: list[str] = []


class Heard(logging.Handler):
    """Notes the name of each program as it is compiled."""

    def emit(self, record: logging.LogRecord) -> None:
        if match := re.match(r"Compiling (?:jit\()?(\w+)", record.getMessage()):
            compiled.append(match[1])


def main(workdir: str) -> None:
    logger = logging.getLogger("jax._src.interpreters.pxla")
    logger.setLevel(logging.DEBUG)
    logger.addHandler(Heard())
    rounds, one_round = {}, iteration.self_rewarding_round

    def counted(run, name, start):
        before = len(compiled)
        one_round(run, name, start)
        rounds[name] = [name for name in compiled[before:] if name in NAMES]

    iteration.self_rewarding_round = counted
    config = get_config("smoke", 3)
    config.workdir = workdir
    run_command(config.to_dict(), "m2/prompts")
    print(json.dumps(rounds))


if __name__ == "__main__":
    main(*sys.argv[1:])
