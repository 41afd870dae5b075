"""The command: any layout in, ours or Hugging Face's out, whole or not at all."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from xla_flags import xla_flags

from srlm_jax.convert import convert
from srlm_jax.data import world
from srlm_jax.data.world_corpus import WorldRules, draw_corpus
from srlm_jax.errors import BadInput
from srlm_jax.model import config_files, folders, llama, sources, weights
from srlm_jax.storage import checkpoint
from srlm_jax.text.tokenizer import WordTokenizer

ROOT = Path(__file__).parents[1]
WORLD = WorldRules(
    documents=400, trees=4, replies=(2, 3), held_out=2, corpus_flaw=0.3, corpus_wrong_verdict=0.1, reply_flaw=0.3,
    rank_noise=0.1,
)  # fmt: skip


@pytest.fixture
def source(tmp_path, tiny_llama):
    """The tiny Llama in Hugging Face's layout, with a tokenizer's files."""
    folder = tmp_path / "source"
    folder.mkdir()
    weights.save_hf(epath.Path(folder), tiny_llama, shard_bytes=10**9)
    extra = {"max_position_embeddings": 77, "bos_token_id": 3, "eos_token_id": [4, 5]}
    (folder / "config.json").write_text(json.dumps(config_files.to_hf(tiny_llama.config, extra)))
    for name in folders.COMPANIONS:
        (folder / name).write_text(f"{{}} {name}")
    (folder / "words.json").write_text(json.dumps([f"word{i}" for i in range(36)]))
    (folder / "secret.txt").write_text("not of the model")
    return folder


def run(source, target, to, dtype=None, shard_bytes=10**9):
    convert(source, target, to=to, dtype=dtype, shard_bytes=shard_bytes)
    return target


def tensors(folder):
    return {name: (t.dtype, t.whole()) for name, t in sources.hugging_face(epath.Path(folder)).items()}


def assert_same_tensors(one, other):
    one, other = tensors(one), tensors(other)
    assert one.keys() == other.keys()
    for name in one:
        assert one[name][0] == other[name][0]
        np.testing.assert_array_equal(one[name][1], other[name][1])


def test_there_and_back_every_tensor_is_the_same(source, tmp_path, capsys):
    native = run(source, tmp_path / "native", "native")
    back = run(native, tmp_path / "new" / "back", "hf", shard_bytes=4_000)
    assert_same_tensors(source, back)
    assert len(list(back.glob("model-*.safetensors"))) > 2
    assert json.loads((back / "config.json").read_text()) == json.loads((source / "config.json").read_text())
    for folder in (native, back):
        assert all((folder / name).read_text() == (source / name).read_text() for name in folders.COMPANIONS)
        assert not (folder / "secret.txt").exists()
    assert capsys.readouterr().out.endswith(f"{back}: 6,736 parameters in float32\n")
    assert not list(tmp_path.rglob("*.partial"))


def test_a_native_folder_is_a_checkpoint_of_the_rest_of_the_package(source, tmp_path, tiny_llama):
    native = run(source, tmp_path / "native", "native")
    config = weights.read_config(native, param_dtype="float32", compute_dtype="float32", remat="dots")
    assert config == tiny_llama.config
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), llama.abstract(config))
    loaded = checkpoint.load_model(native, like)
    assert checkpoint.model_hash(loaded) == checkpoint.model_hash(tiny_llama)


def test_a_checkpoint_of_a_run_becomes_a_folder_that_others_read(tiny_llama, tmp_path):
    facts = {"config": checkpoint.config_facts(tiny_llama.config)}  # as a stage that trains writes it
    checkpoint.save_model(tmp_path / "m1", tiny_llama, facts)
    out = run(tmp_path / "m1", tmp_path / "out", "hf")
    assert tensors(out).keys() == weights.hf_tensors(tiny_llama).keys()
    assert json.loads((out / "generation_config.json").read_text()) == {"_from_model_config": True}


@pytest.mark.parity
def test_a_checkpoint_of_a_run_speaks_its_words_in_transformers(make_llama, tmp_path):
    import torch
    import transformers

    model, words = make_llama(V=320), WordTokenizer(world.vocabulary())
    checkpoint.save_model(tmp_path / "m1", model, {"config": checkpoint.config_facts(model.config)})
    words.save(epath.Path(tmp_path / "m1"))
    out = run(tmp_path / "m1", tmp_path / "out", "hf")
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    assert [theirs.pad_token_id, theirs.bos_token_id, theirs.eos_token_id, theirs.unk_token_id] == [0, 1, 2, 3]
    texts = [*itertools.islice(draw_corpus(WORLD, 0), 300), world.RUBRIC.template, "no such word"]
    for text in texts:
        assert theirs.encode(text) == [words.bos, *words.encode(text)]
    assert theirs.decode(words.encode(texts[0])) == texts[0]
    again = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    assert (again.config.bos_token_id, again.generation_config.eos_token_id) == (1, 2)
    ids = theirs(texts[0], return_tensors="pt").input_ids
    positions = jnp.arange(ids.shape[1])[None]
    hidden, _ = model(jnp.asarray(ids.numpy()), positions, segments_BT=None, cache=None, dropout=None)
    with torch.no_grad():
        logits = again(ids).logits.numpy()
    np.testing.assert_allclose(logits, hidden @ model.head(), rtol=1e-4, atol=1e-4 * np.abs(logits).max())


def test_the_type_is_kept_unless_another_is_asked_for(source, tmp_path):
    half = run(source, tmp_path / "half", "hf", dtype="bfloat16")
    assert {dtype for dtype, _ in tensors(half).values()} == {"bfloat16"}
    assert json.loads((half / "config.json").read_text())["torch_dtype"] == "bfloat16"
    native = run(half, tmp_path / "native", "native")
    assert {w["dtype"] for w in json.loads((native / "manifest.json").read_text())["weights"].values()} == {"bfloat16"}
    assert_same_tensors(run(native, tmp_path / "back", "hf"), half)


@pytest.mark.parametrize("to", ["hf", "native"])
def test_of_several_types_that_of_most_parameters_is_kept_and_the_others_are_counted(source, tmp_path, capsys, to):
    mixed = {}
    for name, tensor in sources.hugging_face(epath.Path(source)).items():
        dtype = "float32" if "norm" in name else "bfloat16"
        mixed[name] = sources.Tensor(tensor.shape, dtype, lambda i, t=tensor, d=dtype: t.read(i).astype(jnp.dtype(d)))
    sources.write_safetensors(source / "mixed", mixed)
    (source / "mixed").rename(source / "model.safetensors")
    run(source, tmp_path / "made", to)
    assert capsys.readouterr().out == f"{tmp_path / 'made'}: 6,736 parameters in bfloat16; 5 tensors were float32\n"
    run(source, tmp_path / "wide", "hf", dtype="float32")
    assert {dtype for dtype, _ in tensors(tmp_path / "wide").values()} == {"float32"}
    assert_same_tensors(run(tmp_path / "made", tmp_path / "back", "hf"), run(source, tmp_path / "half", "hf"))


@pytest.mark.parity
def test_the_chat_template_comes_along_in_whichever_file_it_is(stories260k, tmp_path):
    import transformers

    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    source = tmp_path / "source"
    transformers.AutoModelForCausalLM.from_pretrained(stories260k / "hf").save_pretrained(source)
    words = WordTokenizer(world.vocabulary())
    words.save(epath.Path(source))
    words.save_hf(epath.Path(source))
    (source / "tokenizer_config.json").write_text(
        json.dumps(json.loads((source / "tokenizer_config.json").read_text()) | {"model_max_length": 99})
    )
    (source / "chat_template.jinja").write_text(template)
    back = run(run(source, tmp_path / "native", "native"), tmp_path / "back", "hf")
    theirs = transformers.AutoTokenizer.from_pretrained(back)
    assert (theirs.chat_template, theirs.model_max_length) == (template, 99)
    said = theirs.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
    assert said == "<user>hello"


@pytest.mark.parity
def test_a_real_model_from_either_layout_is_the_same_to_transformers(stories260k, tmp_path):
    import torch
    import transformers

    from_hf = run(run(stories260k / "hf", tmp_path / "native", "native"), tmp_path / "one", "hf")
    from_meta = run(stories260k / "meta", tmp_path / "two", "hf")
    assert_same_tensors(from_hf, stories260k / "hf")
    assert_same_tensors(from_meta, stories260k / "hf")
    assert (from_meta / "tokenizer.model").read_bytes() == (stories260k / "meta" / "tokenizer.model").read_bytes()
    wanted, *found = (
        transformers.LlamaForCausalLM.from_pretrained(folder).eval()(torch.arange(1, 60)[None]).logits.detach().numpy()
        for folder in (stories260k / "hf", from_hf, from_meta)
    )
    for logits in found:
        np.testing.assert_allclose(logits, wanted, rtol=1e-5, atol=1e-5)


# --- whole or not at all ----------------------------------------------------------------------------------------------


def test_a_target_that_holds_something_is_left_alone(source, tmp_path):
    (tmp_path / "target").mkdir()
    run(source, tmp_path / "target", "hf")  # an empty folder is as good as none
    before = (tmp_path / "target" / "config.json").read_text()
    for target in (tmp_path / "target", source, source / "config.json"):
        with pytest.raises(FileExistsError, match="is there already: choose another --target, or remove it"):
            run(source, target, "native")
    assert (tmp_path / "target" / "config.json").read_text() == before


def test_an_address_is_no_place_to_convert_from_or_to(source, tmp_path):
    for places in (("https://host/model", tmp_path / "target"), (source, "https://host/model")):
        with pytest.raises(BadInput, match=r"^https://host/model is an address and no path"):
            convert(*places, to="hf", dtype=None, shard_bytes=10**9)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("to", ["hf", "native"])
def test_a_conversion_that_fails_leaves_nothing(source, tmp_path, monkeypatch, to):
    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(weights.jsonl, "write_json", fail)
    monkeypatch.setattr(checkpoint.jsonl, "write_json", fail)
    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "target", to)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


# --- the command line -------------------------------------------------------------------------------------------------


def command(*arguments):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": xla_flags()}
    line = [sys.executable, "-m", "srlm_jax.convert", *map(str, arguments)]
    return subprocess.run(line, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_command_converts(source, tmp_path):
    done = command(f"--source={source}", f"--target={tmp_path / 'out'}", "--to=hf", "--dtype=float16")
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'out'}: 6,736 parameters in float16\n")
    assert {dtype for dtype, _ in tensors(tmp_path / "out").values()} == {"float16"}


def test_an_error_is_one_line(source, tmp_path):
    (source / "config.json").write_text((source / "config.json").read_text().replace("silu", "relu"))
    done = command(f"--source={source}", f"--target={tmp_path / 'out'}", "--to=native")
    assert done.returncode == 1
    assert done.stderr == (
        f"error: {source / 'config.json'}: hidden_act is 'relu', which is another model than the Llama built here; "
        'it can only be "silu" or "swish"\n'
    )
    assert not (tmp_path / "out").exists()
