"""TFDS data sets and folders as rows, mappings of columns, and hashes of what is read."""

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
    assert list(rows.read(source, ("prompt",))) == [("tfds:answers:test: row 1", {"prompt": "wie 2 ü"})]
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
        ("tfds:answers?prompt=ask", "there is no column 'ask', only question, ranks, responses"),
        ("tfds:answers?text=question", "'text' is not one of our columns id, prompt"),
    ],
)
def test_a_tfds_data_set_that_cannot_be_read_says_why(prepared, source, problem):
    with pytest.raises(BadRecord) as raised:
        list(rows.read(source, ("id", "prompt")))
    place = source if "=" not in source or "column" in problem else source.partition("?")[0]
    assert str(raised.value).startswith(f"{place}: ") and problem in str(raised.value)


def test_a_changed_data_set_has_another_digest(prepared):
    before = rows.digest("tfds:answers")
    assert rows.digest("tfds:answers:test") == before != rows.digest("tfds:answers?prompt=question")
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


# --- mappings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("x.jsonl", '{"My question": "q", "prompt": "theirs", "a-1": "r"}\n'),
        ("x.json", '[{"My question": "q", "prompt": "theirs", "a-1": "r"}]'),
        ("x.csv", "My question,prompt,a-1\nq,theirs,r\n"),
    ],
)
def test_columns_of_a_file_are_mapped(tmp_path, name, data):
    path = tmp_path / name
    path.write_text(data)
    source = f"{path}?prompt=My question&response=a-1"
    assert list(rows.read(source, ("id", "prompt", "response"))) == [
        (next(where for where, _ in rows.read(path, ())), {"prompt": "q", "response": "r"})
    ]
    assert rows.mapping(source) == {"prompt": "My question", "response": "a-1"} and rows.mapping(path) == {}
    assert rows.columns_of(source) == ["My question", "prompt", "a-1"]
    assert rows.digest(source) != rows.digest(path) != rows.digest(f"{path}?prompt=prompt")


def test_columns_of_parquet_are_mapped(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="needs the extra `data`")
    path = tmp_path / "x.parquet"
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.table({"question": ["q"], "other": [1]}), path)
    assert list(rows.read(f"{path}?prompt=question", ("prompt",))) == [(f"{path}: row 1", {"prompt": "q"})]


@pytest.mark.parametrize(
    ("end", "problem"),
    [
        ("?prompt=ask", "there is no column 'ask', only question"),
        ("?text=question", "'text' is not one of our columns id, prompt"),
        ("?prompt=question&prompt=question", "a column of ours is mapped twice"),
        ("?prompt", "not of the form FILE?OURS=THEIRS&..., as FILE?prompt=question"),
        ("?prompt=", "not of the form FILE?OURS=THEIRS"),
    ],
)
def test_a_mapping_that_does_not_fit_says_why(tmp_path, end, problem):
    path = tmp_path / "x.jsonl"
    path.write_text('{"question": "q"}\n')
    with pytest.raises(BadRecord) as raised:
        list(rows.read(f"{path}{end}", ("id", "prompt")))
    assert str(raised.value).startswith(f"{path}{end}: ") and problem in str(raised.value)


# --- folders ----------------------------------------------------------------------------------------------------------


def shards(folder, *names):
    folder.mkdir()
    for number, name in enumerate(names):
        (folder / name).write_text(f'{{"prompt": "{number}"}}\n')
    return folder


def test_shards_are_read_in_the_order_of_their_names(tmp_path):
    folder = shards(tmp_path / "x", "b-00001-of-00002.jsonl", "b-00000-of-00002.jsonl", "README.md", ".hidden.jsonl")
    assert [row["prompt"] for _, row in rows.read(folder, ("prompt",))] == ["1", "0"]
    before = rows.digest(folder)
    (folder / "README.md").write_text("changed")
    assert rows.digest(folder) == before
    (folder / "b-00000-of-00002.jsonl").write_text("changed")
    assert rows.digest(folder) != before


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        ((), "a folder without *.jsonl, *.parquet or *.arrow"),
        (("README.md",), "a folder without *.jsonl, *.parquet or *.arrow"),
        (("train-0.jsonl", "train-1.jsonl", "test-0.jsonl"), "holds different files (test-N.jsonl, train-N.jsonl)"),
        (("x0.jsonl", "x1.parquet"), "holds different files (xN.jsonl, xN.parquet)"),
        (("t-00000-of-00003.jsonl", "t-00002-of-00003.jsonl"), "2 of 3 shards are there; fetch the others"),
    ],
)
def test_a_folder_that_is_not_the_shards_of_one_file_is_refused(tmp_path, names, problem):
    folder = shards(tmp_path / "x", *names)
    for use in (lambda: list(rows.read(folder, ("prompt",))), lambda: rows.digest(folder)):
        with pytest.raises(BadRecord) as raised:
            use()
        assert str(raised.value).startswith(f"{folder}: ") and problem in str(raised.value)
