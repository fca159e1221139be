"""What compilers of other machines need."""

import jax
import pytest

from experiments.compiled import targets


@pytest.fixture(scope="module")
def compilers():
    with pytest.MonkeyPatch.context() as patch:
        for name, value in targets.QUIET.items():
            patch.setenv(name, value)
        # Optax's schedules rely on it.
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            yield
