"""Examples and numbers small enough for tests."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

CLASSES = 3


def examples(count: int, seed: int = 0, side: int = 4) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {
        "id": np.arange(100, 100 + count, dtype=np.int32),
        "inputs": random.integers(0, 256, (count, side, side), np.uint8),
        "label": random.integers(0, CLASSES, count).astype(np.int32),
    }


def teacher_logits(count: int, seed: int = 1) -> np.ndarray:
    return 3 * np.random.default_rng(seed).standard_normal((count, CLASSES)).astype(np.float32)


def hyper(**values: Any) -> dict[str, jax.Array]:
    numbers = {"learning_rate": 0.1, "temperature": 3.0, "hard_weight": 0.3, **values}
    return {name: jnp.asarray(value, jnp.float32) for name, value in numbers.items()}


def copy(tree: Any) -> Any:
    """The same values in arrays of their own, which survive a donation."""
    return jax.tree.map(jnp.copy, tree)


def assert_equal(found: Any, expected: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def assert_close(found: Any, expected: Any, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol, atol), found, expected)
