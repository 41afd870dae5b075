"""`python -m srlm_jax.main --config=configs/iter2.py`: makes the models up to M2, and the report on them."""

from absl import flags
from ml_collections import config_flags

from srlm_jax import commandline
from srlm_jax.pipeline.command import run_command
from srlm_jax.pipeline.settings import Settings, field_names

_CONFIG = config_flags.DEFINE_config_file("config", None, "Which models to make, and everything they depend on.")
_REDO = flags.DEFINE_string(
    "redo", None, "Stages to remove, with all that depends on them, and to make again: m2/pairs,m2/eval."
)


def main(argv: list[str]) -> None:
    with commandline.begin(argv, "--config.field=value"):
        given = [f"config.{name}" for name in config_flags.get_override_values(flags.FLAGS["config"])]
        run_command(_CONFIG.value.to_dict(), _REDO.value, given)


if __name__ == "__main__":
    commandline.run(main, ["config"], field_names(Settings, "config"))
