"""The trained nets that come with the project have the errors that its tables say."""

from pathlib import Path

from command import run

import experiments

FOLDER = Path(experiments.__file__).parent
BYTES = 10_000_000


def test_published_nets_have_the_published_errors():
    lines = run(module="experiments.check_published").splitlines()
    studies = [line.partition(",")[0] for line in lines]
    assert studies == ["mnist", "speech", "specialists", "specialists"]
    assert all(line.endswith("agrees") for line in lines)


def test_the_nets_are_small_enough_to_come_with_the_project():
    assert sum(file.stat().st_size for file in FOLDER.glob("*/published/*/*")) < BYTES
