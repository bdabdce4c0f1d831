"""docs/notebook.ipynb is docs/notebook.py, executed; and that runs, to the same numbers."""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
from documents import ROOT, problems

SOURCE, EXECUTED = ROOT / "docs" / "notebook.py", ROOT / "docs" / "notebook.ipynb"


def text_cells() -> list[tuple[str, str]]:
    """The kind and the source of each cell of the text file."""
    cells = []
    for part in SOURCE.read_text().split("\n# %%")[1:]:
        kind, _, source = part.partition("\n")
        if kind:
            source = re.sub("^# ?", "", source, flags=re.M)
        cells.append(("markdown" if kind else "code", source.strip()))
    return cells


def printed(cell: dict) -> str:
    return "".join("".join(output["text"]) for output in cell["outputs"] if output["output_type"] == "stream")


def test_the_notebook_is_the_text_file_executed() -> None:
    assert EXECUTED.stat().st_size < 500_000
    cells = json.loads(EXECUTED.read_text())["cells"]
    assert [(cell["cell_type"], "".join(cell["source"]).strip()) for cell in cells] == text_cells()
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == [*range(1, len(code) + 1)]
    for cell in code:
        # A figure for every plt.show(), a line for every print; no errors, warnings or leftovers of expressions.
        kinds = [output["output_type"] for output in cell["outputs"]]
        assert kinds.count("display_data") == "".join(cell["source"]).count("plt.show()")
        assert ("stream" in kinds) == ("print(" in "".join(cell["source"]))
        assert {*kinds} <= {"display_data", "stream"} and all(o.get("name") != "stderr" for o in cell["outputs"])
    assert problems("\n\n".join(source for kind, source in text_cells() if kind == "markdown"), SOURCE.parent) == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:FigureCanvasAgg is non-interactive:UserWarning")
def test_it_runs_to_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT / "docs")
    monkeypatch.setattr(sys, "path", [*sys.path])
    matplotlib.use("agg")
    cells = [cell for cell in json.loads(EXECUTED.read_text())["cells"] if cell["cell_type"] == "code"]
    variables: dict[str, object] = {}
    for cell in cells:
        with contextlib.redirect_stdout(io.StringIO()) as output:
            exec("".join(cell["source"]), variables)
        now, then = (
            np.array(re.findall(r"\d+(?:\.\d+)?", re.sub(r"[\d.]+ s\b", "", text)), float)  # but for seconds
            for text in (output.getvalue(), printed(cell))
        )
        np.testing.assert_allclose(now, then, rtol=0.05)
    plt.close("all")
