"""The training loop: the only one, and the only impure part of training.

It runs units. A unit is one dispatch: scanned epochs of a resident data set, or a block of a streamed
one. The loop takes a function that runs a unit, and a state. It writes checkpoints, keeps records and
prints progress.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
from jax import Array

from distill_jax import checkpoints, processes, ranges, sharding
from distill_jax.errors import Stopped, UserError
from distill_jax.train_step import TrainState

Record = dict[str, Any]
"""What is recorded after a unit: "unit" (how many are done), "seconds" of training so far (with those
before a resumption), "step", "train_loss" (mean of the unit's examples) and "train_errors" (share of
their known labels; None where none is known) per member, and what `evaluate` measured."""

Advance = Callable[[TrainState, int], tuple[TrainState, dict[str, Array]]]
"""`(state, unit) -> (state, metrics)`, where metrics are sums over batches, those of
`train_step.make_train_step`, each `[..., steps]` with a leading member axis where there are members."""


@processes.stopping_at_boundaries()
def fit(
    advance: Advance,
    state: TrainState,
    units: int,
    *,
    evaluate: Callable[[TrainState], dict[str, Array]] | None = None,
    manager: ocp.CheckpointManager | None = None,
    save_every: int = 1,
    best_metric: str | None = None,
    on_record: Sequence[Callable[[Record], None]] = (),
) -> tuple[TrainState, list[Record]]:
    """Trains until `units` are done, resuming from the newest good checkpoint.

    A unit's metrics are fetched after the next unit is dispatched, so that logging never makes the
    device wait. The same holds for the processes' agreement on whether one was asked to stop (SIGTERM):
    then the unit that was dispatched last is finished and saved, on all of them together.

    Args:
        advance: runs one unit; a function of the state and the unit's number alone, so that a resumed
            run is the same as one that was never stopped.
        state: fresh; donated.
        units: how many in all.
        evaluate: measured after every unit, as arrays that are fetched later.
        manager: where checkpoints go and come from; None keeps none.
        save_every: units between checkpoints; the last unit is always saved.
        best_metric: the entry of `evaluate` whose mean over members is each checkpoint's metric.
        on_record: called with every new record, in order.

    Returns:
        The last state, and the records of all units, those before the resumption included.

    Raises:
        UserError: if a loss is not finite, at the first such step, before anything is saved; if
            `units` or `save_every` is below 1.
        Stopped: if a process was asked to stop, after saving.
    """
    ranges.check_value("units", units, ranges.count())
    ranges.check(save_every=save_every)
    restored = checkpoints.restore_newest(manager, state) if manager is not None else None
    first = 0
    history: list[Record] = []
    if restored is not None:
        first, state, history = restored
        if manager is not None and first > units:
            raise UserError(
                f"{manager.directory} has a checkpoint after unit {first}; asked for are {units}"
            )
    clock = _clock(history)
    pending: tuple[int, Array, dict[str, Array]] | None = None
    for unit in range(first, units):
        asked = sharding.any_process(processes.stop_asked())
        state, metrics = processes.serialize_on_cpu(advance(state, unit))
        # `+ 0` is a copy: the state itself is donated to the next unit.
        fetched = {**metrics, **(evaluate(state) if evaluate is not None else {})}
        if pending is not None:
            _append(history, pending, clock, on_record, manager)
        pending = (unit + 1, state.step + 0, fetched)
        stop = processes.any_stop_asked(asked)
        due = stop or (unit + 1) % save_every == 0 or unit + 1 == units
        if manager is not None and due:
            _append(history, pending, clock, on_record, manager)
            pending = None
            best = None if best_metric is None else {best_metric: _mean(history[-1][best_metric])}
            checkpoints.save(manager, unit + 1, state, history, best)
        if stop:
            _stop(manager, unit + 1, units)
    if pending is not None:
        _append(history, pending, clock, on_record, manager)
    if manager is not None:
        checkpoints.wait(manager)
    return state, history


def _stop(manager: ocp.CheckpointManager | None, unit: int, units: int) -> None:
    if manager is None:
        raise Stopped(f"stopped by SIGTERM after unit {unit} of {units}, without checkpoints")
    checkpoints.wait(manager)
    raise Stopped(f"stopped by SIGTERM; saved after unit {unit} of {units} in {manager.directory}")


def _ratio(sums: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Sums by their weight; 0 of nothing, as of a unit that is all padding."""
    return np.asarray(sums / np.where(weight > 0, weight, 1))


def _clock(history: list[Record]) -> Callable[[], float]:
    """Seconds of training: those of the history, and those since now."""
    offset = (history[-1]["seconds"] if history else 0.0) - time.monotonic()
    return lambda: time.monotonic() + offset


def _append(
    history: list[Record],
    pending: tuple[int, Array, dict[str, Array]],
    clock: Callable[[], float],
    on_record: Sequence[Callable[[Record], None]],
    manager: ocp.CheckpointManager | None,
) -> None:
    unit, step, fetched = pending
    step, fetched = processes.fetch((step, fetched))
    values = {name: np.asarray(value) for name, value in fetched.items()}
    if missing := {"loss", "examples"} - set(values):
        raise UserError(
            f"the metrics of a unit have no {', '.join(sorted(missing))}: see loop.Advance"
        )
    losses, examples = values.pop("loss"), values.pop("examples")
    nothing = np.zeros_like(examples)  # of batches without labels
    errors, known = values.pop("errors", nothing).sum(-1), values.pop("count", nothing).sum(-1)
    _check_finite(losses, np.asarray(step), unit, manager)
    shares = _ratio(errors, known).astype(object)
    shares[known == 0] = None
    record = {
        "unit": unit,
        "seconds": clock(),  # now that the unit's metrics are here, it is done
        "step": np.asarray(step).tolist(),
        "train_loss": _ratio(losses.sum(-1), examples.sum(-1)).tolist(),
        "train_errors": shares.tolist(),
        **{name: value.tolist() for name, value in values.items()},
    }
    history.append(record)
    for call in on_record:
        call(record)


def _check_finite(
    losses: np.ndarray, step: np.ndarray, unit: int, manager: ocp.CheckpointManager | None
) -> None:
    bad = ~np.isfinite(losses)
    if not bad.any():
        return
    steps = losses.shape[-1]
    at = int(np.argwhere(bad)[:, -1].min())
    who = ""
    if losses.ndim > 1:
        who = f" of member {int(np.argwhere(bad[..., at])[0, 0])}"
    kept = manager.latest_step() if manager is not None else None
    good = "" if manager is None else f"; the last good checkpoint is {manager.directory}/{kept}"
    if manager is not None and kept is None:
        good = "; there is no checkpoint before it"
    raise UserError(
        f"the loss{who} is {losses[bad].flat[0]} at step {int(step.max()) - steps + at} (unit {unit})"
        f"{good}. A lower learning_rate or a longer warm-up may help, if the data are sound: labels "
        "below the number of classes, finite inputs and soft targets"
    )


def _mean(value: Any) -> float:
    return float(np.mean(value))
