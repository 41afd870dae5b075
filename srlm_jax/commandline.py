"""What all commands have in common: flags, and how they end on an error."""

import sys
from contextlib import AbstractContextManager

from absl import flags, logging

from srlm_jax.parallel import hosts

_DEBUG = flags.DEFINE_bool("debug", False, "Print a traceback with every error.")


def begin(argv: list[str], example: str) -> AbstractContextManager[None]:
    """Refuses arguments that are no flags, and silences the libraries' logs.

    The command runs inside what is returned, which ends the process if an error is raised: see `hosts.leaving`.
    """
    if len(argv) > 1:
        sys.exit(f"error: unexpected argument {argv[1]!r}; options have the form {example}")
    logging.set_verbosity(logging.ERROR)
    return hosts.leaving(_DEBUG.value)
