"""Arrays of wrong shapes and dtypes, handed to every public function: only a UserError may come out."""

from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distill_jax.errors import UserError
from fuzz.calls import Call, calls

CALLS = calls()
DTYPES = ("float16", "bfloat16", "int8", "int32", "int64", "uint8", "bool", "complex64", "U3", "O")


def _other_shape(array: np.ndarray, draw: Any) -> np.ndarray:
    how = draw(st.sampled_from(("first", "last", "new", "shorter", "longer", "empty", "scalar")))
    axis = draw(st.integers(0, max(array.ndim - 1, 0)))
    if array.ndim == 0 or how == "new":
        return array[None]
    if how == "scalar":
        return array.ravel()[0]
    if how in ("first", "last"):
        return array[0] if how == "first" else array[..., 0]
    rows = {"shorter": -1, "longer": 1, "empty": -array.shape[axis]}[how] + array.shape[axis]
    return np.take(array, np.arange(rows), axis=axis, mode="clip")


def _spoil(array: np.ndarray, draw: Any) -> Any:
    """The array with another shape or dtype; or what is no array."""
    how = draw(
        st.sampled_from(("shape", "shape", "shape", "dtype", "dtype", "list", "None", "text"))
    )
    if how == "shape":
        return _other_shape(array, draw)
    if how == "dtype":
        return array.astype(jax.numpy.dtype(draw(st.sampled_from(DTYPES))))
    return {"list": array.tolist(), "None": None, "text": "inputs"}[how]


def _run(call: Call, arguments: dict[str, Any]) -> None:
    if not call.traced:
        call.function(**arguments)
        return
    # Only arrays can be traced; whatever else there is stays what it is.
    leaves, tree = jax.tree.flatten(arguments, is_leaf=lambda x: x is None or isinstance(x, list))
    fit = [
        isinstance(leaf, np.ndarray | np.generic) and leaf.dtype.kind not in "UO" for leaf in leaves
    ]

    def function(*arrays: Any) -> Any:
        mine = iter(arrays)
        return call.function(
            **tree.unflatten(
                [next(mine) if ok else leaf for ok, leaf in zip(fit, leaves, strict=True)]
            )
        )

    jax.eval_shape(function, *[leaf for ok, leaf in zip(fit, leaves, strict=True) if ok])


@pytest.mark.parametrize("name", CALLS)
def test_a_sound_call_runs(name):
    _run(CALLS[name], CALLS[name].arguments)


@settings(
    max_examples=600, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
@given(data=st.data())
def test_wrong_arrays_are_refused_in_one_line(data):
    call = CALLS[data.draw(st.sampled_from(sorted(CALLS)))]
    leaves, tree = jax.tree.flatten(call.arguments)
    at = data.draw(st.integers(0, len(leaves) - 1))
    leaves[at] = _spoil(leaves[at], data.draw)
    try:
        _run(call, tree.unflatten(leaves))
    except UserError as error:
        assert "\n" not in str(error)
