"""Teachers whose classes are not the student's: some it lacks, some the student has no use for."""

import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import ArrayLike

from distill_jax import shapes
from distill_jax.errors import UserError


def map_classes(logits: Array, class_map: ArrayLike) -> Array:
    """A teacher's logits as those of the student's classes.

    A class that the teacher lacks gets -inf, a class that the student lacks goes. So the soft targets at
    any temperature are the teacher's probabilities of the classes they share, divided by their sum:
    `p_s = p_t(map(s)) / sum_{s'} p_t(map(s'))` over the s' that the teacher has, and 0 for the rest. To
    leave the rest out of the student's softmax too, train with `step_losses.shared_classes_loss`.

    Args:
        logits: `[..., C]` of the teacher.
        class_map: int `[S]`, for each of the student's classes the teacher's, or below 0 if it has none.
            No class may be there twice: to add several up, hand over probabilities of your own.

    Returns:
        `[..., S]` float32.

    Raises:
        UserError: for a wrong map: a class twice or beyond C, or no shared class.

    Examples:
        >>> from distill_jax import losses
        >>> mapped = map_classes(jnp.array([1.0, 2.0, 3.0, 1.0]), [3, -1, 0])
        >>> print(mapped, losses.softmax(mapped))
        [  1. -inf   1.] [0.5 0.  0.5]
    """
    num_classes = shapes.check(logits=(logits, "number ... C"))["C"]
    classes = check_class_map(class_map, num_classes)
    taken = logits.astype(jnp.float32)[..., np.maximum(classes, 0)]
    lacking = np.broadcast_to(classes < 0, taken.shape[-1:]).reshape(
        (1,) * (taken.ndim - 1) + (-1,)
    )
    return jnp.where(lacking, -jnp.inf, taken)


def check_class_map(class_map: ArrayLike, num_classes: int) -> np.ndarray:
    """A class map as int32 `[S]`, or the UserErrors of `map_classes`; `num_classes` is the teacher's C.

    Examples:
        >>> check_class_map([2, 2, 0], 3)
        Traceback (most recent call last):
        ...
        distill_jax.errors.UserError: class_map has the teacher's class 2 for several of the student's
    """
    classes = np.asarray(class_map)
    if classes.ndim != 1 or not np.issubdtype(classes.dtype, np.integer) or not classes.size:
        raise UserError(
            f"class_map is {shapes.describe(classes)}; expected whole numbers [S], for each of the "
            "student's classes the teacher's, or -1"
        )
    classes = np.maximum(classes.astype(np.int64), -1)
    shared, counts = np.unique(classes[classes >= 0], return_counts=True)
    if not shared.size:
        raise UserError("class_map has no class that the teacher and the student share")
    if shared[-1] >= num_classes:
        raise UserError(f"class_map has a class {shared[-1]}; the teacher has {num_classes}")
    if counts.max() > 1:
        twice = shared[counts.argmax()]
        raise UserError(f"class_map has the teacher's class {twice} for several of the student's")
    return classes.astype(np.int32)
