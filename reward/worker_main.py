"""The worker process: imports the user's modules once, then scores calls until its server closes the connection.

Started by ``reward.worker_pool`` as ``python -m reward.worker_main <descriptor>``; it talks over an inherited socket,
whose other end only its parent holds. Light on imports: no torch, no Ray, unless the user's modules bring them.
"""

from __future__ import annotations

import faulthandler
import os
import select
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import reward.verifiers  # noqa: F401  registers the built-in verifiers
from reward.config import RewardComponentConfig
from reward.registry import RewardRequest, UnknownRewardError, get_reward_function
from reward.scoring import ComponentValues, raised, read_value, read_values
from rollout.failures import Failure, FailureError, FailureKind
from rollout.user_code import import_modules

CallResult = ComponentValues | Failure


@dataclass(frozen=True)
class SetUp:
    """First message. The answer: None, or the Failure of a module."""

    modules: tuple[Path, ...]


@dataclass(frozen=True)
class Check:
    """Do the functions exist and accept their arguments? The answer: None or a Failure."""

    components: tuple[RewardComponentConfig, ...]


@dataclass(frozen=True)
class Call:
    """Score these completions of one prompt with one function.

    The answers: lists of outcomes, in order, until there is one a request. A function that scores one completion
    answers after each, so that the server can hold every call to its deadline and knows which one broke it.
    """

    label: str
    function: str
    arguments: Mapping[str, Any]
    requests: tuple[RewardRequest, ...]


def outcomes(call: Call) -> Iterator[list[CallResult]]:
    """Run the call: one list of one outcome a request, or one list of all where the function takes the group."""
    requests = list(call.requests)
    prompt_id = requests[0].prompt_id
    try:
        function = get_reward_function(call.function)
    except UnknownRewardError as error:
        yield [Failure(FailureKind.USER_CODE, "reward_unknown_function", str(error))] * len(requests)
        return
    if function.takes_group:
        try:
            values = function.call(requests, call.arguments)
        except BaseException as error:  # a user's sys.exit() is theirs to answer for, not ours to follow
            yield [raised(call.label, prompt_id, error)] * len(requests)
        else:
            yield read_values(call.label, prompt_id, values, len(requests))
        return
    for request in requests:
        try:
            outcome = read_value(call.label, prompt_id, function.call([request], call.arguments))
        except BaseException as error:
            outcome = raised(call.label, prompt_id, error)
        yield [outcome]


def check(components: tuple[RewardComponentConfig, ...]) -> Failure | None:
    """The first function that isn't registered or doesn't accept its arguments."""
    for component in components:
        try:
            get_reward_function(component.function).check_arguments(component.arguments)
        except UnknownRewardError as error:
            return Failure(FailureKind.USER_CODE, "reward_unknown_function", f"reward.components: {error}")
        except (TypeError, ValueError) as error:
            given = ", ".join(component.arguments) or "none"
            problem = f"{error}. Given in reward.components[].arguments: {given}."
            return Failure(
                FailureKind.USER_CODE, "reward_bad_arguments", f"reward function {component.function!r}: {problem}"
            )
    return None


def set_up(modules: tuple[Path, ...]) -> Failure | None:
    """Import the user's modules, which register their functions."""
    try:
        import_modules(modules)
    except FailureError as error:
        return error.failure
    except BaseException as error:
        names = ", ".join(str(path) for path in modules)
        message = f"importing reward.modules ({names}) raised {type(error).__name__}: {error}"
        return Failure(FailureKind.USER_CODE, "module_failed", message)
    return None


def serve(connection: Connection) -> None:
    """Answer messages until the parent closes its end."""
    while True:
        try:
            message = connection.recv()
        except EOFError:
            return
        match message:
            case SetUp(modules):
                connection.send(set_up(modules))
            case Check(components):
                connection.send(check(components))
            case Call():
                for chunk in outcomes(message):
                    connection.send(chunk)


def _die_with_parent(descriptor: int) -> None:
    """End this process group as soon as the parent's end of the socket closes, even in the middle of a call."""
    poll = select.poll()
    poll.register(descriptor, getattr(select, "POLLRDHUP", select.POLLHUP))
    poll.poll()
    os.killpg(0, signal.SIGKILL)


def main() -> None:
    """Serve on the socket and write the stack to the file whose descriptors are given, when asked by SIGUSR1."""
    socket, stack = int(sys.argv[1]), int(sys.argv[2])
    os.set_inheritable(socket, False)
    faulthandler.register(signal.SIGUSR1, file=stack, all_threads=False)
    threading.Thread(target=_die_with_parent, args=(socket,), daemon=True).start()
    serve(Connection(socket))


if __name__ == "__main__":
    from reward.worker_main import main as run  # so that messages unpickle to these classes, not to __main__'s

    run()
