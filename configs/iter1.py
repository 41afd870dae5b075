"""M0, the SFT baseline and M1: base model, then SFT on IFT, then on IFT + EFT (section 3.1).

python -m srlm_jax.main --config=configs/iter1.py           the tiny scale
python -m srlm_jax.main --config=configs/iter1.py:smoke     every stage at its smallest
"""

from ml_collections import ConfigDict

from configs import base


def get_config(scale: str | None = None) -> ConfigDict:
    """The configuration of a scale, up to M1."""
    return base.get_config(scale, models=1)
