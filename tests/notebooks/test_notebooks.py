"""The notebooks: what is committed is complete and of no particular machine, and each runs top to bottom in a fresh kernel."""

import os
import re
from pathlib import Path

import nbclient
import nbformat
import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LARGEST = 600_000  # bytes
SECONDS = 600  # of a cell, on a machine that does other things as well
# Before the first cell: a warning of the library, or of what it calls, is an error here as in all tests.
STRICT = "import warnings\nwarnings.simplefilter('error')"
MACHINE = re.compile(r"(?<![\w.:/])/(?:home|root|Users|opt|usr|tmp|var|work|private)/")


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def code(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def draws(source: str) -> bool:
    """Whether a cell shows a figure: it calls `show`, and not inside of a definition."""
    return any(re.match(r"show\(", line) for line in source.splitlines())


def test_all_are_there():
    stems = {path.stem for path in NOTEBOOKS}
    assert stems == {"sinkhorn_convergence", "birkhoff_geometry", "stability_ablation", "engram_hashing", "sparse_attention"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_committed(path):
    """Outputs of every figure, in order; no error, no warning, no path of a machine; small enough to be looked at on the web."""
    notebook = read(path)
    nbformat.validate(notebook)
    assert path.stat().st_size < LARGEST
    cells = code(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "not run top to bottom; run it again"
    figures = 0
    for cell in cells:
        kinds = {output.output_type for output in cell.outputs}
        assert "error" not in kinds
        assert not any(output.get("name") == "stderr" for output in cell.outputs)
        images = [output for output in cell.outputs if "image/png" in output.get("data", {})]
        text = "".join(str(output.get("text", "")) + str(output.get("data", {}).get("text/plain", "")) for output in cell.outputs)
        if draws(cell.source):
            assert images or "does not apply" in text, cell.source
        figures += len(images)
        assert not MACHINE.search(cell.source + text)
    assert figures >= 3
    opening = notebook.cells[0]
    assert opening.cell_type == "markdown" and opening.source.startswith("# ") and "*Time:" in opening.source
    assert not MACHINE.search("".join(cell.source for cell in notebook.cells))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_top_to_bottom(path, tmp_path, monkeypatch):
    """In a fresh kernel and an empty folder, with warnings as errors; it shows as many figures as what is committed."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    notebook = read(path)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(STRICT))
    where = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=SECONDS, startup_timeout=SECONDS, kernel_name="python3", resources=where).execute()

    def figures(of: nbformat.NotebookNode) -> int:
        return sum("image/png" in output.get("data", {}) for cell in code(of) for output in cell.outputs)

    assert figures(notebook) == figures(read(path))
