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
from collections.abc import Iterable, Mapping
from typing import Any

LOST = 76
"""Exit status of a process that goes because another is gone."""

ENDING = threading.Event()
"""Set by a process that ends with an error of its own, and needn't be told of others'."""

# What processes tell each other: an orderly end; "!N", an error of process N; "-N", N is lost.
_BYE = b"."
_PEERS: list[socket.socket] = []
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
        word = _read(peer, 8)  # what it sends next, if it ends at once, is for the thread to read
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


def tell_error(index: int) -> None:
    """Tells the others that this process, of that number, ends with an error, and isn't lost."""
    _tell(_PEERS, b"!%d" % index)


def _start(peers: Mapping[socket.socket, int], count: int) -> None:
    for peer in peers:
        peer.settimeout(None)
    _PEERS.extend(peers)
    atexit.register(_tell, _PEERS, _BYE)
    threading.Thread(target=_watch, args=(peers, count), daemon=True).start()


def _tell(peers: Iterable[socket.socket], word: bytes) -> None:
    for peer in peers:
        with contextlib.suppress(OSError):  # it has gone before
            peer.sendall(word)


def _watch(peers: Mapping[socket.socket, int], count: int) -> None:
    with selectors.DefaultSelector() as selector:
        for peer in peers:
            selector.register(peer, selectors.EVENT_READ)
        while selector.get_map():
            for key, _ in selector.select():
                source: Any = key.fileobj
                word = _read(source) or b"-%d" % peers[source]
                if word[:1] == b"-":
                    again = "the same command goes on from the last checkpoint, with as many"
                    text = f"was lost; {again} processes or fewer"
                    _leave(peers, word, LOST, f"process {int(word[1:])} of {count} {text}")
                if word[:1] == b"!" and not ENDING.is_set():
                    text = "ended with an error, which it has printed"
                    _leave(peers, word, 1, f"process {int(word[1:])} of {count} {text}")
                selector.unregister(source)


def _read(peer: socket.socket, size: int = 16) -> bytes:
    try:
        return peer.recv(size)
    except OSError:
        return b""


def _leave(peers: Mapping[socket.socket, int], word: bytes, status: int, text: str) -> None:
    """Ends this process from within its thread: the others hang in what the lost one doesn't send.

    Process 0 passes on what it heard, and goes last: without it the others' runtime would abort them.
    """
    _tell(peers, word)
    print(text, file=sys.stderr, flush=True)
    if len(peers) > 1:
        time.sleep(1)
    os._exit(status)
