"""Scoring in worker processes: real processes, real hangs and deaths."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml
from PIL import Image

from reward.config import RewardComponentConfig, RewardConfig
from reward.group_scoring import GroupScorer
from rollout.failures import Failure, FailureKind
from rollout.media import MediaStore
from rollout.prompts import MediaPart, Message, Prompt, TextPart
from rollout.samples import Completion, FinishReason, Score

Start = Callable[..., GroupScorer]
Calls = Callable[[str], list[str]]


def make_prompt(target: str = "7") -> Prompt:
    return Prompt((Message("user", (TextPart("How many?"),)),), target)


def make_completion(text: str, tokens: int = 3) -> Completion:
    ids = np.zeros(tokens, np.int32)
    return Completion(ids, np.zeros(tokens, np.float32), ids, FinishReason.STOP, text)


GROUP = (make_completion("a"), make_completion("b"), make_completion("c"))


def component(function: str, weight: float = 1.0, **arguments: object) -> RewardComponentConfig:
    return RewardComponentConfig(function=function, weight=weight, arguments=arguments)


async def scored(scorer: GroupScorer, group: tuple[Completion, ...] = GROUP) -> tuple[Score, ...]:
    result = await scorer.score(make_prompt(), group)
    assert not isinstance(result, Failure), result.message
    return result


async def failed(scorer: GroupScorer, group: tuple[Completion, ...] = GROUP) -> Failure:
    result = await scorer.score(make_prompt(), group)
    assert isinstance(result, Failure)
    return result


async def test_a_group_is_scored_in_order_by_all_components(start_scorer: Start) -> None:
    group = (make_completion("ab"), make_completion("<answer>7</answer>"))
    scores = await scored(start_scorer(component("length", 0.5), component("exact_match", 2.0)), group)
    assert [s.value for s in scores] == [1.0, 0.5 * 18 + 2.0]
    assert scores[1].components == {"length": 18.0, "exact_match": 1.0}


@pytest.mark.parametrize(
    ("bad", "reason", "says"),
    [
        (component("raises"), "reward_raised", "KeyError: 'no such column'"),
        (component("exits"), "reward_raised", "SystemExit"),
        (component("returns", what="nan"), "reward_nan", "nan"),
        (component("returns", what="inf"), "reward_infinite", "inf"),
        (component("returns", what="text"), "reward_not_a_number", "'1.0' (str)"),
        (component("returns", what="list"), "reward_not_a_number", "[1.0] (list)"),
        (component("returns", what="none"), "reward_missing", "None"),
        (component("wrong_count"), "reward_wrong_count", "4 values for 3 completions"),
        (component("dies", code=7), "reward_worker_died", "code 7"),
        (component("dies", code=0), "reward_worker_died", "code 0"),
        (component("segfaults"), "reward_worker_died", "SIGSEGV"),
    ],
    ids=lambda value: value.function if isinstance(value, RewardComponentConfig) else None,
)
async def test_a_bad_function_fails_its_group_with_a_reason(
    start_scorer: Start, calls_of: Calls, bad: RewardComponentConfig, reason: str, says: str
) -> None:
    scorer = start_scorer("length", bad)
    failure = await failed(scorer)
    assert (failure.kind, failure.reason) == (FailureKind.USER_CODE, reason)
    assert says in failure.message
    assert repr(bad.function) in failure.message
    assert make_prompt().prompt_id in failure.message
    assert calls_of("length").count("a") == 1
    assert calls_of(bad.function).count("a") == 2  # max_attempts


async def test_a_hang_is_killed_at_the_deadline_and_the_message_says_where_it_was(start_scorer: Start) -> None:
    failure = await failed(start_scorer("hangs", deadline_s=0.5, max_attempts=1))
    assert failure.reason == "reward_timeout"
    assert "0.5 s" in failure.message
    assert "in hangs" in failure.message


async def test_other_groups_go_on_beside_a_hang(start_scorer: Start) -> None:
    scorer = start_scorer("hangs_on_stop", deadline_s=60.0, workers=2)
    assert await scorer.ready() is None
    hung = asyncio.create_task(scorer.score(make_prompt(), (make_completion("stop"),)))
    await asyncio.sleep(0)
    for _ in range(5):
        assert [s.value for s in await scored(scorer)] == [1.0] * 3
    assert not hung.done()
    await asyncio.to_thread(scorer.stop)
    assert isinstance(await hung, Failure)


async def test_groups_after_a_death_are_served_by_a_fresh_worker(start_scorer: Start) -> None:
    scorer = start_scorer(component("process"))
    (before,) = await scored(scorer, GROUP[:1])
    os.kill(int(before.value), signal.SIGKILL)
    (after,) = await scored(scorer, GROUP[:1])
    assert after.value != before.value


async def test_only_the_completion_that_failed_is_tried_again(start_scorer: Start, calls_of: Calls) -> None:
    assert [s.value for s in await scored(start_scorer("flaky"))] == [1.0, 2.0, 1.0]
    assert calls_of("flaky") == ["a", "b", "c", "b"]


async def test_a_failure_of_the_data_is_not_tried_again(start_scorer: Start, calls_of: Calls) -> None:
    scorer = start_scorer("number")
    result = await scorer.score(make_prompt(target="seven"), GROUP)
    assert isinstance(result, Failure)
    assert (result.kind, result.reason) == (FailureKind.DATA, "target_invalid")
    assert calls_of("number") == ["a", "b", "c"]


async def test_images_reach_the_function_by_reference(start_scorer: Start, tmp_path: Path) -> None:
    ref = MediaStore(tmp_path / "media").put_image(Image.new("RGB", (16, 16), (200, 0, 0)))
    result = await start_scorer("red").score(Prompt((Message("user", (MediaPart(ref),)),)), GROUP)
    assert isinstance(result, tuple)
    assert [s.value for s in result] == [200.0] * 3


async def test_the_check_names_an_unknown_function_and_the_nearest(start_scorer: Start) -> None:
    failure = await start_scorer("lenght").check()
    assert failure is not None
    assert failure.reason == "reward_unknown_function"
    assert "Did you mean 'length'" in failure.message


async def test_the_check_names_arguments_that_a_function_does_not_take(start_scorer: Start) -> None:
    failure = await start_scorer(component("exact_match", patern="x")).check()
    assert failure is not None
    assert failure.reason == "reward_bad_arguments"
    assert "exact_match" in failure.message
    assert "patern" in failure.message


@pytest.mark.parametrize(
    ("code", "reason", "says"),
    [
        ("import no_such_module_anywhere", "module_failed", "no_such_module_anywhere"),
        ("def f(:", "module_failed", "SyntaxError"),
        (None, "module_missing", "does not exist"),
        ("import os; os._exit(4)", "reward_worker_start", "code 4"),
    ],
)
async def test_a_module_that_does_not_import_is_reported_when_starting(
    start_scorer: Start, tmp_path: Path, code: str | None, reason: str, says: str
) -> None:
    module = tmp_path / "broken.py"
    if code is not None:
        module.write_text(code)
    failure = await start_scorer("exact_match", modules=(module,)).ready()
    assert failure is not None
    assert failure.reason == reason
    assert says in failure.message
    assert "broken.py" in failure.message


async def test_stopping_ends_the_workers_and_fails_what_is_in_flight(start_scorer: Start) -> None:
    scorer = start_scorer("hangs_on_stop")
    assert await scorer.ready() is None
    children = psutil.Process().children()
    flying = [asyncio.create_task(scorer.score(make_prompt(), (make_completion("stop"),))) for _ in range(3)]
    await asyncio.sleep(0.1)
    await asyncio.to_thread(scorer.stop)
    results = await asyncio.gather(*flying)
    assert {r.reason for r in results if isinstance(r, Failure)} == {"reward_server_stopped"}
    assert len(results) == 3
    assert not [c for c in children if c.is_running() and "reward.worker_main" in " ".join(c.cmdline())]


def test_a_worker_imports_no_heavy_library() -> None:
    code = "import sys, reward.worker_main; print(*{'torch', 'ray', 'vllm', 'transformers'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert found.stdout.strip() == ""


async def test_the_guides_example_works_as_printed(tmp_path: Path) -> None:
    guide = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text()
    blocks = re.findall(r"```(python|yaml)\n(.*?)```", guide, re.DOTALL)
    module = tmp_path / "my_rewards.py"
    module.write_text("\n".join(body for language, body in blocks if language == "python"))
    (recipe,) = [yaml.safe_load(body) for language, body in blocks if language == "yaml"]
    settings = recipe["reward"] | {"modules": [module]}
    settings["components"] += [{"function": "rarest"}, {"function": "says_target"}]
    scorer = GroupScorer(RewardConfig(**settings), tmp_path)
    try:
        assert await scorer.ready() is None
        assert await scorer.check() is None
        right, wrong = await scored(scorer, (make_completion("7", tokens=18), make_completion("Therefore 8")))
    finally:
        scorer.stop()
    # right: 1 - 0.01 * 2 + 0 + 1 + 1; wrong: 0 + 0.2 + 1 + 0
    assert right.value == pytest.approx(2.98)
    assert wrong.value == pytest.approx(1.2)
    assert right.components["short_and_right/length"] == pytest.approx(-0.02)
