"""M2: one self-rewarding round, from M1. Makes M1 first where it is not there.

python -m srlm_jax.main --config=configs/iter2.py           the tiny scale
python -m srlm_jax.main --config=configs/iter2.py:smoke     every stage at its smallest
"""

from ml_collections import ConfigDict

from configs import base


def get_config(scale: str | None = None) -> ConfigDict:
    """The configuration of a scale, up to M2."""
    return base.get_config(scale, models=2)
