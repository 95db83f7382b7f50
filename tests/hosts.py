"""Hosts on one machine, for tests of what travels between machines: no memory, process or network is shared.

A host is a process that holds Linux namespaces: of network, with an address of its own; of mounts, with an own
/dev/shm of a given size; of processes, with an own /proc; of names, with its own hostname. Hosts of one `hosts()` are
plugged into a switch, which lives in a network namespace of its own, so that nothing is ever added to the machine's
network, no packet can leave, and tests that run side by side can't collide. The kernel takes everything away when the
holding processes end, and they end with the process that made them, even if that is killed. Needs root, iproute2 and
util-linux; `can_make_hosts` says what is missing. Links that lose, slow down or corrupt bytes are in tests/links.py.
"""

from __future__ import annotations

import ctypes
import functools
import os
import random
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[1]
MARK = "COUNTERPOINT_TEST_HOSTS"
TOOLS = ("ip", "unshare", "nsenter", "prlimit", "mount", "env")
SHM_BYTES = 256 << 20
DEADLINE_S = 30.0
"""For any one command of the machine's own, such as `ip`; all take milliseconds."""

CLONE_NEWPID, CLONE_NEWNET = 0x20000000, 0x40000000

BOOT_SWITCH = "set -e; ip link add switch type bridge; ip link set switch up; echo ready; exec cat"
BOOT_HOST = """
set -e
name=$1 shm_bytes=$2 names=$3
shift 3
mount -t proc proc /proc
mount -t tmpfs -o "size=$shm_bytes,mode=1777" shm /dev/shm
mount --bind "$names" /etc/hosts
for folder in "$@"; do mount -t tmpfs -o mode=1777 private "$folder"; done
echo "$name" > /proc/sys/kernel/hostname
ip link set lo up
echo ready
trap '' CHLD
exec cat
"""
"""The first process of a host. It ends when its standard input does, and leaves no zombies of orphans meanwhile."""


class HostError(RuntimeError):
    """A host can't be made or changed; says which command failed and what it printed."""


@dataclass
class Host:
    """What runs in a host sees the host's network, /dev/shm, /proc and hostname, and the machine's other files."""

    name: str
    """Its hostname; every host of the same network finds the others by name, too."""
    address: str
    mark: str
    """In the environment of every process of these hosts; see `processes_with`."""
    _init: subprocess.Popen[str]
    _switch: subprocess.Popen[str]
    _port: str
    _started: list[subprocess.Popen[Any]] = field(default_factory=list)

    def popen(
        self,
        args: Sequence[str | Path],
        *,
        limits: Mapping[str, int] | None = None,
        cwd: str | Path = ROOT,
        env: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> subprocess.Popen[Any]:
        """Start a command in the host. What is returned is the command itself: its pid (as the machine sees it), its
        exit code, and every signal goes to it. Its own children outlive it until the host closes, as on any host.

        Args:
            limits: resource limits by prlimit's names: {"as": 2 << 30} for 2 GiB of address space, "data", "nofile".
            cwd, env: as for Popen, the folder as the host sees it.
        """
        prefix = ["nsenter", "--target", str(self._pid), "--mount", "--net", "--uts", "--ipc", "--"]
        prefix += ["env", f"--chdir={cwd}"]
        if limits:
            prefix += ["prlimit", *(f"--{name}={value}" for name, value in limits.items()), "--"]
        environment = {**(os.environ if env is None else env), MARK: self.mark}
        with _children_in(self._pid):
            process = subprocess.Popen([*prefix, *map(str, args)], env=environment, **kwargs)
        self._started.append(process)
        return process

    def python(self, *args: str | Path, **kwargs: Any) -> subprocess.Popen[Any]:
        """Start Python in the host: a script ("x.py"), a module ("tests.links"), or options ("-c", code); arguments
        follow. Takes what `popen` takes."""
        first = str(args[0])
        option = [] if first.startswith("-") or first.endswith(".py") else ["-m"]
        return self.popen([sys.executable, *option, *args], **kwargs)

    def run(self, args: Sequence[str | Path], *, timeout_s: float = 60.0, **kwargs: Any) -> str:
        """What a command prints, once it has ended well. Takes what `popen` takes."""
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = self.popen(args, **(pipes | kwargs))
        try:
            output, errors = process.communicate(timeout=timeout_s)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        if process.returncode:
            raise HostError(f"{self.name}: {args} ended with {process.returncode}:\n{output}{errors}")
        return output

    @contextmanager
    def network(self) -> Iterator[None]:
        """Within this block, the calling thread and threads that it starts are on the host's network: sockets made
        there stay there for good. Nothing else changes: /dev/shm and /proc are still the machine's."""
        with _joined(f"/proc/{self._pid}/ns/net", "net", CLONE_NEWNET):
            yield

    def cut(self) -> None:
        """Pull its cable, at the switch: packets vanish in both directions, silently. `lo` goes on working."""
        _ip(self._switch, f"link set {self._port} nomaster")

    def restore(self) -> None:
        """Plug it in again. Connections go on when TCP next retransmits, which may be as long again as it was cut."""
        _ip(self._switch, f"link set {self._port} master switch")

    def seen_from_here(self, path: str | Path) -> Path:
        """Where this process finds a file of the host's, such as /dev/shm/x."""
        return Path(f"/proc/{self._pid}/root/{str(path).lstrip('/')}")

    def fill(self, leaving_bytes: int = 0) -> Path:
        """Fill its /dev/shm with a file that leaves so much free (in whole pages); delete the file to undo it."""
        folder = self.seen_from_here("/dev/shm")
        room = os.statvfs(folder)
        path = folder / f"filler-{uuid.uuid4().hex}"
        with path.open("wb") as file:
            if (size := room.f_bavail * room.f_frsize - leaving_bytes) > 0:
                os.posix_fallocate(file.fileno(), 0, size)
        return path

    def close(self) -> None:
        """Kill everything in it at once. The kernel still closes its connections; `cut` first for a loss of power."""
        for process in self._started:
            if process.poll() is None:
                process.kill()
        for process in self._started:
            process.wait()  # the namespace of processes can't end while one of them is a zombie
        _end(self._init)

    @property
    def _pid(self) -> int:
        if self._init.poll() is not None:
            raise HostError(f"{self.name} is closed")
        return self._init.pid


@contextmanager
def hosts(*names: str, shm_bytes: int = SHM_BYTES, private: Sequence[str] = ()) -> Iterator[tuple[Host, ...]]:
    """Hosts of one network, which reach each other and nothing else; closed at the end of the block.

    Args:
        names: a hostname each.
        shm_bytes: size of each /dev/shm. Memory is only taken by what is written.
        private: more folders that each host is to have empty and of its own, such as "/tmp".
    Raises:
        HostError: see `can_make_hosts`.
    """
    mark = uuid.uuid4().hex
    subnet = f"10.{random.SystemRandom().randrange(256)}.{random.SystemRandom().randrange(256)}"
    addresses = [f"{subnet}.{number}" for number in range(1, len(names) + 1)]
    hardware = [f"02:00:00:00:00:{number:02x}" for number in range(1, len(names) + 1)]
    kinds = ["--net", "--mount", "--uts", "--ipc"]
    with ExitStack() as cleanup, tempfile.NamedTemporaryFile("w", suffix="-hosts") as table:
        os.fchmod(table.fileno(), 0o644)
        table.write("127.0.0.1 localhost\n::1 localhost\n")
        table.writelines(f"{address} {name}\n" for address, name in zip(addresses, names, strict=True))
        table.flush()
        switch = _hold(mark, ["--net"], BOOT_SWITCH)
        cleanup.callback(_end, switch)
        made = []
        for number, (name, address) in enumerate(zip(names, addresses, strict=True)):
            with _children_in(None):
                init = _hold(mark, kinds, BOOT_HOST, name, str(shm_bytes), table.name, *private)
            made.append(Host(name, address, mark, init, switch, f"port{number}"))
            cleanup.callback(made[-1].close)
        for process in (switch, *(host._init for host in made)):
            _await_ready(process)
        table.close()  # they have it mounted
        for host, own in zip(made, hardware, strict=True):
            _ip(
                switch,
                f"link add {host._port} type veth peer name eth0 address {own} netns {host._init.pid}",
                f"link set {host._port} master switch up",
            )
            # Neighbours are known for good: an address that was cut off swallows packets, and is never "no route".
            known = [
                f"neigh add {other.address} lladdr {its} dev eth0 nud permanent"
                for other, its in zip(made, hardware, strict=True)
                if other is not host
            ]
            _ip(host._init, f"address add {host.address}/24 dev eth0", "link set eth0 up", *known)
        yield tuple(made)


@functools.cache
def can_make_hosts() -> str | None:
    """Why this process can't make hosts, or None if it can. Tries once, in a tenth of a second."""
    if sys.platform != "linux":
        return "hosts need Linux"
    if os.geteuid() != 0:
        return "hosts need root"
    if missing := [tool for tool in TOOLS if shutil.which(tool) is None]:
        return f"hosts need {', '.join(missing)} (iproute2, util-linux)"
    try:
        with hosts("probe-a", "probe-b", shm_bytes=1 << 20) as (host, _):
            host.run(["true"])
    except (HostError, OSError, subprocess.SubprocessError) as error:
        return f"hosts can't be made here: {error}"
    return None


def processes_with(mark: str) -> list[psutil.Process]:
    """Every living process of the hosts with this mark; empty once they are closed."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == mark:
                found.append(process)
        except psutil.Error:
            continue
    return found


def _hold(mark: str, kinds: Sequence[str], script: str, *arguments: str) -> subprocess.Popen[str]:
    """A process in new namespaces of these kinds, which it holds until it ends; it ends with this process."""
    return subprocess.Popen(
        ["unshare", *kinds, "--", "sh", "-c", script, "sh", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, MARK: mark},
        start_new_session=True,
    )


def _await_ready(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    if (line := process.stdout.readline()) != "ready\n":
        raise HostError((line + process.stdout.read()).strip() or f"a namespace ended with {process.wait()}")


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()


def _ip(holder: subprocess.Popen[str], *commands: str) -> None:
    """Commands of iproute2 in the network of a holder."""
    args = ["nsenter", "--target", str(holder.pid), "--net", "--", "ip", "-batch", "-"]
    text = "".join(f"{command}\n" for command in commands)
    done = subprocess.run(args, input=text, capture_output=True, text=True, timeout=DEADLINE_S)
    if done.returncode:
        raise HostError(f"ip: {commands}: {done.stderr.strip()}")


def _system_call(name: str, *arguments: int) -> None:
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments):
        code = ctypes.get_errno()
        raise HostError(f"{name}: {os.strerror(code)}")


@contextmanager
def _joined(path: str | None, kind: str, flag: int) -> Iterator[None]:
    """The calling thread in another namespace of one kind (a new one for no path), and back."""
    own = os.open(f"/proc/thread-self/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        if path is None:
            _system_call("unshare", flag)
        else:
            other = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                _system_call("setns", other, flag)
            finally:
                os.close(other)
        try:
            yield
        finally:
            _system_call("setns", own, flag)
    finally:
        os.close(own)


def _children_in(pid: int | None) -> Any:
    """Processes that this thread starts meanwhile are in the namespace of processes of `pid`, or of a new one, whose
    first process is the first that is started. They are children of this process all the same."""
    return _joined(f"/proc/{pid}/ns/pid" if pid is not None else None, "pid_for_children", CLONE_NEWPID)
