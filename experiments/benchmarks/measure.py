"""Measures time and memory of a function, in any framework."""

import ctypes
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROCESS = Path("/proc/self")
LEAST_SECONDS = 0.2  # the function is repeated for at least this long
PAUSE_SECONDS = 0.5


def seconds(run: Callable[[], Any]) -> float:
    """Mean seconds of `run`, which waits for its result, over repeated calls."""
    runs, start = 0, time.perf_counter()
    while not runs or time.perf_counter() - start < LEAST_SECONDS:
        run()
        runs += 1
    return (time.perf_counter() - start) / runs


def peak_resident(run: Callable[[], Any]) -> int | None:
    """The largest growth in bytes of the resident memory of this process during `run`, on a CPU.

    None where it can't be measured: this needs Linux and glibc.
    """
    # XLA frees the buffers of a program a little after its result is ready, and malloc keeps a part of
    # freed memory. It is returned to the system here, so that it counts when it is used again.
    time.sleep(PAUSE_SECONDS)
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
