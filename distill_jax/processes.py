"""Runs of several processes: they connect, agree on values, stop together and share results.

Every process runs the same program, and an array may lie on the devices of all of them. JAX's own
runtime connects them. With one process everything here is a no-op or a plain copy.
"""

import contextlib
import functools
import itertools
import os
import re
import secrets
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, ParamSpec, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax import Array
from jax._src import distributed  # for the coordinator's address, which has no public name
from jax.experimental import multihost_utils

from distill_jax import process_watch
from distill_jax.errors import Stopped, UserError

_P = ParamSpec("_P")
_R = TypeVar("_R")

STOPPED = 75
"""Exit status after a stop by SIGTERM; everything is saved."""

_HEARTBEAT_SECONDS = 30  # after this silence a process counts as lost, and the run ends
_CONNECT_SECONDS = 300
_PAUSE = 2.0  # seconds
_WAIT_MS = 24 * 3600 * 1000  # process 0 may work alone for hours

_SIGNALS: list[int] = []  # the signals that asked for a stop
_BARRIERS = itertools.count()
_TRAINING: list[bool] = []  # not empty while code runs that handles stops itself


def start(how: str) -> None:
    """Connects the processes of a run; call it before anything else of JAX.

    Every process prints one line that identifies it; after that only process 0 prints.

    Args:
        how: "off" for a single process; "auto" where JAX knows the launcher (Slurm, Cloud TPU, Open
            MPI, Kubernetes); or "HOST:PORT,COUNT,INDEX": the address of process 0, the number of
            processes, and the index of this one.

    Raises:
        UserError: if `how` can't be parsed or the processes can't connect. A run of several processes
            never starts as a single one.
    """
    if how == "off":
        return
    address = re.fullmatch(r"([^,\s]+:\d+),(\d+),(\d+)", how)
    if how != "auto" and not (address and int(address[3]) < int(address[2])):
        raise UserError(
            f"--distributed={how}: expected auto, off or HOST:PORT,COUNT,INDEX with an INDEX below "
            "COUNT, such as 10.0.0.1:7000,4,0"
        )
    options: dict[str, Any] = {}
    if address:
        options = {
            "coordinator_address": address[1],
            "num_processes": int(address[2]),
            "process_id": int(address[3]),
        }
        if options["process_id"]:
            _await_first(address[1], how)
    print(
        f"--distributed={how}: waiting for all processes, at most {_CONNECT_SECONDS} s", flush=True
    )
    # SIGTERM is handled here: `handle_sigterm`.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
            initialization_timeout=_CONNECT_SECONDS,
            **options,
        )
        _watch(jax.process_index())
    except (RuntimeError, ValueError, KeyError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"--distributed={how}: the processes of the run could not be connected: {reason}"
        ) from error
    index = jax.process_index()
    devices = ", ".join(str(device) for device in jax.local_devices())
    sys.stdout.write(
        f"process {index} of {count()} is {os.getpid()} on {socket.gethostname()}: "
        f"{jax.local_device_count()} of {jax.device_count()} devices ({devices})\n"
    )
    sys.stdout.flush()
    if index:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (for as long as the process lives)


def _await_first(address: str, how: str) -> None:
    """Waits until process 0 listens. Without this JAX's runtime aborts with an obscure message."""
    host, _, port = address.rpartition(":")
    until = time.monotonic() + _CONNECT_SECONDS
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=1).close()
            return
        except OSError as error:
            if time.monotonic() > until:
                raise UserError(
                    f"--distributed={how}: process 0 could not be reached within {_CONNECT_SECONDS} "
                    f"s: {error}"
                ) from error
            time.sleep(0.2)


def _watch(index: int) -> None:
    """Watches process 0 (or, on it, all others) at the coordinator's host and a broadcast port."""
    server = process_watch.listen() if index == 0 else None
    port, token = agree(server.getsockname()[1] if server else 0), agree(secrets.randbits(31))
    if server:
        process_watch.watch_all(server, token, count())
        return
    address = distributed.global_state.coordinator_address
    assert address is not None
    process_watch.watch_first(address.rpartition(":")[0].strip("[]"), port, token, index, count())


def count() -> int:
    """Number of processes of the run."""
    return jax.process_count() if jax.distributed.is_initialized() else 1


def is_main() -> bool:
    """Whether this is process 0, the only one that writes results and prints."""
    return count() == 1 or jax.process_index() == 0


def wait() -> None:
    """A barrier: returns once every process has called it.

    It does not use a collective of devices: those time out while process 0 works alone.
    """
    key = f"distill_jax_{next(_BARRIERS)}"
    ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=_WAIT_MS)


def main_only(function: Callable[_P, _R]) -> Callable[_P, _R | None]:
    """Decorates a function so that only process 0 runs it; the others wait and get None."""

    @functools.wraps(function)
    def call(*arguments: _P.args, **options: _P.kwargs) -> _R | None:
        result = function(*arguments, **options) if is_main() else None
        wait()
        return result

    return call


def agree(value: int) -> int:
    """Process 0's value, on every process."""
    if count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def any_of(value: bool) -> bool:
    """Whether `value` is true on any process; all processes must call it."""
    if count() == 1:
        return value
    return bool(np.any(multihost_utils.process_allgather(np.asarray(value))))


def fetch(tree: Any) -> Any:
    """A tree of arrays as whole NumPy arrays, on every process.

    Where parts lie on devices of other processes it is a collective, which all processes must call.
    """
    if count() == 1:
        return jax.device_get(tree)
    return jax.tree.map(_whole, tree)


def serialize_on_cpu(tree: Any) -> Any:
    """Returns `tree`; on CPU devices of several processes, waits first until its arrays are ready.

    There the collectives of two programs that run at the same time can wait for each other's threads
    for ever. Accelerators run one program at a time.
    """
    if count() > 1 and jax.default_backend() == "cpu":
        jax.block_until_ready(tree)
    return tree


def handle_sigterm() -> None:
    """Makes SIGTERM (sent before a preemption) ask for a stop, which follows once all is saved.

    A single process that is not training stops at once, since its work can be repeated.
    """

    def ask(number: int, frame: Any) -> None:
        _SIGNALS.append(number)
        if not _TRAINING and count() == 1:
            raise Stopped("stopped by SIGTERM")

    signal.signal(signal.SIGTERM, ask)


def stop_asked() -> bool:
    """Whether this process was asked to stop."""
    return bool(_SIGNALS)


def any_stop_asked(asked: Array | bool) -> bool:
    """Whether any process was asked to stop; the same answer on all processes.

    Args:
        asked: `sharding.any_process(stop_asked())`, dispatched earlier. With one process it is
            ignored: `stop_asked` is read again, which is newer.
    """
    return stop_asked() if count() == 1 else bool(fetch(asked))


@contextlib.contextmanager
def stopping_at_boundaries() -> Iterator[None]:
    """A context (or decorator) whose code handles stops itself: in it SIGTERM only sets `stop_asked`."""
    _TRAINING.append(True)
    try:
        yield
    finally:
        _TRAINING.pop()


def stop_if_asked() -> None:
    """Raises `Stopped` on all processes if any was asked to stop; they must all call it."""
    if any_of(stop_asked()):
        raise Stopped("stopped by SIGTERM")


def exit_process(status: int, message: str) -> NoReturn:
    """Prints a message on stderr and exits.

    In a run of several processes an error ends this one with `os._exit`, because a normal exit waits
    for the others. A collective may have failed because another process was lost: the pause gives
    `process_watch` the time to report that instead. Process 0 ends last: when it ends, JAX's runtime
    aborts the others, which may still have messages to print.
    """
    together = count() == 1 or status == STOPPED
    if not together:
        process_watch.ENDING.set()
        time.sleep(_PAUSE)
    print(message, file=sys.stderr, flush=True)
    sys.stdout.flush()
    if together:
        sys.exit(status)
    process_watch.report_error(jax.process_index())
    if is_main():
        time.sleep(_PAUSE)
    os._exit(status)


def _whole(leaf: Any) -> np.ndarray:
    if not isinstance(leaf, Array) or leaf.is_fully_addressable:
        return np.asarray(leaf)
    if leaf.is_fully_replicated:
        return np.asarray(leaf.addressable_data(0))
    return multihost_utils.process_allgather(leaf, tiled=True)
