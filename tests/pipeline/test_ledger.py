"""The ledger: what is done stays done, what was begun goes on, what was made otherwise is refused."""

import contextlib

import pytest
from etils import epath

from srlm_jax.errors import BadInput
from srlm_jax.pipeline.ledger import Ledger, Outcome, StaleStage
from srlm_jax.storage import jsonl


class Chain:
    """Four stages, a -> b -> c and a -> d, each of which writes one file; `worked` lists those that did."""

    def __init__(self, workdir, code="1"):
        self.workdir = epath.Path(workdir)
        self.ledger = Ledger(self.workdir, code)
        self.worked = []
        self.changes = {}  # by stage: what its config has instead
        self.broken = None  # the stage whose work fails
        self.models = {}

    def run(self):
        for stage, inputs in (("a", ()), ("m2/b", ("a",)), ("m2/c", ("m2/b",)), ("d", ("a",))):
            self.ledger.run(
                stage,
                lambda stage=stage: self.work(stage),
                config={"config.seed": 0, f"config.{stage[-1]}.size": (1, 2)} | self.changes.get(stage, {}),
                inputs=inputs,
                outputs=(f"{stage}.txt", f"{stage}.folder"),
            )

    def work(self, stage):
        self.worked.append(stage)
        (self.workdir / stage).parent.mkdir(parents=True, exist_ok=True)
        (self.workdir / f"{stage}.txt").write_text(stage)
        (self.workdir / f"{stage}.folder").mkdir(exist_ok=True)
        (self.workdir / f"{stage}.folder" / "part").write_text(stage)
        if stage == self.broken:
            raise RuntimeError("killed")
        return Outcome({"made": 1}, self.models.get(stage))


@pytest.fixture
def done(tmp_path):
    Chain(tmp_path).run()
    return tmp_path


def test_a_done_stage_is_not_done_again(done):
    again = Chain(done)
    again.run()
    assert again.worked == []
    entry = again.ledger.entry("m2/b")
    assert (entry["status"], entry["counts"], entry["code"]) == ("done", {"made": 1}, "1")
    assert entry["config"] == {"config.seed": 0, "config.b.size": [1, 2]}


def test_a_stage_that_was_begun_goes_on(tmp_path):
    first = Chain(tmp_path)
    first.broken = "m2/b"
    with pytest.raises(RuntimeError, match="killed"):
        first.run()
    assert first.ledger.entry("m2/b")["status"] == "started"
    assert (tmp_path / "m2" / "b.txt").exists()
    again = Chain(tmp_path)
    again.run()
    assert again.worked == ["m2/b", "m2/c", "d"]


@pytest.mark.parametrize("broken", [None, "m2/b"])
def test_a_changed_field_stops_with_field_stage_and_flag(tmp_path, broken):
    first = Chain(tmp_path)
    first.broken = broken
    with contextlib.suppress(RuntimeError):
        first.run()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    again = Chain(tmp_path)
    again.changes["m2/b"] = {"config.b.size": [1, 3]}
    with pytest.raises(StaleStage) as raised:
        again.run()
    message = str(raised.value)
    assert "config.b.size was [1, 2], is [1, 3]" in message
    assert "stage m2/b" in message and "--redo=m2/b" in message
    assert "config.seed" not in message
    assert again.worked == []
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_stage_that_failed_before_it_made_anything_may_be_begun_otherwise(tmp_path):
    """A user's broken file was refused, and then the corrected one was: it had changed, said the ledger."""
    ledger = Ledger(epath.Path(tmp_path), "1")

    def fail():
        raise RuntimeError("broken file")

    with pytest.raises(RuntimeError):
        ledger.run("a", fail, config={"config.file": "broken"}, inputs=(), outputs=("a",))
    ledger.run("a", lambda: Outcome({}, None), config={"config.file": "whole"}, inputs=(), outputs=("a",))
    assert ledger.entry("a")["config"] == {"config.file": "whole"}


def test_a_field_that_came_and_one_that_went_are_named(done):
    again = Chain(done)
    again.changes["a"] = {"config.new": "x"}
    with pytest.raises(StaleStage, match=r'config\.new was null, is "x"'):
        again.run()


def test_another_version_of_the_code_is_refused(done):
    with pytest.raises(StaleStage, match="the version of srlm_jax was 1, is 2"):
        Chain(done, code="2").run()


def test_an_input_made_anew_is_refused(done):
    # Other weights from the same configuration: what depends on them may not stay.
    (done / "ledger" / "a.json").unlink()
    again = Chain(done)
    again.models["a"] = "other weights"
    with pytest.raises(StaleStage, match=r"stage m2/b .* its input a was made anew.* --redo=m2/b"):
        again.run()


def test_an_input_made_anew_the_same_is_the_same(done):
    (done / "ledger" / "a.json").unlink()
    again = Chain(done)
    again.run()
    assert again.worked == ["a"]


def test_redo_removes_a_stage_and_what_depends_on_it_and_nothing_else(done):
    ledger = Ledger(epath.Path(done), "1")
    assert ledger.redo("m2/b") == ["m2/b", "m2/c"]
    left = sorted(str(path.relative_to(done)) for path in done.rglob("*") if path.is_file())
    assert left == ["a.folder/part", "a.txt", "d.folder/part", "d.txt", "ledger/a.json", "ledger/d.json"]
    again = Chain(done)
    again.changes["m2/b"] = {"config.b.size": [1, 3]}
    again.run()
    assert again.worked == ["m2/b", "m2/c"]


def test_redo_takes_several_stages(done):
    ledger = Ledger(epath.Path(done), "1")
    assert ledger.redo("d,m2/c") == ["d", "m2/c"]
    with pytest.raises(BadInput, match=r"^--redo=d: .* it has a, m2/b$"):
        ledger.redo("m2/b,d")
    assert ledger.entry("m2/b") is not None


def test_stages_are_known_by_the_fields_they_depend_on(done):
    ledger = Ledger(epath.Path(done), "1")
    assert ledger.made_by("config.b") == ledger.made_by("config.b.size") == ["m2/b"]
    assert ledger.made_by("config") == ["a", "d", "m2/b", "m2/c"] and ledger.made_by("config.b.si") == []


def test_redo_of_the_first_stage_removes_all(done):
    Ledger(epath.Path(done), "1").redo("a")
    assert not [path for path in done.rglob("*") if path.is_file()]


def test_redo_of_an_unknown_stage_lists_those_there_are(done):
    with pytest.raises(ValueError, match=r"--redo=m9/b: .* it has a, d, m2/b, m2/c$"):
        Ledger(epath.Path(done), "1").redo("m9/b")
    with pytest.raises(ValueError, match="it has none"):
        Ledger(epath.Path(done) / "elsewhere", "1").redo("a")


def test_a_killed_redo_leaves_no_half_of_a_stage(done, monkeypatch):
    """Once a kill in the middle left stages that counted as done and had lost their files."""
    unlink = type(epath.Path(done)).unlink
    gone = []

    def killed(path, *args, **kwargs):
        if len(gone) == 3:
            raise KeyboardInterrupt
        gone.append(path)
        unlink(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(type(epath.Path(done)), "unlink", killed)
        with pytest.raises(KeyboardInterrupt):
            Ledger(epath.Path(done), "1").redo("a")
    # Some output is left, and would be taken for the work of the stage.
    (done / "m2" / "b.folder").mkdir(exist_ok=True)
    (done / "m2" / "b.folder" / "stale").write_text("")
    again = Chain(done)
    again.run()
    assert sorted(again.worked) == ["a", "d", "m2/b", "m2/c"]
    assert not (done / "m2" / "b.folder" / "stale").exists()
    assert {jsonl.read_json(path)["status"] for path in (done / "ledger").iterdir()} == {"done"}


def test_the_same_redo_goes_on_after_a_kill(done, monkeypatch):
    ledger = Ledger(epath.Path(done), "1")
    removed = []

    def killed_at_the_last(entry):
        if len(removed) == 3:
            raise KeyboardInterrupt
        removed.append(entry["stage"])
        Ledger._remove(ledger, entry)

    with monkeypatch.context() as patch:
        patch.setattr(ledger, "_remove", killed_at_the_last)
        with pytest.raises(KeyboardInterrupt):
            ledger.redo("a")
    assert removed == ["d", "m2/b", "m2/c"]
    assert ledger.redo("a") == ["a"]
