"""What a training is, as its folder says: training.json, written before the first step.

Finished nets, and checkpoints that a training resumes from, must be of the training that is asked for.
So all that decides what it becomes is noted, and compared field by field.
"""

import dataclasses
import functools
import hashlib
import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax import files, nets, processes
from distill_jax.errors import UserError

FORMAT = ("distill_jax.training", 1)
NAME = "training.json"
_AGAIN = "delete the folder to train again, or name another one"
_DEPTH = 8  # of values within values; a function may close over itself
_WHOLE = 8  # numbers of an array that are all noted
_SAMPLES = 32  # numbers of an array of floating point


class Note(NamedTuple):
    """What decides what a training becomes, but its epochs.

    fields: plain data by dotted names. samples: a few numbers of each array of floating point.
    """

    fields: dict[str, Any]
    samples: dict[str, list[float]]


def describe(parts: Mapping[str, Any]) -> Note:
    """The note of a training of these parts, which are any values.

    Numbers and text stay as they are. An array is named by its dtype, shape and a hash. A function is
    named by its module and name, and by the values that it closes over or that `functools.partial` gives
    it: the rest of its code is not covered. Of any other object the type is noted.

    Examples:
        >>> describe({"recipe": {"batch_size": 8, "loss": max}}).fields
        {'recipe.batch_size': 8, 'recipe.loss': 'builtins.max'}
    """
    fields, samples = {}, {}
    for name, value in _leaves("", parts, _DEPTH):
        fields[name] = _hash(value) if isinstance(value, np.ndarray) else value
        if (
            isinstance(value, np.ndarray)
            and jnp.issubdtype(value.dtype, jnp.floating)
            and value.size
        ):
            places = np.linspace(0, value.size - 1, _SAMPLES).astype(int)
            samples[name] = value.reshape(-1)[places].astype(float).tolist()
    return Note(fields, samples)


def check(directory: Path, note: Note, epochs: int, name: str) -> None:
    """Checks that a folder's training, if one has begun, is the one that is asked for.

    With more epochs than it was begun with it continues, which is said in a line. Another device
    rounds what it computes differently: an array of floating point whose numbers are nearly those of
    before is no other one, but a warning names it.

    Args:
        directory: of the training.
        note: of what is asked for.
        epochs: that are asked for.
        name: shown in the line.

    Raises:
        UserError: for another training, naming each field that differs with both values; for fewer
            epochs than it was begun with; for nets without checkpoints to continue from.
    """
    has_checkpoints = any((directory / "checkpoints").glob("[0-9]*"))
    if not has_checkpoints and not nets.exists(directory):
        return  # nothing is lost if it begins as another one
    if not (directory / NAME).exists():
        logging.warning(
            "%s is of an earlier version: what it was trained with isn't known", directory
        )
        return
    meta = files.read_sealed(directory / NAME, FORMAT, _AGAIN)
    begun = meta["epochs"]
    _compare(directory, meta, note, extended=begun != epochs)
    if epochs < begun:
        raise UserError(
            f"{directory} was begun with {begun} epochs: there can be more, not {epochs}; {_AGAIN}"
        )
    if begun < epochs and not has_checkpoints:
        raise UserError(
            f"{directory} has nets of {begun} epochs, but no checkpoints to continue from to {epochs}"
        )
    if begun < epochs:
        print(
            f"{name}: continues to {epochs} epochs; what is done had the schedule of {begun}, so the "
            "learning rate ended elsewhere"
        )


def write(directory: Path, note: Note, epochs: int) -> None:
    """Writes the note of a training that begins, or continues, to so many epochs."""
    processes.wait()  # until all have read the one of before
    fields = {"epochs": epochs, "fields": note.fields, "samples": note.samples}
    if processes.is_main():
        directory.mkdir(parents=True, exist_ok=True)
        files.write_sealed(directory / NAME, FORMAT, fields)


def _compare(directory: Path, meta: Mapping[str, Any], note: Note, extended: bool) -> None:
    there, samples, now = meta["fields"], meta["samples"], dict(note.fields)
    for name in now.keys() & there.keys() & note.samples.keys() & samples.keys():
        if there[name] != now[name] and _is_near(samples[name], note.samples[name]):
            logging.warning("%s of %s has other rounding errors than before", name, directory)
            now[name] = there[name]
    compared = {
        name: now.get(name)
        for name in sorted({*there, *now})
        if not (extended and name.endswith(".epochs"))
    }
    files.check_same(f"{directory} holds another training", there, compared, _AGAIN)


def of_members(sets: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Fields of the first member, and by "NAME.m" those that member m has of its own.

    Examples:
        >>> of_members([{"label": 1, "id": 2}, {"label": 1, "id": 3}])
        {'label': 1, 'id': 2, 'id.1': 3}
    """
    fields = dict(sets[0]) if sets else {}
    for m, one in enumerate(sets[1:], 1):
        own = {name: x for name, x in one.items() if not is_same(x, sets[0].get(name))}
        fields |= {f"{name}.{m}": x for name, x in own.items()}
    return fields


def is_same(a: Any, b: Any) -> bool:
    """Whether two arrays, or trees of them, are one object or have the same values."""
    return a is b or all(jax.tree.leaves(jax.tree.map(np.array_equal, a, b)))


def _leaves(name: str, value: Any, depth: int) -> Iterator[tuple[str, Any]]:
    """The numbers, texts and arrays within a value, by dotted names; lists of numbers are whole."""
    if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        value = jax.random.key_data(value)
    if isinstance(value, np.generic | jax.Array | np.ndarray):
        array = np.asarray(value)
        yield name, array.tolist() if array.size <= _WHOLE and array.dtype.isbuiltin else array
        return
    parts = _parts(value) if depth else None
    if parts is None:
        yield name, value if _is_plain(value) else _name_of(value)
    elif isinstance(value, list | tuple) and all(_is_plain(part) for part in value):
        yield name, list(value)
    else:
        for key, part in parts.items():
            yield from _leaves(f"{name}.{key}" if name else str(key), part, depth - 1)


def _parts(value: Any) -> Mapping[Any, Any] | None:
    """What a value consists of, by name; None if it has no parts."""
    if isinstance(value, Mapping):
        return value
    if hasattr(value, "to_dict"):  # a ConfigDict
        return value.to_dict()
    if hasattr(value, "_asdict"):  # a NamedTuple
        return value._asdict()
    if isinstance(value, list | tuple):
        return dict(enumerate(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, functools.partial):
        return {"function": value.func, **dict(enumerate(value.args)), **value.keywords}
    function = getattr(value, "__wrapped__", value)  # of jax.jit
    if not getattr(function, "__closure__", None):
        return None
    return {"function": _name_of(function), **inspect.getclosurevars(function).nonlocals}


def _name_of(value: Any) -> str:
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__}"


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


def _hash(array: np.ndarray) -> str:
    content = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    return f"{array.dtype}{list(array.shape)} {hashlib.sha256(content).hexdigest()[:16]}"


def _is_near(there: list[float], now: list[float]) -> bool:
    return np.allclose(there, now, rtol=0.01, atol=0.01 * np.max(np.abs(there)), equal_nan=True)
