"""Where the records of a training go: the terminal, metrics.jsonl, TensorBoard, Weights & Biases.

Each function gives what `loop.fit` calls with every new record.
"""

import importlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tensorboardX import SummaryWriter

from distill_jax import files
from distill_jax.errors import UserError
from distill_jax.loop import Record

METRICS = "metrics.jsonl"
SERVICES = ("wandb",)

_USED: list[str] = []  # services that this process logs to


def use(service: str) -> None:
    """Sends the records of all trainings of this process to a service too.

    Args:
        service: of `SERVICES`; its own variables, such as WANDB_MODE=offline, say how and where.

    Raises:
        UserError: for another one, or if its package is not installed.
    """
    if service not in SERVICES:
        raise UserError(f"--log={service}: expected {', '.join(SERVICES)}")
    try:
        importlib.import_module(service)
    except ImportError as error:
        raise UserError(
            f"--log={service} needs its package: pip install -e '.[{service}]'"
        ) from error
    if service not in _USED:
        _USED.append(service)


def print_progress(name: str, units: int) -> Callable[[Record], None]:
    """A line per record with rate and time to go: one that is rewritten on a terminal, else plain."""
    started: list[float] = []
    shown = [0.0]
    terminal = sys.stdout.isatty()

    def show(record: Record) -> None:
        now = time.monotonic()
        started.append(now)
        last = record["unit"] == units
        if not terminal and not last and now - shown[0] < 10:
            return
        shown[0] = now
        text = f"{name}: {record['unit']}/{units}, step {_mean(record['step']):.0f}"
        text += f", loss {_mean(record['train_loss']):.4f}"
        for key, value in record.items():
            if key not in ("unit", "seconds", "step", "train_loss"):
                shown_value = "none" if None in np.ravel(value) else f"{_mean(value):.4g}"
                text += f", {key.replace('_', ' ')} {shown_value}"
        if len(started) > 1:
            seconds = (now - started[0]) / (len(started) - 1)
            left = seconds * (units - record["unit"])
            text += f", {seconds:.2f} s each, {int(left // 60)}:{int(left % 60):02d} to go"
        if terminal:  # cut to a line, for only that much can be rewritten
            text = "\r\033[K" + text[: shutil.get_terminal_size().columns - 1]
        print(text, end="" if terminal and not last else "\n")
        sys.stdout.flush()

    return show


def tensorboard(directory: str | os.PathLike[str]) -> Callable[[Record], None]:
    """Writes every record's values as TensorBoard scalars, member by member where there are several."""
    writers: list[SummaryWriter] = []  # made with the first record: a finished run writes no file

    def write(record: Record) -> None:
        if not writers:
            writers.append(SummaryWriter(str(files.local_path(directory))))
        for tag, scalar in _scalars(record):
            writers[0].add_scalar(tag, scalar, int(np.ravel(record["step"])[0]))
        writers[0].flush()

    return write


def jsonl(directory: str | os.PathLike[str]) -> Callable[[Record], None]:
    """Appends every record to metrics.jsonl as a line; units that are run again are replaced."""
    path = Path(directory) / METRICS
    begun: list[bool] = []

    def write(record: Record) -> None:
        if not begun:
            begun.append(True)
            _keep_before(path, record["unit"])
        with path.open("a") as file:
            file.write(json.dumps(record) + "\n")

    return write


def services(
    directory: str | os.PathLike[str], units: int, config: Mapping[str, Any]
) -> list[Callable[[Record], None]]:
    """What sends records to each service that is used, as one run for each training.

    Args:
        directory: of the training; its last parts are the run's name.
        units: after which the run is finished.
        config: kept with the run.
    """
    name = "-".join(Path(directory).absolute().parts[-4:])
    return [_service(importlib.import_module(used), name, units, config) for used in _USED]


def _service(
    module: Any, name: str, units: int, config: Mapping[str, Any]
) -> Callable[[Record], None]:
    runs: list[Any] = []

    def write(record: Record) -> None:
        if not runs:
            options = {"project": "distill_jax", "name": name, "id": name, "resume": "allow"}
            runs.append(module.init(config=dict(config), **options))
        runs[0].log(dict(_scalars(record)), step=record["unit"])
        if record["unit"] == units:
            runs[0].finish()

    return write


def _scalars(record: Record) -> list[tuple[str, float]]:
    """A record's values by name, and member by member where there are several."""
    found = []
    for key, value in record.items():
        values = np.ravel(value)
        for member, scalar in enumerate(values):
            if scalar is not None:
                found.append((key if len(values) == 1 else f"{key}/{member}", float(scalar)))
    return found


def _keep_before(path: Path, unit: int) -> None:
    """Keeps the lines of earlier units: what follows was lost in a kill, or half written."""
    kept = []
    for line in path.read_text().splitlines(keepends=True) if path.exists() else []:
        try:
            if json.loads(line)["unit"] >= unit:
                break
        except ValueError:
            break
        kept.append(line)
    with files.write_whole(path) as partial:
        partial.write_text("".join(kept))


def _mean(value: Any) -> float:
    return float(np.mean(value))
