"""Trained specialists as a folder: saved, loaded again, ready to predict; other programs can read it.

A folder holds the specialists' nets (`nets.save`), `class_sets.npy` and `corrections.npy` as in
`Specialists`, and `specialists.json` with the head's name and the other fields; written last.
"""

import os
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array

from distill_jax import files, nets
from distill_jax.errors import UserError
from distill_jax.models import Model
from distill_jax.nets import Net
from distill_jax.processes import main_only
from distill_jax.specialists.coverage import check_class_sets
from distill_jax.specialists.heads import Head, head_of

FORMAT = ("distill_jax.specialists", 2)
_META = "specialists.json"
_OWN = (_META, "class_sets.npy", "corrections.npy", *nets.FILES)
_AGAIN = "train the specialists again, or copy the folder again"


class Specialists(NamedTuple):
    """K specialists of one generalist.

    net: their networks, of K members. head: what the outputs mean. class_sets: int32 `[K, S]`, padded
    with C. corrections: float32 `[K]`, from `enrichment.dustbin_correction`; 0 if there is none to make.
    num_classes: C. generalist: the fingerprint of the net that they started from. data: the fingerprint
    of the data set that they were trained on.
    """

    net: Net
    head: Head
    class_sets: np.ndarray | Array
    corrections: np.ndarray | Array
    num_classes: int
    generalist: str = ""
    data: str = ""


@main_only
def save(
    directory: str | os.PathLike[str], specialists: Specialists, *, overwrite: bool = False
) -> None:
    """Writes specialists; they appear whole or not at all.

    Args:
        directory: for them, and nothing else.
        specialists: that are trained.
        overwrite: replaces other specialists, in one step.

    Raises:
        UserError: for a folder that holds anything else, which stays, or other specialists; for nets,
            sets or corrections that are not of as many specialists, a class that doesn't exist,
            parameters that are not nested dicts, or a head that `heads.HEADS` doesn't have.

    Examples:
        >>> import jax, numpy as np, tempfile
        >>> from distill_jax import models, nets
        >>> from distill_jax.specialists import heads, inference
        >>> model = models.mlp([8], 6)  # a specialist with this head has an output for each class
        >>> init = lambda key: model.init(key, np.zeros((1, 4), np.float32))
        >>> params = jax.vmap(init)(jax.random.split(jax.random.key(0), 2))
        >>> net = nets.Net(model, params, history=[], seconds=0.0, members=2, about={})
        >>> sets, corrections = np.array([[0, 1], [3, 5]], np.int32), np.zeros(2, np.float32)
        >>> trained = Specialists(net, heads.LOG_SUM_EXP, sets, corrections, num_classes=6)
        >>> folder = tempfile.mkdtemp() + "/specialists"
        >>> save(folder, trained)
        >>> inputs = np.random.default_rng(0).normal(size=(10, 4)).astype(np.float32)
        >>> inference.predict(load(folder), np.zeros((10, 6), np.float32), inputs).shape
        (10, 6)
    """
    arrays = _arrays(specialists)
    _check(specialists, **arrays)
    directory = files.local_path(directory)
    files.check_writable(directory, "directory")
    files.check_own_folder(directory, _OWN, "a set of specialists")
    directory.parent.mkdir(parents=True, exist_ok=True)
    with files.write_whole(directory, replace=True) as partial:
        nets.save(partial, specialists.net)
        for name, array in arrays.items():
            np.save(partial / f"{name}.npy", array)
        fields = {
            "head": specialists.head.name,
            "num_classes": specialists.num_classes,
            "generalist": specialists.generalist,
            "data": specialists.data,
            "net": files.sha256(partial / "net.json"),
            "arrays": files.sha256(partial),
        }
        if (directory / _META).exists() and not overwrite:
            there = files.read_sealed(directory / _META, FORMAT, _AGAIN)
            hint = "Name another folder, or replace them with overwrite=True"
            files.check_same(f"{directory} holds other specialists", there, fields, hint)
        files.write_sealed(partial / _META, FORMAT, fields)


def exists(directory: str | os.PathLike[str]) -> bool:
    """Whether a folder holds specialists.

    Examples:
        >>> exists("runs/none")
        False
    """
    return (files.local_path(directory) / _META).exists()


def load(
    directory: str | os.PathLike[str],
    *,
    model: Model | None = None,
    generalist: str | None = None,
    data: str | None = None,
    num_classes: int | None = None,
) -> Specialists:
    """Opens specialists, arrays of NumPy; None skips a check.

    Args:
        directory: that `save` wrote.
        model: their network, if it is a model of your own (`nets.load`).
        generalist: the fingerprint of the generalist that they must be of.
        data: the fingerprint of the data set that they must be trained on.
        num_classes: C that they must have.

    Raises:
        UserError: naming both sides, for specialists of another generalist, data set or class count; for
            a folder that is damaged or of another version; and as `nets.load`.

    Examples:
        >>> load("nowhere")
        Traceback (most recent call last):
        ...
        distill_jax.errors.UserError: nowhere/specialists.json can't be read: ...
    """
    directory = files.local_path(directory)
    meta = files.read_sealed(directory / _META, FORMAT, _AGAIN)
    expected = {"generalist": generalist, "data": data, "num_classes": num_classes}
    now = {name: value for name, value in expected.items() if value is not None}
    files.check_same(f"the specialists in {directory} are of another training", meta, now)
    files.check_sha256(directory / "net.json", meta["net"], _AGAIN)
    files.check_sha256(directory, meta["arrays"], _AGAIN)
    return Specialists(
        nets.load(directory, model),
        head_of(meta["head"]),
        class_sets=np.load(directory / "class_sets.npy"),
        corrections=np.load(directory / "corrections.npy"),
        num_classes=meta["num_classes"],
        generalist=meta["generalist"],
        data=meta["data"],
    )


def _arrays(specialists: Specialists) -> dict[str, Any]:
    return {
        "class_sets": np.asarray(specialists.class_sets, np.int32),
        "corrections": np.asarray(specialists.corrections, np.float32),
    }


def _check(specialists: Specialists, class_sets: np.ndarray, corrections: np.ndarray) -> None:
    head_of(specialists.head.name)
    count = len(class_sets)
    others = {leaf.shape[:1] for leaf in jax.tree.leaves(specialists.net.params)} - {(count,)}
    if specialists.net.members != count or others:
        raise UserError(
            f"a net of {specialists.net.members} members for {count} class sets; expected {count} "
            "specialists in every leaf of its params"
        )
    if class_sets.ndim != 2 or corrections.shape != (count,):
        raise UserError(
            f"class_sets {class_sets.shape} with corrections {corrections.shape}; expected [K, S] "
            "and [K]"
        )
    check_class_sets(class_sets, specialists.num_classes)
