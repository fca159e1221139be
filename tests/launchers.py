"""Runs the launchers in a tree of their own, whose Python and remote tools are small stand-ins."""

import os
import subprocess
import time
from pathlib import Path

from command import ROOT

# Writes down the words it was called with.
RECORD = "#!/usr/bin/env bash\n(IFS=$'\\t'; echo \"${{0##*/}}\t$*\" >> {calls})\n{rest}"


def make_tree(directory: Path, python: str = "exit 99") -> Path:
    """The project's scripts beside an environment whose Python runs the given shell lines."""
    for name in ("launch", "experiments", "distill_jax"):
        (directory / name).symlink_to(ROOT / name)
    (directory / ".venv/bin").mkdir(parents=True)
    for extras in ("base", "cuda"):
        (directory / f".venv/installed-{extras}").touch()
    write_script(directory / ".venv/bin/python", f"#!/usr/bin/env bash\n{python}\n")
    return directory


def write_script(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def add_tool(tree: Path, path: str, lines: str = "") -> None:
    """Makes a command that writes its words to calls.txt and then runs the given lines."""
    write_script(tree / path, RECORD.format(calls=tree / "calls.txt", rest=lines))


def calls(tree: Path) -> list[list[str]]:
    lines = (tree / "calls.txt").read_text().splitlines()
    return [line.split("\t") for line in lines]


def start(tree: Path, script: str, *arguments: str, **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [str(tree / "launch" / script), *arguments],
        env={"PATH": f"{tree}/bin:{os.environ['PATH']}", "HOME": str(tree), **variables},
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def run(tree: Path, script: str, *arguments: str, **variables: str) -> str:
    """Runs to the end, which must be a good one; returns what was printed."""
    process = start(tree, script, *arguments, **variables)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    return output


def processes_of(tree: Path) -> list[str]:
    """Command lines of processes that name the tree or run in it."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            if words and (str(tree) in words or (folder / "cwd").readlink() == tree):
                found.append(words)
        except OSError:  # it has just ended
            continue
    return found


def wait_until(true, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)
