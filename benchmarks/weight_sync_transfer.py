"""Cases of the weight-sync benchmark without a vLLM engine: one generator, many, alternatives to ours, the delta."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from multiprocessing import shared_memory
from pathlib import Path

from weight_sync_limits import Copier, FileReader, FileWriter, RawClient, RawServer, RayPair
from weight_sync_processes import (
    WIDTH,
    Peer,
    Row,
    Sink,
    Sync,
    Trainer,
    Workload,
    interleaved,
    starting,
    starting_generator,
)

from actors.weights.pull.pull import ENCRYPTED, PLAIN
from actors.weights.source import DTYPES
from tests.links import Link

GB, MIB = 1e9, 1 << 20
SHARE = 0.7
"""Of the limit's rate that one generator is to get."""
FLEET_WALL = 2.5
FLEET_EGRESS = 2.0
DELTA_SHARE = 0.01
DELTA_BYTES = 0.05


def size_of(workload: Workload) -> int:
    """Bytes of its tensors, exactly."""
    matrix = WIDTH * WIDTH * DTYPES[workload.dtype].itemsize
    return max(1, workload.nbytes // matrix) * matrix


def shared_memory_case(workload: Workload, repeats: int) -> list[Row]:
    """To one generator on the same host, by shared memory."""
    nbytes = size_of(workload)
    with contextlib.ExitStack() as stack:
        segment = shared_memory.SharedMemory(create=True, size=nbytes)
        stack.callback(segment.unlink)
        stack.callback(segment.close)
        source, target = (starting(stack, Copier, nbytes, segment.name) for _ in range(2))
        sync = Sync(starting(stack, Trainer.of, workload), [starting_generator(stack, Sink, "one", True)])

        def copy() -> dict[str, float]:
            started, middle = source.call("copy_in")
            begun, ended = target.call("copy_out")
            return {"seconds": ended - started, "alone": middle - started + ended - begun}

        found = interleaved({"limit": copy, "sync": partial(sync.once, "memory")}, repeats)
    limit, figures = found["limit"]["seconds"], found["sync"]
    name = f"shared memory, {workload.dtype}"
    return [
        Row(
            name,
            figures["seconds"],
            nbytes,
            f"a copy into shared memory and, by another process, out of it: {limit:.3f} s, {nbytes / limit / GB:.2f} "
            "GB/s",
            limit / figures["seconds"],
            at_least=SHARE,
        ),
        Row(f"{name}: gather alone", figures["gather"], nbytes),
        Row(f"{name}: receive alone", figures["receive"], nbytes),
    ]


def tcp_case(workload: Workload, repeats: int) -> list[Row]:
    """To one generator over TCP on loopback, encrypted and plain."""
    rows = []
    for is_encrypted in (True, False):
        nbytes, words = size_of(workload), "CURVE" if is_encrypted else "plain"
        flow = ENCRYPTED if is_encrypted else PLAIN
        message_bytes = min(flow.slice_bytes, workload.bucket_bytes)
        with contextlib.ExitStack() as stack:
            server = starting(stack, RawServer, nbytes, message_bytes, is_encrypted)
            client = starting_generator(stack, RawClient, *server.call("where"), flow.window)
            trainer = starting(stack, Trainer.of, workload, False, is_encrypted)
            sync = Sync(trainer, [starting_generator(stack, Sink, "one", False)])
            rounds = {"limit": partial(_raw, client, nbytes), "sync": partial(sync.once, "network")}
            found = interleaved(rounds, repeats)
        limit, figures = found["limit"]["seconds"], found["sync"]
        name = f"TCP, {words}, {workload.dtype}"
        rows += [
            Row(
                name,
                figures["receive"],
                nbytes,
                f"raw ZeroMQ, {words}, {flow.window} messages of {message_bytes / MIB:g} MiB under way: {limit:.3f} s, "
                f"{nbytes / limit / GB:.2f} GB/s",
                limit / figures["receive"],
                at_least=SHARE,
            ),
            Row(f"{name}: with gather", figures["seconds"], nbytes),
        ]
    return rows


def _raw(client: Peer, nbytes: int) -> dict[str, float]:
    received, seconds = client.call("receive")
    assert received == nbytes
    return {"seconds": seconds}


def fleet_case(workload: Workload, repeats: int, generators: int) -> list[Row]:
    """To many generators: on one host by shared memory, and each on a host of its own through relays."""
    nbytes = size_of(workload)
    rows = []
    for maps_memory in (True, False):
        route = "memory" if maps_memory else "network"
        with contextlib.ExitStack() as stack:
            trainer = starting(stack, Trainer.of, workload)
            sinks = [starting_generator(stack, Sink, f"generator-{i}", maps_memory) for i in range(generators)]
            sync = Sync(trainer, sinks)
            rounds = {"all": partial(sync.once, route)}
            if maps_memory:
                rounds["one"] = partial(sync.once, route, count=1)
            found = interleaved(rounds, repeats)
        figures = found["all"]
        way = "shared memory" if maps_memory else "TCP, CURVE, relays"
        name = f"{generators} generators, {way}, {workload.dtype}"
        if maps_memory:
            one = found["one"]["seconds"]
            rows.append(
                Row(name, figures["seconds"], nbytes, f"one: {one:.3f} s", figures["seconds"] / one, None, FLEET_WALL)
            )
        else:
            rows.append(Row(name, figures["seconds"], generators * nbytes))
        egress = figures["egress"]
        limit = f"the model: {nbytes / GB:.3f} GB; sent: {egress / GB:.3f} GB"
        rows.append(Row(f"{name}: publisher's egress", None, None, limit, egress / nbytes, None, FLEET_EGRESS))
    return rows


def alternatives_case(workload: Workload, repeats: int, folder: Path) -> list[Row]:
    """Alternatives without Counterpoint, from the trainer's tensors to tensors that another process has read."""
    nbytes = size_of(workload)
    with contextlib.ExitStack() as stack:
        sync = Sync(starting(stack, Trainer.of, workload), [starting_generator(stack, Sink, "one", True)])
        writer, reader = starting(stack, FileWriter, workload), starting_generator(stack, FileReader)
        pair = starting(stack, RayPair, workload)
        path = folder / "weights.safetensors"
        stack.callback(path.unlink, missing_ok=True)

        def file() -> dict[str, float]:
            started = writer.call("write", path)
            return {"seconds": reader.call("read", path) - started}

        rounds: dict[str, Callable[[], dict[str, float]]] = {
            "ours": partial(sync.once, "memory"),
            "safetensors on disk": file,
            "Ray's object store": lambda: {"seconds": pair.call("pass_on")},
        }
        found = {name: figures["seconds"] for name, figures in interleaved(rounds, repeats).items()}
    ours = found.pop("ours")
    return [
        Row(
            f"{name}, {workload.dtype}",
            seconds,
            nbytes,
            f"ours, shared memory: {ours:.3f} s, {nbytes / ours / GB:.2f} GB/s",
            seconds / ours,
            at_least=1.0,
        )
        for name, seconds in found.items()
    ]


def delta_case(workload: Workload, repeats: int, link_bytes_per_s: float) -> list[Row]:
    """A delta against the whole version, over TCP and over a slower link."""
    nbytes = size_of(workload)
    rows = []
    with contextlib.ExitStack() as stack:
        syncs = {}
        for kind, has_delta in (("full", False), ("delta", True)):
            trainer = starting(stack, Trainer.of, workload, has_delta)
            syncs[kind] = Sync(trainer, [starting_generator(stack, Sink, kind, False)])
            syncs[kind].once("network")

        def round_of(kind: str, endpoint: str | None) -> Callable[[], dict[str, float]]:
            share, route = (DELTA_SHARE, "delta") if kind == "delta" else (1.0, "network")
            return partial(syncs[kind].once, route, share=share, endpoint=endpoint)

        for rate in (None, link_bytes_per_s):
            with contextlib.ExitStack() as links:
                endpoints: dict[str, str | None] = dict.fromkeys(syncs)
                if rate is not None:
                    for kind, sync in syncs.items():
                        behind = sync.trainer.call("address")
                        link = links.enter_context(Link(behind, rate_bytes_per_s=rate))
                        endpoints[kind] = f"tcp://{link.address}"
                found = interleaved({kind: round_of(kind, endpoints[kind]) for kind in syncs}, repeats)
            full, delta = found["full"], found["delta"]
            where = "TCP, CURVE" if rate is None else f"a link of {rate / GB:g} GB/s"
            name = f"delta of {DELTA_SHARE:.0%}, {where}, {workload.dtype}"
            if rate is None:
                limit = f"the model: {nbytes / GB:.3f} GB; received: {delta['received'] / GB:.4f} GB"
                share = delta["received"] / nbytes
                rows.append(Row(f"{name}: bytes", None, None, limit, share, at_most=DELTA_BYTES))
                limit = f"share of the words changed at random: {DELTA_SHARE:g}; changed_share"
                rows.append(Row(f"{name}: words", None, None, limit, delta["changed"]))
            for part, key in (("", "seconds"), (": received alone", "receive")):
                limit = f"in full: {full[key]:.3f} s, {nbytes / full[key] / GB:.2f} GB/s"
                ratio = delta[key] / full[key]
                rows.append(Row(f"{name}{part}", delta[key], nbytes, limit, ratio, at_most=None if part else 1.0))
    return rows
