"""How well a model predicts human answers: whether a training has left it able to write."""

from collections.abc import Sequence

from srlm_jax.evaluate.reward_metrics import ratio
from srlm_jax.records import Metric


def likelihood_metrics(logprobs: Sequence[float], tokens: Sequence[int]) -> dict[str, Metric]:
    """Of human answers that no model was trained on, one unit an answer; empty with fewer than two.

    - human_loss: mean negative log-likelihood, in nats a token, over all tokens of all answers.

    Args:
      logprobs: the model's log-probability of each whole answer, in nats.
      tokens: how many tokens each answer has, the end token included.
    """
    metric = ratio([(-logprob, count) for logprob, count in zip(logprobs, tokens, strict=True)])
    return {} if metric is None else {"human_loss": metric}
