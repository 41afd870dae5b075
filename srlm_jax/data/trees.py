"""Message trees in Open Assistant's nested form -> the seed data: IFT examples and ranked EFT prompts (paper 3.1.1).

One tree per line: {"message_tree_id", "prompt": {"message_id", "text", "role", "lang", "deleted", "replies": [...]}},
each reply a message of the same form with a "rank" (0 is the best) where humans ranked it. Only the first turn is
used: the prompt and its direct replies. `srlm_jax.data.oasst` reads such trees from files and checks them.
"""

import collections
import dataclasses
import enum
import hashlib
from collections.abc import Sequence
from typing import Annotated

from srlm_jax import limits
from srlm_jax.errors import BadInput
from srlm_jax.limits import Text, at_least, below
from srlm_jax.records import Example, RankedPrompt

Prompts = Annotated[int, at_least(0), below(2**31)]


class Withdrawn(enum.StrEnum):
    """Why a message is not used, whatever its rank."""

    DELETED = "deleted"
    SYNTHETIC = "synthetic"  # a reply that a model wrote; a model's prompt is used, for humans answered and ranked it
    REJECTED = "rejected"  # its `review_result` is false: human reviewers rejected it


class SeedDrop(enum.StrEnum):
    """Why a tree, or a reply of a tree that stays, is not in the seed data."""

    OTHER_LANGUAGE = "other_language"
    DELETED_PROMPT = "deleted_prompt"
    REJECTED_PROMPT = "rejected_prompt"
    EMPTY_PROMPT = "empty_prompt"
    SAME_PROMPT = "same_prompt"  # another tree asks the same: on two sides of the split it would leak
    NO_USABLE_RANKING = "no_usable_ranking"  # neither a best reply for IFT nor a ranking for EFT
    UNUSED = "unused"  # beyond the number of prompts asked for
    DELETED_REPLY = "deleted_reply"
    SYNTHETIC_REPLY = "synthetic_reply"
    REJECTED_REPLY = "rejected_reply"
    EMPTY_REPLY = "empty_reply"
    OTHER_LANGUAGE_REPLY = "other_language_reply"
    UNRANKED_REPLY = "unranked_reply"
    SAME_REPLY = "same_reply"  # the text of a better reply to the same prompt


@dataclasses.dataclass(frozen=True, kw_only=True)
class SeedRules:
    """Which trees become seed data, and how many prompts go where (paper: 3,200 IFT; EFT about 570 and 190).

    A prompt needs `min_ranked` ranked replies to serve EFT: at least 2, or there is nothing to rank.
    """

    lang: Text
    min_ranked: Annotated[int, at_least(2), below(2**31)]
    ift_prompts: Prompts
    eft_train_prompts: Prompts
    eft_eval_prompts: Prompts

    def __post_init__(self) -> None:
        limits.check(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SeedSplit:
    """The seed data. `counts`: trees read, examples made, and what was dropped by `SeedDrop`.

    trees = ift + eft_train + eft_eval + the tree drops (those up to UNUSED).
    """

    ift: list[Example]
    eft_train: list[RankedPrompt]
    eft_eval: list[RankedPrompt]
    counts: dict[str, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Tree:
    id: str
    prompt: str
    best: str | None  # the reply humans ranked 0
    ranked: RankedPrompt | None


def split_seed(trees: Sequence[dict], rules: SeedRules, seed: int) -> SeedSplit:
    """Divides the trees first and converts them after: no prompt, nor its text, is on two sides (paper 3.1.1).

    Each tree has a place given by a hash of `seed` and its id, so the split depends neither on the order of the trees
    nor on the machine. In that order the ranked trees fill EFT evaluation and then EFT training; of what is left,
    those with a best reply fill IFT. Trees whose prompts are the same but for case and white space count as one, the
    first in hash order.

    - IFT takes the reply with rank 0; where that one is withdrawn the tree gives none, for the next one is not the
      humans' best.
    - EFT takes the ranked replies that are not withdrawn, at least `min_ranked` of them and no two with one rank, their
      ranks renumbered 0..k-1; the replies are in hash order, so that their position says nothing of their rank.

    Raises ValueError where the trees are too few for `rules` (with the field to lower) or an id occurs twice.
    """
    counts = collections.Counter({"trees": len(trees)})
    usable = []
    for tree in _distinct_prompts(trees, rules.lang, seed, counts):
        converted = _convert(tree, rules, seed, counts)
        if converted.best is None and converted.ranked is None:
            counts[SeedDrop.NO_USABLE_RANKING] += 1
        else:
            usable.append(converted)

    ranked = [tree for tree in usable if tree.ranked is not None]
    eft_prompts = rules.eft_eval_prompts + rules.eft_train_prompts
    if eft_prompts > len(ranked):
        raise BadInput(
            f"eft_eval_prompts + eft_train_prompts ask for {eft_prompts} prompts, and of {len(trees)} trees "
            f"{len(ranked)} in '{rules.lang}' have at least {rules.min_ranked} ranked replies; "
            "lower eft_train_prompts, eft_eval_prompts or min_ranked, or give more trees"
        )
    taken = {tree.id for tree in ranked[:eft_prompts]}
    ift = [tree for tree in usable if tree.best is not None and tree.id not in taken]
    if rules.ift_prompts > len(ift):
        raise BadInput(
            f"ift_prompts asks for {rules.ift_prompts} prompts, and of {len(trees)} trees {len(ift)} in "
            f"'{rules.lang}' with a reply of rank 0 are left after {eft_prompts} for EFT; "
            "lower ift_prompts or eft_train_prompts, or give more trees"
        )
    ift = ift[: rules.ift_prompts]
    counts[SeedDrop.UNUSED] += len(usable) - eft_prompts - len(ift)
    eft = [tree.ranked for tree in ranked[:eft_prompts]]
    counts.update(ift=len(ift), eft_train=rules.eft_train_prompts, eft_eval=rules.eft_eval_prompts)
    return SeedSplit(
        ift=[Example(id=tree.id, prompt=tree.prompt, response=tree.best, finished=True) for tree in ift],
        eft_eval=eft[: rules.eft_eval_prompts],
        eft_train=eft[rules.eft_eval_prompts :],
        counts={str(name): count for name, count in sorted(counts.items())},
    )


def ranked_prompts(trees: Sequence[dict], lang: str) -> tuple[list[RankedPrompt], dict[str, int]]:
    """Every prompt whose ranking `split_seed` could give to EFT, in an order that does not depend on that of the trees;
    and the counts of trees, of `prompts` and of what was dropped, by `SeedDrop`.

    Raises ValueError where an id occurs twice.
    """
    rules = SeedRules(lang=lang, min_ranked=2, ift_prompts=0, eft_train_prompts=0, eft_eval_prompts=0)
    counts = collections.Counter({"trees": len(trees)})
    converted = [_convert(tree, rules, 0, counts) for tree in _distinct_prompts(trees, lang, 0, counts)]
    ranked = [tree.ranked for tree in converted if tree.ranked is not None]
    counts.update({"prompts": len(ranked), SeedDrop.NO_USABLE_RANKING: len(converted) - len(ranked)})
    return ranked, {str(name): count for name, count in sorted(counts.items()) if count}


def withdrawn(message: dict) -> Withdrawn | None:
    """Why a message is not used, None where it may be."""
    if message.get("deleted"):
        return Withdrawn.DELETED
    if message.get("synthetic") and message["role"] == "assistant":
        return Withdrawn.SYNTHETIC
    return Withdrawn.REJECTED if message.get("review_result") is False else None


def same_text_key(prompt: str) -> str:
    """What two prompts share that are the same but for case and white space."""
    return " ".join(prompt.split()).casefold()


def _distinct_prompts(trees: Sequence[dict], lang: str, seed: int, counts: collections.Counter) -> list[dict]:
    """The trees with a prompt to use, in hash order, one of each prompt text."""
    ids = collections.Counter(tree["message_tree_id"] for tree in trees)
    for name, count in ids.items():
        if count > 1:
            raise BadInput(f"message_tree_id '{name}' occurs {count} times; keep one tree of each id")
    texts = set()
    kept = []
    for tree in sorted(trees, key=lambda tree: _place(seed, tree["message_tree_id"])):
        prompt = tree["prompt"]
        text = same_text_key(prompt["text"])
        if prompt.get("lang") != lang:
            counts[SeedDrop.OTHER_LANGUAGE] += 1
        elif (reason := withdrawn(prompt)) is not None:
            counts[SeedDrop(f"{reason}_prompt")] += 1
        elif not text:
            counts[SeedDrop.EMPTY_PROMPT] += 1
        elif text in texts:
            counts[SeedDrop.SAME_PROMPT] += 1
        else:
            texts.add(text)
            kept.append(tree)
    return kept


def _convert(tree: dict, rules: SeedRules, seed: int, counts: collections.Counter) -> _Tree:
    prompt = tree["prompt"]
    replies = []
    for reply in prompt.get("replies") or []:
        if (reason := withdrawn(reply)) is not None:
            counts[SeedDrop(f"{reason}_reply")] += 1
        elif not reply["text"].strip():
            counts[SeedDrop.EMPTY_REPLY] += 1
        elif (reply.get("lang") or rules.lang) != rules.lang:
            counts[SeedDrop.OTHER_LANGUAGE_REPLY] += 1
        elif reply.get("rank") is None:
            counts[SeedDrop.UNRANKED_REPLY] += 1
        else:
            replies.append(reply)
    replies.sort(key=lambda reply: (reply["rank"], reply["message_id"]))
    ranks = [reply["rank"] for reply in replies]
    distinct_ranks = len(set(ranks)) == len(ranks)
    best = replies[0]["text"] if ranks.count(0) == 1 else None

    by_text = {}
    for reply in replies:
        if reply["text"] in by_text:
            counts[SeedDrop.SAME_REPLY] += 1
        else:
            by_text[reply["text"]] = (_place(seed, reply["message_id"]), len(by_text), reply["text"])
    ranked = None
    if distinct_ranks and len(by_text) >= rules.min_ranked:
        _, dense_ranks, responses = zip(*sorted(by_text.values()), strict=True)
        ranked = RankedPrompt(id=tree["message_tree_id"], prompt=prompt["text"], responses=responses, ranks=dense_ranks)
    return _Tree(id=tree["message_tree_id"], prompt=prompt["text"], best=best, ranked=ranked)


def _place(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{seed}:{name}".encode()).digest()
