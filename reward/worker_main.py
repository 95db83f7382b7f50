"""What runs inside a worker process: it imports the user's modules once, then calls reward functions as it is told.

``reward.worker_pool`` starts it as ``python -m reward.worker_main <socket> <stack file>`` (two inherited descriptors)
and holds the other end of the socket. The process ends when its parent closes that end. It imports neither torch nor
Ray, unless the user's modules do.
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
from reward.returned_values import ComponentValues, raised, read_value, read_values
from rollout.failures import Failure, FailureError, FailureKind
from rollout.user_code import import_modules

CallResult = ComponentValues | Failure
"""What became of one request to a reward function."""


@dataclass(frozen=True)
class SetUp:
    """The first message: import these modules. The answer: None, or the Failure of a module."""

    modules: tuple[Path, ...]


@dataclass(frozen=True)
class Check:
    """Check that the functions exist and accept their arguments. The answer: None or a Failure."""

    components: tuple[RewardComponentConfig, ...]


@dataclass(frozen=True)
class Call:
    """Score these completions of one prompt with one function.

    The answers: lists of results, in order, until there is one for each request. A function that scores one completion
    answers after each, so that the pool can hold every call to its deadline and knows which request broke it.
    """

    label: str
    function: str
    arguments: Mapping[str, Any]
    requests: tuple[RewardRequest, ...]


def run_call(call: Call) -> Iterator[list[CallResult]]:
    """Call the function: one list for each request with its result, or one list of all if it takes the group."""
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
        except BaseException as error:  # a sys.exit() in user code is a failure of it, and doesn't end this process
            yield [raised(call.label, prompt_id, error)] * len(requests)
        else:
            yield read_values(call.label, prompt_id, values, len(requests))
        return
    for request in requests:
        try:
            result = read_value(call.label, prompt_id, function.call([request], call.arguments))
        except BaseException as error:
            result = raised(call.label, prompt_id, error)
        yield [result]


def check(components: tuple[RewardComponentConfig, ...]) -> Failure | None:
    """The failure of the first function that isn't registered or doesn't accept its arguments, or None."""
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
    """Import the user's modules, which register their functions. The failure of the first that can't be imported."""
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
                for results in run_call(message):
                    connection.send(results)


def _die_with_parent(descriptor: int) -> None:
    """End this process group as soon as the parent's end of the socket closes, even in the middle of a call."""
    poll = select.poll()
    poll.register(descriptor, getattr(select, "POLLRDHUP", select.POLLHUP))
    poll.poll()
    os.killpg(0, signal.SIGKILL)


def main() -> None:
    """Serve on the socket; on SIGUSR1, write the stack to the file. Both come as descriptors on the command line."""
    socket, stack = int(sys.argv[1]), int(sys.argv[2])
    os.set_inheritable(socket, False)
    faulthandler.register(signal.SIGUSR1, file=stack, all_threads=False)
    threading.Thread(target=_die_with_parent, args=(socket,), daemon=True).start()
    serve(Connection(socket))


if __name__ == "__main__":
    from reward.worker_main import main as run  # so that messages unpickle to these classes, not to __main__'s

    run()
