"""Soft targets of augmented views: a teacher's logits of all views of every example."""

import functools
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from distill_jax import shapes
from distill_jax.data.augment import Views
from distill_jax.errors import UserError
from distill_jax.models import Params
from distill_jax.soft_targets import identity
from distill_jax.soft_targets.writer import write


def write_views(
    folder: str | os.PathLike[str],
    apply: Callable[[Params, Array], Array],
    params: Params,
    inputs: np.ndarray,
    views: Views,
    *,
    teacher: str,
    ids: np.ndarray | None = None,
    **options: Any,
) -> None:
    """Writes a store of a teacher's logits of all views of the inputs: `[V, C]` float32 an example.

    It is keyed by the examples' ids, their inputs as they are, and the views' scheme. The teacher sees
    the views that the student will see: `views.make` makes both. To train:

        examples = soft_targets.attach(examples, soft_targets.load(folder), views=views)
        recipe = trainer.Recipe(..., transforms=[augment.random_view(views)])

    Args:
        folder: for the store.
        apply: `(params, images [B, ...]) -> logits [B, C]`, in evaluation mode: `model.apply`.
        params: the teacher's.
        inputs: images `[N, H, W, ...]`, as they are.
        views: of `data.augment`: `shifts(2)`.
        teacher: the teacher's fingerprint.
        ids: int `[N]` of the examples, distinct; None: 0..N-1.
        options: others of `soft_targets.write`: data, shard_rows, batch_size, shards, overwrite and
            progress.

    Raises:
        UserError: as `soft_targets.write`; for ids that don't fit int32, which JAX would cut.

    Examples:
        >>> import tempfile
        >>> from distill_jax import soft_targets
        >>> from distill_jax.data import augment
        >>> images = np.arange(18, dtype=np.uint8).reshape(2, 3, 3)
        >>> def apply(params, images):
        ...     return images[:, 1, :2].astype(jnp.float32) * params
        >>> views, folder = augment.shifts(1), tempfile.mkdtemp()
        >>> soft_targets.write_views(folder, apply, 2.0, images, views, teacher="t")
        >>> examples = {"id": np.array([1]), "inputs": images[1:]}
        >>> joined = soft_targets.attach(examples, soft_targets.load(folder), views=views)
        >>> joined["teacher_logits of shifts(1)"].shape
        (1, 9, 2)
    """
    shapes.check(inputs=(inputs, "number N H W *"))
    own = identity.own_ids(ids, len(inputs))
    own = np.arange(len(inputs)) if own is None else own
    if own.max() > np.iinfo(np.int32).max or own.min() < np.iinfo(np.int32).min:
        raise UserError(f"ids go from {own.min()} to {own.max()}; expected numbers of 32 bits")

    def ask(rows: np.ndarray) -> Array:
        images = jnp.asarray(inputs[rows])
        return logits_of_views(apply, views, params, images, jnp.asarray(own[rows], jnp.int32))

    num_classes = jax.eval_shape(apply, params, jnp.asarray(inputs[:1])).shape[-1]
    digests = identity.digests(inputs)
    options |= {"views": views, "num_classes": num_classes, "ids": ids, "teacher": teacher}
    write(folder, ask, digests, **options)


@functools.partial(jax.jit, static_argnums=(0, 1))
def logits_of_views(
    apply: Callable[[Params, Array], Array],
    views: Views,
    params: Params,
    images: Array,
    ids: Array,
) -> Array:
    """The program of `write_views`: logits `[B, V, C]` of all views of a batch, one after the other.

    Args:
        apply, views, params: as for `write_views`.
        images: `[B, H, W, ...]`, as they are.
        ids: int32 `[B]`.

    Examples:
        >>> from distill_jax.data import augment
        >>> images = jnp.arange(9.0).reshape(1, 3, 3)
        >>> def apply(params, images):
        ...     return params * images[:, 1, :2]
        >>> found = logits_of_views(apply, augment.shifts(1), 2.0, images, jnp.zeros(1, jnp.int32))
        >>> found.shape, found[0, 4].tolist()  # the fifth of nine shifts is none
        ((1, 9, 2), [6.0, 8.0])
    """

    def one(number: Array) -> Array:
        return apply(params, views.make(images, ids, jnp.broadcast_to(number, ids.shape)))

    return jnp.moveaxis(jax.lax.map(one, jnp.arange(views.num_views, dtype=jnp.int32)), 0, 1)
