"""Worker processes that measure, for benchmarks."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from distill_jax.errors import UserError

Ask = Callable[[Any], dict[str, Any]]
"""Sends a worker a request as a line of JSON, and returns its answer."""


@contextmanager
def worker(module: str, flags: Sequence[str], env: Mapping[str, str]) -> Iterator[Ask]:
    """Starts a process that runs a module and answers requests until its standard input ends.

    The `Ask` raises a UserError if the process has ended.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", module, *flags],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=dict(env),
    )
    assert process.stdin is not None and process.stdout is not None
    questions, answers = process.stdin, process.stdout

    def ask(question: Any) -> dict[str, Any]:
        print(json.dumps(question), file=questions, flush=True)
        line = answers.readline()
        if not line:
            raise UserError("a worker ended early; its own message is above")
        return json.loads(line)

    try:
        yield ask
    finally:
        questions.close()
        process.wait()
