"""What the README shows works."""

import re
import subprocess
import sys

from command import ENVIRONMENT, ROOT

TEXT = (ROOT / "README.md").read_text()


def test_the_snippet_trains():
    (snippet,) = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    result = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning", "-c", snippet],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert re.fullmatch(r"loss \d+\.\d+\n", result.stdout)


def test_the_two_commands_exist():
    for command in ("launch/local.sh", "tests/run.sh"):
        assert command in TEXT and (ROOT / command).stat().st_mode & 0o100
