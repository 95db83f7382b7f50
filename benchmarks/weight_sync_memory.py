"""The weight-sync benchmark's memory: what trainer and generator hold beyond one version of the model, at their peak.

The account of a process is its resident memory as the kernel counts it: private pages and shared ones, each once. From
its peak during a sync are taken away what it had before it knew of the weights (libraries, sockets and threads, the
trainer's own tensors; a version of a few kilobytes has passed already) and one time the model, for the memory the
version lies in. That memory is the publisher's, or over the network the receiver's own; a receiver that maps the
publisher's memory has it in its account as well, though on the machine it is there once. What is left is buckets under
way, copies that ZeroMQ makes to encrypt and decrypt, and what is kept of a delta.
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
    """Both processes' peaks: by shared memory, over the network in full, and as a delta."""
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
    """By process, the most it held in any of so many syncs beyond what is accounted for."""
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
