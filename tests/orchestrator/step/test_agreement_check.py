"""Whether trainer and generators are found to disagree exactly where they do."""

from __future__ import annotations

import math

import pytest

from actors.config import WeightsConfig
from orchestrator.step.agreement_check import CHECK_TOKENS, alarm, measure_agreement
from rollout.config import SamplingConfig
from rollout.failures import Failure, FailureError, FailureKind
from tests.orchestrator.stand_ins import Events, Policy, fleet_of, offer, prompt

SAMPLING = SamplingConfig(max_tokens=100)
PROMPTS = [prompt("0"), prompt("1")]


async def test_agreement_is_zero() -> None:
    fleet, _ = await fleet_of(1, Events())
    found = await measure_agreement(fleet, Policy(log_prob=-1.0), PROMPTS, SAMPLING, 0)  # type: ignore[arg-type]
    assert found == {"rollout/mismatch_kl": 0.0, "rollout/max_logprob_gap": 0.0}


async def test_a_difference_is_measured_by_k3_and_by_its_largest_token() -> None:
    # The generator says -1, the trainer -1.5: d = -0.5, k3 = exp(-0.5) - 1 + 0.5.
    fleet, _ = await fleet_of(1, Events())
    found = await measure_agreement(fleet, Policy(log_prob=-1.5), PROMPTS, SAMPLING, 0)  # type: ignore[arg-type]
    assert found["rollout/mismatch_kl"] == pytest.approx(math.exp(-0.5) - 0.5)
    assert found["rollout/max_logprob_gap"] == pytest.approx(0.5)


async def test_completions_of_the_check_are_short() -> None:
    fleet, generators = await fleet_of(1, Events())
    asked: list[int] = []
    (generator,) = generators.started
    generate = generator.generate

    async def watched(prompt, n, sampling, seed, name):  # type: ignore[no-untyped-def]
        asked.append(sampling.max_tokens)
        return await generate(prompt, n, sampling, seed, name)

    generator.generate = watched  # type: ignore[method-assign]
    await measure_agreement(fleet, Policy(), PROMPTS, SAMPLING, 0)  # type: ignore[arg-type]
    assert asked == [CHECK_TOKENS] * 2


async def test_a_fleet_at_another_version_than_it_should_be_is_a_bug() -> None:
    fleet, _ = await fleet_of(1, Events())
    await fleet.publish(offer(1))
    with pytest.raises(FailureError) as caught:
        await measure_agreement(fleet, Policy(), PROMPTS, SAMPLING, 2)  # type: ignore[arg-type]
    assert (caught.value.failure.kind, caught.value.failure.reason) == (FailureKind.BUG, "agreement_check_version")


async def test_prompts_that_cannot_be_generated_leave_no_agreement_check() -> None:
    fleet, generators = await fleet_of(1, Events())
    for text in ("0", "1"):
        generators.started[0].refused[text] = Failure(FailureKind.DATA, "prompt_too_long", "too long")
    with pytest.raises(FailureError) as caught:
        await measure_agreement(fleet, Policy(), PROMPTS, SAMPLING, 0)  # type: ignore[arg-type]
    assert caught.value.failure.reason == "no_agreement_check"


def test_an_alarm_names_both_figures_and_both_settings() -> None:
    config = WeightsConfig(max_logprob_gap=0.1, max_mismatch_kl=0.01)
    assert alarm({"rollout/mismatch_kl": 0.001, "rollout/max_logprob_gap": 0.05}, config) is None
    assert alarm({}, config) is None
    for kl, gap in ((0.02, 0.05), (0.001, 0.2)):
        said = alarm({"rollout/mismatch_kl": kl, "rollout/max_logprob_gap": gap}, config)
        assert said is not None
        assert "weights.max_mismatch_kl = 0.01" in said
        assert "weights.max_logprob_gap = 0.1" in said
