"""Notices at once when a process of the run was killed or failed.

A collective may wait for a lost process for ever, and JAX's own runtime needs long to notice, and then
aborts. So every process holds a connection to process 0. The operating system closes it when either
process is killed.
"""

import atexit
import contextlib
import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from typing import Any

LOST = 76
"""Exit status of a process that ends because another process was lost."""

ENDING = threading.Event()
"""Set by a process that ends with an error of its own; it then ignores the errors of others."""

# The messages: "." a normal end; "!N" process N ends with an error; "-N" process N was lost.
_BYE = b"."
_PEERS: list[socket.socket] = []
_CONNECT_SECONDS = 60


def listen() -> socket.socket:
    """A socket at a free port, where process 0 accepts the other processes."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def watch_all(server: socket.socket, token: int, count: int) -> None:
    """On process 0: accepts the other `count - 1` processes and watches them in a thread.

    Args:
        server: from `listen`; it is closed here.
        token: a secret of 31 bits; a connection that does not send it is refused.
        count: number of processes of the run.

    Raises:
        OSError: if a process does not connect in time.
    """
    server.settimeout(_CONNECT_SECONDS)
    peers: dict[socket.socket, int] = {}
    while len(peers) < count - 1:
        peer, _ = server.accept()
        peer.settimeout(_CONNECT_SECONDS)
        hello = _read(peer, 8)  # no more: a next message must stay for the thread to read
        if len(hello) == 8 and hello[4:] == token.to_bytes(4, "big"):
            peers[peer] = int.from_bytes(hello[:4], "big")
    server.close()
    _start(peers, count)


def watch_first(host: str, port: int, token: int, index: int, count: int) -> None:
    """On any other process: connects to process 0 and watches it in a thread.

    Args:
        host, port: where process 0 listens.
        token, count: as for `watch_all`.
        index: number of this process.

    Raises:
        OSError: if process 0 can't be reached.
    """
    peer = socket.create_connection((host, port), timeout=_CONNECT_SECONDS)
    peer.sendall(index.to_bytes(4, "big") + token.to_bytes(4, "big"))
    _start({peer: 0}, count)


def report_error(index: int) -> None:
    """Sends the others the message that this process, number `index`, ends with an error."""
    _send(_PEERS, b"!%d" % index)


def _start(peers: Mapping[socket.socket, int], count: int) -> None:
    for peer in peers:
        peer.settimeout(None)
    _PEERS.extend(peers)
    atexit.register(_send, _PEERS, _BYE)
    threading.Thread(target=_watch, args=(peers, count), daemon=True).start()


def _send(peers: Iterable[socket.socket], message: bytes) -> None:
    for peer in peers:
        with contextlib.suppress(OSError):  # that process has ended already
            peer.sendall(message)


def _watch(peers: Mapping[socket.socket, int], count: int) -> None:
    with selectors.DefaultSelector() as selector:
        for peer in peers:
            selector.register(peer, selectors.EVENT_READ)
        while selector.get_map():
            for key, _ in selector.select():
                source: Any = key.fileobj
                message = _read(source) or b"-%d" % peers[source]
                if message[:1] == b"-":
                    text = (
                        "was lost; the same command resumes from the last checkpoint, with as many "
                        "processes or fewer"
                    )
                    _exit(peers, message, LOST, f"process {int(message[1:])} of {count} {text}")
                if message[:1] == b"!" and not ENDING.is_set():
                    text = "ended with an error, which it has printed"
                    _exit(peers, message, 1, f"process {int(message[1:])} of {count} {text}")
                selector.unregister(source)


def _read(peer: socket.socket, size: int = 16) -> bytes:
    try:
        return peer.recv(size)
    except OSError:
        return b""


def _exit(peers: Mapping[socket.socket, int], message: bytes, status: int, text: str) -> None:
    """Ends this process from the watching thread; the main thread may hang in a collective.

    Process 0 forwards the message and ends last: when it ends, JAX's runtime aborts the others.
    """
    _send(peers, message)
    print(text, file=sys.stderr, flush=True)
    if len(peers) > 1:
        time.sleep(1)
    os._exit(status)
