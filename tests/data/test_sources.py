"""The user's own data: what is read, what is refused and where, and that nothing of the evaluation is trained on."""

import json

import numpy as np
import pytest

from srlm_jax.data.sources import read_examples, read_prompts, read_ranked, usable_prompts, without_overlap
from srlm_jax.records import Example, Prompt, RankedPrompt
from srlm_jax.storage import rows
from srlm_jax.storage.jsonl import BadRecord

RANKED = {"prompt": "q", "responses": ["good", "bad"], "ranks": [0, 1]}


def write(tmp_path, *documents):
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(document) + "\n" for document in documents))
    return path


def example(prompt):
    return Example(id=f"id {prompt}", prompt=prompt, response="r")


def ranked(prompt):
    return RankedPrompt(id=f"id {prompt}", prompt=prompt, responses=("a", "b"), ranks=(1, 0))


def test_rows_become_records(tmp_path):
    path = write(
        tmp_path, {"prompt": "q", "response": "r", "source": "us"}, {"id": "mine", "prompt": "p", "response": "s"}
    )
    assert read_examples(path, "ift") == [
        Example(id="ift-000001", prompt="q", response="r"),
        Example(id="mine", prompt="p", response="s"),
    ]
    path = write(tmp_path, {"prompt": "q", "responses": ["a", "b", "c"], "ranks": [2, 0, 2], "id": None})
    assert read_ranked(path, "eft") == [
        RankedPrompt(id="eft-000001", prompt="q", responses=("a", "b", "c"), ranks=(2, 0, 2))
    ]
    path = write(tmp_path, {"prompt": "q"})
    assert read_prompts(path, "prompt") == [Prompt(id="prompt-000001", text="q", origin="user")]


@pytest.mark.parametrize(
    ("read", "row", "problem"),
    [
        (read_examples, {"prompt": "q", "answer": "r"}, "no 'response'; a row of this kind has prompt, response and"),
        (read_examples, {"prompt": "q", "response": 3}, "field 'response': expected str, found 3"),
        (read_examples, {"prompt": " ", "response": "r"}, "'prompt' is blank"),
        (read_examples, {"prompt": "q", "response": "\n"}, "'response' is blank"),
        (read_examples, {"prompt": "q", "response": "r", "id": 7}, "field 'id': expected str, found 7"),
        (read_examples, {"prompt": "q", "response": "r", "id": "first"}, r"id 'first' is already that of .*x\.jsonl:1"),
        (read_examples, ["q", "r"], "expected an object"),
        (read_prompts, {"text": "q"}, "no 'prompt'"),
        (read_prompts, {"prompt": None}, "field 'prompt': expected str, found None"),
        (read_prompts, {"prompt": ""}, "'prompt' is blank"),
        (read_ranked, RANKED | {"responses": "good"}, "field 'responses': expected a list"),
        (read_ranked, RANKED | {"responses": ["a", " "]}, r"'responses\[1\]' is blank"),
        (read_ranked, RANKED | {"ranks": [0, 1.5]}, r"field 'ranks\[1\]': expected int, found 1.5"),
        (read_ranked, RANKED | {"ranks": [0, True]}, r"field 'ranks\[1\]': expected int, found True"),
        (read_ranked, RANKED | {"ranks": [0]}, "2 responses and 1 ranks"),
        (read_ranked, RANKED | {"ranks": [1, 2]}, r"ranks \[1, 2\] begin at 1: the best has 0"),
        (read_ranked, RANKED | {"ranks": [-1, 0]}, r"ranks \[-1, 0\] begin at -1"),
        (read_ranked, RANKED | {"ranks": [0, 0]}, r"ranks \[0, 0\] order nothing"),
        (read_ranked, RANKED | {"responses": ["a"], "ranks": [0]}, r"ranks \[0\] order nothing"),
    ],
)
def test_a_wrong_row_is_named(tmp_path, read, row, problem):
    good = {"id": "first", "response": "r"} | RANKED
    with pytest.raises(BadRecord, match=rf"x\.jsonl:2: {problem}"):
        read(write(tmp_path, good, row), "name")


def test_nothing_of_the_evaluation_is_trained_on():
    split = without_overlap(
        [example("one"), example("Shared  Question"), example("two"), example("Two"), example("three")],
        [ranked("shared question"), ranked("three"), ranked("four")],
        [ranked("shared question "), ranked("five")],
    )
    assert [record.prompt for record in split.ift] == ["one", "two", "Two", "three"]
    assert [record.prompt for record in split.eft_train] == ["three", "four"]
    assert [record.prompt for record in split.eft_eval] == ["shared question ", "five"]
    assert split.counts == {
        "ift": 4,
        "ift_in_eft_eval": 1,
        "ift_same_prompt": 1,
        "ift_in_eft_train": 1,
        "eft_train": 2,
        "eft_train_in_eft_eval": 1,
        "eft_train_same_prompt": 0,
        "eft_eval": 2,
        "eft_eval_same_prompt": 0,
    }


def test_sets_that_are_all_evaluation_are_refused():
    with pytest.raises(ValueError, match="all 1 prompts of eft_train are in eft_eval"):
        without_overlap([example("one")], [ranked("two")], [ranked("Two")])


def test_fixed_prompts_are_taken_once_and_none_from_the_evaluation():
    prompts = [Prompt(id=str(i), text=text, origin="user") for i, text in enumerate(["a", "B", "b ", "c", "A"])]
    kept, counts = usable_prompts(prompts, [ranked("C")])
    assert [prompt.text for prompt in kept] == ["a", "B"]
    assert counts == {"in_eft_eval": 1, "same_prompt": 2}


# --- TensorFlow Datasets ----------------------------------------------------------------------------------------------


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
                return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

            def _split_generators(self, dl_manager):
                return {"train": self._generate_examples([0, 1]), "test": self._generate_examples([2])}

            def _generate_examples(self, numbers):
                for i in numbers:
                    yield i, {"question": f"wie {i} ü", "responses": ["a", "b"], "ranks": [1, 0]}

    Answers(data_dir=folder, file_format="array_record").download_and_prepare()
    tfds.core.add_data_dir(folder)
    return folder / "answers" / "1.0.0"


def test_a_tfds_data_set_is_read_by_its_name(prepared):
    found = read_ranked("tfds:answers?prompt=question", "eft")
    assert {record.prompt for record in found} == {"wie 0 ü", "wie 1 ü"}
    assert all((record.responses, record.ranks) == (("a", "b"), (1, 0)) for record in found)
    (last,) = read_prompts("tfds:answers:test?prompt=question", "prompt")
    assert last == Prompt(id="prompt-000001", text="wie 2 ü", origin="user")
    (first,) = read_prompts("tfds:answers:train[:1]?prompt=question", "prompt")
    assert first.text in ("wie 0 ü", "wie 1 ü")


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("tfds:", "not of the form tfds:NAME"),
        ("tfds:answers?prompt", "not of the form tfds:NAME"),
        ("tfds:no_such_set_anywhere", "prepare it first: tfds build no_such_set_anywhere --file_format=array_record"),
        ("tfds:answers:valid?prompt=question", "It has the splits test, train"),
        ("tfds:answers?prompt=ask", "the data set has no 'ask', only question, ranks, responses"),
        ("tfds:answers?text=question", "'text' is not one of our columns id, prompt"),
        ("tfds:answers", "row 1: no 'prompt'"),
    ],
)
def test_a_tfds_data_set_that_cannot_be_read_says_why(prepared, source, problem):
    with pytest.raises(BadRecord) as raised:
        read_prompts(source, "prompt")
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
