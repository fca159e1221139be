"""Examples of speech: windows of frames, cut on the device and never stored (section 4 of the paper).

An utterance has frames uint8 `[n, 40]` (quantised, normalised log-mel energies, one each 10 ms) and the
state of each frame, int32 `[n]`. An example is a window of 26 frames, labelled with the state of the
21st: 20 frames come before the labelled one and 5 after. Since each frame is part of 26 windows, windows
are cut when a batch is gathered. The frames are stored once, in one array, where each utterance is
preceded by 20 copies of its first frame and followed by 5 copies of its last. So the first and last
frames have windows of the same size, and no window reaches into another utterance.
"""

import functools
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from distill_jax import platforms, soft_targets
from distill_jax.errors import UserError
from distill_jax.models import Params
from distill_jax.train_step import Batch

LEFT, RIGHT = 20, 5  # frames before and after the labelled one
WINDOW = LEFT + 1 + RIGHT
FEATURES = 40

_NO_FIELDS: Mapping[str, Sequence[np.ndarray]] = types.MappingProxyType({})
_NOT_IN_BATCHES = ("frames", "position", "utterance")


def pack(
    frames: Sequence[np.ndarray],
    states: Sequence[np.ndarray],
    fields: Mapping[str, Sequence[np.ndarray]] = _NO_FIELDS,
    numbers: Sequence[int] | np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Packs U utterances with F frames in all as examples, one for each frame.

    Args:
        frames: for each utterance uint8 `[n, 40]`.
        states: for each utterance int32 `[n]`.
        fields: further values of the frames, such as soft targets; for each utterance `[n, ...]`.
        numbers: of the utterances; None for 0..U-1.

    Returns:
        "frames" uint8 `[F + 25 U, 40]`, with the copies at the edges; and for each example "id" int32
        `[F]` (0..F-1), "position" int32 `[F]` (the row of its labelled frame in "frames"), "label"
        int32 `[F]`, "utterance" int32 `[F]`, and `fields`.

    Raises:
        UserError: if frames or states have another shape or dtype, if fields have another length, or if
            an utterance has no frames (the message names the utterance); or for no utterances.
    """
    numbers = np.arange(len(frames)) if numbers is None else np.asarray(numbers)
    _check(frames, states, fields, numbers)
    lengths = np.array([len(rows) for rows in frames])
    place = np.repeat(np.arange(len(frames), dtype=np.int32), lengths)
    ids = np.arange(len(place), dtype=np.int32)
    return {
        "frames": _with_edges(frames, lengths),
        "id": ids,
        "position": ids + np.int32(LEFT) + np.int32(LEFT + RIGHT) * place,
        "label": np.concatenate(states),
        "utterance": numbers.astype(np.int32)[place],
        **{name: np.concatenate(arrays) for name, arrays in fields.items()},
    }


def cut(frames: Array, positions: Array) -> Array:
    """Cuts windows: frames `[R, 40]`, "position" int32 `[B]` of `pack` -> `[B, 26, 40]`."""
    if platforms.current() == "tpu":  # where slices are cut in a loop, one example after the other
        return frames[positions[:, None] + jnp.arange(-LEFT, RIGHT + 1)[None]]
    return jax.vmap(lambda position: jax.lax.dynamic_slice_in_dim(frames, position - LEFT, WINDOW))(
        positions
    )


def gather_windows(examples: Batch, rows: Array) -> Batch:
    """The batch of the examples at rows `[B]`, for `epochs.make_epoch`.

    It has their fields, and "inputs": their windows `[B, 26, 40]`; but not "frames", "position" and
    "utterance".
    """
    return {
        "inputs": cut(examples["frames"], examples["position"][rows]),
        **{name: field[rows] for name, field in examples.items() if name not in _NOT_IN_BATCHES},
    }


def select(examples: Mapping[str, Any], rows: Any) -> dict[str, Any]:
    """The examples at rows (indices or a mask); "frames" is the same array, not a copy."""
    return {name: field if name == "frames" else field[rows] for name, field in examples.items()}


def digests(examples: Mapping[str, np.ndarray], chunk: int = 8192) -> np.ndarray:
    """`soft_targets.digests` of each example's window, uint64 `[N]`.

    Args:
        examples: from `pack`, on the host.
        chunk: windows in memory at a time.
    """
    frames = np.ascontiguousarray(examples["frames"])
    # Row r of this view is the window that starts at frame r. Its bytes are consecutive, so indexing
    # copies whole windows.
    windows = np.lib.stride_tricks.sliding_window_view(frames.reshape(-1), WINDOW * FEATURES)
    starts = np.asarray(examples["position"]) - LEFT
    parts = [
        soft_targets.digests(windows[::FEATURES][part].reshape(-1, WINDOW, FEATURES))
        for part in np.split(starts, range(chunk, len(starts), chunk))
    ]
    return np.concatenate(parts)


def logits_over_windows(
    apply: Callable[[Params, Array], Array],
    params: Params,
    examples: Mapping[str, Any],
    rows: np.ndarray,
    batch_size: int = 1024,
) -> np.ndarray:
    """A frozen model's logits for the examples at some rows, for soft targets and decoding.

    The last batch is padded, so that one compiled program serves every call.

    Args:
        apply: `(params, inputs [B, 26, 40]) -> logits [B, C]`, in evaluation mode.
        params: of the model, or of a whole ensemble if `apply` takes that.
        examples: from `pack`; put them on the device first if there is more than one call.
        rows: int `[n]`.
        batch_size: windows in memory at a time.

    Returns:
        float32 `[n, C]` on the host.
    """
    positions = np.asarray(examples["position"])[rows]
    padded = np.pad(positions, (0, -len(positions) % batch_size), constant_values=LEFT)
    # Copied to the device once, and not with each batch.
    params, frames = jax.tree.map(jnp.asarray, (params, examples["frames"]))
    window = jax.ShapeDtypeStruct((batch_size, WINDOW, FEATURES), frames.dtype)
    classes = jax.eval_shape(apply, params, window).shape[-1]
    logits = np.empty((len(padded), classes), np.float32)
    previous: tuple[int, Array] | None = None
    for start in range(0, len(padded), batch_size):
        found = _window_logits(apply, params, frames, padded[start : start + batch_size])
        if previous is not None:  # fetched while the device computes the next batch
            logits[previous[0] : start] = previous[1]
        previous = start, found
    if previous is not None:
        logits[previous[0] :] = previous[1]
    return logits[: len(positions)]


@functools.partial(jax.jit, static_argnums=0)
def _window_logits(
    apply: Callable[[Params, Array], Array], params: Params, frames: Array, positions: Array
) -> Array:
    return apply(params, cut(frames, positions))


def _with_edges(frames: Sequence[np.ndarray], lengths: np.ndarray) -> np.ndarray:
    """The frames of all utterances in one array, with the copies of each first and last frame."""
    packed = np.empty((lengths.sum() + (LEFT + RIGHT) * len(frames), FEATURES), np.uint8)
    start = 0
    for rows in frames:
        first = start + LEFT
        last = first + len(rows)
        packed[start:first] = rows[0]
        packed[first:last] = rows
        packed[last : last + RIGHT] = rows[-1]
        start = last + RIGHT
    return packed


def _check(
    frames: Sequence[np.ndarray],
    states: Sequence[np.ndarray],
    fields: Mapping[str, Sequence[np.ndarray]],
    numbers: np.ndarray,
) -> None:
    counts = {"states": len(states), **{name: len(arrays) for name, arrays in fields.items()}}
    for name, count in counts.items():
        if count != len(frames):
            raise UserError(f"{len(frames)} utterances have frames, but {count} have {name}")
    if not len(frames):
        raise UserError("no utterances to pack")
    for i, number in enumerate(numbers):
        rows, labels = frames[i], states[i]
        if rows.dtype != np.uint8 or rows.ndim != 2 or rows.shape[1] != FEATURES:
            raise UserError(
                f"utterance {number}: frames are {rows.dtype} {list(rows.shape)}, expected uint8 "
                f"[n, {FEATURES}]"
            )
        if labels.dtype != np.int32 or labels.ndim != 1:
            raise UserError(
                f"utterance {number}: states are {labels.dtype} {list(labels.shape)}, expected "
                "int32 [n]"
            )
        if not len(rows):
            raise UserError(f"utterance {number} has no frames")
        for name, array in (("states", labels), *((name, fields[name][i]) for name in fields)):
            if len(array) != len(rows):
                raise UserError(
                    f"utterance {number}: {len(rows)} frames, but {len(array)} of {name}"
                )
