"""Runs tasks in parallel processes, with progress."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Sequence
from typing import Any

from distill_jax.errors import UserError


def run_all(
    function: Callable[[Any], Any], tasks: Sequence[Any], processes: int, did: str, unit: str
) -> None:
    """Calls `function` on every task, in parallel; its results are the files that it writes.

    Args:
        function: at the top level of a module, because it is called in spawned processes.
        tasks: the argument of each call.
        processes: maximum of parallel processes; 0 for one per core.
        did, unit: verb and noun for progress lines such as "aligned 3/20 parts".

    Raises:
        UserError: if a process was killed. Exceptions of `function` are passed on.
    """
    if not tasks:
        return
    begun = time.monotonic()
    count = min(processes or os.cpu_count() or 1, len(tasks))
    # Spawned, so that they inherit no modules or threads of the parent.
    context = multiprocessing.get_context("spawn")
    with context.Pool(count, _leave_interrupts_to_the_parent) as pool:
        workers = set(multiprocessing.active_children())
        results = pool.imap_unordered(function, tasks)
        for done in range(1, len(tasks) + 1):
            _wait_for_one(results, workers, did)
            seconds = time.monotonic() - begun
            left = seconds / done * (len(tasks) - done)
            if done % max(1, len(tasks) // 20) == 0 or done == len(tasks):
                print(
                    f"{did} {done}/{len(tasks)} {unit}, "
                    f"{int(left // 60)}:{int(left % 60):02d} to go",
                    flush=True,
                )


def _wait_for_one(results: Any, workers: set[Any], did: str) -> None:
    """Waits for the next task; the pool itself would wait for ever for a worker that died."""
    while True:
        try:
            results.next(timeout=1.0)
            return
        except multiprocessing.TimeoutError:
            if not workers <= set(multiprocessing.active_children()):
                raise UserError(
                    f"a process that {did} was killed (is there too little memory?); the same "
                    "command resumes, --processes=1 needs the least memory"
                ) from None


def _leave_interrupts_to_the_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
