"""Several processes that do the work of one: none goes on, or waits, when another has ended.

A connection joins process 0 to each of the others. The operating system closes it when either ends, in whatever way
and however busy the other is; a process that fails says why before. Whoever sees that ends, too, within seconds.
Launchers end processes of their own host only.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import socket
import sys
import threading
from collections.abc import Iterator

from accelerate.utils import gather_object

from experiment.files import first_line

CONNECT_SECONDS = 120.0
GRACE_SECONDS = 5.0
"""All may fail for the same reason, and each then ends in its own words."""
_ENDED_WELL = "\n"


@contextlib.contextmanager
def watched(rank: int, count: int) -> Iterator[None]:
    """Until all processes have done this block, end this one if another fails or is killed; tell them if it fails.

    Args:
        rank, count: of this process, and how many there are. All must enter the block.
    """
    peers = _connect(rank, count)
    failed = threading.Event()
    thread = threading.Thread(target=_watch, args=(peers, failed), daemon=True)
    thread.start()
    note = _ENDED_WELL
    try:
        yield
    except BaseException as error:
        # What torch raises when the process at the other end is gone; then the thread ends this one.
        if isinstance(error, RuntimeError):
            thread.join(2 * GRACE_SECONDS)
        failed.set()
        note = f"process {rank} on {socket.gethostname()} failed: {first_line(error)}\n"
        raise
    finally:
        _tell(peers, note)
        # A thread that still waits when the interpreter ends can abort the process.
        if not failed.is_set():
            thread.join()


def _watch(peers: dict[socket.socket, str], failed: threading.Event) -> None:
    waiting = dict(peers)
    while waiting:
        for connection in select.select(list(waiting), [], [])[0]:
            name = waiting.pop(connection)
            try:
                note = connection.makefile().readline()
            except OSError:  # its host does not answer
                note = ""
            if note == _ENDED_WELL:
                continue
            said, note = bool(note), note or f"{name} was killed, or has lost its connection\n"
            _tell(waiting, note)
            if not failed.wait(GRACE_SECONDS if said else 0.0):
                sys.stdout.flush()
                print(f"\nerror: {note.strip()}; the others end, too", file=sys.stderr, flush=True)
                os._exit(1)


def _tell(peers: dict[socket.socket, str], note: str) -> None:
    for connection in peers:
        with contextlib.suppress(OSError):  # it has ended itself
            connection.sendall(note.encode())


def _connect(rank: int, count: int) -> dict[socket.socket, str]:
    """Connections and what to call the processes at their other ends: of process 0 to all others, of these to it."""
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    with socket.create_server(("", 0), family=family, backlog=count, dualstack_ipv6=dual) as server:
        server.settimeout(CONNECT_SECONDS)
        all_hosts = gather_object([(socket.gethostname(), server.getsockname()[1], secrets.token_hex())])
        names = [f"process {number} on {host}" for number, (host, _, _) in enumerate(all_hosts)]
        _, port, token = all_hosts[0]
        peers = {}
        if rank > 0:
            connection = socket.create_connection((os.environ["MASTER_ADDR"], port), CONNECT_SECONDS)
            connection.sendall(f"{token}{rank:8}".encode())
            peers[connection] = names[0]
        while rank == 0 and len(peers) < count - 1:
            try:
                connection, _ = server.accept()
            except TimeoutError:
                missing = ", ".join(name for name in names[1:] if name not in peers.values())
                raise OSError(f"port {port} of this host is not reached by {missing}") from None
            connection.settimeout(CONNECT_SECONDS)
            said = connection.recv(len(token) + 8, socket.MSG_WAITALL).decode(errors="replace")
            if secrets.compare_digest(said[:-8].encode(), token.encode()):  # else it is none of ours
                peers[connection] = names[int(said[-8:])]
    for connection in peers:
        connection.settimeout(None)
        # A host that has lost its power is noticed after 45 seconds.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in (("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 6)):
            if hasattr(socket, option):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    return peers
