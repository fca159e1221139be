"""Trained specialists as a folder that other programs can open.

`params.npz` holds the parameters of all K by their paths, such as "hidden_0/kernel" `[K, D, H]`;
`class_sets.npy` and `corrections.npy` are as in `Specialists`; `meta.json` has the format's version,
what `Specialists.meta` says, the parameters' dtypes and a SHA-256. NumPy has no bfloat16: such an
array is stored as its bits, uint16.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array

from distill_jax.errors import UserError
from distill_jax.models import Params
from distill_jax.processes import main_only
from distill_jax.specialists.inference import check_class_sets

FORMAT, VERSION = "distill_jax.specialists", 1
FILES = ("params.npz", "class_sets.npy", "corrections.npy")
META = ("generalist", "data", "num_classes", "kind")


class Specialists(NamedTuple):
    """K specialists of one generalist.

    params: nested dicts, each leaf `[K, ...]`. class_sets: int32 `[K, S]`, padded with C.
    corrections: float32 `[K]`, from `enrichment.dustbin_correction`; 0 if there is none to make.
    meta: "generalist" (the fingerprint of the one that they started from, `soft_targets.fingerprint`),
    "data" (the data set's fingerprint), "num_classes" (C) and "kind" (a word for what the outputs are).
    """

    params: Params
    class_sets: np.ndarray | Array
    corrections: np.ndarray | Array
    meta: dict[str, Any]


@main_only
def save(directory: str | os.PathLike[str], specialists: Specialists) -> None:
    """Writes specialists; they appear whole or not at all. Earlier ones of that name are removed first.

    Raises:
        UserError: for parameters, sets or corrections that are not of as many specialists, a class that
            doesn't exist, parameters that are not nested dicts, or another meta than the four entries.
    """
    params = _by_path(specialists.params)
    class_sets = np.asarray(specialists.class_sets, np.int32)
    corrections = np.asarray(specialists.corrections, np.float32)
    _check(params, class_sets, corrections, specialists.meta)
    directory = Path(directory)
    partial = _partial(directory)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    leaves: dict[str, Any] = {path: _plain(leaf) for path, leaf in params.items()}
    np.savez(partial / "params.npz", **leaves)
    np.save(partial / "class_sets.npy", class_sets)
    np.save(partial / "corrections.npy", corrections)
    dtypes = {path: leaf.dtype.name for path, leaf in params.items()}
    meta = {"format": FORMAT, "version": VERSION, **specialists.meta, "dtypes": dtypes}
    meta["sha256"] = _sha256(partial, meta)
    (partial / "meta.json").write_text(json.dumps(meta, indent=1))
    shutil.rmtree(directory, ignore_errors=True)
    os.replace(partial, directory)


def load(
    directory: str | os.PathLike[str],
    generalist: str | None = None,
    data: str | None = None,
    num_classes: int | None = None,
) -> Specialists:
    """Opens specialists, arrays of NumPy; None skips a check.

    Args:
        directory: that `save` wrote.
        generalist: the fingerprint of the generalist that they must be of.
        data: the fingerprint of the data set that they must be trained on.
        num_classes: C that they must have.

    Raises:
        UserError: naming both sides, for specialists of another generalist, data set or class count, or
            of a version that is not known; for a folder that is damaged, or was not written to its end.
    """
    directory = Path(directory)
    meta = _read_meta(directory)
    _check_whole(directory, meta)
    expected = {"generalist": generalist, "data": data, "num_classes": num_classes}
    differences = [
        f"{name} {meta[name]!r}, not {value!r}"
        for name, value in expected.items()
        if value is not None and meta[name] != value
    ]
    if differences:
        raise UserError(f"the specialists in {directory} have {'; '.join(differences)}")
    with np.load(directory / "params.npz") as stored:
        params = _nested({path: stored[path].view(name) for path, name in meta["dtypes"].items()})
    class_sets, corrections = (np.load(directory / name) for name in FILES[1:])
    return Specialists(params, class_sets, corrections, {name: meta[name] for name in META})


def _check(
    params: Mapping[str, np.ndarray],
    class_sets: np.ndarray,
    corrections: np.ndarray,
    meta: Mapping[str, Any],
) -> None:
    if meta.keys() != set(META):
        raise UserError(f"specialists' meta has {sorted(meta)}; expected {sorted(META)}")
    shapes = {path: leaf.shape for path, leaf in params.items()}
    count = len(class_sets)
    others = [path for path, shape in shapes.items() if shape[:1] != (count,)]
    if others:
        raise UserError(
            f"params have {others[0]} {shapes[others[0]]} for {count} class sets; expected {count} "
            "specialists in every leaf"
        )
    if class_sets.ndim != 2 or corrections.shape != (count,):
        raise UserError(
            f"class_sets {class_sets.shape} with corrections {corrections.shape}; expected [K, S] "
            "and [K]"
        )
    check_class_sets(class_sets, meta["num_classes"])


def _by_path(params: Params) -> dict[str, np.ndarray]:
    """The leaves of nested dicts by their names, joined by slashes."""
    leaves = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        names: list[Any] = [getattr(entry, "key", None) for entry in path]
        if not names or not all(isinstance(name, str) and "/" not in name for name in names):
            raise UserError(
                "specialists' params must be nested dicts with names without '/', but have a leaf at "
                f"params{jax.tree_util.keystr(path)}"
            )
        leaves["/".join(names)] = np.asarray(leaf)
    return leaves


def _nested(leaves: Mapping[str, np.ndarray]) -> Params:
    """The inverse of `_by_path`."""
    params: Params = {}
    for path, leaf in leaves.items():
        *outer, name = path.split("/")
        place = params
        for key in outer:
            place = place.setdefault(key, {})
        place[name] = leaf
    return params


def _plain(leaf: np.ndarray) -> np.ndarray:
    """An array of a dtype that NumPy's files know, of the same bits."""
    return leaf if leaf.dtype.isbuiltin == 1 else leaf.view(f"uint{8 * leaf.dtype.itemsize}")


def _partial(directory: Path) -> Path:
    return directory.with_name(directory.name + ".partial")


def _sha256(directory: Path, meta: Mapping[str, Any]) -> str:
    """Of all that a folder says: its meta, less this, and its arrays' files."""
    digest = hashlib.sha256(json.dumps(meta, sort_keys=True).encode())
    for name in FILES:
        with (directory / name).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _read_meta(directory: Path) -> dict[str, Any]:
    try:
        meta = dict(json.loads((directory / "meta.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        left = _partial(directory)
        if left.exists() and not directory.exists():
            raise UserError(
                f"the specialists in {directory} were not written to the end: a killed program left "
                f"{left}; give the command that wrote it again"
            ) from error
        raise UserError(f"no readable specialists in {directory}: {error}") from error
    if (meta.get("format"), meta.get("version")) != (FORMAT, VERSION):
        raise UserError(
            f"{directory} is {meta.get('format')} version {meta.get('version')}; this program reads "
            f"{FORMAT} version {VERSION}"
        )
    return meta


def _check_whole(directory: Path, meta: Mapping[str, Any]) -> None:
    described = {name: value for name, value in meta.items() if name != "sha256"}
    try:
        whole = _sha256(directory, described) == meta.get("sha256")
    except OSError as error:
        raise UserError(f"{directory} is damaged: {error}") from error
    if not whole:
        raise UserError(f"{directory} is damaged: its SHA-256 is not the one in meta.json")
