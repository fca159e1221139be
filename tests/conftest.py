"""Eight CPU devices, programs that compile quickly, and no silent promotion of dtypes or ranks."""

import os

from command import ENVIRONMENT

os.environ.update(ENVIRONMENT)
os.environ["XLA_FLAGS"] += " --xla_force_host_platform_device_count=8"

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def key() -> jax.Array:
    return jax.random.key(0)
