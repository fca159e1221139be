"""Small stores that many tests read."""

import pytest
from stores import write


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write(tmp_path_factory.mktemp("whole") / "store")


@pytest.fixture(scope="module")
def sampled(tmp_path_factory):
    return write(tmp_path_factory.mktemp("sampled") / "store", encoding="sampled", k=5, seed=7)
