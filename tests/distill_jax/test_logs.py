"""Where records go: the terminal, metrics.jsonl, TensorBoard files, services."""

import json
import os
import re
import struct
import subprocess
import sys
import types

import numpy as np
import pytest
from command import ROOT
from tensorboardX.proto import event_pb2

from distill_jax import logs
from distill_jax.errors import UserError

RECORD = {
    "unit": 1,
    "seconds": 2.5,
    "step": [30, 30],
    "train_loss": [0.5, 0.25],
    "train_errors": [0.1, 0.3],
    "test_errors": [10, 20],
}


def test_progress_is_plain_lines_where_there_is_no_terminal(capsys):
    show = logs.print_progress("student", 3)
    for unit in (1, 2, 3):
        show({**RECORD, "unit": unit})
    lines = capsys.readouterr().out.splitlines()
    # The second comes within ten seconds of the first, the third is the last.
    assert len(lines) == 2
    expected = "step 30, loss 0.3750, train errors 0.2, test errors 15"
    assert lines[0] == f"student: 1/3, {expected}"
    assert re.fullmatch(rf"student: 3/3, {expected}, \d+\.\d\d s each, 0:00 to go", lines[1])


def test_progress_rewrites_its_line_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    show = logs.print_progress("student", 2)
    show(RECORD)
    show({**RECORD, "unit": 2})
    out = capsys.readouterr().out
    assert out.count("\r\033[K") == 2 and out.count("\n") == 1 and out.endswith("\n")


def read_scalars(directory):
    """(tag, step, value) of every scalar: length-prefixed records with two checksums each."""
    scalars = []
    for path in sorted(directory.glob("events.out.tfevents.*")):
        content, at = path.read_bytes(), 0
        while at < len(content):
            (length,) = struct.unpack_from("<Q", content, at)
            event = event_pb2.Event.FromString(content[at + 12 : at + 12 + length])
            at += 12 + length + 4
            scalars += [(v.tag, event.step, v.simple_value) for v in event.summary.value]
        assert at == len(content)
    return scalars


def test_tensorboard_files_hold_every_value_and_need_no_tensorflow(tmp_path):
    later = {"unit": 2, "seconds": 5.0, "step": 60, "train_loss": 0.125}
    code = (
        "import sys; from distill_jax import logs; "
        f"write = logs.tensorboard({str(tmp_path)!r}); write({RECORD}); write({later}); "
        "print('tensorflow' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    # A process of its own, whose end writes what is still queued.
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert done.stdout == "False\n", done.stderr
    expected = []
    for record in (RECORD, later):
        for name, value in record.items():
            several = isinstance(value, list)
            for member, scalar in enumerate(value if several else [value]):
                tag = f"{name}/{member}" if several else name
                expected.append((tag, 30 if record is RECORD else 60, np.float32(scalar)))
    assert read_scalars(tmp_path) == expected


def test_a_finished_run_writes_no_tensorboard_file(tmp_path):
    logs.tensorboard(tmp_path)
    assert not list(tmp_path.iterdir())


def test_metrics_are_a_line_for_each_record_and_no_unit_is_there_twice(tmp_path):
    write = logs.jsonl(tmp_path)
    for unit in (1, 2, 3):
        write({**RECORD, "unit": unit})
    path = tmp_path / logs.METRICS
    with path.open("a") as file:  # killed while it wrote
        file.write('{"unit": 4, "sec')
    write = logs.jsonl(tmp_path)  # resumed from the checkpoint after unit 2
    for unit in (3, 4):
        write({**RECORD, "unit": unit, "seconds": 9.0})
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(one["unit"], one["seconds"]) for one in lines] == [(1, 2.5), (2, 2.5), (3, 9), (4, 9)]
    assert lines[0] == RECORD


def test_a_service_gets_a_run_for_each_training(tmp_path, monkeypatch):
    calls = []
    run = types.SimpleNamespace(
        log=lambda values, step: calls.append((step, values)), finish=lambda: calls.append("end")
    )
    fake = types.ModuleType("wandb")
    fake.init = lambda **options: calls.append(options) or run
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(logs, "_USED", [])
    assert logs.services(tmp_path, 2, {}) == []
    logs.use("wandb")
    logs.use("wandb")
    (write,) = logs.services(tmp_path / "runs/a/stages/teacher", 2, {"epochs": 2})
    write(RECORD)
    write({**RECORD, "unit": 2, "train_errors": [None, 0.5]})
    options, first, second, end = calls
    assert options["name"] == options["id"] == "runs-a-stages-teacher"
    assert options["config"] == {"epochs": 2} and options["resume"] == "allow"
    assert first[0] == 1 and first[1]["train_loss/1"] == 0.25
    assert "train_errors/0" not in second[1] and end == "end"


def test_services_that_are_not_there(monkeypatch):
    with pytest.raises(UserError, match="--log=mine: expected wandb"):
        logs.use("mine")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="--log=wandb needs its package: pip install"):
        logs.use("wandb")
