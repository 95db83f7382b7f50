"""A bad link: a TCP relay of plain bytes that slows down, delays, cuts and corrupts what passes. It knows no protocol.

    with Link("10.0.0.1:5555", rate_bytes_per_s=1e6) as link:
        connect(link.address)

It runs in threads of this process, at a gigabyte per second if it may. Made within `Host.network()` of tests/hosts.py
it is part of that host's network; `python -m tests.links` is the same as a process, told by lines on standard input.
"""

from __future__ import annotations

import argparse
import errno
import select
import socket
import struct
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

Direction = Literal["to_endpoint", "from_endpoint"]

PIECE_BYTES = 256 << 10
PIECES_PER_S = 50
"""A slow link passes on pieces of what it carries in a fiftieth of a second."""
QUEUE_BYTES = 1 << 20
QUEUE_S = 0.1
DELAYED_BYTES = 64 << 20
"""What a link of unlimited rate may have on its way while it delays."""
POLL_S = 0.05


@dataclass
class Link:
    """A relay between whoever connects to `address` and an endpoint. Every setting may be changed while it runs.

    Bytes that had been handed to the kernel when it was cut still arrive, as they would from a real wire.
    """

    endpoint: str
    """Where it leads, "address:port"."""
    listen: str = "127.0.0.1:0"
    """Where it is reached, "address:port"; port 0 takes a free one."""
    rate_bytes_per_s: float | None = None
    """Of each direction, shared by all connections. None is as fast as the machine."""
    delay_s: float = 0.0
    """Each byte arrives so much later, in each direction; takes nothing from the rate."""
    watched: Direction = "from_endpoint"
    """The direction that the next two settings count in, over all connections since the link was made."""
    cut_after_bytes: int | None = None
    """Exactly so many bytes pass, then it is cut, once. None again afterwards."""
    corrupt_after_bytes: int | None = None
    """The byte after so many has its lowest bit flipped, once. None again afterwards."""
    cut_closes: bool = False
    """Whether `cut_after_bytes` closes the connections (see `cut`)."""
    is_cut: bool = field(default=False, init=False)
    passed_bytes: dict[Direction, int] = field(init=False)
    """Bytes passed on so far, in each direction."""
    connections: int = field(default=0, init=False)
    """How many were accepted so far."""
    flipped_bits: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._changed = threading.Condition()
        self._refuses = self._closed = False
        self.passed_bytes = {"to_endpoint": 0, "from_endpoint": 0}
        self._open: set[_Connection] = set()
        self._free_at: dict[Direction, float] = {"to_endpoint": 0.0, "from_endpoint": 0.0}
        self._listener = socket.create_server(_parsed(self.listen), backlog=128)
        self._listener.settimeout(POLL_S)
        host, port = self._listener.getsockname()[:2]
        self.address = f"{host}:{port}"
        """Where to connect, "address:port"."""
        self._accepting, self._serving = _started(self._accept), list[threading.Thread]()

    def cut(self, *, close: bool = False) -> None:
        """Pass nothing on until `restore`: neither bytes nor the end of a connection, and new ones stay silent.

        With `close`, connections are reset instead, and so is every new one.
        """
        with self._changed:
            self.is_cut, self._refuses = True, close
            if close:
                self._end_all()

    def restore(self) -> None:
        """Pass on again, what was held back first."""
        with self._changed:
            self.is_cut = self._refuses = False
            self._changed.notify_all()

    def close(self) -> None:
        """Reset what is open and end."""
        with self._changed:
            self._closed = True
            self._end_all()
        self._accepting.join()
        for thread in self._serving:
            thread.join()
        self._listener.close()

    def __enter__(self) -> Link:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _accept(self) -> None:
        while not self._closed:
            try:
                client, _ = self._listener.accept()
            except TimeoutError:
                continue
            with self._changed:
                self.connections += 1
                connection = _Connection(self, client, ended=self._refuses or self._closed)
                self._open.add(connection)
            self._serving = [thread for thread in self._serving if thread.is_alive()]
            self._serving.append(_started(connection.serve))

    def _end_all(self) -> None:
        for connection in self._open:
            connection.end()

    def _due(self, direction: Direction, nbytes: int) -> float:
        """When so many bytes that come in now are due at the other end."""
        with self._changed:
            now = time.monotonic()
            if self.rate_bytes_per_s is not None:
                now = self._free_at[direction] = max(now, self._free_at[direction]) + nbytes / self.rate_bytes_per_s
            return now + self.delay_s

    def _admit(self, direction: Direction, piece: bytes) -> tuple[bytes, bytes]:
        """What of a piece passes now, as it arrives, and what is left of it. Called with the lock held."""
        start, rest = self.passed_bytes[direction], b""
        if direction == self.watched:
            if self.cut_after_bytes is not None and start + len(piece) >= self.cut_after_bytes:
                split = max(0, self.cut_after_bytes - start)
                piece, rest = piece[:split], piece[split:]
                self.cut_after_bytes, self.is_cut = None, True
            flip = self.corrupt_after_bytes
            if flip is not None and start <= flip < start + len(piece):
                at = flip - start
                piece = piece[:at] + bytes([piece[at] ^ 1]) + piece[at + 1 :]
                self.corrupt_after_bytes = None
                self.flipped_bits += 1
        self.passed_bytes[direction] += len(piece)
        return piece, rest


@dataclass(eq=False)
class _Connection:
    """One connection to the link and the one that it makes for it."""

    link: Link
    client: socket.socket
    ended: bool = False

    def serve(self) -> None:
        """Relay until both directions have ended, or `ended` is set."""
        link, sockets = self.link, [self.client]
        try:
            with link._changed:
                link._changed.wait_for(lambda: self.ended or not link.is_cut)
            if not self.ended:
                sockets.append(socket.socket())
                self._connect(sockets[1])
                there, back = _Pipe(self, "to_endpoint", *sockets), _Pipe(self, "from_endpoint", *reversed(sockets))
                for one in sockets:
                    one.settimeout(POLL_S)
                    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                for thread in [_started(act) for pipe in (there, back) for act in (pipe.read, pipe.write)]:
                    thread.join()
        except OSError:
            self.ended = True  # no such endpoint
        finally:
            for one in sockets:
                if self.ended:  # closing without waiting sends a reset
                    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                one.close()
            with link._changed:
                link._open.discard(self)

    def end(self) -> None:
        """Reset both. Called with the link's lock held."""
        self.ended = True
        self.link._changed.notify_all()

    def _connect(self, endpoint: socket.socket) -> None:
        endpoint.setblocking(False)
        error = endpoint.connect_ex(_parsed(self.link.endpoint))
        if error == errno.EINPROGRESS:
            waiting = select.poll()
            waiting.register(endpoint, select.POLLOUT)
            while not self.ended and not waiting.poll(1000 * POLL_S):
                pass
            error = endpoint.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error:
            raise OSError(error, f"no connection to {self.link.endpoint}")


class _Pipe:
    """One direction of a connection: a thread that reads and one that writes, with a queue between them.

    The queue holds bytes; b"" for the end of the stream, and None for a reset, which pass like bytes.
    """

    def __init__(
        self, connection: _Connection, direction: Direction, source: socket.socket, sink: socket.socket
    ) -> None:
        self.connection, self.link, self.direction = connection, connection.link, direction
        self.source, self.sink = source, sink
        self.queue: deque[tuple[float, bytes | None]] = deque()
        self.queued_bytes = 0

    def read(self) -> None:
        """Queue what comes in, each piece with the time at which it is due."""
        while not self.connection.ended:
            rate = self.link.rate_bytes_per_s
            try:
                most = PIECE_BYTES if rate is None else max(1, min(PIECE_BYTES, int(rate / PIECES_PER_S)))
                piece = self.source.recv(most)
            except TimeoutError:
                continue
            except OSError:
                piece = None
            self._put(piece)
            if not piece:
                return

    def write(self) -> None:
        """Pass on what is due while the link isn't cut."""
        link = self.link
        while (taken := self._take()) is not None:
            piece, cuts = taken
            try:
                if not piece and not cuts:
                    self.sink.shutdown(socket.SHUT_WR)
                    return
                view = memoryview(piece)
                while view and not self.connection.ended:
                    try:
                        view = view[self.sink.send(view) :]
                    except TimeoutError:
                        continue
            except OSError:  # nobody is there any more, which can't be told while it is cut
                with link._changed:
                    link._changed.wait_for(lambda: self.connection.ended or not link.is_cut)
                    self.connection.end()
                return
            with link._changed:
                if cuts and link.cut_closes and link.is_cut:
                    link._refuses = True
                    link._end_all()

    def _put(self, piece: bytes | None) -> None:
        link, nbytes = self.link, len(piece or b"")
        due, rate = link._due(self.direction, nbytes), link.rate_bytes_per_s
        if rate is None:
            room = QUEUE_BYTES if not link.delay_s else DELAYED_BYTES
        else:
            room = min(QUEUE_BYTES, rate * QUEUE_S) + rate * link.delay_s
        with link._changed:
            link._changed.wait_for(lambda: self.connection.ended or not piece or self.queued_bytes < room)
            self.queue.append((due, piece))
            self.queued_bytes += nbytes
            link._changed.notify_all()

    def _take(self) -> tuple[bytes, bool] | None:
        """What is to pass next (no bytes: the end), and whether it is the last before a cut. None: ended by a reset."""
        link = self.link
        with link._changed:
            while not self.connection.ended:
                wait_s = None
                if self.queue and not link.is_cut:
                    due, piece = self.queue[0]
                    wait_s = due - time.monotonic()
                    if wait_s <= 0:
                        break
                link._changed.wait(wait_s)
            else:
                return None
            self.queue.popleft()
            link._changed.notify_all()
            if piece is None:
                self.connection.end()
                return None
            if not piece:
                return piece, False
            piece, rest = link._admit(self.direction, piece)
            self.queued_bytes -= len(piece)
            if rest:
                self.queue.appendleft((due, rest))
            return piece, link.is_cut


def _parsed(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def _started(act: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    return thread


def main() -> None:
    """A link in a process of its own.

    It prints where it listens, and what has passed after each line of its input (cut, close, restore, counts); it ends
    when its input does.
    """
    parser = argparse.ArgumentParser(prog="tests.links", description=main.__doc__)
    parser.add_argument("--to", dest="endpoint", required=True, metavar="ADDRESS:PORT")
    parser.add_argument("--listen", default="127.0.0.1:0", metavar="ADDRESS:PORT")
    parser.add_argument("--rate", dest="rate_bytes_per_s", type=float, metavar="BYTES_PER_S")
    parser.add_argument("--delay", dest="delay_s", type=float, default=0.0, metavar="SECONDS")
    parser.add_argument("--watched", choices=["to_endpoint", "from_endpoint"], default="from_endpoint")
    parser.add_argument("--cut-after", dest="cut_after_bytes", type=int, metavar="BYTES")
    parser.add_argument("--corrupt-after", dest="corrupt_after_bytes", type=int, metavar="BYTES")
    parser.add_argument("--cut-closes", action="store_true")
    with Link(**vars(parser.parse_args())) as link:
        commands: dict[str, Callable[[], None]] = {
            "cut": link.cut,
            "close": lambda: link.cut(close=True),
            "restore": link.restore,
            "counts": lambda: None,
        }
        _say(f"listening {link.address}")
        for line in sys.stdin:
            commands[line.strip()]()
            counts = {**link.passed_bytes, "connections": link.connections, "flipped_bits": link.flipped_bits}
            _say(" ".join(f"{name} {count}" for name, count in counts.items()))


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
