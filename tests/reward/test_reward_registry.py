"""Registration, lookup and the ways of calling a reward function."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from reward.registry import RewardRequest, UnknownRewardError, get_reward_function, reward_function
from rollout.media import MediaStore
from rollout.prompts import MediaPart, Message, Prompt, TextPart

_names = (f"registry_test_{i}" for i in itertools.count())


def register(function: Callable[..., Any], **options: Any) -> Any:
    name = next(_names)
    reward_function(name, **options)(function)
    return get_reward_function(name)


def test_an_unknown_name_is_answered_with_the_nearest_and_all_registered() -> None:
    import reward.verifiers  # noqa: F401

    with pytest.raises(UnknownRewardError, match=r"'exact_mach'.*Did you mean 'exact_match'.*contains.*numeric_match"):
        get_reward_function("exact_mach")


def test_a_name_taken_by_another_function_is_refused() -> None:
    reward_function("registry_taken")(lambda request: 1.0)

    def other(request: RewardRequest) -> float:
        return 0.0

    with pytest.raises(ValueError, match="already registered"):
        reward_function("registry_taken")(other)


def test_an_asynchronous_function_is_refused_at_registration() -> None:
    async def later(request: RewardRequest) -> float:
        return 1.0

    with pytest.raises(TypeError, match=r"asyncio\.run"):
        reward_function("registry_later")(later)


@pytest.mark.parametrize("name", ["", "a/b"])
def test_a_name_that_would_blur_component_names_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="can't name"):
        reward_function(name)


def test_columns_hold_one_entry_a_completion_as_far_as_the_function_accepts_them() -> None:
    def keep(prompts: list[str], completions: list[str], target: list[Any], colour: list[str]) -> list[Any]:
        return list(zip(prompts, completions, target, colour, strict=True))

    prompt = Prompt((Message("user", (TextPart("What?"),)),), 7, {"colour": "red", "unused": 1})
    requests = [RewardRequest(prompt, "a"), RewardRequest(prompt, "b")]
    assert register(keep, style="columns").call(requests, {}) == [("What?", "a", 7, "red"), ("What?", "b", 7, "red")]


def test_chat_columns_are_lists_of_messages() -> None:
    def keep(prompts: Any, completions: Any, **columns: Any) -> Any:
        return prompts[0][0]["content"][0]["text"], completions[0][0]["content"], sorted(columns)

    prompt = Prompt((Message("user", (TextPart("What?"),)),), 7, {"colour": "red"})
    said = register(keep, style="chat_columns").call([RewardRequest(prompt, "a")], {})
    assert said == ("What?", "a", ["colour", "completion_ids", "prompt_id", "requests", "target"])


def test_an_argument_with_a_columns_name_is_refused() -> None:
    function = register(lambda prompts, completions, **columns: [1.0], style="columns")
    with pytest.raises(TypeError, match="target is both"):
        function.call([RewardRequest(Prompt((), 7), "a")], {"target": 3})


def test_arguments_that_do_not_fit_are_named_before_any_call() -> None:
    function = register(lambda request, *, tolerance=0.0: 1.0)
    function.check_arguments({"tolerance": 1.0})
    with pytest.raises(TypeError, match="tolerence"):
        function.check_arguments({"tolerence": 1.0})


def test_images_are_decoded_from_the_store_and_are_the_callers_to_change(tmp_path: Path) -> None:
    ref = MediaStore(tmp_path).put_image(Image.new("RGB", (16, 16), (200, 0, 0)))
    request = RewardRequest(Prompt((Message("user", (MediaPart(ref),)),)), "a", media_folder=tmp_path)
    request.images[0].putpixel((0, 0), (0, 0, 0))
    assert request.images[0].getpixel((0, 0)) == (200, 0, 0)
    assert request.media == (ref,)
