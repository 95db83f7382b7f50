"""The test's side of tests/actors/weights/sync_process.py: starts parties, tells them what to do, waits, kills them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from actors.weights.offer import WeightsOffer
from tests.actors.weights import sync_process
from tests.hosts import ROOT, Host

DEADLINE_S = 60.0
"""For anything that has to happen; it takes fractions of a second."""
PATIENCE_S = 0.4
RECEIVE_S = 30.0
truth = cache(sync_process.truth)


class TransportError(Exception):
    """A party's failure. `reason` as in the transport."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(f"{reason}: {message}")
        self.reason = reason


class Party:
    """One process. Its events are kept in the order in which it told them."""

    def __init__(self, connection: socket.socket, name: str) -> None:
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        self.pid = struct.unpack("3i", credentials)[0]
        self.name = name
        self.events: list[dict[str, Any]] = []
        self.is_over = False
        self._connection = connection
        self._changed = threading.Condition()
        self._numbers = 0
        threading.Thread(target=self._listen, daemon=True).start()

    def tell(self, do: str, **fields: Any) -> None:
        """A command without an answer."""
        with contextlib.suppress(OSError):
            self._connection.sendall(json.dumps({"do": do, **fields}).encode() + b"\n")

    def ask(self, do: str, **fields: Any) -> Call:
        """A command whose answer may take a while."""
        self._numbers += 1
        call = Call(self, self._numbers, len(self.events))
        self.tell(do, number=self._numbers, **fields)
        return call

    def receive(self, offer: WeightsOffer, deadline_s: float = RECEIVE_S, **options: Any) -> Call:
        """See :meth:`actors.weights.pull.receiver.WeightReceiver.receive`; what was received is loaded, too."""
        return self.ask("receive", offer=sync_process.packed(offer), deadline_s=deadline_s, **options)

    def publish(self, version: int, seed: int = 0) -> WeightsOffer:
        """See :meth:`actors.weights.pull.publisher.WeightPublisher.publish`."""
        return sync_process.unpacked(self.ask("publish", version=version, seed=seed).result())

    def stop_at(self, phase: str) -> None:
        """Stop at this phase, the next time that it is reached."""
        self.tell("stop_at", phase=phase)

    def until_stopped(self, phase: str) -> None:
        """Wait until it has stopped there."""
        self.until(lambda event: event.get("phase") == phase and event["is_stop"], f"stop at {phase}")

    def go(self) -> None:
        """Go on."""
        self.tell("go")

    def kill(self) -> None:
        """kill -9, and wait until it is gone."""
        os.kill(self.pid, signal.SIGKILL)
        with self._changed:
            assert self._changed.wait_for(lambda: self.is_over, DEADLINE_S), f"{self.name} can't be killed"

    def close(self) -> None:
        """End it, by whatever means."""
        if not self.is_over:
            self.kill()
        self._connection.close()

    def until(self, wanted: Callable[[dict[str, Any]], bool], what: str, since: int = 0) -> dict[str, Any]:
        """The first event of a kind after the first `since`."""

        def found() -> dict[str, Any] | None:
            return next((event for event in self.events[since:] if wanted(event)), None)

        with self._changed:
            self._changed.wait_for(lambda: found() or self.is_over, DEADLINE_S)
            event = found()
            assert event is not None, f"{self.name} ({'gone' if self.is_over else 'alive'}): no {what}: {self.events}"
            return event

    @property
    def logs(self) -> list[str]:
        """Its warnings."""
        return [event["log"] for event in self.events if "log" in event]

    def memories(self) -> set[tuple[int, int]]:
        """Device and inode of every memory of weights that it holds open or mapped."""
        found = set()
        for descriptor in Path(f"/proc/{self.pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                if "counterpoint-weights" in os.readlink(descriptor):
                    found.add((descriptor.stat().st_dev, descriptor.stat().st_ino))
        for line in Path(f"/proc/{self.pid}/maps").read_text().splitlines():
            if "counterpoint-weights" in line:
                major, minor = (int(number, 16) for number in line.split()[3].split(":"))
                found.add((os.makedev(major, minor), int(line.split()[4])))
        return found

    def _listen(self) -> None:
        with contextlib.suppress(OSError), self._connection.makefile() as lines:
            for line in lines:
                with self._changed:
                    self.events.append(json.loads(line))
                    self._changed.notify_all()
        with self._changed:
            self.is_over = True
            self._changed.notify_all()


@dataclass
class Call:
    """A command under way."""

    party: Party
    number: int
    since: int

    def passed(self, phase: str) -> dict[str, Any]:
        """Wait until it has come to a phase."""
        return self.party.until(lambda event: event.get("phase") == phase, phase, self.since)

    def result(self) -> Any:
        """What came of it.

        Raises:
            TransportError: nothing did.
        """
        event = self.party.until(lambda event: event.get("number") == self.number, "answer", self.since)
        if "failure" in event:
            raise TransportError(event["failure"], event["message"])
        return event["result"]

    def outcome(self) -> Any:
        """The result, or the reason of the failure."""
        try:
            return self.result()
        except TransportError as error:
            return error.reason


@dataclass
class Template:
    """Makes parties by forking, on this machine or in one of its hosts."""

    host: Host | None = None
    parties: list[Party] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="parties-"))
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self._folder / "socket"))
        self._listener.listen()
        self._listener.settimeout(DEADLINE_S)
        module, pipes = "tests.actors.weights.sync_process", {"stdin": subprocess.PIPE, "text": True}
        if self.host is None:
            self._process = subprocess.Popen([sys.executable, "-m", module], cwd=ROOT, **pipes)  # type: ignore[call-overload]
        else:
            self._process = self.host.python(module, **pipes)

    def publisher(self, **settings: Any) -> Party:
        """A new process that publishes; settings of WeightPublisher, and `scale` of the model."""
        party = self._party("publisher")
        party.tell("be_publisher", **settings)
        return party

    def receiver(self, name: str, **settings: Any) -> Party:
        """A new process that receives; settings of ReceiverSettings."""
        party = self._party(name)
        party.tell("be_receiver", name=name, **({"patience_s": PATIENCE_S} | settings))
        return party

    def close(self) -> None:
        """End everything that was started."""
        for party in self.parties:
            party.close()
        self._process.kill()
        self._process.wait(DEADLINE_S)
        self._listener.close()
        shutil.rmtree(self._folder)

    def end_parties(self) -> None:
        """End every party, and keep the template for others."""
        for party in self.parties:
            party.close()
        self.parties.clear()

    def _party(self, name: str) -> Party:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{self._folder / 'socket'}\n")
        self._process.stdin.flush()
        connection, _ = self._listener.accept()
        self.parties.append(Party(connection, name))
        return self.parties[-1]


@contextlib.contextmanager
def template(host: Host | None = None) -> Iterator[Template]:
    """Closed at the end of the block."""
    made = Template(host)
    try:
        yield made
    finally:
        made.close()


def left_behind() -> list[Path]:
    """Files of weights that outlive their processes; there never are any. Others' have a name for a moment."""
    folders = ("/dev/shm", tempfile.gettempdir())
    found = [path for folder in folders for path in Path(folder).glob("*counterpoint-weig*")]
    if found:
        time.sleep(2.0)
    return [path for path in found if path.exists()]


def until(happened: Callable[[], Any], what: str) -> Any:
    """Wait for something outside of the parties."""
    end = time.monotonic() + DEADLINE_S
    while not (found := happened()):
        assert time.monotonic() < end, f"no {what}"
        time.sleep(0.01)
    return found
