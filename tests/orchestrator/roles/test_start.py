"""Roles are started side by side, as far as they are needed and asked for, and every one of them is stopped."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import orchestrator.roles.start as module
from orchestrator.config.schema import Config, SFTConfig
from orchestrator.roles.start import start_roles
from orchestrator.roles.table import ROLES
from rollout.failures import FailureError
from tests.orchestrator.stand_ins import Events, infrastructure

PLAIN: dict[str, Any] = {
    "model": {"path": "model"},
    "data": {"train": {"path": "train.jsonl"}},
    "reward": {"components": [{"function": "value"}]},
    "algorithm": {"advantage": "gae", "kl": {"coefficient": 0.1}},
    "deadlines": {"stop_s": 0.1},
}


class Running:
    """A started role."""

    def __init__(self, name: str, can_stop: bool = True) -> None:
        self.name = name
        self.can_stop = can_stop
        self.is_stopped = False

    async def stop(self) -> None:
        if not self.can_stop:
            await asyncio.sleep(60)
        self.is_stopped = True


class Stage:
    """The table with starts that are stand-ins."""

    def __init__(self) -> None:
        self.running: dict[str, Running] = {}
        self.failing: set[str] = set()
        self.hanging: set[str] = set()
        self.cut: list[str] = []
        """Starts that were cancelled."""
        self.cannot_stop: set[str] = set()
        self.rows = tuple(replace(role, start=self._starting(role.name)) for role in ROLES)

    def _starting(self, name: str) -> Any:
        async def start(config: Any, media_folder: Path, on_event: Any) -> Running:
            try:
                await asyncio.sleep(60.0 if name in self.hanging else 0.0)
            except asyncio.CancelledError:
                self.cut.append(name)
                raise
            if name in self.failing:
                raise infrastructure(f"{name}_died")
            self.running[name] = Running(name, name not in self.cannot_stop)
            return self.running[name]

        return start


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Stage:
    made = Stage()
    monkeypatch.setattr(module, "ROLES", made.rows)
    monkeypatch.setattr(module, "needed_roles", lambda config: [r for r in made.rows if r.is_needed(config)])
    return made


async def test_every_role_that_the_run_needs_is_started_and_stopped(stage: Stage, tmp_path: Path) -> None:
    async with start_roles(Config.model_validate(PLAIN), tmp_path, Events()) as roles:
        assert sorted(stage.running) == ["critic", "generator", "policy", "reference", "reward"]
        found = (roles.policy, roles.critic, roles.fleet, roles.reference, roles.rewards)
        assert [role.name for role in found] == ["policy", "critic", "generator", "reference", "reward"]  # type: ignore[union-attr]
        assert not any(role.is_stopped for role in stage.running.values())
    assert all(role.is_stopped for role in stage.running.values())


async def test_a_role_that_is_not_needed_starts_nothing(stage: Stage, tmp_path: Path) -> None:
    plain = Config.model_validate({**PLAIN, "algorithm": {"kl": {"coefficient": 0.0}}})
    async with start_roles(plain, tmp_path, Events()) as roles:
        assert sorted(stage.running) == ["generator", "policy", "reward"]
        assert (roles.critic, roles.reference) == (None, None)


async def test_only_the_roles_that_were_asked_for_are_started(stage: Stage, tmp_path: Path) -> None:
    names = ("policy", "generator", "reward")
    async with start_roles(Config.model_validate(PLAIN), tmp_path, Events(), names) as roles:
        assert sorted(stage.running) == ["generator", "policy", "reward"]
        assert (roles.critic, roles.reference) == (None, None)


async def test_a_role_that_was_asked_for_and_is_not_needed_is_none(stage: Stage, tmp_path: Path) -> None:
    supervised = SFTConfig.model_validate({name: PLAIN[name] for name in ("model", "data")})
    async with start_roles(supervised, tmp_path, Events(), names={"policy", "reference"}) as roles:
        assert list(stage.running) == ["policy"]
        assert roles.reference is None


async def test_a_name_that_is_no_role_is_refused_with_the_roles_that_there_are(stage: Stage, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no role polcy; the roles are policy, critic, generator, reference, reward"):
        async with start_roles(Config.model_validate(PLAIN), tmp_path, Events(), names=["polcy"]):
            pass
    assert stage.running == {}


async def test_where_one_start_fails_the_others_are_cut_or_stopped(stage: Stage, tmp_path: Path) -> None:
    stage.failing, stage.hanging = {"critic"}, {"generator"}
    with pytest.raises(FailureError, match="critic_died"):
        async with start_roles(Config.model_validate(PLAIN), tmp_path, Events()):
            pytest.fail("not all roles have started")
    assert stage.cut == ["generator"]
    assert sorted(stage.running) == ["policy", "reference", "reward"]
    assert all(role.is_stopped for role in stage.running.values())


async def test_a_role_that_does_not_stop_holds_up_the_others_for_a_bounded_time(stage: Stage, tmp_path: Path) -> None:
    stage.cannot_stop = {"generator"}
    async with asyncio.timeout(5):
        async with start_roles(Config.model_validate(PLAIN), tmp_path, Events()):
            pass
    assert [name for name, role in stage.running.items() if not role.is_stopped] == ["generator"]
