"""A training can be killed anywhere and ends as if it had not been."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from srlm_jax.data.batches import Row, padded_batches
from srlm_jax.parallel import rules
from srlm_jax.parallel.mesh import MeshShape, train_mesh
from srlm_jax.storage.checkpoint import model_hash
from srlm_jax.train.loop import Diverged, TrainConfig, train
from srlm_jax.train.objectives import SftObjective
from srlm_jax.train.optimizer import OptimizerConfig

OPTIMIZER = OptimizerConfig(
    learning_rate=3e-2, end_learning_rate=3e-3, warmup_steps=2,
    b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, clip_norm=1.0,
)  # fmt: skip
CONFIG = TrainConfig(
    steps=14,
    batch_size=4,
    accumulate=2,
    log_every=3,
    checkpoint_every=4,
    first_loss_tolerance=0.02,
    optimizer=OPTIMIZER,
)
SFT = SftObjective(dropout=0.1, logprob_chunk=8)


def counting_rows():
    """A toy task: each number is followed by the next, so all but the first can be learnt."""
    return [Row(tuple((start + i) % 30 for i in range(8)), 1) for start in range(30)]


class Killed(BaseException):
    """Stands for a signal: nothing in the package may catch it."""


def interrupted(batches, after):
    """`batches`, with a kill in place of the batch number `after`, from 0."""
    taken = iter(range(10**6))

    def pass_on(batch):
        if next(taken) == after:
            raise Killed
        return batch

    return batches.map(pass_on)


@pytest.fixture(scope="module")
def run(tiny_llama, one_device):
    """Trains a copy of the tiny Llama on the toy task in a folder."""

    def run(
        folder, *, killed_at=10**6, model=tiny_llama, given=None, mesh=None, config=CONFIG, objective=SFT, rows=None
    ):
        rows = counting_rows() if rows is None else rows
        batches = interrupted(padded_batches(rows, 8, config.batch_size, seed=3), killed_at)
        return train(
            jax.tree.map(jnp.copy, model) if given is None else given,
            objective,
            batches,
            config=config,
            lora=None,
            mesh=one_device("data", "fsdp", "tensor") if mesh is None else mesh,
            seed=5,
            folder=epath.Path(folder),
            title=folder.name,
            first=None,
        )

    return run


@pytest.fixture(scope="module")
def straight(run, tmp_path_factory):
    """The hash of the weights that a training without interruption ends with, and its folder."""
    folder = tmp_path_factory.mktemp("straight")
    return model_hash(run(folder)), folder


def metrics(folder):
    """The metrics file, without what depends on the clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert all(line.pop("tokens_per_second") > 0 for line in lines)
    return lines


def test_the_loss_goes_down_and_is_logged(straight):
    _, folder = straight
    lines = metrics(folder)
    assert [line["step"] for line in lines] == [3, 4, 6, 8, 9, 12, 14]  # every 3 steps, and before every save
    assert lines[-1]["loss"] < 0.6 * lines[0]["loss"]
    np.testing.assert_allclose(lines[-1]["learning_rate"], 3e-3, rtol=1e-5)
    assert all(line["gradient_norm"] > 0 for line in lines)
    assert list((folder / "tensorboard").iterdir())


# Before the first save, right after a save, between saves with lines logged since, and twice.
@pytest.mark.parametrize("kills", [(2,), (4,), (10,), (6, 11)], ids=str)
def test_a_killed_training_ends_with_the_same_weights_and_metrics(run, straight, tmp_path, kills):
    wanted, folder = straight
    for kill in kills:
        # A run counts its batches from where it starts: the last save before the kill before.
        saved = max((k // CONFIG.checkpoint_every * CONFIG.checkpoint_every for k in kills if k < kill), default=0)
        with pytest.raises(Killed):
            run(tmp_path, killed_at=kill - saved)
    assert model_hash(run(tmp_path)) == wanted
    assert metrics(tmp_path) == metrics(folder)


def test_a_resumed_training_does_not_start_over(run, tmp_path):
    with pytest.raises(Killed):
        run(tmp_path, killed_at=10)
    # Steps 9 to 14 are left: six batches, so that a kill at the seventh never comes, and one at the sixth does.
    with pytest.raises(Killed):
        run(tmp_path, killed_at=5)
    run(tmp_path, killed_at=6)


def test_a_resumed_training_keeps_nothing_of_what_it_would_have_begun_with(run, tiny_llama, tmp_path):
    with pytest.raises(Killed):
        run(tmp_path, killed_at=6)
    given = jax.tree.map(jnp.copy, tiny_llama)
    run(tmp_path, given=given)
    assert all(x.is_deleted() for x in jax.tree.leaves(given))


def test_a_line_that_the_kill_cut_short_is_forgotten(run, straight, tmp_path):
    wanted, folder = straight
    with pytest.raises(Killed):
        run(tmp_path, killed_at=10)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 12, "lo')
    assert model_hash(run(tmp_path)) == wanted
    assert metrics(tmp_path) == metrics(folder)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NanAbove:
    """Supervised fine-tuning whose loss is not a number where a batch holds the token `poison`."""

    sft: SftObjective
    poison: int

    def __call__(self, model, batch, key):
        sums = self.sft(model, batch, key)
        return sums._replace(loss=jnp.where((batch.tokens_BT == self.poison).any(), jnp.nan, sums.loss))


def test_a_loss_that_is_no_number_stops_the_training_and_names_the_step(run, tmp_path):
    # One poisoned row of 40, four rows a step: it comes up once in the first ten steps.
    rows = [Row(tuple((start + i) % 30 for i in range(8)), 1) for start in range(39)] + [Row((39, 39), 1)]
    batches = iter(padded_batches(rows, 8, 4, seed=3))
    poisoned = next(step for step in range(1, 11) if (next(batches).tokens_BT == 39).any())
    assert poisoned > CONFIG.checkpoint_every  # so that there is a saved state to keep
    with pytest.raises(Diverged, match=rf"^loss is nan at step {poisoned} \(this run started at step 0\)"):
        run(tmp_path / "diverged", rows=rows, objective=NanAbove(sft=SFT, poison=39))

    # What is saved is sound: a training that does not stumble over the row goes on from there.
    saved = (poisoned - 1) // CONFIG.checkpoint_every * CONFIG.checkpoint_every
    assert [p.name for p in (tmp_path / "diverged" / "train_state").iterdir() if p.name.isdigit()] == [str(saved)]
    assert max(line["step"] for line in metrics(tmp_path / "diverged")) < poisoned
    # The same program but for the token, since the compiler may round another one otherwise.
    sound = NanAbove(sft=SFT, poison=38)
    assert all(38 not in row.ids for row in rows)
    goes_on, straight = (run(tmp_path / name, rows=rows, objective=sound) for name in ("diverged", "straight"))
    assert model_hash(goes_on) == model_hash(straight)


def test_a_step_that_is_no_number_is_never_saved(run, tmp_path):
    # Every row is poisoned, and a save is due after every step.
    rows = [Row((39, 39), 1)] * 8
    every_step = dataclasses.replace(CONFIG, log_every=14, checkpoint_every=1)
    with pytest.raises(Diverged, match="at step 1 "):
        run(tmp_path / "diverged", rows=rows, objective=NanAbove(sft=SFT, poison=39), config=every_step)
    assert not [p for p in (tmp_path / "diverged" / "train_state").iterdir() if p.name.isdigit()]


def test_a_batch_that_cannot_be_made_is_named_by_its_step(run, tmp_path):
    with pytest.raises(ValueError, match=r"^bad, step \d+, its batch: a row of 9 positions does not fit"):
        run(tmp_path / "bad", rows=[*counting_rows(), Row(tuple(range(10)), 1)])


def test_a_batch_that_cannot_be_computed_is_named_by_its_step_and_shape(run, tmp_path):
    @dataclasses.dataclass(frozen=True)
    class Refuses:
        def __call__(self, model, batch, key):
            raise ValueError("no")

    with pytest.raises(ValueError, match=r"^bad, step 1, its batch of tokens \(4, 8\): no$"):
        run(tmp_path / "bad", objective=Refuses())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grows:
    """Supervised fine-tuning whose loss is 40 times itself where a batch holds token 39."""

    sft: SftObjective

    def __call__(self, model, batch, key):
        sums = self.sft(model, batch, key)
        return sums._replace(loss=jnp.where((batch.tokens_BT == 39).any(), 40, 1) * sums.loss)


def test_a_loss_ten_times_its_start_gives_one_warning(run, tmp_path, capsys):
    rows = [Row(tuple((start + i) % 30 for i in range(8)), 1) for start in range(37)] + [Row((39, 39), 1)] * 3
    run(tmp_path / "grows", rows=rows, objective=Grows(sft=SFT))
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(warnings) == 1
    assert re.search(r"warning: grows: the loss is \d+\.\d+ at step \d+, more than 10 times the \d\.\d+", warnings[0])


def test_8_devices_train_as_one_does(run, tiny_llama, tmp_path):
    plain = SftObjective(dropout=0.1, logprob_chunk=8)
    gentle = dataclasses.replace(OPTIMIZER, eps=1e-2, learning_rate=1e-2)
    config = dataclasses.replace(CONFIG, steps=4, batch_size=8, optimizer=gentle)
    wanted = run(tmp_path / "one", objective=plain, config=config)
    mesh = train_mesh(MeshShape(data=1, fsdp=-1, tensor=2))
    assert dict(mesh.shape) == {"data": 1, "fsdp": 4, "tensor": 2}
    model = jax.device_put(tiny_llama, rules.model_shardings(mesh, rules.TRAIN, tiny_llama))
    found = run(tmp_path / "eight", model=model, mesh=mesh, objective=plain, config=config)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps is 0: it must be at least 1"),
        ({"accumulate": 3}, r"batch_size \(4\) must be a multiple of accumulate \(3\)"),
    ],
)
def test_an_impossible_training_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)
