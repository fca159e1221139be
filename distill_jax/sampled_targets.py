"""Soft targets of which a few classes are drawn, each as often as its probability says.

The k largest probabilities alone are a biased estimate of the soft targets: what the other classes
have is lost, or has to be guessed. Classes that are drawn in proportion to their probabilities, with
repetition, and count 1 / draws each, are the targets on average, and so is the loss's gradient: it is
linear in the targets. Anshumann et al., "Sparse Logit Sampling", 2025, arXiv 2503.16870, draw each
class by itself. Here the draws of an example stand at equal distances on the running sum of its
probabilities (systematic sampling), so that a class of probability p is drawn `draws p` times, rounded
down or up: of the same mean, and with less variance.

They come in the order of the classes, so what is stored are the steps from one to the next: with 14,000
classes and a hundred draws mostly a byte each, where a class takes two.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from distill_jax.errors import UserError

MAX_DRAWS = 2**15
_ONE = 2.0**31


def sample(probabilities: Array, draws: int, offsets: Array) -> Array:
    """Draws classes: point j is at `(j + offset) / draws` of the running sum of the probabilities.

    Over a uniform offset the expected share of a class in the draws is its probability, of the total
    of all, to 2^-32 and the 2^-24 / draws of a float32 offset. A class of probability 0 is never drawn.

    The running sum is one of integers, in units of 2^-31: exact and never falling, whatever the order
    in which a device adds. So an example's draws are the same in every batch, on every device.

    Args:
        probabilities: `[..., C]` with sum 1; a sum that is a little off is what counts as 1.
        draws: 1..32768.
        offsets: float32 `[...]` in [0, 1), such as `offsets` gives.

    Returns:
        ids uint16 (uint32 if C > 65,536) `[..., draws]`, ascending, with repetition.
    """
    if not 1 <= draws <= MAX_DRAWS:
        raise UserError(f"draws must be 1 to {MAX_DRAWS}, not {draws}")
    units = jnp.round(probabilities.astype(jnp.float32) * _ONE).astype(jnp.uint32)
    ends = jnp.cumsum(units, axis=-1, dtype=jnp.uint32)
    points = _points(ends[..., -1], draws, offsets)
    # The first class that ends behind a point: behind it, not at it, or a probability of 0 would do.
    find = jnp.vectorize(
        lambda ends, points: jnp.searchsorted(ends, points, side="right"), signature="(c),(k)->(k)"
    )
    return find(ends, points).astype(_id_dtype(probabilities.shape[-1]))


def offsets(seed: int, rows: ArrayLike) -> Array:
    """The offsets of some examples: a function of the seed and each example's id alone.

    Args:
        seed: of all draws of a store.
        rows: integer `[n]`, ids of examples, 0..2^32 - 1.

    Returns:
        float32 `[n]`, uniform in [0, 1).
    """
    key = jax.random.key(seed, impl="threefry2x32")
    return jax.vmap(lambda row: jax.random.uniform(jax.random.fold_in(key, row)))(
        jnp.asarray(rows).astype(jnp.uint32)
    )


def as_targets(ids: np.ndarray) -> tuple[Any, Any, Any]:
    """Draws `[n, draws]` as what `losses.top_k_soft_cross_entropy` takes: a share each, and no tail.

    Returns:
        the ids, probabilities float32 `[n, 1]`, all 1 / draws, and tail float32 `[n]`, all 0.
    """
    size, draws = ids.shape
    return ids, np.full((size, 1), np.float32(1 / draws)), np.zeros(size, np.float32)


def pack(ids: np.ndarray, num_classes: int) -> np.ndarray:
    """Draws as the steps between them, in the unit that takes the fewest bytes.

    The unit's largest number means as many classes on, and no draw; it also fills up the row.

    Args:
        ids: `[n, draws]` as from `sample`, ascending.
        num_classes: C.

    Returns:
        uint8, uint16 or uint32 `[n, width]`; `width` depends on the draws and C alone.
    """
    n, draws = ids.shape
    unit, width = _packing(draws, num_classes)
    far = int(np.iinfo(unit).max)
    steps = np.asarray(np.diff(ids.astype(np.int64), axis=1, prepend=0), np.int64)
    packed = np.full((n, width), far, unit)
    places = np.arange(draws) + np.cumsum(steps // far, axis=1)
    np.put_along_axis(packed, places, (steps % far).astype(unit), axis=1)
    return packed


def unpack(packed: np.ndarray, draws: int, num_classes: int) -> np.ndarray:
    """The other way round: ids uint16 (uint32 if C > 65,536) `[n, draws]`."""
    drawn = packed != np.iinfo(packed.dtype).max
    ids = np.cumsum(packed, axis=1, dtype=np.uint32)[drawn].reshape(-1, draws)
    return ids.astype(_id_dtype(num_classes))


def most_draws(size: int, num_classes: int) -> int:
    """How many draws of an example so many bytes hold."""
    return max(size // unit.itemsize - _longest(unit, num_classes) for unit in _UNITS)


_UNITS = tuple(map(np.dtype, (np.uint8, np.uint16, np.uint32)))


def _packing(draws: int, num_classes: int) -> tuple[np.dtype, int]:
    """The unit of `pack`, and how many there are in a row."""
    widths = [(unit, draws + _longest(unit, num_classes)) for unit in _UNITS]
    return min(widths, key=lambda packing: packing[0].itemsize * packing[1])


def _longest(unit: np.dtype, num_classes: int) -> int:
    """How often a row can have to go on without a draw."""
    return (num_classes - 1) // int(np.iinfo(unit).max)


def _id_dtype(num_classes: int) -> type[np.unsignedinteger]:
    return np.uint16 if num_classes <= 2**16 else np.uint32


def _points(total: Array, draws: int, offsets: Array) -> Array:
    """`floor((j + offset) total / draws)` `[..., draws]`: uint32 below `total`, without overflow."""
    j = jnp.arange(draws, dtype=jnp.uint32)
    shift = (offsets * total.astype(jnp.float32)).astype(jnp.uint32)
    shift = jnp.minimum(shift, total - 1)[..., None]  # float32 may have rounded it up to the total
    whole, rest = jnp.divmod(total[..., None], jnp.uint32(draws))
    j = j.reshape((1,) * total.ndim + (draws,))
    return j * whole + (j * rest + shift) // jnp.uint32(draws)
