"""The time and the memory that a piece of work takes, in whatever framework."""

import ctypes
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROCESS = Path("/proc/self")
LEAST_SECONDS = 0.2  # so long the work is repeated
SETTLE_SECONDS = 0.5


def seconds(run: Callable[[], Any]) -> float:
    """Seconds of one `run`, which waits for its result: the mean of as many as fill a fifth of one."""
    runs, start = 0, time.perf_counter()
    while not runs or time.perf_counter() - start < LEAST_SECONDS:
        run()
        runs += 1
    return (time.perf_counter() - start) / runs


def peak_resident(run: Callable[[], Any]) -> int | None:
    """Bytes by which the resident memory of this process grows at most while `run` runs, on a CPU.

    None where that can't be measured: it takes Linux and glibc.
    """
    # Threads of XLA free a program's buffers a little after its result is there. What is freed, malloc
    # keeps in part; it is given back here, so that it counts when it is used again.
    time.sleep(SETTLE_SECONDS)
    try:
        ctypes.CDLL(None).malloc_trim(0)
        # Sets VmHWM back to VmRSS: man proc_pid_clear_refs.
        (PROCESS / "clear_refs").write_text("5")
    except (AttributeError, OSError):
        return None
    before = _read_bytes("VmRSS")
    run()
    return _read_bytes("VmHWM") - before


def _read_bytes(name: str) -> int:
    match = re.search(rf"^{name}:\s*(\d+) kB$", (PROCESS / "status").read_text(), re.MULTILINE)
    assert match is not None
    return 1024 * int(match[1])
