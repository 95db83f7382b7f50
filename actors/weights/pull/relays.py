"""Who pulls a policy version from whom: a tree over hosts, so that the trainer's egress doesn't grow with the fleet.

On each host one generator, the leader, pulls over the network; the others of that host map its memory. Leaders pull
from the publisher or from a leader that is nearer to it, and serve onward what has arrived. Pure: messages in, sources
out; no sockets, no clock.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

ROOT = ""
"""Name of the publisher in the tree."""


@dataclass(frozen=True, slots=True)
class Relay:
    """A generator that can serve others.

    Attributes:
        name: of the generator.
        host: equal for processes that can map each other's memory.
        endpoint: ZMQ address it serves at; "" where it serves nobody.
        server_key: CURVE key it is known by (Z85); "" without CURVE.
    """

    name: str
    host: str
    endpoint: str
    server_key: str


@dataclass
class RelayTree:
    """The tree of one version.

    Invariants: nobody is its own ancestor; a source has at most `fan_out` children that don't have all of it yet,
    unless no other source that has a place itself has room, in which case the publisher takes one more; of the members
    on one host that can serve, one pulls over the network; a lost source has no children; a slow one gets no more.

    Attributes:
        fan_out: children of each source; 0 lets everybody pull from the publisher.
        root_host: of the publisher: its own host needs no leader.
        slow: members that have held up others: nobody is sent to them.
    """

    fan_out: int
    root_host: str
    slow: set[str] = field(default_factory=set)
    _members: dict[str, Relay] = field(default_factory=dict)
    _parents: dict[str, str] = field(default_factory=dict)
    _pulling: dict[str, list[str]] = field(default_factory=dict)
    """By source, who pulls from it over the network."""
    _mapping: dict[str, list[str]] = field(default_factory=dict)
    """By source, who takes the version from its memory, and so isn't in anybody's fan-out."""
    _leaders: dict[str, str] = field(default_factory=dict)
    """By host; a leader whose source is gone stays one, for it asks again."""
    _complete: set[str] = field(default_factory=set)
    """Members that have all of it."""

    def join(self, member: Relay, lost: str | None = None) -> Relay | None:
        """Where a member is to pull from; None for the publisher.

        Args:
            member: who asks. Asking again gives the same answer, unless its source is gone, or it is another process.
            lost: endpoint of the source it has, if that doesn't answer. A later process by the same name isn't meant.
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
        """A member has all of it."""
        if name in self._members:
            self._complete.add(name)

    def pulls(self, name: str) -> bool:
        """Whether a member pulls over the network; otherwise it maps another one's memory."""
        return name in self._pulling.get(self._parents.get(name, ROOT), ())

    def relieve(self, member: Relay, *, is_late: bool = False) -> Relay | None:
        """Where a member goes on that has been waiting at its source for a while; None for the publisher.

        If there is a source that has all of it and has room, and its own hasn't, it goes there. What it has arrives no
        later for that, and its own source counts as slow from then on.

        Args:
            member: who waits.
            is_late: it has been at it for much longer than others took: even a source that has all of it is too slow.
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

    def children(self, name: str) -> list[str]:
        """Who pulls from a source over the network; ROOT for the publisher."""
        return list(self._pulling.get(name, ()))

    def parent(self, name: str) -> str | None:
        """The source a member was given; ROOT for the publisher, None for who isn't in the tree or has to ask anew."""
        return self._parents.get(name)

    def _leave(self, name: str) -> None:
        """A process is gone: those that pulled from it ask anew."""
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
        """Give it a source. It has no descendants among those reached: they are reached through it alone."""
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
        """How many pull from a source and don't have all of it yet."""
        return sum(child not in self._complete for child in self._pulling.get(name, ()))

    def _by_distance(self, without: str | None = None) -> Iterator[str]:
        """Sources from the publisher outwards, breadth first; without a member and those behind it."""
        level = [ROOT]
        while level:
            yield from level
            children = (child for name in level for child in self._pulling.get(name, ()) if child != without)
            level = [child for child in children if self._members[child].endpoint]
