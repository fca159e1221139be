"""Eight CPU devices, programs that compile quickly, and no silent promotion of dtypes or ranks."""

import gc
import os

from command import ENVIRONMENT

os.environ.update(ENVIRONMENT)
os.environ["XLA_FLAGS"] += " --xla_force_host_platform_device_count=8"

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_collection_finish() -> None:
    # What is imported by now stays: collections need not look at it each time.
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


@pytest.fixture
def key() -> jax.Array:
    return jax.random.key(0)
