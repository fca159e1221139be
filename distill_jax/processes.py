"""Runs of several processes: how they find each other, agree, stop together, and share results.

Every process runs the same program; an array over all their devices is one array. JAX's own runtime
connects them. With one process everything here is a no-op or a plain copy.
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
"""Exit status: stopped by SIGTERM, all saved."""

_HEARTBEAT_SECONDS = 30  # a process that is silent for longer is given up, and the run with it
_CONNECT_SECONDS = 300
_PAUSE = 2.0  # seconds
_WAIT_MS = 24 * 3600 * 1000  # one process may be at work alone for long

_SIGNALS: list[int] = []  # those that asked to stop
_BARRIERS = itertools.count()
_TRAINING: list[bool] = []  # whether `loop.fit` is at work, and sees to stopping itself


def start(how: str) -> None:
    """Connects the processes of a run; call it before anything else of JAX.

    Every process says once which one it is; then process 0 alone prints.

    Args:
        how: "off" for one process by itself; "auto" where JAX knows the launcher (Slurm, Cloud TPU, Open
            MPI, Kubernetes); or "HOST:PORT,COUNT,INDEX": process 0's address, how many there are, and
            which one this is.

    Raises:
        UserError: if that can't be read, or the processes don't find each other; never is a run that
            was to have several processes started as one.
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
    # SIGTERM is ours to handle: `stop_asked`.
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
    """Waits until process 0 listens: the runtime would abort, with a message for its developers."""
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
    """Connects to process 0, at the coordinator's host and a port that it broadcasts."""
    server = process_watch.listen() if index == 0 else None
    port, token = agree(server.getsockname()[1] if server else 0), agree(secrets.randbits(31))
    if server:
        process_watch.watch_all(server, token, count())
        return
    address = distributed.global_state.coordinator_address
    assert address is not None
    process_watch.watch_first(address.rpartition(":")[0].strip("[]"), port, token, index, count())


def count() -> int:
    """How many processes the run has."""
    return jax.process_count() if jax.distributed.is_initialized() else 1


def is_main() -> bool:
    """Whether this is process 0, which alone writes results and prints."""
    return count() == 1 or jax.process_index() == 0


def wait() -> None:
    """Returns once every process of the run has called it as often as this one.

    Not a collective of devices: those give up on a process that is at work alone for long.
    """
    key = f"distill_jax_{next(_BARRIERS)}"
    ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=_WAIT_MS)


def main_only(function: Callable[_P, _R]) -> Callable[_P, _R | None]:
    """A function that process 0 calls alone; the others wait until it is done, and get None."""

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
    """Whether it is true on any process; all must call it."""
    if count() == 1:
        return value
    return bool(np.any(multihost_utils.process_allgather(np.asarray(value))))


def fetch(tree: Any) -> Any:
    """Arrays as NumPy ones, whole on every process, wherever their parts lie.

    A collective where parts lie on other processes' devices: all processes must call it.
    """
    if count() == 1:
        return jax.device_get(tree)
    return jax.tree.map(_whole, tree)


def settle(tree: Any) -> Any:
    """Waits for arrays where programs that are under way together could lock each other out.

    On CPU devices of several processes the collectives of two programs can wait for each other's
    threads for ever. Accelerators run their programs in turn.
    """
    if count() > 1 and jax.default_backend() == "cpu":
        jax.block_until_ready(tree)
    return tree


def handle_sigterm() -> None:
    """Makes SIGTERM (a notice of preemption) ask for a stop, where all is saved and agreed.

    A process by itself that isn't training is stopped at once: whatever it is at can be done again.
    """

    def ask(number: int, frame: Any) -> None:
        _SIGNALS.append(number)
        if not _TRAINING and count() == 1:
            raise Stopped("stopped by SIGTERM")

    signal.signal(signal.SIGTERM, ask)


def stop_asked() -> bool:
    """Whether this process was asked to stop."""
    return bool(_SIGNALS)


def stop_agreed(asked: Array | bool) -> bool:
    """The processes' common word of a while ago; of this process alone, if it is, its word now.

    Args:
        asked: `sharding.any_process(stop_asked())`.
    """
    return stop_asked() if count() == 1 else bool(fetch(asked))


@contextlib.contextmanager
def stopping_at_boundaries() -> Iterator[None]:
    """While this lasts, or what it decorates, SIGTERM only asks: they see to stopping themselves."""
    _TRAINING.append(True)
    try:
        yield
    finally:
        _TRAINING.pop()


def stop_if_asked() -> None:
    """Raises `Stopped` on all processes if any was asked to; they must all call it."""
    if any_of(stop_asked()):
        raise Stopped("stopped by SIGTERM")


def leave(status: int, message: str) -> NoReturn:
    """Exits with a last word on stderr. In a run of several processes at once: an exit waits for all.

    If a collective failed because another process is gone, `watch` says so in the meantime, and exits.
    Process 0 goes last: its runtime takes the others down, who may have a word of their own to say.
    """
    together = count() == 1 or status == STOPPED
    if not together:
        process_watch.ENDING.set()
        time.sleep(_PAUSE)
    print(message, file=sys.stderr, flush=True)
    sys.stdout.flush()
    if together:
        sys.exit(status)
    process_watch.tell_error(jax.process_index())
    if is_main():
        time.sleep(_PAUSE)
    os._exit(status)


def _whole(leaf: Any) -> np.ndarray:
    if not isinstance(leaf, Array) or leaf.is_fully_addressable:
        return np.asarray(leaf)
    if leaf.is_fully_replicated:
        return np.asarray(leaf.addressable_data(0))
    return multihost_utils.process_allgather(leaf, tiled=True)
