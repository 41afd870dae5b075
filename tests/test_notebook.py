"""The notebook runs top to bottom, from either folder, and is stored without what it printed."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "notebooks" / "quickstart.ipynb"


def execute(folder, environment):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(folder)}})
    client.execute(env=environment)
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def printed(outputs):
    return "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")


def plots(outputs):
    return sum("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.slow
def test_the_notebook_runs_top_to_bottom_from_either_folder(tmp_path, command_environment):
    (tmp_path / "notebooks").mkdir()
    for name in ("configs", "srlm_jax"):
        (tmp_path / name).symlink_to(ROOT / name)
    environment = command_environment | {"IPYTHONDIR": str(tmp_path / "ipython")}
    first = execute(tmp_path / "notebooks", environment)
    assert plots(first) == 3
    assert all(f"\n{model} " in printed(first) for model in ("M0", "SFT", "M1", "M2", "M3"))
    assert re.search(r"votes [0-5-] [0-5-] [0-5-]  exact [0-5N]", printed(first))
    assert "chosen" in printed(first) and "rejected" in printed(first)

    ledger = tmp_path / "runs" / "quickstart" / "ledger"
    times = {path.name: path.stat().st_mtime_ns for path in ledger.iterdir()}
    again = execute(tmp_path, environment)
    from_table = lambda outputs: printed(outputs).partition("oracle score")[2]  # evaluations print lines before it
    assert from_table(again) == from_table(first) != ""
    assert {path.name: path.stat().st_mtime_ns for path in ledger.iterdir()} == times


def test_the_notebook_is_stored_without_outputs():
    for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None


def test_the_notebook_looks_and_never_defines():
    source = "\n".join(cell.source for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code")
    assert not re.search(r"^\s*(def|class)\s|lambda", source, re.MULTILINE)
    assert source.count("\n") < 100
