"""Weights of other people's files: the same numbers in the right places, read no more than needed, or a clear error."""

import dataclasses
import json
import os
import sys
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from srlm_jax.model import config_files, llama, sources, weights
from srlm_jax.model.config import RopeScaling
from srlm_jax.model.folders import BadModelFile
from srlm_jax.model.sources import Tensor
from srlm_jax.parallel import rules
from srlm_jax.parallel.mesh import MeshShape, train_mesh
from srlm_jax.storage import checkpoint

CHOICES = {"param_dtype": "float32", "compute_dtype": "float32", "remat": "dots"}
SCALING = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def on_one_device(config):
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda _: place, llama.abstract(config))


def load(folder, **choices):
    config = weights.read_config(folder, **CHOICES | choices)
    return weights.load(folder, config, on_one_device(config))


def logits(model, tokens):
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden, _ = model(jnp.asarray(tokens), positions, segments_BT=None, cache=None, dropout=None)
    return np.asarray(hidden @ model.head())


def assert_same(one, other):
    found, wanted = checkpoint.named_leaves(one), checkpoint.named_leaves(other)
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert found[name].dtype == wanted[name].dtype
        np.testing.assert_array_equal(found[name], wanted[name])


def save(folder, model, **kwargs):
    """A folder in Hugging Face's layout."""
    folder = epath.Path(folder)
    folder.mkdir(exist_ok=True)
    weights.save_hf(folder, model, **{"shard_bytes": 10**9} | kwargs)
    (folder / "config.json").write_text(json.dumps(config_files.to_hf(model.config, {})))
    return folder


@pytest.fixture
def folder(tmp_path, tiny_llama):
    """The tiny Llama in Hugging Face's layout."""
    return save(tmp_path / "hf", tiny_llama)


# --- against transformers ---------------------------------------------------------------------------------------------

VARIANTS = {
    "full heads": {"num_key_value_heads": 4},
    "grouped queries": {},
    "wide heads": {"head_dim": 12},
    "tied": {"tie_word_embeddings": True},
    "scaled angles": {
        "head_dim": 16,
        "rope_parameters": SCALING | {"original_max_position_embeddings": 32, "rope_theta": 1e4},
    },
}


@pytest.fixture(scope="module", params=VARIANTS.values(), ids=VARIANTS)
def theirs(request, tmp_path_factory):
    """A random Llama of transformers, and the folder it was saved to."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = {
        "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 24, "initializer_range": 0.3, "pad_token_id": 0,
    } | request.param  # fmt: skip
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).eval()
    folder = tmp_path_factory.mktemp("theirs")
    model.save_pretrained(folder)
    return model, folder


def their_logits(model, tokens):
    import torch

    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.numpy()


TOKENS = np.random.default_rng(1).integers(1, 40, (2, 48))


@pytest.mark.parity
def test_a_model_of_transformers_gives_the_same_logits_here(theirs):
    model, folder = theirs
    wanted = their_logits(model, TOKENS)
    assert wanted.std() > 0.5  # so that agreement means something
    np.testing.assert_allclose(logits(load(folder), TOKENS), wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())


@pytest.mark.parity
def test_a_model_that_came_and_went_is_the_same_to_transformers(theirs, tmp_path):
    import transformers

    model, folder = theirs
    out = save(tmp_path / "out", load(folder))
    before, after = (sources.hugging_face(epath.Path(place)) for place in (folder, out))
    assert before.keys() == after.keys()
    for name in before:
        assert before[name].dtype == after[name].dtype
        np.testing.assert_array_equal(before[name].whole(), after[name].whole())
    again = transformers.LlamaForCausalLM.from_pretrained(out).eval()
    wanted = their_logits(model, TOKENS)
    np.testing.assert_allclose(their_logits(again, TOKENS), wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parity
def test_shards_of_transformers_and_its_old_files_hold_the_same_model(theirs, tmp_path):
    import torch

    model, folder = theirs
    wanted = load(folder)
    model.save_pretrained(tmp_path / "shards", max_shard_size="4KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert_same(load(tmp_path / "shards"), wanted)

    state = dict(model.state_dict())
    places = {name: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, name in enumerate(state)}
    for kind in ("one", "two"):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "config.json").write_text((folder / "config.json").read_text())
    torch.save(state, tmp_path / "one" / "pytorch_model.bin")
    for file in sorted(set(places.values())):
        torch.save({name: t for name, t in state.items() if places[name] == file}, tmp_path / "two" / file)
    (tmp_path / "two" / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    assert_same(load(tmp_path / "one"), wanted)
    assert_same(load(tmp_path / "two"), wanted)


# --- Meta -------------------------------------------------------------------------------------------------------------


@pytest.mark.parity
def test_a_real_model_in_meta_s_layout_is_the_one_in_hugging_face_s(stories260k):
    hf, meta = load(stories260k / "hf"), load(stories260k / "meta")
    assert hf.config == meta.config
    assert_same(meta, hf)


COLUMNS = ("wq", "wk", "wv", "w1", "w3", "output")  # split by rows of the matrix, the others by columns


def as_meta(model, folder, shards, embedding_axis):
    """The model as Meta's model-parallel training saves it, made from Hugging Face's layout by hand."""
    import torch

    c = model.config
    names = {
        "self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv",
        "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2",
        "mlp.up_proj": "feed_forward.w3", "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm", "model.layers": "layers", "model.norm": "norm",
        "model.embed_tokens": "tok_embeddings", "lm_head": "output",
    }  # fmt: skip
    parts = [{"rope.freqs": torch.zeros(c.H // 2)} for _ in range(shards)]
    for name, tensor in weights.hf_tensors(model).items():
        x = torch.tensor(np.array(tensor.whole(), np.float32)).to(getattr(torch, tensor.dtype))
        if "q_proj" in name or "k_proj" in name:
            x = x.view(-1, 2, c.H // 2, c.D).transpose(1, 2).reshape(-1, c.D)  # x0 x1 y0 y1 -> x0 y0 x1 y1
        for theirs, metas in names.items():
            name = name.replace(theirs, metas)
        axis = 0 if name.split(".")[-2] in COLUMNS else 1
        axis = embedding_axis if "tok_embeddings" in name else axis
        for i, part in enumerate(parts):
            part[name] = x if "norm" in name else x.chunk(shards, dim=axis)[i].clone()
    folder.mkdir()
    for i, part in enumerate(parts):
        torch.save(part, folder / f"consolidated.{i:02d}.pth")
    params = {"dim": c.D, "n_layers": c.L, "n_heads": c.N, "n_kv_heads": c.K, "multiple_of": c.F, "vocab_size": -1}
    params |= {"norm_eps": c.norm_eps, "rope_theta": c.rope_theta, "ffn_dim_multiplier": 0.1}
    (folder / "params.json").write_text(json.dumps(params))
    return folder


@pytest.mark.parity
@pytest.mark.parametrize(("shards", "axis"), [(1, 0), (2, 1), (2, 0)], ids=["one", "Llama 2's", "Llama 3's"])
def test_model_parallel_shards_are_merged(make_llama, tmp_path, shards, axis):
    model = make_llama(H=4)
    folder = as_meta(model, tmp_path / "meta", shards, axis)
    loaded = load(folder)
    assert loaded.config == model.config
    assert_same(loaded, model)
    # A device's part may lie in one shard or reach over two.
    mesh = train_mesh(MeshShape(data=1, fsdp=4, tensor=2))
    places = rules.model_shardings(mesh, rules.TRAIN, llama.abstract(model.config))
    assert_same(weights.load(folder, model.config, places), model)


@pytest.mark.parity
def test_meta_s_scaled_angles_and_wrapped_names_are_read(make_llama, tmp_path):
    import torch

    model = make_llama(H=4)
    folder = as_meta(model, tmp_path / "meta", 2, 1)
    params = json.loads((folder / "params.json").read_text())
    (folder / "params.json").write_text(json.dumps(params | {"use_scaled_rope": True}))
    for path in folder.glob("*.pth"):
        part = torch.load(path, weights_only=True)
        torch.save({f"module.{name}": tensor for name, tensor in part.items()}, path)
    loaded = load(folder)
    published = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=8192)
    assert loaded.config == dataclasses.replace(model.config, rope_scaling=published)
    assert_same(loaded, model)


@pytest.mark.parity
def test_meta_s_bfloat16_is_kept(make_llama, tmp_path):
    model = jax.tree.map(lambda x: x.astype(jnp.bfloat16), make_llama(H=4))
    folder = as_meta(model, tmp_path / "meta", 2, 1)
    loaded = load(folder, param_dtype="bfloat16")
    assert weights.source_dtype(folder, loaded.config) == "bfloat16"
    for name, leaf in checkpoint.named_leaves(loaded).items():
        np.testing.assert_array_equal(leaf, checkpoint.named_leaves(model)[name])


@pytest.mark.parity
def test_a_missing_or_unequal_shard_is_named(make_llama, tmp_path):
    import torch

    folder = as_meta(make_llama(H=4), tmp_path / "meta", 2, 1)
    part = torch.load(folder / "consolidated.01.pth", weights_only=True)
    torch.save({k: v for k, v in part.items() if k != "norm.weight"}, folder / "consolidated.01.pth")
    with pytest.raises(
        BadModelFile, match=r"consolidated.01.pth lacks tensors that the other shards have: norm.weight"
    ):
        load(folder)
    torch.save(part | {"layers.1.attention.wo.weight": torch.zeros(16, 5)}, folder / "consolidated.01.pth")
    with pytest.raises(
        BadModelFile, match=r"layers.1.attention.wo.weight is \[16, .\], the configuration says \[16, 16\]"
    ):
        load(folder)
    (folder / "consolidated.01.pth").rename(folder / "consolidated.02.pth")
    with pytest.raises(BadModelFile, match=r"meta lacks consolidated.01.pth"):
        load(folder)


# --- how much is read -------------------------------------------------------------------------------------------------


def counted(tensors, reads):
    """The same tensors; every read leaves (name, numbers) in `reads`."""

    def count(name, tensor):
        def read(index):
            part = tensor.read(index)
            reads.append((name, part.size))
            return part

        return dataclasses.replace(tensor, read=read)

    return {name: count(name, tensor) for name, tensor in tensors.items()}


@pytest.mark.parametrize("shape", [(1, 8, 1), (1, 4, 2), (2, 2, 2), (8, 1, 1)], ids=str)
def test_sharded_over_eight_devices_it_is_the_same_and_every_number_is_read_once(tiny_llama, shape):
    config, reads = tiny_llama.config, []
    tensors = counted(weights.hf_tensors(tiny_llama), reads)
    data, fsdp, tensor = shape
    mesh = train_mesh(MeshShape(data=data, fsdp=fsdp, tensor=tensor))
    places = rules.model_shardings(mesh, rules.TRAIN, llama.abstract(config))
    loaded = weights.assemble(tensors, "hf", config, places)
    assert_same(loaded, tiny_llama)
    assert sum(size for _, size in reads) == config.parameters  # what several devices hold is read for all of them
    whole = config.D * config.F
    assert {size for name, size in reads if "up_proj" in name} == {whole // (fsdp * tensor)}
    for name, leaf in checkpoint.named_leaves(loaded).items():
        assert leaf.sharding.is_equivalent_to(checkpoint.named_leaves(places)[name], leaf.ndim)


def test_a_head_s_width_may_be_split_too(tiny_llama):
    table = rules.TRAIN | {"heads": (), "kv_heads": (), "head": ("tensor",)}
    places = rules.model_shardings(train_mesh(MeshShape(data=1, fsdp=2, tensor=4)), table, tiny_llama)
    assert_same(weights.assemble(weights.hf_tensors(tiny_llama), "hf", tiny_llama.config, places), tiny_llama)


@pytest.mark.parametrize("rows", [1, 5, 16])
def test_turned_in_strips_of_any_height_it_is_the_same(tiny_llama, monkeypatch, rows):
    monkeypatch.setattr(weights, "_STRIP", rows)
    tensors, config = weights.hf_tensors(tiny_llama), tiny_llama.config
    assert_same(weights.assemble(tensors, "hf", config, on_one_device(config)), tiny_llama)


def test_no_more_than_twice_the_largest_weight_is_in_memory_besides_the_model(tiny_config, monkeypatch):
    monkeypatch.setattr(weights, "_pages", np.empty)  # the memory that is traced
    config = dataclasses.replace(tiny_config, V=64, D=128, N=8, K=8, H=16, F=1024, L=8)
    largest = 4 * config.L * config.D * config.F

    def draw(shape):  # numbers from nowhere, so that the source itself takes no room
        return Tensor(shape, "float32", lambda index: np.ones([axis.stop - axis.start for axis in index], np.float32))

    names = weights.hf_tensors(llama.abstract(config))
    tensors = {name: draw(tensor.shape) for name, tensor in names.items()}
    places = on_one_device(config)
    weights.assemble(tensors, "hf", config, places)  # whatever the first time costs
    tracemalloc.start()
    model = weights.assemble(tensors, "hf", config, places)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    held = 4 * config.parameters
    del model
    assert peak < held + 2 * largest


def test_a_cpu_takes_over_the_memory_that_a_model_was_read_into(tiny_llama, monkeypatch):
    pages, read_into = weights._pages, []

    def spy(shape, dtype):
        block = pages(shape, dtype)
        read_into.append(block.ctypes.data)
        return block

    monkeypatch.setattr(weights, "_pages", spy)
    config = tiny_llama.config
    model = weights.assemble(weights.hf_tensors(tiny_llama), "hf", config, on_one_device(config))
    assert {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(model)} == set(read_into)


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="mappings are read from /proc")
def test_a_file_is_mapped_no_longer_than_it_is_read(folder):
    def mapped():
        return "model.safetensors" in epath.Path("/proc/self/maps").read_text()

    tensors = sources.hugging_face(folder)
    assert not mapped()
    part = tensors["model.norm.weight"].whole()
    assert mapped()
    del part
    assert not mapped()


# --- types ------------------------------------------------------------------------------------------------------------


def test_weights_are_read_in_the_type_asked_for(folder, tiny_llama):
    for name, leaf in checkpoint.named_leaves(load(folder, param_dtype="bfloat16")).items():
        np.testing.assert_array_equal(leaf, checkpoint.named_leaves(tiny_llama)[name].astype(jnp.bfloat16))
    assert weights.source_dtype(folder, tiny_llama.config) == "float32"


def test_bfloat16_comes_and_goes_bit_for_bit(tiny_llama, tmp_path):
    config = dataclasses.replace(tiny_llama.config, param_dtype="bfloat16")
    leaves = [leaf.astype(jnp.bfloat16) for leaf in jax.tree.leaves(tiny_llama)]
    half = jax.tree.unflatten(jax.tree.structure(llama.abstract(config)), leaves)
    folder = save(tmp_path / "half", half)
    assert weights.source_dtype(folder, config) == "bfloat16"
    assert_same(load(folder, param_dtype="bfloat16"), half)


def in_type(tensor, dtype):
    return Tensor(tensor.shape, dtype, lambda index: tensor.read(index).astype(jnp.dtype(dtype)))


@pytest.mark.parametrize("most", ["bfloat16", "float16", "float32"])
def test_of_several_types_that_of_most_parameters_is_computed_in_and_all_are_loaded(folder, tiny_llama, most):
    tensors = weights.hf_tensors(tiny_llama)
    few = "float32" if most != "float32" else "bfloat16"
    mixed = {name: in_type(t, few if "norm" in name else most) for name, t in tensors.items()}
    sources.write_safetensors(folder / "model.safetensors", mixed)
    assert weights.source_dtype(folder, tiny_llama.config) == most
    kept = weights.kept(folder, tiny_llama.config)
    assert kept["model.norm.weight"] == (few, (16,)) and kept["lm_head.weight"] == (most, (40, 16))
    loaded = checkpoint.named_leaves(load(folder))
    for name, leaf in checkpoint.named_leaves(tiny_llama).items():
        wanted = np.asarray(leaf).astype(few if "norm" in name else most).astype("float32")
        np.testing.assert_array_equal(loaded[name], wanted)
    for leaf in jax.tree.leaves(load(folder, param_dtype=most)):
        assert leaf.dtype == most


def test_parameters_are_counted_and_not_tensors(folder, tiny_llama):
    tensors = weights.hf_tensors(tiny_llama)  # 6,736 numbers; the embedding and the head are 1,280 of them
    large = {"model.embed_tokens.weight", "lm_head.weight", *(name for name in tensors if "mlp" in name)}
    mixed = {name: in_type(t, "bfloat16") if name in large else t for name, t in tensors.items()}
    assert len(large) < len(tensors) / 2
    sources.write_safetensors(folder / "model.safetensors", mixed)
    assert weights.source_dtype(folder, tiny_llama.config) == "bfloat16"


def test_double_precision_is_computed_in_single(folder, tiny_llama):
    wide = {name: in_type(t, "float64") for name, t in weights.hf_tensors(tiny_llama).items()}
    sources.write_safetensors(folder / "model.safetensors", wide)
    assert weights.source_dtype(folder, tiny_llama.config) == "float32"
    assert_same(load(folder), tiny_llama)


def test_a_checkpoint_of_this_package_may_hold_several_types(tiny_llama, tmp_path):
    paths = jax.tree_util.tree_leaves_with_path(tiny_llama)
    leaves = [leaf if "norm" in jax.tree_util.keystr(path) else leaf.astype(jnp.bfloat16) for path, leaf in paths]
    mixed = jax.tree.unflatten(jax.tree.structure(tiny_llama), leaves)
    checkpoint.save_model(tmp_path / "m", mixed, {"config": checkpoint.config_facts(tiny_llama.config)})
    assert weights.source_dtype(tmp_path / "m", tiny_llama.config) == "bfloat16"
    for name, leaf in checkpoint.named_leaves(load(tmp_path / "m")).items():
        assert leaf.dtype == "float32"
        np.testing.assert_array_equal(leaf, checkpoint.named_leaves(mixed)[name].astype("float32"))


# --- names that wrappers change ---------------------------------------------------------------------------------------


def renamed(folder, tiny_llama, rename):
    rewrite(folder, {rename(name): tensor for name, tensor in weights.hf_tensors(tiny_llama).items()})
    return folder


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: f"module.{name}",
        lambda name: f"_orig_mod.{name}",
        lambda name: f"base_model.model.{name}",
        lambda name: f"module._orig_mod.base_model.model.{name}",
        lambda name: f"policy.{name}",
        lambda name: name.replace("layers.1.", "layers.1._orig_mod."),
        lambda name: f"_fsdp_wrapped_module.{name.replace('.mlp', '._checkpoint_wrapped_module.mlp')}",
    ],
    ids=["data parallel", "compiled", "PEFT", "all three", "a name of one's own", "compiled by layer", "FSDP"],
)
def test_what_wrappers_add_to_names_is_taken_off(folder, tiny_llama, rename):
    assert_same(load(renamed(folder, tiny_llama, rename)), tiny_llama)


def test_a_wrapper_around_a_part_is_not_guessed_at(folder, tiny_llama):
    renamed(folder, tiny_llama, lambda name: name if "head" in name else f"module.{name}")
    with pytest.raises(BadModelFile, match=r"model.embed_tokens.weight is missing; module.model.embed_tokens.weight"):
        load(folder)
    twice = {f"_orig_mod.{name}": tensor for name, tensor in weights.hf_tensors(tiny_llama).items()}
    rewrite(folder, weights.hf_tensors(tiny_llama) | twice)
    with pytest.raises(BadModelFile, match=r"_orig_mod.lm_head.weight is unknown"):
        load(folder)


@pytest.mark.parametrize(("tied", "advice"), [(True, "AutoModelForCausalLM"), (False, "the files that have the head")])
def test_a_model_without_its_head_is_told_by_its_names(make_llama, tmp_path, tied, advice):
    model = make_llama(tied=tied)
    tensors = {name.removeprefix("model."): tensor for name, tensor in weights.hf_tensors(model).items()}
    tensors.pop("lm_head.weight", None)
    message = (
        r"embed_tokens\.weight is there and no model\.embed_tokens\.weight: .* LlamaModel, which has no output head"
    )
    with pytest.raises(BadModelFile, match=rf"^a folder: {message}; .*{advice}"):
        weights.checked(tensors, "hf", model.config, "a folder")


@pytest.mark.parametrize(
    "part", ["lora_A.default.weight", "lora_B.weight", "lora_magnitude_vector", "base_layer.weight"]
)
def test_an_adapter_beside_the_weights_is_named(folder, tiny_llama, part):
    tensors = {f"base_model.model.{name}": tensor for name, tensor in weights.hf_tensors(tiny_llama).items()}
    name = f"base_model.model.model.layers.0.self_attn.q_proj.{part}"
    rewrite(folder, tensors | {name: tensors["base_model.model.model.norm.weight"]})
    with pytest.raises(
        BadModelFile, match=rf"q_proj.{part} belongs to an adapter that is not merged.*merge_and_unload"
    ):
        load(folder)


# --- our own layout ---------------------------------------------------------------------------------------------------


def test_a_checkpoint_of_this_package_is_read_like_the_others(make_llama, tmp_path):
    scaling = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=64)
    model = make_llama(rope_scaling=scaling)
    checkpoint.save_model(tmp_path / "m", model, {"config": checkpoint.config_facts(model.config)})
    assert weights.read_config(tmp_path / "m", **CHOICES) == model.config
    assert_same(load(tmp_path / "m"), model)
    half = load(tmp_path / "m", param_dtype="bfloat16")
    assert half.config.param_dtype == "bfloat16"
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {jnp.dtype("bfloat16")}
    (tmp_path / "m" / "manifest.json").write_text(json.dumps({"config": checkpoint.config_facts(model.config)}))
    with pytest.raises(BadModelFile, match=r"manifest.json lacks the field 'weights'"):
        load(tmp_path / "m")


# --- what must not load -----------------------------------------------------------------------------------------------


def rewrite(folder, tensors):
    sources.write_safetensors(folder / "model.safetensors", tensors)


def test_of_missing_unknown_and_misshapen_tensors_one_each_is_named(folder, tiny_llama):
    tensors = weights.hf_tensors(tiny_llama)
    tensors["model.layers.0.mlp.bias"] = tensors["model.norm.weight"]
    tensors["model.norm.weight"] = tensors["model.embed_tokens.weight"]
    del tensors["lm_head.weight"], tensors["model.layers.1.self_attn.q_proj.weight"]
    rewrite(folder, tensors)
    with pytest.raises(BadModelFile) as raised:
        load(folder)
    assert str(raised.value) == (
        f"{folder}: model.layers.1.self_attn.q_proj.weight is missing; "
        "model.norm.weight is [40, 16], the configuration says [16]; model.layers.0.mlp.bias is unknown; and 1 more"
    )


def test_a_configuration_that_lies_about_shapes_is_found_out_before_anything_is_read(tiny_llama):
    reads = []
    tensors = counted(weights.hf_tensors(tiny_llama), reads)
    config = dataclasses.replace(tiny_llama.config, F=32, L=3)
    with pytest.raises(BadModelFile) as raised:
        weights.checked(tensors, "hf", config, "folder")
    assert str(raised.value) == (  # of a layer that is not there 9 tensors, and 3 x 2 that are narrower
        "folder: model.layers.2.input_layernorm.weight is missing; "
        "model.layers.0.mlp.gate_proj.weight is [24, 16], the configuration says [32, 16]; "
        "model.layers.2.self_attn.q_proj.weight is missing; and 12 more"
    )
    assert not reads


def test_many_problems_are_three_and_a_count(tiny_llama):
    tensors = weights.hf_tensors(tiny_llama)
    norm = tensors["model.norm.weight"]
    config = dataclasses.replace(tiny_llama.config, L=40)
    others = {f"model.layers.{i}.{'x' * 300}": norm for i in range(300)}
    with pytest.raises(BadModelFile) as raised:
        weights.checked(tensors | others, "hf", config, "folder")
    assert str(raised.value).endswith(f"; and {38 * 9 + 300 - 3} more") and len(str(raised.value)) < 400
    with pytest.raises(BadModelFile) as raised:
        weights.checked(tensors | {str(i): norm for i in range(400)}, "hf", config, "folder")
    assert str(raised.value).count("is missing") == 2


@pytest.mark.parametrize("layout", ["hf", "native"])
def test_what_cannot_load_is_found_without_reading_it(tiny_llama, tmp_path, monkeypatch, layout):
    if layout == "hf":
        folder = save(tmp_path / "m", tiny_llama)
        monkeypatch.setattr(np, "memmap", None)
    else:
        folder, facts = epath.Path(tmp_path / "m"), {"config": checkpoint.config_facts(tiny_llama.config)}
        checkpoint.save_model(folder, tiny_llama, facts)
        monkeypatch.setattr(checkpoint.ocp, "StandardCheckpointer", None)
    weights.check(folder, tiny_llama.config)
    with pytest.raises(ValueError, match=r"(mlp.gate_proj.weight is \[24, 16\]|'blocks/down' is .*24, 16\])"):
        weights.check(folder, dataclasses.replace(tiny_llama.config, F=32))
    if layout == "hf":
        (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-1])
    else:
        (folder / "weights").rename(folder / "elsewhere")
    with pytest.raises(ValueError, match=r"is no whole safetensors file|holds no weights: the folder weights/ is miss"):
        weights.check(folder, tiny_llama.config)


def test_rotary_frequencies_of_older_files_are_passed_over(folder, tiny_llama):
    norm = weights.hf_tensors(tiny_llama)["model.norm.weight"]
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": norm}
    rewrite(folder, weights.hf_tensors(tiny_llama) | extra)
    assert_same(load(folder), tiny_llama)


def test_a_tied_model_may_repeat_its_embedding_but_not_contradict_it(make_llama, tmp_path):
    model = make_llama(tied=True)
    folder, tensors = save(tmp_path / "tied", model), weights.hf_tensors(model)
    assert "lm_head.weight" not in tensors
    assert_same(load(folder), model)
    rewrite(folder, tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]})
    assert_same(load(folder), model)
    rewrite(folder, tensors | {"lm_head.weight": weights.hf_tensors(make_llama())["lm_head.weight"]})
    with pytest.raises(BadModelFile, match=r"lm_head.weight differs from model.embed_tokens.weight, and the config"):
        load(folder)


def test_numbers_that_are_no_floats_are_refused(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"F32"', b'"I32"', 1))
    with pytest.raises(BadModelFile, match=r"model.embed_tokens.weight holds I32, not floating-point numbers"):
        load(folder)


@pytest.mark.parametrize("kept", [0, 4, 100, -1], ids=["empty", "length", "header", "last byte"])
def test_a_safetensors_file_that_was_cut_short_is_named(folder, kept):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(BadModelFile, match=r"model.safetensors is no whole safetensors file \(.*\): copy it again"):
        load(folder)


@pytest.mark.parametrize("name", ["model.safetensors", pytest.param("pytorch_model.bin", marks=pytest.mark.parity)])
def test_a_pointer_in_place_of_a_large_file_is_named(folder, name):
    (folder / "model.safetensors").unlink()
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 99\n")
    with pytest.raises(BadModelFile, match=rf"{name} is a Git LFS pointer and not the file itself: fetch it with `git"):
        load(folder)


def test_any_flipped_bit_of_the_header_is_noticed_or_changes_nothing(folder, tiny_llama):
    path, wanted = folder / "model.safetensors", weights.hf_tensors(tiny_llama)
    data, config, noticed = path.read_bytes(), tiny_llama.config, 0
    bits = range(0, 8 * (8 + int.from_bytes(data[:8], "little")), 37)
    for bit in bits:
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            found = weights.checked(sources.hugging_face(folder), "hf", config, "")
        except BadModelFile:
            noticed += 1
            continue
        for name, tensor in wanted.items():
            np.testing.assert_array_equal(found[name].whole(), tensor.whole())
    assert noticed > 0.9 * len(bits)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_map": {"a": "../model.safetensors"}}, "weight_map must give each tensor's file, by its name alone"),
        ({"weight_map": {"a": 1}}, "weight_map must give each tensor's file, by its name alone"),
        ({}, "weight_map must give each tensor's file, by its name alone"),
        ({"weight_map": {"a": "b", "c": "d"}}, "names files that are missing: b, d"),
        ({"weight_map": {"a": "part"}}, "part lacks tensors that model.safetensors.index.json promises: a"),
        ({"weight_map": {"norm": "part", "model.norm.weight": "twin"}}, "twin holds tensors that an earlier file has"),
    ],
)
def test_an_index_that_leads_astray_is_refused(folder, tiny_llama, change, message):
    norm = weights.hf_tensors(tiny_llama)["model.norm.weight"]
    for name in ("part", "twin"):
        sources.write_safetensors(folder / name, {"norm": norm, "model.norm.weight": norm})
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(change))
    with pytest.raises(BadModelFile, match=message):
        load(folder)


def test_a_folder_without_weights_says_what_it_looked_for(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(BadModelFile, match=r"holds no weights: none of model.safetensors, .*bin.index.json is there"):
        load(folder)


@pytest.mark.parity
def test_a_pickle_that_is_not_tensors_alone_is_never_unpickled(folder, tmp_path):
    import torch

    class Trap:
        def __reduce__(self):
            return (tmp_path.joinpath("sprung").write_text, ("x",))

    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    torch.save({"a": Trap()}, path)
    with pytest.raises(BadModelFile, match=r"pytorch_model.bin is no whole file of tensors alone \(.*\); nothing else"):
        load(folder)
    assert not (tmp_path / "sprung").exists()
    for zipped in (True, False):
        torch.save(torch.nn.Linear(2, 2), path, _use_new_zipfile_serialization=zipped)
        with pytest.raises(BadModelFile) as raised:
            load(folder)
        assert "alone (it holds torch.nn.modules.linear.Linear); nothing else is loaded" in str(raised.value)
    for content in ({"a": 1}, [torch.zeros(1)], torch.zeros(1)):
        torch.save(content, path)
        with pytest.raises(BadModelFile, match=r"pytorch_model.bin holds something else than named tensors"):
            load(folder)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(BadModelFile, match=r"pytorch_model.bin is no whole file of tensors alone"):
        load(folder)


@pytest.mark.parity
def test_a_file_of_an_old_pytorch_is_read_as_safely_as_a_new_one(folder, tiny_llama, tmp_path):
    import torch

    class Trap:
        def __reduce__(self):
            return (tmp_path.joinpath("sprung").write_text, ("x",))

    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    tensors = {name: torch.tensor(t.whole()) for name, t in weights.hf_tensors(tiny_llama).items()}
    torch.save(tensors, path, _use_new_zipfile_serialization=False)
    assert path.read_bytes()[:2] != b"PK"
    assert_same(load(folder), tiny_llama)
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(BadModelFile, match=r"pytorch_model.bin is no whole file of tensors alone"):
        load(folder)
    torch.save(tensors | {"a": Trap()}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(BadModelFile, match=r"is no whole file of tensors alone \(.*\); nothing else") as raised:
        load(folder)
    assert not (tmp_path / "sprung").exists() and len(str(raised.value)) < 400


def test_without_pytorch_its_files_name_what_to_install(folder, monkeypatch):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(
        BadModelFile, match=r"can only be read with PyTorch: pip install torch \(or the extra `parity`\)"
    ):
        load(folder)


# --- writing ----------------------------------------------------------------------------------------------------------


def test_shards_are_as_large_as_asked_and_listed(tiny_llama, tmp_path):
    largest = 4 * 40 * 16
    folder = save(tmp_path / "shards", tiny_llama, shard_bytes=largest)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * tiny_llama.config.parameters
    assert index["weight_map"].keys() == weights.hf_tensors(tiny_llama).keys()
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    for name in files:
        assert sum(t.bytes for t in sources.safetensors_file(folder / name).values()) <= largest
    assert_same(load(folder), tiny_llama)


def test_a_tensor_larger_than_a_shard_has_one_of_its_own(tiny_llama, tmp_path):
    folder = save(tmp_path / "shards", tiny_llama, shard_bytes=1)
    assert len(list(folder.glob("*.safetensors"))) == len(weights.hf_tensors(tiny_llama))
    assert_same(load(folder), tiny_llama)
