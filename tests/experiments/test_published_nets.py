"""The trained nets that come with the project have the errors that its tables say."""

from pathlib import Path

from command import run

import experiments

FOLDER = Path(experiments.__file__).parent
BYTES = 10_000_000


def test_published_nets_have_the_published_errors():
    lines = run(module="experiments.check_published").splitlines()
    published = {path.parent.name for path in FOLDER.glob("*/published")}
    assert "mnist" in published
    for name in ("mnist", "speech", "specialists"):
        own = [line for line in lines if line.startswith(name)]
        assert own and all(
            line.endswith("agrees") if name in published else "no nets are published yet" in line
            for line in own
        )


def test_the_nets_are_small_enough_to_come_with_the_project():
    assert sum(file.stat().st_size for file in FOLDER.glob("*/published/*/*")) < BYTES
