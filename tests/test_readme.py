"""What the README shows works."""

import re
import subprocess
import sys

import pytest
from command import ENVIRONMENT, ROOT

TEXT = (ROOT / "README.md").read_text()


PRINTED = (
    r"loss \d+\.\d+\n",
    r"\d+ bytes an example, not 20000\n",
    r"loss \d+\.\d+, gradient \(64, 14000\)\n",
    r"(net: \d/2.*\n)+\(3000, 30\) \d\d % to \d\d %\n",
)


@pytest.mark.parametrize("number, printed", list(enumerate(PRINTED)))
def test_the_snippets_run(number, printed):
    snippets = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    assert len(snippets) == len(PRINTED)
    snippet = snippets[number]
    result = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning", "-c", snippet],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert re.fullmatch(printed, result.stdout)


def test_the_two_commands_exist():
    for command in ("launch/local.sh", "tests/run.sh"):
        assert command in TEXT and (ROOT / command).stat().st_mode & 0o100
