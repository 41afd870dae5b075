"""The report of a run: one HTML file that needs nothing else, from whatever stages have finished.

Every text a model wrote is hostile. The template escapes all it prints; samples travel as JSON that cannot close its
script element, and the page's own script shows them as text nodes only.
"""

import collections
import importlib.resources
import itertools
import json
import math
from collections.abc import Iterable, Sequence
from typing import TypeVar

import jinja2
import numpy as np
from etils import epath

from srlm_jax.data.eft import EftDrop
from srlm_jax.pipeline import charts, samples
from srlm_jax.records import JudgedPrompt, NoVote, PairDrop, PreferencePair, Responses
from srlm_jax.storage import jsonl

Record = TypeVar("Record")

# key, heading, unit and what it means; the order of the columns. Metrics with "%" are fractions in results.json.
_METRICS = (
    ("oracle_score", "Oracle score", "", "mean exact score of answers to held-out prompts, 0 to 5"),
    ("perfect", "Perfect", "%", "held-out answers that the oracle gives 5 of 5"),
    ("human_loss", "Human loss", "", "nats a token of the best-ranked human answers of the evaluation split"),
    ("validation_score", "Validation", "", "mean score of answers to the validation prompts by the judge from outside"),
    ("pairwise_accuracy", "Pairwise", "%", "pairs of answers that the judge orders as the ranking does"),
    ("five_best", "5-best", "%", "answers judged 5 of 5 that are ranked first"),
    ("exact_match", "Exact match", "%", "prompts whose whole order the judge gets right"),
    ("spearman", "Spearman", "", "rank correlation of judge and ranking"),
    ("kendall_tau_b", "Kendall τ", "", "rank correlation of judge and ranking, by pairs"),
    ("scored", "Scored", "%", "judgements of the evaluation split that have a score"),
    ("response_tokens", "Tokens", "", "mean length of answers to held-out prompts"),
    ("cut", "Cut", "%", "answers to held-out prompts that the length limit cut"),
)
# (is it DPO, keys drawn together, title, y label)
_CURVES = (
    (False, ("loss",), "Supervised fine-tuning: loss", "nats per token"),
    (True, ("loss",), "DPO: loss", "nats per pair"),
    (True, ("reward_margin",), "DPO: reward margin", "chosen minus rejected"),
    (True, ("reward_accuracy",), "DPO: reward accuracy", "fraction of pairs"),
    (True, ("chosen_logprob", "rejected_logprob"), "DPO: log-probability", "nats per response"),
    (True, ("kl",), "DPO: KL to the reference", "nats, estimated"),
)
_OPTIMIZER = (
    ("gradient_norm", "Gradient norm", "global norm"),
    ("learning_rate", "Learning rate", "learning rate"),
    ("tokens_per_second", "Throughput", "tokens per second"),
)
# The order of a model's stages; one with another name stands beside its training.
_STEPS = ("prompts", "responses", "judgements", "examples", "pairs", "reference", "train", "eval")


def write_report(workdir: epath.Path, models: Sequence[str]) -> None:
    """Writes WORKDIR/report.html from the files of the stages that have finished; the same files give the same bytes.

    `models` are names as in results.json, in the order of training: a round's answers and judgements come from the
    model before it. The files of model "M1" lie in the folder "m1".
    """
    styles = {model: f"s{index % 7}" for index, model in enumerate(models)}
    folders = {model: workdir / model.lower() for model in models}
    training = {model: _lines(folder / "metrics.jsonl") for model, folder in folders.items()}
    evaluated = {model: _read(folder / "eval" / "responses", Responses) for model, folder in folders.items()}
    oracle = {model: _oracle(folder / "eval" / "oracle.jsonl") for model, folder in folders.items()}
    # The oracle of an evaluation is about its responses, not about the answers of others that the model judged there.
    judging = [_judged(folder / "eval", model, model, styles[model], {}) for model, folder in folders.items()]
    rounds = [
        _judged(folders[model], model, before, styles[model], _oracle(folders[model] / "oracle.jsonl"))
        for before, model in itertools.pairwise(models)
    ]
    rounds = [group for group in rounds if group.prompts]
    seed = _judged(workdir / "eft", "EFT", "SFT", "s6", {})
    results = jsonl.read_json(workdir / "results.json") if (workdir / "results.json").exists() else {}
    results = {model: results[model] for model in models if model in results}
    headings = _headings(results)
    stages = _stages(workdir / "ledger", models)
    counts = {stage["stage"]: stage["counts"] for stage in stages}
    page = {
        "models": [(model, styles[model]) for model in models],
        "headings": headings,
        "table": _table(results, headings),
        "estimates": _estimates(results, styles),
        "curves": _curves(training, styles),
        "optimizer": _optimizer(training, styles),
        "first_steps": _first_steps(counts, models),
        "score_rounds": _histograms([seed, *rounds]),
        "score_models": _histograms(judging),
        "outcomes": [
            _outcomes(
                "Preference pairs", "prompts of the round", _counts(counts, models, "pairs", ("kept", *PairDrop))
            ),
            _outcomes("EFT draws", "draws", [("EFT", _draws(counts.get("eft/examples", {})))]),
            _outcomes("New prompts", "generated prompts", _counts(counts, models, "prompts", ())),
            _outcomes("Judgements", "votes", [(it.label, _votes(it)) for it in [seed, *rounds]]),
            _outcomes("Judgements of the EFT split", "votes", [(it.label, _votes(it)) for it in judging]),
        ],
        "lengths": _lengths(evaluated, rounds, styles),
        "held_out": _held_out_scores(oracle),
        "agreement": [panel for it in rounds if (panel := _agreement(it))],
        "stages": stages,
        "seconds": sum(stage["seconds"] for stage in stages),
        "slowest": max((stage["seconds"] for stage in stages), default=1) or 1,
        "samples": [samples.of_round(it) for it in rounds] + samples.held_out(evaluated, oracle),
    }
    jsonl.write_whole(workdir / "report.html", [template().render(page).encode("utf-8")])


def template() -> jinja2.Template:
    """The page, without its values."""
    source = importlib.resources.files("srlm_jax.pipeline").joinpath("report.html.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(source)


def _lines(path: epath.Path) -> list[dict]:
    """The JSON objects of a file, without a last line that is still being written. No file is no objects."""
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]] if path.exists() else []


def _draws(counts: dict[str, int]) -> dict[str, int]:
    """What became of the baseline's draws of judgements; the stage counts its prompts and examples too."""
    outcomes = (EftDrop.TOO_FEW_SCORED, EftDrop.AGAINST_HUMANS, EftDrop.TOO_MANY_TIES, EftDrop.EXTRA_DRAW)
    return {name: counts[name] for name in ("accepted_draws", *map(str, outcomes)) if name in counts}


def _oracle(path: epath.Path) -> dict[str, list[float]]:
    return {line["id"]: line["scores"] for line in _lines(path)}


def _read(path: epath.Path, cls: type[Record]) -> list[Record]:
    """The records of the shards that are there: a stage that is still at work has some of them."""
    return [record for index in sorted(jsonl.shards_done(path)) for record in jsonl.read(jsonl.shard(path, index), cls)]


def _judged(folder: epath.Path, label: str, judge: str, style: str, oracle: dict[str, list[float]]) -> samples.Judged:
    return samples.Judged(
        label=label,
        judge=judge,
        style=style,
        prompts=_read(folder / "judgements", JudgedPrompt),
        pairs={pair.id: pair for pair in _read(folder / "pairs", PreferencePair)},
        paired=bool(jsonl.shards_done(folder / "pairs")),
        oracle=oracle,
    )


def _stages(folder: epath.Path, models: Sequence[str]) -> list[dict]:
    """The ledger in the order of the work, as far as the names of the stages tell it."""
    order = {model.lower(): index for index, model in enumerate(models)} | {"eft": 1.5}
    entries = [jsonl.read_json(path) for path in folder.glob("*.json")] if folder.exists() else []
    entries = [{"counts": {}, "seconds": 0.0} | entry for entry in entries if entry.get("status", "done") == "done"]

    def place(entry: dict) -> tuple[float, int, str]:
        model, _, step = entry["stage"].partition("/")
        return order.get(model, -1), _STEPS.index(step) if step in _STEPS else _STEPS.index("train"), entry["stage"]

    return sorted(entries, key=place)


def _counts(
    counts: dict[str, dict[str, int]], models: Sequence[str], stage: str, names: Iterable[str]
) -> list[tuple[str, dict[str, int]]]:
    """The counts of one stage of each round; only `names`, in that order, or all where there are none."""
    found = [(model, counts.get(f"{model.lower()}/{stage}", {})) for model in models]
    return [(model, {name: row[name] for name in names or row if name in row}) for model, row in found if row]


def _first_steps(counts: dict[str, dict[str, float]], models: Sequence[str]) -> list[tuple[str, str, str]]:
    """(model, loss of its training's first step, the loss that was expected)."""
    found = [(model, counts.get(f"{model.lower()}/train", {})) for model in models]
    names = ("first_loss", "expected_first_loss")
    return [(model, *(f"{row[name]:.4f}" for name in names)) for model, row in found if names[0] in row]


def _headings(results: dict[str, dict]) -> list[tuple[str, str, str, str]]:
    """The metrics that some model has: the known ones, then any other under its own name."""
    keys = list(dict.fromkeys(key for metrics in results.values() for key in metrics if metrics[key]))
    known = [heading for heading in _METRICS if heading[0] in keys]
    return known + [(key, key, "", "") for key in keys if key not in [heading[0] for heading in _METRICS]]


def _table(
    results: dict[str, dict], headings: Sequence[tuple[str, str, str, str]]
) -> list[tuple[str, list[dict | None]]]:
    """The cells of the headline, a row a model, None where a metric is missing."""
    rows: list[tuple[str, list[dict | None]]] = [(model, []) for model in results]
    for key, _, unit, _ in headings:
        column = [metrics.get(key) for metrics in results.values()]
        # Of length there is no best, nor of answers cut, nor of the human loss, which DPO raises a little.
        values = [metric["value"] for metric in column if metric]
        best = max(values) if len(values) > 1 and key not in ("response_tokens", "cut", "human_loss") else None
        digits = 1 if unit or max(values) >= 20 else 3 if max(values) < 1 else 2
        for (_, cells), metric in zip(rows, column, strict=True):
            cells.append(_cell(metric, unit, digits, metric["value"] == best) if metric else None)
    return rows


def _cell(metric: dict, unit: str, digits: int, best: bool) -> dict:
    value, error = (metric[part] * (100 if unit else 1) for part in ("value", "stderr"))
    return {"value": f"{value:.{digits}f}", "error": f"{error:.{digits}f}", "n": metric["n"], "best": best}


def _estimates(results: dict[str, dict], styles: dict[str, str]) -> list[charts.Panel]:
    panels = []
    for key, title, label in (
        ("oracle_score", "Oracle score of held-out answers", "score, 0 to 5"),
        ("human_loss", "Loss of human answers", "nats a token"),
        ("validation_score", "Score of answers to the validation prompts", "score, 0 to 5"),
        ("pairwise_accuracy", "Pairwise accuracy as a judge", "fraction of pairs"),
    ):
        found = [
            (model, style, results[model][key]) for model, style in styles.items() if results.get(model, {}).get(key)
        ]
        values = [(model, style, metric["value"], metric["stderr"]) for model, style, metric in found]
        if values:
            panels.append(charts.estimates(title, label, values, "Bars are one standard error either way."))
    return panels


def _line(model: str, rows: list[dict], key: str, style: str) -> charts.Line | None:
    """A metric over steps, at most about 200 points, each the mean of its neighbours. A resumed run may repeat steps:
    the later row holds."""
    values = sorted({row["step"]: row[key] for row in rows if key in row and math.isfinite(row[key])}.items())
    if not values:
        return None
    width = -(-len(values) // 200)
    points = [np.mean(values[start : start + width], axis=0) for start in range(0, len(values), width)]
    return charts.Line(label=model, style=style, points=[(float(step), float(value)) for step, value in points])


def _curves(training: dict[str, list[dict]], styles: dict[str, str]) -> list[charts.Panel]:
    panels = []
    for is_dpo, keys, title, label in _CURVES:
        lines = [
            _line(f"{model} {key.split('_')[0]}" if len(keys) > 1 else model, rows, key, f"{styles[model]}{dash}")
            for model, rows in training.items()
            if any("reward_margin" in row for row in rows) == is_dpo
            for key, dash in zip(keys, ("", " dashed"), strict=False)
        ]
        if any(lines):
            panels.append(charts.curves(title, label, [line for line in lines if line]))
    return panels


def _optimizer(training: dict[str, list[dict]], styles: dict[str, str]) -> list[charts.Panel]:
    panels = []
    for key, title, label in _OPTIMIZER:
        lines = [_line(model, rows, key, styles[model]) for model, rows in training.items()]
        if any(lines):
            panels.append(charts.curves(title, label, [line for line in lines if line]))
    return panels


def _histograms(groups: Sequence[samples.Judged]) -> list[charts.Panel]:
    """The mean scores, one panel a group with one y axis for all. The mean of N votes from 0 to 5 takes 5 N + 1 values
    where all votes count: one bin each (up to N = 4)."""
    found = [
        (group, [answer.score for prompt in group.prompts for answer in prompt.responses if answer.score is not None])
        for group in groups
    ]
    found = [(group, scores) for group, scores in found if scores]
    votes = [len(answer.votes) for group, _ in found for prompt in group.prompts for answer in prompt.responses]
    gaps = 5 * min(max(votes, default=1), 4)
    shares = [
        100 * np.bincount([math.floor(score * gaps / 5 + 0.5) for score in scores], minlength=gaps + 1) / len(scores)
        for _, scores in found
    ]
    return [
        charts.histogram(
            group.label if group.judge == group.label else f"{group.label}, judged by {group.judge}",
            ("mean score", "% of responses"),
            group.style,
            [float(value) for value in share],
            float(max(map(max, shares))),
            float(np.mean(scores)),
            f"mean {np.mean(scores):.2f} of {len(scores):,} responses",
        )
        for (group, scores), share in zip(found, shares, strict=True)
    ]


def _votes(group: samples.Judged) -> dict[str, int]:
    votes = collections.Counter(
        vote.no_vote or "score" for prompt in group.prompts for answer in prompt.responses for vote in answer.votes
    )
    return {name: votes[name] for name in ("score", *NoVote)}


def _outcomes(title: str, noun: str, rows: Sequence[tuple[str, dict[str, int]]]) -> dict | None:
    """What became of things: a chart of shares, and the table that is also its legend."""
    rows = [(label, counts) for label, counts in rows if sum(counts.values())]
    if not rows:
        return None
    names = list(dict.fromkeys(name for _, counts in rows for name in counts))
    names.sort(key=lambda name: name not in ("kept", "score"))
    parts = [(f"r{min(index, 9)}", name) for index, name in enumerate(names)]
    bars = [(label, [(style, name, counts.get(name, 0)) for style, name in parts]) for label, counts in rows]
    totals = [sum(counts.values()) for _, counts in rows]
    return {
        "chart": charts.stacks(title, f"% of {noun}", bars, []),
        "labels": [label for label, _ in rows],
        "totals": totals,
        "rows": [
            (
                style,
                name,
                [
                    (counts.get(name, 0), 100 * counts.get(name, 0) / total)
                    for (_, counts), total in zip(rows, totals, strict=True)
                ],
            )
            for style, name in parts
        ],
    }


def _spread(label: str, style: str, tokens: Sequence[int]) -> charts.Spread:
    quantiles = [float(value) for value in np.quantile(tokens, (0.05, 0.25, 0.5, 0.75, 0.95))]
    return charts.Spread(label=label, style=style, quantiles=quantiles, mean=float(np.mean(tokens)), n=len(tokens))


def _lengths(
    evaluated: dict[str, list[Responses]], rounds: Sequence[samples.Judged], styles: dict[str, str]
) -> list[charts.Panel]:
    key = "Box: middle half, bar: median, ring: mean, whiskers: 5 to 95 %."
    panels = []
    tokens = {model: [it.tokens for line in lines for it in line.completions] for model, lines in evaluated.items()}
    groups = [_spread(model, styles[model], lengths) for model, lengths in tokens.items() if lengths]
    if groups:
        panels.append(charts.spreads("Answers to held-out prompts, by model", "tokens", groups, key))
    for group in rounds:
        kinds = collections.defaultdict(list)
        for prompt in group.prompts:
            for answer, role in zip(prompt.responses, samples.roles(prompt, group.pairs.get(prompt.id)), strict=True):
                kinds["all"].append(answer.tokens)
                kinds[role].append(answer.tokens)
        groups = [_spread(kind, group.style, kinds[kind]) for kind in ("all", "chosen", "rejected") if kinds[kind]]
        if groups:
            panels.append(charts.spreads(f"Round {group.label}: answers by {group.judge}", "tokens", groups, key))
    return panels


def _held_out_scores(oracle: dict[str, dict[str, list[float]]]) -> charts.Panel | None:
    rows = []
    for model, scores in oracle.items():
        counts = collections.Counter(score for line in scores.values() for score in line if score is not None)
        if counts:
            rows.append((model, [(f"q{score}", f"score {score}", counts[score]) for score in range(6)]))
    legend = [(f"q{score}", str(score)) for score in range(6)]
    return charts.stacks("Held-out answers by oracle score", "% of answers", rows, legend) if rows else None


def _agreement(group: samples.Judged) -> charts.Panel | None:
    """The judge's score of each answer against the oracle's, and what the oracle thinks of the pairs; None where no
    answer has both scores."""
    points, margins = [], []
    for prompt in group.prompts:
        if prompt.id in group.oracle:
            exact = group.oracle[prompt.id]
            answers = zip(exact, prompt.responses, strict=True)
            points += [(truth, answer.score) for truth, answer in answers if None not in (truth, answer.score)]
            roles = dict(zip(samples.roles(prompt, group.pairs.get(prompt.id)), exact, strict=True))
            if "chosen" in roles and None not in (roles["chosen"], roles["rejected"]):
                margins.append(roles["chosen"] - roles["rejected"])
    if not points:
        return None
    varied = len(points) > 1 and all(np.ptp(axis) > 0 for axis in np.transpose(points))
    caption = f"Pearson r = {np.corrcoef(np.transpose(points))[0, 1]:.2f}. " if varied else ""
    caption += f"{len(points):,} responses."
    if margins:
        better, worse = (100 * np.mean(np.multiply(margins, sign) > 0) for sign in (1, -1))
        caption += f" Of {len(margins):,} pairs the oracle also prefers the chosen answer in {better:.0f} %,"
        caption += f" the rejected one in {worse:.0f} %."
    title = f"Round {group.label}, judged by {group.judge}"
    return charts.heat(title, ("oracle score", "judge's mean score"), group.style, points, caption)
