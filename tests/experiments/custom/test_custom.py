"""The study to copy, as small as it goes: all stages, and the student runs without this package."""

import json

import numpy as np
from command import run

from distill_jax import export
from distill_jax.data import images

TINY = (
    "--config=experiments/custom/config.py:smoke",
    "--config.data.train_examples=200",
    "--config.data.test_examples=100",
    "--config.teacher.epochs=1",
    "--config.teacher.width=2",
    "--config.student.epochs=2",
    "--config.student.hidden=(8,)",
    "--config.seeds=(0,1)",
)


def test_a_set_of_ones_own_through_all_stages(tmp_path):
    digits = images.load("embedded")
    pairs = {"train": digits.train, "test": digits.test}
    arrays = {f"x_{split}": part["inputs"][:250] for split, part in pairs.items()}
    arrays |= {f"y_{split}": part["label"][:250] for split, part in pairs.items()}
    np.savez(tmp_path / "mine.npz", **arrays)
    mine = (*TINY, f"--config.data.source=npz:{tmp_path / 'mine.npz'}")
    run(*mine, f"--workdir={tmp_path / 'run'}")
    rows = json.loads((tmp_path / "run" / "results.json").read_text())
    errors = {row["row"]: row["seeds"] for row in rows if row["table"] == "custom"}
    assert errors == {"teacher": 1, "labels": 2, "distilled": 2}
    assert {row["row"] for row in rows if row["table"] == "custom_costs"} == set(errors)
    assert "| metric | teacher | labels | distilled |" in (tmp_path / "run/report.md").read_text()
    student = tmp_path / "run" / "stages" / "measure" / "student"
    card = export.read_card(student)
    assert (
        card["files"][0]["difference"] < 1e-5
        and card["parameters"] == 784 * 8 + 8 + 16 + 8 * 10 + 10
    )
