"""`python -m srlm_jax.main --config=configs/iter2.py`: makes the models up to M2, and the report on them."""

import sys

from absl import app, flags, logging
from ml_collections import config_flags

from srlm_jax.pipeline.command import FAILURES, run_command

_CONFIG = config_flags.DEFINE_config_file("config", None, "Which models to make, and everything they depend on.")
_REDO = flags.DEFINE_string("redo", None, "A stage to remove, with all that depends on it, and to make again.")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        sys.exit(f"error: unexpected argument {argv[1]!r}; options have the form --config.field=value")
    logging.set_verbosity(logging.ERROR)
    try:
        run_command(_CONFIG.value.to_dict(), _REDO.value)
    except FAILURES as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main)
