"""The notebooks for Colab, read and run as they are."""

import base64
import json
import re
import shutil
from pathlib import Path

import nbclient
import nbformat
from command import ENVIRONMENT, ROOT
from nbformat import NotebookNode

FOLDER = ROOT / "launch" / "colab"


def read(study: str) -> NotebookNode:
    return nbformat.read(FOLDER / f"{study}.ipynb", as_version=nbformat.NO_CONVERT)


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def run(study: str, finished: Path, folder: Path) -> tuple[list[dict], dict, dict]:
    """Runs a notebook of `smoke` from top to bottom, where a run of all stages is finished.

    Returns the rows of its results, and what each cell printed and drew.
    """
    workdir = folder / "runs" / f"{study}_smoke"
    shutil.copytree(finished, workdir)
    notebook = read(study)
    environment = {"DISTILL_JAX_PRESET": "smoke", "IPYTHONDIR": str(folder / "ipython")}
    environment["PYTHONPATH"] = str(ROOT)  # the checkout, found without cloning one
    client = nbclient.NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": str(folder)}}
    )
    client.execute(env=ENVIRONMENT | environment)

    printed = {cell.id: _text(cell) for cell in code_cells(notebook)}
    pictures = {cell.id: _pictures(cell) for cell in code_cells(notebook)}
    assert printed["install"] == "" and "cpu" in printed["devices"]
    assert "finished before" in printed["run"] and "running" not in printed["run"]
    figures = [path.read_bytes() for path in sorted(workdir.glob("figures/*.png"))]
    assert figures and pictures["figures"] == figures
    assert re.match(r"\d+ bytes give logits \(\d+, \d+\)", printed["export"])
    return json.loads((workdir / "results.json").read_text()), printed, pictures


def _text(cell: NotebookNode) -> str:
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def _pictures(cell: NotebookNode) -> list[bytes]:
    data = [output.data for output in cell.outputs if "data" in output]
    return [base64.b64decode(one["image/png"]) for one in data if "image/png" in one]
