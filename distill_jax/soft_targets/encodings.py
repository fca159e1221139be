"""What is kept of an example's soft targets: all logits, the k largest probabilities, or drawn classes.

"top_k": the k largest probabilities and the sum of the rest. A class takes 2 bytes (4 above 65,536
classes), a probability 2 (bfloat16), the rest 4 (float32). The loss spreads the rest over the other
classes in proportion to the teacher's mean distribution (`top_k_losses.soft_cross_entropy`). So the
targets are a little biased.

"sampled": classes drawn in proportion to their probabilities, with repetition, which count 1 / k each.
They are the soft targets on average, and so is the loss's gradient, which is linear in the targets.
Anshumann et al., "Sparse Logit Sampling", 2025, arXiv 2503.16870, draw each class by itself. Here the
draws of an example stand at equal distances on the running sum of its probabilities (systematic
sampling), so that a class of probability p is drawn `k p` times, rounded down or up: the same mean with
less variance. They come in the order of the classes, so the steps from one to the next are stored: with
14,000 classes and a hundred draws mostly a byte each, where a class takes two.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from distill_jax import shapes, top_k_losses
from distill_jax.errors import UserError

Encoding = Literal["dense", "top_k", "sampled"]

FIELDS = {
    "dense": ("logits",),
    "top_k": ("classes", "probabilities", "tail"),
    "sampled": ("steps",),
}
"""The arrays that each encoding stores."""

TOP_K_FIELDS = ("teacher_ids", "teacher_probabilities", "teacher_tail")
"""The fields of a batch that `top_k_losses.soft_cross_entropy` takes: classes, probabilities, tail."""

MAX_DRAWS = 2**15

Kept = tuple[Array, Array, Array]
"""What is kept of N examples' targets: classes, probabilities and tail, as `top_k` returns them."""

_ONE = 2.0**31
_UNITS = tuple(map(np.dtype, (np.uint8, np.uint16, np.uint32)))


def top_k(probabilities: Array, k: int) -> Kept:
    """The k largest of each example's soft targets.

    The tail is what the other classes really have, and not 1 less the rounded probabilities: rounding
    moves a probability near 1 by up to 2^-9, often more than the whole tail. So probabilities and tail
    sum to 1 within a factor of 1 +- 2^-9, by which a loss weighs the example more or less.

    Args:
        probabilities: `[..., C]` with sum 1.
        k: 1..C.

    Returns:
        classes uint16 (uint32 if C > 65,536) `[..., k]`, probabilities bfloat16 `[..., k]`, falling,
        and tail float32 `[...]`, 0 if k = C.

    Raises:
        UserError: for another k.

    Examples:
        >>> classes, kept, tail = top_k(jnp.array([0.125, 0.5, 0.25, 0.125]), 2)
        >>> print(classes, kept, tail)
        [1 2] [0.5 0.25] 0.25
    """
    shapes.check(probabilities=(probabilities, "float ... C"))
    num_classes = probabilities.shape[-1]
    if not 1 <= k <= num_classes:
        raise UserError(f"k must be 1 to the number of classes, {num_classes}, not {k}")
    probabilities = probabilities.astype(jnp.float32)
    largest, classes = jax.lax.top_k(probabilities, k)
    zeros = jnp.zeros_like(largest)
    rest = jnp.put_along_axis(probabilities, classes, zeros, axis=-1, inplace=False)
    kept = largest.astype(jnp.bfloat16)
    return classes.astype(_class_dtype(num_classes)), kept, jnp.sum(rest, axis=-1)


def densify(
    classes: Array, probabilities: Array, tail: Array, tail_weights: Array | None, num_classes: int
) -> Array:
    """Dense targets float32 `[..., C]` for which the loss is the same; to measure and to test.

    Args:
        classes: integer `[..., k]`; the probabilities of a repeated class are added, a class below 0 is
            padding. NaN for one of C or more.
        probabilities: `[..., k]`, or `[..., 1]` for all k.
        tail: `[...]`.
        tail_weights: `[C]`; None spreads the tail equally.
        num_classes: C.

    Examples:
        >>> targets = densify(jnp.array([1]), jnp.array([0.75]), jnp.array(0.25), None, 3)
        >>> print(targets)
        [0.125 0.75  0.125]
    """
    shapes.check(
        classes=(classes, "int ... k"),
        probabilities=(probabilities, "float ... k|1"),
        tail=(tail, "float ..."),
        tail_weights=(tail_weights, f"float? {num_classes}"),
    )
    spread = top_k_losses.tail_distribution(classes, num_classes, tail_weights)
    dense = tail.astype(jnp.float32)[..., None] * spread
    ids, named = top_k_losses.named_classes(classes, probabilities)
    add = jnp.vectorize(lambda row, k, p: row.at[k].add(p), signature="(c),(k),(k)->(c)")
    return add(dense, jnp.maximum(ids, 0), named)


def sample(probabilities: Array, draws: int, offsets: Array) -> Array:
    """Draws classes: point j is at `(j + offset) / draws` of the running sum of the probabilities.

    Over a uniform offset the expected share of a class in the draws is its probability, divided by the
    sum of all, to 2^-32 and the 2^-24 / draws of a float32 offset. A class of probability 0 is never
    drawn.

    The running sum is one of integers, in units of 2^-31: exact and never falling, whatever the order
    in which a device adds. So an example's draws are the same in every batch, on every device.

    Args:
        probabilities: `[..., C]` with sum 1, up to rounding.
        draws: 1..32768.
        offsets: float32 `[...]` in [0, 1), such as `offsets` returns.

    Returns:
        classes uint16 (uint32 if C > 65,536) `[..., draws]`, ascending, with repetition.

    Raises:
        UserError: for another number of draws.

    Examples:
        >>> print(sample(jnp.array([0.25, 0.0, 0.75]), 4, jnp.float32(0.5)))
        [0 2 2 2]
    """
    shapes.check(probabilities=(probabilities, "float ... C"), offsets=(offsets, "float ..."))
    if not 1 <= draws <= MAX_DRAWS:
        raise UserError(f"draws must be 1 to {MAX_DRAWS}, not {draws}")
    units = jnp.round(probabilities.astype(jnp.float32) * _ONE).astype(jnp.uint32)
    ends = jnp.cumsum(units, axis=-1, dtype=jnp.uint32)
    points = _points(ends[..., -1], draws, offsets.astype(jnp.float32))
    # The first class that ends behind a point: behind it, not at it, or a probability of 0 would do.
    find = jnp.vectorize(
        lambda ends, points: jnp.searchsorted(ends, points, side="right"), signature="(c),(k)->(k)"
    )
    return find(ends, points).astype(_class_dtype(probabilities.shape[-1]))


def offsets(seed: int, ids: ArrayLike) -> Array:
    """The offsets of some examples' draws: a function of the seed and each example's id alone.

    Args:
        seed: of all draws of a store.
        ids: integer `[n]`, of which the lowest 32 bits count.

    Returns:
        float32 `[n]`, uniform in [0, 1).

    Examples:
        >>> bool((offsets(0, [7, 8, 9])[1] == offsets(0, [8])[0]))
        True
    """
    ids = np.asarray(ids) if isinstance(ids, list) else ids
    shapes.check(ids=(ids, "int n"))
    key = jax.random.key(seed, impl="threefry2x32")
    return jax.vmap(lambda id: jax.random.uniform(jax.random.fold_in(key, id)))(
        jnp.asarray(ids).astype(jnp.uint32)
    )


def as_targets(classes: np.ndarray) -> tuple[Any, Any, Any]:
    """Draws `[n, draws]` in the form of `top_k`'s result: the same loss serves both.

    Returns:
        the classes, probabilities float32 `[n, 1]`, all 1 / draws, and tail float32 `[n]`, all 0.

    Examples:
        >>> as_targets(np.array([[0, 2, 2, 5]]))[1].item()
        0.25
    """
    shapes.check(classes=(classes, "int n draws"))
    size, draws = classes.shape
    return classes, np.full((size, 1), np.float32(1 / draws)), np.zeros(size, np.float32)


def pack(classes: np.ndarray, num_classes: int) -> np.ndarray:
    """Draws as the steps between them, in the unit that takes the fewest bytes.

    The unit's largest number is a step of that many classes without a draw; it also fills up the row.

    Args:
        classes: `[n, draws]` as from `sample`, ascending.
        num_classes: C.

    Returns:
        uint8, uint16 or uint32 `[n, width]`; `width` depends on the draws and C alone.

    Examples:
        >>> pack(np.array([[3, 3, 300]]), 400)
        array([[  3,   0, 255,  42]], dtype=uint8)
    """
    if classes.size and classes.max() >= num_classes:
        raise UserError(f"a class {classes.max()} was drawn, but there are {num_classes}")
    n, draws = classes.shape
    unit, width = _packing(draws, num_classes)
    far = int(np.iinfo(unit).max)
    steps = np.asarray(np.diff(classes.astype(np.int64), axis=1, prepend=0), np.int64)
    packed = np.full((n, width), far, unit)
    places = np.arange(draws) + np.cumsum(steps // far, axis=1)
    np.put_along_axis(packed, places, (steps % far).astype(unit), axis=1)
    return packed


def unpack(packed: np.ndarray, draws: int, num_classes: int) -> np.ndarray:
    """The classes that `pack` was given: uint16 (uint32 if C > 65,536) `[n, draws]`.

    Examples:
        >>> unpack(pack(np.array([[1, 1, 300]]), 500), 3, 500).tolist()
        [[1, 1, 300]]
    """
    drawn = packed != np.iinfo(packed.dtype).max
    classes = np.cumsum(packed, axis=1, dtype=np.uint32)[drawn].reshape(-1, draws)
    return classes.astype(_class_dtype(num_classes))


def most_draws(size: int, num_classes: int) -> int:
    """The largest number of draws that `size` bytes of an example hold.

    Examples:
        >>> most_draws(100, 256), most_draws(100, 14_000)
        (99, 50)
    """
    return max(size // unit.itemsize - _longest(unit, num_classes) for unit in _UNITS)


def _packing(draws: int, num_classes: int) -> tuple[np.dtype, int]:
    """The unit of `pack`, and how many there are in a row."""
    widths = [(unit, draws + _longest(unit, num_classes)) for unit in _UNITS]
    return min(widths, key=lambda packing: packing[0].itemsize * packing[1])


def _longest(unit: np.dtype, num_classes: int) -> int:
    """How many steps without a draw a row can have."""
    return (num_classes - 1) // int(np.iinfo(unit).max)


def _class_dtype(num_classes: int) -> type[np.unsignedinteger]:
    return np.uint16 if num_classes <= 2**16 else np.uint32


def _points(total: Array, draws: int, offsets: Array) -> Array:
    """`floor((j + offset) total / draws)` `[..., draws]`: uint32 below `total`, without overflow."""
    j = jnp.arange(draws, dtype=jnp.uint32)
    shift = (offsets * total.astype(jnp.float32)).astype(jnp.uint32)
    shift = jnp.minimum(shift, total - 1)[..., None]  # float32 may have rounded it up to the total
    whole, rest = jnp.divmod(total[..., None], jnp.uint32(draws))
    j = j.reshape((1,) * total.ndim + (draws,))
    return j * whole + (j * rest + shift) // jnp.uint32(draws)
