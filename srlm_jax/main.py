"""`python -m srlm_jax.main --config=configs/iter2.py`: makes the models up to M2, and the report on them."""

import difflib
import sys

from absl import app, flags
from ml_collections import config_flags

from srlm_jax import commandline
from srlm_jax.pipeline.command import run_command
from srlm_jax.pipeline.settings import Settings, field_names

_CONFIG = config_flags.DEFINE_config_file("config", None, "Which models to make, and everything they depend on.")
_REDO = flags.DEFINE_string(
    "redo", None, "Stages to remove, with all that depends on them, and to make again: m2/pairs,m2/eval."
)


def parse_flags(argv: list[str]) -> list[str]:
    """absl's parser; an override of a field that does not exist stops with the nearest one that does."""
    try:
        return app.parse_flags_with_usage(argv)
    except (AttributeError, KeyError):  # how config_flags says so
        known = field_names(Settings, "config")
        named = [argument.lstrip("-").partition("=")[0] for argument in argv]
        unknown = next((name for name in named if name.startswith("config.") and name not in known), None)
        if unknown is None:
            raise
        sys.exit(f"error: --{unknown}: no such field; did you mean --{_nearest(unknown, known)}?")


def _nearest(name: str, known: list[str]) -> str:
    """The name most alike, its last part counted twice: `config.learning_rte` has no likeness but there."""

    def likeness(other: str) -> float:
        pairs = ((name, other), (name.rpartition(".")[2], other.rpartition(".")[2]))
        return sum(difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs)

    return max(known, key=likeness)


def main(argv: list[str]) -> None:
    with commandline.begin(argv, "--config.field=value"):
        given = [f"config.{name}" for name in config_flags.get_override_values(flags.FLAGS["config"])]
        run_command(_CONFIG.value.to_dict(), _REDO.value, given)


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main, flags_parser=parse_flags)
