"""Reward functions: the request they take, the decorator that registers them, and how one is looked up and called.

Here a function is called in the caller's own process; ``reward.group_scoring`` has it called in worker processes.
"""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rollout.media import MediaRef, MediaStore
from rollout.prompts import Message, Prompt, TextPart
from rollout.samples import FinishReason

Style = Literal["request", "columns", "chat_columns"]
AnyFunction = TypeVar("AnyFunction", bound=Callable[..., Any])


@functools.lru_cache(maxsize=16)
def _decoded(folder: Path, ref: MediaRef) -> Image.Image:
    return MediaStore(folder).load_image(ref)


@dataclass(frozen=True, eq=False)
class RewardRequest:
    """One completion and everything the policy saw before it.

    Attributes:
        prompt: the messages, the target and the metadata, as the data set has them.
        completion: the decoded completion, without special tokens.
        token_ids: [tokens] int32, the completion as it was sampled.
        finish_reason: why it ended; LENGTH means that it is truncated.
        media_folder: the media store, where the prompt has media.
    """

    prompt: Prompt
    completion: str
    token_ids: NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))
    finish_reason: FinishReason = FinishReason.STOP
    media_folder: Path | None = None

    @property
    def prompt_messages(self) -> tuple[Message, ...]:
        """The conversation that the completion answers."""
        return self.prompt.messages

    @property
    def prompt_text(self) -> str:
        """The text of all messages, joined by newlines, without the media."""
        return "\n".join("".join(p.text for p in m.parts if isinstance(p, TextPart)) for m in self.prompt.messages)

    @property
    def prompt_id(self) -> str:
        """The hash of the prompt's content."""
        return self.prompt.prompt_id

    @property
    def target(self) -> Any:
        """What a verifier compares with, or None."""
        return self.prompt.target

    @property
    def metadata(self) -> Mapping[str, Any]:
        """Further columns of the data set."""
        return self.prompt.metadata

    @property
    def media(self) -> tuple[MediaRef, ...]:
        """Every medium of the prompt, by reference, in order."""
        return self.prompt.media

    @property
    def images(self) -> list[Image.Image]:
        """The prompt's images, decoded when asked for (once a group). You get copies.

        Raises:
            DataError: an image can't be read.
            ValueError: the prompt has images and the request has no media folder.
        """
        refs = [ref for ref in self.media if ref.kind == "image"]
        if refs and self.media_folder is None:
            raise ValueError(
                f"prompt {self.prompt_id} has images, but the request has no media_folder to read them from"
            )
        return [_decoded(self.media_folder, ref).copy() for ref in refs if self.media_folder is not None]


@dataclass(frozen=True)
class RewardFunction:
    """A registered function and how it is called."""

    name: str
    function: Callable[..., Any]
    batched: bool
    style: Style

    @property
    def takes_group(self) -> bool:
        """Whether one call scores all completions of a prompt."""
        return self.batched or self.style != "request"

    def check_arguments(self, arguments: Mapping[str, Any]) -> None:
        """Raise the TypeError that a call would raise, if ``arguments`` don't fit the signature."""
        signature = inspect.signature(self.function)
        if self.style == "request":
            signature.bind(object(), **arguments)
        else:
            signature.bind_partial([], [], **arguments)

    def call(self, requests: list[RewardRequest], arguments: Mapping[str, Any]) -> Any:
        """What the function returns for the one request, or for all of them if it takes a group."""
        if self.style != "request":
            prompts, completions, columns = _columns(requests, chat=self.style == "chat_columns")
            return self.function(prompts, completions, **self._accepted(columns), **_own(columns, arguments))
        return self.function(requests if self.batched else requests[0], **arguments)

    def _accepted(self, columns: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        parameters = inspect.signature(self.function).parameters
        if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
            return dict(columns)
        return {name: column for name, column in columns.items() if name in parameters}


def _own(columns: Mapping[str, Any], arguments: Mapping[str, Any]) -> Mapping[str, Any]:
    if both := sorted(columns.keys() & arguments.keys()):
        raise TypeError(f"{', '.join(both)} is both a column of the data set and an argument in the recipe; rename one")
    return arguments


def _columns(requests: list[RewardRequest], *, chat: bool) -> tuple[list[Any], list[Any], dict[str, list[Any]]]:
    """Prompts, completions and columns, one entry a completion: as strings, or as chat messages."""
    prompts: list[Any] = [_chat(r) if chat else r.prompt_text for r in requests]
    completions: list[Any] = [
        [{"role": "assistant", "content": r.completion}] if chat else r.completion for r in requests
    ]
    columns: dict[str, list[Any]] = {key: [r.metadata.get(key) for r in requests] for key in requests[0].metadata}
    columns |= {
        "target": [r.target for r in requests],
        "prompt_id": [r.prompt_id for r in requests],
        "completion_ids": [r.token_ids.tolist() for r in requests],
        "requests": list(requests),
    }
    return prompts, completions, columns


def _chat(request: RewardRequest) -> list[dict[str, Any]]:
    return [
        {
            "role": m.role,
            "content": [
                {"type": "text", "text": p.text} if isinstance(p, TextPart) else {"type": p.media.kind} for p in m.parts
            ],
        }
        for m in request.prompt_messages
    ]


class UnknownRewardError(LookupError):
    """No reward function of that name is registered."""


_REGISTERED: dict[str, RewardFunction] = {}


def reward_function(
    name: str, *, batched: bool = False, style: Style = "request"
) -> Callable[[AnyFunction], AnyFunction]:
    """Register a reward function under ``name``, by which the recipe's ``reward.components`` ask for it.

    A function returns a real, finite number for a completion, or a dict of them (recorded one by one, summed for the
    component's value). Anything else, None included, is a failure, never a number.

    Args:
        name: unique among the registered functions; no "/" (which separates a function from its dict's keys).
        batched: ``f(requests, **arguments)`` scores all completions of one prompt and returns a list, rather than
            ``f(request, **arguments)`` one completion.
        style: "request" as above. "columns" is ``f(prompts, completions, **columns) -> list``, with strings; the
            columns are ``target``, ``prompt_id``, ``completion_ids``, ``requests`` and the prompt's metadata, one
            entry a completion, as far as the function accepts them. "chat_columns" is the same with lists of chat
            messages (``completion[0]["content"]``).
    Raises:
        ValueError: the name is taken by another function, or empty, or has a "/".
        TypeError: the function is asynchronous.
    """

    if not name or "/" in name:
        raise ValueError(f"{name!r} can't name a reward function: a name must be non-empty text without '/'")

    def register(function: AnyFunction) -> AnyFunction:
        if inspect.iscoroutinefunction(function):
            raise TypeError(
                f"reward function {name!r} is asynchronous; make it a plain function, which may call asyncio.run"
            )
        taken = _REGISTERED.get(name)
        if taken is not None and _origin(taken.function) != _origin(function):
            raise ValueError(
                f"reward function {name!r} is already registered, by {_origin(taken.function)}; rename one"
            )
        _REGISTERED[name] = RewardFunction(name, function, batched, style)
        return function

    return register


def _origin(function: Callable[..., Any]) -> str:
    code = getattr(function, "__code__", None)
    where = code.co_filename if code is not None else getattr(function, "__module__", "?")
    return f"{where}:{getattr(function, '__qualname__', repr(function))}"


def registered_reward_functions() -> list[str]:
    """Names of the registered functions, sorted."""
    return sorted(_REGISTERED)


def get_reward_function(name: str) -> RewardFunction:
    """The function registered under ``name``.

    Raises:
        UnknownRewardError: lists the registered names and the nearest spelling.
    """
    if name in _REGISTERED:
        return _REGISTERED[name]
    names = registered_reward_functions()
    raise UnknownRewardError(
        f"no reward function is called {name!r}.{_nearest(name, names)} Registered: {', '.join(names)}."
    )


def _nearest(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(names), n=1)
    return f" Did you mean {near[0]!r}?" if near else " Is the file that registers it named in reward.modules?"
