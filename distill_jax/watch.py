"""Notices at once when a process of the run is gone.

The processes' collectives may wait for a lost one for ever, and JAX's own runtime takes its time to give
up and then aborts. So every process holds a connection to process 0, which the operating system closes
when either is killed.
"""

import atexit
import contextlib
import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

LOST = 76
"""Exit status of a process that goes because another is gone."""

_BYE = b"."
_CONNECT_SECONDS = 60


def listen() -> socket.socket:
    """The socket that process 0 is to be reached at, at a free port."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def watch_all(server: socket.socket, token: int, count: int) -> None:
    """On process 0: accepts the other `count - 1` processes and watches them in a thread.

    Args:
        server: from `listen`; closed.
        token: a secret of 31 bits that the others know; who doesn't send it is none of them.
        count: processes of the run.

    Raises:
        OSError: if one of them doesn't come in time.
    """
    server.settimeout(_CONNECT_SECONDS)
    peers: dict[socket.socket, int] = {}
    while len(peers) < count - 1:
        peer, _ = server.accept()
        peer.settimeout(_CONNECT_SECONDS)
        word = _read(peer)
        if len(word) == 8 and word[4:] == token.to_bytes(4, "big"):
            peers[peer] = int.from_bytes(word[:4], "big")
    server.close()
    _start(peers, count)


def watch_first(host: str, port: int, token: int, index: int, count: int) -> None:
    """On any other process: connects to process 0 and watches it in a thread; arguments as above.

    Raises:
        OSError: if it can't be reached.
    """
    peer = socket.create_connection((host, port), timeout=_CONNECT_SECONDS)
    peer.sendall(index.to_bytes(4, "big") + token.to_bytes(4, "big"))
    _start({peer: 0}, count)


def _start(peers: Mapping[socket.socket, int], count: int) -> None:
    for peer in peers:
        peer.settimeout(None)
    atexit.register(_say_goodbye, list(peers))
    threading.Thread(target=_watch, args=(peers, count), daemon=True).start()


def _say_goodbye(peers: list[socket.socket]) -> None:
    for peer in peers:
        with contextlib.suppress(OSError):  # it has gone before
            peer.sendall(_BYE)


def _watch(peers: Mapping[socket.socket, int], count: int) -> None:
    with selectors.DefaultSelector() as selector:
        for peer in peers:
            selector.register(peer, selectors.EVENT_READ)
        while selector.get_map():
            for key, _ in selector.select():
                source: Any = key.fileobj
                word = _read(source)
                if word == b"":
                    _leave(peers, peers[source], count)
                elif word == _BYE:
                    selector.unregister(source)
                else:  # process 0 says who is gone, and goes itself
                    _leave({}, int(word), count)


def _read(peer: socket.socket) -> bytes:
    try:
        return peer.recv(16)
    except OSError:
        return b""


def _leave(peers: Mapping[socket.socket, int], lost: int, count: int) -> None:
    """Ends this process from within its thread: the others hang in what the lost one doesn't send."""
    for peer in peers:
        with contextlib.suppress(OSError):
            peer.sendall(b"%d" % lost)
    print(
        f"process {lost} of {count} was lost; the same command goes on from the last checkpoint, with "
        "as many processes or fewer",
        file=sys.stderr,
        flush=True,
    )
    if len(peers) > 1:
        time.sleep(1)  # the others' runtime would abort them as soon as process 0 is gone
    os._exit(LOST)
