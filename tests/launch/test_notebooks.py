"""The notebooks for Colab as files. Each study's tests run its own."""

import re

import nbformat
import pytest
from command import ROOT
from notebooks import FOLDER, code_cells, read

STUDIES = ("mnist", "speech", "specialists")
COLAB = "https://colab.research.google.com/github"


def test_every_study_has_a_notebook():
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == set(STUDIES)
    studies = {path.parent.name for path in ROOT.glob("experiments/*/config.py")}
    assert studies - {"common", "custom"} == set(STUDIES)  # custom is to be copied


@pytest.mark.parametrize("study", STUDIES)
def test_they_are_valid_and_kept_without_outputs(study):
    notebook = read(study)
    nbformat.validate(notebook)
    assert all(cell.outputs == [] for cell in code_cells(notebook))
    assert all(cell.execution_count is None for cell in code_cells(notebook))


@pytest.mark.parametrize("study", STUDIES)
def test_badges_open_them_from_the_repository_that_they_install(study):
    notebook = read(study)
    source = "\n".join(cell.source for cell in notebook.cells)
    [repository] = re.findall(r'^REPOSITORY = "https://github\.com/(.+)"$', source, re.MULTILINE)
    link = f"{COLAB}/{repository}/blob/main/launch/colab/{study}.ipynb"
    assert f"]({link})" in notebook.cells[0].source
    assert f"]({link})" in (ROOT / "README.md").read_text()
