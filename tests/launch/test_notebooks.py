"""The notebooks for Colab: kept without outputs, and run from top to bottom as they are."""

import base64
import json
import re

import nbclient
import nbformat
import pytest
from command import ENVIRONMENT, ROOT
from nbformat import NotebookNode

STUDIES = ("mnist", "speech", "specialists")
FOLDER = ROOT / "launch" / "colab"
COLAB = "https://colab.research.google.com/github"


def read(study: str) -> NotebookNode:
    return nbformat.read(FOLDER / f"{study}.ipynb", as_version=nbformat.NO_CONVERT)


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


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


@pytest.mark.parametrize("study", STUDIES)
def test_they_run_from_top_to_bottom(study, tmp_path):
    notebook = read(study)
    environment = {"DISTILL_JAX_PRESET": "smoke", "IPYTHONDIR": str(tmp_path / "ipython")}
    environment["PYTHONPATH"] = str(ROOT)  # the checkout, found without cloning one
    client = nbclient.NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute(env=ENVIRONMENT | environment)

    workdir = tmp_path / "runs" / f"{study}_smoke"
    printed = {cell.id: text_of(cell) for cell in code_cells(notebook)}
    pictures = {cell.id: pictures_of(cell) for cell in code_cells(notebook)}
    assert printed["install"] == "" and "cpu" in printed["devices"]
    figures = [path.read_bytes() for path in sorted(workdir.glob("figures/*.png"))]
    assert figures and pictures["figures"] == figures
    assert re.match(r"\d+ bytes give logits \(\d+, \d+\)", printed["export"])
    END[study](json.loads((workdir / "results.json").read_text()), printed, pictures)


def check_digits(rows: list[dict], printed: dict[str, str], pictures: dict[str, list]):
    [row] = [row for row in rows if row["table"] == "mnist" and row["row"].startswith("distilled")]
    assert printed["student"] == f"{row['value']:.0f} errors of 2000 test examples\n"
    assert len(pictures["digits"]) == 1


def check_speech(rows: list[dict], printed: dict[str, str], pictures: dict[str, list]):
    [accuracy] = [
        row["value"]
        for row in rows
        if row["table"] == "speech"
        and row["row"].startswith("distilled")
        and row["metric"] == "frame_accuracy"
    ]
    assert printed["student"] == f"2 students, frame accuracy {accuracy:.2f} %\n"
    assert re.search(r"^aligned: .+\nfound: +.+\n\d+\.\d %", printed["utterance"], re.MULTILINE)
    [said] = re.findall(r"^said: +(.+)$", printed["utterance"], re.MULTILINE)
    assert printed["words"].startswith(f"said:  {said}\nheard: ")


def check_characters(rows: list[dict], printed: dict[str, str], pictures: dict[str, list]):
    [change] = re.findall(r"^seed 0: (.+ to .+ % of test)$", printed["run"], re.MULTILINE)
    assert printed["restore"] == f"accuracy {change}\n"
    counts = re.findall(r"^(\d+) (corrected|spoiled)", printed["corrected"], re.MULTILINE)
    assert [name for _, name in counts] == ["corrected", "spoiled"]
    before, after = map(float, re.findall(r"[\d.]+", change)[:2])
    examples = sum(row["value"] for row in rows if row["metric"] == "examples")
    gained = int(counts[0][0]) - int(counts[1][0])
    assert gained == round((after - before) / 100 * examples)
    assert len(pictures["corrected"]) == 2


END = {"mnist": check_digits, "speech": check_speech, "specialists": check_characters}


def text_of(cell: NotebookNode) -> str:
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def pictures_of(cell: NotebookNode) -> list[bytes]:
    data = [output.data for output in cell.outputs if "data" in output]
    return [base64.b64decode(one["image/png"]) for one in data if "image/png" in one]
