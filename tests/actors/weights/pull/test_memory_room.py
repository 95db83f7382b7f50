"""Room for weights: how much there is, where they go without it, and what is said where there is none."""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path

import pytest

from actors.weights.pull import memory as memory_module
from actors.weights.pull.memory import Memory, available_memory
from tests.actors.weights.processes import output_of, python


def control_group(folder: Path, **files: object) -> Path:
    for name, content in files.items():
        (folder / name.replace("__", "/").replace("_at_", ".")).write_text(f"{content}\n")
    return folder


def test_without_memory_weights_go_to_disk_and_look_the_same(tmp_path, monkeypatch, caplog):
    group = control_group(tmp_path, memory_at_max=4096, memory_at_current=0, memory_at_stat="anon 0")
    monkeypatch.setattr(memory_module, "CGROUP", group)
    memory = Memory.create(1000)
    assert memory.is_on_disk
    memory.view[:] = b"w" * 1000
    reader = Memory.open(memory.address)
    assert reader is not None
    assert bytes(reader.view) == b"w" * 1000
    assert "4,096 bytes are available" in caplog.text


@pytest.mark.parametrize(
    ("limit", "used", "statistics", "available"),
    [
        (1000, 300, "anon 300\nshmem 0", 700),
        ("max", 300, "anon 300", None),
        # cached files are given up when memory is needed; shared memory isn't
        (1000, 800, "anon 300\nfile 600\nshmem 100\nactive_file 150\ninactive_file 350", 700),
        (1000, 1200, "anon 1200", 0),
    ],
)
def test_memory_is_counted_within_the_control_group(tmp_path, monkeypatch, limit, used, statistics, available):
    group = control_group(tmp_path, memory_at_max=limit, memory_at_current=used, memory_at_stat=statistics)
    monkeypatch.setattr(memory_module, "CGROUP", group)
    assert available is None or available_memory() == available
    assert available is not None or available_memory() > 1 << 20


def test_the_older_kind_of_control_groups_counts_those_below_too(tmp_path, monkeypatch):
    (tmp_path / "memory").mkdir()
    statistics = "active_file 1\ninactive_file 1\ntotal_active_file 40\ntotal_inactive_file 60"
    files = {"limit_in_bytes": 1000, "usage_in_bytes": 800, "stat": statistics}
    control_group(tmp_path, **{f"memory__memory_at_{name}": content for name, content in files.items()})
    monkeypatch.setattr(memory_module, "CGROUP", tmp_path)
    assert available_memory() == 1000 - 800 + 100


def test_without_room_anywhere_the_failure_names_what_was_tried(tmp_path):
    # 1 GiB of address space is enough for Python, and too little for 2 GiB of weights wherever they lie.
    words = output_of(
        python(
            """
            import resource, sys
            from pathlib import Path
            from actors.weights.pull.memory import Memory, NoRoomError
            resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
            try:
                Memory.create(1 << 31, Path(sys.argv[1]))
            except NoRoomError as error:
                print(error)
            """,
            tmp_path,
        )
    )
    assert words.startswith("no room for 2,147,483,648 bytes of weights. Tried ")
    for place in (str(tmp_path), "memory", tempfile.gettempdir()):
        assert f"{place}: " in words


def test_a_full_folder_is_passed_over(tmp_path):
    prefix = ("unshare", "--mount")
    if os.geteuid() != 0 or subprocess.run([*prefix, "true"], capture_output=True).returncode:
        pytest.skip("only root can mount a small file system")
    words = output_of(
        python(
            """
            import subprocess, sys
            from pathlib import Path
            from actors.weights.pull.memory import Memory
            subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "small", sys.argv[1]], check=True)
            memory = Memory.create(16 << 20, Path(sys.argv[1]))
            print(memory.is_on_disk, len(list(Path(sys.argv[1]).iterdir())))
            """,
            tmp_path,
            prefix=prefix,
        )
    )
    assert words == "False 0\n"
