"""The engine against a loop that recomputes everything for every token, and what its settings may not change."""

import collections
import dataclasses
import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from srlm_jax.parallel import rules
from srlm_jax.parallel.mesh import MeshShape, sample_mesh
from srlm_jax.sampling import decode, engine, prefill
from srlm_jax.sampling.engine import Draw, EngineConfig, Sample, Work, bucket, decoding_model, sample

GREEDY = Draw(samples=1, temperature=0.0, top_p=1.0, max_new_tokens=12, stops=((0,),))
RANDOM = Draw(samples=3, temperature=0.9, top_p=0.9, max_new_tokens=12, stops=((0,), (7, 8)))
NARROW = EngineConfig(rows=6, steps=5, weights=None, cache=None)
WIDE = dataclasses.replace(NARROW, rows=100, steps=16)
LONGEST = 640  # tokens, prompt and completion together


def group(*, address, prompts, limits=None):
    return engine.Group(address=address, prompts=prompts, limits=limits)


def ids(rng, low, high):
    return tuple(rng.integers(1, 40, rng.integers(low, high)).tolist())


def tree(groups, *, template=11, instruction=(1, 15), rest=(1, 12), prompts=(1, 5)):
    """Groups as a judge's are: all begin with the template, those of a group go on with the same instruction."""
    rng = np.random.default_rng(0)
    opening = ids(rng, template, template + 1)
    made = []
    for i in range(groups):
        shared = opening + ids(rng, *instruction)
        count = rng.integers(*prompts)
        made.append(group(address=(i, 7), prompts=tuple(shared + ids(rng, *rest) for _ in range(count))))
    return made


def unlike_prompts():
    """Groups of one prompt each that share nothing, of 1 to 40 tokens."""
    rng = np.random.default_rng(1)
    lengths = (1, 40, 2, 9, 3, 24)
    return [group(address=(i, 0), prompts=(ids(rng, n, n + 1),)) for i, n in enumerate(lengths)]


@pytest.fixture(scope="module")
def run(tiny_llama, one_device):
    mesh = one_device("data", "tensor")
    model = decoding_model(tiny_llama, mesh)

    def run(groups, draw, config, *, key=0, report=lambda finished, sampled: None, work=None):
        work = Work() if work is None else work
        return sample(model, groups, draw, key=jax.random.key(key), config=config, mesh=mesh, report=report, work=work)

    return run


@pytest.fixture(scope="module")
def naive(tiny_llama):
    """Greedy decoding as it is defined: the whole text through the model again for each token."""

    @jax.jit
    def next_token(tokens_T, length):
        hidden, _ = tiny_llama(tokens_T[None], jnp.arange(LONGEST)[None], segments_BT=None, cache=None, dropout=None)
        return jnp.argmax(hidden[0, length - 1] @ tiny_llama.head())

    def complete(prompt, draw):
        text = list(prompt)
        for _ in range(draw.max_new_tokens):
            padded = np.zeros(LONGEST, np.int32)
            padded[: len(text)] = text
            text.append(int(next_token(padded, len(text))))
            new = tuple(text[len(prompt) :])
            if any(new[-len(stop) :] == stop for stop in draw.stops):
                return Sample(new, True)
        return Sample(new, False)

    return complete


def stops_that_happen(naive, groups, draw):
    """One token that some greedy completions run into midway, and one pair of tokens that some others do."""
    completions = [naive(prompt, draw).ids for one in groups for prompt in one.prompts]
    one = collections.Counter(new[len(new) // 2] for new in completions).most_common()[-1][0]
    others = [new for new in completions if one not in new] or completions
    pairs = collections.Counter(pair for new in others for pair in itertools.pairwise(new[len(new) // 2 :]))
    return ((one,), pairs.most_common()[-1][0])


def long_prompts():
    """Groups of prompts of 1 to 400 tokens that share some, read in pieces."""
    rng = np.random.default_rng(3)
    shared = [ids(rng, n, n + 1) for n in (140, 3, 260)]
    rests = [(1, 300, 40, 129), (128, 2), (257, 128, 256)]
    return [
        group(address=(i, 0), prompts=tuple(beginning + ids(rng, n, n + 1) for n in some))
        for i, (beginning, some) in enumerate(zip(shared, rests, strict=True))
    ]


TRACES = {
    "long prompts of many lengths": long_prompts,
    "a judge's tree, more groups than slots": lambda: tree(14),
    "prompts that share nothing": unlike_prompts,
    "a single group": lambda: tree(1, prompts=(4, 5)),
    "a single prompt of one token": lambda: [group(address=(0, 0), prompts=((5,),))],
    "the same prompt twice in a group": lambda: [group(address=(0, 0), prompts=((5, 6, 7), (5, 6, 7)))],
    "a prompt that begins another": lambda: [group(address=(0, 0), prompts=((5, 6), (5, 6, 7, 8), (5, 6, 7)))],
}


@pytest.mark.parametrize("groups", TRACES.values(), ids=TRACES)
def test_greedy_completions_are_those_of_the_naive_loop(run, naive, groups):
    groups = groups()
    draw = dataclasses.replace(GREEDY, stops=stops_that_happen(naive, groups, GREEDY))
    wanted = [tuple((naive(prompt, draw),) for prompt in one.prompts) for one in groups]
    assert run(groups, draw, NARROW) == wanted


def test_both_kinds_of_stops_and_the_length_limit_end_completions_there(naive):
    # What the test above relies on: its largest trace holds all three ends.
    groups = tree(14)
    draw = dataclasses.replace(GREEDY, stops=stops_that_happen(naive, groups, GREEDY))
    completions = [naive(prompt, draw) for one in groups for prompt in one.prompts]
    assert any(new.ids[-1:] == draw.stops[0] for new in completions)
    assert any(new.ids[-2:] == draw.stops[1] for new in completions)
    assert any(not new.finished and len(new.ids) == draw.max_new_tokens for new in completions)


def test_a_stop_at_the_last_allowed_token_counts_as_finished(run, naive):
    one = group(address=(0, 0), prompts=((5, 6, 7),))
    new = naive(one.prompts[0], dataclasses.replace(GREEDY, max_new_tokens=3)).ids
    draw = dataclasses.replace(GREEDY, max_new_tokens=3, stops=(new[1:],))
    assert run([one], draw, NARROW) == [((Sample(new, True),),)]


def test_without_stops_every_completion_has_full_length(run):
    draw = dataclasses.replace(GREEDY, max_new_tokens=3, stops=())
    (((new,),),) = run([group(address=(0, 0), prompts=((5, 6, 7),))], draw, NARROW)
    assert (len(new.ids), new.finished) == (3, False)


@pytest.fixture(scope="module")
def drawn(run):
    """Random samples of a tree, and the tree."""
    groups = tree(10)
    return groups, run(groups, RANDOM, NARROW)


def test_the_same_key_gives_the_same_samples_however_wide_and_patient_the_engine_is(run, drawn):
    groups, wanted = drawn
    assert run(groups, RANDOM, WIDE) == wanted


def test_the_order_of_groups_changes_no_sample(run, drawn):
    groups, wanted = drawn
    assert run(groups[::-1], RANDOM, NARROW) == wanted[::-1]


def test_other_groups_change_no_sample(run, drawn):
    groups, wanted = drawn
    assert run(groups[3:5], RANDOM, NARROW) == wanted[3:5]


def test_the_samples_of_a_prompt_differ(drawn):
    # Three samples of up to 12 tokens: all prompts drawing one thrice would be the bug of a shared key.
    _, samples = drawn
    assert all(len(of_prompt) == 3 for of_group in samples for of_prompt in of_group)
    distinct = [len(set(of_prompt)) for of_group in samples for of_prompt in of_group]
    assert np.mean(distinct) > 2.5


def test_the_same_prompt_draws_otherwise_at_another_address_place_or_key(run):
    groups = [group(address=address, prompts=((5, 6, 7),) * 2) for address in ((0, 0), (0, 1), (1, 0))]
    samples = run(groups, RANDOM, NARROW)
    every = [new for of_group in samples for of_prompt in of_group for new in of_prompt]
    every += [new for of_prompt in run(groups[:1], RANDOM, NARROW, key=1)[0] for new in of_prompt]
    # 24 samples of mostly 12 tokens, each far from certain: an agreement would be a key used twice.
    long = [new.ids for new in every if len(new.ids) > 5]
    assert len(long) > 12
    assert len(set(long)) == len(long)


def test_random_samples_stop_where_they_say_they_do(drawn):
    for new in itertools.chain.from_iterable(itertools.chain.from_iterable(drawn[1])):
        ends = [i for i in range(len(new.ids)) if new.ids[i] == 0 or new.ids[max(i - 1, 0) : i + 1] == (7, 8)]
        assert new.finished == bool(ends)
        assert len(new.ids) == (ends[0] + 1 if ends else RANDOM.max_new_tokens)


# Work done, and work avoided.


def test_shared_tokens_are_prefilled_once(run):
    # The template's length is a multiple of 16 and everything after a shared part differs from its first token on,
    # so the least possible work is one prefill for every different beginning.
    opening = tuple(range(1, 17))
    groups = [
        group(address=(i, 0), prompts=tuple((*opening, 20 + i, 3, 3, 10 + p, *range(1, p + 2)) for p in range(3)))
        for i in range(9)
    ]
    heads = [prompt[:-1] for one in groups for prompt in one.prompts]
    work = Work()
    run(groups, dataclasses.replace(RANDOM, max_new_tokens=2), NARROW, work=work)
    assert work.prefilled_tokens == len({head[:n] for head in heads for n in range(1, len(head) + 1)})
    assert work.prompt_tokens == RANDOM.samples * sum(map(len, heads))


def test_rows_that_end_early_make_room(run):
    # A third of all tokens is a stop, so few completions pass 10 of the 48 tokens allowed.
    draw = dataclasses.replace(RANDOM, max_new_tokens=48, stops=tuple((i,) for i in range(0, 40, 3)))
    groups, work = tree(24, prompts=(1, 2)), Work()
    samples = run(groups, draw, dataclasses.replace(NARROW, rows=12, steps=2), work=work)
    assert work.sampled_tokens == sum(len(new.ids) for (of_prompt,) in samples for new in of_prompt)
    assert work.sampled_tokens <= work.row_steps < 0.25 * len(groups) * draw.samples * draw.max_new_tokens


def test_a_judge_of_the_paper_s_lengths_reads_a_fifth_of_what_it_would_without_sharing(run):
    """A rubric of 272 tokens, then an instruction of 80 and, 4 times, a response of 400 and 97 more; 3 votes each. What
    is computed to fill up batches comes on top: where responses differ in length as answers do, 3 of 10."""
    rng = np.random.default_rng(0)
    opening, behind = tuple(rng.integers(1, 40, 272).tolist()), tuple(rng.integers(1, 40, 97).tolist())

    def one(i, lengths):
        instruction = (*opening, *ids(rng, 80, 81))
        return group(address=(i, 0), prompts=tuple((*instruction, *ids(rng, n, n + 1), *behind) for n in lengths))

    draw, config = (
        dataclasses.replace(RANDOM, max_new_tokens=1, stops=()),
        dataclasses.replace(NARROW, rows=96, steps=1),
    )
    work = Work()
    run([one(i, [400] * 4) for i in range(32)], draw, config, work=work)
    assert work.prompt_tokens == 32 * 12 * (272 + 80 + 400 + 97 - 1)
    assert work.prefilled_tokens <= 0.21 * work.prompt_tokens
    work = Work()
    lengths = np.minimum(rng.lognormal(np.log(400) - 0.18, 0.6, (32, 4)).astype(int) + 1, 1_024)
    run([one(i, some) for i, some in enumerate(lengths.tolist())], draw, config, work=work)
    assert work.prefilled_tokens <= 0.21 * work.prompt_tokens
    assert work.padded_tokens <= 0.3 * work.prefilled_tokens


def test_positions_that_are_computed_by_hand():
    count = lambda *lengths, halvings=2: prefill.positions_read(np.array([lengths]), 1_280, halvings)
    assert count(1_000, 300, 200, 1) == 128 * (4 * 2 + 2 * 1 + 1 * 5)  # to 256, to 384 and to 1,024
    assert count(1, 300, 1_000, 200, halvings=0) == 128 * 4 * 8
    assert count(0, 0, 0, 0) == 0
    # Two groups of devices: both rows of each to 128, one of each to 256.
    assert prefill.positions_read(np.array([[9, 3], [200, 0]]), 256, 2) == 128 * (4 + 2)
    assert prefill.positions_read(np.array([[9, 3]]), 48, 2) == 2 * 48


# rows, prompts, samples; mean, spread of the logarithm, most, all in tokens; and by what they are divided here.
ANSWERS, VERDICTS = (1, 4, 391, 0.6, 1_024, 16), (4, 3, 150, 0.4, 256, 6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "lengths"), [(64, ANSWERS), pytest.param(256, ANSWERS, marks=pytest.mark.long), (96, VERDICTS)]
)
def test_rows_are_hardly_ever_idle(make_llama, one_device, rows, lengths):
    """Lengths are spread as those of answers and judgements are, and there are 60 samples a row. With the beginning and
    the end of it all, 95 of 100 row's steps give a token that is wanted; batches that wait for their longest, 40."""
    prompts, samples, mean, spread, most, divisor = lengths
    rng = np.random.default_rng(0)
    size = (60 * rows // (prompts * samples), prompts, samples)
    limits = np.minimum(rng.lognormal(np.log(mean) - spread**2 / 2, spread, size), most) // divisor + 1
    groups = [
        group(address=(i, 0), prompts=((5, 6, 7),) * prompts, limits=tuple(map(tuple, some)))
        for i, some in enumerate(limits.astype(int).tolist())
    ]
    longest = most // divisor + 1
    draw = Draw(samples=samples, temperature=0.9, top_p=0.9, max_new_tokens=longest, stops=())
    work = Work()
    found = sample(
        make_llama(L=1), groups, draw, key=jax.random.key(0), config=dataclasses.replace(NARROW, rows=rows, steps=1),
        mesh=one_device("data", "tensor"), report=lambda finished, sampled: None, work=work,
    )  # fmt: skip
    assert [[[len(new.ids) for new in one] for one in some] for some in found] == limits.astype(int).tolist()
    assert work.sampled_tokens >= 0.95 * work.row_steps


def test_a_look_in_which_no_row_wrote_anything_is_no_error():
    """As where all samples end at their first token, and rows wait for prompts that are still being read."""
    nothing = jnp.full((4, 2), -1)
    decoded = SimpleNamespace(tokens_BN=nothing, sample_BN=nothing, ended_BN=nothing < -1, watched_BNW=None)
    room, told = SimpleNamespace(rows=4, data=2, prompts=1, samples=1, held_samples=8), []
    report = lambda finished, sampled: told.append((finished, sampled))
    assert list(engine._look(decoded, {}, [], GREEDY, room, report, Work())) == []
    assert told == [(0, 0)]


def test_limits_end_samples_and_change_no_token_before(run, drawn):
    groups, samples = drawn
    rng = np.random.default_rng(2)
    limited = [
        dataclasses.replace(one, limits=tuple(tuple(rng.integers(1, 9, 3).tolist()) for _ in one.prompts))
        for one in groups
    ]
    found = run(limited, RANDOM, NARROW)
    for one, new, old in zip(limited, found, samples, strict=True):
        for limits, some, before in zip(one.limits, new, old, strict=True):
            assert [sample.ids for sample in some] == [b.ids[:n] for b, n in zip(before, limits, strict=True)]


def test_progress_adds_up_to_all_that_was_sampled(run, drawn):
    groups, samples = drawn
    reports = []
    run(groups, RANDOM, NARROW, report=lambda finished, sampled: reports.append((finished, sampled)))
    every = [new for of_group in samples for of_prompt in of_group for new in of_prompt]
    assert np.sum(reports, axis=0).tolist() == [len(every), sum(len(new.ids) for new in every)]


def test_prompts_of_many_lengths_share_few_compilations(run):
    def compiled():
        return decode.admit._cache_size(), decode.decode._cache_size()

    draw = dataclasses.replace(RANDOM, max_new_tokens=5)
    before = compiled()
    run(tree(20, instruction=(1, 15), rest=(1, 15), prompts=(3, 4)), draw, NARROW)
    first = compiled()
    assert max(np.subtract(first, before)) <= 2
    for longest in (10, 12, 14):
        run(tree(20, instruction=(1, longest), rest=(1, longest), prompts=(3, 4)), draw, NARROW)
    assert max(np.subtract(compiled(), first)) <= 4


def test_buckets_are_few_and_waste_little():
    assert [bucket(n) for n in (0, 1, 8, 9, 12, 13, 17, 25, 33, 49)] == [0, 8, 8, 12, 12, 16, 24, 32, 48, 64]
    assert [bucket(n) for n in (129, 769, 1024, 1025, 1281, 2048, 2049)] == [256, 1024, 1024, 1280, 1536, 2048, 2560]
    assert len({bucket(n) for n in range(1, 4097)}) == 22
    assert all(n <= bucket(n) <= max(8, 2 * n if 128 < n <= 256 else 1.5 * n) for n in range(1, 4097))
    assert all(bucket(n) <= 128 or bucket(n) % prefill.CHUNK == 0 for n in range(1, 4097))


# The same on many devices: what data x fsdp x tensor leaves for sampling, for every way to split eight of them.


@pytest.fixture(scope="module")
def divisible(make_llama, one_device):
    """A Llama whose heads eight devices divide, a tree, and its greedy and random samples on one device."""
    model, groups = make_llama(N=8, K=8), tree(5, prompts=(1, 3))

    def run(model, mesh):
        draws = (GREEDY, RANDOM)
        settings = {"key": jax.random.key(0), "config": NARROW, "report": lambda finished, sampled: None}
        return [sample(model, groups, draw, mesh=mesh, work=Work(), **settings) for draw in draws]

    return model, run, run(model, one_device("data", "tensor"))


@pytest.mark.parametrize(
    "tensor", [pytest.param(1, marks=pytest.mark.long), 2, pytest.param(4, marks=pytest.mark.long), 8]
)
def test_rows_and_heads_split_over_8_devices_change_no_sample(divisible, tensor):
    """And neither do layers that are no stack."""
    model, run, wanted = divisible
    mesh = sample_mesh(MeshShape(data=1, fsdp=-1, tensor=tensor))
    assert dict(mesh.shape) == {"data": 8 // tensor, "tensor": tensor}
    model = jax.device_put(model, rules.model_shardings(mesh, rules.SAMPLE, model))
    assert len(model.blocks.q[...].sharding.device_set) == 8
    apart = decoding_model(model, mesh)
    assert len(apart.stacks) == 2
    assert apart.blocks[1].q[...].sharding.is_equivalent_to(model.blocks.q[...].sharding, 4)
    assert run(apart, mesh) == wanted


# What it refuses.


def test_nothing_to_do_is_done_at_once(run):
    assert run([], GREEDY, NARROW) == []


@pytest.mark.parametrize("limits", [((3, 3),), ((3, 3, 0),), ((3, 3, 13),), ((3, 3, 3),) * 2])
def test_limits_that_do_not_fit_are_refused(run, limits):
    with pytest.raises(ValueError, match=r"one for each of 3 samples of each of its 1 prompts, from 1 to .* \(12\)"):
        run([group(address=(0, 0), prompts=((5,),), limits=limits)], RANDOM, NARROW)


@pytest.mark.parametrize("prompts", [(), ((1,), ())], ids=["no prompt", "an empty prompt"])
def test_a_group_without_tokens_is_refused(run, prompts):
    with pytest.raises(ValueError, match="every group needs a prompt and every prompt a token"):
        run([group(address=(0, 0), prompts=prompts)], GREEDY, NARROW)
