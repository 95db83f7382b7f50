"""The table of run kinds: which schema, checks and training loop belong to each command that trains.

A new kind of run is a new row here, a schema and a loop. The command line, `check`, `config` and `export` read the
table. It is imported by `counterpoint --help`, so each row imports what it names only when it is asked.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from actors.trainer.policy import PolicyGroup
    from orchestrator.config.schema import Config, SFTConfig
    from orchestrator.preflight.checks import Finding


class UnknownKindError(ValueError):
    """A recipe or an option names no run kind, or more than one; the message lists the kinds."""


class Loop(Protocol):
    """A run kind's training loop, as the run shell sees it."""

    @property
    def policy(self) -> PolicyGroup:
        """The trainer, which exports the model at the end."""
        ...

    @property
    def is_whole(self) -> bool:
        """Whether the trainer's state is that of a whole step, so that a checkpoint may be written."""
        ...

    async def train(self) -> None:
        """Train from the state's step to the last one. Raises FailureError where a role or a budget is lost."""
        ...

    async def checkpoint(self) -> None:
        """Write a checkpoint of the last whole step."""
        ...


@dataclass(frozen=True)
class RunKind:
    """One kind of run.

    Attributes:
        command: its command, which is also its name.
        help: the command's help text.
        sections: sections of a recipe that only this kind has; they tell which kind a recipe is of.
        schema: gives the class of its settings.
        checks: gives the function that finds what is wrong before anything starts.
        body: gives the context manager that starts a loop from (config, state, checkpoints, telemetry, checkpoint) and
            stops everything at its end.
    """

    command: str
    help: str
    sections: tuple[str, ...]
    schema: Callable[[], type[Config] | type[SFTConfig]]
    checks: Callable[[], Callable[..., list[Finding]]]
    body: Callable[[], Callable[..., AbstractAsyncContextManager[Loop]]]


def _train_schema() -> type[Config]:
    from orchestrator.config.schema import Config

    return Config


def _sft_schema() -> type[SFTConfig]:
    from orchestrator.config.schema import SFTConfig

    return SFTConfig


def _preflight() -> Callable[..., list[Finding]]:
    from orchestrator.preflight.checks import preflight

    return preflight


def _train_body() -> Any:
    from orchestrator.assembly import start_training

    return start_training


def _sft_body() -> Any:
    from orchestrator.sft import start_fine_tuning

    return start_fine_tuning


RUN_KINDS = (
    RunKind(
        "train",
        "Train a policy by reinforcement learning.",
        ("reward", "rollout", "algorithm"),
        _train_schema,
        _preflight,
        _train_body,
    ),
    RunKind("sft", "Fine-tune a model on given responses.", ("sft",), _sft_schema, _preflight, _sft_body),
)


def kind_named(command: str) -> RunKind:
    """The run kind of a command.

    Raises:
        UnknownKindError: there is none of that name.
    """
    for kind in RUN_KINDS:
        if kind.command == command:
            return kind
    known = ", ".join(kind.command for kind in RUN_KINDS)
    raise UnknownKindError(f"{command} is not a kind of run. Choose one of: {known}.")


def kind_of(sections: Collection[str]) -> RunKind:
    """The run kind of a recipe with these sections.

    Raises:
        UnknownKindError: no section belongs to one kind alone, or sections of several kinds are mixed.
    """
    found = [kind for kind in RUN_KINDS if any(name in sections for name in kind.sections)]
    if len(found) == 1:
        return found[0]
    if not found:
        known = "; ".join(f"{' or '.join(kind.sections)} for `counterpoint {kind.command}`" for kind in RUN_KINDS)
        raise UnknownKindError(f"no section says which kind of run it is. Add one of: {known}.")
    mixed = " and ".join(
        f"{', '.join(name for name in kind.sections if name in sections)} (of `counterpoint {kind.command}`)"
        for kind in found
    )
    raise UnknownKindError(f"it mixes sections of several kinds of run: {mixed}. Keep those of one kind.")


def kind_of_recipe(recipe: Path) -> RunKind:
    """The run kind of a recipe's file.

    Raises:
        ConfigError: it can't be read, or it tells no single kind.
    """
    from orchestrator.config.loading import ConfigError, read_recipe

    sections = read_recipe(recipe)
    try:
        return kind_of(sections)
    except UnknownKindError as error:
        raise ConfigError([f"{recipe}: {error}"]) from None
