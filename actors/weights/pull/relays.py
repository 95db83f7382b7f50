"""The relay tree: assigns each generator its source, so that the trainer's egress is independent of the fleet's size.

On each host one generator, the leader, pulls over the network; the others on that host map its memory. Leaders pull
from the publisher or from a leader nearer to it, and relay the buckets that have arrived. Pure: messages in, sources
out; no sockets, no clock.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

ROOT = ""
"""Name of the publisher in the tree."""


@dataclass(frozen=True, slots=True)
class Relay:
    """A generator as a member of the tree.

    Attributes:
        name: the generator's name.
        host: equal for processes that can map each other's memory.
        endpoint: ZMQ address that it serves at; "" where it does not serve.
        server_key: its CURVE key (Z85); "" without CURVE.
    """

    name: str
    host: str
    endpoint: str
    server_key: str


@dataclass
class RelayTree:
    """The relay tree of one version.

    Invariants: no member is its own ancestor; a source has at most `fan_out` incomplete children, except that the
    publisher takes one more where no other connected source has room; of the members on one host that can serve, one
    pulls over the network; a lost source has no children; a slow source gets no further children.

    Attributes:
        fan_out: largest number of children of a source; 0 lets all members pull from the publisher.
        root_host: host of the publisher, which needs no leader.
        slow: members that have delayed others; they are assigned no further children.
    """

    fan_out: int
    root_host: str
    slow: set[str] = field(default_factory=set)
    _members: dict[str, Relay] = field(default_factory=dict)
    _parents: dict[str, str] = field(default_factory=dict)
    _pulling: dict[str, list[str]] = field(default_factory=dict)
    """By source: the members that pull from it over the network."""
    _mapping: dict[str, list[str]] = field(default_factory=dict)
    """By source: the members that map its memory; they do not count as fan-out."""
    _leaders: dict[str, str] = field(default_factory=dict)
    """By host: the leader. One that has lost its source stays leader, because it asks again."""
    _complete: set[str] = field(default_factory=set)
    """Members that have the whole version."""

    def join(self, member: Relay, lost: str | None = None) -> Relay | None:
        """Assign a member its source; None is the publisher.

        Args:
            member: the member that asks. It gets the same answer again, unless its source was lost or it is another
                process of that name.
            lost: endpoint of its source, if that sends no answer. A later process of one name has another endpoint.
        """
        known = self._members.get(member.name)
        if known is not None and known != member:
            self._leave(member.name)
        gone = next((m.name for m in self._members.values() if lost and m.endpoint == lost), member.name)
        if gone != member.name:
            self._leave(gone)
        self._members[member.name] = member
        if member.name not in self._parents:
            self._place(member)
        return self._members.get(self._parents[member.name])

    def done(self, name: str) -> None:
        """Record that a member has the whole version."""
        if name in self._members:
            self._complete.add(name)

    def pulls(self, name: str) -> bool:
        """Whether a member pulls over the network, rather than mapping another member's memory."""
        return name in self._pulling.get(self._parents.get(name, ROOT), ())

    def reassign(self, member: Relay, *, is_late: bool = False) -> Relay | None:
        """Assign a better source, if there is one, to a member that waits for its own; None is the publisher.

        A complete source with room replaces one that is incomplete, which counts as slow from then on.

        Args:
            member: the member that waits.
            is_late: it has taken much longer than others did, so even a complete source is too slow.
        """
        name, parent = member.name, self._parents.get(member.name)
        if parent is None or parent == ROOT or self._members[name] != member or not self.pulls(name):
            return self.join(member)
        if is_late or parent not in self._complete:
            whole = [each for each in self._by_distance(without=name) if each in self._complete and each != parent]
            better = next((each for each in (*whole, ROOT) if self._busy_children(each) < self.fan_out), None)
            if better is not None:
                self.slow.add(parent)
                self._pulling[parent].remove(name)
                self._parents[name] = better
                self._pulling.setdefault(better, []).append(name)
        return self._members.get(self._parents[name])

    def _leave(self, name: str) -> None:
        """Remove a member; those that pulled from it have to ask again."""
        member = self._members.pop(name, None)
        self._complete.discard(name)
        if member is not None and self._leaders.get(member.host) == name:
            del self._leaders[member.host]
        for child in (*self._pulling.pop(name, ()), *self._mapping.pop(name, ())):
            del self._parents[child]
        parent = self._parents.pop(name, None)
        for children in (self._pulling.get(parent or ROOT, []), self._mapping.get(parent or ROOT, [])):
            if name in children:
                children.remove(name)

    def _place(self, member: Relay) -> None:
        """Assign a source to a member that has none. Its own descendants cannot be chosen: they hang below it alone."""
        leader = self._leaders.get(member.host, member.name)
        if member.host == self.root_host:
            parent, children = ROOT, self._mapping
        elif self.fan_out and leader != member.name:
            parent, children = leader, self._mapping
        else:
            sources = (name for name in self._by_distance() if name not in self.slow)
            has_room = (name for name in sources if len(self._pulling.get(name, ())) < self.fan_out)
            parent, children = next(has_room, ROOT), self._pulling
            if member.endpoint:
                self._leaders[member.host] = member.name
        self._parents[member.name] = parent
        children.setdefault(parent, []).append(member.name)

    def _busy_children(self, name: str) -> int:
        """Number of a source's children that are incomplete."""
        return sum(child not in self._complete for child in self._pulling.get(name, ()))

    def _by_distance(self, without: str | None = None) -> Iterator[str]:
        """Sources from the publisher outwards, breadth first, without one member and its descendants."""
        level = [ROOT]
        while level:
            yield from level
            children = (child for name in level for child in self._pulling.get(name, ()) if child != without)
            level = [child for child in children if self._members[child].endpoint]
