"""What is measured is the same in every run, and of the sizes that were asked for."""

import dataclasses
import itertools

import numpy as np
import pytest

from srlm_jax.bench import workload
from srlm_jax.bench.workload import CPU, END, SHAPES

SMALL = dataclasses.replace(CPU, prompts=3, instruction=5, response_mean=8, judgement_mean=6, before=7, behind=4)


def test_the_shapes_have_as_many_parameters_as_they_say():
    counts = {name: make().parameters for name, make in SHAPES.items()}
    assert counts == {"tiny": 869_504, "110m": 134_105_856, "1b": 1_100_048_384, "7b": 6_738_415_616}


def test_lengths_have_about_their_mean_and_a_limit():
    drawn = workload.lengths(20_000, 400, 70, np.random.default_rng(0))
    assert min(drawn) >= 1 and max(drawn) == 1_000
    assert np.mean(drawn) == pytest.approx(400, rel=0.06)  # the limit takes some per cent
    assert np.mean(drawn) / max(drawn) < 0.45  # so much of a static batch is in use
    assert set(workload.lengths(9, 400, 0, np.random.default_rng(0))) == {400}


def test_the_same_seed_gives_the_same_work_and_another_seed_other_work():
    for make in (workload.answering, workload.judging, workload.pairs, workload.documents):
        assert make(SMALL, 100) == make(SMALL, 100)
        assert make(SMALL, 100) != make(dataclasses.replace(SMALL, seed=1), 100)


def test_judgements_are_of_the_answers_that_were_asked_for():
    asked, judged = workload.answering(SMALL, 100), workload.judging(SMALL, 100)
    assert [len(group) for group in judged.prompts] == [SMALL.samples] * SMALL.prompts
    for (instruction,), (limits,), group in zip(asked.prompts, asked.limits, judged.prompts, strict=True):
        assert [len(prompt) - 7 - 5 - 4 for prompt in group] == list(limits)
        assert all(prompt[:7] == judged.prompts[0][0][:7] and prompt[7:12] == instruction for prompt in group)
        assert all(prompt[-4:] == judged.prompts[0][0][-4:] for prompt in group)
    assert judged.samples == SMALL.votes and len(judged.rows) == 3 * 4 * 3


def test_nothing_shared_is_the_same_rows_without_a_common_beginning():
    judged = workload.judging(SMALL, 100)
    alone = judged.unshared()
    assert [(len(prompt), limit) for prompt, limit in alone.rows] == [(len(p), limit) for p, limit in judged.rows]
    assert all(len(group) == 1 for group in alone.prompts) and alone.samples == 1
    firsts = [prompt[0] for prompt, _ in alone.rows]
    assert all(a != b for a, b in itertools.pairwise(firsts))


def test_reading_alone_writes_a_token_of_each_row():
    judged = workload.judging(SMALL, 100)
    assert judged.read_only().prompts == judged.prompts and judged.read_only().tokens == len(judged.rows)


def test_pairs_are_the_best_and_the_worst_answer_and_end():
    asked = workload.answering(SMALL, 100)
    answers = tuple(tuple((p, c, 50) for c in range(SMALL.samples)) for p in range(SMALL.prompts))
    order = workload.best_and_worst(SMALL)
    assert all(best != worst for best, worst in order)
    for p, pair in enumerate(workload.pairs_of(SMALL, asked, answers)):
        assert pair.prompt == asked.prompts[p][0]
        assert (pair.chosen, pair.rejected) == ((p, order[p][0], END), (p, order[p][1], END))


def test_training_has_as_many_pairs_and_documents_as_its_updates_take():
    w = dataclasses.replace(SMALL, batch=4, updates=3)
    assert len(workload.pairs(w, 100)) == len(workload.documents(w, 100)) == 12
    assert all(row.ids[-1] == END and row.loss_from == 5 < len(row.ids) for row in workload.documents(w, 100))


def test_more_work_is_more_instructions_or_more_updates():
    assert SMALL.times(4, training=False) == dataclasses.replace(SMALL, prompts=12)
    assert SMALL.times(4, training=True) == dataclasses.replace(SMALL, updates=4 * SMALL.updates)
