"""What the fields of a batch, or of a set of examples, have in common: their leading axis."""

from typing import Any

import jax
import numpy as np

from distill_jax import shapes
from distill_jax.errors import UserError


def check_rows(fields: Any, size: int, what: str) -> None:
    """Raises a UserError naming a field that isn't `[size, ...]`, so that it has no rows to take or cut.

    An index beyond an array's end is clamped in compiled code: the rows of another field would be wrong.

    Args:
        fields: a tree of arrays, or of what is traced.
        size: of the leading axis.
        what: begins the message, and is followed by the size and "examples".

    Examples:
        >>> import numpy as np
        >>> from distill_jax import batches
        >>> batches.check_rows({"label": np.zeros(4), "rate": 0.5}, 4, "a batch of")
        Traceback (most recent call last):
        ...
        distill_jax.errors.UserError: a batch of 4 examples, but 'rate' is []; expected [4, ...]: ...
    """
    for path, field in jax.tree.leaves_with_path(fields):
        name = jax.tree_util.keystr(path, simple=True, separator="/") or "the field"
        if np.shape(field)[:1] != (size,) or 0 in np.shape(field):
            raise UserError(
                f"{what} {size} examples, but {name!r} is {list(np.shape(field))}; expected "
                f"[{size}, ...]: what isn't of examples belongs in the constants"
            )
        shapes.check(**{name: (field, "any *")})
