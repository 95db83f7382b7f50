"""Memory that processes share: who may write, and what stays when one of them ends."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from actors.weights.pull import memory as memory_module
from actors.weights.pull.memory import Memory, MemoryAddress, NoRoomError, available_memory, host_identity
from tests.actors.weights.processes import DEADLINE_S, output_of, python
from tests.actors.weights.sync_parties import left_behind

MIB = 1 << 20
OWNER = """
    import sys
    from pathlib import Path
    from actors.weights.pull.memory import Memory
    folder = Path(sys.argv[2]) if len(sys.argv) > 2 else None
    memory = Memory.create(int(sys.argv[1]), folder)
    memory.view[:] = b"w" * memory.nbytes
    print(*memory.address.as_fields(), flush=True)
    sys.stdin.read()
"""


@pytest.fixture(params=["in memory", "on disk"])
def owner(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], MemoryAddress]]:
    process = python(OWNER, 16 * MIB, *([tmp_path] if request.param == "on disk" else []))
    try:
        assert process.stdout is not None
        path, *numbers = process.stdout.readline().split()
        yield process, MemoryAddress(path, *map(int, numbers))
    finally:
        process.kill()
        process.wait(DEADLINE_S)


def shared_bytes() -> int:
    """Of this process, memory of memfd and tmpfs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssShmem:"))


def holders(address: MemoryAddress) -> set[str]:
    """Processes of the whole machine that have the memory open or mapped."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            lines = [line.split() for line in (process / "maps").read_text().splitlines()]
            found |= {
                process.name for line in lines if line[5:] and "weights" in line[5] and line[4] == str(address.inode)
            }
            for descriptor in (process / "fd").iterdir():
                with contextlib.suppress(OSError):
                    stat = descriptor.stat()
                    if (stat.st_dev, stat.st_ino) == (address.device, address.inode):
                        found.add(process.name)
    return found


def test_another_process_maps_what_one_has_written(owner):
    _, address = owner
    found = Memory.open(address)
    assert found is not None
    assert bytes(found.view) == b"w" * (16 * MIB)


def test_a_reader_sees_what_the_owner_writes_later_and_cant_write_itself():
    owner = Memory.create(1000)
    reader = Memory.open(owner.address)
    assert reader is not None
    owner.view[999] = 7
    assert reader.view[999] == 7
    with pytest.raises(TypeError):
        reader.view[999] = 8


def test_what_is_mapped_stays_whole_when_its_owner_is_killed(owner):
    process, address = owner
    found = Memory.open(address)
    assert found is not None
    process.send_signal(signal.SIGKILL)
    process.wait(DEADLINE_S)
    assert bytes(found.view) == b"w" * (16 * MIB)
    assert Memory.open(address) is None, "nobody new can find it by the dead owner's address"
    mapped_by_this_process = Memory.open(found.address)
    assert mapped_by_this_process is not None, "but whoever holds it can pass it on"


def test_nothing_is_left_behind_by_a_killed_owner_and_its_readers(owner):
    process, address = owner
    found = Memory.open(address)
    assert found is not None
    assert holders(address) == {str(process.pid), str(os.getpid())}
    process.send_signal(signal.SIGKILL)
    process.wait(DEADLINE_S)
    descriptor = os.open(found.path, os.O_RDONLY)
    assert os.fstat(descriptor).st_ino == address.inode
    os.close(descriptor)
    found.close()
    assert not holders(address)
    assert left_behind() == []


def test_memory_is_given_back_to_the_machine_with_its_last_holder():
    size = 256 * MIB
    if available_memory() < 2 * size:
        pytest.skip("the machine has too little memory to tell")
    process = python(OWNER, size)
    try:
        assert process.stdout is not None
        path, *numbers = process.stdout.readline().split()
        address = MemoryAddress(path, *map(int, numbers))
        before = shared_bytes()
        found = Memory.open(address)
        assert found is not None
        assert bytes(found.view).count(b"w") == size
    finally:
        process.kill()
        process.wait(DEADLINE_S)
    assert shared_bytes() >= before + size
    assert holders(address) == {str(os.getpid())}
    del found
    gc.collect()
    assert shared_bytes() <= before + MIB
    assert not holders(address), "nobody keeps the memory from the machine"


def test_files_on_disk_have_no_name_that_could_be_left_behind(tmp_path):
    memory = Memory.create(1000, tmp_path)
    assert memory.is_on_disk
    assert list(tmp_path.iterdir()) == []


def test_memory_that_is_garbage_is_closed():
    memory = Memory.create(1000)
    path = memory.path
    del memory
    gc.collect()
    assert not os.path.exists(path)


def test_a_view_outlives_the_memory_it_looks_into():
    memory = Memory.create(1000)
    memory.view[:] = b"x" * 1000
    view = memory.view[10:20]
    memory.close()
    memory.close()
    assert bytes(view) == b"x" * 10


def test_as_long_as_one_reader_has_a_lease_the_owner_cant_claim_it():
    owner = Memory.create(1000)
    readers = [Memory.open(owner.address) for _ in range(2)]
    assert not owner.try_claim()
    readers[0].unclaim()
    assert not owner.try_claim()
    readers[1].close()
    assert owner.try_claim()


def test_what_is_claimed_can_be_neither_opened_nor_leased():
    owner = Memory.create(1000)
    reader = Memory.open(owner.address)
    reader.unclaim()
    assert owner.try_claim()
    assert owner.try_claim(), "claiming twice is claiming"
    assert not reader.try_lease()
    assert Memory.open(owner.address) is None
    owner.unclaim()
    assert reader.try_lease()
    assert Memory.open(owner.address) is not None


def test_a_lease_ends_with_the_process_that_has_it(owner):
    _, address = owner
    lease = python(
        """
        import sys
        from actors.weights.pull.memory import Memory, MemoryAddress
        path, *numbers = sys.argv[1:]
        memory = Memory.open(MemoryAddress(path, *map(int, numbers)))
        print(memory is not None, flush=True)
        sys.stdin.read()
        """,
        *address.as_fields(),
    )
    try:
        assert lease.stdout is not None
        assert lease.stdout.readline() == "True\n"
        other = Memory.open(address)
        assert other is not None
        assert not other.try_claim()
    finally:
        lease.kill()
        lease.wait(DEADLINE_S)
    assert other.try_claim()


def test_closed_memory_has_no_lease_to_give_back():
    owner = Memory.create(1000)
    reader = Memory.open(owner.address)
    reader.close()
    reader.unclaim()
    assert owner.try_claim()


@pytest.mark.parametrize("field", ["inode", "device", "nbytes", "path"])
def test_another_file_than_the_one_that_was_meant_is_refused(field, tmp_path):
    owner = Memory.create(1000)
    wrong = {
        "inode": owner.address.inode + 1,
        "device": owner.address.device + 1,
        "nbytes": 1 << 40,
        "path": "/proc/1/fd/4096",
    }
    assert Memory.open(replace(owner.address, **{field: wrong[field]})) is None
    assert Memory.open(owner.address) is not None


def test_a_file_without_room_for_the_marks_is_refused(tmp_path):
    file = tmp_path / "weights"
    file.write_bytes(bytes(1000))
    found = file.stat()
    assert Memory.open(MemoryAddress(str(file), found.st_dev, found.st_ino, 1000)) is None


def test_a_descriptor_is_closed_once_where_memory_cant_be_mapped(tmp_path):
    # A second close would hit whatever has got the number since.
    file = tmp_path / "weights"
    file.write_bytes(b"")
    descriptor = os.open(file, os.O_RDWR)
    with pytest.raises(NoRoomError) as caught:
        Memory(descriptor, 1000, str(file), writable=True)
    other = os.open(file, os.O_RDWR)
    assert other == descriptor
    del caught  # and with it what was left of the memory
    gc.collect()
    os.fstat(other)
    os.close(other)


def test_marks_of_checked_buckets_are_shared_and_name_the_content():
    owner = Memory.create(1000)
    readers = [Memory.open(owner.address) for _ in range(2)]
    digests = [bytes([number]) * 16 for number in range(3)]
    assert not readers[1].is_checked(2, digests[2])
    readers[0].mark_checked(2, digests[2])
    assert readers[1].is_checked(2, digests[2])
    assert not readers[1].is_checked(2, digests[1]), "another content was checked"
    assert not readers[1].is_checked(1, digests[1]), "another bucket was checked"
    owner.clear_checked()
    assert not readers[1].is_checked(2, digests[2])


def test_buckets_behind_the_last_mark_are_never_taken_for_checked():
    memory, digest = Memory.create(1000), b"d" * 16
    last = memory_module.CHECKED_BYTES // 16 - 1
    for bucket in (last, last + 1):
        memory.mark_checked(bucket, digest)
    assert memory.is_checked(last, digest)
    assert not memory.is_checked(last + 1, digest)


@pytest.mark.parametrize("nbytes", [0, 1, 4096, 4097])
def test_marks_are_no_part_of_the_content(nbytes):
    owner = Memory.create(nbytes)
    owner.view[:] = b"w" * nbytes
    owner.mark_checked(0, b"d" * 16)
    reader = Memory.open(owner.address)
    assert reader is not None
    assert bytes(reader.view) == b"w" * nbytes


def test_processes_of_one_host_know_each_other_as_such():
    code = "from actors.weights.pull.memory import host_identity; print(host_identity())"
    assert output_of(python(code)).strip() == host_identity()
