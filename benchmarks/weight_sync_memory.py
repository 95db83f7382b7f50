"""The weight-sync benchmark's memory case: peak memory of trainer and generator beyond one version of the model.

A process's resident memory is as the kernel counts it: private and shared pages, each once. Two amounts are subtracted
from its peak during a sync: its memory before the first large version (libraries, sockets and threads, the trainer's
own tensors, and a version of a few kilobytes), and the size of the model, for the memory that holds the version. That
memory is the publisher's or, over the network, the receiver's own; a receiver that maps the publisher's memory counts
it too, although the machine has it once. The rest is buckets in flight, ZeroMQ's copies for encryption and decryption,
and the kept delta.
"""

from __future__ import annotations

import contextlib

from weight_sync_processes import Peer, Row, Sink, Trainer, Workload, starting, starting_generator
from weight_sync_transfer import DELTA_SHARE, size_of

BUCKETS = 2.0
STEADY = 3
"""Versions before the peaks count."""
MIB = 1 << 20


def memory_case(workload: Workload, repeats: int) -> list[Row]:
    """Peaks of both processes: by shared memory, over the network in full, and as a delta."""
    rows = []
    for way, maps_memory, has_delta in (
        ("shared memory", True, False),
        ("TCP, CURVE", False, False),
        (f"TCP, CURVE, delta of {DELTA_SHARE:.0%}", False, True),
    ):
        with contextlib.ExitStack() as stack:
            trainer = starting(stack, Trainer.of, workload, has_delta)
            sink = starting_generator(stack, Sink, "one", maps_memory)
            peers = {"publisher": trainer, "receiver": sink}
            share = DELTA_SHARE if has_delta else 1.0
            found = _beyond(peers, workload, repeats, share)
        for name, nbytes in found.items():
            limit = f"a bucket: {workload.bucket_bytes / MIB:g} MiB; beyond the model: {nbytes / MIB:.1f} MiB"
            case = f"memory, {name}, {way}, {workload.dtype}"
            rows.append(Row(case, None, None, limit, nbytes / workload.bucket_bytes, at_most=BUCKETS))
    return rows


def _beyond(peers: dict[str, Peer], workload: Workload, repeats: int, share: float) -> dict[str, int]:
    """By process: the largest peak of several syncs beyond the subtracted amounts."""
    trainer, sink = peers.values()
    sink.call("receive", trainer.call("publish", 0, True)[0])
    trainer.call("change", share)  # what that takes is the benchmark's own
    before = {name: peer.call("memory") for name, peer in peers.items()}
    peaks = dict.fromkeys(peers, 0)
    for version in range(1, 1 + STEADY + repeats):
        trainer.call("change", share)
        for peer in peers.values():
            peer.call("forget_peak")
        sink.call("receive", trainer.call("publish", version)[0])
        if version > STEADY:
            peaks = {name: max(peaks[name], peer.call("peak")) for name, peer in peers.items()}
    return {name: peaks[name] - before[name] - size_of(workload) for name in peers}
