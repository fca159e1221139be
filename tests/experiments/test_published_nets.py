"""The trained nets that come with the project have the errors that its tables say."""

from pathlib import Path

import pytest

import experiments
from experiments.common import extras
from experiments.common.published import check

FOLDER = Path(experiments.__file__).parent
STUDIES = sorted(path.parent.name for path in FOLDER.glob("*/published"))
BYTES = 10_000_000


@pytest.mark.parametrize("name", STUDIES)
def test_a_published_net_has_the_published_errors(name):
    found = check(FOLDER / name, extras.import_study(f"experiments.{name}.study").STUDY.published)
    assert found
    for net in found:
        assert net.agrees, net


def test_the_nets_are_small_enough_to_come_with_the_project():
    assert sum(file.stat().st_size for file in FOLDER.glob("*/published/*/*")) < BYTES
