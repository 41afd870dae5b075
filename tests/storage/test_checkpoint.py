"""Weights come back as they were, and whatever happened to their files is said and never loaded."""

import dataclasses
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from srlm_jax.data.batches import Row, padded_batches
from srlm_jax.model import llama
from srlm_jax.parallel import rules
from srlm_jax.parallel.mesh import MeshShape, sample_mesh, train_mesh
from srlm_jax.storage.checkpoint import (
    BadCheckpoint,
    TrainCheckpoints,
    TrainState,
    config_facts,
    load_model,
    model_hash,
    named_leaves,
    save_model,
)


def shapes(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def assert_equal(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.fixture
def saved(tiny_llama, tmp_path):
    """The folder of a saved tiny Llama."""
    save_model(tmp_path / "model", tiny_llama, {"step": 7})
    return tmp_path / "model"


# Names and hashes.


def test_weights_are_named_by_where_they_are(tiny_llama):
    assert sorted(named_leaves(tiny_llama)) == [
        "blocks/attention_norm", "blocks/down", "blocks/gate", "blocks/k", "blocks/mlp_norm", "blocks/o", "blocks/q",
        "blocks/up", "blocks/v", "embedding", "norm", "output",
    ]  # fmt: skip


def test_the_hash_changes_with_any_single_number(tiny_llama):
    hashes = {model_hash(tiny_llama)}
    leaves, tree = jax.tree.flatten(tiny_llama)
    for i, leaf in enumerate(leaves):
        flat = np.asarray(leaf).ravel()
        for place in (0, flat.size // 2, flat.size - 1):
            changed = flat.copy()
            changed[place] = np.nextafter(changed[place], np.float32(np.inf))  # the smallest change there is
            others = leaves[:i], leaves[i + 1 :]
            hashes.add(model_hash(jax.tree.unflatten(tree, [*others[0], changed.reshape(leaf.shape), *others[1]])))
    assert len(hashes) == 1 + 3 * len(leaves)


def test_the_hash_changes_when_two_numbers_or_two_weights_change_places(tiny_llama):
    swapped = jax.tree.map(jnp.copy, tiny_llama)
    swapped.norm = swapped.norm.replace(swapped.norm[...][::-1])
    exchanged = jax.tree.map(jnp.copy, tiny_llama)
    exchanged.blocks.gate, exchanged.blocks.up = exchanged.blocks.up, exchanged.blocks.gate
    assert len({model_hash(model) for model in (tiny_llama, swapped, exchanged)}) == 3


def test_the_hash_is_the_same_on_any_mesh(tiny_llama):
    shape = MeshShape(data=2, fsdp=2, tensor=2)
    wanted = model_hash(tiny_llama)
    for mesh, table in ((train_mesh(shape), rules.TRAIN), (sample_mesh(shape), rules.SAMPLE)):
        assert model_hash(jax.device_put(tiny_llama, rules.model_shardings(mesh, table, tiny_llama))) == wanted


# A round trip.


def test_a_saved_model_comes_back_bit_for_bit(tiny_llama, saved):
    assert_equal(load_model(saved, shapes(tiny_llama)), tiny_llama)
    manifest = json.loads((saved / "manifest.json").read_text())
    assert manifest["hash"] == model_hash(tiny_llama)
    assert manifest["step"] == 7
    assert manifest["weights"]["blocks/q"] == {"shape": [2, 16, 4, 8], "dtype": "float32"}


def test_relative_paths_are_as_good_as_absolute_ones(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_model("runs/model", tiny_llama, {})
    assert_equal(load_model("runs/model", shapes(tiny_llama)), tiny_llama)
    with TrainCheckpoints("runs/state") as checkpoints:
        checkpoints.save(1, train_state(1), batches())
    with TrainCheckpoints(tmp_path / "runs" / "state") as checkpoints:
        assert checkpoints.restore(shapes_of(train_state(0)), batches())[0] == 1


def test_a_bfloat16_model_comes_back_too(tiny_llama, tmp_path):
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tiny_llama)
    save_model(tmp_path / "half", half, {})
    assert_equal(load_model(tmp_path / "half", shapes(half)), half)


def test_a_model_saved_from_one_mesh_loads_onto_another(tiny_llama, tmp_path):
    mesh = train_mesh(MeshShape(data=1, fsdp=4, tensor=2))
    save_model(tmp_path / "m", jax.device_put(tiny_llama, rules.model_shardings(mesh, rules.TRAIN, tiny_llama)), {})
    mesh = sample_mesh(MeshShape(data=1, fsdp=4, tensor=2))
    placed = rules.model_shardings(mesh, rules.SAMPLE, tiny_llama)
    like = jax.tree.map(lambda x, to: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=to), tiny_llama, placed)
    loaded = load_model(tmp_path / "m", like)
    assert_equal(loaded, tiny_llama)
    assert loaded.blocks.q[...].sharding.is_equivalent_to(named_leaves(placed)["blocks/q"], 4)


def test_saving_again_replaces_what_was_there(tiny_llama, saved):
    other = jax.tree.map(lambda x: x + 1, tiny_llama)
    save_model(saved, other, {})
    assert_equal(load_model(saved, shapes(other)), other)


def test_a_configuration_is_written_as_plain_json(tiny_config):
    facts = config_facts(tiny_config)
    assert json.loads(json.dumps(facts)) == facts
    assert (facts["V"], facts["rope_theta"], facts["tied"]) == (40, 100.0, False)


# What must not load.


def test_a_missing_folder_is_no_checkpoint(tiny_llama, tmp_path):
    with pytest.raises(BadCheckpoint, match=r"nowhere holds no finished checkpoint: manifest.json is missing; delete"):
        load_model(tmp_path / "nowhere", shapes(tiny_llama))


def test_an_unfinished_checkpoint_is_no_checkpoint(tiny_llama, saved):
    (saved / "manifest.json").unlink()
    with pytest.raises(BadCheckpoint, match=r"holds no finished checkpoint: manifest.json is missing"):
        load_model(saved, shapes(tiny_llama))


@pytest.mark.parametrize(
    ("text", "message"),
    [('{"hash": "a', "manifest.json"), ("[]", "lacks the field"), ('{"hash": "a"}', "lacks the field 'hash' or")],
)
def test_a_broken_manifest_is_named(tiny_llama, saved, text, message):
    (saved / "manifest.json").write_text(text)
    with pytest.raises(BadCheckpoint, match=message):
        load_model(saved, shapes(tiny_llama))


def largest_file(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), truncate, flip_a_bit], ids=["lost", "cut", "flipped"])
def test_a_damaged_weight_file_is_noticed(tiny_llama, saved, damage):
    damage(largest_file(saved / "weights"))
    with pytest.raises(BadCheckpoint, match=r"(cannot be read, a file is missing or|:) damaged; delete the folder"):
        load_model(saved, shapes(tiny_llama))


def test_weights_of_another_manifest_are_noticed(tiny_llama, saved):
    manifest = json.loads((saved / "manifest.json").read_text())
    (saved / "manifest.json").write_text(json.dumps(manifest | {"hash": "0" * 16}))
    with pytest.raises(BadCheckpoint, match=rf"the weights' hash is {model_hash(tiny_llama)}, not 0000000000000000"):
        load_model(saved, shapes(tiny_llama))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"V": 48}, r"weight 'embedding' is .*\[40, 16\].*, the model configuration wants .*\[48, 16\]"),
        ({"L": 3}, r"weight 'blocks/attention_norm' is .*\[2, 16\].*, the model configuration wants .*\[3, 16\]"),
        ({"tied": True}, "weight 'output' is .*, the model configuration wants none of that name"),
        ({"param_dtype": "bfloat16"}, "is .*float32.*, the model configuration wants .*bfloat16"),
    ],
)
def test_the_checkpoint_of_another_model_is_named_with_the_weight(tiny_config, saved, change, message):
    with pytest.raises(BadCheckpoint, match=message):
        load_model(saved, llama.abstract(dataclasses.replace(tiny_config, **change)))


def test_a_weight_that_the_checkpoint_lacks_is_named(make_llama, tmp_path):
    save_model(tmp_path / "tied", make_llama(tied=True), {})
    with pytest.raises(BadCheckpoint, match="weight 'output' is missing, the model configuration wants"):
        load_model(tmp_path / "tied", shapes(make_llama(tied=False)))


# Train states.


def batches():
    return iter(padded_batches([Row(tuple(range(i, i + 5)), 1) for i in range(10)], 4, 3, seed=0))


def train_state(step):
    return TrainState({"w": jnp.arange(4.0) + step}, {"count": jnp.int32(step)})


def test_a_train_state_comes_back_with_its_place_in_the_data(tmp_path):
    folder, data = epath.Path(tmp_path / "state"), batches()
    with TrainCheckpoints(folder) as checkpoints:
        assert checkpoints.restore(shapes_of(train_state(0)), data) is None
        for step in (1, 2):
            next(data)
            checkpoints.save(step, train_state(step), data)
    wanted, data = next(data), batches()
    with TrainCheckpoints(folder) as checkpoints:
        step, state = checkpoints.restore(shapes_of(train_state(0)), data)
    assert step == 2
    assert_equal((state.trainable, state.opt_state), (train_state(2).trainable, train_state(2).opt_state))
    np.testing.assert_array_equal(next(data).tokens_BT, wanted.tokens_BT)
    assert [path.name for path in folder.iterdir()] == ["2"]  # the one before is gone


def shapes_of(state):
    return TrainState(shapes(state.trainable), shapes(state.opt_state))


def test_a_damaged_train_state_says_what_to_do(tmp_path):
    folder = epath.Path(tmp_path / "state")
    with TrainCheckpoints(folder) as checkpoints:
        checkpoints.save(3, train_state(3), batches())
    truncate(largest_file(tmp_path / "state" / "3" / "state"))
    with (
        TrainCheckpoints(folder) as checkpoints,
        pytest.raises(
            BadCheckpoint,
            match=r"state \(step 3\) cannot be read; delete the folder to train this stage from its start",
        ),
    ):
        checkpoints.restore(shapes_of(train_state(0)), batches())


def test_the_train_state_of_another_model_is_refused(tmp_path):
    folder = epath.Path(tmp_path / "state")
    with TrainCheckpoints(folder) as checkpoints:
        checkpoints.save(3, train_state(3), batches())
    larger = TrainState({"w": jnp.zeros(5)}, {"count": jnp.int32(0)})
    with TrainCheckpoints(folder) as checkpoints, pytest.raises(BadCheckpoint, match="cannot be read"):
        checkpoints.restore(shapes_of(larger), batches())


def test_what_is_saved_is_the_state_at_the_call_though_its_memory_is_given_away(tmp_path):
    """Writing goes on in the background while the next steps, to which the arrays are donated, write over them."""
    step = jax.jit(lambda w: w + 1, donate_argnums=0)
    w = jax.random.normal(jax.random.key(0), (4_000_000,))
    wanted, folder = np.array(w), epath.Path(tmp_path / "state")
    with TrainCheckpoints(folder) as checkpoints:
        checkpoints.save(1, TrainState({"w": w}, {}), batches())
        for _ in range(20):
            w = step(w)
        jax.block_until_ready(w)
    with TrainCheckpoints(folder) as checkpoints:
        _, state = checkpoints.restore(TrainState(shapes({"w": w}), {}), batches())
    np.testing.assert_array_equal(state.trainable["w"], wanted)
    assert not np.array_equal(w, wanted)


KILLED = """
import os, sys
import jax
from etils import epath
from test_checkpoint import TrainCheckpoints, TrainState, batches
w = jax.random.normal(jax.random.key(0), (30_000_000,))
checkpoints = TrainCheckpoints(epath.Path(sys.argv[1]))
checkpoints.save(1, TrainState({"w": w}, {}), batches())
checkpoints.save(2, TrainState({"w": w + 1}, {}), batches())  # waits for the first
os._exit(9)
"""


@pytest.mark.slow
def test_a_run_that_is_killed_while_it_saves_goes_on_from_the_save_before(tmp_path):
    """The second save takes much longer than the kill; were it faster, it would have to be whole."""
    folder = tmp_path / "state"
    done = subprocess.run([sys.executable, "-c", KILLED, folder], cwd=epath.Path(__file__).parent, check=False)
    assert done.returncode == 9
    like = TrainState({"w": jax.ShapeDtypeStruct((30_000_000,), jnp.float32, sharding=jnp.zeros(1).sharding)}, {})
    with TrainCheckpoints(folder) as checkpoints:
        step, state = checkpoints.restore(like, batches())
    wanted = jax.random.normal(jax.random.key(0), (30_000_000,)) + (step - 1)
    np.testing.assert_array_equal(state.trainable["w"], wanted)


def test_a_save_that_fails_in_the_background_is_an_error(tmp_path):
    """What it would be renamed to is in the way: the training hears of it at the next save or, here, at its end."""
    large = jax.block_until_ready(jax.random.normal(jax.random.key(0), (8_000_000,)))
    with pytest.raises(FileExistsError), TrainCheckpoints(epath.Path(tmp_path)) as checkpoints:
        checkpoints.save(1, TrainState({"w": large}, {}), batches())
        (tmp_path / "1").mkdir()
        (tmp_path / "1" / "other").write_text("")
