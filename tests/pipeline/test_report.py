"""The report: one safe, self-contained page from whatever stages exist."""

import html.parser
import json
import os
import random
import re
import shutil

import pytest
from etils import epath

from srlm_jax.data.pairs import preference_pair
from srlm_jax.pipeline import report, samples
from srlm_jax.records import (
    Completion,
    JudgedPrompt,
    JudgedResponse,
    NoVote,
    PairDrop,
    PreferencePair,
    Prompt,
    Responses,
    Vote,
)
from srlm_jax.storage import jsonl

MODELS = ("M0", "SFT", "M1", "M2", "M3")
SECTIONS = ("headline", "training", "scores", "outcomes", "length", "oracle", "samples", "stages")
HOSTILE = (
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(2)><!-- <script> ]]> &lt;b&gt;",
    "{{ 7 * 7 }}{% raw %} \u2028 \u202e ünï 😀 \x00 \\u003c/script>",
    "",
)
_WORDS = ("apple", "pear", "plum", "cherry", "melon", "grape", "quince", "fig", "lime", "mango", "kiwi", "papaya")


def _text(rng: random.Random, words: int) -> str:
    return ", ".join(rng.choice(_WORDS) for _ in range(words))


def _vote(rng: random.Random, quality: float) -> Vote:
    if rng.random() < 0.04:
        return Vote(text="I would say this is fine.", finished=True, score=None, no_vote=rng.choice(list(NoVote)))
    score = min(max(round(quality + rng.gauss(0, 0.7)), 0), 5)
    return Vote(
        text=f"The answer {_text(rng, 12)} is on topic.\nScore: {score}",
        finished=True,
        score=float(score),
        no_vote=None,
    )


def _judged_prompt(rng: random.Random, id: str, level: float) -> tuple[JudgedPrompt, list[float]]:
    """A prompt with four judged answers, and the exact scores of the answers."""
    answers, exact = [], []
    same, mute = rng.random() < 0.15, rng.random() < 0.03
    for _ in range(4):
        quality = min(max(round(rng.gauss(level, 1.3)), 0), 5)
        if mute:
            votes = (Vote(text="", finished=False, score=None, no_vote=NoVote.UNFINISHED),) * 3
        elif same:
            votes = (Vote(text="Score: 3", finished=True, score=3.0, no_vote=None),) * 3
        else:
            votes = tuple(_vote(rng, quality) for _ in range(3))
        scores = [vote.score for vote in votes if vote.score is not None]
        text = rng.choice(HOSTILE) if rng.random() < 0.1 else _text(rng, rng.randint(3, 8 + 4 * quality))
        answers.append(
            JudgedResponse(
                response=text,
                tokens=3 * len(text.split()),
                finished=rng.random() < 0.95,
                votes=votes,
                score=sum(scores) / len(scores) if scores else None,
            )
        )
        exact.append(float(quality))
    prompt = (
        rng.choice(HOSTILE) if rng.random() < 0.05 else f"List {rng.randint(2, 9)} fruits, in order: {_text(rng, 4)}"
    )
    return JudgedPrompt(id=id, prompt=prompt, responses=tuple(answers)), exact


def _write_lines(path: epath.Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _write_ledger(workdir: epath.Path, stage: str, counts: dict[str, int], seconds: float) -> None:
    entry = {"stage": stage, "counts": counts, "seconds": seconds}
    jsonl.write_json(workdir / "ledger" / f"{stage.replace('/', '.')}.json", entry)


def _write_metrics(rng: random.Random, folder: epath.Path, dpo: bool, steps: int) -> None:
    rows = []
    for step in range(10, steps + 1, 10):
        done = step / steps
        row = {
            "step": step,
            "loss": (0.69 - 0.4 * done if dpo else 0.4 + 3 * 0.1 ** (3 * done)) + rng.gauss(0, 0.02),
            "gradient_norm": 1.5 - done + abs(rng.gauss(0, 0.2)),
            "learning_rate": 3e-4 * (1 - done),
            "tokens_per_second": 21_000 + rng.gauss(0, 300),
        }
        if dpo:
            row |= {"reward_margin": 2 * done + rng.gauss(0, 0.1), "reward_accuracy": min(0.5 + 0.5 * done, 0.97)}
            row |= {
                "chosen_logprob": -40 - 9 * done + rng.gauss(0, 1),
                "rejected_logprob": -42 - 30 * done + rng.gauss(0, 1),
            }
            row |= {"kl": 4 * done * done}
        rows.append(row)
    _write_lines(folder / "metrics.jsonl", rows)


def write_run(workdir: epath.Path, prompts: int, seed: int) -> None:
    """A finished run of random numbers, with hostile text in about a tenth of its answers."""
    rng = random.Random(seed)
    results = {}
    for index, model in enumerate(MODELS):
        folder, level = workdir / model.lower(), 0.9 + 0.8 * index
        _write_metrics(rng, folder, index >= 3, 600)
        _write_ledger(workdir, f"{model.lower()}/train", {"steps": 600, "tokens": 1_234_567}, 40.0 + 13 * index)
        responses, exact = [], []
        for number in range(prompts // 2):
            text = HOSTILE[0] if number == 0 else _text(rng, rng.randint(3, 6 + 3 * index))
            completion = Completion(text=text, tokens=3 * len(text.split()), finished=True)
            responses.append(Responses(id=f"held/{number}", prompt=f"List fruits {number}", completions=(completion,)))
            exact.append({"id": f"held/{number}", "scores": [float(min(max(round(rng.gauss(level, 1.1)), 0), 5))]})
        jsonl.write(jsonl.shard(folder / "eval" / "responses", 0), responses)
        _write_lines(folder / "eval" / "oracle.jsonl", exact)
        judged = [_judged_prompt(rng, f"eft-{number}", 2.5)[0] for number in range(prompts // 2)]
        jsonl.write(jsonl.shard(folder / "eval" / "judgements", 0), judged)
        values = {
            "oracle_score": level,
            "perfect": 0.11 * index,
            "pairwise_accuracy": 0.55 + 0.09 * min(index, 4),
            "five_best": 0.3 + 0.1 * index,
            "exact_match": 0.1 + 0.1 * index,
            "spearman": 0.2 + 0.12 * index,
            "kendall_tau_b": 0.15 + 0.11 * index,
            "response_tokens": 25.0 + 7 * index,
        }
        results[model] = {key: {"value": value, "stderr": value * 0.03, "n": prompts} for key, value in values.items()}
    jsonl.write_json(workdir / "results.json", results)
    for name, level in (("eft", 2.0), ("m2", 2.6), ("m3", 3.3)):
        judged, exact = zip(*(_judged_prompt(rng, f"{name}-{number}", level) for number in range(prompts)), strict=True)
        half = len(judged) // 2
        jsonl.write(jsonl.shard(workdir / name / "judgements", 0), judged[:half])
        jsonl.write(jsonl.shard(workdir / name / "judgements", 1), judged[half:])
        if name == "eft":
            counts = {"prompts": 104, "draws": 312, "accepted_draws": 210, "against_humans": 90, "too_few_scored": 12}
            _write_ledger(workdir, "eft/examples", counts | {"examples": 400}, 55.5)
            continue
        jsonl.write(
            jsonl.shard(workdir / name / "prompts", 0),
            [Prompt(id=it.id, text=it.prompt, origin="self-instruct") for it in judged],
        )
        _write_lines(
            workdir / name / "oracle.jsonl",
            [{"id": prompt.id, "scores": scores} for prompt, scores in zip(judged, exact, strict=True)],
        )
        outcomes = [preference_pair(prompt) for prompt in judged]
        pairs = [outcome for outcome in outcomes if isinstance(outcome, PreferencePair)]
        jsonl.write(jsonl.shard(workdir / name / "pairs", 0), pairs)
        drops = {drop.value: outcomes.count(drop) for drop in PairDrop}
        _write_ledger(
            workdir, f"{name}/prompts", {"kept": 500, "too_similar": 210, "keyword": 31, "too_long": 14}, 31.0
        )
        _write_ledger(workdir, f"{name}/pairs", {"kept": len(pairs)} | drops, 0.4)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> epath.Path:
    workdir = epath.Path(tmp_path_factory.mktemp("run"))
    write_run(workdir, 24, 1)
    report.write_report(workdir, MODELS)
    return workdir


class _Page(html.parser.HTMLParser):
    """Collects each element's name and attributes, and the text of the scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self._inside = False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = tag == "script"

    def handle_endtag(self, tag: str) -> None:
        self._inside = False

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.scripts.append(data)

    def sections(self) -> tuple[str | None, ...]:
        return tuple(attributes["id"] for tag, attributes in self.elements if tag == "section")

    def data(self) -> list[dict]:
        return json.loads(self.scripts[0])


def _page(workdir: epath.Path) -> _Page:
    return _Page((workdir / "report.html").read_text())


def test_the_first_loss_of_a_training_stands_beside_the_expected_one(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    workdir = epath.Path(tmp_path / "run")
    _write_ledger(workdir, "m2/train", {"pairs": 9, "first_loss": 0.695512, "expected_first_loss": 0.693147}, 1.0)
    report.write_report(workdir, MODELS)
    text = (workdir / "report.html").read_text()
    assert "M2: the first loss is 0.6955; 0.6931 was expected from the model it starts from." in text
    assert "M3: the first loss" not in text


def test_a_finished_run_shows_every_section_and_every_chart(run):
    text = (run / "report.html").read_text()
    page = _Page(text)
    assert page.sections() == SECTIONS
    assert "Nothing here yet" not in text
    titles = re.findall("<figcaption>(.*?)</figcaption>", text)
    assert len([tag for tag, _ in page.elements if tag == "svg"]) == len(titles) + len(list((run / "ledger").iterdir()))
    assert titles == [
        "Oracle score of held-out answers",
        "Pairwise accuracy as a judge",
        "Held-out answers by oracle score",
        "Supervised fine-tuning: loss",
        "DPO: loss",
        "DPO: reward margin",
        "DPO: reward accuracy",
        "DPO: log-probability",
        "DPO: KL to the reference",
        "Gradient norm",
        "Learning rate",
        "Throughput",
        "EFT, judged by SFT",
        "M2, judged by M1",
        "M3, judged by M2",
        *MODELS,
        "Preference pairs",
        "EFT draws",
        "New prompts",
        "Judgements",
        "Judgements of the EFT split",
        "Answers to held-out prompts, by model",
        "Round M2: answers by M1",
        "Round M3: answers by M2",
        "Round M2, judged by M1",
        "Round M3, judged by M2",
    ]


def test_the_page_loads_nothing(run):
    text = (run / "report.html").read_text()
    page = _Page(text)
    loading = {"src", "srcset", "data", "action", "background", "poster", "xlink:href"}
    assert not [tag for tag, attributes in page.elements if loading & set(attributes)]
    assert all(attributes["href"].startswith("#") for _, attributes in page.elements if "href" in attributes)
    assert not {"link", "img", "iframe", "object", "embed", "base"} & {tag for tag, _ in page.elements}
    assert not re.search(r"https?://|url\(|@import|fetch\(|import\(", text)
    policy = next(it["content"] for tag, it in page.elements if it.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")


def test_hostile_text_stays_text(run):
    text = (run / "report.html").read_text()
    page = _Page(text)
    assert len(page.scripts) == 2  # the data and the page's own: a </script> that works would make more
    assert "alert(" not in text.replace("\\u003cscript\\u003ealert(1)", "").replace("onerror=alert(2)\\u003e", "")
    assert not [attributes for _, attributes in page.elements if any(name.startswith("on") for name in attributes)]
    assert "innerHTML" not in text
    shown = {it["text"] for group in page.data() for sample in group["samples"] for it in sample["answers"]}
    assert set(HOSTILE) <= shown  # and nothing of it is lost


def test_hostile_names_are_escaped(tmp_path):
    workdir = epath.Path(tmp_path)
    _write_ledger(workdir, "m2/pairs", {"kept": 1, HOSTILE[0]: 2}, 1.0)
    _write_ledger(workdir, "m2/prompts", {"kept": 1, HOSTILE[1]: 2}, 1.0)
    report.write_report(workdir, MODELS)
    assert not {"script", "img"} & {tag for tag, _ in _page(workdir).elements}


def test_the_same_files_give_the_same_bytes(run, tmp_path):
    again = epath.Path(tmp_path)
    write_run(again, 24, 1)
    report.write_report(again, MODELS)
    assert (again / "report.html").read_bytes() == (run / "report.html").read_bytes()


def test_a_page_takes_the_place_of_the_last_one_in_one_step(tmp_path):
    """It is written again after each stage: whoever opens it meanwhile, or kills the run, has one of the two whole."""
    workdir = epath.Path(tmp_path)
    report.write_report(workdir, MODELS)
    before = (workdir / "report.html").read_bytes()
    os.link(workdir / "report.html", workdir / "opened")
    _write_ledger(workdir, "m2/pairs", {"kept": 1}, 1.0)
    report.write_report(workdir, MODELS)
    assert (workdir / "opened").read_bytes() == before != (workdir / "report.html").read_bytes()


def test_an_empty_folder_gives_a_page(tmp_path):
    workdir = epath.Path(tmp_path)
    report.write_report(workdir, MODELS)
    assert _page(workdir).sections() == SECTIONS
    assert (workdir / "report.html").read_text().count("Nothing here yet") == len(SECTIONS)


@pytest.mark.parametrize(
    "missing",
    [
        "results.json",
        "ledger",
        "m0",
        "m1",
        "m2",
        "m3",
        "eft",
        "m2/pairs",
        "m2/oracle.jsonl",
        "m2/metrics.jsonl",
        "sft/eval",
    ],
)
def test_any_stage_may_be_missing(tmp_path, missing):
    workdir = epath.Path(tmp_path)
    write_run(workdir, 8, 2)
    path = workdir / missing
    if path.is_dir():
        path.rmtree()
    else:
        path.unlink()
    report.write_report(workdir, MODELS)
    assert _page(workdir).sections() == SECTIONS


@pytest.mark.parametrize(
    "there",
    [
        ("ledger/seed.json",),
        ("m0/eval", "m0/metrics.jsonl", "ledger/m0.train.json"),
        ("m0", "sft", "eft/judgements"),  # as a run leaves it that stops at eft/judgements
        ("m1", "m2/prompts"),
        ("m2/judgements",),
    ],
)
def test_a_run_that_has_stopped_early_has_a_page_with_what_there_is(tmp_path, there):
    whole, workdir = epath.Path(tmp_path / "whole"), epath.Path(tmp_path / "stopped")
    write_run(whole, 8, 2)
    _write_ledger(whole, "seed", {"ift": 9}, 1.0)
    for name in there:
        (workdir / name).parent.mkdir(parents=True, exist_ok=True)
        (whole / name).rename(workdir / name)
    report.write_report(workdir, MODELS)
    text = (workdir / "report.html").read_text()
    assert _page(workdir).sections() == SECTIONS
    assert "Nothing here yet" in text
    assert ("EFT, judged by SFT" in text) == ("eft/judgements" in there)


def test_a_stage_that_has_not_finished_is_not_among_the_finished(tmp_path):
    workdir = epath.Path(tmp_path)
    entry = {"stage": "eft/judgements", "status": "started", "config": {}, "inputs": {}, "outputs": []}
    jsonl.write_json(workdir / "ledger" / "eft.judgements.json", entry)
    _write_ledger(workdir, "seed", {"ift": 9}, 1.0)
    report.write_report(workdir, MODELS)
    assert "1 finished stages" in (workdir / "report.html").read_text()


@pytest.mark.parametrize("readable", [True, False])
def test_answers_that_the_oracle_cannot_score_are_left_out_of_its_drawings(tmp_path, readable):
    workdir = epath.Path(tmp_path)
    write_run(workdir, 8, 2)
    path = workdir / "m2" / "oracle.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    blank = [row | {"scores": [None] * len(row["scores"])} for row in rows]
    _write_lines(path, [*blank[:-1], rows[-1] if readable else blank[-1]])
    report.write_report(workdir, MODELS)
    titles = re.findall("<figcaption>(.*?)</figcaption>", (workdir / "report.html").read_text())
    assert titles.count("Round M2, judged by M1") == readable
    assert titles.count("Round M3, judged by M2") == 1


def test_the_headline_shows_the_models_asked_for_and_marks_the_best(tmp_path):
    workdir = epath.Path(tmp_path)
    scores = {"M1": 0.5, "M2": 0.75, "M9": 0.9}
    results = {
        model: {"pairwise_accuracy": {"value": value, "stderr": 0.02, "n": 7}} for model, value in scores.items()
    }
    results["M9"]["never_defined"] = {"value": 1.0, "stderr": 0.0, "n": 1}
    results["M2"]["kendall_tau_b"] = {"value": 0.25, "stderr": 0.125, "n": 7}
    jsonl.write_json(workdir / "results.json", results)
    report.write_report(workdir, MODELS)
    text = (workdir / "report.html").read_text()
    assert "<b>50.0</b> <small>± 2.0</small>" in text
    assert re.findall('<td class="best"[^>]*><b>(.*?)</b>', text) == ["75.0"]  # a single value is not the best
    assert "<b>0.250</b> <small>± 0.125</small>" in text
    assert "not measured" in text
    assert "M9" not in text and "never_defined" not in text


def test_a_stage_at_work_shows_what_it_has(tmp_path):
    workdir = epath.Path(tmp_path)
    write_run(workdir, 8, 3)
    (workdir / "m3" / "pairs").rmtree()
    (workdir / "m3" / "judgements" / "00001.jsonl").unlink()
    metrics = workdir / "m3" / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + '{"step": 610, "lo')
    report.write_report(workdir, MODELS)
    third = next(group for group in _page(workdir).data() if group["name"] == "M3")
    assert third["total"] == 4
    assert {sample["kind"] for sample in third["samples"]} == {"not paired yet"}


def test_samples_know_their_kind_roles_and_scores(run):
    pairs = {pair.id: pair for pair in jsonl.read(run / "m2" / "pairs", PreferencePair)}
    oracle = {
        row["id"]: row["scores"] for row in map(json.loads, (run / "m2" / "oracle.jsonl").read_text().split("\n")[:-1])
    }
    second, third, held_out = _page(run).data()
    assert [group["name"] for group in (second, third, held_out)] == ["M2", "M3", "held-out"]
    assert second["total"] == len(second["samples"]) == 24
    for sample in second["samples"]:
        roles = {it["role"]: it for it in sample["answers"]}
        assert [it["oracle"] for it in sample["answers"]] == oracle[sample["id"]]
        if sample["kind"] == "pair":
            pair = pairs.pop(sample["id"])
            assert (roles["chosen"]["text"], roles["chosen"]["score"]) == (pair.chosen, pair.chosen_score)
            assert (roles["rejected"]["text"], roles["rejected"]["score"]) == (pair.rejected, pair.rejected_score)
        else:
            assert set(roles) == {""}
            assert sample["kind"] in [*PairDrop]
    assert not pairs
    assert [it["label"] for it in held_out["samples"][0]["answers"]] == list(MODELS)


def _group(scores: list[float | None]) -> samples.Judged:
    """A round of prompts with two answers: a score s gives the pair (s, 0), None no score."""
    prompts, pairs = [], {}
    for index, score in enumerate(scores):
        answers = [
            JudgedResponse(response=text, tokens=1, finished=True, votes=(), score=value)
            for text, value in (("good", score), ("bad", None if score is None else 0.0))
        ]
        prompt = JudgedPrompt(id=f"{index:04}", prompt="?", responses=tuple(answers))
        prompts.append(prompt)
        pair = preference_pair(prompt)
        pairs |= {prompt.id: pair} if isinstance(pair, PreferencePair) else {}
    return samples.Judged(label="M2", judge="M1", style="s3", prompts=prompts, pairs=pairs, paired=True, oracle={})


def test_rare_kinds_are_embedded_whole_and_frequent_ones_evenly():
    scores = [3.0] * 997 + [None] * 3
    found = samples.of_round(_group(scores))
    assert found["total"] == 1000
    assert len(found["samples"]) == samples.EMBEDDED
    assert [sample["id"] for sample in found["samples"][-3:]] == ["0997", "0998", "0999"]
    gaps = [
        int(after["id"]) - int(before["id"])
        for before, after in zip(found["samples"], found["samples"][1:-3], strict=False)
    ]
    assert set(gaps) == {5, 6}  # 997 pairs, 197 of them taken


def test_few_samples_are_all_embedded():
    found = samples.of_round(_group([1.0, 0.0, None]))
    assert [sample["kind"] for sample in found["samples"]] == ["pair", "tie", "unparseable"]
