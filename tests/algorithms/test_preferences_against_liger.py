"""Preference losses against Liger's, where that package is installed. Where the two differ, a test says how and why."""

from types import ModuleType

import pytest
import torch
from torch import Tensor

from algorithms.preferences import unpaired
from algorithms.preferences.inputs import AnswerLogProbs, PreferenceInputs, UnpairedInputs
from algorithms.preferences.text import preference_outcome

PAIRS = 16


def liger(name: str) -> ModuleType:
    module: ModuleType = pytest.importorskip(f"liger_kernel.chunked_loss.{name}_loss")
    return module


@pytest.fixture(params=range(4))
def inputs(request: pytest.FixtureRequest) -> PreferenceInputs:
    generator = torch.Generator().manual_seed(request.param)

    def side() -> AnswerLogProbs:
        tokens = torch.randint(1, 30, (PAIRS,), generator=generator)
        draws = torch.rand(2, PAIRS, generator=generator, dtype=torch.float64) * 2 + 0.05
        return AnswerLogProbs(-draws[0] * tokens, tokens, -draws[1] * tokens)

    return PreferenceInputs(side(), side())


def ours(name: str, inputs: PreferenceInputs | UnpairedInputs, **options: object) -> Tensor:
    outcome = preference_outcome(name, inputs, options)
    return outcome.loss(len(outcome.values))


def sums(inputs: PreferenceInputs) -> tuple[Tensor, Tensor, Tensor]:
    return inputs.chosen.policy, inputs.rejected.policy, torch.zeros(2 * PAIRS)


def references(inputs: PreferenceInputs) -> dict[str, Tensor | None]:
    return {"ref_chosen_logps": inputs.chosen.reference, "ref_rejected_logps": inputs.rejected.reference}


def test_dpo_agrees(inputs: PreferenceInputs) -> None:
    peer = liger("dpo").LigerFusedLinearDPOFunction.preference_loss_fn
    theirs, chosen, rejected = peer(*sums(inputs), **references(inputs), beta=0.2)
    torch.testing.assert_close(ours("dpo", inputs, beta=0.2), theirs)
    reported = preference_outcome("dpo", inputs, {"beta": 0.2}).sums
    torch.testing.assert_close(reported["chosen_reward"][0], chosen.sum())
    torch.testing.assert_close(reported["rejected_reward"][0], rejected.sum())


def test_robust_dpo_agrees(inputs: PreferenceInputs) -> None:
    peer = liger("dpo").LigerFusedLinearDPOFunction.preference_loss_fn
    theirs, *_ = peer(*sums(inputs), **references(inputs), beta=0.2, loss_type="robust", label_smoothing=0.3)
    torch.testing.assert_close(ours("robust_dpo", inputs, beta=0.2, flip_rate=0.3), theirs)


def test_simpo_agrees(inputs: PreferenceInputs) -> None:
    peer = liger("simpo").LigerFusedLinearSimPOFunction.preference_loss_fn
    theirs, *_ = peer(inputs.chosen.token_mean, inputs.rejected.token_mean, torch.zeros(2 * PAIRS), beta=1.5, gamma=0.7)
    torch.testing.assert_close(ours("simpo", inputs, beta=1.5, gamma=0.7), theirs)


def test_orpos_odds_ratio_agrees(inputs: PreferenceInputs) -> None:
    peer = liger("orpo").LigerFusedLinearORPOFunction.preference_loss_fn
    theirs, *_ = peer(inputs.chosen.token_mean, inputs.rejected.token_mean, torch.zeros(2 * PAIRS), beta=0.3)
    supervised = ours("orpo", inputs, odds_weight=0.0)
    torch.testing.assert_close(ours("orpo", inputs, odds_weight=0.3) - supervised, theirs)


def test_ligers_orpo_is_infinite_where_an_answer_is_certain() -> None:
    # Its log1p(-exp(0)) is -inf, and so is the other answer's where both are certain, which makes NaN; ours is cut.
    peer = liger("orpo").LigerFusedLinearORPOFunction.preference_loss_fn
    certain = AnswerLogProbs(torch.zeros(1), torch.ones(1, dtype=torch.int64))
    theirs, *_ = peer(certain.token_mean, certain.token_mean, torch.zeros(2))
    assert not torch.isfinite(theirs)
    assert torch.isfinite(ours("orpo", PreferenceInputs(certain, certain)))


def test_kto_agrees(inputs: PreferenceInputs) -> None:
    peer = liger("kto").LigerFusedLinearKTOFunction.preference_loss_fn
    answers = inputs.answers()
    theirs, desirable, undesirable = peer(
        answers.answers.policy,
        answers.is_desirable,
        torch.zeros(2 * PAIRS),
        ref_log_prob_chunk=answers.answers.reference,
        beta=0.2,
        kl=torch.tensor(1.3),
    )
    with_baseline = UnpairedInputs(answers.answers, answers.is_desirable, kl_baseline=torch.tensor(1.3))
    torch.testing.assert_close(ours("kto", with_baseline, beta=0.2), theirs)
    reported = preference_outcome("kto", with_baseline, {"beta": 0.2}).sums
    torch.testing.assert_close(reported["desirable_reward"][0], desirable)
    torch.testing.assert_close(reported["undesirable_reward"][0], undesirable)


def test_ligers_bco_has_no_reward_shift_and_so_is_ours_only_before_the_first_step(inputs: PreferenceInputs) -> None:
    # Its sum of both answers' losses is twice our mean over answers.
    peer = liger("dpo").LigerFusedLinearDPOFunction.preference_loss_fn
    theirs, *_ = peer(*sums(inputs), **references(inputs), beta=0.2, loss_type="bco_pair")
    torch.testing.assert_close(2 * ours("bco", inputs, beta=0.2), theirs)
    state = unpaired.RewardShift(0.9).after(preference_outcome("bco", inputs, {"beta": 0.2}).sums)
    moved = PreferenceInputs(inputs.chosen, inputs.rejected, state=state)
    assert (2 * ours("bco", moved, beta=0.2) - theirs).abs() > 1e-3
