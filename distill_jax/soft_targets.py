"""Soft targets: made once by a frozen teacher, kept by example id, joined to the examples they are of.

What is kept are logits v `[N, C]` such that `softmax(v / T)` are the soft targets. One teacher's own
logits, or the mean of the members' logits (whose softmax is the geometric mean), serve every T; an
arithmetic mean is made at one T and is only good there.
"""

import functools
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from distill_jax import losses
from distill_jax.errors import UserError
from distill_jax.models import Params
from distill_jax.processes import main_only

FORMAT, VERSION = "distill_jax.soft_targets", 1
Mean = Literal["arithmetic", "geometric"]


class SoftTargets(NamedTuple):
    """A teacher's word on N examples.

    ids: int64 `[N]`. digests: uint64 `[N]`, of each example's input. logits: float32 `[N, C]`.
    meta: "teacher" (its fingerprint), "temperature" (None: good for all), "mean" (None: one teacher).
    """

    ids: np.ndarray
    digests: np.ndarray
    logits: np.ndarray
    meta: dict[str, Any]


def mean_log_probs(member_logits: Array, temperature: ArrayLike, mean: Mean) -> Array:
    """The logarithm of the members' mean distribution at a temperature, in log space (section 1).

    Args:
        member_logits: `[M, ..., C]`.
        temperature: scalar above 0.
        mean: of the probabilities (arithmetic) or of their logarithms, renormalised (geometric).

    Returns:
        `[..., C]` float32.
    """
    _check_mean(mean)
    log_probs = losses.log_softmax(member_logits, temperature)
    if mean == "arithmetic":
        return jax.nn.logsumexp(log_probs, axis=0) - jnp.log(jnp.float32(len(member_logits)))
    return jax.nn.log_softmax(jnp.mean(log_probs, axis=0))


def mean_probs(member_logits: Array, temperature: ArrayLike, mean: Mean) -> Array:
    """The members' mean distribution itself; arguments as for `mean_log_probs`.

    An arithmetic mean takes a tenth of the time that its logarithm takes on a CPU; a probability below
    the smallest float32 is 0.
    """
    if mean == "arithmetic":
        return jnp.mean(losses.softmax(member_logits, temperature), axis=0)
    return jnp.exp(mean_log_probs(member_logits, temperature, mean))


def mean_probs_of_hidden(hidden: Array, layer: Params, temperature: ArrayLike, mean: Mean) -> Array:
    """The mean distribution of members who are given by their last hidden layers.

    One member's logits after the other, so that those of all are never in memory together.

    Args:
        hidden: `[B, M, D]`, activations of each member; the products take its dtype.
        layer: {"kernel" `[M, D, C]`, "bias" `[M, C]`}, the members' output layers.
        temperature: scalar above 0.
        mean: as for `mean_log_probs`.

    Returns:
        `[B, C]` float32 probabilities.
    """

    def add(total: Array, member: tuple[Array, Array, Array]) -> tuple[Array, None]:
        activations, kernel, bias = member
        kernel = kernel.astype(activations.dtype)
        logits = jnp.matmul(activations, kernel, preferred_element_type=jnp.float32) + bias[None]
        term = losses.softmax if mean == "arithmetic" else losses.log_softmax
        return total + term(logits, temperature), None

    _check_mean(mean)
    count = hidden.shape[1]
    zeros = jnp.zeros((len(hidden), layer["bias"].shape[-1]), jnp.float32)
    members = (jnp.moveaxis(hidden, 1, 0), layer["kernel"], layer["bias"])
    total, _ = jax.lax.scan(add, zeros, members)
    return total / count if mean == "arithmetic" else losses.softmax(total / count)


def ensemble_logits(member_logits: Array, temperature: ArrayLike, mean: Mean) -> Array:
    """One teacher's worth of logits: `softmax(v / T)` is the members' mean at T (shapes as above)."""
    return mean_log_probs(member_logits, temperature, mean) * temperature


def _check_mean(mean: str) -> None:
    if mean not in ("arithmetic", "geometric"):
        raise UserError(f"mean must be 'arithmetic' or 'geometric', not {mean!r}")


def logits_over(
    apply: Callable[[Params, Array], Array],
    params: Params,
    inputs: np.ndarray,
    batch_size: int = 1000,
) -> np.ndarray:
    """A frozen teacher's logits over a whole data set, in one jitted pass.

    Args:
        apply: `(params, inputs [B, ...]) -> logits [B, C]`, in evaluation mode.
        params: the teacher's, or a whole ensemble's if `apply` takes that.
        inputs: `[N, ...]`.
        batch_size: examples in memory at a time.

    Returns:
        float32 `[N, C]` on the host.
    """
    size = len(inputs)
    batch_size = min(batch_size, size)
    padding = [(0, -size % batch_size)] + [(0, 0)] * (inputs.ndim - 1)
    batches = np.pad(inputs, padding).reshape(-1, batch_size, *inputs.shape[1:])
    logits = np.asarray(_map_batches(apply, params, batches), np.float32)
    return logits.reshape(-1, logits.shape[-1])[:size]


@functools.partial(jax.jit, static_argnums=0)
def _map_batches(apply: Callable[[Params, Array], Array], params: Params, batches: Array) -> Array:
    return jax.lax.map(lambda batch: apply(params, batch), batches)


def make(
    logits: np.ndarray,
    examples: Mapping[str, np.ndarray],
    teacher: str,
    temperature: float | None = None,
    mean: Mean | None = None,
) -> SoftTargets:
    """Binds logits `[N, C]` to the examples they were computed from, in the same order.

    Args:
        logits: of one teacher, or from `ensemble_logits`.
        examples: with "id" `[N]` and "inputs" `[N, ...]`.
        teacher: the teacher's fingerprint.
        temperature: where the logits are good at one temperature only.
        mean: of an ensemble.

    Raises:
        UserError: for another number of examples, repeated ids, or logits that are not finite.
    """
    ids = np.asarray(examples["id"], np.int64)
    if len(ids) != len(logits):
        raise UserError(f"{len(logits)} rows of logits for {len(ids)} examples")
    if len(np.unique(ids)) != len(ids):
        raise UserError("soft targets need examples with distinct ids")
    if not np.isfinite(logits).all():
        first = ids[np.argmin(np.isfinite(logits).all(axis=-1))]
        raise UserError(f"the teacher's logits are not finite, first for example {first}")
    meta = {"teacher": teacher, "temperature": temperature, "mean": mean}
    return SoftTargets(ids, digests(examples["inputs"]), np.asarray(logits, np.float32), meta)


def attach(
    examples: Mapping[str, np.ndarray], targets: SoftTargets, temperature: float | None = None
) -> dict[str, np.ndarray]:
    """Joins soft targets to examples by id, as their field "teacher_logits" `[N, C]`.

    The examples may be a part of the store's, in any order. Each one's input is checked against the
    one that the teacher saw, so targets can't be joined to shuffled, changed or augmented inputs.

    Args:
        examples: with "id" `[N]` and "inputs" `[N, ...]`.
        targets: from `make` or `load`.
        temperature: that training will use; None skips the check.

    Raises:
        UserError: for an id without targets, other inputs under an id, or another temperature.
    """
    made_at = targets.meta["temperature"]
    if None not in (made_at, temperature) and made_at != temperature:
        raise UserError(
            f"the soft targets are an {targets.meta['mean']} mean at temperature {made_at} and can't "
            f"be used at temperature {temperature}"
        )
    ids = np.asarray(examples["id"], np.int64)
    order = np.argsort(targets.ids)
    places = np.minimum(np.searchsorted(targets.ids, ids, sorter=order), len(order) - 1)
    rows = order[places]
    missing = ids[targets.ids[rows] != ids]
    if len(missing):
        raise UserError(
            f"{len(missing)} of {len(ids)} examples have no soft targets, first id {missing[0]}; "
            f"the store holds {len(targets.ids)} of teacher {targets.meta['teacher']}"
        )
    differs = targets.digests[rows] != digests(examples["inputs"])
    if differs.any():
        raise UserError(
            f"{differs.sum()} of {len(ids)} examples are not the inputs that teacher "
            f"{targets.meta['teacher']} saw under their ids, first id {ids[differs.argmax()]}: the "
            "data have changed since the soft targets were made; make them again"
        )
    return {**examples, "teacher_logits": targets.logits[rows]}


@main_only
def save(directory: str | os.PathLike[str], targets: SoftTargets) -> None:
    """Writes a store; it appears whole or not at all. An earlier one of that name is removed first.

    A folder with `ids.npy`, `digests.npy`, `logits.npy` and `meta.json`, which carries the format's
    version, the number of classes, and the logits' SHA-256.
    """
    directory = Path(directory)
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name in ("ids", "digests", "logits"):
        np.save(partial / f"{name}.npy", getattr(targets, name))
    meta = {
        "format": FORMAT,
        "version": VERSION,
        "encoding": "dense",
        "num_classes": targets.logits.shape[-1],
        "sha256": hashlib.sha256(targets.logits.tobytes()).hexdigest(),
        **targets.meta,
    }
    (partial / "meta.json").write_text(json.dumps(meta, indent=1))
    shutil.rmtree(directory, ignore_errors=True)
    os.replace(partial, directory)


def load(
    directory: str | os.PathLike[str], teacher: str | None = None, num_classes: int | None = None
) -> SoftTargets:
    """Opens a store; None skips a check.

    Args:
        directory: that `save` wrote.
        teacher: the fingerprint that the targets must be of.
        num_classes: C that they must have.

    Raises:
        UserError: naming both sides, for a store of another teacher or class count, of a version that
            is not known, or damaged.
    """
    directory = Path(directory)
    try:
        meta = json.loads((directory / "meta.json").read_text())
        ids, digests, logits = (
            np.load(directory / f"{name}.npy") for name in ("ids", "digests", "logits")
        )
    except Exception as error:  # NumPy raises whatever its header's parser does
        raise UserError(f"no readable soft targets in {directory}: {error}") from error
    if (meta.get("format"), meta.get("version")) != (FORMAT, VERSION):
        raise UserError(
            f"{directory} is {meta.get('format')} version {meta.get('version')}; this program reads "
            f"{FORMAT} version {VERSION}"
        )
    same = hashlib.sha256(logits.tobytes()).hexdigest() == meta["sha256"]
    if not same or logits.dtype != np.float32:  # the bytes of another dtype could be the same
        raise UserError(
            f"{directory}/logits.npy is damaged: its SHA-256 is not the one in meta.json"
        )
    if teacher is not None and meta["teacher"] != teacher:
        raise UserError(
            f"the soft targets in {directory} are of teacher {meta['teacher']}, not of {teacher}"
        )
    if num_classes is not None and meta["num_classes"] != num_classes:
        raise UserError(
            f"the soft targets in {directory} have {meta['num_classes']} classes, not {num_classes}"
        )
    kept = {name: meta[name] for name in ("teacher", "temperature", "mean")}
    return SoftTargets(ids, digests, logits, kept)


def digests(inputs: np.ndarray) -> np.ndarray:
    """A 64-bit hash of every example's input: `[N, ...]` -> uint64 `[N]`."""
    rows = np.ascontiguousarray(inputs)
    hashes = b"".join(hashlib.blake2b(row, digest_size=8).digest() for row in rows)
    return np.frombuffer(hashes, np.uint64)


def fingerprint(params: Params, config: Mapping[str, Any]) -> str:
    """16 hex digits that name a teacher: a hash of its parameters and its JSON-able config."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)}{array.dtype}{array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()[:16]
