"""Shared by the benchmarks: running a command, and worker processes that measure."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from absl import app, logging

from distill_jax.errors import UserError

Ask = Callable[[Any], dict[str, Any]]
"""Sends a worker a request as a line of JSON, and returns its answer."""


def run(main: Callable[[], None]) -> None:
    """Runs a benchmark; a UserError ends it with one line and exit status 1."""

    def guarded(argv: Sequence[str]) -> None:
        logging.set_verbosity(logging.WARNING)  # hides JAX's messages about missing backends
        if len(argv) > 1:
            raise app.UsageError(f"unexpected argument {argv[1]!r}")
        try:
            main()
        except UserError as error:
            sys.exit(f"error: {error}")

    app.run(guarded)


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
