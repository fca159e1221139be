"""Checkpoints: a thin layer over orbax; writes are asynchronous and atomic.

A checkpoint holds a training state and its history (a JSON list). The last two are kept, so that little
is lost if one is damaged, and the best by a metric if one is named.
"""

import gc
import logging
import operator
import os
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax import Array
from orbax.checkpoint.checkpoint_managers import (
    AnyPreservationPolicy,
    BestN,
    LatestN,
    PreservationPolicy,
)

from distill_jax import files, processes
from distill_jax.errors import UserError

History = list[dict[str, Any]]


class Restored(NamedTuple):
    """The content of a checkpoint."""

    step: int
    state: Any
    history: History


def open_dir(
    directory: str | os.PathLike[str], best_metric: str | None = None
) -> ocp.CheckpointManager:
    """Opens a folder of checkpoints, and makes it if it is missing; `close()` waits for the last write.

    Args:
        directory: a folder for one run only.
        best_metric: name of an entry of `metrics` in `save`; the checkpoint with its lowest value is
            kept too.

    Raises:
        UserError: for a folder that holds anything else.
    """
    directory = files.local_path(directory).absolute()
    files.check_writable(directory, "directory")
    own = [re.escape(path.name) for path in directory.glob("*") if _is_own(path)]
    files.check_own_folder(directory, own, "a training's checkpoints")
    logging.getLogger("absl").addFilter(_is_no_error_of_orbax)
    policies: list[PreservationPolicy] = [LatestN(2)]
    get_metric = None if best_metric is None else operator.itemgetter(best_metric)
    if get_metric is not None:
        policies.append(BestN(get_metric_fn=get_metric, reverse=True, n=1))
    return ocp.CheckpointManager(
        directory,
        options=ocp.CheckpointManagerOptions(
            preservation_policy=AnyPreservationPolicy(policies),
            best_fn=get_metric,  # without it orbax does not write the metrics
            best_mode="min",
            cleanup_tmp_directories=True,  # incomplete writes of a killed run
        ),
    )


def save(
    manager: ocp.CheckpointManager,
    step: int,
    state: Any,
    history: History,
    metrics: dict[str, float] | None = None,
) -> None:
    """Starts writing a checkpoint and returns; the state may be donated at once.

    Raises:
        UserError: if the disk is full, or if the previous write failed. Earlier checkpoints are kept.
    """
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    free = shutil.disk_usage(manager.directory).free
    if free < size:
        raise UserError(
            f"no space left for a checkpoint in {manager.directory}: it takes {size / 1e6:.1f} MB and "
            f"{free / 1e6:.1f} MB are free; earlier checkpoints are kept, free some space and run the "
            "same command again"
        )
    # A copy of the list, because it is written later, when the loop may have added to it.
    notes = {
        "history": [*history],
        "checksum": int(processes.fetch(checksum(state))),
        "leaves": _describe(state),
    }
    stored = ocp.args.StandardSave(jax.tree.map(_storable, _fields(state)))
    items = ocp.args.Composite(state=stored, notes=ocp.args.JsonSave(notes))
    try:
        manager.save(step, args=items, metrics=metrics, force=True)
    except (OSError, ValueError) as error:
        raise _write_error(manager, error) from error


def wait(manager: ocp.CheckpointManager) -> None:
    """Waits until everything is on disk; raises a UserError if a write failed."""
    try:
        manager.wait_until_finished()
    except (OSError, ValueError) as error:
        raise _write_error(manager, error) from error


def restore_newest(manager: ocp.CheckpointManager, like: Any) -> Restored | None:
    """Reads the newest checkpoint that is not damaged; returns None if the folder is empty.

    A damaged checkpoint is skipped with a warning that names it. Once an older one has been read, it is
    renamed to "N.damaged", so that the run can write it again; what had that name is deleted.

    Args:
        manager: from `open_dir`.
        like: a state of the same structure; its arrays (or ShapeDtypeStructs) give the shapes,
            dtypes and shardings to restore onto.

    Raises:
        UserError: if there are checkpoints and none can be read; they may be those of another net.
    """
    damaged: list[int] = []
    reason = ""
    for step in sorted(manager.all_steps(), reverse=True):
        restored, problem = _try_to_restore(manager, step, like)
        if processes.any_of(restored is None):
            reason = problem or "another process of the run can't read it"
            logging.warning(
                "checkpoint %s is damaged and skipped: %s", manager.directory / str(step), reason
            )
            damaged.append(step)
            continue
        if damaged:
            _put_aside(Path(manager.directory), damaged)
            manager.reload()
        return restored
    if damaged:
        raise UserError(
            f"none of the checkpoints {sorted(damaged)} in {manager.directory} can be read as this "
            f"training state; delete the folder to start again, or use another one: {reason}"
        )
    return None


def restore_best(manager: ocp.CheckpointManager, like: Any, metric: str) -> Restored | None:
    """Reads the checkpoint with the lowest `metric`; returns None if no checkpoint has that metric.

    Args:
        manager, like: as for `restore_newest`.
        metric: name of an entry of `metrics` in `save`.

    Raises:
        UserError: if it can't be read; the next best is not used instead.
    """
    values = {step: manager.metrics(step) or {} for step in manager.all_steps()}
    steps = [step for step in values if metric in values[step]]
    if not steps:
        return None
    best = min(steps, key=lambda step: values[step][metric])
    restored, problem = _try_to_restore(manager, best, like)
    if restored is None:
        raise UserError(
            f"the best checkpoint {manager.directory / str(best)} is damaged: {problem}"
        )
    return restored


@jax.jit
def checksum(tree: Any) -> Array:
    """A uint32 checksum of a tree of arrays, which changes with any single bit.

    The sum, modulo 2^32, of bit patterns times odd numbers that depend on the position. It is exact in
    any order of summation, so it is the same on every mesh.
    """
    total = jnp.uint32(0)
    for leaf in jax.tree.leaves(tree):
        bits = _bits(leaf)
        weights = jnp.uint32(1)
        for axis in range(bits.ndim):
            places = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
            weights = weights + places * jnp.uint32(2 * 2654435761 * (axis + 1) % 2**32)
        total = total * jnp.uint32(31) + jnp.sum(bits * weights, dtype=jnp.uint32)
    return total


def _bits(leaf: Array) -> Array:
    """The bits of an array of any dtype, random keys among them: uint32 `[...]`, or `[..., n]`."""
    dtype = leaf.dtype
    if is_key(leaf):
        return jax.random.key_data(leaf).astype(jnp.uint32)
    if dtype == jnp.bool_:
        return leaf.astype(jnp.uint32)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return _bits(jnp.stack([leaf.real, leaf.imag], axis=-1))
    info: Any = jnp.finfo(dtype) if jnp.issubdtype(dtype, jnp.floating) else jnp.iinfo(dtype)
    words = jnp.dtype(f"uint{min(info.bits, 32)}")  # a number of 64 bits becomes two words
    return jax.lax.bitcast_convert_type(leaf, words).astype(jnp.uint32)


def is_key(leaf: Any) -> bool:
    """Whether a leaf holds random keys (`jax.random.key`), which have no bits of their own."""
    return isinstance(leaf, Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


_SHORT = (jnp.uint2, jnp.uint4)


def _storable(leaf: Array) -> Array:
    """An array that orbax can write: it refuses empty arrays and these short integers."""
    if leaf.size == 0:
        return jnp.zeros((), jnp.uint8)
    return leaf.astype(jnp.uint8) if leaf.dtype in _SHORT else leaf


def _fields(state: Any) -> Any:
    """What is stored of a training state: orbax tells an empty model state from none, as of before."""
    if not hasattr(state, "_asdict"):
        return state
    return {
        name: x
        for name, x in state._asdict().items()
        if name != "model_state" or jax.tree.leaves(x)
    }


def _stored_as(leaf: Any) -> Any:
    """The ShapeDtypeStruct of what `_storable` makes of an array, on the same devices."""
    own = ocp.utils.to_shape_dtype_struct(leaf)
    stored = jax.eval_shape(_storable, own)
    sharding = own.sharding if own.size else None
    return jax.ShapeDtypeStruct(stored.shape, stored.dtype, sharding=sharding)


def _as_it_was(stored: Array, leaf: Any) -> Array:
    """The inverse of `_storable`."""
    if leaf.size == 0:
        return jnp.zeros(leaf.shape, leaf.dtype, device=getattr(leaf, "sharding", None))
    return stored.astype(leaf.dtype) if leaf.dtype in _SHORT else stored


def _try_to_restore(
    manager: ocp.CheckpointManager, step: int, like: Any
) -> tuple[Restored | None, str]:
    """A checkpoint, or the reason in a line why it can't be read."""
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        try:
            return _restore(manager, step, like), ""
        except Exception as error:  # orbax raises whatever its storage layers do
            problem = _in_a_line(error)
        gc.collect()  # the coroutines of a failed read say so when they go
        return None, problem
    finally:
        sys.unraisablehook = hook


def _restore(manager: ocp.CheckpointManager, step: int, like: Any) -> Restored:
    notes = manager.restore(step, args=ocp.args.Composite(notes=ocp.args.JsonRestore()))["notes"]
    if "leaves" in notes:  # else of an earlier version
        now, there = _describe(like), notes["leaves"]
        names = sorted({**there, **now})
        files.check_same("its arrays are others", there, {name: now.get(name) for name in names})
    abstract = ocp.args.StandardRestore(jax.tree.map(_stored_as, _fields(like)))
    stored = manager.restore(step, args=ocp.args.Composite(state=abstract))["state"]
    state = jax.tree.map(_as_it_was, stored, _fields(like))
    if hasattr(like, "_replace"):
        state = like._replace(**state)
    # Orbax detects missing and truncated files, but not a changed bit in the data of an array.
    if int(processes.fetch(checksum(state))) != notes["checksum"]:
        raise ValueError("the checksum of the arrays differs from the one that was saved with them")
    return Restored(step, state, notes["history"])


def _describe(tree: Any) -> dict[str, str]:
    """Dtype and shape of each array, by its path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): f"{x.dtype}{list(x.shape)}" for path, x in leaves}


def _is_no_error_of_orbax(record: logging.LogRecord) -> bool:
    """Whether a record is to be shown: the errors that orbax logs are raised too, and said in a line."""
    return record.levelno < logging.ERROR or "orbax" not in record.pathname


def _in_a_line(error: Exception) -> str:
    return str(error).partition("\n")[0].partition(" See full TensorStore")[0]


# What orbax writes in the folder of a step. A run killed while it deletes one may leave any of them.
_ENTRIES = {"state", "notes", "metrics", "_CHECKPOINT_METADATA", "commit_success.txt"}


def _is_own(path: Path) -> bool:
    """Whether a name in the folder is of a checkpoint, of one half written or deleted, or put aside."""
    if path.name.isdigit() and path.is_dir():
        return {entry.name for entry in path.iterdir()} <= _ENTRIES
    return re.fullmatch(r"\d+\.(damaged|orbax-checkpoint-tmp.*)", path.name) is not None


@processes.main_only
def _put_aside(directory: Path, steps: Sequence[int]) -> None:
    for step in steps:
        aside = directory / f"{step}.damaged"
        files.remove(aside)
        (directory / str(step)).rename(aside)


def _write_error(manager: ocp.CheckpointManager, error: Exception) -> UserError:
    where = f"{manager.directory} (earlier ones are kept)"
    return UserError(f"could not write a checkpoint in {where}: {_in_a_line(error)}")
