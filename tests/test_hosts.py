"""Hosts and links for tests do what they say: hosts share nothing, links spoil bytes as told, nothing is left."""

from __future__ import annotations

import os
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress

import psutil
import pytest

from tests.hosts import ROOT, Host, HostError, can_make_hosts, hosts, processes_with
from tests.links import Link

REASON = can_make_hosts()
needs_hosts = pytest.mark.skipif(REASON is not None, reason=str(REASON))
DEADLINE_S = 30.0
SILENCE_S = 0.4
"""Within which something would have arrived, had it been passed on."""
CONTENT = os.urandom(3 << 20)
PIPES = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}

HOLD_MEMORY = """
import os, sys
fd = os.memfd_create("weights"); os.write(fd, b"mine"); print(f"/proc/{os.getpid()}/fd/{fd}", flush=True)
sys.stdin.read()
"""
MAKE_AND_WAIT = """
import time
from tests.hosts import hosts
with hosts("a", "b") as (a, b):
    a.popen(["sleep", "1000"])
    print(a.mark, flush=True)
    time.sleep(1000)
"""


class Endpoint(socketserver.ThreadingTCPServer):
    """A server that answers each connection with its content, then hears it out."""

    daemon_threads = True

    def __init__(self, address: str = "127.0.0.1") -> None:
        super().__init__((address, 0), socketserver.BaseRequestHandler)
        self.heard: list[bytes] = []
        self.address = f"{address}:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def finish_request(self, request: socket.socket, client_address: object) -> None:
        with suppress(OSError):
            request.sendall(CONTENT)
            self.heard.append(rest_of(request))

    def close(self) -> None:
        self.shutdown()
        self.server_close()


def connected(address: str, timeout_s: float = DEADLINE_S) -> socket.socket:
    host, port = address.split(":")
    return socket.create_connection((host, int(port)), timeout_s)


def rest_of(connection: socket.socket) -> bytes:
    """Everything until the other side has sent its last byte."""
    return b"".join(iter(lambda: connection.recv(1 << 20), b""))


def fetched(address: str) -> bytes:
    """What an endpoint answers."""
    with connected(address) as connection:
        connection.shutdown(socket.SHUT_WR)
        return rest_of(connection)


def first_of(connection: socket.socket, nbytes: int = 1) -> bytes:
    """The next so many bytes."""
    content = b""
    while len(content) < nbytes and (piece := connection.recv(nbytes - len(content))):
        content += piece
    return content


def is_silent(connection: socket.socket) -> bool:
    """Whether nothing comes for a while: neither a byte nor the connection's end nor an error."""
    connection.settimeout(SILENCE_S)
    try:
        connection.recv(1)
    except TimeoutError:
        return True
    finally:
        connection.settimeout(DEADLINE_S)
    return False


def assert_resets(address: str) -> None:
    """A new connection there is reset: at once, or at its first byte."""
    with pytest.raises(ConnectionResetError), connected(address) as connection:
        connection.recv(1)


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    made = Endpoint()
    yield made
    made.close()


@pytest.fixture
def pair() -> Iterator[tuple[Host, Host]]:
    with hosts("a", "b", shm_bytes=8 << 20) as made:
        yield made


def test_a_good_link_changes_nothing_and_counts_both_directions(endpoint):
    with Link(endpoint.address) as link:
        with connected(link.address) as connection:
            connection.sendall(b"question")
            connection.shutdown(socket.SHUT_WR)
            assert rest_of(connection) == CONTENT
        assert endpoint.heard == [b"question"]
        assert link.passed_bytes == {"to_endpoint": 8, "from_endpoint": len(CONTENT)}
        assert fetched(link.address) == CONTENT
        assert (link.connections, link.passed_bytes["from_endpoint"]) == (2, 2 * len(CONTENT))


def test_a_slow_link_takes_as_long_as_its_rate_says(endpoint):
    with Link(endpoint.address, rate_bytes_per_s=6 << 20) as link:  # 3 MiB at 6 MiB/s take half a second
        start = time.monotonic()
        assert fetched(link.address) == CONTENT
        assert time.monotonic() - start >= 0.5 / 1.5


def test_a_long_link_delays_both_directions_and_keeps_its_rate(endpoint):
    with Link(endpoint.address, delay_s=0.15) as link, connected(link.address) as connection:
        start = time.monotonic()
        connection.shutdown(socket.SHUT_WR)
        assert rest_of(connection) == CONTENT
        assert time.monotonic() - start >= 2 * 0.15  # the endpoint ends only when it has heard us out


def test_a_cut_link_passes_nothing_and_goes_on_when_it_is_restored(endpoint):
    with Link(endpoint.address, rate_bytes_per_s=8 << 20) as link, connected(link.address) as connection:
        start = first_of(connection)
        link.cut()
        passed = link.passed_bytes["from_endpoint"]
        assert passed < len(CONTENT)
        start += first_of(connection, passed - 1)
        assert is_silent(connection)
        with connected(link.address) as new:  # the kernel takes the connection, and that is all
            assert is_silent(new)
            link.restore()
            assert first_of(new) == CONTENT[:1]
        connection.shutdown(socket.SHUT_WR)
        assert start + rest_of(connection) == CONTENT


def test_a_link_that_is_closed_resets_connections_and_refuses_new_ones_until_it_is_restored(endpoint):
    with Link(endpoint.address, rate_bytes_per_s=1 << 20) as link:
        with connected(link.address) as connection:
            assert first_of(connection)
            link.cut(close=True)
            with pytest.raises(ConnectionResetError):
                rest_of(connection)
        assert_resets(link.address)
        link.restore()
        link.rate_bytes_per_s = None
        assert fetched(link.address) == CONTENT


def test_a_link_is_cut_after_exactly_so_many_bytes_once(endpoint):
    with Link(endpoint.address, cut_after_bytes=1_000_001) as link, connected(link.address) as connection:
        start = first_of(connection, 1_000_001)
        assert is_silent(connection)
        assert link.is_cut
        assert link.passed_bytes["from_endpoint"] == 1_000_001
        link.restore()
        connection.shutdown(socket.SHUT_WR)
        assert start + rest_of(connection) == CONTENT


def test_a_link_that_closes_after_so_many_bytes_lets_no_more_through(endpoint):
    with (
        Link(endpoint.address, cut_after_bytes=1_000_001, cut_closes=True) as link,
        connected(link.address) as connection,
    ):
        with pytest.raises(ConnectionResetError):
            rest_of(connection)
        assert link.passed_bytes["from_endpoint"] == 1_000_001


def test_exactly_one_bit_is_flipped_once(endpoint):
    with Link(endpoint.address, corrupt_after_bytes=1_234_567) as link:
        wrong = fetched(link.address)
        assert len(wrong) == len(CONTENT)
        assert [(at, a ^ b) for at, (a, b) in enumerate(zip(wrong, CONTENT, strict=True)) if a != b] == [(1_234_567, 1)]
        assert fetched(link.address) == CONTENT
        assert link.flipped_bits == 1


def test_only_the_watched_direction_is_corrupted(endpoint):
    with Link(endpoint.address, corrupt_after_bytes=1, watched="to_endpoint") as link:
        with connected(link.address) as connection:
            connection.sendall(b"aaa")
            connection.shutdown(socket.SHUT_WR)
            assert rest_of(connection) == CONTENT
        assert endpoint.heard == [b"a" + bytes([ord("a") ^ 1]) + b"a"]


def test_a_link_to_nowhere_resets_and_a_closed_link_refuses(endpoint):
    endpoint.close()
    with Link(endpoint.address) as link:
        assert_resets(link.address)
    with pytest.raises(ConnectionRefusedError):
        connected(link.address)


def test_a_peer_that_goes_away_is_noticed_on_the_other_side(endpoint):
    with Link(endpoint.address) as link, connected(link.address) as connection:
        assert first_of(connection)
        connection.close()  # with most of it unread, which is a reset
        deadline = time.monotonic() + DEADLINE_S
        while link._open and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not link._open


def test_a_link_as_a_process_does_what_it_is_told(endpoint):
    command = [sys.executable, "-m", "tests.links", "--to", endpoint.address, "--corrupt-after", "5"]
    with subprocess.Popen(command, cwd=ROOT, **PIPES) as process:
        address = process.stdout.readline().removeprefix("listening ").strip()
        assert fetched(address)[5] == CONTENT[5] ^ 1
        told, _ = process.communicate("counts\n", timeout=DEADLINE_S)
        assert told == f"to_endpoint 0 from_endpoint {len(CONTENT)} connections 1 flipped_bits 1\n"
        assert process.returncode == 0


@needs_hosts
def test_hosts_reach_each_other_by_address_and_name(pair):
    a, b = pair
    assert a.address != b.address
    with a.network():
        endpoint = Endpoint(a.address)
    with b.network():
        assert fetched(endpoint.address) == CONTENT
    assert a.run(["cat", "/proc/sys/kernel/hostname"]) == "a\n"
    look_up = "import socket; print(socket.gethostbyname('a'))"
    assert b.run([sys.executable, "-c", look_up]) == f"{a.address}\n"
    endpoint.close()


@needs_hosts
def test_hosts_reach_nothing_else(pair, endpoint):
    own = {a.address for some in psutil.net_if_addrs().values() for a in some if a.family == socket.AF_INET}
    with pair[0].network(), hosts("other") as (other,):
        for address in own - {"127.0.0.1"} | {other.address, "192.0.2.1"}:
            with pytest.raises(OSError, match="unreachable"):
                connected(f"{address}:9")
        with pytest.raises(ConnectionRefusedError):
            connected(endpoint.address)  # its 127.0.0.1 is its own


@needs_hosts
def test_hosts_share_neither_shared_memory_nor_processes(pair):
    a, b = pair
    a.run(["sh", "-c", "echo mine > /dev/shm/weights"])
    assert a.seen_from_here("/dev/shm/weights").read_text() == "mine\n"
    assert b.run(["ls", "/dev/shm"]) == ""
    with a.python("-c", HOLD_MEMORY, **PIPES) as holder:
        path = holder.stdout.readline().strip()
        assert a.run(["cat", path]) == "mine"
        with pytest.raises(HostError, match="No such file"):
            b.run(["cat", path])
    namespaces = [host.run(["readlink", "/proc/self/ns/pid"]) for host in pair]
    assert len({*namespaces, os.readlink("/proc/self/ns/pid")}) == 2 + 1


@needs_hosts
def test_private_folders_are_empty_and_apart(tmp_path):
    with hosts("a", "b", private=[str(tmp_path)]) as (a, b):
        a.run(["touch", tmp_path / "x"])
        assert a.run(["ls", tmp_path]) == "x\n"
        assert b.run(["ls", tmp_path]) == ""
        assert list(tmp_path.iterdir()) == []


@needs_hosts
def test_a_cut_host_falls_silent_and_the_same_connection_goes_on_when_it_is_restored(pair):
    a, b = pair
    with a.network():
        server = socket.create_server((a.address, 0))
    with b.network():
        client = connected(f"{a.address}:{server.getsockname()[1]}")
    with server, client, server.accept()[0] as served:
        served.sendall(b"before")
        assert first_of(client, 6) == b"before"
        a.cut()
        served.sendall(b"after")
        client.sendall(b"meanwhile")
        assert is_silent(client)
        with b.network(), pytest.raises(TimeoutError):
            connected(f"{a.address}:{server.getsockname()[1]}", SILENCE_S)
        a.restore()
        assert first_of(client, 5) == b"after"
        assert first_of(served, 9) == b"meanwhile"


@needs_hosts
def test_signals_and_exit_codes_are_those_of_the_command_itself(pair):
    host = pair[0]
    assert host.popen(["sh", "-c", "exit 7"]).wait(DEADLINE_S) == 7
    slept = host.popen(["sleep", "1000"])
    while psutil.Process(slept.pid).name() != "sleep":  # until then it is on its way in
        time.sleep(0.01)
    slept.send_signal(signal.SIGSTOP)
    while psutil.Process(slept.pid).status() != psutil.STATUS_STOPPED:
        time.sleep(0.01)
    slept.kill()
    assert slept.wait(DEADLINE_S) == -signal.SIGKILL
    assert "sleep" not in host.run(["sh", "-c", "cat /proc/[0-9]*/comm"])


@needs_hosts
def test_a_process_may_be_short_of_memory_and_of_files(pair):
    host = pair[0]
    code = "try: bytearray(1 << 30)\nexcept MemoryError: print('short')"
    assert host.run([sys.executable, "-c", code], limits={"as": 512 << 20}) == "short\n"
    assert host.run([sys.executable, "-c", code]) == ""
    assert host.run(["sh", "-c", "ulimit -n"], limits={"nofile": 20}) == "20\n"


@needs_hosts
def test_a_hosts_shared_memory_can_be_full(pair):
    host = pair[0]
    filler = host.fill(leaving_bytes=1 << 20)
    host.run(["dd", "if=/dev/zero", "of=/dev/shm/fits", "bs=1M", "count=1"])
    with pytest.raises(HostError, match="No space left"):
        host.run(["dd", "if=/dev/zero", "of=/dev/shm/not", "bs=1M", "count=1"])
    filler.unlink()
    host.run(["dd", "if=/dev/zero", "of=/dev/shm/not", "bs=1M", "count=1"])


@needs_hosts
def test_a_link_works_between_hosts_in_threads_and_as_a_process(pair):
    a, b = pair
    with a.network():
        endpoint = Endpoint(a.address)
    with b.network(), Link(endpoint.address, corrupt_after_bytes=5) as link:
        assert fetched(link.address)[5] == CONTENT[5] ^ 1
    with b.python("tests.links", "--to", endpoint.address, "--listen", f"{b.address}:0", **PIPES) as process:
        address = process.stdout.readline().removeprefix("listening ").strip()
        with a.network():
            assert fetched(address) == CONTENT
    endpoint.close()


@needs_hosts
def test_nothing_is_left_of_hosts_after_a_failure_and_the_machines_network_is_never_touched():
    def machine() -> tuple[list[str], str]:
        named = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
        return sorted(psutil.net_if_addrs()), named

    def fail(a: Host, b: Host) -> None:
        a.popen(["sh", "-c", "sleep 1000 & sleep 1000 & wait"])
        b.popen(["sleep", "1000"]).send_signal(signal.SIGSTOP)
        b.cut()
        assert len(processes_with(a.mark)) >= 5  # the switch, and in each host its first and ours
        assert machine() == before
        raise ZeroDivisionError

    before, descriptors = machine(), len(os.listdir("/proc/self/fd"))
    with pytest.raises(ZeroDivisionError), hosts("a", "b") as (a, b):
        fail(a, b)
    assert processes_with(a.mark) == []
    assert machine() == before
    assert len(os.listdir("/proc/self/fd")) <= descriptors
    with pytest.raises(HostError, match="a is closed"):
        a.popen(["true"])


@needs_hosts
def test_a_closed_host_is_gone_and_the_others_live(pair):
    a, b = pair
    process = a.popen(["sleep", "1000"])
    a.close()
    assert process.returncode == -signal.SIGKILL
    assert b.run(["echo", "here"]) == "here\n"


@needs_hosts
def test_nothing_is_left_of_hosts_whose_maker_was_killed():
    with subprocess.Popen([sys.executable, "-c", MAKE_AND_WAIT], cwd=ROOT, **PIPES) as maker:
        mark = maker.stdout.readline().strip()
        assert len(processes_with(mark)) >= 4
        maker.kill()
    deadline = time.monotonic() + DEADLINE_S
    while (left := processes_with(mark)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left == []
