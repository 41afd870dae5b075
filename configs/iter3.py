"""M3: the second self-rewarding round, from M2. Makes M2 first where it is not there.

python -m srlm_jax.main --config=configs/iter3.py           the tiny scale
python -m srlm_jax.main --config=configs/iter3.py:smoke     every stage at its smallest
"""

from ml_collections import ConfigDict

from configs import base


def get_config(scale: str | None = None) -> ConfigDict:
    """The configuration of a scale, up to M3."""
    return base.get_config(scale, models=3)
