from configs.base import get_config as base

def get_config(scale: str | None = None):
    return base(scale, models=2)
