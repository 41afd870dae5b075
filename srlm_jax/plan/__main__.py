"""`python -m srlm_jax.plan --config=configs/iter2.py:llama2_70b --topology=v5p:4x4x4`: whether an iteration fits a
slice of chips that nobody has rented yet, and what it would cost."""

import sys

import jax
from absl import flags
from ml_collections import config_flags

from srlm_jax import commandline
from srlm_jax.errors import BadInput
from srlm_jax.pipeline.settings import Settings, field_names, read
from srlm_jax.plan import report
from srlm_jax.plan.planning import make_plan
from srlm_jax.storage import jsonl

_CONFIG = config_flags.DEFINE_config_file("config", None, "What to plan: a configuration, as for srlm_jax.main.")
_TOPOLOGY = flags.DEFINE_string(
    "topology", None, "v5p:4x4x4, h100:8, ...; auto:v5p is the smallest slice of a family that fits."
)
_FAMILY = flags.DEFINE_string("family", None, "With --topology=auto: the kind of chip.")
_PRICE = flags.DEFINE_float("price", None, "Of a chip for an hour, in any currency.", lower_bound=0)
_JSON = flags.DEFINE_string("json", None, "A file to write all of it to.")


def main(argv: list[str]) -> None:
    with commandline.begin(argv, "--topology=v5p:4x4x4"):
        jax.config.update("jax_platforms", "cpu")
        topology = _TOPOLOGY.value
        if topology == "auto":
            if _FAMILY.value is None:
                raise BadInput("--topology=auto needs --family, as in --family=v5p")
            topology = f"auto:{_FAMILY.value}"
        plan = make_plan(
            read(_CONFIG.value.to_dict()),
            topology,
            lambda said: print(said, file=sys.stderr, flush=True),
        )
        print(report.text(plan, _PRICE.value))
        if _JSON.value is not None:
            jsonl.write_json(_JSON.value, report.document(plan, _PRICE.value))
    sys.exit(0 if plan.fits else 3)


if __name__ == "__main__":
    commandline.run(main, ["config", "topology"], field_names(Settings, "config"))
