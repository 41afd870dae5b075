"""The samples that travel inside a report: prompts with their answers, votes and scores, as plain JSON values."""

import collections
import dataclasses

from srlm_jax.data.pairs import preference_pair
from srlm_jax.records import Completion, JudgedPrompt, JudgedResponse, PairDrop, PreferencePair, Responses

EMBEDDED = 200  # of each round


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judged:
    """Judged answers and what else is known of them. `oracle` maps a prompt's id to the scores of its answers."""

    label: str
    judge: str
    style: str
    prompts: list[JudgedPrompt]
    pairs: dict[str, PreferencePair]
    paired: bool
    oracle: dict[str, list[float]]


def roles(prompt: JudgedPrompt, pair: PreferencePair | None) -> list[str]:
    """What each answer is in the pair: "chosen", "rejected" or ""."""
    found = [""] * len(prompt.responses)
    if pair:
        answers = [(answer.response, answer.score) for answer in prompt.responses]
        found[answers.index((pair.chosen, pair.chosen_score))] = "chosen"
        found[answers.index((pair.rejected, pair.rejected_score))] = "rejected"
    return found


def _kind(prompt: JudgedPrompt, group: Judged) -> str:
    """What became of a prompt: "pair", a PairDrop, or "not paired yet"."""
    if prompt.id in group.pairs:
        return "pair"
    outcome = preference_pair(prompt)
    return outcome if group.paired and isinstance(outcome, PairDrop) else "not paired yet"


def _embedded(samples: list[dict], name: str, title: str) -> dict:
    """At most EMBEDDED samples: rare kinds whole, frequent ones evenly thinned, in the order of the file."""
    kinds = collections.defaultdict(list)
    for index, sample in enumerate(samples):
        kinds[sample["kind"]].append(index)
    chosen: list[int] = []
    groups = sorted(kinds.values(), key=len)
    for position, group in enumerate(groups):
        room = (EMBEDDED - len(chosen)) // (len(groups) - position)
        count = min(room, len(group))
        chosen += [group[index * len(group) // count] for index in range(count)]
    kept = [samples[index] for index in sorted(chosen)]
    return {"name": name, "title": title, "total": len(samples), "samples": kept}


def _answer(label: str, role: str, answer: JudgedResponse | Completion, oracle: float | None) -> dict:
    judged = isinstance(answer, JudgedResponse)
    votes = [dataclasses.asdict(vote) for vote in answer.votes] if judged else []
    return {
        "label": label,
        "role": role,
        "text": answer.response if judged else answer.text,
        "tokens": answer.tokens,
        "finished": answer.finished,
        "score": answer.score if judged else None,
        "oracle": oracle,
        "votes": votes,
    }


def of_round(group: Judged) -> dict:
    """The samples of one round, and how many prompts they were taken from."""
    found = []
    for prompt in group.prompts:
        answers = [
            _answer(f"Answer {index + 1}", role, answer, score)
            for index, (role, answer, score) in enumerate(
                zip(
                    roles(prompt, group.pairs.get(prompt.id)),
                    prompt.responses,
                    group.oracle.get(prompt.id, [None] * len(prompt.responses)),
                    strict=True,
                )
            )
        ]
        found.append({"id": prompt.id, "prompt": prompt.prompt, "kind": _kind(prompt, group), "answers": answers})
    return _embedded(found, group.label, f"Round {group.label}: answered and judged by {group.judge}")


def held_out(evaluated: dict[str, list[Responses]], oracle: dict[str, dict[str, list[float]]]) -> list[dict]:
    """Each held-out prompt with the first answer of every model: one group, or none where no model is evaluated."""
    found: dict[str, dict] = {}
    for model, lines in evaluated.items():
        for line in lines:
            sample = {"id": line.id, "prompt": line.prompt, "kind": "held out", "answers": []}
            answers = found.setdefault(line.id, sample)["answers"]
            if line.completions:
                answers.append(_answer(model, "", line.completions[0], oracle[model].get(line.id, [None])[0]))
    return [_embedded(list(found.values()), "held-out", "Held-out prompts: one answer of each model")] if found else []
