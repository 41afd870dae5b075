"""TFDS data sets as rows, and hashes of what is read; files are read in test_oasst.py and test_sources.py."""

import numpy as np
import pytest

from srlm_jax.storage import rows
from srlm_jax.storage.jsonl import BadRecord


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A small data set, "answers", in a folder where TFDS looks: its columns have names of their own."""
    tfds = pytest.importorskip("tensorflow_datasets", reason="needs the extra `data`")
    pytest.importorskip("importlib_resources", reason="needs the extra `data`")
    folder = tmp_path_factory.mktemp("tfds")
    with tfds.core.registered.skip_registration():

        class Answers(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("1.0.0")

            def _info(self):
                features = {
                    "question": tfds.features.Text(),
                    "responses": tfds.features.Sequence(tfds.features.Text()),
                    "ranks": tfds.features.Sequence(np.int32),
                }
                return tfds.core.DatasetInfo(
                    builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
                )

            def _split_generators(self, dl_manager):
                return {"train": self._generate_examples([0, 1]), "test": self._generate_examples([2])}

            def _generate_examples(self, numbers):
                for i in numbers:
                    yield i, {"question": f"wie {i} ü", "responses": ["a", "b"], "ranks": [1, 0]}

    Answers(data_dir=folder, file_format="array_record").download_and_prepare()
    tfds.core.add_data_dir(folder)
    return folder / "answers" / "1.0.0"


def test_a_tfds_data_set_is_read_by_its_name(prepared):
    found = [row for _, row in rows.read("tfds:answers?prompt=question", ("id", "prompt", "responses", "ranks"))]
    row = {"responses": ["a", "b"], "ranks": [1, 0]}
    assert found == [row | {"prompt": "wie 0 ü"}, row | {"prompt": "wie 1 ü"}]
    assert [type(rank) for rank in found[0]["ranks"]] == [int, int]
    source = "tfds:answers:test?prompt=question"
    assert list(rows.read(source, ("prompt",))) == [(f"{source}: row 1", {"prompt": "wie 2 ü"})]
    assert len(list(rows.read("tfds:answers:train[:1]", ("ranks",)))) == 1


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("tfds:", "not of the form tfds:NAME"),
        ("tfds:answers?prompt", "not of the form tfds:NAME"),
        (
            "tfds:no_such_set_anywhere",
            "prepare it first: tensorflow_datasets.builder('no_such_set_anywhere', file_format='array_record')",
        ),
        ("tfds:answers:valid?prompt=question", "It has the splits test, train"),
        ("tfds:answers?prompt=ask", "the data set has no 'ask', only question, ranks, responses"),
        ("tfds:answers?text=question", "'text' is not one of our columns id, prompt"),
    ],
)
def test_a_tfds_data_set_that_cannot_be_read_says_why(prepared, source, problem):
    with pytest.raises(BadRecord) as raised:
        list(rows.read(source, ("id", "prompt")))
    assert str(raised.value).startswith(f"{source}: ") and problem in str(raised.value)


def test_a_changed_data_set_has_another_digest(prepared):
    before = rows.digest("tfds:answers")
    assert rows.digest("tfds:answers:test?prompt=question") == before
    (file, *_) = prepared.glob("*.array_record*")
    data = file.read_bytes()
    try:
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        assert rows.digest("tfds:answers") != before
    finally:
        file.write_bytes(data)


def test_a_digest_is_of_the_content_alone(tmp_path):
    for name, text in (("a", "one"), ("b", "one"), ("c", "two")):
        (tmp_path / name).write_text(text)
    assert rows.digest(tmp_path / "a") == rows.digest(tmp_path / "b") != rows.digest(tmp_path / "c")
