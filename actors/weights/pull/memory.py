"""Shared memory for a part of a policy version, which other processes of this host can map.

It is anonymous memory of the kernel (memfd), opened through /proc. The kernel frees it when the last process that holds
it open ends, however it ends. /dev/shm is not used.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import mmap
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

logger = logging.getLogger(__name__)

CGROUP = Path("/sys/fs/cgroup")
CHECKED_BYTES = 1 << 20
"""Room for the marks of checked buckets; every reader checks the buckets beyond it itself."""
RESERVE_BYTES = 256 << 20
"""Available memory that weights leave free; below it they are put on disk."""


class NoRoomError(OSError):
    """Neither memory nor disk has room for a version."""


@dataclass(frozen=True, slots=True)
class MemoryAddress:
    """Path and identity of shared memory, for a process of the same host.

    Attributes:
        path: path to open.
        device, inode: identity of the file that must be found there.
        nbytes: size of the content.
    """

    path: str
    device: int
    inode: int
    nbytes: int

    def as_fields(self) -> list[Any]:
        """The address as a list for a message."""
        return [self.path, self.device, self.inode, self.nbytes]

    @classmethod
    def of_fields(cls, fields: Any) -> MemoryAddress:
        """Read the list of a message. Raises ValueError or TypeError where it is malformed."""
        path, device, inode, nbytes = fields
        return cls(str(path), int(device), int(inode), int(nbytes))


class Memory:
    """A range of bytes, written by one process and mapped by many. Closed when it is garbage-collected.

    Attributes:
        view: the bytes; writable only in the process that created it.
    """

    def __init__(self, descriptor: int, nbytes: int, path: str, *, writable: bool, is_on_disk: bool = False) -> None:
        self._descriptor = -1
        self.nbytes = nbytes
        self.path = path
        self.is_on_disk = is_on_disk
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        try:
            self._map = mmap.mmap(descriptor, max(1, nbytes), mmap.MAP_SHARED, protection)
            self._marks = mmap.mmap(descriptor, CHECKED_BYTES, offset=_checked_offset(nbytes))
        except (OSError, ValueError) as error:
            os.close(descriptor)
            raise NoRoomError(f"{nbytes:,} bytes of weights cannot be mapped: {error}") from error
        self._descriptor = descriptor
        self.view = memoryview(self._map)[:nbytes]
        self._checked = memoryview(self._marks)

    @classmethod
    def create(cls, nbytes: int, folder: Path | None = None) -> Memory:
        """Create memory; where too little is available, a file on disk with the same behaviour.

        Args:
            nbytes: size of the content.
            folder: where given, use a file in this folder first.
        Raises:
            NoRoomError: there is room nowhere; the text names what was tried.
        """
        tried = []
        places: list[Path | None] = [folder] if folder is not None else []
        places += [None, Path(tempfile.gettempdir())]
        for place in places:
            if place is None and nbytes + RESERVE_BYTES > available_memory():
                tried.append(f"memory: {available_memory():,} bytes are available")
                continue
            try:
                made = cls._reserved(nbytes, place)
            except OSError as error:
                tried.append(f"{place or 'memory'}: {error}")
                continue
            if tried:
                logger.warning("%d bytes of weights are put in %s: %s", nbytes, place or "memory", "; ".join(tried))
            return made
        raise NoRoomError(f"no room for {nbytes:,} bytes of weights. Tried {'; '.join(tried)}")

    @classmethod
    def _reserved(cls, nbytes: int, folder: Path | None) -> Memory:
        if folder is None:
            descriptor = os.memfd_create("counterpoint-weights", os.MFD_CLOEXEC)
        else:
            descriptor, name = tempfile.mkstemp(prefix="counterpoint-weights-", dir=folder)
            os.unlink(name)  # from now on reachable through /proc only, and freed with its last holder
        try:
            # fails here, where a copy would end with SIGBUS
            os.posix_fallocate(descriptor, 0, _checked_offset(nbytes) + CHECKED_BYTES)
        except OSError:
            os.close(descriptor)
            raise
        path = f"/proc/{os.getpid()}/fd/{descriptor}"
        return cls(descriptor, nbytes, path, writable=True, is_on_disk=folder is not None)

    @classmethod
    def open(cls, address: MemoryAddress) -> Memory | None:
        """Map and lease the memory of another process of this host; None where that is impossible.

        While the lease lasts, the owner writes nothing else into it.
        """
        try:
            descriptor = os.open(address.path, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return None
        found = os.fstat(descriptor)
        try:
            if (found.st_dev, found.st_ino) != (address.device, address.inode) or found.st_size < address.nbytes:
                raise OSError("another file")
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            return None
        try:
            return cls(descriptor, address.nbytes, f"/proc/{os.getpid()}/fd/{descriptor}", writable=False)
        except NoRoomError:
            return None

    @property
    def address(self) -> MemoryAddress:
        """The address for other processes of this host, valid while this one holds the memory."""
        found = os.fstat(self._descriptor)
        return MemoryAddress(self.path, found.st_dev, found.st_ino, self.nbytes)

    def clear_checked(self) -> None:
        """Clear the marks of checked buckets, before new content is written."""
        self._checked[:] = bytes(len(self._checked))

    def mark_checked(self, bucket: int, digest: bytes) -> None:
        """Mark that a bucket has this digest, so that readers share the work of checking."""
        start = bucket * len(digest)
        if start + len(digest) <= len(self._checked):
            self._checked[start : start + len(digest)] = digest

    def is_checked(self, bucket: int, digest: bytes) -> bool:
        """Whether a reader has marked that a bucket has this digest. Valid under a lease."""
        start = bucket * len(digest)
        return self._checked[start : start + len(digest)] == digest

    def try_lease(self) -> bool:
        """Lease: keep the owner from writing something else into it. False where the owner has claimed it."""
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return False
        return True

    def try_claim(self) -> bool:
        """Claim: keep others from leasing it, to write into it. False where another process has a lease."""
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True

    def unclaim(self) -> None:
        """End this process's claim or lease."""
        if self._descriptor >= 0:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)

    def close(self) -> None:
        """End the lease and close the memory. Existing views keep it mapped."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        self.view = self._checked = memoryview(b"")
        for mapping in (self._map, self._marks):
            with contextlib.suppress(BufferError):  # a view exists; unmapped with the last view
                mapping.close()

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # at interpreter exit, `os` may be gone
        if getattr(self, "_descriptor", -1) >= 0:
            close(self._descriptor)
            self._descriptor = -1


def _checked_offset(nbytes: int) -> int:
    """Offset of the marks: the first page behind the content."""
    return -(-max(1, nbytes) // mmap.PAGESIZE) * mmap.PAGESIZE


def available_memory() -> int:
    """Bytes that this process can still allocate: those of the machine, or of its control group where that is less."""
    available = int(psutil.virtual_memory().available)
    for limit_file, used_file in (
        (CGROUP / "memory.max", CGROUP / "memory.current"),
        (CGROUP / "memory/memory.limit_in_bytes", CGROUP / "memory/memory.usage_in_bytes"),
    ):
        try:
            limit, used = limit_file.read_text().strip(), int(used_file.read_text())
            used -= _reclaimable(used_file.with_name("memory.stat"))
        except (OSError, ValueError):
            continue
        if limit.isdigit():
            available = min(available, int(limit) - used)
    return max(0, available)


def _reclaimable(statistics: Path) -> int:
    """Bytes of cached file pages in a control group's usage, which the kernel frees when memory is needed."""
    try:
        fields = dict(line.split() for line in statistics.read_text().splitlines())
    except OSError:
        return 0
    prefix = "total_" if "total_active_file" in fields else ""  # cgroup v1: children included
    return sum(int(fields.get(prefix + name, 0)) for name in ("active_file", "inactive_file"))


def host_identity() -> str:
    """An identity that is equal for processes which can open each other's memory: boot, namespaces and user."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    namespaces = [os.readlink(f"/proc/self/ns/{kind}") for kind in ("pid", "user")]
    return ":".join([boot, *namespaces, str(os.getuid())])
