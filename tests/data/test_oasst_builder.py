"""An export built by TFDS, in array_record and without TensorFlow, gives the trees that the file gives."""

import shutil

import pytest

from srlm_jax.data.oasst import messages, read_export

tfds = pytest.importorskip("tensorflow_datasets", reason="needs the extra `data`")
pytest.importorskip("importlib_resources", reason="needs the extra `data`")
oasst_builder = pytest.importorskip("srlm_jax.data.oasst_builder")


@pytest.fixture(scope="module")
def built(shared_data, tmp_path_factory):
    manual, data = tmp_path_factory.mktemp("manual"), tmp_path_factory.mktemp("data")
    for name, target in (("en_100_tree", "train"), ("oasst1_en-validation", "validation")):
        shutil.copy(shared_data(f"oasst/{name}.jsonl"), manual / f"{target}.jsonl")
    builder = oasst_builder.build("oasst1", manual, data)
    tfds.core.add_data_dir(data)
    return builder


@pytest.mark.parametrize(("split", "name"), [("train", "en_100_tree"), ("validation", "oasst1_en-validation")])
def test_a_built_export_is_read_as_the_file_is(built, shared_data, split, name):
    export = read_export(shared_data(f"oasst/{name}.jsonl"))
    again = read_export(f"tfds:open_assistant/oasst1:{split}")
    assert list(messages(again.trees)) == list(messages(export.trees))
    without_orphans = {reason: count for reason, count in export.counts.items() if reason != "no_parent"}
    assert again.counts == without_orphans
    withdrawn = sum(again.counts.get(name, 0) for name in ("deleted", "rejected", "synthetic", "below_withdrawn"))
    assert len(built.as_data_source(split)) == again.counts["messages"] + withdrawn


@pytest.mark.parametrize(("names", "problem"), [((), "no file"), (("a", "b"), "both a and b would be .* 'train'")])
def test_a_folder_that_is_not_one_export_is_refused(tmp_path, names, problem):
    manual = tmp_path / "manual"
    manual.mkdir()
    for name in (*names, ".hidden"):
        (manual / name).write_text("")
    with pytest.raises(ValueError, match=problem):
        oasst_builder.build("oasst2", manual, tmp_path / "data")
