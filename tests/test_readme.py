"""What the README files show works."""

import importlib
import re
import subprocess
import sys

import pytest
from command import ENVIRONMENT, ROOT
from ml_collections import ConfigDict

TEXT = (ROOT / "README.md").read_text()
SPECIALISTS = (ROOT / "experiments" / "specialists" / "README.md").read_text()

PAGES = sorted(
    path
    for path in [*ROOT.glob("*.md"), *ROOT.glob("launch/*.md"), *ROOT.glob("experiments/*/*.md")]
    if path.name in ("README.md", "BUILD_NOTES.md")
)
PRINTED = (  # at the end, after progress
    r"\d+ % of test wrong\n",
    r"268 bytes an example, not 20000\nloss \d+\.\d+\n",
    r"\d+ to \d+ % of \(3000, 30\)\n",
)


@pytest.mark.parametrize("number, printed", list(enumerate(PRINTED)))
def test_the_snippets_run(number, printed):
    snippets = re.findall(r"```python\n(.*?)```", TEXT + SPECIALISTS, flags=re.DOTALL)
    assert len(snippets) == len(PRINTED)
    snippet = snippets[number]
    result = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning", "-c", snippet],
        cwd=ROOT,
        env={**ENVIRONMENT, "XLA_FLAGS": ""},  # programs that compile quickly train slowly
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert re.search(f"(^|\n){printed}$", result.stdout)


def test_the_two_commands_exist():
    for command in ("launch/local.sh", "tests/run.sh"):
        assert command in TEXT and (ROOT / command).stat().st_mode & 0o100


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
    missing = [x for x in links if not x.startswith("https:") and not (page.parent / x).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_flags_set_fields_that_configs_have(page):
    configs = [
        importlib.import_module(f"experiments.{study}.config").get_config()
        for study in ("custom", "mnist", "speech", "specialists")
    ]
    known = {name for config in configs for name in flatten(config)}
    flags = set(re.findall(r"--config\.([\w.]*\w)", page.read_text()))
    assert flags <= known


def flatten(config, prefix=""):
    """Dotted names of all fields."""
    for name, value in config.items():
        yield prefix + name
        if isinstance(value, ConfigDict):
            yield from flatten(value, f"{prefix}{name}.")
