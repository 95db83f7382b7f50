"""The tree of those who pull a version: where each is sent, and what holds whoever comes, goes and comes back."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from actors.weights.pull.relays import ROOT, Relay, RelayTree

TRAINER = "trainer"
"""The publisher's host."""


def relay(name: str, host: str | None = None, *, process: int = 1, serves: bool = True) -> Relay:
    return Relay(name, host or f"host of {name}", f"tcp://{name}:{process}" if serves else "", "key")


def tree_of(*members: Relay, fan_out: int = 2) -> RelayTree:
    tree = RelayTree(fan_out, TRAINER)
    for member in members:
        tree.join(member)
    return tree


def children_of(tree: RelayTree, name: str) -> list[str]:
    """Who pulls from a source over the network; ROOT is the publisher."""
    return list(tree._pulling.get(name, ()))


def parent_of(tree: RelayTree, name: str) -> str | None:
    """A member's source; None for who has none and has to ask."""
    return tree._parents.get(name)


def test_seven_hosts_form_a_binary_tree():
    tree = tree_of(*map(relay, "abcdefg"))
    # a and b pull from the publisher; each of them serves two: the first places that are free, nearest first
    assert {source: children_of(tree, source) for source in (ROOT, *"abcdefg") if children_of(tree, source)} == {
        ROOT: ["a", "b"],
        "a": ["c", "d"],
        "b": ["e", "f"],
        "c": ["g"],
    }


def test_the_answer_is_the_relay_itself_or_none_for_the_publisher():
    tree = RelayTree(1, TRAINER)
    assert tree.join(relay("a")) is None
    assert tree.join(relay("b")) == relay("a")
    assert parent_of(tree, "b") == "a"
    assert parent_of(tree, "c") is None


def test_asking_again_gives_the_same_answer():
    tree = tree_of(*map(relay, "abcd"), fan_out=1)
    assert [tree.join(relay(name)) for name in "abcd"] == [None, relay("a"), relay("b"), relay("c")]


def test_one_generator_of_each_host_pulls_and_the_others_map_its_memory():
    tree = tree_of(relay("a", "x"), relay("b", "x"), relay("c", "y"), relay("d", "x"), relay("e", "y"), fan_out=1)
    assert [parent_of(tree, name) for name in "abcde"] == [ROOT, "a", "a", "a", "c"]
    assert (children_of(tree, ROOT), children_of(tree, "a"), children_of(tree, "c")) == (["a"], ["c"], [])


def test_the_publishers_own_host_needs_no_leader_and_takes_no_place():
    tree = tree_of(relay("a", TRAINER), relay("b", TRAINER), relay("c"), fan_out=1)
    assert [parent_of(tree, name) for name in "abc"] == [ROOT, ROOT, ROOT]
    assert children_of(tree, ROOT) == ["c"]


@given(st.lists(st.sampled_from(["x", "y", TRAINER]), min_size=1, max_size=20))
def test_without_a_fan_out_everybody_pulls_from_the_publisher(hosts):
    tree = RelayTree(0, TRAINER)
    assert [tree.join(relay(str(i), host)) for i, host in enumerate(hosts)] == [None] * len(hosts)


def test_those_who_serve_nobody_are_nobodys_source():
    tree = tree_of(*(relay(name, serves=False) for name in "abc"), relay("d"), relay("e"), fan_out=1)
    # there is no source with room until d joins; all before it, and d itself, go to the publisher
    assert [parent_of(tree, name) for name in "abcde"] == [ROOT, ROOT, ROOT, ROOT, "d"]


def test_a_host_where_nobody_serves_has_no_leader():
    tree = tree_of(*(relay(name, "x", serves=False) for name in "ab"), relay("c", "x"), relay("d", "x"))
    assert [parent_of(tree, name) for name in "abcd"] == [ROOT, ROOT, ROOT, "c"]


def test_who_loses_a_source_gets_another_and_so_do_the_others_that_had_it():
    tree = tree_of(*map(relay, "abcd"), fan_out=1)
    assert tree.join(relay("c"), lost=relay("b").endpoint) == relay("a")
    assert tree.join(relay("d")) == relay("c")
    assert parent_of(tree, "b") is None
    assert tree.join(relay("b")) == relay("d"), "it was alive after all, and joins at the end"


def test_a_new_process_by_the_name_of_one_that_was_lost_keeps_its_place():
    tree = tree_of(*map(relay, "ab"), fan_out=1)
    assert tree.join(relay("a", process=2)) is None
    assert tree.join(relay("b"), lost=relay("a").endpoint) == relay("a", process=2)
    assert parent_of(tree, "a") == ROOT


def test_a_new_process_by_the_same_name_takes_over_no_children():
    tree = tree_of(*map(relay, "abc"), fan_out=1)
    assert tree.join(relay("a", process=2)) is None
    assert children_of(tree, "a") == []
    assert tree.join(relay("b")) == relay("a", process=2)


def test_a_host_whose_leader_is_lost_gets_another():
    tree = tree_of(*(relay(name, "x") for name in "abc"), relay("d"), fan_out=1)
    assert tree.join(relay("b", "x"), lost=relay("a").endpoint) is None
    assert tree.join(relay("c", "x")) == relay("b", "x")
    assert tree.join(relay("a", "x")) == relay("b", "x")


def test_a_leader_that_lost_its_source_stays_its_hosts_leader():
    tree = tree_of(relay("a"), relay("b", "x"), relay("c", "x"), fan_out=1)
    tree.join(relay("z"), lost=relay("a").endpoint)  # so b has no source, until it asks again
    assert tree.join(relay("d", "x")) == relay("b", "x")
    assert tree.join(relay("b", "x")) == relay("z")
    assert children_of(tree, "z") == ["b"]


def test_who_waits_at_a_slow_source_goes_on_from_one_that_has_all_of_it():
    tree = tree_of(*map(relay, "abcd"))  # c and d pull from a
    assert tree.reassign(relay("c")) == relay("a"), "nobody has more than a"
    tree.done("b")
    assert tree.reassign(relay("c")) == relay("b")
    assert tree.reassign(relay("d")) == relay("b")
    assert (children_of(tree, "a"), children_of(tree, "b")) == ([], ["c", "d"])
    assert tree.join(relay("e")) == relay("c"), "a gets no more children, and b has no room"


def test_a_source_that_has_all_of_it_is_left_only_by_who_is_late():
    tree = tree_of(*map(relay, "abcd"))
    for name in "ab":
        tree.done(name)
    assert tree.reassign(relay("c")) == relay("a")
    assert tree.reassign(relay("c"), is_late=True) == relay("b")
    assert tree.slow == {"a"}


def test_the_publisher_itself_helps_out_once_those_that_pull_from_it_have_all_of_it():
    tree = tree_of(*map(relay, "abcdef"))  # a: c, d; b: e, f
    tree.done("b")
    assert tree.reassign(relay("c")) is None
    assert tree.reassign(relay("d")) == relay("a"), "the publisher's other child is a, so now it has no room"
    tree.done("e")
    assert tree.reassign(relay("d")) == relay("b")


def test_nobody_goes_to_one_that_has_it_from_itself():
    tree = tree_of(*map(relay, "abc"), fan_out=1)
    tree.done("c")  # most of it from an earlier version, say
    assert tree.reassign(relay("b")) == relay("a")
    assert tree.reassign(relay("a")) is None


def test_those_who_were_slow_with_the_version_before_get_no_children():
    tree = RelayTree(1, TRAINER, slow={"a"})
    for name in "ab":
        tree.join(relay(name))
    assert children_of(tree, ROOT) == ["a", "b"], "there is nobody else to send b to"
    assert tree.join(relay("c")) == relay("b")


@given(st.integers(1, 4), st.lists(st.sampled_from([*"uvwxyz", TRAINER]), max_size=60))
def test_the_publisher_serves_at_most_its_fan_out_over_the_network_however_many_join(fan_out, hosts):
    tree = tree_of(*(relay(str(i), host) for i, host in enumerate(hosts)), fan_out=fan_out)
    leaders = len(set(hosts) - {TRAINER})
    assert len(children_of(tree, ROOT)) == min(fan_out, leaders)
    assert sum(len(children_of(tree, name)) for name in (ROOT, *map(str, range(len(hosts))))) == leaders


@pytest.mark.parametrize("fan_out", [1, 2, 3, 8])
def test_a_thousand_hosts_are_as_near_to_the_publisher_as_the_fan_out_allows(fan_out):
    count = 60 if fan_out == 1 else 1000
    tree = tree_of(*(relay(str(i)) for i in range(count)), fan_out=fan_out)
    depths = {ROOT: 0}
    for name in map(str, range(count)):
        parent = parent_of(tree, name)
        assert parent is not None
        depths[name] = depths[parent] + 1
    # level k has room for fan_out ** k
    room, depth = 0, 0
    while room < count:
        depth += 1
        room += fan_out**depth
    assert max(depths.values()) == depth


class Comings(RuleBasedStateMachine):
    """Generators join, lose their sources, are lost, restart and move in any order."""

    @initialize(fan_out=st.integers(0, 3))
    def begin(self, fan_out: int) -> None:
        self.tree = RelayTree(fan_out, TRAINER)
        self.known: dict[str, Relay] = {}
        self.lost: set[str] = set()
        self.complete: set[str] = set()
        self.processes = 0

    def ask(self, member: Relay, lost: str | None = None) -> None:
        before = parent_of(self.tree, member.name)
        is_same = self.known.get(member.name) == member
        self.complete -= set() if is_same else {member.name}
        self.known[member.name] = member
        self.lost.discard(member.name)
        endpoint = self.known[lost].endpoint if lost in self.known else lost
        if endpoint and lost != member.name:
            self.lost.add(lost)
            self.complete.discard(lost)
        answer = self.tree.join(member, endpoint)
        parent = parent_of(self.tree, member.name)
        assert answer == (None if parent == ROOT else self.known[parent])
        if is_same and before not in (None, lost):
            assert parent == before, "asking again gives the same answer"
            return
        if self.tree.fan_out == 0 or member.host == TRAINER:
            assert parent == ROOT
            return
        leaders = [name for name in self.leaders(member.host) if name != member.name]
        assert leaders in ([], [parent]), "whose host has a leader maps its memory"
        if parent == ROOT and len(children_of(self.tree, ROOT)) > self.tree.fan_out:
            assert not self.with_room(member.name), "the publisher takes one more only where nobody else can"

    def chain(self, name: str) -> list[str]:
        """A member, its source, and so on."""
        chain = [name]
        while (parent := parent_of(self.tree, chain[-1])) not in (None, ROOT):
            assert parent not in chain, f"{parent} is its own ancestor"
            chain.append(parent)
        return chain

    def maps(self, name: str) -> bool:
        parent = parent_of(self.tree, name)
        if parent is None:
            return False
        return self.known[name].host == (TRAINER if parent == ROOT else self.known[parent].host)

    def leaders(self, host: str) -> list[str]:
        """Members that pull over the network and serve."""
        return [
            name
            for name, member in self.known.items()
            if member.host == host
            and member.endpoint
            and name not in self.lost
            and parent_of(self.tree, name) is not None
            and not self.maps(name)
        ]

    def with_room(self, name: str) -> list[str]:
        """Living sources that aren't the member's own descendants, and could take another child."""
        return [
            other
            for other, member in self.known.items()
            if member.endpoint
            and other not in self.lost
            and not self.maps(other)
            and other not in self.tree.slow
            and len(children_of(self.tree, other)) < self.tree.fan_out
            and parent_of(self.tree, other) is not None
            and name not in self.chain(other)
            and parent_of(self.tree, self.chain(other)[-1]) == ROOT
        ]

    @rule(
        name=st.sampled_from("abcdefgh"),
        host=st.sampled_from(["x", "y", "z", "own", "own", "own", TRAINER]),
        serves=st.sampled_from([True, True, True, False]),
    )
    def starts(self, name: str, host: str, serves: bool) -> None:
        """For the first time, or again, perhaps elsewhere: another process in any case."""
        self.processes += 1
        self.ask(relay(name, None if host == "own" else host, process=self.processes, serves=serves))

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def asks_again(self, data: st.DataObject) -> None:
        self.ask(self.known[data.draw(st.sampled_from(sorted(self.known)))])

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def loses_its_source(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.known)))
        self.ask(self.known[name], parent_of(self.tree, name) or None)

    @precondition(lambda self: self.known)
    @rule(data=st.data(), lost=st.sampled_from([*"abcdefgh", "nobody"]))
    def loses_anybody(self, data: st.DataObject, lost: str) -> None:
        """Its source of an hour ago, say."""
        self.ask(self.known[data.draw(st.sampled_from(sorted(self.known)))], lost)

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def has_all_of_it(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.known)))
        self.tree.done(name)
        if name not in self.lost:
            self.complete.add(name)

    @precondition(lambda self: self.known)
    @rule(data=st.data(), is_late=st.booleans())
    def waits(self, data: st.DataObject, is_late: bool) -> None:
        name = data.draw(st.sampled_from(sorted(set(self.known) - self.lost) or sorted(self.known)))
        before, mapped = parent_of(self.tree, name), self.maps(name)
        self.lost.discard(name)
        answer = self.tree.reassign(self.known[name], is_late=is_late)
        parent = parent_of(self.tree, name)
        assert answer == (None if parent == ROOT else self.known[parent])
        if before is not None and parent != before:
            assert not mapped
            assert before in self.tree.slow
            assert is_late or before not in self.complete
            assert parent == ROOT or parent in self.complete
            assert len(set(children_of(self.tree, parent)) - self.complete - {name}) < self.tree.fan_out

    @invariant()
    def nobody_is_its_own_ancestor(self) -> None:
        for name in getattr(self, "known", {}):
            self.chain(name)

    @invariant()
    def relays_have_no_more_children_than_the_fan_out(self) -> None:
        for name in getattr(self, "known", {}):
            assert len(set(children_of(self.tree, name)) - self.complete) <= self.tree.fan_out

    @invariant()
    def every_source_serves(self) -> None:
        for name in getattr(self, "known", {}):
            parent = parent_of(self.tree, name)
            assert parent in (None, ROOT) or self.known[parent].endpoint

    @invariant()
    def the_lost_have_no_children(self) -> None:
        for name in getattr(self, "known", {}):
            assert parent_of(self.tree, name) not in self.lost

    @invariant()
    def a_host_has_one_leader(self) -> None:
        for host in {member.host for member in getattr(self, "known", {}).values()} - {TRAINER}:
            assert self.tree.fan_out == 0 or len(self.leaders(host)) <= 1

    @invariant()
    def who_maps_memory_maps_it_of_one_who_pulls(self) -> None:
        for name in getattr(self, "known", {}):
            parent = parent_of(self.tree, name)
            assert parent in (None, ROOT) or not self.maps(parent)

    def teardown(self) -> None:
        """Everybody who asks reaches the publisher."""
        for _ in range(2):
            for member in getattr(self, "known", {}).values():
                self.ask(member)
        for name in getattr(self, "known", {}):
            assert parent_of(self.tree, self.chain(name)[-1]) == ROOT


TestComings = Comings.TestCase
TestComings.settings = settings(deadline=None, max_examples=150, stateful_step_count=30)


def test_relays_are_told_apart_by_all_that_they_are():
    tree = tree_of(relay("a"), relay("b"), fan_out=1)
    for other in (replace(relay("a"), server_key="other"), replace(relay("a"), host="other")):
        tree.join(other)
        assert children_of(tree, "a") == []
        assert tree.join(relay("b")) == other
